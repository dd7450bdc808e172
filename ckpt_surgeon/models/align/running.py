"""Evidence from running: what two models that were run side by side proved, before names are looked at."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ...errors import TargetError, listed
from ...reading.sources import is_module
from ...text import plural
from ..execution import RunPair, RunPairs, pairs_by_running
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
        if pair.how in ("same", "reshape"):
            if pair.olds[0] in state.olds:
                state.settle(pair.olds[0], pair.new, found.reason, "proven")
        elif pair.how in ("part", "concat"):
            made.append(pair)
    whole = _whole(made)
    for pair in whole:
        del state.news[pair.new]
        for old in pair.olds:
            state.olds.pop(old, None)
    proven = dict(state.settled)
    _counters(state, {parent(one.old): parent(one.new) for one in proven.values()})
    return proven, tuple(Made(pair.new, pair.olds, pair.part, found.reason) for pair in whole)


def with_proof(found: Alignment, proven: dict[str, Proposal], made: tuple[Made, ...]) -> Alignment:
    """An alignment in which what is proven stays so, whatever names say."""
    proposals = tuple(proven.get(one.old, one) for one in found.proposals)
    return replace(found, proposals=proposals, made=made)


def _built(model: str | torch.nn.Module) -> torch.nn.Module:
    built = model if is_module(model) else build(str(model), with_values=True)
    if not is_module(built):
        raise TargetError(str(model), "is no model that could be run", remedy="give one that makes a torch.nn.Module")
    return built


def _whole(made: list[RunPair]) -> tuple[RunPair, ...]:
    """The parts whose whole is taken apart without rest, and what is joined of keys that nothing else takes."""
    parts: dict[str, list[RunPair]] = {}
    for pair in made:
        if pair.how == "part":
            parts.setdefault(pair.olds[0], []).append(pair)
    numbers = {old: sorted(one.part[0] for one in found) for old, found in parts.items()}
    complete = {old for old, found in parts.items() if numbers[old] == [*range(found[0].part[1])]}
    return tuple(pair for pair in made if pair.how == "concat" or pair.olds[0] in complete)


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
