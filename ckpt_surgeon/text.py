"""Words, numbers and tables for people; knows no record.

A record that has a text derives from :class:`Shown`; the modules that make the texts
(:mod:`ckpt_surgeon.report`) register them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import PurePath
from typing import NamedTuple, TypeVar, cast

from . import hooks
from .safe_text import visible as visible
from .safe_text import visible_lines, without_secrets

WIDEST = 240  # columns that are kept free for the longest cell of a column; longer ones push the rest to the right
_RIGHT = {"bytes", "modules", "parameters", "keys", "count", "share", "tensors"}


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


def size_of(text: str) -> int | None:
    """The bytes that a text names, None where it names no size.

    >>> size_of("5GB"), size_of("2 GiB"), size_of("1000"), size_of("much")
    (5000000000, 2147483648, 1000, None)
    """
    import re

    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([kmgt]?)(i?)b?", text.strip(), re.IGNORECASE)
    if found is None:
        return None
    power = " kmgt".index(found[2].lower() or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


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
    """A measure in four digits.

    >>> number(0.000123456), number(12345.678)
    ('0.0001235', '1.235e+04')
    """
    return f"{value:.4g}"


def bar(share: float, width: int = 10) -> str:
    """A share of 1 as a bar, in eighths of a column; whatever is more than nothing is seen.

    >>> bar(1.0, 4), bar(0.5, 4), bar(0.0001, 4), bar(0.0, 4)
    ('████', '██', '▏', '')
    """
    eighths = round(min(max(share, 0.0), 1.0) * width * 8) if math.isfinite(share) else width * 8
    eighths = max(eighths, 1) if share > 0 else 0
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def command(*words: object) -> str:
    """A command line that can be pasted.

    >>> print(command("ls", "my model.pth"), command("ls", "a\\x1bb.pth"))
    ckpt ls 'my model.pth' ckpt ls $'a\\x1bb.pth'
    """
    return " ".join(_quoted(str(word)) for word in ("ckpt", *words))


def _quoted(word: str) -> str:
    """A word as a shell takes it; one that a terminal would act on is written with bash's escapes."""
    import shlex

    if word.isprintable():
        return shlex.quote(word)
    raw = word.encode("utf-8", "surrogateescape")
    return (
        "$'" + "".join(chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\x{byte:02x}" for byte in raw) + "'"
    )


class Lines(str):
    """A text whose line ends are meant: a table, a document.

    ``styles`` says of single lines, by their numbers from 0, what they mean: one of :data:`STYLES`.
    """

    __slots__ = ("styles",)
    styles: Mapping[int, str]

    def __new__(cls, text: str = "", styles: Mapping[int, str] | None = None) -> Lines:
        made = super().__new__(cls, text)
        made.styles = dict(styles or {}) or (text.styles if isinstance(text, Lines) else {})
        return made

    def __getnewargs__(self) -> tuple[str, Mapping[int, str]]:  # type: ignore[override]
        return str(self), self.styles

    def indented(self, *, skip: int = 0) -> Lines:
        """The lines behind the first ``skip``, two columns to the right."""
        lines = self.split("\n")[skip:]
        styles = {number - skip: style for number, style in self.styles.items() if number >= skip}
        return Lines("\n".join(f"  {line}" for line in lines), styles)


# What a line can mean, and how a terminal shows it: parameters of the escape sequence that ends with m.  A report says
# what its lines mean; whether and how that is shown is decided where it is printed.
STYLES = {
    "good": "32",  # green: the verdict that was hoped for
    "bad": "31",  # red: the verdict that was not; what is missing, dropped, not finite
    "added": "32",
    "lost": "31",
    "changed": "33",  # yellow: other shapes, other values
    "retyped": "36",  # cyan: other dtypes
    "note": "2",  # faint
    "heading": "1",  # bold
}


def styled(text: str, style: str) -> Lines:
    """A text, line by line in one of :data:`STYLES`; a plain text is one line.

    >>> styled("values differ", "bad").styles
    {0: 'bad'}
    """
    lines = text if isinstance(text, Lines) else Lines(visible(text))
    return Lines(lines, dict.fromkeys(range(lines.count("\n") + 1), style))


def document(lines: Iterable[str]) -> Lines:
    """Lines and tables as one text; a line that holds a line end, in somebody's key or name, stays one line.

    >>> print(document(["a\\rb", table(["key"], [["x"]])]))
    a\\rb
    key
    x
    """
    texts: list[str] = []
    styles: dict[int, str] = {}
    at = 0
    for line in lines:
        if isinstance(line, Lines):
            styles |= {at + number: style for number, style in line.styles.items()}
            at += line.count("\n")
        texts.append(line if isinstance(line, Lines) else visible(line))
        at += 1
    return Lines("\n".join(texts), styles)


# -- tables

_page_width: int | None = None
NARROWEST = 12  # columns that a cell keeps, however narrow the page


def fit_width(width: int | None) -> None:
    """Fit the tables that are made from now on into so many columns; None lets them be as wide as they are.

    >>> fit_width(30)
    >>> print(table(["key", "bytes"], [["encoder.layers.11.attention.output.weight", 4]]))
    key                    bytes
    encoder.…put.weight        4
    >>> fit_width(None)
    """
    global _page_width
    _page_width = width


def cut_in_the_middle(text: str, width: int) -> str:
    """A text of at most so many columns: its beginning and, longer, its end.

    >>> cut_in_the_middle("encoder.layers.11.attention.output.weight", 24)
    'encoder.la…output.weight'
    """
    if len(text) <= width:
        return text
    end = (width - 1) * 4 // 7
    return f"{text[: width - 1 - end]}…{text[len(text) - end :]}"


def _fitted(headers: Sequence[str], texts: list[list[str]]) -> list[list[str]]:
    """Cells that fit the page: the widest columns of text are cut until all do."""
    if _page_width is None or not texts:
        return texts
    columns = [
        max(len(header) + 2, *map(len, column))
        for header, column in zip(headers, zip(*texts, strict=True), strict=True)
    ]
    room = _page_width - 2 * len(headers)  # two between columns, two before the first where a table is indented
    shrinkable = [number for number, header in enumerate(headers) if header not in _RIGHT]
    widths = list(columns)
    while sum(widths) > room and shrinkable:
        widest = max(shrinkable, key=lambda number: widths[number])
        if widths[widest] <= max(NARROWEST, len(headers[widest]) + 2):
            break
        widths[widest] -= 1
    if widths == columns:
        return texts
    return [[cut_in_the_middle(cell, width) for cell, width in zip(row, widths, strict=True)] for row in texts]


def table(headers: Sequence[str], rows: Iterable[Sequence[object]], *, styles: Iterable[str] | None = None) -> Lines:
    """A plain table; numbers stand right.  ``styles`` has one of :data:`STYLES`, or "", for each row.

    >>> print(table(["key", "bytes"], [["fc.bias", 40], ["fc.weight", 20480]]))
    key          bytes
    fc.bias         40
    fc.weight    20480
    """
    from tabulate import tabulate

    right = [header in _RIGHT for header in headers]
    align = ["right" if is_right else "left" for is_right in right]
    names = [visible(header) for header in headers]
    texts = _fitted(names, _cells(rows))
    text = tabulate(texts, names, tablefmt="plain", disable_numparse=True, colalign=align)
    return Lines(text, _table_styles(styles))


def _table_styles(styles: Iterable[str] | None) -> dict[int, str]:
    return {0: "heading", **{number: style for number, style in enumerate(styles or (), 1) if style}}


def long_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> Lines:
    """A table without tabulate, which takes a second or more for 100,000 rows and 25 ms to import.

    >>> print(long_table(["key", "bytes"], [["fc.bias", 40], ["fc.weight", 20480]]))
    key          bytes
    fc.bias         40
    fc.weight    20480
    """
    texts = _fitted(headers, _cells(rows))
    columns = zip(*texts, strict=True) if texts else ((),) * len(headers)
    widths = [
        max(len(header) + 2, min(max(map(len, column), default=0), WIDEST))  # two more, as tabulate does
        for header, column in zip(headers, columns, strict=True)
    ]
    form = "  ".join(
        f"{{:{'>' if header in _RIGHT else '<'}{width}}}" for header, width in zip(headers, widths, strict=True)
    ).format
    return Lines("\n".join(form(*row).rstrip() for row in [list(headers), *texts]), _table_styles(None))


def _cells(rows: Iterable[Sequence[object]]) -> list[list[str]]:
    """Cells as text that a terminal may show."""
    texts = [[str(cell) for cell in row] for row in rows]
    if all("".join(row).isprintable() for row in texts):
        return texts
    return [[visible(cell) for cell in row] for row in texts]


def html(headers: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "") -> str:
    """A table as a notebook shows it, and a line below it; whatever the cells hold is shown, never markup.

    >>> html(["key"], [["<b>"]]).splitlines()[5]
    '<tr><td>&lt;b&gt;</td></tr>'
    """
    from html import escape

    lines = ["<table>", "<thead>", _html_row("th", headers), "</thead>", "<tbody>"]
    lines += [_html_row("td", row) for row in rows]
    lines += ["</tbody>", "</table>", *(f"<p>{escape(visible(line))}</p>" for line in caption.splitlines())]
    return "\n".join(lines)


def _html_row(tag: str, cells: Iterable[object]) -> str:
    from html import escape

    return f"<tr>{''.join(f'<{tag}>{escape(visible(str(cell)))}</{tag}>' for cell in cells)}</tr>"


SCHEMA_VERSION = 1  # of every document; it grows when a field goes or changes its meaning, not when one is added


def as_json(name: str, fields: Mapping[str, object]) -> Lines:
    """A document of one of the schemas of docs/json.md, as machines read it, in ASCII.

    A number that JSON does not have (NaN, inf) is null.

    >>> print(as_json("hash", {"whole": "5d6c", "tensors": {}}))
    {
      "schema": "ckpt_surgeon.hash",
      "version": 1,
      "whole": "5d6c",
      "tensors": {}
    }
    """
    import orjson

    value = {"schema": f"ckpt_surgeon.{name}", "version": SCHEMA_VERSION, **fields}
    try:
        made = orjson.dumps(value, option=orjson.OPT_INDENT_2)
    except TypeError:  # integers of more than 64 bits, text that is no Unicode
        made = b"\xff"
    if made.isascii():
        return Lines(made.decode())
    import json

    return Lines(json.dumps(value, indent=2, ensure_ascii=True))


# -- records that are shown

BRIEF = 160  # characters of a record in one line
FIELD = 48  # characters of one field in it


class Look(NamedTuple):
    """How one kind of record is shown: as text, and as HTML in a notebook."""

    text: Callable[[object], str]
    html: Callable[[object], str]


Record = TypeVar("Record")

LOOKS: dict[type, Look] = {}


def look(kind: type[Record], text: Callable[[Record], str], html: Callable[[Record], str] | None = None) -> None:
    """Register how a kind of record is shown; without ``html``, a notebook shows the text as it is."""
    as_text = cast(Callable[[object], str], text)
    as_html = cast(Callable[[object], str], html) if html is not None else lambda record: preformatted(as_text(record))
    LOOKS[kind] = Look(as_text, as_html)


def _look_of(record: object) -> Look:
    """The look of a record's class; records without one are shown by their fields."""
    if not LOOKS:
        hooks.answer("looks")()
    return LOOKS.get(type(record), Look(repr, _fields_html))


class Shown:
    """A record with a short ``repr()``, whose ``str()`` is the text that the command line prints.

    A notebook shows it as a table.  Dataclasses that derive from it are made with ``repr=False``.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return brief(self)

    def __str__(self) -> str:
        text = _look_of(self).text(self)
        return Lines(visible_lines(without_secrets(text)), text.styles if isinstance(text, Lines) else None)

    def _repr_html_(self) -> str:
        return _look_of(self).html(self)


def brief(record: object) -> str:
    """A record in one short line: its class, and its fields; long ones by how much they hold.

    >>> from dataclasses import make_dataclass
    >>> brief(make_dataclass("Found", ["path", "keys", "note"])("model.pth", [f"fc{n}.bias" for n in range(1000)], ""))
    "Found(path='model.pth', keys=<1,000>)"
    """
    line = type(record).__name__ + "("
    for name, value in _filled_fields(record):
        text = f"{'' if line.endswith('(') else ', '}{name}={_brief_value(value)}"
        if len(line) + len(text) > BRIEF:
            return line + ", …)"
        line += text
    return line + ")"


def _filled_fields(record: object) -> Iterator[tuple[str, object]]:
    """The fields of a dataclass that hold something."""
    for name, field in getattr(record, "__dataclass_fields__", {}).items():
        value = getattr(record, name)
        if field.repr and not name.startswith("_") and value is not None and not _is_empty(value):
            yield name, value


def _is_empty(value: object) -> bool:
    return isinstance(value, (str, Sized)) and len(value) == 0


def _brief_value(value: object) -> str:
    if isinstance(value, str):
        return repr(value) if len(value) <= FIELD else repr(value[:FIELD]) + "…"
    if isinstance(value, PurePath):
        return _brief_value(str(value))
    if isinstance(value, (bool, int, float, complex)):
        return repr(value)
    if isinstance(value, Collection):
        items = value.values() if isinstance(value, dict) else value
        is_plain = isinstance(value, dict) or not isinstance(value, Mapping)
        small = is_plain and len(value) <= 8 and all(isinstance(item, (str, int, float)) for item in items)
        text = repr(value) if small else ""
        return text if 0 < len(text) <= FIELD else f"<{len(value):,}>"
    text = repr(value)
    return text if len(text) <= FIELD else f"<{type(value).__name__}>"


def _fields_html(record: object) -> str:
    rows = [[name, _brief_value(value)] for name, value in _filled_fields(record)]
    return html([type(record).__name__, ""], rows, "")


def preformatted(text: str) -> str:
    """A text as HTML, line by line as it is."""
    from html import escape

    return f"<pre>{escape(chr(10).join(map(visible, text.splitlines())))}</pre>"
