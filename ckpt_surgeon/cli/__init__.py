"""The command line: parse, one library call, report, exit status.

Exit statuses: 0 done (diff: no difference that matters), 1 differs, 2 trouble (one line on stderr says what).
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import warnings
from importlib import import_module
from typing import NoReturn

import click

from ..errors import CheckpointError, text_of
from . import torchrun
from .spelling import spelled
from .terminal import echo, show

# Each command's module is imported when it is called for; the order is that of `ckpt --help`.  The commands of edits,
# which stand before "convert", are not listed here: an edit declares its own.
COMMANDS = {
    "ls": "looking",
    "diff": "looking",
    "hash": "looking",
    "scan": "looking",
    "convert": "editing",
    "recover": "editing",
    "index": "indexing",
    "align": "fitting",
    "fit": "fitting",
    "set": "running",
    "resume-check": "running",
    "freeze-plan": "training",
    "groups": "training",
    "edit": "recipes",
    "apply": "recipes",
    "recipe": "recipes",
}


class Commands(click.Group):
    """The group of all commands."""

    called: click.Command | None = None  # the command that is run

    def list_commands(self, ctx: click.Context) -> list[str]:
        from . import editing

        first, *_ = [index for index, module in enumerate(COMMANDS.values()) if module == "editing"]
        own = list(COMMANDS)
        return [*own[:first], *editing.names(), *own[first:]]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = import_module(f".{COMMANDS.get(cmd_name, 'editing')}", __name__)
        found: click.Command | None = module.command_of(cmd_name)
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, self.called, rest = super().resolve_command(ctx, args)
        return name, self.called, rest


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit status: 0 done, 1 differs, 2 trouble.",
)
@click.version_option(package_name="ckpt_surgeon", prog_name="ckpt")
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
    """Say what is wrong; of several processes that meet it alike, the first of each machine does."""
    if torchrun.is_first_here() if told_by is None else torchrun.rank() == told_by:
        echo(f"ckpt: {message}", err=True)
    return code


def _unwind(number: int, _frame: object) -> NoReturn:
    """Let a signal unwind the stack, so that temporary files go."""
    raise SystemExit(128 + number)
