"""Calls of the file system that fail: the one of a given number, or all from there on."""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest

# What changes files or folders, and may be refused; chmod and chown are asked and not insisted on.
CHANGING = (
    "mkdir", "pwrite", "sendfile", "copy_file_range", "fsync", "replace", "rename", "link", "unlink", "rmdir",
)  # fmt: skip
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


class Failing:
    """Have the calls of :mod:`os` that change files below a folder fail, ``open`` and writing to opened files too.

    The call with the number ``at`` raises the system's error ``code``; with ``ever_after`` all later ones do, as on a
    disk that has died or became read-only.  A write that fails has written half of its bytes.
    """

    def __init__(self, folder: Path, at: int, code: int, *, ever_after: bool = False) -> None:
        self.folder, self.at, self.code, self.ever_after = str(folder), at, code, ever_after
        self.calls: list[str] = []

    @property
    def happened(self) -> bool:
        """Whether there was a call to fail."""
        return len(self.calls) > self.at

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Put the failing calls in place of the real ones."""
        for name in CHANGING:
            patch.setattr(os, name, self._failing(name, getattr(os, name)))
        patch.setattr(os, "open", self._opening(os.open))
        opening = self._opening_file(builtins.open)
        patch.setattr(builtins, "open", opening)
        patch.setattr(io, "open", opening)

    def check(self, name: str, path: object = None) -> None:
        """Count a call; raise the error where it is the one to fail."""
        self.calls.append(name)
        number = len(self.calls) - 1
        if number == self.at or (self.ever_after and number > self.at):
            raise OSError(self.code, os.strerror(self.code), *([path] if isinstance(path, (str, os.PathLike)) else []))

    def _failing(self, name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **named: object) -> object:
            if isinstance(args[0], (str, os.PathLike)) and not self._is_below(args[0]):
                return real(*args, **named)
            try:
                self.check(name, args[0])
            except OSError:
                if name == "pwrite" and len(args) == 3:
                    descriptor, raw, offset = args
                    real(descriptor, raw[: len(raw) // 2], offset)  # type: ignore[index, arg-type]
                raise
            return real(*args, **named)

        return call

    def _opening(self, real: Callable[..., int]) -> Callable[..., int]:
        def call(path: str, flags: int, *args: int, **named: int) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and self._is_below(path):
                self.check("open", path)
            return real(path, flags, *args, **named)

        return call

    def _opening_file(self, real: Callable[..., object]) -> Callable[..., object]:
        def call(file: object, mode: str = "r", *args: object, **named: object) -> object:
            if set(mode) & set("wxa+") and isinstance(file, (str, os.PathLike)) and self._is_below(file):
                self.check("open", file)
                return _File(real(file, mode, *args, **named), self)
            return real(file, mode, *args, **named)

        return call

    def _is_below(self, path: object) -> bool:
        return os.path.abspath(str(path)).startswith(self.folder)


class _File:
    """A file opened for writing, whose writes count as calls."""

    def __init__(self, file: object, failing: Failing) -> None:
        self._file, self._failing = file, failing

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()  # type: ignore[attr-defined]

    def write(self, raw: bytes) -> object:
        try:
            self._failing.check("write")
        except OSError:
            self._file.write(raw[: len(raw) // 2])  # type: ignore[attr-defined]
            raise
        return self._file.write(raw)  # type: ignore[attr-defined]


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: the bytes of files, None for folders."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
