"""How the command line names the arguments and functions that an error speaks of."""

from __future__ import annotations

import click

from ..errors import Argument, Call, Part, Phrase


def spelled(part: Part, command: click.Command | None) -> str:
    """A part of a message in the words of the command that was run, as far as it has words for it.

    An argument is the command's option or positional argument of that name; one that the command does not have is
    part of an option of ``ckpt edit``, or an entry of a recipe.

    >>> import click
    >>> force = click.Command("convert", params=[click.Option(["--force", "-f"], is_flag=True)])
    >>> spelled(Argument("force", True), force)
    '--force'
    >>> spelled(Argument("fill", "zero"), force)
    "fill = 'zero'"
    """
    if isinstance(part, Argument):
        return _argument(part, command)
    if isinstance(part, Call):
        flags = [_flag(argument) for argument in part.arguments]
        return " ".join(["ckpt", part.function.removesuffix("_").replace("_", "-"), *flags])
    return part.command_line


def in_words_of_command(text: str) -> str:
    """A text in the words of the command that runs.

    >>> from ckpt_surgeon.errors import Phrase
    >>> in_words_of_command(Phrase("give ", Argument("force", True)))
    'give force = true'
    """
    context = click.get_current_context(silent=True)
    command = context.command if context is not None else None
    return text.spelled(lambda part: spelled(part, command)) if isinstance(text, Phrase) else text


def _argument(argument: Argument, command: click.Command | None) -> str:
    for parameter in command.params if command is not None else ():
        if parameter.name == argument.name and isinstance(parameter, click.Option):
            return _flag(argument, max(parameter.opts, key=len))
        if parameter.name == argument.name:
            return str(parameter.metavar or argument.name.upper())
    if command is not None and command.name == "edit":
        return argument.name if argument.value is None else f"{argument.name}={_plain(argument.value)}"
    return _entry(argument)


def _flag(argument: Argument, flag: str = "") -> str:
    flag = flag or "--" + argument.name.removesuffix("_").replace("_", "-")
    return flag if argument.value in (None, True) else f"{flag} {argument.value}"


def _entry(argument: Argument) -> str:
    """An entry of a recipe's table."""
    name = argument.name.removesuffix("_")
    if argument.value is None:
        return name
    return f"{name} = {_plain(argument.value) if isinstance(argument.value, bool) else repr(argument.value)}"


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
