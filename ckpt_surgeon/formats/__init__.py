"""The containers: one module each, which reads and, where anybody needs it, writes.

A reader is chosen by content, never by the file's name; a writer by the output's extension.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from ..errors import FileError, NotACheckpoint
from ..tensors import Tensor
from . import foreign, safetensors, sharded, torch_legacy, torch_zip
from .contents import Contents
from .sink import Sink
from .unpickle import Value

HEAD = 4096  # bytes that tell a file's kind


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


READERS: tuple[tuple[Callable[[bytes], bool], Callable[[Path], Contents]], ...] = (
    (torch_zip.matches, torch_zip.read),
    (safetensors.matches, safetensors.read),
    (torch_legacy.matches, torch_legacy.read),
    (sharded.matches, lambda path: sharded.read(path, read)),
)

WRITERS: dict[str, Writer] = {suffix: writer for writer in (torch_zip, safetensors) for suffix in writer.SUFFIXES}


def read(path: Path) -> Contents:
    """Read what a file or folder holds: its index only, no tensor.

    Raises NotACheckpoint (it is something else), BrokenFile (it is damaged), FileError (it cannot be opened).
    """
    try:
        if path.is_dir():
            path = sharded.find(path)
        with open(path, "rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        raise _unopened(path, error) from error
    for matches, reader in READERS:
        if matches(head):
            return reader(path)
    raise foreign.refuse(path, head)


def _unopened(path: Path, error: OSError) -> FileError:
    if error.errno == errno.ENOENT:
        near = path.parent if path.parent.is_dir() else None
        alike = [name for name in sorted(os.listdir(near)) if name.startswith(path.stem)][:3] if near else []
        remedy = f"there is {', '.join(alike)}" if alike else "check the name"
        return FileError(path, "does not exist", remedy)
    if error.errno == errno.EACCES:
        return FileError(path, "may not be read by you", "change its permissions (chmod)")
    return FileError(path, f"cannot be opened ({error.strerror})", "check the path")


def writer_for(path: Path) -> Writer:
    """The writer for an output's extension.  Raises NotACheckpoint for one that names no container."""
    try:
        return WRITERS[path.suffix.lower()]
    except KeyError:
        known = ", ".join(WRITERS)
        raise NotACheckpoint(path, "has an extension that names no container to write", f"use {known}") from None
