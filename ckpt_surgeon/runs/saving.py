"""Writing a run: planned, written and verified as any other file, with everything beside the weights in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from ..errors import FileError
from ..files.paths import AnyPath, file_path
from ..files.sinks import Progress, Sink
from ..formats import registry
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


def plan_run(run: Writable, out: AnyPath, *, force: bool = False) -> Plan:
    """Plan the one file that a run becomes; nothing is touched.

    Raises what :func:`ckpt_surgeon.writing.plan.plan` raises, and FileError for an extension whose container holds
    weights alone.
    """
    out = file_path(out)
    if registry.writer_for(out) is not torch_zip:
        problem = "its container holds weights alone, so that the rest of the run would be lost"
        remedy = f"end OUT in {' or '.join(torch_zip.SUFFIXES)}, or leave out --whole"
        raise FileError(out, problem, remedy)
    writer = WholeWriter(run.whole, run.instead())
    planned = plan(replace(run.weights, left_out=()), out, force=force, writer=writer)
    selected = run.weights.selected or "."
    return replace(planned, files=(PlannedFile(planned.out, run.weights.tensors, selected),))


def save_whole(run: Writable, out: AnyPath, *, force: bool = False, progress: Progress | None = None) -> Plan:
    """Write a run to one file of torch.save, all or nothing, and verified; gives the plan that was carried out.

    >>> import ckpt_surgeon, torch
    >>> torch.save({"model": {"module.fc.bias": torch.ones(3)}, "epoch": 3}, "last.ckpt")
    >>> plan = save_whole(ckpt_surgeon.strip_prefix(ckpt_surgeon.open_run("last.ckpt")), "clean.ckpt")
    >>> torch.load("clean.ckpt")["epoch"]
    3
    """
    planned = plan_run(run, out, force=force)
    write.write(planned, progress=progress)
    return planned
