"""Strided elements in plain Python: gathered in row-major order, or with their bytes swapped."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from typing import Literal, TypeAlias

from ..files.spans import BLOCK

_Format: TypeAlias = Literal["B", "H", "I", "Q"]
_FORMATS: dict[int, _Format] = {
    1: "B",
    2: "H",
    4: "I",
    8: "Q",
}  # memoryview and array codes by item size


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor of this shape, as torch gives them.

    >>> row_major((2, 3, 4))
    (12, 4, 1)
    """
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def swapped(piece: bytes, part: int) -> bytes:
    """The other byte order of numbers of ``part`` bytes.

    >>> swapped(b"abcd", 2)
    b'badc'
    """
    numbers = array(_FORMATS[part], piece)
    numbers.byteswap()
    return numbers.tobytes()


def gather(
    source: memoryview, itemsize: int, shape: Sequence[int], stride: Sequence[int], offset: int
) -> Iterator[bytes]:
    """Yield strided elements of ``source`` (bytes) in row-major order, in pieces of about BLOCK bytes.

    >>> b"".join(gather(memoryview(b"abcdef"), 1, (3, 2), (1, 3), 0))
    b'adbecf'
    """
    dims = list(zip(shape, stride, strict=True))
    if itemsize == 16:  # no memoryview format is that wide: two halves make one more dimension
        dims = [(size, step * 2) for size, step in dims] + [(2, 1)]
        itemsize, offset = 8, offset * 2
    code = _FORMATS[itemsize]
    elements = source[: len(source) - len(source) % itemsize].cast(code)
    for piece, start in _pieces(_coalesced(dims), offset, max(BLOCK // itemsize, 1)):
        yield _gathered(elements, code, piece, start)


def _coalesced(dims: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merge neighbouring dimensions that one stride walks through."""
    merged: list[tuple[int, int]] = []
    for size, step in dims:
        if size == 1:
            continue
        if merged and merged[-1][1] == size * step:
            merged[-1] = (merged[-1][0] * size, step)
        else:
            merged.append((size, step))
    return merged


def _pieces(dims: list[tuple[int, int]], offset: int, limit: int) -> Iterator[tuple[list[tuple[int, int]], int]]:
    """Cut a strided box into boxes of at most ``limit`` elements, in row-major order."""
    if prod(size for size, _ in dims) <= limit:
        yield dims, offset
        return
    (size, step), rest = dims[0], dims[1:]
    inner = prod(size for size, _ in rest)
    if inner > limit:
        for index in range(size):
            yield from _pieces(rest, offset + index * step, limit)
    else:
        rows = limit // inner
        for index in range(0, size, rows):
            yield [(min(rows, size - index), step), *rest], offset + index * step


def _gathered(elements: memoryview, code: _Format, dims: list[tuple[int, int]], offset: int) -> bytes:
    """Copy one strided box, along its longest dimension at a time."""
    if not dims:
        return elements[offset : offset + 1].tobytes()
    sizes = [size for size, _ in dims]
    out = bytearray(prod(sizes) * elements.itemsize)
    target = memoryview(out).cast(code)
    steps_out = row_major(sizes)
    longest = max(range(len(dims)), key=sizes.__getitem__)
    count, step_in, step_out = sizes[longest], dims[longest][1], steps_out[longest]
    others = [axis for axis in range(len(dims)) if axis != longest]
    for index in product(*(range(sizes[axis]) for axis in others)):
        start = offset + sum(i * dims[axis][1] for i, axis in zip(index, others, strict=True))
        begin = sum(i * steps_out[axis] for i, axis in zip(index, others, strict=True))
        if step_in:
            run = elements[start : start + (count - 1) * step_in + 1 : step_in]
        else:
            run = memoryview(elements[start : start + 1].tobytes() * count).cast(code)
        target[begin : begin + (count - 1) * step_out + 1 : step_out] = run
    return bytes(out)
