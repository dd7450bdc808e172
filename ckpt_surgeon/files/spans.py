"""Spans: bytes of a file, read in blocks, mapped, compared."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from typing import TypeAlias

from ..errors import BrokenFile
from .paths import FilePath
from .prefetch import blocks as remote_blocks
from .remote import RemotePath

Block: TypeAlias = bytes | memoryview

BLOCK = 1 << 20  # bytes handled at a time wherever bytes pass through this process


@dataclass(frozen=True, slots=True)
class ByteSpan:
    """Bytes ``start`` to ``stop`` (exclusive) of a file.

    >>> from pathlib import Path
    >>> len(ByteSpan(Path("a.pth"), 64, 128))
    64
    """

    path: FilePath
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def blocks(self, size: int = BLOCK) -> Iterator[bytes]:
        """Yield the bytes in pieces of ``size``; raises BrokenFile if the file has become shorter."""
        if isinstance(self.path, RemotePath):
            yield from remote_blocks(self.path, self.start, self.stop, size)
            return
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start)
            left = len(self)
            while left:
                piece = file.read(min(size, left))
                if not piece:
                    raise BrokenFile(self.path, f"ends {left:,} bytes before the data that it announces")
                left -= len(piece)
                yield piece

    def same_bytes(self, other: ByteSpan) -> bool:
        """Whether two spans hold the same bytes; read through two small buffers, which the caches keep."""
        if len(self) != len(other) or self == other:
            return self == other
        if isinstance(self.path, RemotePath) or isinstance(other.path, RemotePath):
            return all(mine == theirs for mine, theirs in zip(self.blocks(), other.blocks(), strict=True))
        mine, theirs = bytearray(BLOCK // 4), bytearray(BLOCK // 4)
        with open(self.path, "rb", buffering=0) as one, open(other.path, "rb", buffering=0) as two:
            one.seek(self.start)
            two.seek(other.start)
            left = len(self)
            while left:
                if left < len(mine):
                    mine, theirs = mine[:left], theirs[:left]
                if fill(one, mine) < len(mine) or fill(two, theirs) < len(theirs):
                    raise BrokenFile(self.path, "or the other became shorter while they were compared")
                if mine != theirs:
                    return False
                left -= len(mine)
        return True

    def fetched(self) -> bytearray:
        """All the bytes in memory."""
        raw = bytearray(len(self))
        at = 0
        for block in self.blocks():
            raw[at : at + len(block)] = block
            at += len(block)
        return raw

    @contextmanager
    def mapped(self) -> Iterator[tuple[memoryview, Callable[[], None]]]:
        """Map the bytes; also yield a function that gives the mapped pages back to the kernel.

        Those of a remote file are fetched into memory.
        """
        if isinstance(self.path, RemotePath):
            yield memoryview(self.fetched()), _nothing
            return
        low = self.start - self.start % mmap.ALLOCATIONGRANULARITY
        with open(self.path, "rb") as file:
            if os.fstat(file.fileno()).st_size < self.stop:
                raise BrokenFile(self.path, "became shorter while it was read")
            mapping = mmap.mmap(file.fileno(), self.stop - low, access=mmap.ACCESS_READ, offset=low)
        view = memoryview(mapping)

        def forget() -> None:
            if hasattr(mapping, "madvise"):
                mapping.madvise(mmap.MADV_DONTNEED)

        try:
            yield view[self.start - low :], forget
        finally:
            view.release()


def fill(file: FileIO, buffer: bytearray | memoryview) -> int:
    """Read until a buffer is full or the file ends; returns the bytes read."""
    done = 0
    while done < len(buffer):
        count = file.readinto(memoryview(buffer)[done:])
        if not count:
            break
        done += count
    return done


def _nothing() -> None:
    pass
