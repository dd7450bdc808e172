"""Writing a run: planned, written and verified as any other file, with everything beside the weights in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from ..errors import BrokenFile, FileError
from ..files.paths import AnyPath, FilePath, file_path
from ..files.sinks import Progress, Sink
from ..formats import registry
from ..formats.dcp import metadata as dcp
from ..formats.dcp.torch_io import Layout
from ..formats.dcp.whole import Entries, entries_of, read_whole_folder
from ..formats.pickle.values import Value
from ..formats.zip import torch_zip
from ..formats.zip.whole import Whole, size_of, write_whole
from ..tensors.checkpoint import Checkpoint
from ..tensors.records import Tensor
from ..writing import write
from ..writing.plan import Plan, PlannedFile, plan


class Writable(Protocol):
    """What writing asks of a run: the file that it came from, its weights, and the nodes that replace others."""

    @property
    def whole(self) -> Whole: ...

    @property
    def weights(self) -> Checkpoint: ...

    def instead(self) -> dict[int, Value]: ...


@dataclass(slots=True, eq=False)
class WholeWriter:
    """The writer of one run, instead of a container's own: see :class:`ckpt_surgeon.formats.registry.Writer`."""

    whole: Whole
    instead: Mapping[int, Value]
    CONTAINER: str = torch_zip.CONTAINER
    SUFFIXES: tuple[str, ...] = torch_zip.SUFFIXES
    HOLDS_EXTRA_STATES: bool = True

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Everything that a run holds can be written: it came from such a file."""

    def size_of(self, tensors: Mapping[str, Tensor]) -> int:
        """About how many bytes the whole file will have."""
        return size_of(self.whole, self.instead)

    def write(
        self,
        sink: Sink,
        tensors: Mapping[str, Tensor],
        versions: Mapping[str, Mapping[str, Value]] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Write the whole file."""
        write_whole(sink, self.whole, self.instead)


@dataclass(frozen=True, slots=True, repr=False)
class FolderPlan(Plan):
    """The plan of a run that becomes a distributed checkpoint: every tensor in it is read and counted, too."""

    entries: Entries = field(default_factory=Entries)

    @property
    def nbytes(self) -> int:
        """About how many bytes will be written."""
        return self.writer.size_of(self.entries.tensors) + 1_500 * len(self.entries.pickled)

    def sources(self) -> list[FilePath]:
        """The files that the tensors' bytes come from."""
        return Plan(self.out, Checkpoint(self.entries.tensors), self.files, self.writer).sources()

    def verify(self, made: Callable[[FilePath], FilePath], fate: str = "nothing was replaced") -> None:
        """Read the entries back and compare them with the plan.  Raises BrokenFile."""
        local = made(self.out).local
        assert local is not None
        read_back = entries_of(read_whole_folder(local), {})
        asked, found = (_described(entries) for entries in (self.entries, read_back))
        if asked != found:
            name = next(iter(asked.keys() ^ found.keys()), "a tensor")
            raise BrokenFile(self.out, f"did not read back as planned ({name}), {fate}", "do it again")


def _described(entries: Entries) -> dict[str, object]:
    shapes = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in entries.tensors.items()}
    return {**dict.fromkeys(entries.pickled), **shapes}


def plan_run(run: Writable, out: AnyPath, *, force: bool = False) -> Plan:
    """Plan the file, or the distributed checkpoint, that a run becomes; nothing is touched.

    Raises what :func:`ckpt_surgeon.writing.plan.plan` raises, and FileError for an extension whose container holds
    weights alone.
    """
    out = file_path(out)
    container = registry.writer_for(out)
    if isinstance(container, registry.FolderWriter):
        return _plan_folder(run, plan(replace(run.weights, left_out=()), out, force=force))
    if container is not torch_zip:
        problem = "its container holds weights alone, so that the rest of the run would be lost"
        remedy = f"end OUT in {' or '.join((*torch_zip.SUFFIXES, *dcp.SUFFIXES))}, or leave out --whole"
        raise FileError(out, problem, remedy)
    writer = WholeWriter(run.whole, run.instead())
    planned = plan(replace(run.weights, left_out=()), out, force=force, writer=writer)
    selected = run.weights.selected or "."
    return replace(planned, files=(PlannedFile(planned.out, run.weights.tensors, selected),))


def _plan_folder(run: Writable, planned: Plan) -> FolderPlan:
    """The plan of a distributed checkpoint."""
    entries = entries_of(run.whole, run.instead())
    planned.writer.check(entries.tensors)
    layout = Layout(entries.tensors, pickled=entries.pickled, paths=entries.paths)
    files = tuple(PlannedFile(planned.out / name, tensors) for name, tensors in layout.files.items())
    return FolderPlan(
        planned.out, planned.checkpoint, files, planned.writer, planned.index, layout=layout, entries=entries
    )


def save_whole(run: Writable, out: AnyPath, *, force: bool = False, progress: Progress | None = None) -> Plan:
    """Write a run to one file of torch.save, or to a distributed checkpoint, all or nothing, and verified.

    Gives the plan that was carried out.

    >>> import ckpt_surgeon, torch
    >>> torch.save({"model": {"module.fc.bias": torch.ones(3)}, "epoch": 3}, "last.ckpt")
    >>> plan = save_whole(ckpt_surgeon.strip_prefix(ckpt_surgeon.open_run("last.ckpt")), "clean.ckpt")
    >>> torch.load("clean.ckpt")["epoch"]
    3
    """
    planned = plan_run(run, out, force=force)
    write.write(planned, progress=progress)
    return planned
