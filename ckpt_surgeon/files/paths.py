"""Paths of files: one protocol, :class:`FilePath`, that a local path and a URL answer alike.

Everything that reads or writes goes by the protocol.  :func:`file_path` makes one from what a caller gives, and is
the only place that asks which kind it is.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import stat
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol, TypeAlias, TypeGuard, cast

from ..errors import BrokenFile, CheckpointError, FileError
from .prefetch import Range
from .remote import HEAD, RemotePath, is_url

if sys.platform == "win32":
    from pathlib import WindowsPath as _Path
else:
    from pathlib import PosixPath as _Path

View: TypeAlias = tuple[memoryview, Callable[[], None]]  # bytes, and what gives their pages back to the kernel


class FilePath(Hashable, Protocol):
    """The path of a file or folder, wherever it is: names, what is there, and bytes.

    >>> [file_path(text).suffix for text in ("model.pth", "s3://bucket/model.safetensors")]
    ['.pth', '.safetensors']
    """

    # -- names

    @property
    def name(self) -> str: ...

    @property
    def stem(self) -> str: ...

    @property
    def suffix(self) -> str: ...

    @property
    def parent(self) -> FilePath: ...

    def with_name(self, name: str, /) -> FilePath: ...

    def __truediv__(self, name: str, /) -> FilePath: ...

    @property
    def local(self) -> LocalPath | None:
        """The path where the file is on this machine, and so can be mapped, locked and copied by the kernel."""
        ...

    @property
    def remote(self) -> RemotePath | None:
        """The path where the file is at a URL, and so can be fetched ahead and sent."""
        ...

    # -- what is there

    @property
    def size(self) -> int:
        """Bytes of the file."""
        ...

    def is_file(self) -> bool: ...

    def is_dir(self) -> bool: ...

    def lexists(self) -> bool:
        """Whether anything has this name, be it a link that leads nowhere."""
        ...

    def names(self) -> list[str]:
        """The names in this folder, sorted."""
        ...

    @property
    def has_listing(self) -> bool:
        """Whether :meth:`names` of its folder can be asked for."""
        ...

    def remember(self) -> None:
        """Note which file this is now, unless that was noted before: what :meth:`check_unchanged` compares with."""
        ...

    def check_unchanged(self) -> None:
        """Raise BrokenFile when the file is another one than when it was first read."""
        ...

    def check_writable(self) -> None:
        """Raise FileError where nothing can be written under this name."""
        ...

    def failure(self, error: Exception, doing: str = "read", /) -> FileError:
        """What the system's, or the server's, refusal means."""
        ...

    # -- bytes

    def head(self) -> bytes:
        """The first HEAD bytes.  Raises FileError when it is no regular file."""
        ...

    def request_head(self) -> Callable[[], object]:
        """Ask for :meth:`head` without waiting where that takes time; the function that is returned waits."""
        ...

    def opened(self) -> BinaryIO:
        """The file opened for reading."""
        ...

    def blocks(self, start: int, stop: int, size: int, /) -> Iterator[bytes]:
        """Yield bytes ``start`` to ``stop`` in pieces of ``size``.  Raises BrokenFile when the file ends before."""
        ...

    def mapped(self) -> AbstractContextManager[mmap.mmap]:
        """The whole file mapped into memory."""
        ...

    def view(self, start: int, stop: int, /) -> AbstractContextManager[View]:
        """Bytes in memory, mapped where they can be, and a function that gives their pages back."""
        ...

    @property
    def reach(self) -> int:
        """Bytes at either end that may be read in the hope that they are needed."""
        ...

    def fetch_ahead(self, ranges: Sequence[Range], /) -> None:
        """Have these bytes at hand, where getting them takes time."""
        ...

    def forget(self) -> None:
        """Let go of bytes that :meth:`fetch_ahead` and :meth:`head` keep."""
        ...

    def read_text(self, encoding: str = ...) -> str: ...

    def write_text(self, text: str, /, encoding: str = ...) -> object: ...

    def unlink(self, missing_ok: bool = False) -> None: ...


class _Version(NamedTuple):
    """What changes when a local file does."""

    size: int
    mtime_ns: int
    inode: int
    device: int


class LocalPath(_Path):
    """A ``pathlib.Path`` that answers :class:`FilePath`, and remembers which file it was when it was first read.

    >>> LocalPath("run/model.pth").with_name("clean.pth")
    LocalPath('run/clean.pth')
    """

    __slots__ = ("_version",)

    @property
    def local(self) -> LocalPath:
        return self

    @property
    def remote(self) -> None:
        return None

    @property
    def size(self) -> int:
        return self.stat().st_size

    def lexists(self) -> bool:
        return os.path.lexists(self)

    def names(self) -> list[str]:
        return sorted(os.listdir(self))

    @property
    def has_listing(self) -> bool:
        return True

    def remember(self) -> None:
        if not hasattr(self, "_version"):
            self._version = _version(self.stat())

    def check_unchanged(self) -> None:
        before = getattr(self, "_version", None)
        try:
            now = _version(self.stat())
        except OSError as error:
            raise self.failure(error) from error
        if before is not None and now != before:
            raise BrokenFile(self, f"changed while it was read ({_difference(before, now)})", "do it again")

    def check_writable(self) -> None:
        if not self.parent.is_dir():
            raise FileError(self, f"its directory {self.parent} does not exist", f"make it: mkdir -p {self.parent}")

    def failure(self, error: Exception, doing: str = "read", /) -> FileError:
        number = error.errno if isinstance(error, OSError) else None
        if number == errno.ENOENT:
            if re.match(r"[A-Za-z][\w+.-]+:/[^/]", str(self)):
                return FileError(self, "is a URL that pathlib has cut short", "give it as text")
            alike = [name for name in _names_beside(self) if name.startswith(self.stem)][:3]
            return FileError(self, "does not exist", f"there is {', '.join(alike)}" if alike else "check the name")
        if number == errno.EACCES:
            return FileError(self, f"may not be {doing} by you", "change its permissions (chmod)")
        if number == errno.ENAMETOOLONG:
            return FileError(self, "has too long a name for its disk", "choose a shorter one")
        return FileError(self, f"cannot be opened ({getattr(error, 'strerror', None) or error})", "check the path")

    def head(self) -> bytes:
        if not stat.S_ISREG(self.stat().st_mode):
            raise FileError(self, "is no regular file (a pipe or a device)", "save it to a file first")
        with open(self, "rb", buffering=0) as file:
            if not hasattr(self, "_version"):
                self._version = _version(os.fstat(file.fileno()))
            return file.read(HEAD)

    def request_head(self) -> Callable[[], object]:
        return _nothing

    def opened(self) -> BinaryIO:
        return open(self, "rb")

    def blocks(self, start: int, stop: int, size: int, /) -> Iterator[bytes]:
        with open(self, "rb", buffering=0) as file:
            file.seek(start)
            left = stop - start
            while left:
                piece = file.read(min(size, left))
                if not piece:
                    raise BrokenFile(self, f"ends {left:,} bytes before the data that it announces")
                left -= len(piece)
                yield piece

    @contextmanager
    def mapped(self) -> Iterator[mmap.mmap]:
        with open(self, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data

    @contextmanager
    def view(self, start: int, stop: int, /) -> Iterator[View]:
        low = start - start % mmap.ALLOCATIONGRANULARITY
        with open(self, "rb") as file:
            if os.fstat(file.fileno()).st_size < stop:
                raise BrokenFile(self, "became shorter while it was read")
            mapping = mmap.mmap(file.fileno(), stop - low, access=mmap.ACCESS_READ, offset=low)
        whole = memoryview(mapping)

        def forget() -> None:
            if hasattr(mapping, "madvise"):
                mapping.madvise(mmap.MADV_DONTNEED)

        try:
            yield whole[start - low :], forget
        finally:
            whole.release()

    @property
    def reach(self) -> int:
        return 1 << 20

    def fetch_ahead(self, ranges: Sequence[Range], /) -> None:
        pass

    def forget(self) -> None:
        pass


def _version(status: os.stat_result) -> _Version:
    return _Version(status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev)


def _difference(before: _Version, now: _Version) -> str:
    if now.size != before.size:
        return f"it had {before.size:,} bytes, it has {now.size:,}"
    return "it is another file of this name" if now[2:] != before[2:] else "it was written to"


def _names_beside(path: Path) -> list[str]:
    try:
        return sorted(os.listdir(path.parent))
    except OSError:
        return []


def _nothing() -> None:
    pass


# -- making one


class UniversalPath(Protocol):
    """What is taken of a ``upath.UPath``: its URL and the options of its file system."""

    @property
    def protocol(self) -> str: ...

    @property
    def path(self) -> str: ...

    @property
    def storage_options(self) -> Mapping[str, object]: ...


AnyPath: TypeAlias = str | Path | FilePath | UniversalPath


def is_path(path: object) -> TypeGuard[AnyPath]:
    """Whether this names a file, rather than being a state_dict, a model or an open file."""
    return isinstance(path, (str, os.PathLike)) or hasattr(path, "storage_options") or hasattr(path, "request_head")


def file_path(path: AnyPath) -> FilePath:
    """The path that a caller names: by text (a path or a URL), a Path, a RemotePath or a UPath.

    Raises CheckpointError for anything else.

    >>> file_path("model.pth"), file_path("s3://bucket/model.pth")
    (LocalPath('model.pth'), RemotePath('s3://bucket/model.pth'))
    """
    if isinstance(path, Path):
        return LocalPath(path)
    if isinstance(path, RemotePath):
        return path.afresh()
    if isinstance(path, str):
        if path.startswith(("file://", "local://")):
            return LocalPath(path.partition("://")[2])
        return RemotePath(path) if is_url(path) else LocalPath(path)
    if not is_path(path):
        what = f"an open file ({type(path).__name__})" if hasattr(path, "read") else f"a {type(path).__name__}"
        raise CheckpointError(f"{what} names no file", remedy="give its path or URL as a str or a Path")
    if not hasattr(path, "storage_options"):
        if isinstance(path, os.PathLike):
            return LocalPath(os.fspath(path))
        return cast(FilePath, path)
    other = cast(UniversalPath, path)
    if other.protocol in ("", "file", "local"):
        return LocalPath(other.path)
    return RemotePath(str(other), dict(other.storage_options))


def prefetch_heads(paths: Sequence[FilePath]) -> None:
    """Ask for the size and the first bytes of several files at a time, where that takes time."""
    if paths:
        paths[0].is_file()  # connects, and lists the folder where the file system keeps listings
    for wait in [path.request_head() for path in paths]:
        wait()
