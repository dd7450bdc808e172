"""One output written by several processes that torchrun started: each writes whole shards, the first one the index.

Rendezvous and collectives are torch.distributed's (gloo).  Shards are made in a folder beside the output and moved
into place when all of them are there and verified; the index comes last, so that half a result is never taken for
the whole.  What a run that failed has finished is found there by the next one and not made again.

Every process plans the same output from the same arguments; which shards are whose follows from their sizes alone.
torch is imported inside the functions.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ..errors import CheckpointError, EditError, FileError, OutputExists, RankFailed, listed
from ..files.journal import discard, sync_directory
from ..files.paths import FilePath, LocalPath
from ..files.sinks import Progress
from ..formats.registry import FolderWriter
from ..tensors.records import ComputedTensor, StoredTensor, Tensor, outcomes
from .write import Plan, PlannedFile, verify, write_file, write_index
from .write import write as write_whole

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

Json: TypeAlias = "str | list[Json] | None"

PATIENCE = timedelta(days=7)  # that a process waits for the others, which may have much to write
GRACE = 2.0  # seconds in which the others say that they are still there, once one has failed
DONE = ".done"


def shares(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Share out shards among ``count`` processes by bytes: the largest first, each to whom has least so far.

    >>> shares([5, 4, 3, 3, 3], 2)
    [[0, 3], [1, 2, 4]]
    """
    made: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        least = loads.index(min(loads))
        made[least].append(index)
        loads[least] += sizes[index]
    return [sorted(share) for share in made]


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
    does, ``force`` says here.  ``job`` names what is done to the tensors (a recipe's digest, a command line): shards
    that an earlier, failed run of the same job has finished are kept.  Returns the notes of all processes.  Raises
    OutputExists, EditError with the problems of all processes, and RankFailed where one failed or died.
    """
    with _joined() as group:
        digest = _digest(planned, job, metadata or {})
        group.agree(digest, planned.out)
        out = planned.out.local or planned.out
        if isinstance(planned.writer, FolderWriter) or out.local is None:
            notes = _write_alone(planned, group, force=force, progress=progress, metadata=metadata)
            return (*notes, "one process wrote it: a folder, or a URL, is not shared out")
        staging = local(out).with_name(f".{planned.out.name}.parts")
        if group.rank == 0:
            _prepare(planned, staging, digest, force=force)
        group.wait()
        mine = shares([planned.writer.size_of(file.tensors) for file in planned.files], group.size)[group.rank]
        for index in mine:
            group.says(planned.files[index].path.name)
            _write_shard(planned, planned.files[index], staging, group.rank, progress or (lambda _: None), metadata)
        group.says("")
        notes, problems = _joint(group.gathered(_outcomes(planned.files[index] for index in mine)))
        if problems:
            raise EditError(problems)
        if group.rank == 0:
            group.says(f"the index of {planned.out.name}")
            _put_in_place(planned, staging)
        group.wait()
    if len(planned.files) == 1 and not planned.max_shard_size:
        return (*notes, "one file is written by one process; --max-shard-size shares the work out")
    return notes


def _write_alone(
    planned: Plan, group: _Group, *, force: bool, progress: Progress | None, metadata: Mapping[str, str] | None
) -> tuple[str, ...]:
    """An output that is no set of files is written by the first process, while the others wait."""
    notes: tuple[str, ...] = ()
    if group.rank == 0:
        group.says(planned.out.name)
        if not force and (there := planned.in_the_way()):
            raise OutputExists(there[0])
        notes = write_whole(planned, progress=progress, metadata=metadata)
    group.wait()
    return notes


def _outcomes(files: Iterable[PlannedFile]) -> Json:
    """Notes on the values of some files, and the problems that forbid them."""
    found = list(outcomes(tensor for file in files for tensor in file.tensors.values()))
    return [[one.note for one in found if one.note], [one.problem for one in found if one.problem]]


def _joint(found: list[Json]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The notes and the problems of all processes."""
    pairs = [pair for pair in found if isinstance(pair, list)]
    notes, problems = (dict.fromkeys(str(one) for pair in pairs for one in pair[side] or ()) for side in (0, 1))
    return tuple(notes), tuple(problems)


# -- one shard


def _write_shard(
    planned: Plan, file: PlannedFile, staging: LocalPath, rank: int, tell: Progress, metadata: Mapping[str, str] | None
) -> None:
    """Write and verify one shard in the staging folder, unless an earlier run has."""
    if _place(staging, file) is not None:
        tell(planned.writer.size_of(file.tensors))
        return
    final = staging / file.path.name
    made = staging / f"{file.path.name}.{rank}.tmp"
    try:
        made.unlink(missing_ok=True)
        write_file(made, planned, file, tell, metadata)
        verify(made, file)
        if any(one.problem for one in outcomes(file.tensors.values())):
            made.unlink()  # all processes tell their problems together; this shard is not to be kept
            return
        os.replace(made, final)
        _mark(final)
    except (OSError, CheckpointError) as error:
        problem = f"cannot be written ({error.strerror})" if isinstance(error, OSError) else str(error)
        raise RankFailed(rank, file.path.name, problem, remedy="the same command goes on from here") from error


def _mark(final: Path) -> None:
    """Note that a shard is complete on the disk and verified."""
    with open(final.with_name(final.name + DONE), "w", encoding="utf-8") as file:
        file.write(_state(final))
        file.flush()
        os.fsync(file.fileno())
    sync_directory(final.parent)


def _place(staging: LocalPath, file: PlannedFile) -> LocalPath | None:
    """Where a shard is that an earlier run has finished, if it is still whole: in the staging folder or in place."""
    for path in (staging / file.path.name, local(file.path)):
        try:
            if _state(path) == (staging / f"{file.path.name}{DONE}").read_text("utf-8"):
                verify(path, file)
                return path
        except (OSError, CheckpointError):
            continue
    return None


def _state(path: Path) -> str:
    """What tells this very file from another of its name; moving it does not change it."""
    found = path.stat()
    return f"{found.st_size} {found.st_ino} {found.st_mtime_ns}"


# -- the whole


def _digest(planned: Plan, job: str, metadata: Mapping[str, str]) -> str:
    """What tells one job from another: its name, its sources as they are now, the keys and shapes of every shard."""
    found = hashlib.sha256(f"{version('ckpt_surgeon')}\n{job}\n{sorted(metadata.items())}\n".encode())
    paths: dict[FilePath, None] = {}
    for file in planned.files:
        found.update(f"{file.path.name}\n".encode())
        for key, tensor in file.tensors.items():
            found.update(f"{key} {tensor.dtype} {tensor.shape} {tensor.span}\n".encode("utf-8", "surrogatepass"))
            paths.update(dict.fromkeys(_sources(tensor)))
    for path in paths:
        state = f"{(about := path.local.stat()).st_size} {about.st_mtime_ns}" if path.local else path.size
        found.update(f"{path} {state}\n".encode("utf-8", "surrogatepass"))
    return found.hexdigest()


def _sources(tensor: Tensor) -> Iterator[FilePath]:
    """The files that a tensor's bytes come from."""
    ahead, seen = [tensor], set()
    while ahead:
        one = ahead.pop()
        if isinstance(one, StoredTensor):
            yield from one.storage.files
            one = one.storage.source or one
        if isinstance(one, ComputedTensor) and id(one) not in seen:
            seen.add(id(one))
            ahead.extend(one.inputs)
            yield from one.files


def _prepare(planned: Plan, staging: LocalPath, digest: str, *, force: bool) -> None:
    """Make the staging folder, or keep that of an earlier run of the same job; what is in the way may not be lost."""
    name = staging / "job"
    try:
        goes_on = name.exists() and name.read_text("utf-8") == digest
        placed = [file.path for file in planned.files if goes_on and _place(staging, file) == file.path]
        there = [path for path in planned.in_the_way() if path not in placed]
        if there and not force:
            raise OutputExists(there[0])
        _refuse_sources(planned)
        if staging.exists() and not goes_on:
            shutil.rmtree(staging)
        staging.mkdir(exist_ok=True)
        name.write_text(digest, "utf-8")
    except OSError as error:
        raise FileError(staging, f"cannot be made ({error.strerror})", "write elsewhere") from error


def _refuse_sources(planned: Plan) -> None:
    """An output that replaces what it is made of could not be gone on with."""
    sources = {path for file in planned.files for one in file.tensors.values() for path in _sources(one)}
    theirs = {os.path.realpath(path.local) for path in sources if path.local}
    for path in planned.in_the_way():
        if os.path.realpath(local(path)) in theirs:
            raise FileError(path, "is read by this very run, which could not go on if it failed", "write elsewhere")


def _put_in_place(planned: Plan, staging: LocalPath) -> None:
    """Move all shards to their names and write the index, last; an old index goes first."""
    places = {local(file.path): _place(staging, file) for file in planned.files}
    if lost := [path.name for path, place in places.items() if place is None]:
        raise FileError(planned.out, f"{listed(lost)} is not there as it was verified", "run the same command again")
    index = None if planned.index is None else local(planned.index)
    if index is not None:
        index.unlink(missing_ok=True)
    stale = planned.stale_shards()
    for path, place in places.items():
        os.replace(place or path, path)
        discard(path)
    for shard in stale:
        local(shard).unlink(missing_ok=True)
    sync_directory(local(planned.out).parent)
    if index is not None:
        made = staging / "index"
        made.unlink(missing_ok=True)
        write_index(made, planned)
        os.replace(made, index)
        sync_directory(local(planned.out).parent)
    shutil.rmtree(staging)


def local(path: FilePath) -> LocalPath:
    """The path of a file on this machine, as all outputs are that are shared out."""
    assert path.local is not None
    return path.local


# -- the other processes


class _Group:
    """The processes of one torchrun: torch.distributed's store and its barrier."""

    def __init__(self, number: int, size: int, store: Store) -> None:
        self.rank = number
        self.size = size
        self.is_leaving = False
        self._store = store
        self._rounds = 0

    def says(self, doing: str) -> None:
        """Note what this process is at, for the others to tell if it dies."""
        self._store.set(f"doing/{self.rank}", doing)

    def wait(self) -> None:
        """Wait until every process is here.  Raises RuntimeError (torch's) when one is gone."""
        from torch import distributed

        distributed.barrier()

    def gathered(self, value: Json) -> list[Json]:
        """What each process brings, by rank."""
        self._rounds += 1
        self._store.set(f"{self._rounds}/{self.rank}", json.dumps(value))
        self.wait()
        return [json.loads(self._store.get(f"{self._rounds}/{one}")) for one in range(self.size)]

    def agree(self, digest: str, out: FilePath) -> None:
        """Raise EditError unless every process has planned the same."""
        first, *others = self.gathered(digest)
        odd = [str(number) for number, other in enumerate(others, 1) if other != first]
        if odd:
            problem = f"{out}: rank {', '.join(odd)} plans another output than rank 0"
            raise EditError(problem, remedy="do all nodes see the same files?")

    def leave(self, why: str = "") -> None:
        """Say that this process goes, and why where it is a trouble of its own."""
        self.is_leaving = True
        self._store.set(f"left/{self.rank}", why)

    def lost(self) -> RankFailed:
        """Which process the others have lost, and what it was at; the first of the others is to tell."""
        self.leave()
        time.sleep(GRACE)
        gone = [one for one in range(self.size) if not self._store.check([f"left/{one}"])]
        for one in range(self.size):
            if one not in gone and (why := self._store.get(f"left/{one}").decode()):
                return RankFailed(one, "", why, told_by=one)  # it has told by itself
        if not gone:
            return RankFailed(self.rank, "", "was stopped", told_by=self.rank)
        doing = self._store.get(f"doing/{gone[0]}").decode() if self._store.check([f"doing/{gone[0]}"]) else ""
        others = f", as did {', '.join(map(str, gone[1:]))}" if gone[1:] else ""
        first = min(set(range(self.size)) - set(gone))
        return RankFailed(gone[0], doing, f"died{others}", told_by=first, remedy="run the same command again to go on")


@contextmanager
def _joined() -> Iterator[_Group]:
    """Meet the other processes, and part; where one is lost, say which and what it was at."""
    from torch import distributed
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, number, size = next(iter(rendezvous("env://", timeout=PATIENCE)))
    distributed.init_process_group(
        "gloo", store=PrefixStore("ckpt", store), rank=number, world_size=size, timeout=PATIENCE
    )
    group = _Group(number, size, PrefixStore("ckpt_state", store))
    with _stopped_once(group):
        try:
            yield group
            group.leave()
        except CheckpointError as error:
            group.leave(str(error))
            raise
        except (RuntimeError, SystemExit) as error:  # a collective without one of the others, or torchrun's SIGTERM
            group.is_leaving = True
            raise group.lost() from error
        finally:
            distributed.destroy_process_group()


@contextmanager
def _stopped_once(group: _Group) -> Iterator[None]:
    """torchrun stops all processes once one has died: the first SIGTERM unwinds, but not while that is being told."""

    def stop(number: int, _frame: object) -> None:
        if not group.is_leaving:
            raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: signals are somebody else's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
