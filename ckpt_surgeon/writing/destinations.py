"""Where an output goes: files or a folder of this machine, or a URL; nothing shows before all of it is complete.

A :class:`Destination` takes one file after another, and the index last.  Only :meth:`Destination.commit` makes them
visible; after :meth:`Destination.abandon` nothing of them is left.  :func:`ckpt_surgeon.writing.write.carry_out`
conducts any of them.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Lock
from typing import Protocol

from ..errors import FileError
from ..files import journal, moves, swap
from ..files.local import LocalPath
from ..files.paths import FilePath
from ..files.remote import RemotePath
from ..files.sinks import FileSink, Progress, Sink
from ..files.temporary import MADE, Hold, new_token, temporary
from ..files.uploads import RemoteSink
from .leftovers import take_back_moves
from .plan import Plan, Written

Fill = Callable[[Sink], Written]


class Destination(Protocol):
    """What receives the files of one output."""

    def write_file(self, number: int, fill: Fill) -> Written:
        """Make the file of this number in the plan; it is complete then, and not visible."""
        ...

    def write_settings(self, path: FilePath, raw: bytes) -> None:
        """Make a small file that belongs beside the files; it is not visible."""
        ...

    def write_index(self, raw: bytes) -> None:
        """Make the index beside the files; it is not visible."""
        ...

    def commit(self, *, is_last: bool = True) -> tuple[str, ...]:
        """Verify the files and make all of them visible, or none; returns what is worth saying.

        Of several processes, those that come before the last one show only what can show before the index.
        """
        ...

    def abandon(self) -> None:
        """Leave nothing behind; what was replaced already is not brought back."""
        ...

    def failure(self, error: OSError) -> FileError:
        """What an error of the system means for this output."""
        ...


def destination(planned: Plan, tell: Progress) -> Destination:
    """The destination of a plan that one process carries out."""
    if (local := planned.out.local) is not None:
        return LocalOutput(planned, local, tell)
    remote = planned.out.remote
    assert remote is not None
    return Streamed(planned, tell) if remote.takes_parts else Sent(planned, tell)


class LocalOutput:
    """A file, shards and their index, or a folder, under temporary names beside their places."""

    def __init__(self, planned: Plan, out: LocalPath, tell: Progress) -> None:
        self._planned = planned
        self._tell = tell
        self._token = new_token()
        self._hold = Hold()
        self._lock = Lock()
        self._made: dict[LocalPath, LocalPath] = {}  # final names by temporary ones: files, or the folder
        self._folder = temporary(_final(out), self._token) if planned.is_folder else None
        self._out = out
        self._new: LocalPath | None = None  # a folder that is made for the output, and goes when nothing comes of it

    def write_file(self, number: int, fill: Fill) -> Written:
        made = self._begin(_local(self._planned.files[number].path))
        descriptor = os.open(made, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), self._mode(made))
        self._hold_once(made)
        try:
            with FileSink(descriptor, self._tell) as sink:
                written = fill(sink)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return written

    def write_settings(self, path: FilePath, raw: bytes) -> None:
        made = self._begin(_local(path))
        self._write_small(made, raw)
        self._made = {made: self._made.pop(made), **self._made}  # the weights get their names last

    def write_index(self, raw: bytes) -> None:
        assert self._planned.index is not None
        self._write_small(self._begin(_local(self._planned.index)), raw)

    def _write_small(self, made: LocalPath, raw: bytes) -> None:
        with open(made, "xb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())

    def commit(self, *, is_last: bool = True) -> tuple[str, ...]:
        self._planned.verify(self._where)
        notes = []
        for made, final in self._made.items():
            if self._folder is not None:
                journal.sync_directory(made)
            lost = swap.keep_attributes(final, made)
            notes += [f"{final}: its {what} could not be kept" for what in lost]
        stale = [_local(path) for path in self._planned.stale()]
        take_back_moves(_final(self._out))
        moves.put_all(self._made, stale, self._token, self._out)
        self._hold.release()  # a journal is removed under a lock of its own on the same file
        for final in self._made.values():
            with suppress(OSError, FileError):  # from here on the new output is there, whatever happens
                journal.discard(final)
                journal.sync_directory(final.parent)
        return tuple(notes)

    def abandon(self) -> None:
        for made in self._made:
            with suppress(OSError):
                swap.remove(made)
        self._hold.release()
        if self._new is not None:
            with suppress(OSError):  # somebody else may have put something there
                self._new.rmdir()

    def failure(self, error: OSError) -> FileError:
        return local_failure(self._out, error, {str(made): final for made, final in self._made.items()})

    def _begin(self, path: LocalPath) -> LocalPath:
        """The temporary name for a file; that of the folder that it goes into is made with it."""
        if self._folder is None:
            self._make_folder(path.parent)
            final = _final(path)
            made = temporary(final, self._token)
            with self._lock:
                self._made[made] = final
            return made
        with self._lock:
            if self._folder not in self._made:
                self._made[self._folder] = _final(self._out)
                os.mkdir(self._folder)
                self._hold.take(self._folder)
        return self._folder / path.name

    def _make_folder(self, folder: LocalPath) -> None:
        """Make the folder that a model is written into, unless it is there."""
        if self._planned.model_folder is None:
            return
        with self._lock:
            if not folder.is_dir():
                folder.mkdir()
                self._new = folder

    def _hold_once(self, made: LocalPath) -> None:
        with self._lock:
            self._hold.take(made)

    def _mode(self, made: LocalPath) -> int:
        """Where a file is replaced, nobody else may read the new one before it has the mode of the old one."""
        return 0o600 if self._folder is None and os.path.lexists(self._made[made]) else 0o666

    def _where(self, path: FilePath) -> FilePath:
        final = _final(_local(path))
        return next(made for made, place in self._made.items() if place == final)


def _local(path: FilePath) -> LocalPath:
    assert path.local is not None
    return path.local


def _final(path: LocalPath) -> LocalPath:
    """The file that a path means: a link keeps pointing there."""
    return LocalPath(os.path.realpath(path))


class Streamed:
    """Files sent to a URL in parts as they are made, which become visible one after another when all are there."""

    def __init__(self, planned: Plan, tell: Progress) -> None:
        self._planned = planned
        self._tell = tell
        self._lock = Lock()
        self._hidden: dict[RemotePath, RemoteSink] = {}
        self._visible: list[RemotePath] = []
        self._stale = planned.stale()

    def write_file(self, number: int, fill: Fill) -> Written:
        sink = self._sink(self._planned.files[number].path, self._planned.sizes[number])
        written = fill(sink)
        sink.close()
        return written

    def write_settings(self, path: FilePath, raw: bytes) -> None:
        sink = self._sink(path, 0)
        sink.literal(raw)
        sink.close()

    def write_index(self, raw: bytes) -> None:
        assert self._planned.index is not None
        self.write_settings(self._planned.index, raw)

    def _sink(self, path: FilePath, nbytes: int) -> RemoteSink:
        remote = _remote(path)
        sink = RemoteSink(remote, nbytes, self._tell)
        with self._lock:
            self._hidden[remote] = sink
        return sink

    def commit(self, *, is_last: bool = True) -> tuple[str, ...]:
        for path, sink in list(self._hidden.items()):
            sink.commit()
            self._visible.append(path)
            del self._hidden[path]
        return _shown(self._planned, self._stale, is_last)

    def abandon(self) -> None:
        for path in self._visible:
            with suppress(FileError):
                path.unlink()
        for sink in self._hidden.values():
            with suppress(FileError):
                sink.discard()

    def failure(self, error: OSError) -> FileError:
        return self._planned.out.failure(error, "written")


class Sent:
    """Files made in a temporary folder here and sent to a URL when all of them are complete and verified."""

    def __init__(self, planned: Plan, tell: Progress) -> None:
        from tempfile import TemporaryDirectory

        self._planned = planned
        self._tell = tell
        self._folder = TemporaryDirectory(prefix="ckpt-")
        self._visible: list[RemotePath] = []
        self._made: dict[RemotePath, LocalPath] = {}
        self._stale = planned.stale()

    def write_file(self, number: int, fill: Fill) -> Written:
        made = self._begin(self._planned.files[number].path)
        with open(made, "x+b", buffering=0) as file, FileSink(file.fileno(), self._tell) as sink:
            return fill(sink)

    def write_settings(self, path: FilePath, raw: bytes) -> None:
        self._begin(path).write_bytes(raw)

    def write_index(self, raw: bytes) -> None:
        assert self._planned.index is not None
        self.write_settings(self._planned.index, raw)

    def _begin(self, path: FilePath) -> LocalPath:
        made = self._made[_remote(path)] = LocalPath(self._folder.name) / path.name
        return made

    def commit(self, *, is_last: bool = True) -> tuple[str, ...]:
        if len(self._made) >= len(self._planned.files):  # where others have made some, what became visible is verified
            self._planned.verify(lambda path: self._made[_remote(path)])
        for path, made in self._made.items():
            if not path.exists():
                self._visible.append(path)  # what a failure leaves half-sent goes; what it would have replaced stays
            path.put(made)
            if path not in self._visible:
                self._visible.append(path)
        self._folder.cleanup()
        return _shown(self._planned, self._stale, is_last)

    def abandon(self) -> None:
        for path in self._visible:
            with suppress(FileError):
                path.unlink()
        self._folder.cleanup()

    def failure(self, error: OSError) -> FileError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = self._folder.name
            return FileError(where, "no space is left on its disk, nothing was sent", "set TMPDIR to a larger one")
        return self._planned.out.failure(error, "written")


def _remote(path: FilePath) -> RemotePath:
    assert path.remote is not None
    return path.remote


def _shown(planned: Plan, stale: Sequence[FilePath], is_last: bool) -> tuple[str, ...]:
    """Verify what is visible now at a URL, and remove what it takes the place of."""
    if is_last:
        planned.verify(lambda path: _remote(path).afresh(), "it was removed")
        for path in stale:
            with suppress(FileError):
                path.unlink(missing_ok=True)
    return ()


def local_failure(out: FilePath, error: OSError, finals: dict[str, LocalPath]) -> FileError:
    """What the system's refusal means; ``finals`` tells the files that temporary ones were to become."""
    name = str(error.filename)
    where = finals.get(name) or finals.get(os.path.dirname(name)) or out
    if error.errno == errno.ENAMETOOLONG:
        return FileError(
            where, "has a name that is too long for its disk, nothing was replaced", "choose a shorter one"
        )
    if error.filename and not {name, os.path.dirname(name)} & finals.keys() and MADE not in name:
        return FileError(error.filename, f"cannot be read ({error.strerror}), nothing was replaced", "check the path")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FileError(out, "no space is left on its disk, nothing was replaced", "free some or write elsewhere")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return FileError(where, f"may not be written ({error.strerror})", "write elsewhere or change the permissions")
    return FileError(where, f"could not be written ({error.strerror}), nothing was replaced", "write elsewhere")
