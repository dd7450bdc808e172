"""Words, numbers and tables for people; knows no record.

A record that has a text derives from :class:`Shown`; who makes the texts (:mod:`ckpt_surgeon.report`) registers them.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import NamedTuple, TypeVar, cast

_RIGHT = {"bytes", "modules", "parameters", "keys", "count", "share", "tensors"}


def visible(text: str) -> str:
    """A key as a terminal may show it: control characters escaped.

    >>> visible("fc\\x1b[31m.bias")
    'fc\\\\x1b[31m.bias'
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text
    )


def size(nbytes: int) -> str:
    """Bytes as people read them.

    >>> size(412323), size(12), size(5 << 30)
    ('412.3 kB', '12 bytes', '5.4 GB')
    """
    if nbytes < 1000:
        return f"{nbytes} bytes"
    value = float(nbytes)
    for unit in ("kB", "MB", "GB", "TB", "PB"):
        value /= 1000
        if value < 999.95:
            return f"{value:.1f} {unit}"
    return f"{value:,.1f} PB"


def percent(share: float) -> str:
    """A share of 1 as a percentage that says 100 % only when it is all.

    >>> percent(1.0), percent(0.99999), percent(0.5), percent(0.0)
    ('100 %', '99.9 %', '50.0 %', '0 %')
    """
    if share in (0.0, 1.0):
        return f"{share:.0%}".replace("%", " %")
    return f"{min(max(share, 0.001), 0.999) * 100:.1f} %"


def plural(count: int, noun: str) -> str:
    """A count and its noun.

    >>> plural(1, "key"), plural(22, "key")
    ('1 key', '22 keys')
    """
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def number(value: float) -> str:
    """A measure in four digits."""
    return f"{value:.4g}"


def command(*words: object) -> str:
    """A command line that can be pasted."""
    return " ".join(shlex.quote(str(word)) for word in ("ckpt", *words))


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A plain table; numbers stand right.

    >>> print(table(["key", "bytes"], [["fc.bias", 40], ["fc.weight", 20480]]))
    key          bytes
    fc.bias         40
    fc.weight    20480
    """
    from tabulate import tabulate

    right = [header in _RIGHT for header in headers]
    align = ["right" if is_right else "left" for is_right in right]
    return tabulate(_cells(rows), list(headers), tablefmt="plain", disable_numparse=True, colalign=align)


def long_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """The same table without tabulate, which takes a second or more for 100,000 rows and 25 ms to import.

    >>> print(long_table(["key", "bytes"], [["fc.bias", 40], ["fc.weight", 20480]]))
    key          bytes
    fc.bias         40
    fc.weight    20480
    """
    texts = _cells(rows)
    columns = zip(*texts, strict=True) if texts else ((),) * len(headers)
    form = "  ".join(
        f"{{:{'>' if header in _RIGHT else '<'}{max(len(header) + 2, *map(len, column), 0)}}}"  # as tabulate does
        for header, column in zip(headers, columns, strict=True)
    ).format
    return "\n".join(form(*row).rstrip() for row in [list(headers), *texts])


def _cells(rows: Iterable[Sequence[object]]) -> list[list[str]]:
    """Cells as text that a terminal may show."""
    texts = [[str(cell) for cell in row] for row in rows]
    if all("".join(row).isprintable() for row in texts):
        return texts
    return [[visible(cell) for cell in row] for row in texts]


def html(headers: Sequence[str], rows: Iterable[Sequence[object]], caption: str) -> str:
    """A table as a notebook shows it."""
    from tabulate import tabulate

    cells = [[str(cell) for cell in row] for row in rows]
    return f"{tabulate(cells, list(headers), tablefmt='html', disable_numparse=True)}\n<p>{escape(caption)}</p>"


def as_json(value: object) -> str:
    """A value as machines read it."""
    return json.dumps(value, indent=2, ensure_ascii=True)


# -- records that are shown


class Look(NamedTuple):
    """How one kind of record is shown: as text, and as HTML in a notebook."""

    text: Callable[[object], str]
    html: Callable[[object], str]


Record = TypeVar("Record")

LOOKS: dict[type, Look] = {}
_sources: list[Callable[[], object]] = []


def looks_from(source: Callable[[], object]) -> None:
    """Name what fills :data:`LOOKS`; it is called when the first record is shown."""
    _sources.append(source)


def look(kind: type[Record], text: Callable[[Record], str], html: Callable[[Record], str] | None = None) -> None:
    """Say how a kind of record is shown; without ``html``, a notebook shows the text as it is."""
    as_text = cast(Callable[[object], str], text)
    as_html = (
        cast(Callable[[object], str], html) if html is not None else lambda one: f"<pre>{escape(as_text(one))}</pre>"
    )
    LOOKS[kind] = Look(as_text, as_html)


def _look_of(record: object) -> Look:
    while type(record) not in LOOKS and _sources:
        _sources.pop()()
    return LOOKS[type(record)]


class Shown:
    """A record whose ``str()`` is the text that the command line prints, and that a notebook shows as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        return _look_of(self).text(self)

    def _repr_html_(self) -> str:
        return _look_of(self).html(self)
