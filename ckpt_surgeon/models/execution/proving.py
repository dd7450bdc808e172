"""The proof of a pairing: fresh random values, copied as the pairs say, give the same output, and each matters.

Where the outputs are none of one shape (the models have different heads), a *cut* is looked for: a module of the target
whose input is all that the output gets from what ran before, and is equal to an input or output of one of the source's
modules.  torch is imported inside the functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from .cuts import OUTPUT, Cut, cuts, equal_layouts
from .decoding import RunPair
from .elements import Numbered
from .outputs import outputs

if TYPE_CHECKING:
    import torch

PERTURBED = 24  # buffers outside normalisations that are tried one by one


@dataclass(frozen=True, slots=True)
class Proof:
    """What fresh values showed.

    ``difference`` is the largest one of what is compared, as a share of its largest value (None: nothing is
    comparable); ``pairs`` have a part in what is equal; ``cut`` is where that was, if not at the output.
    """

    difference: float | None
    pairs: Mapping[str, RunPair] = field(default_factory=dict)
    cut: Cut = OUTPUT


def proof(
    source: Numbered,
    target: Numbered,
    pairs: Mapping[str, RunPair],
    example: torch.Tensor,
    groups: Iterable[tuple[str, ...]],
    tolerance: float,
) -> Proof:
    """Run both models with fresh values, copied as the pairs say, and compare what they give.

    ``groups`` are keys that meet in one operation: a statistic has a part in the output where its bias has.
    """
    source.fill(seed=3)
    target.fill(seed=4)
    ours = {key: source.values(key) for key in source.shapes}
    for key, pair in pairs.items():
        target.values(key).copy_(pair.value(ours, target.shapes[key]))
    wanted = outputs(source.model, example)
    given = outputs(target.model, example)
    differences = {at: _difference(one, wanted) for at, one in enumerate(given)}
    comparable = [one for one in differences.values() if one is not None]
    equal = tuple(at for at, one in differences.items() if one is not None and one <= tolerance)
    if equal:
        difference = max(one for at in equal if (one := differences[at]) is not None)
        return Proof(difference, _alive(target, pairs, example, groups, OUTPUT, equal))
    for cut in cuts(source.model, target.model, example, tolerance):
        alive = _alive(target, pairs, example, groups, cut, (0,))
        if alive:
            return Proof(cut.difference, alive, cut)
    return Proof(min(comparable, default=None))


def _alive(
    target: Numbered,
    pairs: Mapping[str, RunPair],
    example: torch.Tensor,
    groups: Iterable[tuple[str, ...]],
    cut: Cut,
    equal: tuple[int, ...],
) -> dict[str, RunPair]:
    """The pairs that have a part in what is equal, each with the rows of a table that have."""
    rows = _with_gradient(target, example, cut, equal)
    alive = set(rows)
    for group in groups:
        if alive & set(group):
            alive |= set(group)
    alive |= _felt(target, set(pairs) - alive, example, cut, equal)
    return {
        key: replace(pair, reached=rows.get(key, pair.reached)) if pair.rows else pair
        for key, pair in pairs.items()
        if key in alive
    }


def _difference(given: torch.Tensor, wanted: Iterable[torch.Tensor]) -> float | None:
    """The largest difference to the nearest output of that shape, as a share of the largest value."""
    differences = [one for other in wanted if (one := equal_layouts(given, other)) is not None]
    return min(differences, default=None)


def _with_gradient(target: Numbered, example: torch.Tensor, cut: Cut, equal: tuple[int, ...]) -> dict[str, int]:
    """The keys of parameters on which the outputs (or what is at the cut) depend, and how many rows of each."""
    import torch

    state = target.model.state_dict(keep_vars=True)
    parameters = {key: one for key, one in state.items() if isinstance(one, torch.nn.Parameter)}
    parameters = {key: one for key, one in parameters.items() if one.is_floating_point()}
    for one in parameters.values():
        one.requires_grad_(True)
    made = cut.tensors(target.model, example, gradients=True)
    generator = torch.Generator().manual_seed(5)
    total = sum(
        (made[at] * torch.randn(made[at].shape, generator=generator, dtype=torch.float64)).sum() for at in equal
    )
    alive: dict[str, int] = {}
    if isinstance(total, torch.Tensor) and total.requires_grad:
        found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        for key, slope in zip(parameters, found, strict=True):
            if slope is not None and bool(slope.any()):
                alive[key] = int(slope.reshape(-1, slope.shape[-1] if slope.dim() > 1 else 1).any(1).sum())
    for one in parameters.values():
        one.requires_grad_(False)
    return alive


def _felt(target: Numbered, keys: set[str], example: torch.Tensor, cut: Cut, equal: tuple[int, ...]) -> set[str]:
    """Of buffers, which have no gradient, those whose change changes the output."""
    buffers = {name for name, _ in target.model.named_buffers(remove_duplicate=False)} & keys
    if not buffers:
        return set()
    before = cut.tensors(target.model, example)
    felt = set()
    for key in sorted(buffers)[:PERTURBED]:
        values = target.values(key)
        kept = values.clone()
        values.mul_(1.1).add_(0.01)
        after = cut.tensors(target.model, example)
        values.copy_(kept)
        if any(not bool((after[at] == before[at]).all()) for at in equal):
            felt.add(key)
    return felt
