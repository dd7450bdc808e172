"""Folders as outputs: replaced in one step, and never with anything in them that is not ours."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

from .paths import FilePath

_HERE = -100  # AT_FDCWD: paths are relative to the working directory
_EXCHANGE = 2  # RENAME_EXCHANGE


def put(made: Path, final: Path) -> None:
    """Rename a file or a folder to its final name; what has that name is replaced, a folder with all its files.

    Where the system cannot exchange two folders in one step (it is no Linux, or a network's file system), the old one
    is renamed first: for a moment neither has the name, and both are whole.
    """
    if not made.is_dir():
        os.replace(made, final)
        return
    old = made.with_suffix(".old")
    if not os.path.lexists(final):
        os.rename(made, final)
    elif _exchanged(made, final):
        remove(made)
    else:
        os.rename(final, old)
        try:
            os.rename(made, final)
        except OSError:
            os.rename(old, final)
            raise
        remove(old)


def _exchanged(one: Path, other: Path) -> bool:
    """Whether the system has exchanged two names in one step."""
    try:
        exchange = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    done: int = exchange(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE)
    return done == 0


def remove(path: Path) -> None:
    """Remove a file or a folder that need not be there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def nbytes(path: FilePath) -> int:
    """The bytes of a file, or of all files in a folder of this machine."""
    folder = path.local
    if folder is None or not folder.is_dir():
        return path.size
    return sum(inside.stat().st_size for inside in folder.rglob("*") if inside.is_file())
