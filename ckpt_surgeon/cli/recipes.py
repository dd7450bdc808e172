"""Several edits in one pass: edit, apply, recipe."""

from __future__ import annotations

from importlib.metadata import version

import click

from ..edits.recipe import Recipe
from ..errors import OutputExists
from ..files.paths import FilePath
from ..reading.opening import open as open_checkpoint
from ..text import Lines, plural
from . import inline
from .options import FILE_PATH, INPUTS, OUT, SOURCE, output_options
from .terminal import echo
from .whole import whole_options, work_of

_PROVENANCE = click.Option(
    ["--no-provenance"], is_flag=True, help="Do not note the recipe's digest and the version in a safetensors header."
)


class _Ordered(click.Command):
    """A command that remembers the order of its edits, which Click forgets."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        own = super().get_params(ctx)
        return [*own[:3], *inline.options(), *own[3:]]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        _, _, order = self.make_parser(ctx).parse_args(list(args))
        rest = super().parse_args(ctx, args)
        known = {inline.parameter_name(option) for option in inline.forms()}
        ctx.params["order"] = [option.name for option in order if option.name in known]
        return rest


def _edit(order: list[str], no_provenance: bool, **values: object) -> None:
    work = work_of(values)
    given = {option: _given(values[inline.parameter_name(option)]) for option in inline.forms()}
    by_name = {inline.parameter_name(option): option for option in given}
    steps = []
    for name in order:
        option = by_name[name]
        steps.append(inline.step_of(option, given[option].pop(0)))
    if not steps:
        raise click.UsageError("no edit was asked for; to change the container alone, use: ckpt convert")
    recipe = Recipe(tuple(steps))
    work.edit(recipe, metadata=_noted(recipe, no_provenance))


def _given(value: object) -> list[str]:
    if isinstance(value, tuple):
        return [str(item) for item in value]
    return [""] * int(value) if isinstance(value, int) else []


def _noted(recipe: Recipe, declined: bool) -> dict[str, str]:
    """What a safetensors header says of how the file was made."""
    if declined:
        return {}
    return {"ckpt_surgeon.version": version("ckpt_surgeon"), "ckpt_surgeon.recipe": f"sha256:{recipe.digest}"}


edit = _Ordered(
    "edit",
    short_help="Several edits in one pass.",
    params=[SOURCE, INPUTS, OUT, *output_options(several=True), *whole_options(), _PROVENANCE],
    callback=_edit,
    help="""Several edits, in the order given, in one pass over the bytes.

Every edit is an option.  Its value has the edit's main arguments, as the list below shows, and then any others as
NAME=VALUE, each after a space: --pad 'embed.weight after=2 dim=1'.  The arguments are those of the edit's own command.
For what should last, write a recipe file: see ckpt apply.

\b
Example:
  ckpt edit parallel.pth small.safetensors --strip-prefix module. --drop 'fc.*' --cast bf16
  ckpt edit model.pth donor.pth out.pth --strip-prefix 2::module. --graft 'fc.*'

Further checkpoints stand between IN and OUT: 2::KEY is a key of the second one.
""",
)


def _apply(recipe: FilePath, no_provenance: bool, **values: object) -> None:
    loaded = Recipe.load(recipe)
    work_of(values).edit(loaded, metadata=_noted(loaded, no_provenance), job=loaded.digest)


RECIPE = click.Argument(["recipe"], type=FILE_PATH)

apply = click.Command(
    "apply",
    short_help="Run a recipe file.",
    params=[RECIPE, SOURCE, INPUTS, OUT, *output_options(several=True), *whole_options(), _PROVENANCE],
    callback=_apply,
    help="""Run a recipe file: [[edit]] tables with do = 'NAME' and the edit's arguments.

A recipe that names several inputs takes as many checkpoints, in that order, before OUT.

\b
Example:
  ckpt apply recipe.toml old.pth new.safetensors --dry-run
  ckpt apply merge.toml model.pth donor.pth merged.pth
""",
)


@click.group()
def recipe() -> None:
    """Check recipe files (which prints their hash), or invert them."""


@recipe.command()
@click.argument("path", metavar="RECIPE", type=FILE_PATH)
def check(path: FilePath) -> None:
    """Validate a recipe file; problems are told with their line numbers.

    \b
    Example:
      ckpt recipe check recipe.toml
    """
    loaded = Recipe.load(path)
    echo(f"{path}: {plural(len(loaded.steps), 'edit')}, sha256:{loaded.digest}")


@recipe.command()
@click.argument("path", metavar="RECIPE", type=FILE_PATH)
@click.option("--keys", "source", type=FILE_PATH, metavar="IN",
              help="The checkpoint that the recipe is applied to: its keys tell more than the rules.")  # fmt: skip
@click.option("--out", "-o", type=FILE_PATH, help="Write to a file instead of printing.")
@click.option("--force", "-f", is_flag=True, help="Replace an existing file.")
def invert(path: FilePath, source: FilePath | None, out: FilePath | None, force: bool) -> None:
    """Print the recipe that undoes a recipe of renames.

    \b
    Example:
      ckpt recipe invert recipe.toml --keys old.pth -o back.toml
    """
    loaded = Recipe.load(path)
    undone = loaded.invert(open_checkpoint(source) if source else None)
    if out is None:
        echo(Lines(undone.dumps()), nl=False)
        return
    if out.lexists() and not force:
        raise OutputExists(out)
    undone.save(out)


command_of = {"edit": edit, "apply": apply, "recipe": recipe}.get
