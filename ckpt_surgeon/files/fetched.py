"""A remote file as one that is open, or mapped: what readers get that would open or map a local file."""

from __future__ import annotations

import io
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from .prefetch import Fetchable, Range, blocks

T = TypeVar("T")


class RangeReader(io.RawIOBase):
    """A remote file as one that is open; exactly what is read is fetched, and beyond the end there is nothing."""

    def __init__(self, path: Fetchable) -> None:
        self.path = path
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._at = offset + (0, self._at, self.path.size)[whence]
        return self._at

    def read(self, count: int | None = -1, /) -> bytes:
        left = max(self.path.size - self._at, 0)
        raw = self.path.fetch(self._at, self._at + (left if count is None or count < 0 else min(count, left)))
        self._at += len(raw)
        return raw


class Fetched(mmap.mmap):
    """A remote file as if it were mapped: it has the bytes that were fetched, and zeros where none were yet."""

    path: Fetchable
    filled = 0  # bytes from the beginning that are there

    def grow(self) -> bool:
        """Fetch more of the beginning, four times as much; False when all of it is there."""
        if self.filled == len(self):
            return False
        self._fill(self.filled, min(max(4 * self.filled, len(self.path.head())), len(self)))
        return True

    def fetch_all(self) -> None:
        """Fetch what is not there yet."""
        while self.filled < len(self):
            self._fill(self.filled, min(self.filled + (64 << 20), len(self)))

    def _fill(self, start: int, stop: int) -> None:
        for block in blocks(self.path, start, stop, 1 << 20):
            self[start : start + len(block)] = block
            start += len(block)
        self.filled = stop

    def fetch(self, ranges: Iterable[Range]) -> None:
        """Fetch some bytes further on, all at a time."""
        wanted = [(start, min(stop, len(self))) for start, stop in ranges if start < len(self)]
        self.path.fetch_ahead(wanted)
        for start, stop in wanted:
            self[start:stop] = self.path.fetch(start, stop)


@contextmanager
def fetched_mapping(path: Fetchable) -> Iterator[mmap.mmap]:
    """A remote file as :class:`Fetched`, backed by a temporary file with holes."""
    from tempfile import TemporaryFile

    with TemporaryFile() as holes:
        holes.truncate(path.size)
        with Fetched(holes.fileno(), path.size, access=mmap.ACCESS_WRITE) as fetched:
            fetched.path = path
            fetched.grow()
            yield fetched


def retry_with_more(data: bytes | mmap.mmap, parse: Callable[[], T], failures: tuple[type[Exception], ...]) -> T:
    """What ``parse`` makes of a mapping; it is called again with more of a remote file where there was too little.

    >>> retry_with_more(b"12", lambda: int("12"), (ValueError,))
    12
    """
    while True:
        try:
            return parse()
        except failures:
            if not (isinstance(data, Fetched) and data.grow()):
                raise


def ensure_fetched(data: bytes | mmap.mmap, ranges: Iterable[Range]) -> None:
    """Fetch these bytes of a mapping if they are a remote file's."""
    if isinstance(data, Fetched):
        data.fetch(ranges)


def ensure_all_fetched(data: bytes | mmap.mmap) -> None:
    """Fetch every byte of a mapping that is a remote file's."""
    if isinstance(data, Fetched):
        data.fetch_all()
