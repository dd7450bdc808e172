"""Makes HTML of a page: one file that needs no other, or a fragment for a notebook.

Whatever came from a file or a name is escaped three times over, and nobody has to remember it: Jinja2 escapes all that
a template shows; before that, characters that are not to be shown and what is secret in URLs are taken out of it; and
what scripts read is JSON without any ``<``.  A policy in the page's head lets no script run but the page's own, and
fetches nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING

from ...reading.histograms import Histogram
from ...safe_text import visible, visible_lines, without_secrets
from ...text import cut_in_the_middle, number
from .model import HeatMap, HeatPanel, Page, Row, Section, Tree

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

HEIGHTS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_"  # digits of histograms, 0 to 63
TILE_TEXT = 6.3  # what a letter of a treemap takes
MANY = 500  # rows of a tree from which on its histograms are coarse

# Fills for notebooks, whose own style sheets do not know the page's; legible on light and dark grounds.
FILLS = {
    **{f"q{hue}": fill for hue, fill in enumerate(
        ("#77aadd", "#44bb99", "#eedd88", "#ee8866", "#99ddff", "#bbcc33", "#ffaabb", "#c9c9c9"))},
    **{f"h{level}": fill for level, fill in enumerate(
        ("#e8f1f6", "#c6dcea", "#9cc3da", "#6ca6c6", "#3f86ae", "#1f6591", "#0b4369"))},
    "same": "#8884", "zero": "#c9c9c9", "odd": "#d55e00", "good": "#b9c4cc", "lost": "#e08a62", "added": "#5fbfa0",
    "changed": "#e6b84a", "retyped": "#77aadd", "note": "#c9c9c9", "bar": "#6ca6c6", "first": "#8888",
}  # fmt: skip


def rendered(page: Page) -> str:
    """A page as one HTML file."""
    env = _environment()
    style, script = (_source(name) for name in ("page.css", "page.js"))
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return env.get_template("page.html").render(
        page=page,
        style=_trusted(style),
        script=_trusted(script),
        allowed=_trusted(allowed),
        data=_trusted(script_json(_data(page.sections))),
        paint=_classes,
        is_whole=True,
    )


def fragment(sections: Iterable[Section], rest: str = "") -> str:
    """Pieces of a page as a notebook shows them: folded, without ids, styles of their own or scripts.

    ``rest`` is HTML that is escaped already: it stands first.
    """
    template = _environment().get_template("fragment.html")
    return template.render(sections=list(sections), rest=_trusted(rest), paint=_fills, is_whole=False).strip()


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader(__package__, "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_harmless,
    )
    filters: dict[str, Callable[..., object]] = {
        "px": lambda value: f"{value:.1f}".removesuffix(".0"),
        "lines": lambda text: _escaped(visible_lines(without_secrets(text))),
        "middle": lambda text, width: cut_in_the_middle(harmless(text), max(int(width), 2)),
        "measure": number,
        "letters": lambda width: int((width - 8) / TILE_TEXT),
        "outline": outline,
        "folded": _folded_rows,
        "gutter": _gutter,
        "slots": _slots,
    }
    made.filters.update(filters)
    return made


def harmless(text: str) -> str:
    """A text in one line, without what is not to be shown of it.

    >>> harmless("fc\\u2028.bias of https://me:secret@host/a.pth")
    'fc\\\\u2028.bias of https://host/a.pth'
    """
    return visible(without_secrets(text))


def _harmless(value: object) -> object:
    """What a template is about to show; what is markup already was escaped before."""
    if hasattr(value, "__html__"):
        return value
    return harmless(str(value))


def _trusted(text: str) -> Markup:
    """A text of our own, or one that is escaped already."""
    from markupsafe import Markup

    return Markup(text)


def _escaped(text: str) -> Markup:
    from markupsafe import escape

    return escape(text)


@cache
def _source(name: str) -> str:
    """A style sheet or script of the package, as it is."""
    from importlib.resources import files

    return files(__package__).joinpath("templates", name).read_text("utf-8").strip()


# -- colours: by class in a page, by fill in a notebook


def _classes(*names: str) -> Markup:
    return _trusted(f'class="{" ".join(filter(None, names))}"')


def _fills(*names: str) -> Markup:
    fill = next((FILLS[name] for name in names if name in FILLS), "")
    if "first" in names:
        return _trusted(f'fill="none" stroke="{FILLS["first"]}" stroke-width="1.5"')
    return _trusted(f'fill="{fill}"' if fill else 'fill="currentColor"')


# -- what scripts read


def script_json(value: object) -> str:
    """A value as JSON that can stand in a script element: neither an end tag nor a comment can begin in it.

    >>> script_json("</script><!--")
    '"\\\\u003c/script\\\\u003e\\\\u003c!--"'
    """
    made = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for char in "<>&":
        made = made.replace(char, f"\\u{ord(char):04x}")
    return made


def _data(sections: Iterable[Section]) -> dict[str, object]:
    trees, heat = [], []
    for section in sections:
        if isinstance(section, Tree):
            trees.append(_tree_data(section))
        elif isinstance(section, HeatMap):
            heat.append([_panel_data(panel) for panel in section.panels])
    return {"trees": trees, "heat": heat}


def _panel_data(panel: HeatPanel) -> dict[str, object]:
    return {
        "rows": [harmless(row) for row in panel.rows],
        "columns": [harmless(column) for column in panel.columns],
        "cells": [[cell.row, cell.column, *([] if cell.is_plain else [harmless(cell.title)])] for cell in panel.cells],
    }


def _tree_data(tree: Tree) -> dict[str, object]:
    """A tree as scripts read it: texts that come often are in one list, by their places."""
    places: dict[str, int] = {}

    def place(text: str) -> int:
        return places.setdefault(harmless(text), len(places))

    rows = [
        [
            harmless(row.key),
            row.status,
            [cell if isinstance(cell, int) and column.kind in ("count", "bytes") else place(str(cell))
             for cell, column in zip(row.cells, tree.columns, strict=True)],
            _without_end([harmless(fact) for fact in row.facts]) or 0,
            _histogram_data(row, coarse=len(tree.rows) > MANY) or 0,
            *([] if row.is_counted else [0]),
        ]
        for row in tree.rows
    ]  # fmt: skip
    return {
        "columns": [[harmless(column.title), column.kind] for column in tree.columns],
        "statuses": [[status.title, status.mark] for status in tree.statuses],
        "details": list(tree.details),
        "rows": rows,
        "texts": list(places),
    }


def _without_end(facts: list[str]) -> list[str]:
    """Facts without the empty ones at the end."""
    while facts and not facts[-1]:
        facts.pop()
    return facts


def _histogram_data(row: Row, *, coarse: bool) -> list[object]:
    """The range of a histogram and the heights of its bins; ``coarse`` takes two bins together."""
    if not row.histograms:
        return []
    first = row.histograms[0]
    sides = [one.counts for one in row.histograms]
    if coarse:
        sides = [tuple(map(sum, zip(counts[::2], counts[1::2], strict=True))) for counts in sides]
    top = max((max(counts, default=0) for counts in sides), default=0)
    return [number(first.low), number(first.high), *(_heights(counts, top) for counts in sides)]


def _heights(counts: Sequence[int], top: int) -> str:
    """The heights of the bins in 64 steps, one letter each; a bin that holds anything is seen."""
    return "".join(HEIGHTS[max(round(count / top * 63), 1) if count and top else 0] for count in counts)


# -- helpers of templates


def outline(one: Histogram, histograms: Iterable[Histogram], width: float, height: float) -> str:
    """The path of a histogram's outline in a box; several have one scale.

    >>> outline(Histogram(0, 1, (1, 2)), [Histogram(0, 1, (1, 2))], 20, 10)
    'M0 10V5H10V0H20V10Z'
    """
    top = max((max(each.counts, default=0) for each in histograms), default=0)
    step = width / max(len(one.counts), 1)
    path = f"M0 {_short(height)}"
    last = None
    for place, count in enumerate(one.counts):
        y = height - (max(count / top * height, 1.0) if count and top else 0.0)
        if last is not None and last == y:
            path = path[: path.rindex("H")]
        else:
            path += f"V{_short(y)}"
        path += f"H{_short((place + 1) * step)}"
        last = y
    return path + f"V{_short(height)}Z"


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _gutter(texts: Iterable[str], letter: float = 6.4, most: float = 230) -> float:
    """How much room the longest of some labels needs."""
    return min(max((len(harmless(text)) for text in texts), default=0) * letter + 8, most)


def _slots(panel: HeatPanel) -> list[tuple[int, int, str, str]]:
    return [(cell.row, cell.column, cell.level, cell.title) for cell in panel.cells]


def _folded_rows(tree: Tree) -> list[tuple[str, int]]:
    """The keys of a tree as patterns and counts, for those who run no scripts."""
    from ...key_patterns import folded

    return folded([row.key for row in tree.rows], limit=60)
