"""One output written by several processes that torchrun started: each makes some of the files, the first the index.

Files of this machine are made in a folder beside the output
and put in place when all of them are there; the index comes last, so that half a result is never taken for the whole.
What a run that failed has finished is found there by the next one and not made again.  What goes to a URL is sent by
the process that makes it.

Every process plans the same output from the same arguments; which files are whose follows from their sizes alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from typing import TYPE_CHECKING

from ..errors import CheckpointError, FileError, OutputExists, RankFailed, listed
from ..files import journal, moves, swap
from ..files.journal import sync_directory
from ..files.local import LocalPath
from ..files.paths import FilePath
from ..files.sinks import FileSink, Progress
from ..files.temporary import Hold, is_held, new_token
from ..tensors.stored import StoredTensor
from .destinations import Destination, Fill, destination, local_failure
from .group import Group, joined
from .leftovers import JOB, READY, clear_parts, left_behind, parts_folder, take_back_moves
from .plan import Plan, Written, sources_of
from .write import Steps, beside, carry_out

if TYPE_CHECKING:
    pass

DONE = ".done"


def write(
    planned: Plan,
    *,
    job: str = "",
    force: bool = False,
    progress: Progress | None = None,
    metadata: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """Carry out a plan together with the other processes of this torchrun; the same bytes as from one process.

    To be called by every process, with the same arguments and a plan that may replace (``force=True``); whether this
    does, ``force`` says here.  ``job`` names what is done to the tensors (a recipe's digest, a command line): files
    that an earlier, failed run of the same job has finished are kept.  Returns the notes of all processes.  Raises
    OutputExists, EditError with the problems of all processes, and RankFailed where one failed or died.
    """
    with joined() as group:
        notes = write_share(group, planned, job=job, force=force, progress=progress, metadata=metadata)
    notes = (*notes, *beside(planned), *left_behind(planned.out))
    if len(planned.shards) == 1 and not planned.max_shard_size:
        return (*notes, "one file is written by one process; --max-shard-size shares the work out")
    return notes


def write_share(
    group: Group,
    planned: Plan,
    *,
    job: str = "",
    force: bool = False,
    progress: Progress | None = None,
    metadata: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """Carry out one process's part of a plan; see :func:`write`."""

    def tell(done: int) -> None:
        group.step()
        if progress is not None:
            progress(done)

    steps = Steps(tell)
    facts = _facts(planned, job, metadata or {})
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    group.agree(facts, planned.out)
    where: Destination
    if (out := planned.out.local) is not None:
        where = Parts(planned, out, digest, group, steps.tell)
        if group.rank == 0:
            where.prepare(force=force)
    else:
        if group.rank == 0 and not force and (there := planned.in_the_way()):
            raise OutputExists(there[0])
        where = _NamingRank(destination(planned, steps.tell), planned, group)
    group.wait()
    return carry_out(planned, where, group=group, steps=steps, metadata=metadata)


class Parts:
    """A folder beside an output of this machine, where all processes put the files that they have finished.

    It stays when one of them fails: the next run of the same job finds there what need not be made again.
    """

    def __init__(self, planned: Plan, out: LocalPath, digest: str, group: Group, tell: Progress) -> None:
        self._planned = planned
        self._out = out
        self._digest = digest
        self._group = group
        self._tell = tell
        self._hold = Hold()
        self._beside: dict[LocalPath, LocalPath] = {}
        self._folder = parts_folder(out)
        self._ready = self._folder / READY  # a folder that will be the output

    def prepare(self, *, force: bool) -> None:
        """Make the folder, or keep that of an earlier run of the same job; what is in the way may not be lost."""
        name = self._folder / JOB
        try:
            goes_on = name.exists() and name.read_text("utf-8") == self._digest
            if name.exists() and is_held(name):
                raise FileError(self._out, "is being written by another torchrun right now", "wait for it")
            take_back_moves(self._out)
            placed = [file.path for file in self._planned.files if goes_on and self._found(file.path) == file.path]
            there = [path for path in self._planned.in_the_way() if path not in placed]
            if there and not force:
                raise OutputExists(there[0])
            _refuse_sources(self._planned)
            if self._folder.exists() and not goes_on:
                clear_parts(self._folder)
            self._folder.mkdir(exist_ok=True, parents=self._planned.model_folder is not None)
            name.write_text(self._digest, "utf-8")
            self._hold.take(name)
        except OSError as error:
            raise FileError(self._folder, f"cannot be made ({error.strerror})", "write elsewhere") from error

    def write_file(self, number: int, fill: Fill) -> Written:
        """Make one file, unless an earlier run has."""
        path = self._planned.files[number].path
        if self._found(path) is not None:
            self._tell(self._planned.sizes[number])
            return _noted(self._folder, path)[1]
        self._group.announce(path.name)
        try:
            written = self._write_file(path, fill)
        except (OSError, CheckpointError) as error:
            problem = f"cannot be written ({error.strerror})" if isinstance(error, OSError) else str(error)
            remedy = "the same command goes on from here"
            raise RankFailed(self._group.rank, path.name, problem, remedy=remedy) from error
        self._group.announce("")
        return written

    def _write_file(self, path: FilePath, fill: Fill) -> Written:
        final, made = self._folder / path.name, self._folder / f"{path.name}.{self._group.rank}.tmp"
        made.unlink(missing_ok=True)
        descriptor = os.open(made, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            with FileSink(descriptor, self._tell) as sink:
                written = fill(sink)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if written.problems:
            made.unlink()  # all processes tell their problems together; this file is not to be kept
            return written
        os.replace(made, final)
        _write_down(final.with_name(final.name + DONE), json.dumps([_state(final), written]).encode())
        sync_directory(final.parent)
        return written

    def write_settings(self, path: FilePath, raw: bytes) -> None:
        self._beside[self._folder / path.name] = _local(path)
        _write_down(self._folder / path.name, raw)

    def write_index(self, raw: bytes) -> None:
        self._group.announce(f"the index of {self._out.name}")
        made = self._folder / "index"
        made.unlink(missing_ok=True)
        _write_down(made, raw)

    def commit(self, *, is_last: bool = True) -> tuple[str, ...]:
        if not is_last:
            return ()
        made = {_local(file.path): self._found(file.path) for file in self._planned.files}
        if lost := [path.name for path, found in made.items() if found is None]:
            raise FileError(self._out, f"{listed(lost)} is not there as it was made", "run the same command again")
        places = {found: path for path, found in made.items() if found is not None and found != path}
        places = {**self._beside, **places}
        if self._planned.index is not None:
            places[self._folder / "index"] = _local(self._planned.index)
        if self._planned.is_folder:
            places = self._gathered(places)
        try:
            self._planned.verify(lambda path: next((at for at, final in places.items() if final == path), path))
        except CheckpointError:
            clear_parts(self._folder)
            raise
        notes = [f"{final}: its {lost} could not be kept" for at, final in places.items()
                 for lost in swap.keep_attributes(final, at)]  # fmt: skip
        moves.put_all(places, [_local(path) for path in self._planned.stale()], new_token(), self._out)
        for final in places.values():
            with suppress(OSError, FileError):
                journal.discard(final)
                sync_directory(final.parent)
        clear_parts(self._folder)
        self._hold.release()
        return tuple(notes)

    def _gathered(self, places: Mapping[LocalPath, LocalPath]) -> dict[LocalPath, LocalPath]:
        """Move the files of an output that is a folder into one."""
        self._ready.mkdir(exist_ok=True)
        for made, final in places.items():
            os.replace(made, self._ready / final.name)
        sync_directory(self._ready)
        return {self._ready: self._out}

    def abandon(self) -> None:
        self._hold.release()

    def failure(self, error: OSError) -> FileError:
        return local_failure(self._out, error, {})

    def _found(self, path: FilePath) -> LocalPath | None:
        """Where a file is that is finished, if it is still whole: in the folder or in place."""
        for place in (self._folder / path.name, self._ready / path.name, _local(path)):
            try:
                if _state(place) == _noted(self._folder, path)[0]:
                    return place
            except (OSError, ValueError, LookupError, TypeError):
                continue
        return None


class _NamingRank:
    """A destination at a URL; what fails there is told with the rank and the file."""

    def __init__(self, inner: Destination, planned: Plan, group: Group) -> None:
        self._inner = inner
        self._planned = planned
        self._group = group
        self.write_settings = inner.write_settings
        self.write_index = inner.write_index
        self.commit = inner.commit
        self.abandon = inner.abandon
        self.failure = inner.failure

    def write_file(self, number: int, fill: Fill) -> Written:
        name = self._planned.files[number].path.name
        self._group.announce(name)
        try:
            return self._inner.write_file(number, fill)
        except (OSError, CheckpointError) as error:
            raise RankFailed(self._group.rank, name, str(error)) from error


def _write_down(path: LocalPath, raw: bytes) -> None:
    with open(path, "wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())


def _noted(folder: LocalPath, path: FilePath) -> tuple[str, Written]:
    """What was noted of a finished file: its state, and what is known of it."""
    state, written = json.loads((folder / f"{path.name}{DONE}").read_text("utf-8"))
    return state, Written(*written)


def _state(path: LocalPath) -> str:
    """What tells this very file from another of its name; moving it does not change it."""
    found = path.stat()
    return f"{found.st_size} {found.st_ino} {found.st_mtime_ns}"


def _facts(planned: Plan, job: str, metadata: Mapping[str, str]) -> dict[str, str]:
    """Digests that tell one job from another: its name, its sources as they are now, the tensors of every file."""
    tensors, sources = hashlib.sha256(), hashlib.sha256()
    paths: dict[FilePath, None] = {}
    for file in planned.files:
        tensors.update(f"{file.path.name}\n".encode("utf-8", "surrogatepass"))
        paths.update(dict.fromkeys([file.copy_of] if file.copy_of is not None else []))
        for key, tensor in file.tensors.items():
            checksum = tensor.storage.crc32 if isinstance(tensor, StoredTensor) else None
            about = f"{key} {tensor.dtype} {tensor.shape} {tensor.span} {checksum}\n"
            tensors.update(about.encode("utf-8", "surrogatepass"))
            paths.update(dict.fromkeys(sources_of(tensor, set())))
    for path in paths:
        state = f"{(status := path.local.stat()).st_size} {status.st_mtime_ns}" if path.local else path.size
        sources.update(f"{path} {state}\n".encode("utf-8", "surrogatepass"))
    named = f"{job}\n{sorted(metadata.items())}\n".encode("utf-8", "surrogatepass")
    return {
        "version of ckpt_surgeon": version("ckpt_surgeon"),
        "version of torch": version("torch"),
        "command": hashlib.sha256(named).hexdigest(),
        "input": sources.hexdigest(),
        "tensors": tensors.hexdigest(),
    }


def _refuse_sources(planned: Plan) -> None:
    """An output that replaces what it is made of could not be gone on with."""
    theirs = {os.path.realpath(path.local) for path in planned.sources() if path.local}
    for path in planned.in_the_way():
        inside = [_local(path) / name for name in path.names()] if planned.is_folder and path.is_dir() else []
        if not theirs.isdisjoint(os.path.realpath(one) for one in (_local(path), *inside)):
            raise FileError(path, "is read by this very run, which could not go on if it failed", "write elsewhere")


def _local(path: FilePath) -> LocalPath:
    assert path.local is not None
    return path.local
