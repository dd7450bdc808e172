"""Temporary files beside an output: their names, whether their run is still alive, and what a killed run left behind.

A file that is being written is called ``.NAME.TOKEN.tmp`` and an old one that is being replaced ``.NAME.TOKEN.old``;
``.NAME.TOKEN.moves`` is a list of :mod:`ckpt_surgeon.files.moves`.  A run has one token of eight hexadecimal digits,
and while it is alive it holds a lock on the first of its files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from .local import LocalPath

MADE, OLD, MOVES = ".tmp", ".old", ".moves"
NAME_LIMIT = 255  # bytes that a name may have in most file systems
_NAME = re.compile(r"\.(.+)\.([0-9a-f]{8})(\.tmp|\.old|\.moves)", re.DOTALL)


def new_token() -> str:
    """What tells the files of one run from those of another."""
    return os.urandom(4).hex()


def temporary(final: LocalPath, token: str, suffix: str = MADE) -> LocalPath:
    """The temporary name beside a file; a long one is cut, so that it is never too long.

    >>> temporary(LocalPath("run/model.pth"), "01234567")
    LocalPath('run/.model.pth.01234567.tmp')
    """
    return final.with_name(f".{short(final.name)}.{token}{suffix}")


class Parsed(NamedTuple):
    """What a temporary name is made of; the name of the file that is meant may have been cut."""

    name: str
    token: str
    suffix: str


def parsed(name: str) -> Parsed | None:
    """Take a temporary name apart; None for any other name.

    >>> parsed(".model.pth.01234567.tmp"), parsed("model.pth")
    (Parsed(name='model.pth', token='01234567', suffix='.tmp'), None)
    """
    found = _NAME.fullmatch(name)
    return None if found is None else Parsed(*found.groups())


def short(name: str) -> str:
    """A name cut so far that it still fits in a temporary one."""
    room = NAME_LIMIT - len(f"..{'0' * 8}{MOVES}")
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
        if (parts := parsed(name)) is not None and belongs(parts.name):
            found.setdefault(parts.token, []).append(LocalPath(folder) / name)
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
