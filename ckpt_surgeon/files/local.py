"""Paths of files on this machine: :class:`LocalPath`."""

from __future__ import annotations

import errno
import mmap
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias

from ..errors import BrokenFile, FileError
from .prefetch import Range
from .remote import HEAD

if sys.platform == "win32":
    from pathlib import WindowsPath as _Path
else:
    from pathlib import PosixPath as _Path

LONGEST_TEXT = 256 << 20  # bytes of a recipe, a list of names, an index: a million keys need half of it

View: TypeAlias = tuple[memoryview, Callable[[], None]]  # bytes, and what gives their pages back to the kernel


class _Version(NamedTuple):
    """What changes when a local file does."""

    size: int
    mtime_ns: int
    inode: int
    device: int


class LocalPath(_Path):
    """A ``pathlib.Path`` that answers :class:`~ckpt_surgeon.files.paths.FilePath`.

    It remembers which file it was when it was first read.

    >>> LocalPath("run/model.pth").with_name("clean.pth")
    LocalPath('run/clean.pth')
    """

    __slots__ = ("_slash", "_version")

    _slash: bool

    @property
    def local(self) -> LocalPath:
        return self

    @property
    def remote(self) -> None:
        return None

    @classmethod
    def written(cls, text: str) -> LocalPath:
        """The path of a text, which remembers a slash at its end.

        >>> LocalPath.written("llama/").has_slash, LocalPath.written("llama").has_slash
        (True, False)
        """
        path = cls(text)
        path._slash = text.endswith(tuple(filter(None, (os.sep, os.altsep))))
        return path

    @property
    def has_slash(self) -> bool:
        return getattr(self, "_slash", False)

    @property
    def size(self) -> int:
        return self.stat().st_size

    # False, not an error, for a name that is too long.

    def is_file(self) -> bool:
        return os.path.isfile(self)

    def is_dir(self) -> bool:
        return os.path.isdir(self)

    def exists(self) -> bool:
        return os.path.exists(self)

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
            beside = _names_beside(self)
            alike = [name for name in beside if name.startswith(self.stem)][:3] or _close(self.name, beside)
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

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        """The whole text.  Raises FileError for what is no regular file, or too long to be a text."""
        status = self.stat()
        if not stat.S_ISREG(status.st_mode):
            what = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file (a pipe or a device)"
            raise FileError(self, f"is {what}, where a text file should be", "check the path")
        if status.st_size > LONGEST_TEXT:
            raise FileError(self, f"has {status.st_size:,} bytes, too many for a text", "check the path")
        return super().read_text(encoding, errors)

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


def _close(name: str, names: Iterable[str]) -> list[str]:
    """The likest of names, as a mistyped one may have meant them."""
    from difflib import get_close_matches

    return get_close_matches(name, list(names), n=3, cutoff=0.75)


def _names_beside(path: Path) -> list[str]:
    try:
        return sorted(os.listdir(path.parent))
    except OSError:
        return []


def _nothing() -> None:
    pass
