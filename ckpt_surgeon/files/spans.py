"""Spans: bytes of a file, read in blocks, mapped, compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import FileIO
from typing import TypeAlias

from ..errors import BrokenFile
from .paths import FilePath

Block: TypeAlias = bytes | memoryview

BLOCK = 1 << 20  # bytes handled at a time wherever bytes pass through this process


@dataclass(frozen=True, slots=True)
class ByteSpan:
    """Bytes ``start`` to ``stop`` (exclusive) of a file.

    >>> from ckpt_surgeon.files.paths import file_path
    >>> len(ByteSpan(file_path("a.pth"), 64, 128))
    64
    """

    path: FilePath
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def blocks(self, size: int = BLOCK) -> Iterator[bytes]:
        """Yield the bytes in pieces of ``size``; raises BrokenFile if the file has become shorter."""
        return self.path.blocks(self.start, self.stop, size)

    def same_bytes(self, other: ByteSpan) -> bool:
        """Whether two spans hold the same bytes; read through two small buffers, which the caches keep."""
        if len(self) != len(other) or self == other:
            return self == other
        here, there = self.path.local, other.path.local
        if here is None or there is None:
            return all(mine == theirs for mine, theirs in zip(self.blocks(), other.blocks(), strict=True))
        mine, theirs = bytearray(BLOCK // 4), bytearray(BLOCK // 4)
        with open(here, "rb", buffering=0) as one, open(there, "rb", buffering=0) as two:
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

    def mapped(self) -> AbstractContextManager[tuple[memoryview, Callable[[], None]]]:
        """Map the bytes; also gives a function that hands the mapped pages back to the kernel.

        Those of a remote file are fetched into memory.
        """
        return self.path.view(self.start, self.stop)


def fill(file: FileIO, buffer: bytearray | memoryview) -> int:
    """Read until a buffer is full or the file ends; returns the bytes read."""
    done = 0
    while done < len(buffer):
        count = file.readinto(memoryview(buffer)[done:])
        if not count:
            break
        done += count
    return done
