"""What a container's writer writes into; :mod:`ckpt_surgeon.file_sink` has the one that fills files."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from typing import Protocol

from ..errors import EditError
from ..tensors.records import Block, ByteSpan


def streamed(
    blocks: Iterable[Block], nbytes: int, literal: Callable[[Block], object], tell: Callable[[int], object]
) -> int:
    """Hand blocks that must add up to ``nbytes`` to a sink's ``literal``; returns their CRC-32.  Raises EditError.

    >>> streamed([b"12345", b"6789"], 9, lambda block: None, lambda done: None) == 0xCBF43926
    True
    """
    crc32 = written = 0
    for block in blocks:
        literal(block)
        crc32 = zlib.crc32(block, crc32)
        written += len(block)
        tell(len(block))
    if written != nbytes:
        raise EditError([f"a tensor of {nbytes:,} bytes made {written:,}"])
    return crc32


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

    def stream(self, blocks: Iterable[Block], nbytes: int) -> int:
        """Write blocks that must add up to ``nbytes``; returns their CRC-32."""
        ...

    def patch(self, position: int, raw: bytes) -> None:
        """Overwrite bytes that were written before."""
        ...
