"""Pages of differences: of keys, shapes and dtypes, or of values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from math import prod

from ...models.diff import Diff
from ...reading.comparing import Changed, ValueDiff
from ...tensors.extra_state import is_extra_state
from ...tensors.records import Shaped
from ...text import number, percent, plural
from .heatmaps import heatmap
from .model import Card, Cards, Column, Fact, Page, Row, Section, Status, Tree, Treemap
from .treemaps import treemap

CARDS = 24

_STATES = (
    Status("missing", "lost"), Status("other shape", "changed"), Status("unused", "added"),
    Status("other dtype", "retyped"), Status("not taken", "lost"), Status("matched", "good"),
)  # fmt: skip
_MATCHED = len(_STATES) - 1


def diff_page(found: Diff, *, command: str = "") -> Page:
    """The page of a diff; ``command`` is what its hint suggests."""
    ours, theirs = found.names
    states = _states(found)
    sides = found.sides or ({}, {})
    mismatched = {one.key: one for one in (*found.mismatched, *found.dtypes)}
    rows = []
    for key, state in states.items():
        known = mismatched.get(key)
        cells = tuple(
            _spelled(side[key]) if key in side else said
            for side, said in zip(sides, (known.ours, known.theirs) if known else ("", ""), strict=True)
        )
        rows.append(Row(key, (*cells, _numel(key, sides)), state))
    columns = Column(ours), Column(theirs), Column("parameters", "count")
    sections: list[Section] = [Tree("Keys", columns, rows, _STATES)]
    tiles = diff_tiles(found)
    sections = [tiles, *sections] if tiles is not None else sections
    verdict = "strictly loadable" if found.loadable else "NOT strictly loadable"
    facts = [Fact("verdict", verdict, "good" if found.loadable else "lost"), *_diff_facts(found, command)]
    return Page(f"{ours} and {theirs}", "keys, shapes and dtypes", tuple(facts), tuple(sections), found.notes)


def diff_tiles(found: Diff, *, limit: int = 140) -> Treemap | None:
    """Where in the model keys match, and where not."""
    states = _states(found)
    sizes = {key: _numel(key, found.sides or ({}, {})) for key in states}
    return treemap(sizes, title="Parameters", unit="parameter", statuses=_STATES, status_of=states, limit=limit)


def _states(found: Diff) -> dict[str, int]:
    """Every key of both sides and its place in :data:`_STATES`, in the order of the target as far as it is known."""
    states = dict.fromkeys(found.matched, _MATCHED)
    states |= dict.fromkeys((one.key for one in found.dtypes), 3)
    states |= dict.fromkeys(found.opaque, 4)
    states |= dict.fromkeys((one.key for one in found.mismatched), 1)
    states |= dict.fromkeys(found.missing, 0)
    states |= dict.fromkeys(found.unused, 2)
    order = found.sides[1] if found.sides is not None else {}
    return {key: states[key] for key in (*(key for key in order if key in states), *states)}


def _spelled(tensor: Shaped) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _numel(key: str, sides: tuple[Mapping[str, Shaped], Mapping[str, Shaped]]) -> int:
    """The elements of the target's tensor, or else of the checkpoint's."""
    held = next((side[key] for side in reversed(sides) if key in side), None)
    return 0 if held is None or is_extra_state(key) else prod(held.shape)


def _diff_facts(found: Diff, command: str) -> Iterable[Fact]:
    keys = f"{len(found.matched):,} of {plural(found.target_keys, 'key')}, {percent(found.share)} of the parameters"
    yield Fact("matched", keys)
    for title, count, mark in (
        ("missing", len(found.missing), "lost"),
        ("unused", len(found.unused), "added"),
        ("other shape", len(found.mismatched), "changed"),
        ("other dtype", len(found.dtypes), "retyped"),
        ("made by the model itself", len(found.rewritten), ""),
        ("tied to a key that is there", len(found.tied), ""),
    ):
        if count:
            yield Fact(title, plural(count, "key"), mark)
    if found.refused:
        yield Fact("the model's own code refuses", found.refused, "lost")
    if found.hint is not None:
        yield Fact("hint", f"{found.hint.said}" + (f": {command}" if command else ""))


# -- values

_BECAME = (
    Status("changed", "changed"), Status("cast", "retyped"), Status("only in the first", "lost"),
    Status("only in the second", "added"), Status("under another key", "note"), Status("close", ""),
    Status("identical", "good"),
)  # fmt: skip
_MEASURES = ("max abs", "cosine", "NaN", "inf", "stable rank", "effective rank", "buffer", "note")


def values_page(found: ValueDiff) -> Page:
    """The page of a comparison of values: what moved, block by role; histograms; every key."""
    rows = [_changed_row(one, 1 if one.kind == "cast" else 0) for one in found.changed]
    rows += [_changed_row(one, 5) for one in found.close]
    for keys, state in ((found.only_ours, 2), (found.only_theirs, 3), (found.identical, 6)):
        rows += [Row(key, ("", ""), state) for key in keys]
    rows += [Row(new, ("", f"was {old}"), 4) for old, new in found.renamed]
    columns = Column("relative", "measure"), Column("change")
    drift = heatmap(found)
    cards = [one for one in found.changed if one.histograms is not None and not one.is_buffer]
    cards.sort(key=lambda one: (not (any(one.nan) or any(one.inf)), math.isinf(one.relative)))
    sections: list[Section] = [drift] if drift is not None else []
    sections += [_value_cards(cards, found)] if cards else []
    sections += [Tree("Keys", columns, rows, _BECAME, _MEASURES)]
    verdict = Fact("verdict", "same values" if found.same else "values differ", "good" if found.same else "changed")
    facts = (verdict, *_value_facts(found))
    return Page(" and ".join(found.names), "values", facts, tuple(sections))


def _value_facts(found: ValueDiff) -> Iterable[Fact]:
    for title, count, mark in (
        ("identical", len(found.identical), "good"),
        ("identical under another key", len(found.renamed), "note"),
        ("close", len(found.close), ""),
        ("changed", len([one for one in found.changed if not one.is_buffer]), "changed"),
        ("buffers changed", len([one for one in found.changed if one.is_buffer]), "changed"),
        ("only in the first", len(found.only_ours), "lost"),
        ("only in the second", len(found.only_theirs), "added"),
    ):
        if count:
            yield Fact(title, plural(count, "key"), mark)
    new = [one.key for one in found.changed if one.nan[1] > one.nan[0] or one.inf[1] > one.inf[0]]
    if new:
        yield Fact("no longer finite", f"{plural(len(new), 'key')}: {', '.join(new[:3])}", "lost")
    if found.survived:
        least = min(found.survived.items(), key=lambda item: item[1].cosine)
        said = f"{plural(len(found.survived), 'tensor')}, the least at {least[0]}: cosine {least[1].cosine:.4f}"
        yield Fact("of the adapters there", said)


def _changed_row(one: Changed, state: int) -> Row:
    is_measured = math.isfinite(one.max_abs)
    spectrum = one.spectrum
    facts = (
        number(one.max_abs) if is_measured else "",
        f"{one.cosine:.6f}" if is_measured else "",
        f"{one.nan[0]:,} / {one.nan[1]:,}" if any(one.nan) else "",
        f"{one.inf[0]:,} / {one.inf[1]:,}" if any(one.inf) else "",
        number(spectrum.stable) if spectrum is not None else "",
        number(spectrum.effective) if spectrum is not None else "",
        "yes" if one.is_buffer else "",
        one.why,
    )
    change = one.why if one.kind == "cast" or not is_measured else one.kind
    return Row(one.key, (number(one.relative) if is_measured else "", change), state, facts, one.histograms or ())


def _value_cards(changed: list[Changed], found: ValueDiff) -> Cards:
    cards = tuple(
        Card(
            one.key,
            one.histograms or (),
            (
                f"relative {number(one.relative)} · cosine {one.cosine:.6f}"
                if math.isfinite(one.relative)
                else f"was all zero · max abs {number(one.max_abs)}",
                _counts_said(one),
            ),
            "lost" if one.nan[1] > one.nan[0] or one.inf[1] > one.inf[0] else "",
        )
        for one in changed[:CARDS]
    )
    more = f"; {len(changed) - CARDS:,} more in the tree below" if len(changed) > CARDS else ""
    return Cards(
        "Values",
        f"both sides over one range; what is not finite first, then the most changed{more}",
        cards,
        found.names,
    )


def _counts_said(one: Changed) -> str:
    mine, other = one.histograms or (None, None)
    if mine is None or other is None or not (mine.total and other.total):
        return ""
    said = [f"zeros {percent(mine.zeros / mine.total)} → {percent(other.zeros / other.total)}"]
    said += [f"NaN {one.nan[0]:,} → {one.nan[1]:,}"] * any(one.nan)
    said += [f"inf {one.inf[0]:,} → {one.inf[1]:,}"] * any(one.inf)
    return " · ".join(said)
