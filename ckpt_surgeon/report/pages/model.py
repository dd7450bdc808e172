"""What a page consists of: facts, then sections of a few kinds; data alone, neither HTML nor layout.

Texts are as they came, from files and names: what makes HTML of them (:mod:`.rendering`) escapes them, all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from ...reading.histograms import Histogram

# What a key, a cell or a verdict can mean; the style sheet has a colour for each, and a text always says it, too.
MARKS = ("good", "lost", "added", "changed", "retyped", "note")

Cell: TypeAlias = str | int


@dataclass(frozen=True, slots=True)
class Fact:
    """A line of a page's head: what it is about, what is said, and one of :data:`MARKS` or ""."""

    label: str
    value: str
    mark: str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a tree: "text", "measure" (a number as text), "count" or "bytes", which modules sum up."""

    title: str
    kind: str = "text"


@dataclass(frozen=True, slots=True)
class Status:
    """What can become of a key: a word, and one of :data:`MARKS`."""

    title: str
    mark: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """A key of a tree: a cell for each column, the place of its status, more facts, and histograms of its values.

    Modules do not sum up what is not ``counted``: a tensor that is counted under another key.
    """

    key: str
    cells: tuple[Cell, ...]
    status: int = 0
    facts: tuple[str, ...] = ()
    histograms: tuple[Histogram, ...] = ()
    is_counted: bool = True


@dataclass(frozen=True, slots=True)
class Tree:
    """Keys as a tree that folds and is searched; ``details`` are the labels of the facts of its rows."""

    kind: ClassVar[str] = "tree"
    title: str
    columns: tuple[Column, ...]
    rows: Sequence[Row]
    statuses: tuple[Status, ...] = (Status(""),)
    details: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Tile:
    """A rectangle of a treemap: where it is, what it is, and its hue (a number) or its mark."""

    x: float
    y: float
    width: float
    height: float
    path: str
    label: str
    title: str
    hue: int
    mark: str = ""
    is_group: bool = False


@dataclass(frozen=True, slots=True)
class Treemap:
    """Sizes as areas: one drawing for wide pages, one for narrow ones, and what the marks mean."""

    kind: ClassVar[str] = "treemap"
    title: str
    summary: str
    wide: tuple[int, int, Sequence[Tile]]
    narrow: tuple[int, int, Sequence[Tile]]
    legend: tuple[Status, ...] = ()


@dataclass(frozen=True, slots=True)
class HeatCell:
    """What is at a row and a column of a heat map: a level of its scale, or "same", "zero" (it was), "odd".

    ``is_plain`` where it is one key that was measured: the row of the tree has the numbers, too.
    """

    row: int
    column: int
    level: str
    title: str
    is_plain: bool = False


@dataclass(frozen=True, slots=True)
class HeatPanel:
    """A heat map of blocks that have the same roles."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[HeatCell, ...]


@dataclass(frozen=True, slots=True)
class HeatMap:
    """How far values moved, block by role; ``edges`` bound the levels of its scale."""

    kind: ClassVar[str] = "heatmap"
    title: str
    summary: str
    panels: tuple[HeatPanel, ...]
    edges: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Card:
    """The histogram of one tensor, or of two over one range, with lines below it."""

    key: str
    histograms: tuple[Histogram, ...]
    lines: tuple[str, ...]
    mark: str = ""


@dataclass(frozen=True, slots=True)
class Cards:
    """Histograms; ``legend`` names the one or two sides."""

    kind: ClassVar[str] = "cards"
    title: str
    summary: str
    cards: tuple[Card, ...]
    legend: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Table:
    """Rows below headers; ``is_open`` where it is not folded at first."""

    kind: ClassVar[str] = "table"
    title: str
    headers: tuple[str, ...]
    rows: Sequence[Sequence[object]]
    is_open: bool = True


@dataclass(frozen=True, slots=True)
class Code:
    """A text to copy: a recipe."""

    kind: ClassVar[str] = "code"
    title: str
    summary: str
    text: str


Section: TypeAlias = Tree | Treemap | HeatMap | Cards | Table | Code


@dataclass(frozen=True, slots=True)
class Page:
    """A page: its title, the verdict, facts, notes, sections."""

    title: str
    subtitle: str
    facts: tuple[Fact, ...]
    sections: tuple[Section, ...]
    notes: tuple[str, ...] = ()
