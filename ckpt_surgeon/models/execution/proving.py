"""The proof of a pairing: fresh random values, copied as the pairs say, give the same output, and each matters.

torch is imported inside the functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from .decoding import RunPair
from .elements import Numbered, plainly

if TYPE_CHECKING:
    import torch

PERTURBED = 24  # buffers outside normalisations that are tried one by one


def proof(
    source: Numbered,
    target: Numbered,
    pairs: Mapping[str, RunPair],
    example: torch.Tensor,
    groups: Iterable[tuple[str, ...]],
    tolerance: float,
) -> tuple[float | None, set[str]]:
    """How far the outputs differ at most (None: no two are comparable), and the keys that have a part in equal ones.

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
    equal = [at for at, one in differences.items() if one is not None and one <= tolerance]
    if not equal:
        return min(comparable, default=None), set()
    alive = _with_gradient(target, example, equal)
    for group in groups:
        if alive & set(group):
            alive |= set(group)
    alive |= _felt(target, set(pairs) - alive, example, [given[at] for at in equal], equal)
    return max(one for at in equal if (one := differences[at]) is not None), alive & set(pairs)


def outputs(model: torch.nn.Module, example: torch.Tensor, *, gradients: bool = False) -> list[torch.Tensor]:
    """The tensors that a model gives, its logits alone where it names them."""
    import torch

    with plainly(gradients=gradients):
        made = model(example)
    logits = getattr(made, "logits", None)
    return [logits] if isinstance(logits, torch.Tensor) else list(_leaves(made))


def _leaves(made: object) -> Iterable[torch.Tensor]:
    import torch

    if isinstance(made, torch.Tensor):
        if made.is_floating_point() and made.numel():
            yield made
    elif isinstance(made, Mapping):
        for value in made.values():
            yield from _leaves(value)
    elif isinstance(made, (tuple, list)):
        for value in made:
            yield from _leaves(value)


def _difference(given: torch.Tensor, wanted: Iterable[torch.Tensor]) -> float | None:
    """The largest difference to the nearest output of that shape, as a share of the largest value."""
    differences = [
        float((given.squeeze() - one.squeeze()).abs().max() / one.abs().max().clamp(min=1e-30))
        for one in wanted
        if one.squeeze().shape == given.squeeze().shape
    ]
    return min(differences, default=None)


def _with_gradient(target: Numbered, example: torch.Tensor, equal: Iterable[int]) -> set[str]:
    """The keys of parameters on which the outputs depend."""
    import torch

    state = target.model.state_dict(keep_vars=True)
    parameters = {key: one for key, one in state.items() if isinstance(one, torch.nn.Parameter)}
    parameters = {key: one for key, one in parameters.items() if one.is_floating_point()}
    for one in parameters.values():
        one.requires_grad_(True)
    made = outputs(target.model, example, gradients=True)
    generator = torch.Generator().manual_seed(5)
    total = sum(
        (made[at] * torch.randn(made[at].shape, generator=generator, dtype=torch.float64)).sum() for at in equal
    )
    alive: set[str] = set()
    if isinstance(total, torch.Tensor) and total.requires_grad:
        found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        alive = {key for key, one in zip(parameters, found, strict=True) if one is not None and bool(one.any())}
    for one in parameters.values():
        one.requires_grad_(False)
    return alive


def _felt(
    target: Numbered, keys: set[str], example: torch.Tensor, before: list[torch.Tensor], equal: list[int]
) -> set[str]:
    """Of buffers, which have no gradient, those whose change changes the output."""
    buffers = {name for name, _ in target.model.named_buffers(remove_duplicate=False)} & keys
    felt = set()
    for key in sorted(buffers)[:PERTURBED]:
        values = target.values(key)
        kept = values.clone()
        values.mul_(1.1).add_(0.01)
        after = outputs(target.model, example)
        values.copy_(kept)
        if any(not bool((after[at] == one).all()) for at, one in zip(equal, before, strict=True)):
            felt.add(key)
    return felt
