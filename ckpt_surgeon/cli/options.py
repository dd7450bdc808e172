"""Options that several commands share, and the writing that all editing commands end in."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import click

from ..errors import OutputExists
from ..files.paths import FilePath, file_path
from ..files.sinks import Progress
from ..tensors.checkpoint import Checkpoint
from ..text import size_of
from . import torchrun
from .spelling import in_words_of_command
from .terminal import echo, say_done

if TYPE_CHECKING:
    from ..edits.change import Change
    from ..edits.recipe import Recipe
    from ..writing.plan import Plan
    from ..writing.provenance import Origin

Decorated = TypeVar("Decorated", bound=Callable[..., object])

PROGRESS_FROM = 256 << 20  # bytes from which on a copy takes long enough to watch


class FilePathType(click.Path):
    """A path, or a URL that fsspec knows: text until it is one or the other, since Path would cut a URL short."""

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> FilePath:  # type: ignore[override]
        return file_path(str(value))


FILE_PATH = FilePathType()


class Size(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A number of bytes: 5GB, 500MB, 2GiB, 1000."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        nbytes = size_of(str(value))
        if nbytes is None:
            self.fail(f"{value!r} is no size; write it like 5GB, 500MB or 2GiB", param, ctx)
        if nbytes < 1:
            self.fail("a shard needs at least one byte", param, ctx)
        return nbytes


@dataclass(frozen=True, slots=True)
class Output:
    """How a command was asked to write."""

    out: FilePath
    dry_run: bool
    force: bool
    max_shard_size: int | None
    threads: int | None
    quiet: bool
    ties: str | None = None
    no_check: bool = False
    with_files: bool = False
    provenance: bool = False

    def refuse_existing(self) -> None:
        """Raise OutputExists before any work is done, where OUT is in the way of a single file."""
        from ..writing.model_folder import weights_in

        if self.force or self.dry_run or self.max_shard_size or torchrun.count() > 1:
            return
        if (out := weights_in(self.out)).lexists():
            raise OutputExists(out)

    def write(
        self,
        change: Change[Checkpoint],
        *,
        metadata: Mapping[str, str] | None = None,
        say: bool = True,
        job: str = "",
        report: str = "",
        recipe: Recipe | None = None,
        again: Callable[[], Checkpoint] | None = None,
    ) -> None:
        """Plan, then write or, in a dry run, print the plan.

        ``job`` says what the words of the command leave open (a recipe).  ``report`` is printed before what was done,
        and not before the work is done: a command that is refused prints nothing.  With --provenance, ``recipe``
        says what was done, and ``again`` does it once more, to know the hash of the tensors before they are written.
        """
        from ..report import outputs  # not for commands that only look
        from ..writing import write
        from ..writing.plan import COPY, plan

        say = say and torchrun.rank() == 0
        shared = torchrun.count() > 1
        planned = plan(
            change.result,
            self.out,
            force=self.force or self.dry_run or shared,
            max_shard_size=self.max_shard_size,
            ties=self.ties or COPY,
            with_files=self.with_files,
        )
        if self.dry_run:
            if report:
                echo(report)
            if say:
                echo(outputs.plan_text(planned, change))
            return
        made = self._origin(planned, recipe, again) if self.provenance else None
        metadata = {**(metadata or {}), **made.metadata} if made is not None else metadata
        with progress(planned.nbytes, self.quiet or torchrun.rank() > 0) as tell:
            if shared:
                from ..writing import ranks

                asked = " ".join([*sys.argv[1:], job])
                remarks = ranks.write(planned, job=asked, force=self.force, progress=tell, metadata=metadata)
            else:
                remarks = write.write(
                    planned, progress=tell, metadata=metadata, threads=self.threads, check=not self.no_check
                )
        if made is not None:
            from ..writing.provenance import write_statement

            remarks = (*remarks, f"{write_statement(planned, made)} says what it was made of (unsigned)")
        said = map(in_words_of_command, remarks)
        summary = outputs.summary(planned, change, said) if say and not self.quiet else ""
        if report or summary:
            say_done(report, summary)

    def _origin(self, planned: Plan, recipe: Recipe | None, again: Callable[[], Checkpoint] | None) -> Origin:
        """What --provenance notes: known before anything is written."""
        from importlib.metadata import version

        from ..edits.recipe import Recipe
        from ..writing import provenance
        from ..writing.plan import COPY, plan

        if torchrun.count() > 1:
            raise click.UsageError("--provenance goes with one process")
        provenance.refuse_existing(planned, force=self.force)
        fresh = planned
        if again is not None:
            fresh = plan(again(), self.out, force=True, max_shard_size=self.max_shard_size, ties=self.ties or COPY)
        done = recipe or Recipe()
        return provenance.origin(fresh, done.dumps(), done.digest, version("ckpt_surgeon"))


SELECT = click.Option(
    ["--select"], metavar="PATH", help="Dotted path of the state_dict to take, where IN holds several."
)
SELECTS = click.Option(
    ["--select"], multiple=True, metavar="PATH",
    help="Dotted path of the state_dict to take, in every input; 2::PATH for the second alone (repeatable).",
)  # fmt: skip
SOURCE = click.Argument(["in_path"], metavar="IN", type=FILE_PATH)
INPUTS = click.Argument(["inputs"], metavar="[IN2]...", type=FILE_PATH, nargs=-1)
OUT = click.Argument(["out"], type=FILE_PATH)
# What may not be there; kept as it was typed, since it may be a pair of `rename --in-place`.
OPTIONAL_OUT = click.Argument(["out"], type=click.Path(), required=False)
STAY = click.Option(["--in-place"], is_flag=True, help="Rename in IN itself, without OUT; nothing else changes.")


def output_options(*, several: bool = False) -> list[click.Option]:
    """The options of every command that writes; :func:`output` takes their values.  ``several`` inputs are read."""
    return [
        SELECTS if several else SELECT,
        click.Option(["--salvage"], is_flag=True, help="Take the tensors that are whole in a truncated file."),
        click.Option(["--allow-part"], is_flag=True, help="Take one rank's part of a model as if it were whole."),
        click.Option(["--no-check"], is_flag=True, help="Do not compare checksums of what is copied as it is."),
        click.Option(["--dry-run", "-n"], is_flag=True, help="Print what would be written, write nothing."),
        click.Option(["--force", "-f"], is_flag=True, help="Replace an existing OUT; OUT may be IN."),
        click.Option(
            ["--max-shard-size"], type=Size(), metavar="SIZE", help="Write shards of SIZE (5GB) and an index."
        ),
        click.Option(
            ["--with-files"],
            is_flag=True,
            help="Copy config, tokenizer … from beside IN's weights, where OUT is a folder.",
        ),
        click.Option(
            ["--ties"],
            type=click.Choice(("copy", "alias")),
            help="Keys of one tensor in .safetensors: the bytes under each, or notes as the hub's.  [default: copy]",
        ),
        click.Option(
            ["--threads"],
            type=click.IntRange(1),
            help="Shards written at the same time.  [default: one a core, up to 8]",
        ),
        click.Option(
            ["--provenance"],
            is_flag=True,
            help="Note recipe, sources and hashes in a safetensors header, and in a statement beside OUT.",
        ),
        click.Option(["--quiet", "-q"], is_flag=True, help="Print nothing unless something is wrong."),
    ]


def output(values: dict[str, object]) -> Output:
    """Take the values of :func:`output_options` out of a command's parameters."""
    taken = {
        name: values.pop(name)
        for name in (
            "out",
            "dry_run",
            "force",
            "max_shard_size",
            "threads",
            "quiet",
            "ties",
            "no_check",
            "with_files",
            "provenance",
        )
    }
    taken["out"] = file_path(str(taken["out"])) if isinstance(taken["out"], str) else taken["out"]
    return Output(**taken)  # type: ignore[arg-type]


@contextmanager
def progress(total: int, quiet: bool = False, *, doing: str = "writing") -> Iterator[Progress | None]:
    """A bar on a terminal for work that takes a while, else nothing."""
    if quiet or total < PROGRESS_FROM or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc=doing, leave=False) as bar:
        yield bar.update
