"""How sure an alignment is: what rests on order and shapes alone is weighed by what stands around it.

Order makes certain only where a whole model was renamed: a long row of modules of many shapes that runs through both
sides without a gap.  Beside a body whose names are kept, order says little, since a head that was replaced leaves
the same picture as one that was renamed: there it is likely where both sides' open keys fit without rest between the
same neighbours, and possible where keys stay over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import groupby

from ...edits.keys import is_derivable
from ...tensors.records import Shaped
from .parts import DIGITS, by_number, kind, parent, parts
from .results import OTHER_SHAPE, Alignment, Proposal
from .state import State

IN_ORDER = "same shape in the same order"
MODULES, SHAPES = 12, 5  # a row of fewer modules, or of fewer shapes, may be there twice by chance
KEPT = ("same key", "another spelling of the same key", "the same key without its wrappers")


def judged(state: State) -> Alignment:
    """The alignment that a state holds, with the certainty of what order and shapes settled."""
    keeps_names = 10 * sum(_keeps_its_name(one) for one in state.settled.values()) >= len(state.target)
    moved = {said for before, after, said in state.changes if before and after}
    if keeps_names or 2 * sum(one.reason in moved for one in state.settled.values()) < len(state.target):
        _doubt_moves(state, moved)
    if keeps_names:
        _doubt(state)
    elif not state.ambiguous:
        _trust(state, _row(state))
    kept = {one.old: one for one in state.settled.values() if one.certainty != "possible"}
    possible = tuple(one for one in state.settled.values() if one.certainty == "possible")
    news = {one.new for one in kept.values()}
    olds_open = {*state.olds, *(one.old for one in possible)}
    news_open = {*state.news, *(one.new for one in possible)}
    return Alignment(
        tuple(kept[key] for key in state.source if key in kept),
        tuple(state.ambiguous),
        tuple(key for key in state.source if key in olds_open),
        tuple(key for key in state.target if key in news_open and key not in news),
        possible,
        tuple(state.notes),
    )


def _keeps_its_name(one: Proposal) -> bool:
    """Whether a key has the same name on both sides, but for a prefix of the whole model."""
    return one.reason in KEPT or "taken off" in one.reason or "put in front" in one.reason


def _row(state: State) -> list[Proposal]:
    """The settled weights in the target's order, if they are one row without a gap that covers the source."""
    found = {one.new: one for one in state.settled.values() if one.certainty != OTHER_SHAPE}
    wanted = [new for new in by_number(state.target) if kind(state.wanted_spelling[new]) in ("weight", "")]
    wanted = [new for new in wanted if not is_derivable(new)]
    at = [place for place, new in enumerate(wanted) if new in found]
    if not at or at[-1] - at[0] + 1 != len(at) or 5 * len(found) < 4 * len(state.source):
        return []
    row = [found[wanted[place]] for place in at]
    rank = {old: place for place, old in enumerate(by_number(state.source))}
    last: dict[str, int] = {}
    for one in row:
        part = parts(one.old)[0]
        if last.get(part, -1) > rank[one.old]:
            return []
        last[part] = rank[one.old]
    has_rest = len(found) < len(state.source) and at[-1] + 1 < len(wanted)
    if has_rest:
        row = _up_to_a_shape_of_its_own(state, row)
    shapes = {tuple(state.source[one.old].shape) for one in row}
    return row if len(row) >= MODULES and len(shapes) >= SHAPES else []


def _up_to_a_shape_of_its_own(state: State, row: list[Proposal]) -> list[Proposal]:
    """A row without the modules at its end that could be another part of the same shape."""
    counts = _counts(state.source), _counts(state.target)
    while row and any(
        count[shape] > 1 for count, shape in zip(counts, state.shapes(row[-1].old, row[-1].new), strict=True)
    ):
        row = row[:-1]
    return row


def _counts(tensors: Mapping[str, Shaped]) -> dict[tuple[int, ...], int]:
    found: dict[tuple[int, ...], int] = {}
    for tensor in tensors.values():
        found[tuple(tensor.shape)] = found.get(tuple(tensor.shape), 0) + 1
    return found


def _trust(state: State, row: list[Proposal]) -> None:
    """Make certain what order settled in a row: most of it, where names change alike, or shapes found only once."""
    counts = _counts(state.source), _counts(state.target)
    alike: dict[tuple[str, str], int] = {}
    for one in row:
        alike[_template(one)] = alike.get(_template(one), 0) + 1
    modules: set[str] = set()
    for by_order, run in groupby(row, key=lambda one: one.reason == IN_ORDER):
        found = list(run)
        special = [
            all(count[shape] == 1 for count, shape in zip(counts, state.shapes(one.old, one.new), strict=True))
            for one in found
        ]
        flat = [len(state.source[one.old].shape) < 2 for one in found]
        if by_order and 2 * len(found) > len(row):
            known = [own or alike[_template(one)] > 1 for own, one in zip(special, found, strict=True)]
            modules |= {parent(one.old) for is_known, one in zip(known, found, strict=True) if is_known}
        elif by_order and any(special) and all(own or is_flat for own, is_flat in zip(special, flat, strict=True)):
            modules |= {parent(one.old) for one in found}
    for old, one in state.settled.items():
        if one.certainty == "likely" and parent(old) in modules:
            reason = f"{one.reason}; all {len(row)} modules are in one row on both sides"
            state.settled[old] = replace(one, certainty="certain", reason=reason)


def _template(one: Proposal) -> tuple[str, str]:
    """How a pair's names change, whatever their numbers."""
    return DIGITS.sub("#", one.old), DIGITS.sub("#", one.new)


def _doubt_moves(state: State, moved: set[str]) -> None:
    """Make likely what alone moved to another path: it may be another part of its kind."""
    for old, one in state.settled.items():
        if one.certainty == "certain" and one.reason in moved:
            state.settled[old] = replace(one, certainty="likely")
        elif one.certainty == OTHER_SHAPE and one.reason.partition("; shape")[0] in moved:
            state.settled[old] = replace(one, certainty="possible")


def _doubt(state: State) -> None:
    """Make possible what order and shapes settled beside keys that stay open, where the body's names are kept."""
    certain = {one.old: one.new for one in state.settled.values() if one.certainty in ("certain", OTHER_SHAPE)}
    if 2 * len(certain) < len(state.target):
        return
    ours, theirs = _gaps(state.source, certain), _gaps(state.target, set(certain.values()))
    joined: dict[tuple[int, int], list[Proposal]] = {}
    for one in state.settled.values():
        if one.certainty == "likely":
            joined.setdefault((ours[one.old], theirs[one.new]), []).append(one)
    sizes = _sizes(ours), _sizes(theirs)
    for (mine, other), found in joined.items():
        settled = sum(not is_derivable(one.old) for one in found)
        if not settled == sizes[0][mine] == sizes[1][other]:
            for one in found:
                state.settled[one.old] = replace(one, certainty="possible")


def _gaps(keys: Iterable[str], certain: Iterable[str]) -> dict[str, int]:
    """Each key that is not certain, and which of the gaps between certain ones it is in."""
    known, found, gap = set(certain), {}, 0
    for key in by_number(keys):
        if key in known:
            gap += 1
        else:
            found[key] = gap
    return found


def _sizes(gaps: Mapping[str, int]) -> dict[int, int]:
    found: dict[int, int] = {}
    for key, gap in gaps.items():
        found[gap] = found.get(gap, 0) + (not is_derivable(key))
    return found
