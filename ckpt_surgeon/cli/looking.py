"""Commands that look: diff, hash, scan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import NothingMatched, TargetError
from ..files.paths import FilePath, file_path
from ..reading.opening import open as open_checkpoint
from ..report import listings
from ..text import command
from .options import FILE_PATH, SELECT, progress
from .pictures import FORCE, HTML, files_of, refuse_own, refuse_page, write_page
from .terminal import echo

SORTS = ("rel", "abs", "cos")  # of compare, which is imported where values are compared

if TYPE_CHECKING:
    import torch

    from ..tensors.checkpoint import Checkpoint
    from ..tensors.records import Shaped


@click.command(short_help="Compare with a model or a checkpoint.")
@click.argument("checkpoint", type=FILE_PATH)
@click.argument("target")
@click.argument("patterns", metavar="[PATTERN]...", nargs=-1)
@click.option("--target-select", metavar="PATH", help="The same for TARGET, where that is a checkpoint.")
@click.option("--strip-prefix", "prefixes", multiple=True, metavar="PREFIX", help="Take it off, on either side.")
@click.option("--values", is_flag=True, help="Compare the values of two checkpoints.")
@click.option("--tolerance", type=float, default=0.0, metavar="X", help="With --values: differences up to X are close.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    type=FILE_PATH,
    help="With --values: an adapter that was merged into CHECKPOINT to make TARGET (repeatable).",
)
@click.option("--scale", type=float, default=1.0, metavar="X", help="With --adapter: the scale it was merged with.")
@click.option("--alpha", type=float, default=0.0, metavar="X", help="With --adapter: its alpha, where it states none.")
@click.option(
    "--relative-tolerance",
    type=float,
    default=0.0,
    metavar="X",
    help="With --values: tensors with |a - b| up to X times |a| are close.",
)
@click.option(
    "--sort",
    type=click.Choice(SORTS),
    help="With --values: what is first, the greatest relative or absolute change, or the least cosine.  [default: rel]",
)
@click.option(
    "--by",
    type=click.Choice(("key", "layer")),
    help="With --values: a row for each key, or for each layer with all of its changed parameters.  [default: key]",
)
@click.option(
    "--spectrum",
    is_flag=True,
    help="With --values: singular values of the differences of matrices: stable "
    "and effective rank, and changes of a low rank.",
)
@click.option("--full", is_flag=True, help="List every key, however many.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def diff(
    context: click.Context,
    checkpoint: FilePath,
    target: str,
    patterns: tuple[str, ...],
    select: str | None,
    target_select: str | None,
    prefixes: tuple[str, ...],
    values: bool,
    tolerance: float,
    adapters: tuple[FilePath, ...],
    scale: float,
    alpha: float,
    relative_tolerance: float,
    sort: str | None,
    by: str | None,
    spectrum: bool,
    full: bool,
    as_json: bool,
    html: FilePath | None,
    force: bool,
) -> None:
    """Compare a checkpoint's keys, shapes and dtypes with a model or another checkpoint; or two checkpoints' values.

    TARGET is a checkpoint, or a model as package.module:factory or path/file.py:factory, with literal arguments; as
    timm:NAME or torchvision:NAME; or as hf:FOLDER, for a folder with a config.json of transformers.  Naming a model
    imports and runs that code, on the meta device where it allows; a checkpoint runs nothing.

    With --values, PATTERNs are globs on the keys that are compared; buffers are listed apart, and what kind of change
    the values show is named: cast, scaled, sparse, with --spectrum of a low rank, or all.

    Exit status: 0 when load_state_dict(strict=True) would accept the checkpoint (with --values: when no value
    differs beyond the tolerance), 1 when not, 2 on trouble.

    \b
    Example:
      ckpt diff model.pth 'torchvision:resnet18(num_classes=10)'
      ckpt diff old.safetensors new.safetensors --json
      ckpt diff before.pth after.pth --values --tolerance 1e-6
      ckpt diff base.safetensors merged.safetensors --values --adapter adapter.safetensors --alpha 16
      ckpt diff before.pth after.pth 'layers.*' --values --by layer --sort abs
      ckpt diff before.pth after.pth --values --html drift.html
    """
    from ..models import targets
    from ..models.diff import diff as compare
    from ..report import differences

    if adapters and not values:
        raise click.UsageError("--adapter goes with --values")
    if not values and (patterns or relative_tolerance or sort or by or spectrum or tolerance):
        raise click.UsageError("PATTERNs, tolerances, --sort, --by and --spectrum go with --values")
    refuse_page(html, force=force, beside=[checkpoint, target, *adapters])
    ours = open_checkpoint(checkpoint, select=select)
    refuse_own(html, files_of(ours))
    if targets.is_model(target):
        if values:
            raise click.UsageError("--values compares two checkpoints; a model has no values of its own")
        theirs: Mapping[str, Shaped] | torch.nn.Module = targets.build(target)
    elif target.endswith(".py") and Path(target).is_file():
        raise TargetError(target, "is Python source", remedy=f"name what makes the model: {target}:NAME")
    else:
        targets.refuse_misspelled(target)
        theirs = open_checkpoint(target, select=target_select)
        refuse_own(html, files_of(theirs))
    for prefix in prefixes:
        if not isinstance(theirs, Mapping):
            theirs = targets.expected(theirs)
        ours, theirs = _stripped(ours, theirs, prefix)
    if values:
        from ..reading.comparing import compare as compare_values
        from ..report.values import values_json, values_text

        with progress(ours.nbytes, doing="comparing") as tell:
            found_values = compare_values(
                ours,
                theirs,
                patterns,
                tolerance=tolerance,
                relative_tolerance=relative_tolerance,
                sort=sort or "rel",
                spectra=spectrum,
                histograms=html is not None,
                adapters=adapters,
                scale=(scale,),
                alpha=alpha,
                progress=tell,
            )
        echo(
            values_json(found_values)
            if as_json
            else values_text(found_values, full=full, by_layer=by == "layer", sort=sort or "rel")
        )
        if html is not None:
            from ..report.pages.comparisons import values_page

            write_page(html, values_page(found_values), say=not as_json)
        context.exit(0 if found_values.same else 1)
    found = compare(ours, theirs)
    fix = ""
    if found.hint is not None:
        fix = _pasteable(found.hint.command, checkpoint, target, select)
    if as_json:
        echo(differences.diff_json(found, fix))
    else:
        is_checkpoint = not targets.is_model(target)
        ours_name, theirs_name = checkpoint.name, _short(target)
        echo(differences.diff_text(found, ours_name, theirs_name, hint=fix, full=full, has_values=is_checkpoint))
    if html is not None:
        from ..report.pages.comparisons import diff_page

        named = replace(found, names=(checkpoint.name, _short(target)))
        write_page(html, diff_page(named, command=fix), say=not as_json)
    context.exit(0 if found.loadable else 1)


def _pasteable(hint: tuple[str, ...], checkpoint: FilePath, target: str, select: str | None) -> str:
    """A hint as a command line that can be pasted."""
    name, *options = hint
    chosen = ["--select", select] if select else []
    if name == "align":
        return command(name, checkpoint, target, "-o", "recipe.toml", "--min-certainty", "certain", *chosen)
    stem = "clean" if checkpoint.stem != "clean" else "cleaner"
    suffix = ".pth" if checkpoint.suffix == ".tar" else checkpoint.suffix or ".safetensors"
    return command(name, checkpoint, stem + suffix, *options, *chosen)


def _stripped(ours: Checkpoint, theirs: Mapping[str, Shaped], prefix: str) -> tuple[Checkpoint, Mapping[str, Shaped]]:
    """Take a prefix off the side or sides that carry it.  Raises NothingMatched when neither does."""
    from ..edits.keys import strip_prefix

    mine, other = strip_prefix(ours, prefix, allow_unmatched=True), strip_prefix(theirs, prefix, allow_unmatched=True)
    if list(mine) == list(ours) and list(other) == list(theirs):
        raise NothingMatched([prefix], what="prefix", examples=ours)
    return mine, other


def _short(target: str) -> str:
    """How a table's heading calls a target."""
    from ..models import targets

    return target.rpartition(":")[2] if targets.is_model(target) else file_path(target).name


@click.command(short_help="Print hashes of the values.")
@click.argument("path", type=FILE_PATH)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--quiet", "-q", is_flag=True, help="Print the whole's hash alone.")
def hash(path: FilePath, select: str | None, as_json: bool, quiet: bool) -> None:
    """Print SHA-256 hashes, per tensor and whole, that depend on keys and values only.

    The container, the order of the keys, strides and shards make no difference.

    \b
    Example:
      ckpt hash model.pth
      ckpt hash model.safetensors --json
    """
    from ..reading.comparing import hash as hash_checkpoint
    from ..report import differences

    checkpoint = open_checkpoint(path, select=select)
    with progress(checkpoint.nbytes, doing="hashing") as tell:
        found = hash_checkpoint(checkpoint, progress=tell)
    if quiet:
        echo(found.whole)
    else:
        echo(differences.hashes_json(found) if as_json else differences.hashes_text(found))


@click.command(short_help="List the names that a pickle mentions.")
@click.argument("path", type=FILE_PATH)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def scan(context: click.Context, path: FilePath, as_json: bool) -> None:
    """List every class and function that the file's pickles name, and what a full torch.load would do with it.

    ckpt itself never imports or calls any of them.  This is a reader's report, not a malware scanner: it says what is
    named, not what that does.

    Exit status: 0 when all of it is plainly data, 1 when not, 2 on trouble.

    \b
    Example:
      ckpt scan downloaded.pth
    """
    from ..reading.scanning import scan as scan_checkpoint

    found = scan_checkpoint(path)
    echo(listings.scan_json(found) if as_json else listings.scan_text(found))
    context.exit(1 if found.suspects else 0)


for _command in (diff, hash):
    _command.params.append(SELECT)
diff.params += [HTML, FORCE]

command_of = {"diff": diff, "hash": hash, "scan": scan}.get
