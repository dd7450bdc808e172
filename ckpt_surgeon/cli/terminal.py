"""The one place that prints: whatever the command line says goes through :func:`echo`."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

import click

from ..safe_text import visible, visible_lines, without_secrets
from ..text import Lines, document


def echo(text: object, *, err: bool = False, nl: bool = True) -> None:
    """Print a text without what a terminal would act on, and without what is secret in URLs.

    Only the line ends of :class:`~ckpt_surgeon.text.Lines` are line ends; those of any other text came with a name.
    """
    shown = without_secrets(str(text))
    click.echo(visible_lines(shown) if isinstance(text, Lines) else visible(shown), err=err, nl=nl)


def show(error: click.ClickException) -> None:
    """Print what click has to say of a command line."""
    from io import StringIO

    text = StringIO()
    click.ClickException.__init__(error, visible(error.message))
    error.show(text)
    echo(Lines(text.getvalue()), err=True, nl=False)


def say_done(*texts: str) -> None:
    """Print what was done; texts that are empty are left out.

    Where standard output cannot take the text, the work stays done, and a line on stderr says so.
    """
    text = document(filter(None, texts))
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        echo(Lines(text.encode(encoding, "backslashreplace").decode(encoding)))
    except OSError as error:
        with suppress(OSError, ValueError):  # or else Python would try again when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        with suppress(OSError):
            echo(f"ckpt: done; standard output cannot take the report ({error.strerror})", err=True)
