"""Tensors cut out of flat vectors that lie in several files, as engines leave them that share parameters out."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

from ..files.spans import Block
from ..tensors.dtypes import DType
from ..tensors.records import ComputedTensor, Tensor
from ..tensors.storage import Storage
from ..tensors.stored import StoredTensor
from ..tensors.strides import row_major


@dataclass(frozen=True, slots=True)
class Flat:
    """Vectors that count as one, the first one's elements first; all have one dtype."""

    parts: tuple[StoredTensor, ...]
    ends: tuple[int, ...]
    dtype: DType

    @property
    def numel(self) -> int:
        return self.ends[-1]

    def taken(self, start: int, stop: int) -> Iterator[StoredTensor]:
        """The elements from ``start`` to ``stop``, as views of the vectors that have them."""
        at = bisect_right(self.ends, start)
        while start < stop:
            part, end = self.parts[at], self.ends[at]
            begin = end - part.numel
            until = min(stop, end)
            if until > start:
                yield StoredTensor(
                    part.dtype, (until - start,), (1,), part.offset + start - begin, part.storage,
                    part.conjugate, part.negative,
                )  # fmt: skip
            start, at = until, at + 1


def flat(parts: Sequence[object]) -> Flat:
    """Vectors as one.  Raises ValueError where one is no vector, or of another dtype than the first."""
    found = [part for part in parts if isinstance(part, StoredTensor)]
    if not found or len(found) < len(parts):
        raise ValueError("a part is no plain tensor")
    for part in found:
        if len(part.shape) != 1 or not part.is_contiguous:
            raise ValueError(f"a part of shape {list(part.shape)} is no flat vector")
        if part.dtype != found[0].dtype:
            raise ValueError(f"parts of {found[0].dtype} and of {part.dtype}")
    return Flat(tuple(found), tuple(accumulate(part.numel for part in found)), found[0].dtype)


def joined(parts: Sequence[StoredTensor], dtype: DType, shape: tuple[int, ...]) -> StoredTensor:
    """The tensor of these elements, in their order: a view where they lie in one vector."""
    if len(parts) == 1:
        part = parts[0]
        return StoredTensor(
            dtype, shape, row_major(shape), part.offset, part.storage, part.conjugate, part.negative
        )  # fmt: skip
    if not prod(shape):
        return StoredTensor(dtype, shape, row_major(shape), 0, Storage(None, 0))
    return ComputedTensor(dtype, shape, tuple(parts), _one_after_another, in_sequence=True).stored()


def _one_after_another(parts: Sequence[Tensor]) -> Iterator[Block]:
    for part in parts:
        yield from part.blocks()
