"""The elements of a tensor in pieces that are computed with: read where they are needed, by threads, in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from threading import local
from typing import TYPE_CHECKING, TypeVar

from ..errors import BrokenFile
from ..files.spans import Block, fill
from .records import Tensor
from .stored import StoredTensor

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
    """Some elements of a tensor: ``read`` gives the bytes, until the same thread reads into the same slot again."""

    nbytes: int
    read: Callable[[int], Block | bytearray]


def pieces(tensor: Tensor, nbytes: int = PIECE) -> Iterator[Piece]:
    """A tensor's elements in row-major order, little-endian, in pieces of at most ``nbytes`` (up to :data:`PIECE`).

    Raises BrokenFile, before the first, where the checksum of the bytes does not match.
    """
    span = tensor.span if isinstance(tensor, StoredTensor) else None
    if span is not None and isinstance(span.path, Path):
        if isinstance(tensor, StoredTensor):
            tensor.storage.check(tensor.nbytes)
        for start in range(span.start, span.stop, nbytes):
            stop = min(start + nbytes, span.stop)
            yield Piece(stop - start, partial(_read, span.path, start, stop))
        return
    for block in tensor.blocks():
        for start in range(0, len(block), nbytes):
            yield _in_memory(memoryview(block)[start : start + nbytes])


def _read(path: Path, start: int, stop: int, slot: int) -> memoryview:
    """Bytes of a local file, in the memory that this thread has for a slot."""
    if slot not in _buffers.slots:
        _buffers.slots[slot] = bytearray(PIECE)
    view = memoryview(_buffers.slots[slot])[: stop - start]
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        if fill(file, view) < len(view):
            raise BrokenFile(path, "became shorter while it was read")
    return view


def _in_memory(raw: Block) -> Piece:
    return Piece(len(raw), lambda _: raw)


class Stream:
    """Blocks that are taken in other sizes than they come in."""

    def __init__(self, blocks: Iterator[Block]) -> None:
        self._blocks = blocks
        self._left = memoryview(b"")

    def take(self, nbytes: int) -> memoryview:
        """The next bytes."""
        found = bytearray()
        while len(found) < nbytes:
            if not self._left:
                self._left = memoryview(next(self._blocks))
            taken = self._left[: nbytes - len(found)]
            found += taken
            self._left = self._left[len(taken) :]
        return memoryview(found)


def alongside(*tensors: Tensor) -> Iterator[tuple[Piece, ...]]:
    """Pieces of several tensors with the same elements in them, one by one."""
    count = PIECE // max(tensor.dtype.itemsize for tensor in tensors)
    yield from zip(*(_counted(tensor, count) for tensor in tensors), strict=True)


def _counted(tensor: Tensor, count: int) -> Iterator[Piece]:
    """Pieces of exactly ``count`` elements, but for the last."""
    size = count * tensor.dtype.itemsize
    kept = b""
    for piece in pieces(tensor, size):
        if piece.nbytes == size and not kept:
            yield piece
            continue
        kept += bytes(piece.read(0))
        if len(kept) >= size:
            yield _in_memory(kept[:size])
            kept = kept[size:]
    if kept:
        yield _in_memory(kept)


def in_order(function: Callable[[Item], Made], items: Iterable[Item], nbytes: int) -> Iterator[Made]:
    """Yield what a function makes of each item, in order; of much (``nbytes`` in all) in threads, few items ahead."""
    _keep_freed_memory()
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


@cache
def _keep_freed_memory() -> None:
    """Let malloc keep the memory of freed arrays for the next ones, in place of new pages for each.

    glibc does so for sizes up to the largest that was freed (mallopt(3), M_MMAP_THRESHOLD); no page of this array is
    touched.
    """
    import numpy as np

    np.empty(16 << 20, np.uint8)


def _cores() -> range:
    return range(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@cache
def _workers() -> ThreadPoolExecutor:
    """The threads that compute, for the whole process; their work waits for no other work."""
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(min(len(_cores()), THREADS), "computing")
