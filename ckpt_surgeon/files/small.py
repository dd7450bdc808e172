"""Small files, read in one piece and written whole or not at all: recipes, rules, indexes, settings."""

from __future__ import annotations

import errno
import os
from contextlib import suppress

from ..errors import FileError, RecipeError
from .journal import sync_directory
from .local import LocalPath
from .paths import FilePath
from .swap import check_replaceable, keep_attributes
from .temporary import new_token, temporary


def read_text(path: FilePath) -> str:
    """The text (UTF-8) of a recipe or of rules.  Raises FileError, and RecipeError for what is no text.

    >>> write_text(LocalPath("rules.toml"), "[keys]")
    >>> read_text(LocalPath("rules.toml"))
    '[keys]'
    """
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise FileError(path, f"cannot be opened ({error.strerror})", "check the name") from error
    except UnicodeDecodeError as error:
        raise RecipeError(path, ["is not UTF-8 text"]) from error


def write_text(path: FilePath, text: str) -> None:
    """Write a text (UTF-8) to a file, here or at a URL; what it replaces stays until the new one is on the disk.

    Raises FileError where that cannot be done.

    >>> path = LocalPath("notes.toml")
    >>> write_text(path, "one")
    >>> write_text(path, "two")
    >>> path.read_text()
    'two'
    """
    if (local := path.local) is not None:
        write_bytes(local, text.encode())
    else:
        path.write_text(text, "utf-8")


def write_bytes(path: LocalPath, raw: bytes) -> None:
    """Write bytes to a file of this machine; see :func:`write_text`.

    >>> write_bytes(LocalPath("notes.bin"), b"one")
    >>> LocalPath("notes.bin").read_bytes()
    b'one'
    """
    check_replaceable(path)
    path.check_writable()
    final = LocalPath(os.path.realpath(path))
    made = temporary(final, new_token())
    try:
        with open(made, "xb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        keep_attributes(final, made)
        os.replace(made, final)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(made)
        if isinstance(error, OSError) and error.errno not in (errno.EACCES, errno.ENAMETOOLONG):
            problem = f"cannot be written ({error.strerror}), nothing was replaced"
            raise FileError(path, problem, "write elsewhere") from error
        if isinstance(error, OSError):
            raise path.failure(error, "written") from error
        raise
    with suppress(OSError):  # from here on the new file is there, whatever happens
        sync_directory(final.parent)
