"""The elements of a tensor in pieces that are computed with: read where they are needed, by threads, in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from threading import local
from typing import TYPE_CHECKING, TypeVar

from ..errors import BrokenFile
from ..files.remote import RemotePath
from ..files.spans import Block, ByteSpan, fill
from .records import StoredTensor, Tensor

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

PIECE = 512 << 10  # bytes computed with at a time: numpy's own overhead is small then, and the caches hold them
THREADED = 8 << 20  # bytes from which on threads save more time than it takes to start them
THREADS = 4  # no more than this: reading and writing keep no more of them busy

Item = TypeVar("Item")
Made = TypeVar("Made")


class _Buffers(local):
    """A piece of memory for each thread and slot, used again and again."""

    def __init__(self) -> None:
        self.slots: dict[int, bytearray] = {}


_buffers = _Buffers()


@dataclass(frozen=True, slots=True)
class Piece:
    """Some elements of a tensor: where they lie in a local file, or the bytes themselves."""

    place: ByteSpan | Block

    def __len__(self) -> int:
        return len(self.place)

    def read(self, slot: int = 0) -> Block | bytearray:
        """The bytes, valid until this thread reads into the same slot again.  Raises BrokenFile when they are gone."""
        if not isinstance(self.place, ByteSpan):
            return self.place
        if slot not in _buffers.slots:
            _buffers.slots[slot] = bytearray(PIECE)
        view = memoryview(_buffers.slots[slot])[: len(self.place)]
        with open(self.place.path, "rb", buffering=0) as file:
            file.seek(self.place.start)
            if fill(file, view) < len(view):
                raise BrokenFile(self.place.path, "became shorter while it was read")
        return view


def pieces(tensor: Tensor, nbytes: int = PIECE) -> Iterator[Piece]:
    """A tensor's elements in row-major order, little-endian, in pieces of at most ``nbytes`` (up to :data:`PIECE`)."""
    span = tensor.span if isinstance(tensor, StoredTensor) else None
    if span is not None and not isinstance(span.path, RemotePath):
        for start in range(span.start, span.stop, nbytes):
            yield Piece(ByteSpan(span.path, start, min(start + nbytes, span.stop)))
        return
    for block in tensor.blocks():
        for start in range(0, len(block), nbytes):
            yield Piece(memoryview(block)[start : start + nbytes])


def paired(ours: Tensor, theirs: Tensor) -> Iterator[tuple[Piece, Piece]]:
    """Pieces of two tensors with the same elements in them, one by one."""
    count = PIECE // max(ours.dtype.itemsize, theirs.dtype.itemsize)
    yield from zip(_counted(ours, count), _counted(theirs, count), strict=True)


def _counted(tensor: Tensor, count: int) -> Iterator[Piece]:
    """Pieces of exactly ``count`` elements, but for the last."""
    size = count * tensor.dtype.itemsize
    kept = b""
    for piece in pieces(tensor, size):
        if len(piece) == size and not kept:
            yield piece
            continue
        kept += bytes(piece.read())
        if len(kept) >= size:
            yield Piece(kept[:size])
            kept = kept[size:]
    if kept:
        yield Piece(kept)


def in_order(function: Callable[[Item], Made], items: Iterable[Item], nbytes: int) -> Iterator[Made]:
    """Yield what a function makes of each item, in order; of much (``nbytes`` in all) in threads, few items ahead."""
    if nbytes < THREADED or len(_cores()) < 2:
        yield from map(function, items)
        return
    workers = _workers()
    waiting: deque[Future[Made]] = deque()
    try:
        for item in items:
            waiting.append(workers.submit(function, item))
            if len(waiting) > 2 * min(len(_cores()), THREADS):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _cores() -> range:
    return range(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@cache
def _workers() -> ThreadPoolExecutor:
    """The threads that compute, for the whole process; their work waits for no other work."""
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(min(len(_cores()), THREADS), "computing")
