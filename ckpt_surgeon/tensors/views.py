"""Other views of tensors, and tensors joined: the arithmetic of shapes and strides behind the value edits.

What stored elements can be seen as stays stored; the rest is computed when it is written.  Every function raises
EditError, naming the key, where shapes do not fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import gcd, prod

from ..errors import EditError
from ..files.spans import BLOCK, Block
from .arithmetic import filled as constant
from .blocks import Stream
from .records import ComputedTensor, ExtraState, OpaqueTensor, Tensor
from .stored import StoredTensor
from .strides import row_major


def reshaped(key: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    known = prod(size for size in shape if size != -1)
    sizes = tuple(tensor.numel // known if size == -1 and known else size for size in shape)
    if shape.count(-1) > 1 or prod(sizes) != tensor.numel or any(size < 0 for size in sizes):
        raise EditError([f"{key!r} of shape {list(tensor.shape)} does not fit into {list(shape)}"])
    if isinstance(tensor, StoredTensor) and tensor.is_contiguous:
        return StoredTensor(
            tensor.dtype, sizes, row_major(sizes), tensor.offset, tensor.storage, tensor.conjugate, tensor.negative
        )
    return ComputedTensor(tensor.dtype, sizes, (tensor,), lambda inputs: iter(inputs[0].blocks()))


def axis_of(key: str, tensor: Tensor, dim: int) -> int:
    if not -len(tensor.shape) <= dim < len(tensor.shape):
        raise EditError([f"{key!r} of shape {list(tensor.shape)} has no dimension {dim}"])
    return dim % len(tensor.shape)


def viewed(tensor: Tensor) -> StoredTensor:
    """A tensor as one that can be viewed: its own storage, or one that is made when it is read."""
    if isinstance(tensor, StoredTensor):
        return tensor
    if isinstance(tensor, (OpaqueTensor, ExtraState)):
        raise EditError([f"{tensor.kind}: no tensor that can be viewed"])
    return tensor.stored()


def restrided(view: StoredTensor, shape: tuple[int, ...], stride: tuple[int, ...], offset: int) -> StoredTensor:
    return StoredTensor(view.dtype, shape, stride, offset, view.storage, view.conjugate, view.negative)


def sliced(tensor: Tensor, axis: int, start: int, stop: int, step: int = 1) -> StoredTensor:
    view = viewed(tensor)
    size = len(range(start, stop, step))
    shape = (*view.shape[:axis], size, *view.shape[axis + 1 :])
    stride = (*view.stride[:axis], view.stride[axis] * step, *view.stride[axis + 1 :])
    return restrided(view, shape, stride, view.offset + start * view.stride[axis] if size else view.offset)


def filled(like: Tensor, axis: int, size: int, value: float) -> ComputedTensor:
    shape = (*like.shape[:axis], size, *like.shape[axis + 1 :])

    return ComputedTensor(like.dtype, shape, (), lambda _: constant(like.dtype, prod(shape), value))


def concatenated(tensors: Sequence[Tensor], axis: int) -> ComputedTensor:
    """Tensors joined along one dimension; along an inner one they are read slab by slab, a block of memory for each.

    Along the first one the result is their bytes, one after the other.
    """
    first = tensors[0]
    shape = (*first.shape[:axis], sum(tensor.shape[axis] for tensor in tensors), *first.shape[axis + 1 :])
    rows = prod(first.shape[:axis])

    def make(inputs: tuple[Tensor, ...]) -> Iterator[Block]:
        if rows == 1:
            for tensor in inputs:
                yield from tensor.blocks()
            return
        widths = [tensor.nbytes // rows if rows else 0 for tensor in inputs]
        streams = [Stream(tensor.blocks()) for tensor in inputs]
        slab = max(BLOCK // max(sum(widths), 1), 1)
        for start in range(0, rows, slab):
            count = min(slab, rows - start)
            parts = [stream.take(count * width) for stream, width in zip(streams, widths, strict=True)]
            yield _side_by_side(parts, widths, count)

    return ComputedTensor(first.dtype, shape, tuple(tensors), make, in_sequence=rows == 1)


NARROW = 512  # bytes of a row up to which numpy puts rows together faster than slices of memory do


def _side_by_side(parts: Sequence[memoryview], widths: Sequence[int], count: int) -> Block:
    """Rows of several tensors, the first of each, then the second of each."""
    if sum(widths) > NARROW * len(widths) or count < 64:
        return b"".join(
            part[row * width : (row + 1) * width]
            for row in range(count)
            for part, width in zip(parts, widths, strict=True)
        )
    import numpy as np

    unit = np.dtype(f"u{gcd(8, *widths)}")  # the largest that all rows are made of
    made = np.empty((count, sum(widths) // unit.itemsize), unit)
    start = 0
    for part, width in zip(parts, widths, strict=True):
        stop = start + width // unit.itemsize
        made[:, start:stop] = np.frombuffer(part, unit).reshape(count, stop - start)
        start = stop
    return made.tobytes()


def unsqueezed(tensor: Tensor, axis: int) -> Tensor:
    """A tensor with one more dimension, of size 1."""
    shape = (*tensor.shape[:axis], 1, *tensor.shape[axis:])
    if not isinstance(tensor, StoredTensor):
        return ComputedTensor(tensor.dtype, shape, (tensor,), lambda inputs: iter(inputs[0].blocks()), in_sequence=True)
    return restrided(tensor, shape, (*tensor.stride[:axis], 1, *tensor.stride[axis:]), tensor.offset)


def stacked(tensors: Sequence[Tensor], keys: Sequence[str], dim: int) -> ComputedTensor:
    """Tensors of one shape and dtype along a new dimension ``dim``."""
    first = tensors[0]
    problems = [
        f"{key!r} ({tensor.dtype} {list(tensor.shape)}) does not stack with {keys[0]!r} "
        f"({first.dtype} {list(first.shape)})"
        for key, tensor in zip(keys, tensors, strict=True)
        if (tensor.dtype, tensor.shape) != (first.dtype, first.shape)
    ]
    dims = len(first.shape) + 1
    if not -dims <= dim < dims:
        problems.append(f"{keys[0]!r} of shape {list(first.shape)} gets no new dimension {dim}")
    if problems:
        raise EditError(problems)
    return concatenated([unsqueezed(tensor, dim % dims) for tensor in tensors], dim % dims)


def unstacked(key: str, tensor: Tensor, dim: int) -> list[Tensor]:
    """The views of a tensor at each index of a dimension, without that dimension."""
    axis = axis_of(key, tensor, dim)
    view = viewed(tensor)
    shape, stride = ((*values[:axis], *values[axis + 1 :]) for values in (view.shape, view.stride))
    return [restrided(view, shape, stride, view.offset + at * view.stride[axis]) for at in range(view.shape[axis])]


def interleaved(tensors: Sequence[Tensor], keys: Sequence[str], dim: int, groups: int) -> Tensor:
    """Tensors joined along ``dim``, group by group."""
    axis = axis_of(keys[0], tensors[0], dim)
    problems = [
        f"{key!r} ({tensor.dtype} {list(tensor.shape)}) does not join {keys[0]!r} "
        f"({tensors[0].dtype} {list(tensors[0].shape)}) along dimension {dim}"
        for key, tensor in zip(keys, tensors, strict=True)
        if tensor.dtype != tensors[0].dtype
        or len(tensor.shape) != len(tensors[0].shape)
        or any(a != b for at, (a, b) in enumerate(zip(tensor.shape, tensors[0].shape, strict=False)) if at != axis)
    ]
    problems += [
        f"{key!r} has {tensor.shape[axis]:,} indices, not a multiple of {groups} groups"
        for key, tensor in zip(keys, tensors, strict=True)
        if groups < 1 or (axis < len(tensor.shape) and tensor.shape[axis] % groups)
    ]
    if problems:
        raise EditError(problems)
    if groups == 1:
        return concatenated(tensors, axis)
    joined = concatenated([grouped(tensor, axis, groups) for tensor in tensors], axis + 1)
    total = sum(tensor.shape[axis] for tensor in tensors)
    shape = (*tensors[0].shape[:axis], total, *tensors[0].shape[axis + 1 :])
    return reshaped(keys[0], joined, shape)


def grouped(tensor: Tensor, axis: int, groups: int) -> StoredTensor:
    """A view in which one dimension is two: group, and index in the group."""
    view = viewed(tensor)
    size, step = view.shape[axis] // groups, view.stride[axis]
    shape = (*view.shape[:axis], groups, size, *view.shape[axis + 1 :])
    stride = (*view.stride[:axis], size * step, step, *view.stride[axis + 1 :])
    return restrided(view, shape, stride, view.offset)


def parts_of(key: str, tensor: Tensor, dim: int, count: int, sizes: Sequence[int], groups: int) -> list[Tensor]:
    """The parts of a fused tensor along ``dim``."""
    axis = axis_of(key, tensor, dim)
    length = tensor.shape[axis]
    if not count or (sizes and len(sizes) != count):
        raise EditError([f"{len(sizes)} sizes for {count} parts of {key!r}"])
    wanted = list(sizes) or [length // count] * count
    if sum(wanted) != length or groups < 1 or any(size < 0 or size % groups for size in wanted):
        asked = f"{' + '.join(map(str, wanted))} in {groups} groups"
        raise EditError([f"{key!r} has {length:,} indices in dimension {dim}, not {asked}"])
    view = grouped(tensor, axis, groups)
    parts: list[Tensor] = []
    start = 0
    for size in wanted:
        part = sliced(view, axis + 1, start, start + size // groups)
        shape = (*tensor.shape[:axis], size, *tensor.shape[axis + 1 :])
        parts.append(ungrouped(key, part, axis, shape))
        start += size // groups
    return parts


def ungrouped(key: str, part: StoredTensor, axis: int, shape: tuple[int, ...]) -> Tensor:
    """A view of one group stays one; several are joined by reading them in order."""
    if part.shape[axis] == 1:
        return restrided(part, shape, (*part.stride[:axis], *part.stride[axis + 1 :]), part.offset)
    return reshaped(key, part, shape)
