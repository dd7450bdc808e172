"""Sizes as a treemap: squarified (Bruls, Huizing, van Wijk, 2000), opened module by module, the largest first."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

from ...text import percent, plural, size
from .model import Status, Tile, Treemap

WIDE, NARROW = (1080, 380), (380, 460)
HEADER = 16  # height of the line that names a group
GAP = 2  # between tiles
LEAST = 14.0  # area below which tiles are drawn as one


@dataclass(slots=True)
class Node:
    """A module, or a key: what is below it, its bytes, and its keys by status."""

    path: str
    label: str
    nbytes: int = 0
    statuses: dict[int, int] = field(default_factory=dict)
    below: dict[str, Node] = field(default_factory=dict)
    is_open: bool = False

    def add(self, nbytes: int, status: int) -> None:
        self.nbytes += nbytes
        self.statuses[status] = self.statuses.get(status, 0) + 1

    def sorted(self) -> list[Node]:
        return sorted((node for node in self.below.values() if node.nbytes), key=lambda node: -node.nbytes)


def treemap(
    sizes: Mapping[str, int],
    *,
    title: str = "Sizes",
    unit: str = "",
    statuses: Sequence[Status] = (),
    status_of: Mapping[str, int] | None = None,
    limit: int = 140,
) -> Treemap | None:
    """A treemap of sizes by key, of at most about ``limit`` tiles; None where there is nothing.

    Sizes are bytes, or numbers of ``unit``.  With ``statuses``, a tile has the mark of the first of them that one of
    its keys has.
    """
    root = _tree(sizes, status_of or {})
    if not root.nbytes:
        return None
    _open(root, limit)
    drawing = _Drawing(root, unit, statuses)
    groups = root.sorted()
    amount = drawing.amount(root.nbytes)
    parts = ", ".join(f"{node.label} {percent(node.nbytes / root.nbytes)}" for node in groups[:5])
    used = {one for one in root.statuses if statuses and statuses[one].mark}
    legend = tuple(status for place, status in enumerate(statuses) if place in used)
    wide, narrow = ((*area, tuple(drawing.tiles(*area))) for area in (WIDE, NARROW))
    return Treemap(title, f"{amount}: {parts}" + (" …" if len(groups) > 5 else ""), wide, narrow, legend)


def _tree(sizes: Mapping[str, int], status_of: Mapping[str, int]) -> Node:
    root = Node("", "")
    for key, nbytes in sizes.items():
        node, status = root, status_of.get(key, 0)
        node.add(nbytes, status)
        parts = key.split(".")
        for depth, part in enumerate(parts, 1):
            node = node.below.setdefault(part, Node(".".join(parts[:depth]), part))
            node.add(nbytes, status)
    return _shortened(root)


def _shortened(node: Node) -> Node:
    """A tree whose modules with a single thing in them are one with it."""
    while len(node.below) == 1 and (only := next(iter(node.below.values()))).below:
        only.label = f"{node.label}.{only.label}" if node.label else only.label
        node = only
    node.below = {name: _shortened(inner) for name, inner in node.below.items()}
    return node


def _open(root: Node, limit: int) -> None:
    """Show what is in the largest modules, as long as there are not too many tiles."""
    order = count()
    waiting = [(-root.nbytes, next(order), root)]
    tiles = 1
    while waiting:
        _, _, node = heapq.heappop(waiting)
        inner = node.sorted()
        if not inner or tiles + len(inner) - 1 > limit or node.nbytes < root.nbytes / 300:
            continue
        node.is_open = True
        tiles += len(inner) - 1
        for each in inner:
            heapq.heappush(waiting, (-each.nbytes, next(order), each))


@dataclass(slots=True)
class _Drawing:
    """Makes tiles of the nodes that are open."""

    root: Node
    unit: str
    statuses: Sequence[Status]

    def amount(self, number: int) -> str:
        return plural(number, self.unit) if self.unit else size(number)

    def tiles(self, width: float, height: float) -> Iterator[Tile]:
        groups = self.root.sorted() if self.root.is_open else [self.root]
        placed = squarified([node.nbytes for node in groups], 0, 0, width, height)
        for hue, (node, area) in enumerate(zip(groups, placed, strict=True)):
            yield from self._tiles(node, area, hue % 8)

    def _tiles(self, node: Node, area: Area, hue: int, group: Node | None = None) -> Iterator[Tile]:
        """The tiles of a node: of what is in it, where it is open; ``group`` is the one whose header names it."""
        x, y, width, height = area
        if not node.is_open or not node.below:
            yield self._tile(node, area, hue, within=group)
            return
        if group is None and width > 44 and height > 3 * HEADER:
            yield self._tile(node, area, hue, is_group=True)
            y, height = y + HEADER, height - HEADER
        inner = node.sorted()
        placed = squarified([each.nbytes for each in inner], x, y, width, height)
        for each, place in zip(inner, placed, strict=True):
            if place[2] * place[3] >= LEAST:
                yield from self._tiles(each, place, hue, group or node)
                continue
            rest = inner[inner.index(each) :]
            yield self._rest(rest, node, placed[inner.index(each) :], hue)
            break

    def _tile(self, node: Node, area: Area, hue: int, *, within: Node | None = None, is_group: bool = False) -> Tile:
        x, y, width, height = area
        share = percent(node.nbytes / self.root.nbytes)
        keys = sum(node.statuses.values())
        counts = "" if keys == 1 and not node.below else f", {plural(keys, 'key')}"
        said = "".join(
            f", {self.statuses[one].title}" + (f": {number:,}" if counts else "")
            for one, number in sorted(node.statuses.items())
            if self.statuses and self.statuses[one].title
        )
        title = f"{node.path}: {self.amount(node.nbytes)}, {share}{counts}{said}"
        marks = [self.statuses[one].mark for one in sorted(node.statuses)] if self.statuses else []
        mark = next((mark for mark in marks if mark not in ("", "good")), next(iter(marks), ""))
        label = node.path.removeprefix(within.path).lstrip(".") if within is not None and node.label else node.label
        return Tile(x, y, max(width - GAP, 0.5), max(height - GAP, 0.5), node.path, label, title, hue, mark, is_group)

    def _rest(self, nodes: Sequence[Node], above: Node, areas: Sequence[Area], hue: int) -> Tile:
        """What is too small to be seen, as one tile."""
        left, top = min(area[0] for area in areas), min(area[1] for area in areas)
        right = max(area[0] + area[2] for area in areas)
        bottom = max(area[1] + area[3] for area in areas)
        rest = Node(above.path, "", sum(node.nbytes for node in nodes), _together(nodes), {"": Node("", "")})
        return self._tile(rest, (left, top, right - left, bottom - top), hue)


def _together(nodes: Iterable[Node]) -> dict[int, int]:
    found: dict[int, int] = {}
    for node in nodes:
        for status, number in node.statuses.items():
            found[status] = found.get(status, 0) + number
    return found


Area = tuple[float, float, float, float]


def squarified(sizes: Sequence[int], x: float, y: float, width: float, height: float) -> list[Area]:
    """Rectangles with areas like some sizes, the largest first, that fill one; each as square as can be.

    >>> squarified([2, 1, 1], 0, 0, 4, 2)
    [(0, 0.0, 2.0, 2.0), (2.0, 0.0, 2.0, 1.0), (2.0, 1.0, 2.0, 1.0)]
    """
    areas: list[Area] = []
    left = float(sum(sizes))
    start = 0
    while start < len(sizes):
        side, scale = min(width, height), width * height / left if left else 0.0
        stop = start + 1
        row = float(sizes[start])
        while stop < len(sizes) and _worst(sizes[start : stop + 1], row + sizes[stop], side, scale) <= _worst(
            sizes[start:stop], row, side, scale
        ):
            row += sizes[stop]
            stop += 1
        thick = row * scale / side if side else 0.0
        at = 0.0
        for each in sizes[start:stop]:
            length = each / row * side if row else 0.0
            areas.append((x, y + at, thick, length) if width >= height else (x + at, y, length, thick))
            at += length
        if width >= height:
            x, width = x + thick, max(width - thick, 0.0)
        else:
            y, height = y + thick, max(height - thick, 0.0)
        left, start = left - row, stop
    return areas


def _worst(sizes: Sequence[int], row: float, side: float, scale: float) -> float:
    """The greatest ratio of the sides of the rectangles in a row."""
    if not (row and side and scale):
        return 0.0
    thick = row * scale / side
    longest, shortest = sizes[0] * scale / thick, max(sizes[-1] * scale / thick, 1e-12)
    return max(longest / thick, thick / shortest)
