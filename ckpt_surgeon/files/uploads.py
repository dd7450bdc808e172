"""A file sent to a URL in parts while it is made, and visible only once it is declared complete.

Amazon's S3 and its like can do that.  Other file systems show a file as it grows, or move it about afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ..errors import FileError
from ..safe_text import secrets_of
from .failures import refused
from .patience import seconds_for, within
from .remote import RemotePath
from .sinks import streamed
from .spans import Block, ByteSpan

if TYPE_CHECKING:
    import fsspec

PART = 16 << 20  # bytes of one part, where a file is not so long that it would have too many
PARTS = 9_000  # S3 takes 10,000


def part_size(nbytes: int) -> int:
    """Bytes of each part of a file of about so many.

    >>> part_size(1 << 30), part_size(1 << 40)
    (16777216, 122167959)
    """
    return max(PART, -(-nbytes // PARTS))


class RemoteSink:
    """A :class:`~ckpt_surgeon.files.sinks.Sink` that sends a file in parts; what was sent cannot be mended."""

    can_patch = False

    def __init__(self, path: RemotePath, nbytes: int, tell: Callable[[int], object]) -> None:
        self._path = path
        self._tell = tell
        self.position = 0
        part = part_size(nbytes)
        self._limit = seconds_for(part)
        self._file = self._done(lambda: path.fs.open(path.url, "wb", autocommit=False, block_size=part))

    def literal(self, raw: Block) -> None:
        self._done(lambda: self._file.write(raw))
        self.position += len(raw)

    def stream(self, blocks: Iterable[Block], nbytes: int, *, checksum: bool = False) -> int:
        return streamed(blocks, nbytes, self.literal, self._tell, checksum=checksum)

    def copy(self, span: ByteSpan) -> None:
        for block in span.blocks():
            self.literal(block)
            self._tell(len(block))

    def patch(self, position: int, raw: bytes) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Send the last part; the file is not visible yet."""
        self._done(self._file.close)

    def commit(self) -> None:
        """Make the file visible."""
        self._done(self._file.commit)

    def discard(self) -> None:
        """Throw away what was sent."""
        self._file.closed = True  # or else it would be sent after all when it is collected
        self._done(self._file.discard)

    def _done(self, do: Callable[[], object]) -> fsspec.spec.AbstractBufferedFile:
        try:
            return within(self._limit, do)
        except FileError:
            raise
        except Exception as error:
            raise refused(
                self._path, error, "written", secrets=secrets_of(self._path.url, self._path.options)
            ) from None
