"""Temporary files beside an output: their names, whether their run is still alive, and what a killed run left behind.

A file that is being written is called ``.NAME.TOKEN.tmp`` and an old one that is being replaced ``.NAME.TOKEN.old``;
a run has one token of eight hexadecimal digits.  A run that is alive holds a lock on the first of its files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .local import LocalPath
from .swap import put_back, remove

MADE, OLD = ".tmp", ".old"
NAME_LIMIT = 255  # bytes that a name may have in most file systems
_NAME = re.compile(r"\.(.+)\.([0-9a-f]{8})(\.tmp|\.old)", re.DOTALL)


def new_token() -> str:
    """What tells the files of one run from those of another."""
    return os.urandom(4).hex()


def temporary(final: LocalPath, token: str, suffix: str = MADE) -> LocalPath:
    """The temporary name beside a file; a long one is cut, so that it is never too long.

    >>> temporary(LocalPath("run/model.pth"), "01234567")
    LocalPath('run/.model.pth.01234567.tmp')
    """
    return final.with_name(f".{short(final.name)}.{token}{suffix}")


def short(name: str) -> str:
    """A name cut so far that it still fits in a temporary one."""
    room = NAME_LIMIT - len(f"..{'0' * 8}{MADE}")
    return os.fsencode(name)[:room].decode("utf-8", "ignore") if len(os.fsencode(name)) > room else name


class Hold:
    """The lock that tells others that a run is alive: on the first file or folder that it makes."""

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def take(self, path: Path) -> None:
        """Lock a file or a folder, unless one is locked already."""
        if self._descriptor is None:
            self._descriptor = _open(path)
            if self._descriptor is not None:
                _locked(self._descriptor)

    def release(self) -> None:
        """Let go of the lock."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def _open(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDONLY)
    except OSError:
        return None


def _locked(descriptor: int) -> bool:
    """Whether this process has the lock now: False where another has it, or there are no locks."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def is_held(path: Path) -> bool:
    """Whether a run that is alive has the lock of a file; True where that cannot be told."""
    return _is_alive([path])


def leftovers(folder: Path, belongs: Callable[[str], bool]) -> dict[str, list[LocalPath]]:
    """Temporary files of runs that are no more, by their token; ``belongs`` says whose names are asked for.

    A run whose lock cannot be told (a network's file system) counts as alive.
    """
    found: dict[str, list[LocalPath]] = {}
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return {}
    for name in names:
        told = _NAME.fullmatch(name)
        if told is not None and (belongs(told[1])):
            found.setdefault(told[2], []).append(LocalPath(folder) / name)
    return {token: paths for token, paths in found.items() if not _is_alive(paths)}


def is_name_of(final: LocalPath, name: str) -> bool:
    """Whether the middle of a temporary name is that of a file, which may have been cut."""
    return name == short(final.name)


def _is_alive(paths: Iterable[Path]) -> bool:
    with _opened(paths) as descriptors:
        return not all(map(_locked, descriptors))


@contextmanager
def _opened(paths: Iterable[Path]) -> Iterator[list[int]]:
    descriptors: list[int] = []
    try:
        for path in paths:
            if not path.is_symlink() and (descriptor := _open(path)) is not None:
                descriptors.append(descriptor)
        yield descriptors
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def clear(found: dict[str, list[LocalPath]]) -> list[LocalPath]:
    """Remove what killed runs left behind; returns what was removed.

    Where a run was killed while it replaced files (new ones still have their temporary names), the old ones come back.
    """
    gone: list[LocalPath] = []
    for paths in found.values():
        unfinished = any(path.suffix == MADE for path in paths)
        for path in paths:
            told = _NAME.fullmatch(path.name)
            final = path.with_name(told[1]) if told else path
            if path.suffix == OLD and (unfinished or not os.path.lexists(final)):
                with suppress(OSError):
                    _put_back(path, final)
                continue
            remove(path)
            gone.append(path)
    return gone


def _put_back(old: LocalPath, final: LocalPath) -> None:
    if old.is_dir() and os.path.lexists(final):
        return  # the new folder is there, and both are whole
    put_back(old, final)
