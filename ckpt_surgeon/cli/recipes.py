"""Several edits in one pass: edit, apply, recipe."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version

import click

from ..edits.recipe import Recipe, Step, step
from ..errors import OutputExists
from ..files.paths import FilePath
from ..reading.opening import open as open_checkpoint
from ..text import plural
from .options import FILE_PATH, OUT, SOURCE, output, output_options


def _pair(text: str, what: str) -> tuple[str, str]:
    left, equals, right = text.partition("=")
    if not equals or not left:
        raise click.UsageError(f"{text!r} is not of the form {what}")
    return left, right


def _numbers(text: str, what: str, separator: str = ",") -> list[int]:
    try:
        return [int(part) for part in text.split(separator)]
    except ValueError:
        raise click.UsageError(f"{text!r} is not of the form {what}") from None


def _reshape(text: str) -> Step:
    key, shape = _pair(text, "KEY=N,N,…")
    return step("reshape", patterns=key, shape=_numbers(shape, "N,N,…"))


def _slice(text: str) -> Step:
    key, ends = _pair(text, "KEY=START:STOP")
    numbers = _numbers(ends, "START:STOP", ":")
    if len(numbers) != 2:
        raise click.UsageError(f"{ends!r} is not of the form START:STOP")
    return step("slice", patterns=key, start=numbers[0], stop=numbers[1])


def _scale(text: str) -> Step:
    key, factor = _pair(text, "KEY=FACTOR")
    try:
        return step("scale", patterns=key, factor=float(factor))
    except ValueError:
        raise click.UsageError(f"{factor!r} is no number") from None


def _concat(text: str) -> Step:
    sources, into = _pair(text, "KEY,KEY,…=KEY")
    return step("concat", sources=sources.split(","), into=into)


def _split(text: str) -> Step:
    source, into = _pair(text, "KEY=KEY,KEY,…")
    return step("split", source=source, into=into.split(","))


# The edits of one command line: option, metavar ("" for a flag), help, and the step for a value.
SHORT: tuple[tuple[str, str, str, Callable[[str], Step]], ...] = (
    ("--strip-prefix", "PREFIX", "Take a prefix off the keys.", lambda text: step("strip_prefix", prefix=text)),
    ("--strip-wrappers", "", "Peel every known wrapper.", lambda _: step("strip_prefix", wrappers=True)),
    ("--add-prefix", "PREFIX", "Put a prefix in front of the keys.", lambda text: step("add_prefix", prefix=text)),
    ("--rename", "OLD=NEW", "Rename components.", lambda text: step("rename", pairs=[text])),
    ("--rename-regex", "OLD=NEW", "Rename by a regular expression.",
     lambda text: step("rename", pairs=[text], regex=True)),
    ("--keep", "GLOB", "Keep these keys only.", lambda text: step("keep", patterns=text)),
    ("--drop", "GLOB", "Drop these keys.", lambda text: step("drop", patterns=text)),
    ("--drop-derivable", "", "Drop the buffers that models make themselves.", lambda _: step("drop", derivable=True)),
    ("--select-prefix", "PREFIX", "Take one sub-tree, its prefix stripped.",
     lambda text: step("select", prefix=text)),
    ("--cast", "DTYPE", "Convert floating-point tensors.", lambda text: step("cast", dtype=text)),
    ("--reshape", "KEY=N,N", "Give tensors another shape.", _reshape),
    ("--transpose", "KEY", "Swap the dimensions of matrices.", lambda text: step("transpose", patterns=text)),
    ("--slice", "KEY=A:B", "Take indices of dimension 0.", _slice),
    ("--scale", "KEY=X", "Multiply by a factor.", _scale),
    ("--concat", "KEY,KEY=KEY", "Join tensors along dimension 0.", _concat),
    ("--split", "KEY=KEY,KEY", "Take tensors apart along dimension 0.", _split),
    ("--fold", "", "Fold weight norm, spectral norm, masks.", lambda _: step("fold")),
)  # fmt: skip
_STEPS = {option: make for option, _, _, make in SHORT}
_PROVENANCE = click.Option(
    ["--no-provenance"], is_flag=True, help="Do not note the recipe's digest and the version in a safetensors header."
)


class _Ordered(click.Command):
    """A command that remembers the order of its edits, which Click forgets."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        _, _, order = self.make_parser(ctx).parse_args(list(args))
        rest = super().parse_args(ctx, args)
        ctx.params["order"] = [option.opts[0] for option in order if option.opts[0] in _STEPS]
        return rest


def _edit(
    in_path: FilePath, select: str | None, salvage: bool, order: list[str], no_provenance: bool, **values: object
) -> None:
    written = output(values)
    steps = []
    waiting = {option: list(_given(values[_parameter(option)])) for option in dict.fromkeys(order)}
    for option in order:
        steps.append(_STEPS[option](waiting[option].pop(0)))
    if not steps:
        raise click.UsageError("no edit was asked for; to change the container alone, use: ckpt convert")
    recipe = Recipe(tuple(steps))
    written.write(
        recipe.plan(open_checkpoint(in_path, select=select, salvage=salvage)), metadata=_noted(recipe, no_provenance)
    )


def _given(value: object) -> list[str]:
    if isinstance(value, tuple):
        return [str(one) for one in value]
    return [""] * int(value) if isinstance(value, int) else []


def _parameter(option: str) -> str:
    return "edit_" + option.removeprefix("--").replace("-", "_")


def _noted(recipe: Recipe, declined: bool) -> dict[str, str]:
    """What a safetensors header says of how the file was made."""
    if declined:
        return {}
    return {"ckpt_surgeon.version": version("ckpt_surgeon"), "ckpt_surgeon.recipe": f"sha256:{recipe.digest}"}


def _short_options() -> list[click.Option]:
    return [
        click.Option([option, _parameter(option)], multiple=True, metavar=metavar, help=said)
        if metavar
        else click.Option([option, _parameter(option)], count=True, help=said)
        for option, metavar, said, _ in SHORT
    ]


edit = _Ordered(
    "edit",
    short_help="Several edits in one pass.",
    params=[SOURCE, OUT, *_short_options(), *output_options(), _PROVENANCE],
    callback=_edit,
    help="""Several edits, in the order given, in one pass over the bytes.

For what should last, write a recipe file: see ckpt apply.

\b
Example:
  ckpt edit parallel.pth small.safetensors --strip-prefix module. --drop 'fc.*' --cast bf16
""",
)


def _apply(
    recipe: FilePath, in_path: FilePath, select: str | None, salvage: bool, no_provenance: bool, **values: object
) -> None:
    written = output(values)
    loaded = Recipe.load(recipe)
    written.write(
        loaded.plan(open_checkpoint(in_path, select=select, salvage=salvage)),
        metadata=_noted(loaded, no_provenance),
        job=loaded.digest,
    )


RECIPE = click.Argument(["recipe"], type=FILE_PATH)

apply = click.Command(
    "apply",
    short_help="Run a recipe file.",
    params=[RECIPE, SOURCE, OUT, *output_options(), _PROVENANCE],
    callback=_apply,
    help="""Run a recipe file: [[edit]] tables with do = 'NAME' and the edit's arguments.

\b
Example:
  ckpt apply recipe.toml old.pth new.safetensors --dry-run
""",
)


@click.group()
def recipe() -> None:
    """Check, invert and hash recipe files."""


@recipe.command()
@click.argument("path", metavar="RECIPE", type=FILE_PATH)
def check(path: FilePath) -> None:
    """Validate a recipe file; problems are told with their line numbers.

    \b
    Example:
      ckpt recipe check recipe.toml
    """
    loaded = Recipe.load(path)
    click.echo(f"{path}: {plural(len(loaded.steps), 'edit')}, sha256:{loaded.digest}")


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
        click.echo(undone.dumps(), nl=False)
        return
    if out.lexists() and not force:
        raise OutputExists(out)
    undone.save(out)


COMMANDS = {"edit": edit, "apply": apply, "recipe": recipe}
