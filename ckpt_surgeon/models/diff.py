"""What separates a checkpoint from a target: keys that match, are missing, unused or of another shape.

A :class:`Diff` is data; :mod:`ckpt_surgeon.report` makes it text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from glob import escape
from math import prod
from typing import TYPE_CHECKING

from ..edits.companions import missing_scales, unmerged
from ..edits.keys import drop, is_derivable, without_wrappers
from ..errors import TargetError, listed
from ..files.paths import file_path, is_path
from ..key_patterns import WRAPPERS
from ..reading.sources import is_module, state_dict_of
from ..tensors.checkpoint import Checkpoint
from ..tensors.dtypes import EXTRA_STATE
from ..tensors.extra_state import is_extra_state, tensors_alone
from ..tensors.records import OpaqueTensor, Shaped
from ..text import Shown
from .align import OTHER_SHAPE, align
from .modules import loads_plainly, tied, verdict
from .targets import expected, is_model, target_of, with_shapes

if TYPE_CHECKING:
    import torch

    from ..reading.sources import Source
    from .targets import Target


@dataclass(frozen=True, slots=True, repr=False)
class Mismatch(Shown):
    """One key with two shapes, or two dtypes."""

    key: str
    ours: str
    theirs: str


@dataclass(frozen=True, slots=True, repr=False)
class Hint(Shown):
    """An edit of keys that would make more of them match: what to say, what to run, and how many keys then match.

    ``command`` is the ``ckpt`` command's name and options.
    """

    said: str
    command: tuple[str, ...]
    matched: int


@dataclass(frozen=True, slots=True, repr=False)
class Diff(Shown):
    """The differences between a checkpoint and a target.

    ``missing`` keys are the target's alone, ``unused`` ones the checkpoint's; ``mismatched`` have two shapes;
    ``dtypes`` lists matched keys with two dtypes, which ``load_state_dict`` converts in silence; ``rewritten`` those
    matched keys of the target that the model itself makes of others on load, as torch's own hooks do; ``refused`` is
    what the model's own code raised when it was given them.  ``tied`` pairs keys that are not in the checkpoint, and
    count as matched, with keys that are: the model has one parameter under both.  ``part`` says what part of a model
    the checkpoint is, where it is one: that is never loadable.  ``opaque`` are matched keys whose tensor (quantized,
    sparse …) torch does not copy into the model's plain one.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    mismatched: tuple[Mismatch, ...]
    dtypes: tuple[Mismatch, ...]
    matched_numel: int
    target_numel: int
    target_keys: int
    hint: Hint | None = None
    rewritten: tuple[str, ...] = ()
    refused: str = ""
    tied: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    part: str = ""
    opaque: tuple[str, ...] = ()
    names: tuple[str, str] = field(default=("the checkpoint", "the target"), compare=False)  # what a text calls the two
    has_values: bool = field(
        default=False, compare=False
    )  # whether the target is a checkpoint too, whose values could be compared
    sides: tuple[Mapping[str, Shaped], Mapping[str, Shaped]] | None = field(
        default=None, compare=False, repr=False
    )  # what was compared; it does not go to other processes

    def __getstate__(self) -> list[object]:
        return [None if field.name == "sides" else getattr(self, field.name) for field in fields(self)]

    @property
    def loadable(self) -> bool:
        """Whether ``load_state_dict(strict=True)`` would accept the checkpoint, the names in ``tied`` filled.

        A model needs no second name of a tied parameter: ``load_into``, ``fit`` and the hub's ``from_pretrained`` fill
        it, a bare ``load_state_dict`` wants to be given it.
        """
        return not (self.missing or self.unused or self.mismatched or self.refused or self.part or self.opaque)

    @property
    def share(self) -> float:
        """The matched share of the target's parameters, 0 to 1."""
        return self.matched_numel / self.target_numel if self.target_numel else float(self.loadable)


def diff(checkpoint: Source | Mapping[str, Shaped], target: Target, *, hints: bool = True) -> Diff:
    """Compare keys, shapes and dtypes; nothing is read of either's values.

    ``checkpoint`` and ``target`` are paths or URLs, opened Checkpoints, state_dicts, models, or mappings from key to
    anything with a dtype and a shape, such as the result of :func:`ckpt_surgeon.resolve`.  ``target`` may be the
    spelling of a model too (``package.module:factory``).  Where it is a model, what its own hooks accept on load
    counts as torch counts it.

    >>> from ckpt_surgeon.tensors.dtypes import parse
    >>> from ckpt_surgeon.models.targets import Expected
    >>> ours = {"module.fc.bias": Expected(parse("float32"), (10,), True)}
    >>> theirs = {"fc.bias": Expected(parse("float32"), (10,), True)}
    >>> found = diff(ours, theirs)
    >>> found.missing, found.unused, found.hint.said
    (('fc.bias',), ('module.fc.bias',), "stripping 'module.' makes all 1 match")
    """
    ours, theirs = state_dict_of(checkpoint), target_of(target)
    ours = ours if isinstance(ours, Checkpoint) else with_shapes(ours)
    wanted = with_shapes(theirs) if isinstance(theirs, Mapping) else expected(theirs, lazy=True)
    found = _compared(ours, wanted, None if isinstance(theirs, Mapping) else theirs, hints=hints)
    names = _name_of(checkpoint, "the checkpoint"), _name_of(target, "the target")
    part = ours.part if isinstance(ours, Checkpoint) else ""
    notes = (*found.notes, f"{names[0]} is no whole model: it is {part}") if part else found.notes
    opaque = tuple(_not_taken(ours, theirs)) if is_module(theirs) and not part else ()
    if opaque:
        notes = (*notes, f"no plain parameter takes what is more than plain elements: {listed(opaque, 3)}")
    is_file = isinstance(theirs, Checkpoint)
    return replace(found, names=names, has_values=is_file, part=part, notes=notes, opaque=opaque, sides=(ours, wanted))


def _not_taken(checkpoint: Mapping[str, Shaped], model: torch.nn.Module) -> Iterator[str]:
    """The keys whose tensor is more than plain elements while the model's own is plain: torch copies none of these."""
    opaque = [key for key, tensor in checkpoint.items() if isinstance(tensor, OpaqueTensor)]
    held = model.state_dict() if opaque else {}
    for key in opaque:
        own = held.get(key)
        if own is not None and not own.is_quantized and str(own.layout) == "torch.strided" and _is_torchs_own(own):
            yield key


def _is_torchs_own(tensor: torch.Tensor) -> bool:
    """Whether a tensor is torch's own class or a parameter, no subclass of somebody's."""
    return type(tensor).__module__ in ("torch", "torch.nn.parameter")


def _name_of(side: object, otherwise: str) -> str:
    """What a text calls one side: a file's name, or a model's."""
    if isinstance(side, str) and is_model(side):
        return side.rpartition(":")[2]
    if is_path(side):
        return file_path(side).name
    if isinstance(side, Checkpoint) and side.path is not None:
        return side.path.name
    return type(side).__name__ if is_module(side) else otherwise


def _compared(
    checkpoint: Mapping[str, Shaped], target: Mapping[str, Shaped], model: torch.nn.Module | None, *, hints: bool
) -> Diff:
    shared = [key for key in target if key in checkpoint]
    runs_own_code = model is not None and not loads_plainly(model)
    odd = [key for key in shared if not _takes(target[key], checkpoint[key], is_model=model is not None)]
    missing = [key for key in target if key not in checkpoint]
    unused = [key for key in checkpoint if key not in target]
    rewritten: list[str] = []
    refused = ""
    if model is not None and (missing or unused or runs_own_code):
        try:
            said = verdict(model, _without(checkpoint, odd))
        except TargetError:  # a model that cannot be copied to ask is compared by its keys alone
            said = None
        if said is not None and not said.refused:
            # a buffer that the model makes itself is worth a word only where nothing else is amiss
            amiss = bool(set(said.missing) - set(odd)) or bool(said.unexpected)
            rewritten = [key for key in missing if key not in said.missing and not (amiss and is_derivable(key))]
            missing = [key for key in missing if key not in rewritten]
            unused = [key for key in unused if key in said.unexpected]
            missing += [key for key in said.missing if key not in odd and key not in missing]
            unused += [key for key in said.unexpected if key in checkpoint and key not in unused]
        elif said is not None and runs_own_code and not odd and isinstance(checkpoint, Checkpoint):
            refused = said.refused  # with the values at hand
    twins = _twins(model, [key for key in checkpoint if key not in odd], missing) if missing else {}
    missing = [key for key in missing if key not in twins]
    amiss_keys = {*missing, *unused, *odd}
    filled = {*rewritten, *twins}
    matched = [key for key in target if key in filled or (key in checkpoint and key not in amiss_keys)]
    both = [key for key in matched if key in checkpoint]
    return Diff(
        tuple(matched),
        tuple(missing),
        tuple(unused),
        tuple(Mismatch(key, _shape(checkpoint[key]), _shape(target[key])) for key in odd),
        tuple(
            Mismatch(key, _dtype(checkpoint[key]), _dtype(target[key]))
            for key in both
            if _dtype(checkpoint[key]) != _dtype(target[key]) and not is_extra_state(key)
        ),
        sum(_numel(target[key]) for key in matched),
        sum(map(_numel, target.values())),
        len(target),
        best_hint(checkpoint, target, len(matched)) if hints and missing and unused else None,
        tuple(rewritten),
        refused,
        tuple(twins.items()),
        tuple(_notes(checkpoint, target, unused)),
    )


def _twins(model: torch.nn.Module | None, held: Iterable[str], missing: Iterable[str]) -> dict[str, str]:
    """The missing keys that are another name of a parameter whose name is held, and that name."""
    there, wanted = set(held), set(missing)
    found: dict[str, str] = {}
    for names in tied(model) if model is not None else ():
        source = next((name for name in names if name in there), None)
        found |= {name: source for name in names if source is not None and name in wanted}
    return {key: found[key] for key in missing if key in found}


def _notes(checkpoint: Mapping[str, Shaped], target: Mapping[str, Shaped], unused: list[str]) -> Iterator[str]:
    """What a count of keys does not say of tensors that belong together."""
    if lora := unmerged(unused):
        yield f"{len(lora):,} LoRA tensors stay out: the weights that they add to are not merged"
    for label, count in Counter(one.label for one in missing_scales(checkpoint, target)).items():
        weights = "1 weight is" if count == 1 else f"{count:,} weights are"
        yield f"{weights} {label}, which the target does not have: dequantize first"


def _numel(tensor: Shaped) -> int:
    return 0 if tensor.dtype == EXTRA_STATE else prod(tensor.shape)


def _takes(theirs: Shaped, ours: Shaped, *, is_model: bool) -> bool:
    """Whether shapes agree; a model takes a 1-d tensor for a 0-d one too, as torch 0.3 saved them."""
    if theirs.dtype == EXTRA_STATE or ours.dtype == EXTRA_STATE or getattr(theirs, "lazy", False):
        return theirs.dtype == EXTRA_STATE or getattr(theirs, "lazy", False)
    if tuple(ours.shape) == tuple(theirs.shape):
        return True
    return is_model and not theirs.shape and len(ours.shape) == 1 and ours.shape[0] > 0


def _without(checkpoint: Mapping[str, Shaped], keys: list[str]) -> Mapping[str, Shaped]:
    """A checkpoint without some keys, with its ``_metadata``."""
    if not keys:
        return checkpoint
    return drop(checkpoint, [escape(key) for key in keys])


def _shape(tensor: Shaped) -> str:
    return str(list(tensor.shape))


def _dtype(tensor: Shaped) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def best_hint(checkpoint: Mapping[str, Shaped], target: Mapping[str, Shaped], now: int) -> Hint | None:
    """What would make most keys match in name and shape, if anything makes more match than ``now``.

    A change of prefixes, since that is one command; where none explains the whole target, what
    :func:`ckpt_surgeon.align` is certain of.
    """
    unused = [key for key in checkpoint if key not in target]
    missing = {key for key in target if key not in checkpoint}
    trials: list[tuple[str, tuple[str, ...], Callable[[str], str]]] = []
    for prefix in _prefixes(unused):
        trials.append((f"stripping {prefix!r}", _strip_command(prefix), _stripper(prefix)))
    if any(part in WRAPPERS for key in unused for part in key.split(".")):
        trials.append(("peeling all wrappers", ("strip-prefix", "--wrappers"), without_wrappers))
    for prefix in _prefixes(missing):
        trials.append((f"adding {prefix!r}", ("add-prefix", "--prefix", prefix), _adder(prefix)))
    best: tuple[int, str, tuple[str, ...]] | None = None
    for said, command, change in trials:
        new_names = {key: change(key) for key in checkpoint}
        if len(set(new_names.values())) < len(new_names):
            continue  # the edit would refuse
        matches = sum(_fits(checkpoint[key], target.get(new)) for key, new in new_names.items())
        if matches > max(now, best[0] if best else 0):
            best = (matches, said, command)
    if best is not None and best[0] == len(target):
        return _hint(best, _without_rest(best, checkpoint), checkpoint, target)
    found = align(tensors_alone(checkpoint), tensors_alone(target), by_value=False).at_least("certain")
    aligned = sum(one.certainty != OTHER_SHAPE for one in found.proposals)
    if aligned > max(now, best[0] if best else 0, len(target) // 2):
        return Hint(f"renaming makes {aligned:,} of {len(target):,} match", ("align",), aligned)
    return None if best is None else _hint(best, best[2], checkpoint, target)


def _hint(
    best: tuple[int, str, tuple[str, ...]],
    command: tuple[str, ...],
    checkpoint: Mapping[str, Shaped],
    target: Mapping[str, Shaped],
) -> Hint:
    is_all = best[0] == len(target) and (command[0] == "select" or best[0] == len(checkpoint))
    count = f"all {best[0]:,}" if is_all else f"{best[0]:,} of {len(target):,}"
    said = f"taking {command[-1]!r} alone" if command[0] == "select" else best[1]
    return Hint(f"{said} makes {count} match", command, best[0])


def _without_rest(best: tuple[int, str, tuple[str, ...]], checkpoint: Mapping[str, Shaped]) -> tuple[str, ...]:
    """A command that strips a prefix, as the one that leaves out what does not carry it, where something does not."""
    matches, _, command = best
    if command[0] != "strip-prefix" or "--wrappers" in command or matches == len(checkpoint):
        return command
    prefix = command[-1] if len(command) > 1 else "module."
    under = sum(key.startswith(prefix) for key in checkpoint)
    return ("select", "--prefix", prefix) if under == matches < len(checkpoint) else command


def _strip_command(prefix: str) -> tuple[str, ...]:
    return ("strip-prefix",) if prefix == "module." else ("strip-prefix", "--prefix", prefix)


def _stripper(prefix: str) -> Callable[[str], str]:
    def strip(key: str) -> str:
        while key.startswith(prefix):
            key = key[len(prefix) :]
        return key

    return strip


def _adder(prefix: str) -> Callable[[str], str]:
    return lambda key: prefix + key


def _fits(ours: Shaped, theirs: Shaped | None) -> bool:
    return theirs is not None and tuple(ours.shape) == tuple(theirs.shape)


def _prefixes(keys: Iterable[str], limit: int = 32) -> list[str]:
    """Leading components that many of the keys share, the commonest first, at most ``limit``."""
    counts: dict[str, int] = {}
    for key in keys:
        parts = key.split(".")[:-1]
        for depth in range(1, min(len(parts), 4) + 1):
            prefix = ".".join(parts[:depth]) + "."
            counts[prefix] = counts.get(prefix, 0) + 1
    common = [prefix for prefix, count in counts.items() if count > 1 or len(counts) < limit]
    return sorted(common, key=lambda prefix: (-counts[prefix], len(prefix)))[:limit]
