"""The command line: parse, one library call, report, exit status.

Exit statuses: 0 done (diff: strictly loadable), 1 differs, 2 trouble (one line on stderr says what).
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, ParamSpec, TypeVar

import click

from . import edits, report, writing
from .diff import diff as compare
from .errors import CheckpointError
from .listing import ls as list_checkpoint
from .opening import open as open_checkpoint

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .diff import Shaped

P = ParamSpec("P")
R = TypeVar("R")

PROGRESS_FROM = 256 << 20  # bytes from which on a copy takes long enough to watch

EPILOG = "Exit status: 0 done, 1 differs, 2 trouble."


@contextmanager
def _termination_unwinds() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the stack, so that temporary files go."""

    def stop(number: int, _frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), stop)
    yield


def main() -> None:
    """Run the command line; every foreseen trouble is one line and exit status 2."""
    with _termination_unwinds():
        try:
            code = cli(standalone_mode=False)
        except click.ClickException as error:
            error.show()
            code = error.exit_code
        except click.Abort:
            click.echo("ckpt: interrupted, nothing was written", err=True)
            code = 130
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 141
        except CheckpointError as error:
            click.echo(f"ckpt: {report.visible(str(error))}", err=True)
            code = 2
        except MemoryError:
            click.echo("ckpt: not enough memory", err=True)
            code = 2
    sys.exit(code if isinstance(code, int) else 0)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}, epilog=EPILOG)
@click.version_option(package_name="ckpt_surgeon", prog_name="ckpt")
def cli() -> None:
    """Checkpoint surgery: look into PyTorch checkpoints, compare them with models, edit their keys, write them clean.

    Nothing in a checkpoint is ever run, and no tensor passes through memory unless its values change.

    \b
    Example:
      ckpt ls model.pth
      ckpt diff model.pth 'torchvision.models:resnet18(num_classes=10)'
      ckpt strip-prefix model.pth clean.pth
    """


# -- shared options


def _select(function: Callable[P, R]) -> Callable[P, R]:
    return click.option(
        "--select", metavar="PATH", help="Dotted path of the state_dict to take, where the file holds several."
    )(function)


def _output(function: Callable[P, R]) -> Callable[P, R]:
    """The options of every command that writes."""
    for option in (
        click.option("--quiet", "-q", is_flag=True, help="Print nothing unless something is wrong."),
        click.option(
            "--max-shard-size", type=Size(), metavar="SIZE", help="Write shards of at most SIZE (5GB) and an index."
        ),
        click.option("--force", "-f", is_flag=True, help="Replace an existing OUT; OUT may be IN."),
        click.option("--dry-run", "-n", is_flag=True, help="Print what would be written, write nothing."),
        click.argument("out", type=click.Path(path_type=Path)),
        click.argument("source", metavar="IN", type=click.Path(path_type=Path)),
    ):
        function = option(function)
    return _select(function)


class Size(click.ParamType):  # type: ignore[type-arg]
    """A number of bytes: 5GB, 500MB, 2GiB, 1000."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", str(value).strip(), re.IGNORECASE)
        if found is None:
            self.fail(f"{value!r} is no size; write it like 5GB, 500MB or 2GiB", param, ctx)
        power = " kmgt".index(found[2].lower() or " ")
        nbytes = int(float(found[1]) * (1024 if found[3] else 1000) ** power)
        if nbytes < 1:
            self.fail("a shard needs at least one byte", param, ctx)
        return nbytes


# -- looking


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("patterns", metavar="[PATTERN]...", nargs=-1)
@_select
@click.option("--fold", "fold_rows", is_flag=True, help="One line for keys that follow a pattern.")
@click.option("--check", is_flag=True, help="Read every byte and compare the checksums.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def ls(path: Path, patterns: tuple[str, ...], select: str | None, fold_rows: bool, check: bool, as_json: bool) -> None:
    """Show what a checkpoint is and holds: container, nesting, tensors, and what else is inside.

    PATH is a file, an index of shards or a directory; PATTERNs are globs on the keys.

    \b
    Example:
      ckpt ls model.pth
      ckpt ls model.pth '*.bias' --json
    """
    listing = list_checkpoint(path, patterns, select=select, check=check)
    click.echo(report.listing_json(listing) if as_json else report.listing_text(listing, fold_rows=fold_rows))


@cli.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("target")
@_select
@click.option("--target-select", metavar="PATH", help="The same for TARGET, where that is a checkpoint.")
@click.option("--full", is_flag=True, help="List every key, however many.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def diff(
    context: click.Context,
    checkpoint: Path,
    target: str,
    select: str | None,
    target_select: str | None,
    full: bool,
    as_json: bool,
) -> None:
    """Compare a checkpoint's keys, shapes and dtypes with a model or another checkpoint.

    TARGET is a checkpoint, or a model as package.module:factory or path/file.py:factory, with literal arguments.
    Naming a model imports and runs that code of yours, on the meta device where it allows; a checkpoint runs
    nothing.

    Exit status: 0 when load_state_dict(strict=True) would accept the checkpoint, 1 when not, 2 on trouble.

    \b
    Example:
      ckpt diff model.pth 'torchvision.models:resnet18(num_classes=10)'
      ckpt diff old.safetensors new.safetensors --json
    """
    from . import targets

    ours = open_checkpoint(checkpoint, select=select)
    theirs: dict[str, Shaped] | Checkpoint
    if targets.is_model(target):
        theirs = dict(targets.resolve(target))
    else:
        theirs = open_checkpoint(target, select=target_select)
    found = compare(ours, theirs)
    fix = ""
    if found.hint is not None:
        name, *options = found.hint.command
        chosen = ["--select", select] if select else []
        stem = "clean" if checkpoint.stem != "clean" else "cleaner"
        fix = report.command(name, checkpoint, f"{stem}{checkpoint.suffix or '.safetensors'}", *options, *chosen)
    if as_json:
        click.echo(report.diff_json(found, fix))
    else:
        click.echo(report.diff_text(found, checkpoint.name, _short(target), hint=fix, full=full))
    context.exit(0 if found.loadable else 1)


def _short(target: str) -> str:
    """How a table's heading calls a target."""
    return target.rpartition(":")[2] if ":" in target else Path(target).name


# -- editing


@cli.command("strip-prefix")
@_output
@click.option("--prefix", multiple=True, metavar="PREFIX", help="A prefix to strip (repeatable).  [default: module.]")
@click.option("--wrappers", is_flag=True, help="Peel every known wrapper (module, _orig_mod …), anywhere in the keys.")
@click.option("--allow-unmatched", is_flag=True, help="A prefix that no key carries is no error.")
def strip_prefix(
    source: Path,
    out: Path,
    prefix: tuple[str, ...],
    wrappers: bool,
    allow_unmatched: bool,
    select: str | None,
    **how: object,
) -> None:
    """Take the prefix of a wrapper (module., _orig_mod. …) off all keys.

    Whole path components only, as often as they repeat.  Two keys that would become one are an error.

    \b
    Example:
      ckpt strip-prefix parallel.pth clean.pth
      ckpt strip-prefix compiled.pth clean.safetensors --wrappers
    """
    if wrappers and prefix:
        raise click.UsageError("--wrappers and --prefix exclude each other")
    checkpoint = open_checkpoint(source, select=select)
    renaming = edits.plan_strip_prefix(
        checkpoint, prefix or "module.", wrappers=wrappers, allow_unmatched=allow_unmatched
    )
    _write(checkpoint, renaming, out, **how)  # type: ignore[arg-type]


@cli.command("add-prefix")
@_output
@click.option("--prefix", required=True, metavar="PREFIX", help="What to put in front of every key.")
def add_prefix(source: Path, out: Path, prefix: str, select: str | None, **how: object) -> None:
    """Put a prefix in front of all keys.

    \b
    Example:
      ckpt add-prefix backbone.pth wrapped.pth --prefix model.
    """
    checkpoint = open_checkpoint(source, select=select)
    _write(checkpoint, edits.plan_add_prefix(checkpoint, prefix), out, **how)  # type: ignore[arg-type]


@cli.command()
@_output
def convert(source: Path, out: Path, select: str | None, **how: object) -> None:
    """Write any checkpoint as .pth or .safetensors, by OUT's extension; only the weights, all on the cpu.

    \b
    Example:
      ckpt convert training.ckpt model.safetensors
      ckpt convert model.safetensors model.pth
      ckpt convert big.pth big.safetensors --max-shard-size 5GB
    """
    checkpoint = open_checkpoint(source, select=select)
    _write(checkpoint, edits.checked({key: key for key in checkpoint}), out, **how)  # type: ignore[arg-type]


def _write(
    checkpoint: Checkpoint,
    renaming: edits.Renaming,
    out: Path,
    *,
    dry_run: bool,
    force: bool,
    max_shard_size: int | None,
    quiet: bool,
) -> None:
    """Plan, and either say so or do it."""
    edited = edits.apply(checkpoint, renaming)
    planned = writing.plan(edited, out, force=force or dry_run, max_shard_size=max_shard_size)
    before = writing.source_bytes(checkpoint)
    if dry_run:
        click.echo(report.plan_text(planned, renaming, before))
        return
    with _progress(planned.nbytes, quiet) as tell:
        writing.write(planned, progress=tell)
    if not quiet:
        after = sum(file.path.stat().st_size for file in planned.files)
        click.echo(report.summary(planned, renaming, before, after))


@contextmanager
def _progress(total: int, quiet: bool) -> Iterator[writing.Progress | None]:
    """A bar on a terminal for work that takes a while, else nothing."""
    if quiet or total < PROGRESS_FROM or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc="writing", leave=False) as bar:
        yield bar.update
