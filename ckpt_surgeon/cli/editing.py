"""One command for each edit, made from what the edit declares; and convert and recover."""

from __future__ import annotations

import inspect
import re
from typing import cast

import click

from ..edits import change, recipe
from ..edits.arguments import INPUTS, NUMBERS, PAIRS, PATTERNS, TRUTH, Argument, Kind
from ..edits.change import Edit
from ..errors import FileError
from ..files import journal
from ..files.local import LocalPath
from ..files.paths import FilePath
from ..formats import registry
from ..report import outputs
from ..writing import in_place
from . import torchrun
from .options import FILE_PATH, OPTIONAL_OUT, OUT, SOURCE, STAY, output_options
from .terminal import echo, say_done
from .whole import NAMES, whole_options, work_of

POSITIONAL = ("patterns", "pairs")  # arguments that stand behind IN and OUT, not behind a flag


class Text(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """An argument of an edit, as its kind reads it from text."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.name = kind.title

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:
        if not isinstance(value, str):
            return value
        try:
            return self.kind.from_text(value)
        except ValueError as error:
            self.fail(str(error) or f"{value!r} is not {self.kind.title}", param, ctx)


def metavar_of(argument: Argument) -> str:
    """What stands for an argument's value in a help text."""
    return (
        argument.name.upper() if argument.kind.metavar == "TEXT" or argument.name == "prefix" else argument.kind.metavar
    )


def option_of(edit: Edit[...], argument: Argument) -> click.Parameter:
    """The option or the positional argument for one argument of an edit."""
    name, kind, text = argument.name, argument.kind, argument.help
    if name in POSITIONAL:
        return click.Argument([name], nargs=-1, metavar="[OLD=NEW]..." if kind is PAIRS else "[PATTERN]...")
    flags = ["--" + name.replace("_", "-"), name]
    if kind is TRUTH:
        return click.Option(flags, is_flag=True, help=text)
    if not argument.is_required and argument.default not in ((), ""):
        text += f"  [default: {argument.default}]"
    if kind is NUMBERS:
        return click.Option(flags, multiple=True, type=(str, int), metavar=kind.metavar, help=_repeatable(text))
    if kind is PAIRS:
        return click.Option(flags, multiple=True, metavar=kind.metavar, help=_repeatable(text))
    if kind is PATTERNS:
        return click.Option(
            flags, multiple=True, metavar=metavar_of(argument), required=argument.is_required, help=_repeatable(text)
        )
    if kind.choices:
        return click.Option(flags, type=click.Choice(kind.choices), required=argument.is_required, help=text)
    return click.Option(flags, type=Text(kind), metavar=metavar_of(argument), required=argument.is_required, help=text)


def _repeatable(text: str) -> str:
    """The help of an option that can be given several times."""
    first, dot, rest = text.partition(".")
    return f"{first} (repeatable){dot}{rest}"


def _inputs_of(edit: Edit[...]) -> list[click.Parameter]:
    """What stands between IN and OUT: the other checkpoints that an edit takes."""
    if not edit.inputs:
        return []
    [argument] = edit.inputs.values()
    several = argument.kind is INPUTS
    metavar = "IN2 [IN3]..." if several else argument.name.upper()
    return [click.Argument(["inputs"], type=FILE_PATH, nargs=-1 if several else 1, metavar=metavar, required=True)]


def _command(name: str) -> click.Command:
    """The command for one edit."""
    found = change.EDITS[name]
    options = [option_of(found, argument) for argument in found.arguments.values() if not argument.is_input]
    arguments = [option for option in options if isinstance(option, click.Argument)]
    others = [option for option in options if isinstance(option, click.Option)]
    if arguments:
        others.insert(0, click.Option(["--from", "from_file"], type=FILE_PATH, metavar="FILE",
                                      help="Read more of them from a file, one a line."))  # fmt: skip

    can_stay = found.declaration.only_renames

    def run(from_file: FilePath | None = None, in_place: bool = False, **values: object) -> None:
        if from_file is not None:
            _extend(values, from_file)
        if in_place:
            _run_in_place(name, values)
            return
        if values["out"] is None:
            raise click.UsageError("Missing argument 'OUT'; give it, or --in-place.")
        work = work_of(values)
        work.edit(recipe.Recipe((_step(name, values),)) if work.others else _step(name, values))

    shown = "\n".join(f"  ckpt {found.name} {example}" for example in found.declaration.examples)
    return click.Command(
        found.name,
        params=[
            SOURCE,
            *_inputs_of(found),
            OUT if not can_stay else OPTIONAL_OUT,
            *arguments,
            *others,
            *([STAY] if can_stay else []),
            *output_options(several=bool(found.inputs)),
            *whole_options(),
        ],
        callback=run,
        short_help=found.declaration.short_help,
        help=f"{description(found)}\n\n\b\nExample:\n{shown}",
    )


def _step(name: str, values: dict[str, object]) -> recipe.Step:
    return recipe.step(name, **{key: value for key, value in values.items() if value not in (None, ())})


def _run_in_place(name: str, values: dict[str, object]) -> None:
    """Rename in IN itself; what stands where OUT would is the first pair of ``rename``, or one too many."""
    taken = {option: values.pop(option) for option in ("in_path", "out", "select", "dry_run", "quiet")}
    whole = {option: values.pop(option) for option in NAMES}
    refused = [
        option
        for option in (
            "force",
            "salvage",
            "allow_part",
            "max_shard_size",
            "threads",
            "ties",
            "no_check",
            "with_files",
            "provenance",
        )
        if values.pop(option)
    ]
    refused += [option for option in ("without", "reset", "run", "optimizer_keys") if whole[option]]
    if refused:
        raise click.UsageError(f"--in-place and --{refused[0].replace('_', '-')} exclude each other")
    if taken["out"] is not None:
        given = values.get("pairs")
        if not isinstance(given, tuple) or "=" not in str(taken["out"]):
            raise click.UsageError("--in-place changes IN itself: give OUT or --in-place, not both")
        values["pairs"] = (taken["out"], *given)
    if torchrun.rank() > 0:  # of several processes, one does it
        return
    where, select = taken["in_path"], taken["select"]
    plan = in_place.plan_in_place
    if whole["whole"]:
        from ..runs.in_place import plan_run_in_place as plan
    planned = plan(cast(FilePath, where), _step(name, values), select=None if select is None else str(select))
    if taken["dry_run"]:
        echo(outputs.in_place_plan_text(planned))
        return
    in_place.carry_out(planned)
    if not taken["quiet"]:
        say_done(outputs.in_place_summary(planned))


def _extend(values: dict[str, object], path: FilePath) -> None:
    """Add the lines of a file to the patterns or pairs; empty lines and ``#`` comments are skipped."""
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(path, f"cannot be read ({error})", "check the name") from error
    listed = [line for line in lines if line and not line.startswith("#")]
    name = "pairs" if "pairs" in values else "patterns"
    given = values[name]
    assert isinstance(given, tuple)
    values[name] = (*given, *listed)


def description(edit: Edit[...]) -> str:
    """An edit's docstring as a command's help: without examples and errors, and with flags for arguments."""
    text = inspect.cleandoc(edit.__doc__ or "").partition(">>>")[0]
    text = re.sub(r"\s*Raises (?:[^.`]|``[^`]*``)*\.", "", text)
    names = {name: argument.name for name, argument in edit.arguments.items()}
    scope = inspect.unwrap(edit).__globals__

    def worded(found: re.Match[str]) -> str:
        role, code = found[1], found[2]
        if role == "data":
            return ", ".join(scope[code])
        if role == "func":
            return f"ckpt {code.removesuffix('_').replace('_', '-')}"
        name = names.get(code.partition("=")[0], "")
        if not name or name in POSITIONAL:
            return {"patterns": "PATTERN", "pairs": "OLD=NEW"}.get(name, code)
        return f"--{name.replace('_', '-')}"

    return re.sub(r"(?::(\w+):)?``?([^`]+)``?", worded, text).strip()


def _convert() -> click.Command:
    def run(**values: object) -> None:
        work_of(values).edit(recipe.Recipe())

    text = """Write any checkpoint as .pth, .safetensors or .dcp, by OUT's extension; only the weights, all on the cpu.

    A .dcp is a folder for torch.distributed.checkpoint.  Into any other folder (OUT is one, or ends with a slash) goes
    model.safetensors, as Hugging Face's hub has it.

    \b
    Example:
      ckpt convert training.ckpt model.safetensors
      ckpt convert model.safetensors model.pth
      ckpt convert big.pth big.safetensors --max-shard-size 5GB
      ckpt convert model.safetensors hub_model/
      ckpt convert last.ckpt slim.ckpt --whole --without optimizer
    """
    return click.Command(
        "convert",
        short_help="Write .pth, .safetensors or .dcp from anything.",
        params=[SOURCE, OUT, *output_options(), *whole_options()],
        callback=run,
        help=inspect.cleandoc(text),
    )


@click.command(short_help="Finish or clear away what was interrupted.")
@click.argument("path", metavar="FILE", type=click.Path(path_type=LocalPath))
@click.option("--roll-back", is_flag=True, help="Take a rename in place back instead.")
def recover(path: LocalPath, roll_back: bool) -> None:
    """Finish a rename in place that was interrupted, and remove the temporary files that a killed run left beside FILE.

    Any other command on FILE finishes the rename, too; temporary files it names and leaves.

    \b
    Example:
      ckpt recover training.ckpt
      ckpt recover training.ckpt --roll-back
    """
    from ..writing.leftovers import clear_leftovers, is_written

    removed = clear_leftovers(path)
    for gone in removed:
        say_done(f"removed {gone}")
    if not path.exists():
        if not removed and not is_written(path):
            raise FileError(path, "does not exist", "check the name")
        if not removed:
            say_done(f"{path}: nothing to recover")
        return
    outcome = journal.recover(registry.located(path), roll_back=roll_back)
    texts = {"finished": "the rename in place is finished", "rolled back": "rolled back, it is as it was before"}
    if outcome or not removed:
        say_done(f"{path}: {texts[outcome] if outcome else 'nothing to recover'}")


def command_of(name: str) -> click.Command | None:
    """The command of this name: an edit's, convert or recover."""
    if name in ("convert", "recover"):
        return _convert() if name == "convert" else recover
    normal = name.replace("-", "_")
    return _command(normal) if normal in change.EDITS and "_" not in name else None
