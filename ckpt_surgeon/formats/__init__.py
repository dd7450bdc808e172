"""The containers: one module each, which reads and, where anybody needs it, writes.

A reader is chosen by content, never by the file's name; a writer by the output's extension.
"""

from __future__ import annotations

import errno
import re
import stat
from collections.abc import Callable, Mapping
from typing import Protocol

from ..errors import FileError, NotACheckpoint
from ..places import names
from ..remote import HEAD, Place, RemotePath
from ..tensors import Tensor
from ..troubles import refused
from . import (
    foreign,
    plain_pickle,
    safetensors,
    sharded,
    torch_export,
    torch_legacy,
    torch_package,
    torch_tar,
    torch_zip,
    torchscript,
    zip_archive,
)
from .contents import Contents
from .sink import Sink
from .unpickle import Value


class Writer(Protocol):
    """What a module offers that can write its container."""

    CONTAINER: str
    SUFFIXES: tuple[str, ...]

    def check(self, tensors: Mapping[str, Tensor]) -> None: ...

    def size_of(self, tensors: Mapping[str, Tensor]) -> int: ...

    def write(
        self,
        sink: Sink,
        tensors: Mapping[str, Tensor],
        versions: Mapping[str, Mapping[str, Value]] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None: ...


class Reader(Protocol):
    """Reads one container."""

    def __call__(self, path: Place, *, salvage: bool = False) -> Contents: ...


READERS: tuple[tuple[Callable[[bytes], bool], Reader], ...] = (
    (zip_archive.matches, lambda path, salvage=False: read_zip(path, salvage=salvage)),
    (safetensors.matches, safetensors.read),
    (torch_legacy.matches, torch_legacy.read),
    (sharded.matches, lambda path, salvage=False: sharded.read(path, read_shard, salvage=salvage)),
    (torch_tar.matches, torch_tar.read),
    (plain_pickle.matches, plain_pickle.read),
)


class ZipKind(Protocol):
    """What a module offers that reads one kind of zip."""

    def holds(self, archive: zip_archive.Archive) -> bool: ...

    def read(self, archive: zip_archive.Archive, *, salvage: bool = False) -> Contents: ...


# What a zip may be, told by its members.
ZIPS: tuple[ZipKind, ...] = (torch_export, torchscript, torch_package, torch_zip)

WRITERS: dict[str, Writer] = {suffix: writer for writer in (torch_zip, safetensors) for suffix in writer.SUFFIXES}


def read(path: Place, *, salvage: bool = False) -> Contents:
    """Read what a file or folder holds: its index only, no tensor.

    With ``salvage`` a truncated file is read as far as it goes; tensors that are cut off are opaque ones of kind
    "lost".  Raises NotACheckpoint (it is something else), BrokenFile (it is damaged), FileError (it cannot be
    opened).
    """
    try:
        if path.is_dir():
            path = sharded.find(path)
        head = _head(path)
        for matches, reader in READERS:
            if matches(head):
                return _read_by(reader, path, salvage)
    except OSError as error:
        raise _unopened(path, error) from error
    raise foreign.refuse(path, head, safetensors.broken(path, head))


def _read_by(reader: Reader, path: Place, salvage: bool) -> Contents:
    contents = reader(path, salvage=salvage)
    if isinstance(path, RemotePath):
        path.forget()
    return contents


def read_shard(path: Place, *, salvage: bool = False) -> Contents:
    """Read one file that an index names, which is no index."""
    if sharded.matches(_head(path)):
        raise NotACheckpoint(path, "is named as a shard and is an index itself, or other JSON", "rebuild the index")
    return read(path, salvage=salvage)


def _head(path: Place) -> bytes:
    if isinstance(path, RemotePath):
        return path.head()
    if not stat.S_ISREG(path.stat().st_mode):
        raise FileError(path, "is no regular file (a pipe or a device)", "save it to a file first")
    with open(path, "rb") as file:
        return file.read(HEAD)


def read_zip(path: Place, *, salvage: bool = False) -> Contents:
    """Read a zip of one of torch's kinds.  Raises NotACheckpoint for any other zip, BrokenFile."""
    try:
        archive = zip_archive.read_archive(path)
    except zip_archive.Truncated as error:
        if isinstance(path, RemotePath) and not salvage:
            raise  # to look for its records is to fetch all of it
        archive = zip_archive.scan_archive(path)
        if not salvage:
            raise torch_zip.truncated(archive, error) from error
        if not torch_zip.holds(archive):
            raise
    for kind in ZIPS:
        if kind.holds(archive):
            return kind.read(archive, salvage=salvage)
    raise foreign.refuse_zip(path, list(archive.members))


def _unopened(path: Place, error: OSError) -> FileError:
    if isinstance(path, RemotePath):
        return refused(path, error)
    if error.errno == errno.ENOENT:
        near = path.parent if path.parent.is_dir() else None
        alike = [name for name in names(near) if name.startswith(path.stem)][:3] if near else []
        if re.match(r"[A-Za-z][\w+.-]+:/[^/]", str(path)):
            return FileError(path, "is a URL that pathlib has cut short", "give it as text")
        remedy = f"there is {', '.join(alike)}" if alike else "check the name"
        return FileError(path, "does not exist", remedy)
    if error.errno == errno.EACCES:
        return FileError(path, "may not be read by you", "change its permissions (chmod)")
    return FileError(path, f"cannot be opened ({error.strerror})", "check the path")


def writer_for(path: Place) -> Writer:
    """The writer for an output's extension.  Raises NotACheckpoint for one that names no container."""
    try:
        return WRITERS[path.suffix.lower()]
    except KeyError:
        known = ", ".join(WRITERS)
        what = "has an extension that names no container to write" if path.suffix else "has no extension"
        raise NotACheckpoint(path, what, f"the container is chosen by it: {known}") from None
