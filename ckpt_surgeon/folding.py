"""Reparametrised weights and the plain weights that they stand for.

The formulas are torch's: ``torch._weight_norm`` (torch/nn/utils/weight_norm.py), weight / sigma with
sigma = uᵀ W v (torch/nn/utils/spectral_norm.py), weight × mask (torch/nn/utils/prune.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .checkpoint import Checkpoint
from .elements import pieces, torch_dtype, whole
from .errors import EditError
from .tensors import Block, ComputedTensor, Tensor

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Reparametrised:
    """One plain weight: its key, the keys that it replaces, and the tensor that computes it."""

    key: str
    keys: tuple[str, ...]
    plain: ComputedTensor


_PARAMETRIZED = re.compile(r"(.*\.|)parametrizations\.([^.]+)\.original(0?)")


def reparametrised(state_dict: Checkpoint) -> Iterator[Reparametrised]:
    """Every reparametrised weight of a state_dict, in the order of its keys.

    Raises EditError for parametrizations whose formula the checkpoint does not tell.
    """
    unknown = []
    for key in state_dict:
        if key.endswith("_g") and f"{key[:-2]}_v" in state_dict:
            yield _weight_norm(state_dict, key[:-2], key, f"{key[:-2]}_v")
        elif key.endswith("_orig"):
            yield from _originals(state_dict, key)
        elif found := _PARAMETRIZED.fullmatch(key):
            prefix, name, index = found.groups()
            base = f"{prefix}parametrizations.{name}."
            if index and f"{base}original1" in state_dict:
                yield _weight_norm(state_dict, prefix + name, key, f"{base}original1")
            elif not index and f"{base}0._u" in state_dict:
                yield _spectral_norm(state_dict, prefix + name, key, f"{base}0._u", f"{base}0._v")
            else:
                unknown.append(f"{key!r}: the formula of its parametrization is not in the checkpoint")
    if unknown:
        raise EditError(unknown)


def _originals(state_dict: Checkpoint, key: str) -> Iterator[Reparametrised]:
    base = key.removesuffix("_orig")
    if f"{base}_mask" in state_dict:
        yield _computed(state_dict, base, (key, f"{base}_mask"), lambda weight, mask: weight * mask)
    elif f"{base}_u" in state_dict and f"{base}_v" in state_dict:
        yield _spectral_norm(state_dict, base, key, f"{base}_u", f"{base}_v")


def _weight_norm(state_dict: Checkpoint, base: str, g: str, v: str) -> Reparametrised:
    shape, whole_shape = state_dict[g].shape, state_dict[v].shape
    kept = [dim for dim, size in enumerate(shape) if size > 1]
    fits = [dim for dim in kept if dim < len(whole_shape) and shape[dim] == whole_shape[dim]]
    if len(kept) > 1 or kept != fits or (shape and len(shape) != len(whole_shape)):
        raise EditError([f"{g!r} {list(shape)} and {v!r} {list(whole_shape)} are no weight norm"])
    if not kept and shape and whole_shape[0] != 1:
        raise EditError([f"{g!r} {list(shape)} does not tell over which dimension {v!r} was normalised"])
    dim = kept[0] if kept else (0 if shape else -1)

    def plain(gain: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
        import torch

        return torch._weight_norm(direction, gain, dim)

    return _computed(state_dict, base, (g, v), plain, like=v)


def _spectral_norm(state_dict: Checkpoint, base: str, key: str, u: str, v: str) -> Reparametrised:
    rows = state_dict[u].numel
    dims = [dim for dim, size in enumerate(state_dict[key].shape) if size == rows]
    if not dims or (dims[0] != 0 and len(dims) > 1):
        raise EditError([f"{key!r}: its spectral norm's vectors do not tell which dimension they belong to"])

    def plain(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        import torch

        matrix = weight.movedim(dims[0], 0).flatten(1)
        return weight / torch.vdot(left, torch.mv(matrix, right))

    return _computed(state_dict, base, (key, u, v), plain)


def _computed(
    state_dict: Checkpoint,
    base: str,
    keys: tuple[str, ...],
    formula: Callable[..., torch.Tensor],
    *,
    like: str = "",
) -> Reparametrised:
    model = state_dict[like or keys[0]]

    def make(inputs: tuple[Tensor, ...]) -> Iterator[Block]:
        made = formula(*(whole(tensor) for tensor in inputs))
        yield from pieces(made.to(torch_dtype(model)))

    return Reparametrised(
        base, keys, ComputedTensor(model.dtype, model.shape, tuple(state_dict[k] for k in keys), make)
    )
