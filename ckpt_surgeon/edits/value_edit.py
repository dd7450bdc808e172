"""How edits of values are declared, and the changes that they are made of.

A value edit is written for a Checkpoint and computes nothing when it is called.  On a state_dict of torch tensors its
change is carried out at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Concatenate, ParamSpec, TypeVar, cast

from ..errors import EditError, KeyCollision
from ..tensors.checkpoint import Checkpoint, Versions, versions_of
from ..tensors.opaque import ways_beside
from ..tensors.records import ExtraState, OpaqueTensor, Tensor, findings
from .change import Change, Edit, Inline, edit, rebuilt, rename_versions
from .companions import checked
from .inputs import FIRST, own_versions

StateDict = TypeVar("StateDict", bound=Mapping)  # type: ignore[type-arg]
Arguments = ParamSpec("Arguments")


def value_edit(
    short_help: str, *examples: str, inline: Iterable[Inline] = (), computes: bool = False, fills: str = ""
) -> Callable[[Callable[Concatenate[Checkpoint, Arguments], Change[Checkpoint]]], Edit[Arguments]]:
    """An edit of values, written for a Checkpoint; a state_dict of torch tensors goes there and back.

    It is declared as by :func:`~ckpt_surgeon.edits.change.edit`.
    """

    def made(function: Callable[Concatenate[Checkpoint, Arguments], Change[Checkpoint]]) -> Edit[Arguments]:
        def plan(state_dict: StateDict, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Change[StateDict]:
            found: dict[int, object] = {}  # torch's tensors, by the identities of their records
            records = _records(state_dict, found)
            others = [_records(other, found) for other in args]  # all that an edit takes by position are checkpoints
            named = {name: _records(one, found) if isinstance(one, Mapping) else one for name, one in kwargs.items()}
            change = cast("Callable[..., Change[Checkpoint]]", function)(records, *others, **named)
            if isinstance(state_dict, Checkpoint):
                return change  # type: ignore[return-value]
            checked(change.before, change.result, change.origins, change.settled)  # records tell a transposed view
            return _carried_out(state_dict, found, change)

        plan.__name__, plan.__doc__, plan.__module__ = function.__name__, function.__doc__, function.__module__
        plan.__wrapped__ = function  # type: ignore[attr-defined]
        found: Edit[Arguments] = edit(
            short_help, *examples, changes_values=True, inline=inline, computes=computes, fills=fills
        )(plan)
        return found

    return made


def _records(state_dict: object, found: dict[int, object]) -> Checkpoint:
    """A state_dict as a Checkpoint; ``found`` gets torch's tensors by the identities of their records."""
    if isinstance(state_dict, Checkpoint):
        return state_dict
    assert isinstance(state_dict, Mapping)
    if state_dict and all(isinstance(one, Tensor) for one in state_dict.values()):
        return Checkpoint(dict(state_dict), container="memory", versions=versions_of(state_dict))
    from ..tensors.torch_bridge import from_torch

    records = from_torch(state_dict)
    found.update((id(record), state_dict[key]) for key, record in records.items())
    return records


def _carried_out(state_dict: StateDict, found: Mapping[int, object], change: Change[Checkpoint]) -> Change[StateDict]:
    """The change of a state_dict of torch tensors: untouched tensors are the very same objects."""
    from ..tensors.torch_bridge import to_torch

    fresh = {key: tensor for key, tensor in change.result.items() if id(tensor) not in found}
    made = to_torch(Checkpoint(fresh)) if fresh else {}
    if problems := [finding.problem for finding in findings(fresh.values()) if finding.problem]:
        raise EditError(problems)
    before = {key: found.get(id(tensor), tensor) for key, tensor in change.before.items()}
    tensors = {
        key: made[key].to(_device(before, change.origins[key])) if key in made else found[id(tensor)]
        for key, tensor in change.result.items()
    }
    notes = [finding.note for finding in findings(fresh.values()) if finding.note]
    result = rebuilt(state_dict, tensors, change.result.versions)
    whole = cast(StateDict, before) if change.inputs else state_dict
    return Change(whole, result, change.origins, (*change.notes, *notes), change.settled, change.inputs)


def _device(before: Mapping[str, object], olds: Iterable[str]) -> str:
    """Where a new tensor goes: to its first source."""
    return next(
        (str(getattr(before[old], "device", "cpu")) for old in olds if not isinstance(before[old], Tensor)), "cpu"
    )


# -- what they are made of


def each(
    state_dict: Checkpoint,
    keys: Iterable[str],
    convert: Callable[[str, Tensor], Tensor],
) -> Change[Checkpoint]:
    """Convert the tensors of some keys; tied ones once, so that they stay tied.  All problems at once."""
    chosen = set(keys)
    made: dict[object, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    problems: list[str] = []
    opaque = False
    for key, tensor in state_dict.items():
        if key not in chosen or isinstance(tensor, ExtraState):  # which a glob may take in, and has no elements
            tensors[key] = tensor
            continue
        try:
            if isinstance(tensor, OpaqueTensor):
                opaque = True
                raise EditError([f"{key!r} is a {tensor.kind} tensor, its values cannot be edited"])
            if tensor.tie not in made:
                made[tensor.tie] = convert(key, tensor)
            tensors[key] = made[tensor.tie]
        except EditError as error:
            problems += error.problems
    if problems:
        raise EditError(problems, remedy=ways_beside(state_dict) if opaque else "")
    parted = {tie for tie, tensor in made.items() if tensor.tie != tie}
    untied = [key for key, tensor in state_dict.items() if key not in chosen and tensor.tie in parted]
    said = [f"{len(untied):,} keys are no longer tied to one that was edited: {', '.join(untied[:3])}"] * bool(untied)
    origins = {key: (key,) for key in tensors}
    result = state_dict.with_tensors(tensors, state_dict.versions)
    return Change(state_dict, result, origins, tuple(said))


def of_first(change: Change[Checkpoint], inputs: Iterable[str], notes: Iterable[str]) -> Change[Checkpoint]:
    """A change of a union of inputs as one that makes a checkpoint like the first."""
    names = tuple(name for name in inputs if name != FIRST)
    result = change.result.with_tensors(change.result.tensors, own_versions(change.result.versions, names))
    return replace(change, result=result, notes=tuple(notes), inputs=names)


def settled(
    change: Change[Checkpoint], sets: Sequence[tuple[tuple[str, ...], Mapping[str, Tensor]]]
) -> Change[Checkpoint]:
    """A change whose edit has seen to all of these sets of keys."""
    return replace(change, settled=frozenset(key for keys, _ in sets for key in keys))


def regrouped(
    state_dict: Checkpoint, sets: Sequence[tuple[tuple[str, ...], Mapping[str, Tensor]]]
) -> Change[Checkpoint]:
    """Replace sets of keys by new keys, in the place of the first of each set; ties among them are kept."""
    gone = {key: index for index, (keys, _) in enumerate(sets) for key in keys}
    done: set[int] = set()
    tensors: dict[str, Tensor] = {}
    origins: dict[str, tuple[str, ...]] = {}
    collisions: dict[str, list[str]] = {}
    shared: dict[object, list[Tensor]] = {}

    def put(new: str, tensor: Tensor, olds: tuple[str, ...]) -> None:
        if new in tensors:
            collisions.setdefault(new, list(origins[new])).extend(olds)
        tensors[new], origins[new] = tensor, olds

    for key, tensor in state_dict.items():
        index = gone.get(key)
        if index is None:
            put(key, tensor, (key,))
        elif index not in done:
            done.add(index)
            keys, made = sets[index]
            tie = tuple(state_dict[old].tie for old in keys)
            values = shared.setdefault(tie, list(made.values()))
            for new, value in zip(made, values, strict=True):
                put(new, value, keys)
    if collisions:
        raise KeyCollision(collisions)
    versions = versions_of(state_dict)
    first = {olds[0]: new for new, olds in origins.items()}
    moved = None if versions is None else _of_modules(rename_versions(versions, first), state_dict, tensors)
    return Change(state_dict, state_dict.with_tensors(tensors, moved), origins)


def _of_modules(versions: Versions, before: Iterable[str], after: Iterable[str]) -> Versions:
    """The versions without those of modules whose keys, all of them, went into keys of other modules."""
    held, left = ({path for key in keys for path in _paths(key)} for keys in (before, after))
    return {path: version for path, version in versions.items() if path in left or path not in held}


def _paths(key: str) -> Iterable[str]:
    """The module that a key belongs to, and all that hold it."""
    parts = key.split(".")
    return (".".join(parts[:depth]) for depth in range(len(parts)))
