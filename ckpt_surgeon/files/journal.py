"""Bytes of a file changed where they lie, all or none, whatever interrupts it.

What will be written lies beside the file first, in ``.NAME.ckpt-journal``: the bytes at each place as they are and as
they shall be, with a checksum.  Only once that is on the disk does the file change, and only once the file is on the
disk does the journal go.  So whoever finds a journal knows what was going on: :func:`recover` finishes it, or takes it
back, and may be interrupted itself.  A lock on the file keeps two processes apart, and goes with its process.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from ..errors import FileError
from .paths import file_path

SUFFIX = ".ckpt-journal"
TEMPORARY = ".tmp"
LIMIT = 1 << 32  # bytes that a journal may have: an index is read into memory whole, and this is two of them
PER_BYTE = 64  # bytes of a journal for a byte of its file, at most: a change of single bytes has a line for each
_NAME = b"ckpt-journal "
_MAGIC = _NAME + b"1\n"
_DIGEST = 32  # bytes of a SHA-256

Recovery = Literal["finished", "rolled back"]
_State = Literal["old", "new", "mixed", "other"]


class Patch(NamedTuple):
    """Bytes to change at an offset of a file: the old ones and as many new ones."""

    offset: int
    old: bytes
    new: bytes


class _Journal(NamedTuple):
    size: int
    patches: tuple[Patch, ...]


def journal_path(path: Path) -> Path:
    """Where the journal of a file lies: beside the file that a link leads to."""
    final = Path(os.path.realpath(path))
    return final.with_name(f".{final.name}{SUFFIX}")


def is_pending(path: Path) -> bool:
    """Whether a change of a file was begun and not finished, or its journal was."""
    journal = journal_path(path)
    return os.path.lexists(journal) or os.path.lexists(_temporary(journal))


def discard(path: Path) -> None:
    """Remove what is left of a change of a file that has been replaced as a whole since."""
    if is_pending(path):
        with suppress(FileError), _locked(path):
            _remove(journal_path(path))


def apply(path: Path, patches: Sequence[Patch]) -> None:
    """Change the bytes of a file where they lie: all of them or, after :func:`recover`, none.

    Raises FileError where the file or its folder may not be written, another process is at it, or its bytes are no
    longer those that the patches expect.
    """
    with _locked(path) as descriptor:
        if os.path.lexists(journal_path(path)):
            raise FileError(path, "another change of it was interrupted just now, nothing was written", "try again")
        if _state(descriptor, patches) != "old":
            raise FileError(path, "has changed since it was read, nothing was written", "try again")
        _write_journal(journal_path(path), _Journal(os.fstat(descriptor).st_size, tuple(patches)))
        _write(descriptor, [(patch.offset, patch.new) for patch in patches])
        _unlink(journal_path(path))
        with suppress(OSError):  # the change is on the disk; a journal that comes back says the same
            sync_directory(journal_path(path).parent)


def recover(path: str | Path, *, roll_back: bool = False) -> Recovery | None:
    """Finish a change in place that was interrupted, or take it back with ``roll_back``; None where there is none.

    Where nothing of the change had been written, the file stays as it is: "rolled back".  :func:`ckpt_surgeon.open`
    and every command do this by themselves.  Raises FileError where the file or its folder may not be written,
    another process is at it, or the file is not the one that the journal was made for.

    >>> import ckpt_surgeon, torch
    >>> torch.save({"module.fc.bias": torch.ones(3)}, "parallel.pth")
    >>> plan = ckpt_surgeon.rename_in_place("parallel.pth", ckpt_surgeon.step("strip_prefix"))
    >>> print(ckpt_surgeon.recover("parallel.pth"))
    None
    """
    local = file_path(path).local
    if local is None or not is_pending(local) or not local.is_file():
        return None
    path = local
    journal = journal_path(path)
    try:
        with _locked(path, " to finish a rename in place that was interrupted") as descriptor:
            outcome = _recovered(path, descriptor, journal, roll_back) if os.path.lexists(journal) else None
            _remove(journal)
            return outcome
    except FileError:
        if os.path.lexists(journal):
            raise
        return None  # a journal that is not complete yet, or was never: the file is untouched and may be read


def _recovered(path: Path, descriptor: int, journal: Path, roll_back: bool) -> Recovery:
    """Write what a journal has, from which on it may go."""
    found = _read_journal(path, journal)
    if found is None:
        return "rolled back"
    state = _state(descriptor, found.patches) if os.fstat(descriptor).st_size == found.size else "other"
    if state == "other":
        problem = f"has changed since {journal.name} was written, which should finish a rename in place of it"
        raise FileError(path, problem, f"if the file is as you want it, remove {journal}")
    if state == "old" or roll_back:
        _write(descriptor, [(patch.offset, patch.old) for patch in found.patches])
        return "rolled back"
    _write(descriptor, [(patch.offset, patch.new) for patch in found.patches])
    return "finished"


def _temporary(journal: Path) -> Path:
    return journal.with_name(journal.name + TEMPORARY)


@contextmanager
def _locked(path: Path, purpose: str = "") -> Iterator[int]:
    """A descriptor of a file that no other process changes in place; system errors are told as FileError."""
    try:
        descriptor = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
        try:
            _lock(descriptor, path)
            yield descriptor
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _refused(path, error, purpose) from error


def _lock(descriptor: int, path: Path) -> None:
    """Raises FileError when another process has the lock or has put another file in this one's place."""
    import fcntl  # where there is none there is no pwrite either

    busy = FileError(path, "another process is renaming its keys in place right now", "try again")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise busy from None
    except OSError as error:  # some network file systems have no locks
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
            raise
    if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
        raise busy


def _refused(path: Path, error: OSError, purpose: str) -> FileError:
    where = "" if error.filename in (None, path, str(path)) else "its folder "
    begun = os.path.lexists(journal_path(path))
    remedy = "ckpt recover finishes what was begun" if begun else "nothing was changed"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        ways = "change the permissions; " + remedy if begun else "change the permissions"
        return FileError(path, f"{where}may not be written{purpose} ({error.strerror})", ways)
    return FileError(path, f"{where}could not be written{purpose} ({error.strerror})", remedy)


def _state(descriptor: int, patches: Iterable[Patch]) -> _State:
    """Which bytes are at the places of patches: all old ones, all new ones, some of each, or others."""
    is_old = is_new = True
    for offset, old, new in patches:
        there = os.pread(descriptor, len(old), offset)
        is_old, is_new = is_old and there == old, is_new and there == new
        if there not in (old, new) and (
            len(there) != len(old) or any(a != b and a != c for a, b, c in zip(there, old, new, strict=True))
        ):
            return "other"
    return "old" if is_old else "new" if is_new else "mixed"


def _write(descriptor: int, pieces: Iterable[tuple[int, bytes]]) -> None:
    for offset, raw in pieces:
        done = 0
        while done < len(raw):
            done += os.pwrite(descriptor, raw[done:], offset + done)
    os.fsync(descriptor)


# -- the journal's own bytes


def _write_journal(journal: Path, content: _Journal) -> None:
    """Have a journal appear whole or not at all."""
    made = _temporary(journal)
    if os.path.lexists(made):  # left by a process that is no more: this one has the lock
        os.unlink(made)
    descriptor = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        try:
            _write(descriptor, [(0, _packed(content))])
        finally:
            os.close(descriptor)
        os.replace(made, journal)
    except BaseException:
        with suppress(OSError):
            os.unlink(made)
        raise
    sync_directory(journal.parent)


def _packed(content: _Journal) -> bytes:
    import hashlib
    import json

    head = {"size": content.size, "patches": [[patch.offset, len(patch.old)] for patch in content.patches]}
    body = b"".join(patch.old + patch.new for patch in content.patches)
    whole = _MAGIC + json.dumps(head).encode() + b"\n" + body
    return whole + hashlib.sha256(whole).digest()


def _read_journal(path: Path, journal: Path) -> _Journal | None:
    """What a journal says; None where it is not whole, and so was never acted on."""
    import json

    status = os.lstat(journal)
    most = min(LIMIT, PER_BYTE * os.stat(path).st_size + (1 << 20))
    if not stat.S_ISREG(status.st_mode) or status.st_size > most:
        return None
    with open(journal, "rb") as file:
        if not _is_whole(file, status.st_size - _DIGEST):
            return None
        file.seek(0)
        whole = file.read(status.st_size - _DIGEST)
    if not whole.startswith(_MAGIC):
        raise FileError(path, f"{journal.name} beside it is of another version of ckpt", "recover it with that one")
    head, _, body = whole[len(_MAGIC) :].partition(b"\n")
    try:
        said = json.loads(head)
        spans = [(int(offset), int(length)) for offset, length in said["patches"]]
        size = int(said["size"])
    except (ValueError, TypeError, LookupError):
        return None
    if any(min(span) < 0 or sum(span) > size for span in spans) or 2 * sum(span[1] for span in spans) != len(body):
        return None
    patches, at = [], 0
    for offset, length in spans:
        patches.append(Patch(offset, body[at : at + length], body[at + length : at + 2 * length]))
        at += 2 * length
    return _Journal(size, tuple(patches))


def _is_whole(file: BinaryIO, nbytes: int) -> bool:
    """Whether a file begins as a journal does and its digest is right; only then is it read into memory whole."""
    import hashlib

    head = file.read(max(min(len(_NAME), nbytes), 0))
    if head != _NAME:
        return False
    found, left = hashlib.sha256(head), nbytes - len(head)
    while left and (block := file.read(min(left, 1 << 20))):
        found.update(block)
        left -= len(block)
    return not left and found.digest() == file.read(_DIGEST)


def _remove(journal: Path) -> None:
    _unlink(journal)
    sync_directory(journal.parent)


def _unlink(journal: Path) -> None:
    for path in (journal, _temporary(journal)):
        if os.path.lexists(path):
            os.unlink(path)


def sync_directory(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems have no fsync for directories
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
