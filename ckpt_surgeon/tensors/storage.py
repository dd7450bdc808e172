"""The bytes behind tensors: where they lie, how they are packed, and how they are read in blocks.

Several tensors may share one :class:`Storage`.  Nothing here imports torch.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from ..errors import BrokenFile
from ..files.paths import FilePath
from ..files.spans import BLOCK, Block, ByteSpan
from ..text import Shown

CHECKED = 1 << 30  # bytes of a storage whose checksum is compared before any part of it is used
FETCHED = 16 << 20  # the same, of one at a URL, whose every byte has to come
SHARE = 4  # a part of at least one in so many has its storage's checksum compared, however large that is


class Producer(Protocol):
    """What makes the bytes of a storage when they are read: a computed tensor."""

    @property
    def files(self) -> tuple[FilePath, ...]: ...

    def blocks(self) -> Iterator[Block]: ...


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Storage(Shown):
    """The bytes behind one or more tensors; two tensors share storage when this is the same object.

    ``nbytes`` counts the bytes once they are unpacked; ``span`` is where they lie (packed, if ``deflated``),
    ``memory`` holds them instead when they are in this process, ``crc32`` is the container's checksum of them.
    """

    span: ByteSpan | None
    nbytes: int
    device: str = "cpu"  # where the tensor lived when it was saved
    crc32: int | None = None
    deflated: bool = False
    big_endian: bool = False
    memory: memoryview | None = None
    source: Producer | None = None  # makes the bytes when they are asked for
    _checked: list[bool] = field(default_factory=list, repr=False)  # True once the checksum was compared

    def check(self, used: int | None = None) -> None:
        """Compare the checksum, once, where there is one; ``used`` says how many bytes are to be used.

        A small part of a large storage is used unchecked.  Raises BrokenFile when the checksum does not match.
        """
        if self.crc32 is None or self._checked or self.deflated:
            return
        few = CHECKED if self.span is None or self.span.path.remote is None else FETCHED
        if used is None or self.nbytes <= max(few, used * SHARE):
            for _ in self.blocks():
                pass

    @property
    def is_lost(self) -> bool:
        """Whether its bytes are nowhere: what a truncated file announces and does not have."""
        return self.span is None and self.memory is None and self.source is None and self.nbytes > 0

    @property
    def plain(self) -> ByteSpan | None:
        """The span, if its bytes can be copied as they are."""
        return None if self.deflated or self.big_endian else self.span

    @property
    def files(self) -> tuple[FilePath, ...]:
        """The files that its bytes come from."""
        if self.span is not None:
            return (self.span.path,)
        return self.source.files if self.source is not None else ()

    def blocks(self) -> Iterator[bytes]:
        """Yield all the bytes, unpacked, in stored byte order.

        Raises BrokenFile when they do not unpack or, after the last, when their checksum does not match.
        """
        if self.source is not None:
            yield from map(bytes, self.source.blocks())
            return
        if self.span is None:
            memory = self.memory if self.memory is not None else memoryview(b"")
            yield from (bytes(memory[start : start + BLOCK]) for start in range(0, self.nbytes, BLOCK))
            return
        raw = whole_elements(inflated(self.span, self.nbytes)) if self.deflated else self.span.blocks()
        if self.crc32 is None:
            yield from raw
            return
        crc32 = 0
        for block in raw:
            crc32 = zlib.crc32(block, crc32)
            yield block
        if crc32 != self.crc32:
            place = f"bytes {self.span.start:,} to {self.span.stop:,}"
            raise BrokenFile(self.span.path, f"is damaged: the CRC of {place} does not match", "fetch it again")
        self._checked.append(True)

    @contextmanager
    def opened(self) -> Iterator[tuple[memoryview, Callable[[], None]]]:
        """Yield the bytes as one view, and a function to call between uses that bounds the memory taken."""
        if self.memory is not None:
            yield self.memory, _nothing
        elif self.nbytes == 0:
            yield memoryview(b""), _nothing
        elif self.span is None or self.deflated:
            yield memoryview(b"".join(self.blocks())), _nothing
        else:
            with self.span.mapped() as mapped:
                yield mapped


def inflated(span: ByteSpan, nbytes: int) -> Iterator[bytes]:
    """Unpack a raw deflate stream, never more than ``nbytes`` of it."""
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    left = nbytes
    try:
        for packed in span.blocks():
            while packed:
                piece = unpacker.decompress(packed, BLOCK)
                packed = unpacker.unconsumed_tail
                left -= len(piece)
                if left < 0:
                    raise BrokenFile(span.path, f"a packed record unpacks to more than its {nbytes:,} bytes")
                yield piece
                if not piece and unpacker.eof:
                    break
    except zlib.error as error:
        raise BrokenFile(span.path, f"a packed record does not unpack ({error})") from error
    tail = unpacker.flush()
    if left != len(tail):
        raise BrokenFile(span.path, f"a packed record unpacks to {nbytes - left:,} of its {nbytes:,} bytes")
    if tail:
        yield tail


def part_of(pieces: Iterator[bytes], start: int, stop: int) -> Iterator[bytes]:
    """The bytes from ``start`` to ``stop`` of a stream, which is read to its end: there its checksum is compared."""
    at = 0
    for piece in pieces:
        part = piece[max(start - at, 0) : max(stop - at, 0)]
        at += len(piece)
        if part:
            yield part


def whole_elements(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces that cut no element, however wide, in two."""
    rest = b""
    for piece in pieces:
        whole = rest + piece
        end = len(whole) - len(whole) % 16
        rest = whole[end:]
        if end:
            yield whole[:end]
    if rest:
        yield rest


def _nothing() -> None:
    pass
