"""Sinks: where the bytes of an output go; a file's gathers small writes and lets the kernel copy the rest."""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from ..errors import BrokenFile, EditError
from .spans import BLOCK, Block, ByteSpan

CHUNK = 64 << 20  # bytes that one kernel call copies, so that progress and signals get their turn
SMALL = 64 << 10  # bytes up to which a copy through memory costs less than a kernel call of its own
PAGE = 4096

Progress = Callable[[int], object]  # is told how many more bytes are done

_NOT_HERE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}


class Sink(Protocol):
    """A file under construction: four ways for bytes to come in, and one to mend what was written."""

    @property
    def position(self) -> int:
        """Bytes written so far."""
        ...

    @property
    def can_patch(self) -> bool:
        """Whether :meth:`patch` works: what goes to a server as it is made cannot be mended."""
        ...

    def literal(self, raw: Block) -> None:
        """Write these bytes."""
        ...

    def copy(self, span: ByteSpan) -> None:
        """Copy a span of another file."""
        ...

    def stream(self, blocks: Iterable[Block], nbytes: int, *, checksum: bool = False) -> int:
        """Write blocks that must add up to ``nbytes``; returns their CRC-32 where that is asked for."""
        ...

    def patch(self, position: int, raw: bytes) -> None:
        """Overwrite bytes that were written before."""
        ...


def streamed(
    blocks: Iterable[Block],
    nbytes: int,
    literal: Callable[[Block], object],
    tell: Callable[[int], object],
    *,
    checksum: bool = False,
) -> int:
    """Hand blocks that must add up to ``nbytes`` to a sink's ``literal``.  Raises EditError.

    Returns their CRC-32 with ``checksum``, which takes as long as the writing, and else 0.

    >>> streamed([b"12345", b"6789"], 9, lambda block: None, lambda done: None, checksum=True) == 0xCBF43926
    True
    """
    crc32 = written = 0
    for block in blocks:
        literal(block)
        if checksum:
            crc32 = zlib.crc32(block, crc32)
        written += len(block)
        tell(len(block))
    if written != nbytes:
        raise EditError([f"a tensor of {nbytes:,} bytes made {written:,}"])
    return crc32


class FileSink:
    """A :class:`~ckpt_surgeon.files.sinks.Sink` that fills one file; small writes are gathered first."""

    can_patch = True

    def __init__(self, descriptor: int, tell: Progress) -> None:
        self._descriptor = descriptor
        self._tell = tell
        self._pending = bytearray()
        self._flushed = 0
        self._sources: dict[Path, int] = {}

    def __enter__(self) -> FileSink:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._flush()
        finally:
            for source in self._sources.values():
                os.close(source)

    @property
    def position(self) -> int:
        return self._flushed + len(self._pending)

    def literal(self, raw: Block) -> None:
        if len(raw) >= BLOCK // 4:
            self._flush()
            self._put(memoryview(raw))
            return
        self._pending += raw
        if len(self._pending) >= BLOCK:
            self._flush()

    def stream(self, blocks: Iterable[Block], nbytes: int, *, checksum: bool = False) -> int:
        return streamed(blocks, nbytes, self.literal, self._tell, checksum=checksum)

    def patch(self, position: int, raw: bytes) -> None:
        self._flush()
        self._write(memoryview(raw), position)

    def copy(self, span: ByteSpan) -> None:
        local = span.path.local
        if local is None:
            for block in span.blocks():
                self.literal(block)
                self._tell(len(block))
            return
        source = self._source(local)
        if len(span) < SMALL:
            block = os.pread(source, len(span), span.start)
            if len(block) < len(span):
                raise BrokenFile(span.path, f"ends {len(span) - len(block):,} bytes before the data that it announces")
            self.literal(block)
            self._tell(len(span))
            return
        self._flush()
        at = span.start
        with _reading(local, source):
            while at < span.stop:
                done = self._copy_some(source, at, min(span.stop - at, CHUNK))
                if done == 0:
                    raise BrokenFile(span.path, f"ends {span.stop - at:,} bytes before the data that it announces")
                at += done
                self._flushed += done
                self._tell(done)

    def _copy_some(self, source: int, at: int, count: int) -> int:
        """The fastest copy that works here.

        Where source and target agree on their place in a page, sendfile moves whole pages; where not, or where
        the file system shares blocks, copy_file_range is as fast or faster.
        """
        agree = at % PAGE == self._flushed % PAGE
        for name in ("sendfile", "copy_file_range") if agree else ("copy_file_range", "sendfile"):
            if not hasattr(os, name):
                continue
            try:
                if name == "sendfile":
                    os.lseek(self._descriptor, self._flushed, os.SEEK_SET)
                    return os.sendfile(self._descriptor, source, at, count)
                return os.copy_file_range(source, self._descriptor, count, at, self._flushed)
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
        block = os.pread(source, min(count, BLOCK), at)
        return os.pwrite(self._descriptor, block, self._flushed)

    def _source(self, path: Path) -> int:
        if path not in self._sources:
            if len(self._sources) >= 64:
                os.close(self._sources.pop(next(iter(self._sources))))
            self._sources[path] = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        return self._sources[path]

    def _flush(self) -> None:
        pending, self._pending = self._pending, bytearray()
        self._put(memoryview(pending))

    def _put(self, view: memoryview) -> None:
        self._write(view, self._flushed)
        self._flushed += len(view)

    def _write(self, view: memoryview, position: int) -> None:
        done = 0
        while done < len(view):
            done += os.pwrite(self._descriptor, view[done:], position + done)


@contextmanager
def _reading(path: Path, descriptor: int) -> Iterator[None]:
    """Tell an input that fails from an output that does."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EIO and not _is_readable(descriptor):
            raise BrokenFile(path, "cannot be read (input/output error)") from error
        raise


def _is_readable(descriptor: int) -> bool:
    """Whether all of a file can be read; it is asked once a copy has failed."""
    try:
        position, block = 0, b"-"
        while block:
            block = os.pread(descriptor, BLOCK, position)
            position += len(block)
    except OSError:
        return False
    return True


class MemorySink:
    """A :class:`Sink` that gathers a small file in memory.

    >>> sink = MemorySink()
    >>> sink.literal(b"abc")
    >>> sink.patch(0, b"x")
    >>> bytes(sink.made), sink.position
    (b'xbc', 3)
    """

    can_patch = True

    def __init__(self) -> None:
        self.made = bytearray()

    @property
    def position(self) -> int:
        return len(self.made)

    def literal(self, raw: Block) -> None:
        self.made += raw

    def copy(self, span: ByteSpan) -> None:
        for block in span.blocks():
            self.literal(block)

    def stream(self, blocks: Iterable[Block], nbytes: int, *, checksum: bool = False) -> int:
        return streamed(blocks, nbytes, self.literal, lambda done: None, checksum=checksum)

    def patch(self, position: int, raw: bytes) -> None:
        self.made[position : position + len(raw)] = raw
