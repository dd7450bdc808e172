"""The one place that prints: whatever the command line says goes through :func:`echo`."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from shutil import get_terminal_size
from typing import TextIO

import click

from ..safe_text import visible, visible_lines, without_secrets
from ..text import STYLES, Lines, document, fit_width


def echo(text: object, *, err: bool = False, nl: bool = True, alarm: str = "") -> None:
    """Print a text without what a terminal would act on, and without what is secret in URLs.

    Only the line ends of :class:`~ckpt_surgeon.text.Lines` are line ends; those of any other text came with a name.
    ``alarm`` is the word in front of a line that is red, where there is colour.
    """
    shown = without_secrets(str.__str__(text) if isinstance(text, str) else str(text))
    is_coloured = has_colour(sys.stderr if err else sys.stdout)
    styles = text.styles if isinstance(text, Lines) and is_coloured else {}
    plain = _painted(visible_lines(shown) if isinstance(text, Lines) else visible(shown), styles)
    click.echo(_alarming(plain, alarm) if is_coloured and alarm else plain, err=err, nl=nl, color=True)


def _alarming(plain: str, alarm: str) -> str:
    """A text whose first line that begins with a word has it in red."""
    lines = plain.split("\n")
    for number, line in enumerate(lines):
        if line.startswith(alarm):
            lines[number] = painted(alarm, "bad") + line.removeprefix(alarm)
            break
    return "\n".join(lines)


def _painted(plain: str, styles: Mapping[int, str]) -> str:
    """A text that is escaped already, its lines in their styles."""
    if not styles:
        return plain
    return "\n".join(painted(line, styles.get(number)) for number, line in enumerate(plain.split("\n")))


# -- colour and width

WHEN = ("auto", "always", "never")
_when = "auto"


def adapt(when: str = "auto") -> None:
    """Show colour ``when``: on a terminal ("auto"), "always" or "never"; tables are as wide as the terminal is."""
    global _when
    _when = when
    fit_width(get_terminal_size().columns if sys.stdout.isatty() else None)


def has_colour(stream: TextIO) -> bool:
    """Whether colour is shown: as --color says, else on a terminal that has some, where NO_COLOR is not set."""
    if _when != "auto":
        return _when == "always"
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def painted(line: str, style: str | None) -> str:
    """A line in a style of :data:`ckpt_surgeon.text.STYLES`.

    >>> painted("same values", "good"), painted("same values", None)
    ('\\x1b[32msame values\\x1b[0m', 'same values')
    """
    return f"\x1b[{STYLES[style]}m{line}\x1b[0m" if style and line.strip() else line


def show(error: click.ClickException) -> None:
    """Print what click has to say of a command line."""
    from io import StringIO

    text = StringIO()
    click.ClickException.__init__(error, visible(error.message))
    error.show(text)
    echo(Lines(text.getvalue()), err=True, nl=False, alarm="Error:")


def say_done(*texts: str) -> None:
    """Print what was done; texts that are empty are left out.

    Where standard output cannot take the text, the work stays done, and a line on stderr says so.
    """
    text = document(filter(None, texts))
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        echo(Lines(text.encode(encoding, "backslashreplace").decode(encoding), text.styles))
    except OSError as error:
        with suppress(OSError, ValueError):  # or else Python would try again when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        with suppress(OSError):
            echo(f"ckpt: done; standard output cannot take the report ({error.strerror})", err=True)
