"""Edits that put checkpoints together: join, which takes all keys of each, and graft, which takes a part of one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import translate
from typing import Annotated, cast

from ..errors import Argument, EditError, KeyCollision, NothingMatched, Phrase, listed
from ..files.spans import Block
from ..tensors.checkpoint import Checkpoint
from ..tensors.records import ComputedTensor, ExtraState, Finding, OpaqueTensor, Tensor
from ..tensors.views import axis_of, interleaved, sliced
from ..text import plural
from .arguments import Input, Numbers, Pairs, Patterns
from .change import Change, Inline, OnCollision, listed_patterns, matching, rekeyed
from .inputs import FIRST, label, numbered, parted, qualified, union
from .keys import strip_prefix
from .rename import Rules, parse_pairs
from .value_edit import of_first, value_edit


@value_edit(
    "Join checkpoints into one.",
    "unet.safetensors vae.safetensors whole.safetensors --prefixes unet.,vae.",
    "stage1.pth stage2.pth stage3.pth whole.pth --strip module.",
    "mp_rank_00.pt mp_rank_01.pt whole.pt --concat '.*query_key_value.*' 0 --concat '.*dense_4h_to_h.weight' 1",
    inline=[Inline("", help="Join all inputs.")],
)
def join(
    state_dict: Checkpoint,
    *others: Annotated[Input, "The checkpoints that are joined to the first."],
    take: Annotated[Patterns, "Globs on the keys that are taken; 2::GLOB is for the second input alone."] = (),
    strip: Annotated[Patterns, "Prefixes to take off the keys; 2::PREFIX is for the second input alone."] = (),
    prefixes: Annotated[Sequence[str], "A prefix for the keys of each input, in their order; empty for none."] = (),
    on_collision: OnCollision = "error",
    concat: Annotated[Numbers, "Ranks of one model: keys that match are joined along dimension N."] = (),
    rows: Annotated[Numbers, "With concat: keys that match are cut to N rows (a padded vocabulary)."] = (),
) -> Change[Checkpoint]:
    """Join checkpoints: the union of their keys, in the order of the inputs.

    Of each input, ``take`` chooses keys, then ``strip`` takes prefixes off, then ``prefixes`` puts one in front.  A
    key that two inputs have is an error naming both files, unless ``on_collision`` is "first" or "last" (overlay).

    With ``concat`` the inputs are ranks of one model, in their order: keys that match a regular expression are joined
    along its dimension (the first expression that matches the whole key counts), all others that several inputs have
    must be equal in each, which is checked while they are written.  ``rows`` cuts joined tensors, whose vocabulary was
    padded so that it can be divided.  Raises KeyCollision, NothingMatched, EditError.

    >>> import torch
    >>> first, second = {"fc.bias": torch.zeros(2)}, {"module.conv.bias": torch.ones(2)}
    >>> list(join(first, second, strip="module."))
    ['fc.bias', 'conv.bias']
    >>> join({"w": torch.zeros(1), "n": torch.ones(1)}, {"w": torch.ones(2), "n": torch.ones(1)}, concat={"w": 0})
    {'w': tensor([0., 1., 1.]), 'n': tensor([1.])}
    """
    inputs = {FIRST: state_dict, **numbered(cast(Sequence[Checkpoint], others))}
    if len(inputs) < 2:
        raise EditError(["join needs two checkpoints or more"])
    if not any(inputs.values()):
        raise NothingMatched(["*"])
    whole = union(state_dict, {name: one for name, one in inputs.items() if name != FIRST})
    new_names: dict[str, str] = {}
    for name, keys in _chosen(inputs, take, strip, prefixes).items():
        new_names.update((key if name == FIRST else qualified(name, key), new) for key, new in keys.items())
    rules = [(re.compile(pattern), dim) for pattern, dim in _numbers(concat)]
    try:
        change = rekeyed(whole, new_names, on_collision="first" if rules else on_collision)
    except KeyCollision as error:
        raise KeyCollision(_with_files(error.collisions, inputs), remedy=error.remedy) from None
    if rules:
        change = _of_ranks(
            change, new_names, rules, [(re.compile(one), count) for one, count in _numbers(rows)], inputs
        )
    left = {
        name: len(one) - len(keys)
        for (name, one), keys in zip(inputs.items(), _by_input(new_names, inputs), strict=True)
    }
    said = [
        f"not taken of {label(name, inputs[name])}: {plural(count, 'key')}" for name, count in left.items() if count
    ]
    return of_first(change, inputs, [*change.notes, *said])


@value_edit(
    "Take a part of another checkpoint.",
    "model.pth donor.pth out.pth --take 'fc.*'",
    "model.pth donor.pth out.pth --take 'encoder.*' --as 'encoder=backbone'",
    inline=[Inline("{take}")],
)
def graft(
    state_dict: Checkpoint,
    donor: Annotated[Input, "The checkpoint that the part is taken from."],
    take: Annotated[Patterns, "Globs on the donor's keys."],
    *,
    as_: Annotated[Pairs, "Renames of the keys that are taken, as in rename."] = (),
    any_shape: Annotated[bool, "A tensor may replace one of another shape."] = False,
) -> Change[Checkpoint]:
    """Take a part of another checkpoint, in place of what has the same keys here, or in addition.

    ``as_`` renames what is taken (pairs as in ``ckpt rename``).  What is replaced must have the same shape, unless
    ``any_shape``.  Notes say how much was replaced and how much is new.  Raises NothingMatched, KeyCollision,
    EditError.

    >>> import torch
    >>> model, donor = {"fc.bias": torch.zeros(2)}, {"module.fc.bias": torch.ones(2)}
    >>> graft(model, donor, "module.fc.*", as_=["module.fc=fc"])
    {'fc.bias': tensor([1., 1.])}
    """
    given = cast(Checkpoint, donor)
    names = {"donor": given}
    taken = matching(given, [parted(pattern, names)[1] for pattern in listed_patterns(take)])
    rules = Rules(parse_pairs(as_)) if as_ else None
    new_of = rules.new_names(key for key in given if key in taken) if rules else {key: key for key in taken}
    if rules and rules.unused:
        raise NothingMatched(rules.unused, what="rename", examples=taken)
    arriving = {new_of[key]: qualified("donor", key) for key in given if key in taken}
    if len(arriving) < len(taken):
        olds: dict[str, list[str]] = {}
        for old, new in new_of.items():
            olds.setdefault(new, []).append(old)
        raise KeyCollision({new: keys for new, keys in olds.items() if len(keys) > 1})
    whole = union(state_dict, names)
    replaced = [new for new in arriving if new in state_dict]
    donor_name = label("donor", given)
    problems = [
        f"{key!r} is {list(state_dict[key].shape)} here and {list(whole[arriving[key]].shape)} in {donor_name}"
        for key in replaced
        if state_dict[key].shape != whole[arriving[key]].shape
    ]
    if problems and not any_shape:
        way = Phrase("take less, fit the donor first, or let shapes change (", Argument("any_shape", True), ")")
        raise EditError(problems, remedy=way)
    order = {arriving.get(key, key): key for key in state_dict} | {old: new for new, old in arriving.items()}
    change = rekeyed(whole, order)
    fresh = len(arriving) - len(replaced)
    said = [f"of {donor_name}: {plural(len(arriving), 'key')}, {len(replaced):,} in place of others, {fresh:,} new"]
    dtypes = [key for key in replaced if state_dict[key].dtype != whole[arriving[key]].dtype]
    said += [f"{len(dtypes):,} have another dtype than what they replace: {listed(dtypes, 2)}"] if dtypes else []
    gone = {state_dict[key].tie for key in replaced}
    untied = [key for key, tensor in state_dict.items() if key not in arriving and tensor.tie in gone]
    said += [f"{len(untied):,} keys are no longer tied to one that was replaced: {listed(untied, 3)}"] if untied else []
    return of_first(change, {FIRST: state_dict, **names}, [*change.notes, *said])


def _numbers(pairs: Numbers) -> list[tuple[str, int]]:
    return [(pattern, number) for pattern, number in (pairs.items() if isinstance(pairs, Mapping) else pairs)]


# -- which keys of which input


def _chosen(
    inputs: Mapping[str, Checkpoint], take: Patterns, strip: Patterns, prefixes: Sequence[str]
) -> dict[str, dict[str, str]]:
    """For each input its keys that are taken, with their new names.  Raises NothingMatched, EditError."""
    if prefixes and len(prefixes) != len(inputs):
        count = len(prefixes)
        raise EditError([f"{len(inputs)} checkpoints need {len(inputs)} prefixes, given were {count}"],
                        remedy="leave one empty for a checkpoint that gets none")  # fmt: skip
    made: dict[str, dict[str, str]] = {name: {} for name in inputs}
    globs, peeled = _addressed(take, inputs), _addressed(strip, inputs)
    unused = {*globs, *peeled}
    for (name, checkpoint), prefix in zip(inputs.items(), prefixes or [""] * len(inputs), strict=True):
        mine = [one for one in globs if one[0] in ("", name)]
        hits = {one: {key for key in checkpoint if re.fullmatch(translate(one[1]), key)} for one in mine}
        keys = [key for key in checkpoint if not globs or any(key in found for found in hits.values())]
        unused -= {one for one, found in hits.items() if found}
        new = {key: key for key in keys}
        for one in peeled:
            if one[0] in ("", name):
                names = strip_prefix.plan({now: now for now in new.values()}, one[1], allow_unmatched=True).origins
                moved = {old: now for now, (old,) in names.items()}
                unused -= {one} if any(old != now for old, now in moved.items()) else set()
                new = {key: moved[now] for key, now in new.items()}
        whole = prefix.removesuffix(".") + "." if prefix else ""
        made[name] = {key: whole + now for key, now in new.items()}
    for what, asked in (("pattern", globs), ("prefix", peeled)):
        if missed := [qualified(*one) if one[0] else one[1] for one in asked if one in unused]:
            raise NothingMatched(missed, what=what, examples=[key for one in inputs.values() for key in one])
    return made


def _addressed(patterns: Patterns, inputs: Mapping[str, Checkpoint]) -> list[tuple[str, str]]:
    """Patterns with the input that each is for, "" for all."""
    return [parted(pattern, inputs) for pattern in listed_patterns(patterns)]


def _by_input(new_names: Mapping[str, str], inputs: Mapping[str, Checkpoint]) -> list[list[str]]:
    found: dict[str, list[str]] = {name: [] for name in inputs}
    for key in new_names:
        found[parted(key, inputs)[0] or FIRST].append(key)
    return list(found.values())


def _with_files(collisions: Mapping[str, Sequence[str]], inputs: Mapping[str, Checkpoint]) -> dict[str, list[str]]:
    """Collisions with the file of each key."""

    def named(old: str) -> str:
        name, key = parted(old, inputs)
        return f"{key} of {label(name or FIRST, inputs[name or FIRST])}"

    return {new: [named(old) for old in olds] for new, olds in collisions.items()}


# -- ranks of one model


def _of_ranks(
    change: Change[Checkpoint],
    new_names: Mapping[str, str],
    rules: Sequence[tuple[re.Pattern[str], int]],
    rows: Sequence[tuple[re.Pattern[str], int]],
    inputs: Mapping[str, Checkpoint],
) -> Change[Checkpoint]:
    """The change with tensors of several ranks joined by the rules, or compared and taken once."""
    olds: dict[str, list[str]] = {}
    for old, new in new_names.items():
        olds.setdefault(new, []).append(old)
    unused = {rule[0].pattern for rule in (*rules, *rows)}
    tensors: dict[str, Tensor] = {}
    made: dict[object, Tensor] = {}
    problems: list[str] = []
    for new, keys in olds.items():
        ranks = [change.before[key] for key in keys]
        dim = next((dim for pattern, dim in rules if pattern.fullmatch(new)), None)
        count = next((count for pattern, count in rows if pattern.fullmatch(new)), None)
        unused -= {pattern.pattern for pattern, _ in (*rules, *rows) if pattern.fullmatch(new)}
        tie = (tuple(tensor.tie for tensor in ranks), dim, count)
        try:
            if tie not in made:
                made[tie] = _of_one_key(new, keys, ranks, dim, count, inputs)
            tensors[new] = made[tie]
        except EditError as error:
            problems += error.problems
    if problems:
        raise EditError(problems, remedy=Phrase("say how ranks are joined with ", Argument("concat")))
    if unused:
        raise NothingMatched(sorted(unused), what="regular expression", examples=olds)
    result = replace(change.result.with_tensors(tensors, change.result.versions), part="")
    return replace(change, notes=(), result=result, origins={new: tuple(keys) for new, keys in olds.items()},
                   settled=frozenset(change.before))  # fmt: skip


def _of_one_key(
    new: str, keys: Sequence[str], ranks: Sequence[Tensor], dim: int | None, count: int | None,
    inputs: Mapping[str, Checkpoint],
) -> Tensor:  # fmt: skip
    """One tensor of those of several ranks."""
    if any(isinstance(tensor, (OpaqueTensor, ExtraState)) for tensor in ranks) or len(ranks) == 1:
        return ranks[0]
    if dim is None:
        return _replicated(new, keys, ranks, inputs)
    joined = interleaved(ranks, keys, dim, 1)
    if count is None:
        return joined
    axis = axis_of(new, joined, 0)
    if not 0 <= count <= joined.shape[axis]:
        raise EditError([f"{new!r} has {joined.shape[axis]:,} rows and cannot be cut to {count:,}"])
    return sliced(joined, axis, 0, count)


def _replicated(new: str, keys: Sequence[str], ranks: Sequence[Tensor], inputs: Mapping[str, Checkpoint]) -> Tensor:
    """A tensor that all ranks have, compared while it is read."""
    first = ranks[0]
    if any(tensor.dtype != first.dtype or tensor.shape != first.shape for tensor in ranks):
        shapes = ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in zip(keys, ranks, strict=True))
        raise EditError([f"{new!r} has other shapes or dtypes in other ranks ({shapes})"])
    finding = Finding()

    def make(tensors: tuple[Tensor, ...]) -> Iterator[Block]:
        from ..tensors.arithmetic import equal_blocks

        for block, same in equal_blocks(tensors):
            if not same:
                finding.problem = f"{new!r} is not the same in all ranks, and no rule joins it"
            yield block

    return ComputedTensor(first.dtype, first.shape, tuple(ranks), make, finding)
