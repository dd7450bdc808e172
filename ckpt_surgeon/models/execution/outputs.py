"""What a model gives, as tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from .elements import plainly

if TYPE_CHECKING:
    import torch


def outputs(model: torch.nn.Module, example: torch.Tensor, *, gradients: bool = False) -> list[torch.Tensor]:
    """The tensors that a model gives, its logits alone where it names them."""
    with plainly(gradients=gradients):
        return tensors_of(model(example))


def tensors_of(made: object) -> list[torch.Tensor]:
    """The logits of what a model gave, or all of its tensors."""
    import torch

    logits = getattr(made, "logits", None)
    return [logits] if isinstance(logits, torch.Tensor) else list(leaves(made))


def leaves(made: object) -> Iterable[torch.Tensor]:
    """The floating-point tensors in nested mappings, tuples and lists."""
    import torch

    if isinstance(made, torch.Tensor):
        if made.is_floating_point() and made.numel():
            yield made
    elif isinstance(made, Mapping):
        for value in made.values():
            yield from leaves(value)
    elif isinstance(made, (tuple, list)):
        for value in made:
            yield from leaves(value)
