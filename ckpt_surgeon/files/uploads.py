"""Outputs at URLs: several files of which none is visible before all are complete.

Amazon's S3 and its like take a file in parts and show it when it is declared complete, so it is streamed.  Other file
systems show a file as it grows, or move it about afterwards: what is meant for them is made here first and then sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ..errors import FileError
from .failures import refused
from .paths import FilePath
from .remote import RemotePath
from .sinks import streamed
from .spans import Block, ByteSpan

if TYPE_CHECKING:
    import fsspec

PART = 16 << 20  # bytes of one part, where a file is not so long that it would have too many
PARTS = 9_000  # S3 takes 10,000


def check_writable(out: RemotePath) -> None:
    """Raise FileError for a place that cannot be written to, or not with what is installed."""
    if out.protocol in ("http", "https"):
        raise FileError(out, "is a web address, which cannot be written to", "write to a file, s3:// or the like")
    out.fs  # noqa: B018 - what is missing shows now and not after an hour


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
        self._file = self._done(lambda: path.fs.open(path.url, "wb", autocommit=False, block_size=part))

    def literal(self, raw: Block) -> None:
        self._done(lambda: self._file.write(raw))
        self.position += len(raw)

    def stream(self, blocks: Iterable[Block], nbytes: int) -> int:
        return streamed(blocks, nbytes, self.literal, self._tell)

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
            return do()
        except FileError:
            raise
        except Exception as error:
            raise refused(self._path, error, "written") from error


class Uploads:
    """The files of one output on their way: leaving it with an error throws all of them away, visible or not."""

    def __init__(self, tell: Callable[[int], object]) -> None:
        self._tell = tell
        self._hidden: list[tuple[RemotePath, RemoteSink]] = []
        self._visible: list[RemotePath] = []

    def __enter__(self) -> Uploads:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:
            for path in self._visible:
                with suppress(FileError):
                    path.unlink()
        for _path, sink in self._hidden:
            with suppress(FileError):
                sink.discard()

    @contextmanager
    def file(self, path: FilePath, nbytes: int) -> Iterator[RemoteSink]:
        """A sink for one file of about ``nbytes``, which stays invisible."""
        assert isinstance(path, RemotePath)
        sink = RemoteSink(path, nbytes, self._tell)
        self._hidden.append((path, sink))
        yield sink
        sink.close()

    def commit(self) -> None:
        """Make all files visible, in the order in which they were made."""
        while self._hidden:
            path, sink = self._hidden[0]
            sink.commit()
            self._visible.append(path)
            del self._hidden[0]

    def send(self, made: FilePath, path: FilePath) -> None:
        """Send a local file that is complete; it is visible from now on."""
        assert isinstance(made, Path)
        assert isinstance(path, RemotePath)
        if not path.exists():
            self._visible.append(path)  # what a failure leaves half-sent goes; what it would have replaced stays
        path.put(made)
        if path not in self._visible:
            self._visible.append(path)
