"""Tensors put together out of boxes that lie in several files, each a plain tensor there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..tensors.dtypes import DType
from ..tensors.records import Tensor
from ..tensors.stored import StoredTensor
from ..tensors.views import concatenated, viewed
from .dcp.pieces import Sizes, flaw
from .flat import joined


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a tensor: where it begins in the whole, its elements, and the rank that has it."""

    offsets: Sizes
    tensor: StoredTensor
    rank: int

    @property
    def sizes(self) -> Sizes:
        return self.tensor.shape


def without_copies(boxes: Sequence[Box]) -> list[Box]:
    """The boxes that have elements, each once.

    Raises ValueError where copies have other sizes, or other checksums, which are compared where both have one.
    """
    found: dict[Sizes, Box] = {}
    for box in boxes:
        if 0 in box.sizes:
            continue
        first = found.setdefault(box.offsets, box)
        if first.sizes != box.sizes:
            raise ValueError(f"ranks {first.rank} and {box.rank} have other sizes at {list(box.offsets)}")
        sums = first.tensor.crc32, box.tensor.crc32
        if None not in sums and sums[0] != sums[1]:
            raise ValueError(f"ranks {first.rank} and {box.rank} have other values of the same elements")
    return list(found.values())


def assembled(shape: Sizes, dtype: DType, boxes: Sequence[Box]) -> StoredTensor:
    """The tensor that boxes make up, read from them when it is written.  Raises ValueError where they do not."""
    if any(box.tensor.dtype != dtype for box in boxes):
        raise ValueError("its parts have several dtypes")
    parts = without_copies(boxes)
    if problem := flaw(shape, [(box.offsets, box.sizes) for box in parts]):
        raise ValueError(problem)
    if len(parts) < 2:
        return parts[0].tensor if parts else joined([], dtype, shape)
    return viewed(_of_grid(parts))


def _of_grid(boxes: Sequence[Box]) -> Tensor:
    """Boxes without gaps as one tensor, joined along one dimension after the other."""
    if len(boxes) == 1:
        return boxes[0].tensor
    for axis in range(len(boxes[0].sizes)):
        groups: dict[int, list[Box]] = {}
        for box in sorted(boxes, key=lambda one: one.offsets[axis]):
            groups.setdefault(box.offsets[axis], []).append(box)
        if len(groups) > 1 and all(len({box.sizes[axis] for box in group}) == 1 for group in groups.values()):
            ends = [start + group[0].sizes[axis] for start, group in groups.items()]
            if ends[:-1] == list(groups)[1:]:
                return concatenated([_of_grid(_within(group, axis)) for group in groups.values()], axis)
    raise ValueError("its parts are no grid")


def _within(group: Sequence[Box], axis: int) -> list[Box]:
    """The boxes of a slab, which begin at its start."""
    return [replace(box, offsets=(*box.offsets[:axis], 0, *box.offsets[axis + 1 :])) for box in group]
