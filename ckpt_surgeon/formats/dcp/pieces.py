"""Tensors that lie in pieces, each a box of the whole: what a distributed checkpoint says of them.

Whether boxes make up the whole is told by their volumes and corners.  Every corner of a box counts modulo 2; where
only the corners of the whole remain, every element is in an odd number of boxes, so in one at least; and if the
volumes add up, in no more than one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, product
from math import ceil, prod
from operator import mul

from ...files.spans import ByteSpan
from ...tensors.dtypes import DType

SLAB = 32 << 20  # bytes of a tensor that are put together at a time
READINGS = 8  # how often a piece is read at most so that slabs stay small
CORNERS = 1 << 20  # how many corners the pieces of one tensor may have

Sizes = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor: where it begins in the whole, its sizes, and the bytes of a file that hold it."""

    offsets: Sizes
    sizes: Sizes
    place: ByteSpan


@dataclass(frozen=True, slots=True, eq=False)
class Pieced:
    """A tensor in pieces, under the name that its container gives it."""

    key: str
    dtype: DType
    shape: Sizes
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def flaw(shape: Sizes, boxes: Sequence[tuple[Sizes, Sizes]]) -> str:
    """What is wrong with boxes (their offsets and sizes) that should make up a whole, "" if nothing.

    >>> flaw((3, 2), [((0, 0), (2, 2)), ((2, 0), (1, 2))]), flaw((3, 2), [((0, 0), (2, 2))])
    ('', 'its pieces leave gaps')
    """
    for offsets, sizes in boxes:
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            return f"a piece at {list(offsets)} of sizes {list(sizes)} in a shape of {len(shape)} dimensions"
        if any(start < 0 or size < 0 or start + size > whole
               for start, size, whole in zip(offsets, sizes, shape, strict=True)):  # fmt: skip
            return f"a piece at {list(offsets)} of sizes {list(sizes)} reaches outside of {list(shape)}"
    filled = [(offsets, sizes) for offsets, sizes in boxes if 0 not in sizes]
    there, needed = sum(prod(sizes) for _, sizes in filled), prod(shape)
    if there != needed:
        return "its pieces leave gaps" if there < needed else "its pieces overlap"
    cut = [axis for axis, whole in enumerate(shape) if any(sizes[axis] != whole for _, sizes in filled)]
    if len(filled) << len(cut) > CORNERS:
        return f"it is cut into {len(filled):,} pieces along {len(cut)} dimensions, more than can be checked"
    steps = list(accumulate((shape[axis] + 1 for axis in cut), mul, initial=1))  # a corner as one number
    odd: set[int] = set()
    for offsets, sizes in [*filled, ((0,) * len(shape), shape)]:
        sides = ((offsets[axis] * step, (offsets[axis] + sizes[axis]) * step) for axis, step in zip(cut, steps))  # noqa: B905
        odd ^= set(map(sum, product(*sides)))
    return "its pieces overlap and leave gaps" if odd and filled else ""


def slabs(whole: Pieced, limit: int = SLAB) -> list[tuple[int, int]]:
    """Ranges of rows (the first dimension) of about ``limit`` bytes to put a tensor together in.

    They end where pieces end, so that each piece is read once.  Rows that no border divides are divided if that makes
    slabs smaller than the pieces are anyway; then a piece is read several times, READINGS at most.
    """
    rows = whole.shape[0] if whole.shape else 1
    if whole.nbytes <= limit:
        return [(0, rows)]
    row = whole.nbytes // rows
    borders = {0, rows}
    for piece in whole.pieces:
        borders |= {piece.offsets[0], piece.offsets[0] + piece.sizes[0]}
    ordered = sorted(borders)
    largest = max(prod(piece.sizes) for piece in whole.pieces) * whole.dtype.itemsize
    found: list[tuple[int, int]] = []
    start = 0
    for border, after in zip(ordered[1:], [*ordered[2:], None], strict=True):
        if after is None or (after - start) * row > limit:
            wanted = ceil((border - start) * row / max(limit, largest))
            found += _divided(start, border, min(wanted, READINGS))
            start = border
    return found


def _divided(start: int, stop: int, count: int) -> list[tuple[int, int]]:
    step = ceil((stop - start) / count)
    return list(pairwise([*range(start, stop, step), stop]))
