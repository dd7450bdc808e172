"""Paths of files: one protocol, :class:`FilePath`, that a local path and a URL answer alike.

Everything that reads or writes goes by the protocol.  :func:`file_path` makes one from what a caller gives, and is
the only place that asks which kind it is.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, Protocol, TypeAlias, TypeGuard, cast

from ..errors import CheckpointError, FileError
from .local import LocalPath, View
from .prefetch import Range
from .remote import RemotePath, is_url


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

    @property
    def has_slash(self) -> bool:
        """Whether it was written with a slash at its end, and so names a folder."""
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
    if isinstance(path, (str, Path)) and "\0" in str(path):
        raise CheckpointError(f"{str(path)!r} names no file: it has a zero character", remedy="check the path")
    if isinstance(path, Path):
        has_slash = isinstance(path, LocalPath) and path.has_slash
        return LocalPath.written(f"{path}{os.sep}") if has_slash else LocalPath(path)
    if isinstance(path, RemotePath):
        return path.afresh()
    if isinstance(path, str):
        if path.startswith(("file://", "local://")):
            return LocalPath.written(path.partition("://")[2])
        return RemotePath(path) if is_url(path) else LocalPath.written(path)
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
