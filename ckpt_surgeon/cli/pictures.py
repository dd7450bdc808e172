"""The option --html: what a command found, as a page with pictures."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

import click

from ..errors import FileError, OutputExists
from ..files import small
from ..files.paths import FilePath, file_path
from ..tensors.stored import StoredTensor
from ..text import size
from .options import FILE_PATH
from .terminal import say_done

if TYPE_CHECKING:
    from ..report.pages.model import Page

HTML = click.Option(
    ["--html"], type=FILE_PATH, metavar="FILE", help="Also write a page with pictures to FILE, to open in a browser."
)
FORCE = click.Option(["--force", "-f"], is_flag=True, help="With --html: replace an existing FILE.")


def refuse_page(html: FilePath | None, *, force: bool, beside: Iterable[object]) -> None:
    """Raise, before any work is done, where a page cannot be written: it exists, or is one of the files ``beside``."""
    if html is None:
        if force:
            raise click.UsageError("--force goes with --html")
        return
    refuse_own(html, beside)
    if html.lexists() and not force:
        raise OutputExists(html)
    html.check_writable()


def refuse_own(html: FilePath | None, beside: Iterable[object]) -> None:
    """Raise FileError where a page has the name of a file that the command reads, or writes otherwise."""
    if html is None:
        return
    named = [str(one) for one in beside]
    for other in (*named, *(name.rpartition(":")[0] for name in named if ":" in name)):  # a model's file.py:factory
        is_same = False
        with suppress(OSError, ValueError):
            is_same = html == file_path(other) or os.path.realpath(str(html)) == os.path.realpath(other)
        with suppress(OSError, ValueError):
            is_same = is_same or os.path.samefile(str(html), other)
        if is_same:
            raise FileError(html, "is a file of this command's own, no page is written over it", "write elsewhere")


def files_of(tensors: Mapping[str, object]) -> set[FilePath]:
    """The files that tensors lie in."""
    stored = (tensor for tensor in tensors.values() if isinstance(tensor, StoredTensor))
    return {file for tensor in stored for file in tensor.storage.files}


def write_page(html: FilePath, page: Page, *, say: bool) -> None:
    """Write a page; with ``say``, print a line that tells of it."""
    from ..report.pages.rendering import rendered

    text = rendered(page)
    small.write_text(html, text)
    if say:
        say_done("", f"wrote {html}: {size(len(text.encode()))}")
