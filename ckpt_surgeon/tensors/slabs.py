"""Tensors that a formula makes of others, slab by slab: some indices of the first dimension at a time.

numpy computes in float64 and rounds once, to the dtype of the result, as torch casts.  Nothing here imports numpy
before a value is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING, TypeAlias

from ..files.spans import BLOCK, Block
from .blocks import Stream
from .casts import bytes_of, cast_by_numpy
from .conversion import numbers, widened
from .dtypes import BY_NAME, DType
from .records import ComputedTensor, Finding, Tensor

if TYPE_CHECKING:
    from .conversion import Array

Formula: TypeAlias = "Callable[..., Array]"  # of the first index, the one behind the last, and the slab of each input

_FLOAT64 = BY_NAME["float64"]


def values_of(tensor: Tensor) -> Array:
    """A whole small tensor (a bias, statistics) as float64, in its shape."""
    return _wide(b"".join(tensor.blocks()), tensor.dtype).reshape(tensor.shape)


def by_slabs(
    key: str,
    inputs: Sequence[Tensor],
    shape: tuple[int, ...],
    formula: Formula,
    others: Sequence[Tensor] = (),
    *,
    dtype: DType | None = None,
) -> ComputedTensor:
    """The tensor of a shape that a formula makes of the same indices of the first dimension of every input.

    ``formula(start, stop, *slabs)`` takes and returns float64 arrays whose first dimension is ``stop - start``.
    ``dtype`` is that of the first input where it is not stated.  ``others`` are tensors that the formula reads as a
    whole.  ``key`` is for the problem of values that become inf where the result is finite in float64.

    >>> from ckpt_surgeon import from_torch, load
    >>> import torch
    >>> record = from_torch({"w": torch.ones(2, 3)})["w"]
    >>> by_slabs("w", [record], (2, 1), lambda start, stop, rows: rows.sum(1, keepdims=True)).load()
    tensor([[3.],
            [3.]])
    """
    finding = Finding()
    target, count = dtype or inputs[0].dtype, len(inputs)

    def make(given: tuple[Tensor, ...]) -> Iterator[Block]:
        import numpy as np

        rows = shape[0] if shape else 1
        widths = [tensor.nbytes // max(rows, 1) for tensor in given[:count]]
        step = max(BLOCK // max(*widths, 1, prod(shape[1:]) * target.itemsize), 1)
        streams = [Stream(tensor.blocks()) for tensor in given[:count]]
        infinite = 0
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            slabs = [
                _wide(stream.take((stop - start) * width), tensor.dtype).reshape(
                    tensor.shape and (stop - start, *tensor.shape[1:])
                )
                for stream, width, tensor in zip(streams, widths, given, strict=False)
            ]
            with np.errstate(all="ignore"):
                made = np.ascontiguousarray(formula(start, stop, *slabs))
            raw, losses = cast_by_numpy(bytes_of(made.reshape(-1)), _FLOAT64, target)
            infinite += losses.infinite
            yield raw
        if infinite:
            finding.problem = f"{key!r}: {infinite:,} values became inf in {target}"

    return ComputedTensor(target, shape, (*inputs, *others), make, finding)


def _wide(raw: Block, dtype: DType) -> Array:
    import numpy as np

    return widened(numbers(raw, dtype), dtype).astype(np.float64)
