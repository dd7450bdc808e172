"""The options of ``--whole``: a training checkpoint that stays one, and the writing of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import click

from ..edits.change import Change
from ..edits.inputs import parted
from ..edits.recipe import Recipe, Step
from ..files.paths import FilePath
from ..reading.opening import open as open_checkpoint
from ..tensors.checkpoint import Checkpoint
from . import torchrun
from .options import Output, output, progress
from .spelling import in_words_of_command
from .terminal import say_done

if TYPE_CHECKING:
    from ..models.fit import Fit
    from ..runs.folder import RunFolder
    from ..runs.run import Run

NAMES = ("whole", "without", "reset", "moments", "run", "in_model_order", "optimizer_keys")


def whole_options() -> list[click.Option]:
    """What every command that writes takes to keep a training checkpoint whole."""
    return [
        click.Option(["--whole"], is_flag=True, help="Keep everything beside the weights; optimizers follow the edit."),
        click.Option(["--without"], multiple=True, metavar="GLOB",
                     help="With --whole: entries to leave out, as optimizer or 'callbacks.*' (repeatable)."),
        click.Option(["--reset"], multiple=True, metavar="GLOB",
                     help="With --whole: new keys whose optimizer state starts afresh (repeatable)."),
        click.Option(["--moments"], type=click.Choice(("zero", "mean")), default="zero", show_default=True,
                     help="With --whole: what an optimizer's moments get where a parameter grows."),
        click.Option(["--run"], metavar="FILE.py:FACTORY",
                     help="With --whole: builds (model, optimizer), which tell the parameter behind each id."),
        click.Option(["--in-model-order"], is_flag=True,
                     help="With --whole: the optimizer got the parameters in the model's order."),
        click.Option(["--optimizer-keys"], type=click.Choice(("names", "positions", "flat")),
                     help="With --whole: how OUT keys its optimizers' state; names for FSDP, flat for torchtitan."),
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Work:
    """What a command edits and how it writes: weights alone, or with --whole the run around them."""

    out: Output
    source: Checkpoint | Run | RunFolder
    reset: tuple[str, ...] = ()
    moments: str = "zero"
    keys: str = ""
    others: tuple[Checkpoint, ...] = ()  # further inputs, whose weights alone count

    @property
    def checkpoint(self) -> Checkpoint:
        """The weights."""
        return self.source if isinstance(self.source, Checkpoint) else self.source.weights

    def edit(
        self, edit: Step | Recipe, *, metadata: Mapping[str, str] | None = None, say: bool = True, job: str = ""
    ) -> None:
        """Edit and write."""
        if isinstance(self.source, Checkpoint):
            source = self.source

            def planned() -> Change[Checkpoint]:
                return edit.plan(source, *self.others) if isinstance(edit, Recipe) else edit.plan(source)

            recipe = edit if isinstance(edit, Recipe) else Recipe((edit,))
            self.out.write(
                planned(), metadata=metadata, say=say, job=job, recipe=recipe, again=lambda: planned().result
            )
            return
        from ..runs.applying import applied

        run, change = applied(self.source, edit, others=self.others, moments=self.moments, reset=self.reset)
        self._write(run, change, say=say)

    def fit(self, found: Fit, *, report: str = "", say: bool = True) -> None:
        """Write what was fitted to a model; ``report`` is printed before what was done, once that is done."""
        if isinstance(self.source, Checkpoint):
            self.out.write(found.change, say=say, report=report, recipe=found.recipe)
            return
        from ..runs.applying import fitted

        run = fitted(self.source, found, moments=self.moments, reset=self.reset)
        self._write(run, found.change, say=say, report=report)

    def _write(self, run: Run | RunFolder, change: Change[Checkpoint], *, say: bool, report: str = "") -> None:
        from ..report import outputs, trainings
        from ..runs.folder import RunFolder, save_run_folder
        from ..runs.optimizer_keys import with_optimizer_keys
        from ..runs.saving import plan_run
        from ..writing import write

        if torchrun.rank() > 0:  # of several processes, one does it
            return
        quiet = self.out.quiet or not say
        if isinstance(run, RunFolder):
            if self.out.dry_run:
                say_done(report, trainings.folder_plan_text(run, change, self.out.out))
                return
            save_run_folder(run, self.out.out, force=self.out.force)
            summary = "" if quiet else trainings.folder_summary(run, change, self.out.out)
            if report or summary:
                say_done(report, summary)
            return
        run = with_optimizer_keys(run, self.keys) if self.keys else run
        planned = plan_run(run, self.out.out, force=self.out.force or self.out.dry_run)
        if self.out.dry_run:
            text = "" if quiet else outputs.plan_text(planned, change, notes=trainings.run_notes(run))
            if report or text:
                say_done(report, text)
            return
        with progress(planned.nbytes, self.out.quiet) as tell:
            remarks = write.write(planned, progress=tell, check=not self.out.no_check)
        text = (
            ""
            if quiet
            else outputs.summary(planned, change, [*map(in_words_of_command, remarks), *trainings.run_notes(run)])
        )
        if report or text:
            say_done(report, text)


def work_of(values: dict[str, object]) -> Work:
    """Take IN, OUT and the options of writing and of --whole out of a command's parameters."""
    taken = {name: values.pop(name) for name in NAMES}
    out = output(values)
    source = {name: values.pop(name) for name in ("in_path", "select", "salvage")}
    allow_part = bool(values.pop("allow_part"))
    where, salvage = cast(FilePath, source["in_path"]), source["salvage"]
    paths = _paths(values.pop("inputs", ()))
    select, *selects = _selects(source["select"], 1 + len(paths))
    others = tuple(
        open_checkpoint(path, select=one, salvage=bool(salvage), allow_part=allow_part)
        for path, one in zip(paths, selects, strict=True)
    )
    if not taken["whole"]:
        given = [name for name in NAMES if taken[name] and not (name == "moments" and taken[name] == "zero")]
        if given:
            raise click.UsageError(f"--{given[0].replace('_', '-')} goes with --whole")
        opened = open_checkpoint(where, select=select, salvage=bool(salvage), allow_part=allow_part)
        return Work(out, opened, others=others)
    for name, value in (("--salvage", salvage), ("--max-shard-size", out.max_shard_size), ("--ties", out.ties),
                        ("--with-files", out.with_files)):  # fmt: skip
        if value:
            raise click.UsageError(f"--whole and {name} exclude each other")
    if out.provenance:
        raise click.UsageError("--whole and --provenance exclude each other")
    stated = _stated(cast("str | None", taken["run"]))
    from ..runs.folder import open_run

    run = open_run(where, select=select, stated=stated, in_model_order=bool(taken["in_model_order"]))
    if allow_part:
        run = replace(run, weights=replace(run.weights, part=""))
    without = cast("tuple[str, ...]", taken["without"])
    if without:
        run = run.left_out(without)
    reset = cast("tuple[str, ...]", taken["reset"])
    return Work(out, run, reset, str(taken["moments"]), str(taken["optimizer_keys"] or ""), others)


def _paths(given: object) -> list[FilePath]:
    """The further inputs of a command: none, one or several."""
    return list(cast("tuple[FilePath, ...]", given)) if isinstance(given, tuple) else [cast(FilePath, given)]


def _selects(given: object, count: int) -> list[str | None]:
    """What --select says for each of so many inputs: PATH for all of them, or NUMBER::PATH for one."""
    found: list[str | None] = [None] * count
    numbers = [str(number) for number in range(1, count + 1)]
    asked = [given] if isinstance(given, str) else list(cast("tuple[str, ...]", given or ()))
    for name, path in sorted(parted(one, numbers) for one in asked):
        found = [path] * count if not name else [path if name == number else was
                                                 for number, was in zip(numbers, found, strict=True)]  # fmt: skip
    return found


def _stated(factory: str | None) -> list[str]:
    """The names of the parameters in the order in which a factory's optimizer has them."""
    if factory is None:
        return []
    from ..runs.resume_check import parameter_names

    return parameter_names(factory)
