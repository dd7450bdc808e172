"""Writing: temporary siblings, kernel copies, fsync, rename; then the result is read back and compared.

A :class:`Plan` is what would be written: the files, the tensors in each, the bytes.  :func:`write` carries it out.
The old file stays whole until the new one is complete on disk; a failure leaves no debris.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BrokenFile, EditError, FileError, OutputExists, listed
from ..files import journal, swap, uploads
from ..files.paths import AnyPath, FilePath, LocalPath, file_path
from ..files.remote import RemotePath
from ..files.sinks import FileSink, Progress, Sink
from ..formats import registry, sharded
from ..formats.dcp import metadata as dcp
from ..formats.registry import FolderWriter, Writer
from ..reading.selecting import select
from ..reading.sources import checkpoint_of
from ..tensors.checkpoint import Checkpoint
from ..tensors.extra_state import without_extra_states
from ..tensors.records import StoredTensor, Tensor, outcomes
from ..text import Shown

if TYPE_CHECKING:
    from ..reading.sources import Source

THREADS = 8  # more at once than these wait for one another on most disks


@dataclass(frozen=True, slots=True, repr=False)
class PlannedFile(Shown):
    """One file (or folder) of an output, the tensors that go into it, and where in the file they will lie."""

    path: FilePath
    tensors: Mapping[str, Tensor]
    selected: str = "."


@dataclass(frozen=True, slots=True, repr=False)
class Plan(Shown):
    """What a write will do: its files, the index beside them (for shards), and the checkpoint they come from.

    Where the output is a folder, it is the one file, and ``max_shard_size`` that of the files in it.
    """

    out: FilePath
    checkpoint: Checkpoint
    files: tuple[PlannedFile, ...]
    writer: Writer | FolderWriter
    index: FilePath | None = None
    max_shard_size: int | None = None
    written: bool = False  # whether it was carried out

    @property
    def nbytes(self) -> int:
        """About how many bytes will be written."""
        return sum(self.writer.size_of(file.tensors) for file in self.files)

    def in_the_way(self) -> list[FilePath]:
        """What is there already and would be replaced."""
        paths = [*([self.index] if self.index else []), *(file.path for file in self.files), *self.stale_shards()]
        return [path for path in paths if path.lexists()]

    def stale_shards(self) -> list[FilePath]:
        """Shards of an earlier output of this name that a new index no longer lists."""
        if self.index is None:
            return []
        kept, folder = {file.path.name for file in self.files}, self.out.parent
        shards = [name for name in folder.names() if sharded.is_shard_of(self.out, name)]
        return [folder / name for name in shards if name not in kept]


def plan(
    checkpoint: Checkpoint,
    out: AnyPath,
    *,
    force: bool = False,
    max_shard_size: int | None = None,
) -> Plan:
    """Plan the files of an output; nothing is touched.

    The container is that of ``out``'s extension; ``max_shard_size`` (bytes) splits it into shards with an index.
    Raises OutputExists (without ``force``), NotACheckpoint (unknown extension), EditError (tensors that the
    container cannot hold, or none at all).
    """
    out = file_path(out)
    writer = registry.writer_for(out)
    if not writer.HOLDS_EXTRA_STATES:
        checkpoint = _of_tensors_alone(checkpoint)
    if not checkpoint.tensors:
        raise EditError([f"{out}: no tensor is left to write"])
    if isinstance(out, RemotePath):
        if isinstance(writer, FolderWriter):
            raise FileError(out, "would be a folder at a URL, which cannot be written", "write .safetensors or .pth")
        uploads.check_writable(out)
    elif not out.parent.is_dir():
        raise FileError(out, f"its directory {out.parent} does not exist", f"make it: mkdir -p {out.parent}")
    writer.check(checkpoint.tensors)
    is_split = max_shard_size is not None and not isinstance(writer, FolderWriter)
    groups = _groups(checkpoint.tensors, max_shard_size or 0) if is_split else [dict(checkpoint.tensors)]
    if len(groups) == 1:
        files: tuple[PlannedFile, ...] = (PlannedFile(out, groups[0]),)
        index = None
    else:
        names = (sharded.shard_name(out, number, len(groups)) for number in range(1, len(groups) + 1))
        files = tuple(PlannedFile(name, group) for name, group in zip(names, groups, strict=True))
        index = sharded.index_name(out)
    planned = Plan(out, checkpoint, files, writer, index, max_shard_size)
    if not force and (there := planned.in_the_way()):
        raise OutputExists(there[0])
    if isinstance(writer, FolderWriter) and isinstance(out, Path):
        _refuse_other_folder(out)
    return planned


def _of_tensors_alone(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint without extra states, for a container that holds tensors alone, with a note that says so."""
    tensors = without_extra_states(checkpoint.tensors)
    left = [key for key in checkpoint if key not in tensors]
    if not left:
        return checkpoint
    note = (
        f"left out, as safetensors holds tensors alone: {listed(left, 3)}; "
        "a strict load into a model with extra states needs them: write a .pth"
    )
    return replace(checkpoint, tensors=tensors, notes=(*checkpoint.notes, note))


def _refuse_other_folder(out: Path) -> None:
    """A folder is only replaced when all that is in it would be written again."""
    others = [name for name in sorted(os.listdir(out)) if not dcp.is_part(name)] if out.is_dir() else []
    if others:
        problem = f"is a folder with more than a distributed checkpoint in it ({listed(others)})"
        raise FileError(out, problem, "write elsewhere, or move those away")


def _groups(tensors: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """Fill shards in the order of the keys; tied tensors stay in one shard, as one storage."""
    homes: dict[object, int] = {}
    groups: list[dict[str, Tensor]] = [{}]
    sizes = [0]
    for key, tensor in tensors.items():
        home = homes.get(tensor.tie)
        if home is None:
            if groups[-1] and sizes[-1] + tensor.nbytes > limit:
                groups.append({})
                sizes.append(0)
            home = homes[tensor.tie] = len(groups) - 1
            sizes[home] += tensor.nbytes
        groups[home][key] = tensor
    return groups


def save(
    state_dict: Source,
    out: AnyPath,
    *,
    force: bool = False,
    max_shard_size: int | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Write a Checkpoint, a state_dict or a model to ``out``; the container is that of its extension.

    A dict may hold tensors of several checkpoints (``{**a, **b}``): what is not changed is copied from file to file.
    All or nothing, and verified: see :func:`plan` and :func:`write` for the arguments and errors.  Returns the
    plan that was carried out.

    >>> import ckpt_surgeon, safetensors.torch, torch
    >>> plan = ckpt_surgeon.save({"fc.bias": torch.ones(3)}, "weights.safetensors")
    >>> safetensors.torch.load_file("weights.safetensors")
    {'fc.bias': tensor([1., 1., 1.])}
    """
    planned = plan(checkpoint_of(state_dict), out, force=force, max_shard_size=max_shard_size)
    write(planned, progress=progress, metadata=metadata)
    return replace(planned, written=True)


def convert(
    source: Source,
    out: AnyPath,
    *,
    select: str | None = None,
    force: bool = False,
    max_shard_size: int | None = None,
) -> Plan:
    """Write any checkpoint in the container of ``out``'s extension; see :func:`save`.

    >>> import ckpt_surgeon, torch
    >>> torch.save({"model": {"fc.bias": torch.ones(3)}, "epoch": 3}, "run.ckpt")
    >>> ckpt_surgeon.convert("run.ckpt", "model.safetensors").checkpoint.selected
    'model'
    """
    return save(checkpoint_of(source, select=select), out, force=force, max_shard_size=max_shard_size)


def source_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the files that a checkpoint's tensors lie in."""
    stored = (tensor for tensor in checkpoint.values() if isinstance(tensor, StoredTensor))
    paths = {path for tensor in stored for path in tensor.storage.files}
    there = (path for path in paths if path.local is None or path.lexists())  # OUT may have been IN
    return sum(path.size for path in there)


def write(
    planned: Plan,
    *,
    progress: Progress | None = None,
    metadata: Mapping[str, str] | None = None,
    threads: int | None = None,
) -> tuple[str, ...]:
    """Carry out a plan: all its files appear, complete and verified, or none does.

    ``progress`` is called with the number of bytes done since its last call; ``metadata`` is added to what a
    safetensors header carries; ``threads`` (default: one a core, at most :data:`THREADS`) write shards at the same
    time.  Returns what turned out while values were computed and is worth saying.  Raises FileError when the disk is
    full or refuses, BrokenFile when an input is damaged or the output does not read back as planned, EditError for
    values that cannot be had as asked (a new inf), all of them at once.
    """
    if isinstance(planned.out, RemotePath):
        return _write_remotely(planned, progress or (lambda _: None), metadata)
    temporary = [_sibling(file.path) for file in planned.files]
    try:
        made = {path: file for (path, _), file in zip(temporary, planned.files, strict=True)}
        _write_files(planned, made, progress or (lambda _: None), metadata, threads)
        found = values_found(planned.checkpoint.values())
        for path, file in made.items():
            verify(path, file)
        if planned.index is not None:
            temporary.append(_sibling(planned.index))
            write_index(temporary[-1][0], planned)
        stale = planned.stale_shards()
        for path, final in temporary:
            swap.put(path, final)
            journal.discard(final)
    except OSError as error:
        raise _refused(planned.out, error, {str(path): final for path, final in temporary}) from error
    finally:
        for path, _ in temporary:
            swap.remove(path)
    for shard in stale:
        shard.unlink(missing_ok=True)
    for folder in {final.parent for _, final in temporary}:
        journal.sync_directory(folder)
    return found


def _write_remotely(planned: Plan, tell: Progress, metadata: Mapping[str, str] | None) -> tuple[str, ...]:
    """The same for a URL: streamed where files stay invisible until they are complete, else made here and sent.

    What has become visible is read back; all of it is removed again when that, or anything before it, fails.
    """
    from tempfile import TemporaryDirectory

    with uploads.Uploads(tell) as sent, TemporaryDirectory(prefix="ckpt-") as folder:
        stale = planned.stale_shards()
        if isinstance(planned.out, RemotePath) and planned.out.takes_parts:
            for file in planned.files:
                with sent.file(file.path, planned.writer.size_of(file.tensors)) as sink:
                    _fill(sink, planned, file, metadata)
            found = values_found(planned.checkpoint.values())
            if planned.index is not None:
                with sent.file(planned.index, 0) as sink:
                    sink.literal(_index_bytes(planned))
            sent.commit()
        else:
            here = _moved(planned, LocalPath(folder))
            found = write(here, progress=tell, metadata=metadata)
            for made, path in zip(_places(here), _places(planned), strict=True):
                sent.send(made, path)
        for file in planned.files:
            verify(file.path, file)
    for shard in stale:
        shard.unlink(missing_ok=True)
    return found


def _moved(planned: Plan, folder: LocalPath) -> Plan:
    """The same plan for another folder."""
    files = tuple(PlannedFile(folder / file.path.name, file.tensors) for file in planned.files)
    index = folder / planned.index.name if planned.index else None
    return replace(planned, out=folder / planned.out.name, files=files, index=index)


def _places(planned: Plan) -> list[FilePath]:
    """All the files of a plan, the index last."""
    return [*(file.path for file in planned.files), *([planned.index] if planned.index else [])]


def values_found(tensors: Iterable[Tensor]) -> tuple[str, ...]:
    """The notes on values that were computed; raises EditError with all that forbids them."""
    found = list(outcomes(tensors))
    if problems := [outcome.problem for outcome in found if outcome.problem]:
        raise EditError(problems)
    return tuple(outcome.note for outcome in found if outcome.note)


def _write_files(
    planned: Plan,
    made: Mapping[LocalPath, PlannedFile],
    tell: Progress,
    metadata: Mapping[str, str] | None,
    count: int | None,
) -> None:
    """Write all files, several at the same time; the first that fails stops the others."""
    count = min(count or min(os.cpu_count() or 1, THREADS), len(made))
    if count == 1:
        for path, file in made.items():
            write_file(path, planned, file, tell, metadata)
        return
    from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

    stopped, one_at_a_time = threading.Event(), threading.Lock()

    def tell_or_stop(done: int) -> None:
        if stopped.is_set():
            raise _Stopped
        with one_at_a_time:
            tell(done)

    with ThreadPoolExecutor(count) as pool:
        try:
            waiting = [
                pool.submit(write_file, path, planned, file, tell_or_stop, metadata) for path, file in made.items()
            ]
            wait(waiting, return_when=FIRST_EXCEPTION)
        finally:  # a signal too ends here, in the main thread
            stopped.set()
            pool.shutdown(cancel_futures=True)
    failed = [error for one in waiting if not one.cancelled() and (error := one.exception()) is not None]
    for error in sorted(failed, key=lambda error: isinstance(error, _Stopped)):
        raise error


class _Stopped(Exception):
    """Another file could not be written, so this one need not be."""


def _sibling(path: FilePath) -> tuple[LocalPath, LocalPath]:
    """A temporary name beside the file that ``path`` means (a link keeps pointing there), and that file."""
    assert path.local is not None
    final = LocalPath(os.path.realpath(path.local))
    return final.with_name(f".{final.name}.{os.urandom(4).hex()}.tmp"), final


def write_file(
    made: Path, planned: Plan, file: PlannedFile, tell: Progress, metadata: Mapping[str, str] | None = None
) -> None:
    """Write one file of a plan to ``made``, which must not exist, down to the disk."""
    if isinstance(planned.writer, FolderWriter):
        planned.writer.write_folder(made, file.tensors, tell, max_file_size=planned.max_shard_size)
        journal.sync_directory(made)
        return
    descriptor = os.open(made, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with FileSink(descriptor, tell) as sink:
            _fill(sink, planned, file, metadata)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fill(sink: Sink, planned: Plan, file: PlannedFile, metadata: Mapping[str, str] | None) -> None:
    assert not isinstance(planned.writer, FolderWriter)
    notes = {**planned.checkpoint.metadata, **(metadata or {})}
    planned.writer.write(sink, file.tensors, _versions_for(planned.checkpoint.versions, planned, file), notes)


def _versions_for(
    versions: Mapping[str, Mapping[str, object]] | None, planned: Plan, file: PlannedFile
) -> Mapping[str, Mapping[str, object]] | None:
    """A shard carries the versions of its own modules."""
    if versions is None or len(planned.files) == 1:
        return versions
    modules = {key.rpartition(".")[0] for key in file.tensors}
    return {module: version for module, version in versions.items() if module in modules or not module}


def _index_bytes(planned: Plan) -> bytes:
    weight_map = {key: file.path.name for file in planned.files for key in file.tensors}
    ordered = {key: weight_map[key] for key in planned.checkpoint}
    return sharded.index_bytes(ordered, sum(tensor.nbytes for tensor in planned.checkpoint.values()))


def write_index(made: Path, planned: Plan) -> None:
    """Write the index of a plan's shards to ``made``, which must not exist, down to the disk."""
    with open(made, "xb") as file:
        file.write(_index_bytes(planned))
        file.flush()
        os.fsync(file.fileno())


def verify(made: FilePath, file: PlannedFile) -> None:
    """Read an output's index back and compare it with the plan: keys, their order, dtypes, shapes."""
    written = select(registry.read(made), file.selected)
    asked = [(key, tensor.dtype, tensor.shape) for key, tensor in file.tensors.items()]
    found = [(key, tensor.dtype, tensor.shape) for key, tensor in written.items()]
    if asked != found:
        fate = "it was removed" if isinstance(made, RemotePath) else "nothing was replaced"
        odd = next((f"{a} became {b}" for a, b in zip(asked, found, strict=False) if a != b), "tensors are missing")
        raise BrokenFile(file.path, f"did not read back as planned ({odd}), {fate}", "do it again")


def _refused(out: FilePath, error: OSError, finals: Mapping[str, Path]) -> FileError:
    """What the system's refusal means; ``finals`` tells the files that temporary ones were to become."""
    name = str(error.filename)
    where = finals.get(name) or finals.get(os.path.dirname(name)) or out
    if error.filename and not {name, os.path.dirname(name)} & finals.keys():
        return FileError(error.filename, f"cannot be read ({error.strerror}), nothing was replaced", "check the path")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FileError(out, "no space is left on its disk, nothing was replaced", "free some or write elsewhere")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return FileError(where, f"may not be written ({error.strerror})", "write elsewhere or change the permissions")
    return FileError(where, f"could not be written ({error.strerror}), nothing was replaced", "write elsewhere")
