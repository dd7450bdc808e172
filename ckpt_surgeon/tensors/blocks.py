"""The elements of a tensor in pieces that are computed with: read where they are needed, by threads, in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from threading import Lock, local
from typing import TYPE_CHECKING, TypeVar

from ..errors import BrokenFile
from ..files.spans import Block
from .records import Tensor
from .stored import StoredTensor

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

    from .conversion import Array

PIECE = 512 << 10  # bytes computed with at a time: numpy's own overhead is small then, and the caches hold them
THREADED = 8 << 20  # bytes from which on threads save more time than it takes to start them
THREADS = 4  # no more than this: reading and writing keep no more of them busy

Item = TypeVar("Item")
Made = TypeVar("Made")


class _Buffers(local):
    """A piece of memory for each thread and slot, and for each name of an array, used again and again."""

    def __init__(self) -> None:
        self.slots: dict[int, bytearray] = {}
        self.arrays: dict[str, Array] = {}


_buffers = _Buffers()
_seeking = Lock()


@dataclass(frozen=True, slots=True)
class Piece:
    """Some elements of a tensor: ``read`` gives the bytes, until the same thread reads into the same slot again."""

    nbytes: int
    read: Callable[[int], Block | bytearray]


def pieces(tensor: Tensor, nbytes: int = PIECE) -> Iterator[Piece]:
    """A tensor's elements in row-major order, little-endian, in pieces of at most ``nbytes``.

    Raises BrokenFile, before the first, where the checksum of the bytes does not match.
    """
    span = tensor.span if isinstance(tensor, StoredTensor) else None
    if span is not None and isinstance(span.path, Path):
        if isinstance(tensor, StoredTensor):
            tensor.storage.check(tensor.nbytes)
        file = _Opened(span.path)
        for start in range(span.start, span.stop, nbytes):
            stop = min(start + nbytes, span.stop)
            yield Piece(stop - start, partial(file.read, start, stop))
        return
    for block in tensor.blocks():
        for start in range(0, len(block), nbytes):
            yield _in_memory(memoryview(block)[start : start + nbytes])


class _Opened:
    """A local file that threads read in at any place; it is closed when no piece of it is left."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, start: int, stop: int, slot: int) -> memoryview:
        """Bytes of the file, in the memory that this thread has for a slot.  Raises BrokenFile."""
        held = _buffers.slots.get(slot)
        if held is None or len(held) < stop - start:
            held = _buffers.slots[slot] = bytearray(max(PIECE, stop - start))
        view = memoryview(held)[: stop - start]
        done = 0
        while done < len(view):
            if not (count := _read_at(self._descriptor, view[done:], start + done)):
                raise BrokenFile(self._path, "became shorter while it was read")
            done += count
        return view


def _read_at(descriptor: int, view: memoryview, start: int) -> int:
    """Fill memory with bytes of a file from ``start`` on; returns how many came."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [view], start)
    with _seeking:  # where a file has one position, for all threads
        os.lseek(descriptor, start, os.SEEK_SET)
        raw = os.read(descriptor, len(view))
    view[: len(raw)] = raw
    return len(raw)


def scratch(name: str, count: int, dtype: str) -> Array:
    """An array of this thread, for what lasts no longer than one piece: the same memory each time for one name."""
    import numpy as np

    wanted = np.dtype(dtype)
    held = _buffers.arrays.get(name)
    if held is None or held.nbytes < count * wanted.itemsize:
        held = _buffers.arrays[name] = np.empty(count * wanted.itemsize, np.uint8)
    made: Array = held[: count * wanted.itemsize].view(wanted)
    return made


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


def alongside(*tensors: Tensor, count: int = 0) -> Iterator[tuple[Piece, ...]]:
    """Pieces of several tensors with the same elements in them, one by one: ``count`` elements each, but for the last.

    Without ``count`` it is as many as fill :data:`PIECE`.
    """
    count = count or PIECE // max(tensor.dtype.itemsize for tensor in tensors)
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
