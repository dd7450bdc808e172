"""The command line: parse, one library call, report, exit status.

Exit statuses: 0 done; 1 the answer is no, from commands that answer a question (diff: it differs; scan: more than plain
data; check: a rule is broken; align: keys are open; resume-check: it does not go on as before); 2 trouble (one line on
stderr says what).
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
import warnings
from importlib import import_module
from typing import NamedTuple, NoReturn

import click

from ..edits.table import TABLE
from ..errors import CheckpointError, text_of
from . import torchrun
from .spelling import spelled
from .terminal import WHEN, adapt, echo, show


class Command(NamedTuple):
    """The module of a command, which is imported when it is called for, and its line in ``ckpt --help``."""

    module: str
    short_help: str


# The groups of `ckpt --help`.  The commands of edits are not listed here: each is made of its edit, in the group that
# edits/table.py says.
GROUPS: dict[str, dict[str, Command]] = {
    "Look": {
        "ls": Command("listing", "Show what a checkpoint is and holds."),
        "diff": Command("looking", "Compare with a model or a checkpoint."),
        "hash": Command("looking", "Print hashes of the values."),
        "scan": Command("looking", "List the names that a pickle mentions."),
        "check": Command("checking", "Check files by rules: keys, shapes, values, size."),
    },
    "Edit keys": {},
    "Edit values": {},
    "Combine": {},
    "Files": {
        "convert": Command("editing", "Write .pth, .safetensors or .dcp from anything."),
        "recover": Command("editing", "Finish or clear away what was interrupted."),
        "index": Command("indexing", "Write the index of shards that have none."),
    },
    "Fit": {
        "align": Command("fitting", "Find the renames that fit a checkpoint to a model."),
        "fit": Command("fitting", "Write a checkpoint that loads strictly into a model."),
        "freeze-plan": Command("training", "Show what freezing would leave trainable."),
        "groups": Command("training", "Show the parameter groups that rules make."),
    },
    "Runs": {
        "set": Command("running", "Set single values of a training checkpoint."),
        "resume-check": Command("running", "Prove that training goes on after an edit."),
    },
    "Recipes": {
        "edit": Command("recipes", "Several edits in one pass."),
        "apply": Command("recipes", "Run a recipe file."),
        "recipe": Command("recipes", "Check recipe files (which prints their hash), or invert them."),
    },
}
COMMANDS = {name: command for commands in GROUPS.values() for name, command in commands.items()}


SILENT = 10  # seconds that a process waits for the one that says what is wrong

# Every command has it.
COLOR = click.Option(
    ["--color"],
    type=click.Choice(WHEN),
    expose_value=False,
    callback=lambda context, option, when: adapt(when) if when else None,
    help="Colour: on a terminal without NO_COLOR, always or never.  [default: auto]",
)


class Commands(click.Group):
    """The group of all commands."""

    called: click.Command | None = None  # the command that is run

    def grouped(self) -> dict[str, dict[str, str]]:
        """The names of all commands and their lines in the help, by their groups."""
        found: dict[str, dict[str, str]] = {title: {} for title in GROUPS}
        for name, edit in TABLE.items():
            found[edit.group][name.replace("_", "-")] = edit.short_help
        for title, commands in GROUPS.items():
            found[title].update({name: command.short_help for name, command in commands.items()})
        return found

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for commands in self.grouped().values() for name in commands]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = import_module(f".{COMMANDS[cmd_name].module if cmd_name in COMMANDS else 'editing'}", __name__)
        found: click.Command | None = module.command_of(cmd_name)
        inner = found.commands.values() if isinstance(found, click.Group) else ()
        for command in (*filter(None, [found]), *inner):
            if not any(parameter.name == COLOR.name for parameter in command.params):
                command.params.append(COLOR)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        grouped = self.grouped()
        widest = max(len(name) for commands in grouped.values() for name in commands)
        for title, commands in grouped.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(widest), text) for name, text in commands.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        word = args[0]
        if not word.startswith("-") and self.get_command(ctx, word) is None:
            from .suggesting import meant

            close = [f"ckpt {name}" for name in meant(word, self.list_commands(ctx))]
            ways = f"did you mean {' or '.join(close)}?" if close else "ckpt --help lists all"
            raise click.UsageError(f"there is no command {word!r}; {ways}", ctx)
        name, self.called, rest = super().resolve_command(ctx, args)
        if ctx.resilient_parsing and self.called is not None:  # a shell asks what could come next
            from .completion import complete_values, parsable

            rest = parsable(complete_values(self.called), rest)
        return name, self.called, rest


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit status: 0 done; 1 the answer is no (diff, scan, check, align, resume-check); "
    "2 trouble, one line says what.",
)
@click.version_option(None, "--version", "-V", package_name="ckpt_surgeon", prog_name="ckpt")
def cli() -> None:
    """Checkpoint surgery: look into PyTorch checkpoints, compare them with models, edit keys and tensors, write
    clean state_dicts.

    Nothing in a checkpoint is ever run, and no tensor passes through memory unless its values change.

    \b
    Example:
      ckpt ls model.pth
      ckpt diff model.pth 'torchvision.models:resnet18(num_classes=10)'
      ckpt strip-prefix model.pth clean.pth
    """


def main(*, several: bool = False) -> None:
    """Run the command line; every trouble is one line and exit status 2.

    ``several`` lets it be one of the processes that torchrun started.
    """
    adapt()
    if several:
        torchrun.take_part()
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _unwind)
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch's; nothing here needs numpy
    gc.disable()  # a command makes hundreds of thousands of records, keeps them all, and ends
    try:
        code = _run()
    finally:
        gc.enable()
    sys.exit(code)


def _run() -> int:
    try:
        code = cli(standalone_mode=False)
    except click.ClickException as error:
        show(error)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _trouble("interrupted, nothing was replaced", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except CheckpointError as error:
        message = error.message(lambda part: spelled(part, cli.called))
        return _trouble(message, told_by=getattr(error, "told_by", None))
    except MemoryError:
        return _trouble("not enough memory", told_by=torchrun.rank())
    except OSError as error:  # the system refused in the middle of something: no room, a quota, a disk that fails
        if os.environ.get("CKPT_TRACEBACK"):
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        return _trouble(f"{where}{error.strerror or text_of(error)}", told_by=torchrun.rank())
    except Exception as error:  # a traceback helps nobody at a terminal; CKPT_TRACEBACK=1 shows it
        if os.environ.get("CKPT_TRACEBACK"):
            raise
        asked = "please report it, with CKPT_TRACEBACK=1 set"
        return _trouble(f"unexpected trouble ({text_of(error)}); {asked}", told_by=torchrun.rank())
    return code if isinstance(code, int) else 0


def _trouble(message: str, code: int = 2, *, told_by: int | None = None) -> int:
    """Say what is wrong; of several processes that meet it alike, the first of each machine does.

    The others leave it the time for that: torchrun ends all processes when one has ended.
    """
    if torchrun.is_first_here() if told_by is None else torchrun.rank() == told_by:
        echo(f"ckpt: {message}", err=True, alarm="ckpt:")
    else:
        time.sleep(SILENT)
    return code


def _unwind(number: int, _frame: object) -> NoReturn:
    """Let a signal unwind the stack, so that temporary files go."""
    raise SystemExit(128 + number)
