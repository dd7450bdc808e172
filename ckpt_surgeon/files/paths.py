"""Where files are: a local ``Path``, or a :class:`RemotePath` for a URL; what readers need of either."""

from __future__ import annotations

import io
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol, TypeAlias, TypeVar, cast

from .prefetch import blocks
from .remote import Range, RemotePath, is_url, requests

T = TypeVar("T")


class UniversalPath(Protocol):
    """What is taken of a ``upath.UPath``: its URL and the options of its file system."""

    @property
    def protocol(self) -> str: ...

    @property
    def path(self) -> str: ...

    @property
    def storage_options(self) -> Mapping[str, object]: ...


FilePath: TypeAlias = Path | RemotePath
AnyPath: TypeAlias = str | Path | RemotePath | UniversalPath


def file_path(path: AnyPath) -> FilePath:
    """What a caller names as the place of a file: text (a path or a URL), a Path, a RemotePath or a UPath.

    >>> file_path("model.pth"), file_path("s3://bucket/model.pth")
    (PosixPath('model.pth'), RemotePath('s3://bucket/model.pth'))
    """
    if isinstance(path, Path):
        return path
    if isinstance(path, RemotePath):
        return path.afresh()
    if isinstance(path, str):
        if path.startswith(("file://", "local://")):
            return Path(path.partition("://")[2])
        return RemotePath(path) if is_url(path) else Path(path)
    if path.protocol in ("", "file", "local"):
        return Path(path.path)
    return RemotePath(str(path), dict(path.storage_options))


def size(path: FilePath) -> int:
    """Bytes of a file."""
    return path.size if isinstance(path, RemotePath) else path.stat().st_size


def is_file(path: FilePath) -> bool:
    """Whether a file is there."""
    return path.is_file() if isinstance(path, RemotePath) else os.path.isfile(path)


def exists(path: FilePath) -> bool:
    """Whether anything is there, be it a link that leads nowhere."""
    return path.exists() if isinstance(path, RemotePath) else os.path.lexists(path)


def names(folder: FilePath) -> list[str]:
    """The names in a folder, sorted."""
    return folder.names() if isinstance(folder, RemotePath) else sorted(os.listdir(folder))


def remove(path: FilePath) -> None:
    """Remove a file, if it is there."""
    if isinstance(path, RemotePath):
        path.unlink()
    else:
        path.unlink(missing_ok=True)


def prefetch_heads(paths: Sequence[FilePath]) -> None:
    """Ask for the size and the first bytes of several remote files at a time; local ones need no such thing."""

    def look(path: RemotePath) -> None:
        if path.is_file():
            path.head()

    remote = [path for path in paths if isinstance(path, RemotePath)]
    if remote:
        remote[0].is_file()  # connects, and lists the folder where the file system keeps listings
        list(requests().map(look, remote))


def opened(path: FilePath) -> BinaryIO:
    """A file opened for reading; of a remote one, exactly what is read is fetched."""
    return cast(BinaryIO, RemoteReader(path)) if isinstance(path, RemotePath) else open(path, "rb")


class RemoteReader(io.RawIOBase):
    """A remote file as one that is open; reading beyond its end gives what there is."""

    def __init__(self, path: RemotePath) -> None:
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

    path: RemotePath
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
def mapped(path: FilePath) -> Iterator[mmap.mmap]:
    """A file mapped into memory; a remote one as :class:`Fetched`, backed by a temporary file with holes."""
    if not isinstance(path, RemotePath):
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data
        return
    from tempfile import TemporaryFile

    with TemporaryFile() as holes:
        holes.truncate(path.size)
        with Fetched(holes.fileno(), path.size, access=mmap.ACCESS_WRITE) as fetched:
            fetched.path = path
            fetched.grow()
            yield fetched


def retry_with_more(data: bytes | mmap.mmap, parse: Callable[[], T], failures: tuple[type[Exception], ...]) -> T:
    """What ``parse`` makes of a mapping; where it fails since a remote file is not all there yet, it is asked again.

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
    """See to it that these bytes are there."""
    if isinstance(data, Fetched):
        data.fetch(ranges)


def ensure_all_fetched(data: bytes | mmap.mmap) -> None:
    """See to it that every byte is there."""
    if isinstance(data, Fetched):
        data.fetch_all()
