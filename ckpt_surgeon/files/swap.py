"""Outputs put in the place of old ones: in one step or taken back, with the old ones' mode, owner and attributes."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

from ..errors import FileError
from .local import LocalPath
from .paths import FilePath

_HERE = -100  # AT_FDCWD: paths are relative to the working directory
_EXCHANGE = 2  # RENAME_EXCHANGE


def check_replaceable(path: LocalPath, *, is_folder: bool = False) -> None:
    """Raise FileError where what is there cannot be replaced by a file, or with ``is_folder`` by a folder."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise FileError(path, "is a loop of links", "write elsewhere, or remove it") from error
        raise path.failure(error, "written") from error
    if stat.S_ISREG(mode) or (is_folder and stat.S_ISDIR(mode)):
        return
    what = "a folder" if stat.S_ISDIR(mode) else "no regular file (a pipe or a device)"
    raise FileError(path, f"is {what}, which is not replaced", "write elsewhere")


def keep_attributes(old: Path, new: Path) -> list[str]:
    """Give a file or folder the owner, extended attributes and mode of the one that it will replace.

    Of a folder, the files that both have are given theirs, too.  Returns what could not be kept.
    """
    try:
        status = os.stat(old)
    except OSError:
        return []
    lost = []
    mine = os.stat(new)
    if (mine.st_uid, mine.st_gid) != (status.st_uid, status.st_gid):
        try:
            os.chown(new, status.st_uid, status.st_gid)
        except (OSError, AttributeError):
            lost.append("owner")
            with suppress(OSError, AttributeError):
                os.chown(new, -1, status.st_gid)
    if not _copied_attributes(old, new):
        lost.append("extended attributes")
    with suppress(OSError):
        os.chmod(new, stat.S_IMODE(status.st_mode) if old.is_dir() == new.is_dir() else stat.S_IMODE(mine.st_mode))
    if new.is_dir() and old.is_dir():
        for name in os.listdir(new):
            lost += keep_attributes(old / name, new / name)
    return list(dict.fromkeys(lost))


def _copied_attributes(old: Path, new: Path) -> bool:
    """Copy extended attributes; False where one of the user's own could not be."""
    if not hasattr(os, "listxattr"):
        return True
    try:
        names = os.listxattr(old)
    except OSError:
        return True
    is_whole = True
    for name in names:
        try:
            os.setxattr(new, name, os.getxattr(old, name))
        except OSError:
            is_whole = is_whole and not name.startswith("user.")
    return is_whole


def put_back(old: Path, path: Path) -> None:
    """Give a file its name again."""
    os.rename(old, path)
    if os.path.lexists(old):  # both were names of one file, which a rename leaves alone
        os.unlink(old)


def put(made: Path, final: Path) -> None:
    """Rename a file or a folder to its final name; what has that name is replaced, a folder with its parts.

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
    import ctypes

    try:
        exchange = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    done: int = exchange(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE)
    return done == 0


def remove(path: Path) -> None:
    """Remove a file, or a folder with the files in it, which need not be there; folders in it stay, and so does it."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    for name in os.listdir(path):
        with suppress(OSError):
            os.unlink(path / name)
    with suppress(OSError):
        os.rmdir(path)


def nbytes(path: FilePath) -> int:
    """The bytes of a file, or of all files in a folder of this machine."""
    folder = path.local
    if folder is None or not folder.is_dir():
        return path.size
    return sum(inside.stat().st_size for inside in folder.rglob("*") if inside.is_file())
