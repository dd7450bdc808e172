"""The command that lists: ls."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial

import click

from ..files.paths import FilePath, file_path
from ..reading.listing import ORDERS, Listing
from ..reading.listing import ls as list_checkpoint
from ..report import listings
from ..text import document
from .options import FILE_PATH, SELECT, progress
from .pictures import FORCE, HTML, files_of, refuse_own, refuse_page, write_page
from .terminal import echo


@click.command(short_help="Show what a checkpoint is and holds.")
@click.argument("path", type=FILE_PATH)
@click.argument("patterns", metavar="[PATH|PATTERN]...", nargs=-1)
@click.option(
    "--sort",
    type=click.Choice(ORDERS),
    default="file",
    show_default=True,
    help="Order: as in the file, by name, or the largest first.",
)
@click.option("--tree", "as_tree", is_flag=True, help="Sizes by module and dtype: tensors, parameters, bytes, share.")
@click.option("--depth", type=click.IntRange(0), metavar="N", help="With --tree: levels of modules.  [default: 2]")
@click.option("--fold", "fold_rows", is_flag=True, help="One line for keys that follow a pattern.")
@click.option("--stats", "with_stats", is_flag=True, help="Read the values: mean, std, min, max, NaN, inf, all zero.")
@click.option("--check", is_flag=True, help="Read every byte and compare the checksums.")
@click.option("--training", is_flag=True, help="Show optimizers, the parameter behind each id, schedulers, counters.")
@click.option(
    "--run", metavar="FILE.py:FACTORY", help="With --training: builds (model, optimizer), which tell the ids."
)
@click.option("--in-model-order", is_flag=True, help="With --training: ids count in the order of the model.")
@click.option("--full", is_flag=True, help="With --training: list every pattern of keys.")
@click.option("--all", "with_all", is_flag=True, help="Also list every object that is no tensor.")
@click.option("--salvage", is_flag=True, help="List the tensors that are whole in a truncated file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def ls(
    path: FilePath,
    patterns: tuple[str, ...],
    select: str | None,
    sort: str,
    as_tree: bool,
    depth: int | None,
    fold_rows: bool,
    with_stats: bool,
    check: bool,
    training: bool,
    run: str | None,
    in_model_order: bool,
    full: bool,
    with_all: bool,
    salvage: bool,
    as_json: bool,
    html: FilePath | None,
    force: bool,
) -> None:
    """Show what a checkpoint is and holds: container, nesting, tensors, and what else is inside.

    PATH is a file, an index of shards or a directory.  What follows is another PATH where such a file exists, and is
    listed too; else it is a PATTERN, a glob on the keys of all.

    \b
    Example:
      ckpt ls model.pth
      ckpt ls model.pth '*.bias' --json
      ckpt ls before.pth after.pth --sort size
      ckpt ls model.pth --tree --depth 1
      ckpt ls model.safetensors --stats
      ckpt ls last.ckpt --training
      ckpt ls model.pth --stats --html model.html
    """
    others = [file_path(word) for word in patterns if os.path.exists(word)]
    globs = [word for word in patterns if not os.path.exists(word)]
    refuse_page(html, force=force, beside=[path, *others])
    if training:
        if others or as_tree or sort != "file":
            raise click.UsageError("--training shows one file, without --tree and --sort")
        _show_training(path, select, run, in_model_order, full=full, as_json=as_json, html=html)
        return
    if run or in_model_order or full:
        raise click.UsageError("--run, --in-model-order and --full go with --training")
    for flag, is_given in (("--fold", fold_rows), ("--tree", as_tree)):
        if is_given and with_stats:
            raise click.UsageError(f"{flag} and --stats exclude each other")
    if fold_rows and as_tree:
        raise click.UsageError("--fold and --tree exclude each other")
    if depth is not None and not as_tree:
        raise click.UsageError("--depth goes with --tree")
    listed = partial(list_checkpoint, patterns=globs, select=select, all=with_all, salvage=salvage, sort=sort)
    listed = partial(listed, histograms=html is not None and with_stats)
    found = [_watched(listed, each, check, with_stats) for each in [path, *others]]
    for listing in found:
        refuse_own(html, files_of(listing.tensors))
    if as_tree:
        _show_trees(found, 2 if depth is None else depth, sort, as_json=as_json)
    elif as_json:
        echo(listings.listing_json(found[0]) if not others else listings.listings_json(found))
    else:
        echo(listings.listings_text(found, fold_rows=fold_rows, by_size=sort == "size"))
    if html is not None:
        from ..report.pages.checkpoints import listing_page

        write_page(html, listing_page(found), say=not as_json)


def _watched(listed: Callable[..., Listing], path: FilePath, check: bool, with_stats: bool) -> Listing:
    """The listing of a file; where its values are read on a terminal, with a bar."""
    reads = check + with_stats
    if not reads or not sys.stderr.isatty():
        return listed(path, check=check, stats=with_stats)
    total = sum(part.nbytes for part in listed(path).parts)
    with progress(total * reads, doing="reading") as tell:
        return listed(path, check=check, stats=with_stats, progress=tell)


def _show_trees(found: Sequence[Listing], depth: int, sort: str, *, as_json: bool) -> None:
    """Print the sizes of one file, or of several."""
    from ..reading.sizes import sizes
    from ..report.sizes import sizes_json, sizes_text

    trees = [sizes(listing, depth=depth, sort=sort) for listing in found]
    if as_json:
        echo(sizes_json(trees))
        return
    echo(document(line for tree in trees for line in (["", sizes_text(tree)] if tree is not trees[0] else
                                                      [sizes_text(tree)])))  # fmt: skip


def _show_training(
    path: FilePath,
    select: str | None,
    run: str | None,
    in_model_order: bool,
    *,
    full: bool,
    as_json: bool,
    html: FilePath | None,
) -> None:
    from ..report import trainings
    from ..runs.describe import training_of
    from ..runs.resume_check import parameter_names

    stated = parameter_names(run) if run else ()
    found = training_of(path, select=select, stated=stated, in_model_order=in_model_order)
    echo(trainings.training_json(found) if as_json else trainings.training_text(found, full=full))
    if html is not None:
        from ..report.pages.checkpoints import training_page

        write_page(html, training_page(found), say=not as_json)


ls.params += [SELECT, HTML, FORCE]

command_of = {"ls": ls}.get
