"""Evidence from running: what two models that were run side by side proved, before names are looked at."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ...errors import TargetError, listed
from ...reading.sources import is_module
from ...text import plural
from ..execution import RunPair, RunPairs, pairs_by_running
from ..execution.decoding import permuted_shape
from ..targets import build, expected
from .parts import parent
from .results import Alignment, Made, Proposal
from .state import State

if TYPE_CHECKING:
    import torch

COUNTER = "num_batches_tracked"  # of a BatchNorm: a count that nothing computes with


def by_running(
    state: State, source: str | torch.nn.Module, target: str | torch.nn.Module, example: torch.Tensor | None
) -> tuple[dict[str, Proposal], tuple[Made, ...]]:
    """Settle what running both models proves; give it back, and what is a part or is joined of several.

    Raises TargetError where the checkpoint is not one of the source model's, or the models cannot be run.
    """
    ours, theirs = _built(source), _built(target)
    wanted = expected(ours)
    held = {key for key in state.olds if key in wanted and state.source[key].shape == wanted[key].shape}
    if not held:
        name = source if isinstance(source, str) else type(source).__name__
        remedy = "give the model that the file was saved from, and rename what wraps its keys first"
        raise TargetError(name, f"has none of the checkpoint's keys ({listed(list(state.olds)[:3])})", remedy=remedy)
    found = pairs_by_running(ours, theirs, example)
    _note(state, found)
    made = []
    for pair in found.pairs:
        if pair.new not in state.news or not held.issuperset(pair.olds):
            continue
        if len(pair.olds) > 1 or pair.part is not None:
            made.append(pair)
        elif pair.olds[0] in state.olds:
            _settle(state, pair, found.reason)
    whole = _whole(state, made)
    for pair in made:
        if pair.new not in whole:
            continue
        del state.news[pair.new]
        for old in pair.olds:
            state.olds.pop(old, None)
    proven = dict(state.settled)
    _counters(state, {parent(one.old): parent(one.new) for one in proven.values()})
    return proven, tuple(_made(pair, whole[pair.new], found.reason) for pair in made if pair.new in whole)


def with_proof(found: Alignment, proven: dict[str, Proposal], made: tuple[Made, ...]) -> Alignment:
    """An alignment in which what is proven stays so, whatever names say."""
    proposals = tuple(proven.get(one.old, one) for one in found.proposals)
    return replace(found, proposals=proposals, made=(*made, *found.made))


def _built(model: str | torch.nn.Module) -> torch.nn.Module:
    built = model if is_module(model) else build(str(model), with_values=True)
    if not is_module(built):
        raise TargetError(str(model), "is no model that could be run", remedy="give one that makes a torch.nn.Module")
    return built


def _settle(state: State, pair: RunPair, reason: str) -> None:
    """A key that is one of the source's, perhaps with its dimensions or the rows of its heads in another order."""
    old, new = pair.olds[0], pair.new
    certainty = "proven"
    if not pair.is_whole:
        certainty = "certain"
        reason = f"{pair.reached:,} of {pair.rows:,} rows are proven, the others are taken in the same order; {reason}"
    if pair.dims:
        reason = f"{'the rows of each head in another order' if pair.split else 'transposed'}; {reason}"
    state.settle(old, new, reason, certainty)
    if pair.dims:
        ours, theirs = state.shapes(old, new)
        reshape = None if permuted_shape(ours, pair) == theirs else theirs
        state.settled[old] = replace(state.settled[old], permute=(pair.split, pair.dims), reshape=reshape)


def _made(pair: RunPair, sizes: tuple[tuple[int, int], ...], reason: str) -> Made:
    at = sizes.index(pair.part) if pair.part is not None else 0
    lengths = tuple(stop - start for start, stop in sizes)
    return Made(pair.new, pair.olds, (at, max(len(sizes), 1)), reason, pair.dim, pair.groups, lengths, pair.dims)


def _whole(state: State, made: list[RunPair]) -> dict[str, tuple[tuple[int, int], ...]]:
    """The parts whose whole is taken apart without rest, each with all parts; and what is joined, with none."""
    parts: dict[tuple[object, ...], list[RunPair]] = {}
    for pair in made:
        if pair.part is not None:
            parts.setdefault((pair.olds, pair.dim, pair.groups), []).append(pair)
    whole: dict[str, tuple[tuple[int, int], ...]] = {pair.new: () for pair in made if pair.part is None}
    for found in parts.values():
        ranges = sorted(pair.part for pair in found if pair.part is not None)
        ends = [0, *(stop for _, stop in ranges)]
        length = state.source[found[0].olds[0]].shape[found[0].dim]
        if ends[-1] == length and all(start == end for (start, _), end in zip(ranges, ends, strict=False)):
            whole |= {pair.new: tuple(ranges) for pair in found}
    return whole


def _counters(state: State, homes: dict[str, str]) -> None:
    for old in list(state.olds):
        new = f"{homes.get(parent(old), '')}.{COUNTER}".lstrip(".")
        if old.rpartition(".")[2] == COUNTER and parent(old) in homes and new in state.news:
            state.settle(old, new, "goes with its module, which is proven", "certain")


def _note(state: State, found: RunPairs) -> None:
    reasons: dict[str, int] = {}
    for why in found.unproven.values():
        reasons[why] = reasons.get(why, 0) + 1
    state.notes += [f"not proven: {plural(count, 'key')} of the target, {why}" for why, count in reasons.items()]
    state.notes += found.notes
