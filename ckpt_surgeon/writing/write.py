"""Writing: one conductor that has the files of a plan made, verified and put in their places.

Where they go, a :class:`~ckpt_surgeon.writing.destinations.Destination` knows; who makes which of them, a
:class:`Group`.  The old output stays whole until the new one is complete on disk; a failure leaves no debris.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, TypeAlias, cast, runtime_checkable

from ..errors import EditError, RankFailed, listed
from ..files import swap
from ..files.paths import AnyPath
from ..files.sinks import Progress
from ..reading.sources import checkpoint_of
from ..tensors.checkpoint import Checkpoint
from ..tensors.combining import Kept, Row
from ..tensors.stored import StoredTensor
from . import adapter_settings, model_folder
from .checking import compared
from .destinations import Destination, destination
from .leftovers import left_behind
from .plan import COPY, Places, Plan, Written, plan

if TYPE_CHECKING:
    from ..reading.sources import Source

THREADS = 8  # more at once than these wait for one another on most disks

Json: TypeAlias = "str | int | float | Sequence[Json] | Mapping[str, Json] | None"


class Group(Protocol):
    """The processes that carry out one plan together: each makes some of the files."""

    @property
    def rank(self) -> int:
        """Which of them this one is, from 0; the first makes the index."""
        ...

    def share(self, planned: Plan) -> Sequence[int]:
        """The numbers of the files that this process makes."""
        ...

    def gathered(self, value: Json) -> list[Json]:
        """What each process gives, by rank."""
        ...

    def wait(self) -> None:
        """Wait until every process is here."""
        ...


class Alone:
    """One process that does everything by itself."""

    rank = 0

    def share(self, planned: Plan) -> Sequence[int]:
        return range(len(planned.files))

    def gathered(self, value: Json) -> list[Json]:
        return [value]

    def wait(self) -> None:
        pass


@runtime_checkable
class Saveable(Protocol):
    """What writes itself: a training checkpoint as a whole."""

    def save_to(self, out: AnyPath, *, force: bool = False, progress: Progress | None = None) -> Plan: ...


def save(
    state_dict: Source | Saveable,
    out: AnyPath,
    *,
    force: bool = False,
    max_shard_size: int | None = None,
    allow_part: bool = False,
    ties: str = COPY,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    check: bool = True,
    with_files: bool = False,
) -> Plan:
    """Write a Checkpoint, a state_dict or a model to ``out``; the container is that of its extension.

    A whole training checkpoint (:func:`ckpt_surgeon.open_run`) is written with everything in it.  A dict may hold
    tensors of several checkpoints (``{**a, **b}``): what is not changed is copied from file to file.  A part of a model
    (one rank's, a module that cannot be had whole) is an error, unless ``allow_part`` takes it for a whole.
    All or nothing, and verified: see :func:`plan` and :func:`write` for the arguments and errors.  Returns the
    plan that was carried out.

    >>> import ckpt_surgeon, safetensors.torch, torch
    >>> plan = ckpt_surgeon.save({"fc.bias": torch.ones(3)}, "weights.safetensors")
    >>> safetensors.torch.load_file("weights.safetensors")
    {'fc.bias': tensor([1., 1., 1.])}
    """
    if isinstance(state_dict, Saveable):
        if max_shard_size or metadata or ties != COPY or with_files:
            problem = "a whole training checkpoint is written as it was: without shards, files, metadata or alias notes"
            raise EditError([problem])
        run = _as_whole(state_dict) if allow_part else state_dict
        return run.save_to(out, force=force, progress=progress)
    checkpoint = checkpoint_of(state_dict, allow_part=allow_part)
    planned = plan(checkpoint, out, force=force, max_shard_size=max_shard_size, ties=ties, with_files=with_files)
    write(planned, progress=progress, metadata=metadata, check=check)
    return replace(planned, written=True)


def _as_whole(run: Saveable) -> Saveable:
    """A training checkpoint whose weights count as a whole model; in its file they stay what they are."""
    weights = getattr(run, "weights", None)
    if not isinstance(weights, Checkpoint):
        return run
    made: Saveable = replace(run, weights=replace(weights, part=""))  # type: ignore[type-var]
    return made


def convert(
    source: Source,
    out: AnyPath,
    *,
    select: str | None = None,
    force: bool = False,
    max_shard_size: int | None = None,
    allow_part: bool = False,
    ties: str = COPY,
    check: bool = True,
    with_files: bool = False,
) -> Plan:
    """Write any checkpoint in the container of ``out``'s extension; see :func:`save`.

    >>> import ckpt_surgeon, torch
    >>> torch.save({"model": {"fc.bias": torch.ones(3)}, "epoch": 3}, "run.ckpt")
    >>> ckpt_surgeon.convert("run.ckpt", "model.safetensors").checkpoint.selected
    'model'
    """
    checkpoint = checkpoint_of(source, select=select, allow_part=allow_part)
    return save(
        checkpoint,
        out,
        force=force,
        max_shard_size=max_shard_size,
        ties=ties,
        check=check,
        with_files=with_files,
    )


def source_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the files that a checkpoint's tensors lie in."""
    stored = (tensor for tensor in checkpoint.values() if isinstance(tensor, StoredTensor))
    paths = {path for tensor in stored for path in tensor.storage.files}
    if not paths and checkpoint.path is not None:  # tensors that lie within a pickle, and not beside it
        return swap.nbytes(checkpoint.path) if checkpoint.path.local is None or checkpoint.path.lexists() else 0
    there = (path for path in paths if path.local is None or path.lexists())  # OUT may have been IN
    return sum(path.size for path in there)


def write(
    planned: Plan,
    *,
    progress: Progress | None = None,
    metadata: Mapping[str, str] | None = None,
    threads: int | None = None,
    check: bool = True,
) -> tuple[str, ...]:
    """Carry out a plan: all its files appear, complete and verified, or none does.

    ``progress`` is called with the number of bytes done since its last call; ``metadata`` is added to what a
    safetensors header carries; ``threads`` (default: one a core, at most :data:`THREADS`) write shards at the same
    time.  Checksums that inputs have are compared, of what the kernel copies too unless ``check`` is False (it takes
    a core beside the copy).  Returns what turned out while values were computed and is worth saying.  Raises
    FileError when the disk is full or refuses, BrokenFile when an input is damaged or changes, or the output does not
    read back as planned, EditError for values that cannot be had as asked (a new inf), all of them at once.
    """
    steps = Steps(progress or (lambda _: None))
    where = destination(planned, steps.tell)
    notes = carry_out(planned, where, steps=steps, metadata=metadata or {}, threads=threads, check=check)
    return (*notes, *beside(planned), *left_behind(planned.out))


def beside(planned: Plan) -> list[str]:
    """What is worth saying of the files beside an output that is a folder for a model."""
    if planned.model_folder is None:
        return []
    written = [file.path.name for file in planned.files]
    checkpoint = planned.checkpoint
    return model_folder.remarks(planned.model_folder, checkpoint.path, written, checkpoint.tensors)


def carry_out(
    planned: Plan,
    where: Destination,
    *,
    group: Group | None = None,
    steps: Steps | None = None,
    metadata: Mapping[str, str] | None = None,
    threads: int | None = None,
    check: bool = True,
) -> tuple[str, ...]:
    """Have the files of a plan made at a destination, together with the other processes of a group.

    Every process that fails abandons what it made.  Returns notes; raises what :func:`write` raises.
    """
    group, steps = group or Alone(), steps or Steps(lambda _: None)
    sources = planned.sources()
    if group.rank == 0:
        adapter_settings.check(planned)
    try:
        for path in sources:
            path.remember()
        numbers = group.share(planned)
        with compared(planned, numbers if check else ()):
            written = _made(planned, where, numbers, steps, metadata or {}, threads)
        places, notes = _joined(planned, group.gathered({str(number): one for number, one in written.items()}))
        for path in sources:
            path.check_unchanged()
        if group.rank == 0:
            adapter_settings.write(planned, where)
            if planned.index is not None:
                where.write_index(planned.index_bytes(places))
        if group.rank != 0:
            where.commit(is_last=False)
        group.wait()
        if group.rank == 0:
            notes += where.commit()
        group.wait()
    except OSError as error:
        where.abandon()
        raise where.failure(error) from error
    except BaseException:
        where.abandon()
        raise
    return notes


def _joined(planned: Plan, found: Iterable[Json]) -> tuple[list[Places], tuple[str, ...]]:
    """The places of each file and the notes of all processes; raises EditError with the problems of all."""
    places: dict[int, Places] = {}
    notes: dict[str, None] = {}
    problems: dict[str, None] = {}
    kept: list[Row] = []
    for rank, part in enumerate(found):
        for number, written in _understood(rank, part).items():
            places[number] = written.places
            notes.update(dict.fromkeys(written.notes))
            problems.update(dict.fromkeys(written.problems))
            kept += written.kept
    if problems:
        raise EditError(tuple(problems))
    if kept:
        notes[Kept.joined(kept).note] = None
    if lost := [file.path.name for number, file in enumerate(planned.files) if number not in places]:
        raise EditError(f"{planned.out}: no process has made {listed(lost)}", remedy="run the same command again")
    return [places[number] for number in range(len(planned.files))], tuple(notes)


def _understood(rank: int, part: Json) -> dict[int, Written]:
    """What one process says of its files.  Raises RankFailed for what none of this version says."""
    try:
        made = {int(number): Written(*found) for number, found in cast("Mapping[str, Written]", part).items()}
        for one in made.values():
            _ = [(int(start), int(length)) for start, length in one.places]
            if not all(isinstance(text, str) for text in (*one.notes, *one.problems)):
                raise TypeError
        return made
    except (TypeError, ValueError, AttributeError) as error:
        raise RankFailed(
            rank, "", "says what is not understood", remedy="do all nodes run the same version?"
        ) from error


def _made(
    planned: Plan,
    where: Destination,
    numbers: Sequence[int],
    steps: Steps,
    metadata: Mapping[str, str],
    count: int | None,
) -> dict[int, Written]:
    """Make some files, several at the same time; the first that fails stops the others."""

    def make(number: int) -> Written:
        return where.write_file(number, lambda sink: planned.fill(number, sink, steps.tell, metadata))

    count = 1 if planned.is_folder else min(count or min(os.cpu_count() or 1, THREADS), len(numbers))
    if count <= 1:
        return {number: make(number) for number in numbers}
    from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

    with ThreadPoolExecutor(count) as pool:
        try:
            waiting = {number: pool.submit(make, number) for number in numbers}
            wait(waiting.values(), return_when=FIRST_EXCEPTION)
        finally:  # a signal too ends here, in the main thread
            steps.stop()
            pool.shutdown(cancel_futures=True)
    failed = [error for one in waiting.values() if not one.cancelled() and (error := one.exception()) is not None]
    for error in sorted(failed, key=lambda error: isinstance(error, _Stopped)):
        raise error
    return {number: one.result() for number, one in waiting.items()}


class Steps:
    """Tells of the bytes done, one thread at a time; once it is stopped, whoever tells is stopped, too."""

    def __init__(self, tell: Progress) -> None:
        self._tell = tell
        self._lock = threading.Lock()
        self._is_stopped = False

    def tell(self, done: int) -> None:
        """Tell of some more bytes."""
        if self._is_stopped:
            raise _Stopped
        with self._lock:
            self._tell(done)

    def stop(self) -> None:
        """Have everybody who is still at work stop."""
        self._is_stopped = True


class _Stopped(Exception):
    """Another file could not be written, so this one need not be."""
