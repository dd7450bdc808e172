"""What a container's writer writes into; :mod:`ckpt_surgeon.writing` has the one that fills files."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from ..tensors import Block, ByteSpan


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
