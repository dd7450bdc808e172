"""How far values moved, as a heat map: a row for each block, a column for each role of its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ...reading.comparing import Changed, ValueDiff
from ...text import number
from ..values import layer_of
from .model import HeatCell, HeatMap, HeatPanel

LEVELS = 7
MOST_COLUMNS = 24  # with more, roles that differ in numbers (experts) are one
ALIKE = 0.3  # share of roles from which on blocks of two names are in one panel


@dataclass(slots=True)
class _Drift:
    """What moved under one block and role: the sums of its tensors, or why they cannot be measured."""

    keys: int = 0
    identical: int = 0
    max_abs: float = 0.0
    sums: list[float] = field(default_factory=lambda: [0.0] * 4)
    odd: str = ""
    key: str = ""  # where it is one, and is measured

    def add(self, one: Changed) -> None:
        self.keys += 1
        is_plain = self.keys == 1 and not any(one.nan) and not any(one.inf) and math.isfinite(one.relative)
        self.key = one.key if is_plain else ""
        if not math.isfinite(one.max_abs):
            self.odd = one.why or "not to be measured"
            return
        if any(one.nan) or any(one.inf):
            self.odd = f"NaN {one.nan[0]:,} / {one.nan[1]:,}, inf {one.inf[0]:,} / {one.inf[1]:,}"
        self.max_abs = max(self.max_abs, one.max_abs)
        self.sums = [mine + other for mine, other in zip(self.sums, one.sums, strict=True)]

    @property
    def relative(self) -> float:
        difference, ours, *_ = self.sums
        return math.sqrt(difference / ours) if ours else math.inf if difference else 0.0

    @property
    def cosine(self) -> float:
        _, ours, theirs, product = self.sums
        return product / math.sqrt(ours * theirs) if ours and theirs else 0.0

    def said(self) -> str:
        several = f"{self.keys:,} tensors, " if self.keys > 1 else ""
        if not self.keys:
            return "identical"
        if self.odd and not any(self.sums):
            return f"{several}{self.odd}"
        measures = f"relative {number(self.relative)}, max abs {number(self.max_abs)}, cosine {self.cosine:.6f}"
        if not self.sums[1]:
            measures = f"was all zero, max abs {number(self.max_abs)}"
        return f"{several}{measures}" + (f"; {self.odd}" if self.odd else "")


def heatmap(found: ValueDiff, *, cells: int | None = None) -> HeatMap | None:
    """The heat map of what moved; buffers are left out.  None where no parameter did.

    ``cells`` is how many there may be: rows that follow are left out.
    """
    drifts = _drifts(found)
    moved = [one.relative for by_role in drifts.values() for one in by_role.values() if one.keys and not one.odd]
    measured = [value for value in moved if math.isfinite(value) and value > 0]
    if not any(one.keys for by_role in drifts.values() for one in by_role.values()):
        return None
    edges = _edges(min(measured, default=1.0), max(measured, default=1.0))
    panels = [_panel(names, drifts, edges) for names in _panels(drifts)]
    if cells is not None:
        panels = _cut(panels, cells)
    changed = len([one for one in found.changed if not one.is_buffer])
    blocks = sum(any(one.keys for one in by_role.values()) for by_role in drifts.values())
    summary = f"{changed:,} parameters changed in {blocks:,} of {len(drifts):,} blocks; colour: |a − b| / |a|"
    return HeatMap("Drift", summary, tuple(panels), edges)


def _drifts(found: ValueDiff) -> dict[str, dict[str, _Drift]]:
    """What moved, by block and role, in the order of the keys of the file as far as that is known."""
    changed = [one for one in found.changed if not one.is_buffer] + [one for one in found.close if not one.is_buffer]
    roles = {_split(key)[1] for key in (*(one.key for one in changed), *found.identical)}
    spell = _without_numbers if len(roles) > MOST_COLUMNS else str
    drifts: dict[str, dict[str, _Drift]] = {}
    still = [key for key in found.identical if not _is_counter(key)]
    for key in sorted([*(one.key for one in changed), *still], key=_in_order):
        block, role = _split(key)
        drifts.setdefault(block, {}).setdefault(spell(role), _Drift())
    for one in changed:
        block, role = _split(one.key)
        drifts[block][spell(role)].add(one)
    for key in still:
        block, role = _split(key)
        drifts[block][spell(role)].identical += 1
    return drifts


def _is_counter(key: str) -> bool:
    return key.rpartition(".")[2] in ("num_batches_tracked", "running_mean", "running_var", "position_ids")


def _in_order(key: str) -> list[tuple[int, str]]:
    """Keys in the order of their numbers; else by name."""
    return [(int(part), "") if number else (-1, part) for number, part in _parts(key)]


def _parts(key: str) -> list[tuple[bool, str]]:
    return [(at % 2 == 1, part) for at, part in enumerate(re.split(r"([0-9]{1,9})", key))]


def _split(key: str) -> tuple[str, str]:
    """The block of a key, and its role there.

    >>> _split("layers.3.attn.q.weight"), _split("head.weight"), _split("cls_token")
    (('layers.3', 'attn.q.weight'), ('head', 'weight'), ('cls_token', 'value'))
    """
    block = layer_of(key)
    return block, key[len(block) :].lstrip(".") or "value"


def _without_numbers(role: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", role)


def _panels(drifts: Mapping[str, Mapping[str, _Drift]]) -> list[list[str]]:
    """The blocks of each panel: those of one name, and others with much the same roles; single ones in the last."""
    groups: dict[str, list[str]] = {}
    for block in drifts:
        groups.setdefault(re.sub(r"\d+", "#", block), []).append(block)
    panels: list[tuple[set[str], list[str]]] = []
    single: list[str] = []
    for name, blocks in groups.items():
        if "#" not in name or len(blocks) == 1:
            single += blocks
            continue
        roles = {role for block in blocks for role in drifts[block]}
        alike = next((one for one in panels if len(one[0] & roles) >= ALIKE * len(one[0] | roles)), None)
        if alike is None:
            panels.append((roles, list(blocks)))
        else:
            alike[0].update(roles)
            alike[1].extend(blocks)
    return [*(blocks for _, blocks in panels), *([single] if single else [])]


def _panel(names: Sequence[str], drifts: Mapping[str, Mapping[str, _Drift]], edges: Sequence[float]) -> HeatPanel:
    columns = list(dict.fromkeys(role for name in names for role in drifts[name]))
    cells = [
        HeatCell(row, columns.index(role), _level(one, edges), one.said(), one.key == f"{name}.{role}")
        for row, name in enumerate(names)
        for role, one in drifts[name].items()
    ]
    return HeatPanel(tuple(names), tuple(columns), tuple(cells))


def _cut(panels: Iterable[HeatPanel], most: int) -> list[HeatPanel]:
    """Panels of at most so many cells in all, without their last rows where there are more."""
    kept = []
    for panel in panels:
        rows = min(len(panel.rows), most // max(len(panel.columns), 1))
        if rows:
            cells = tuple(cell for cell in panel.cells if cell.row < rows)
            more = (f"… {len(panel.rows) - rows:,} more blocks",) if rows < len(panel.rows) else ()
            kept.append(HeatPanel((*panel.rows[:rows], *more), panel.columns, cells))
            most -= rows * len(panel.columns)
    return kept


def _edges(low: float, high: float) -> tuple[float, ...]:
    """The bounds of the levels: in equal ratios where the greatest is twice the least, else in equal steps from 0."""
    if high < 2 * low:
        return tuple(high * step / LEVELS for step in range(LEVELS + 1))
    low = max(low, high * 1e-7)
    return tuple(low * (high / low) ** (step / LEVELS) for step in range(LEVELS + 1))


def _level(one: _Drift, edges: Sequence[float]) -> str:
    if not one.keys:
        return "same"
    if one.odd:
        return "odd"
    if not math.isfinite(one.relative):
        return "zero"
    return str(sum(one.relative > edge for edge in edges[1:-1]))
