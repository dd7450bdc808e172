"""Evidence of order: both sides list their parameters as they define them, so that equal shapes come in one sequence.

The longest sequence of equal shapes that runs through both sides is an alignment where it is the only longest one,
and where names or numbers tell apart all parameters that could change places in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ...edits.keys import is_derivable
from .likeness import Table, table
from .names import is_denied
from .parts import DIGITS, kind, parent
from .results import Ambiguity
from .state import State

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CELLS = 4_200_000  # pairs of keys that the sequence is looked for among; beyond, names have to do
TIES = 100_000  # pairs of pairs that only their numbers can tell apart, of one shape

_Cell = tuple[int, int]


def sequence(state: State, kinds: tuple[str, ...]) -> None:
    """Align what is open in order: the best sequence of pairs, where it is the only best one."""
    olds, news = (
        [key for key in keys if kind(names[key]) in kinds and not is_derivable(key)]
        for keys, names in zip(state.undecided(), (state.spelling, state.wanted_spelling), strict=True)
    )
    olds, news = _comparable(state, olds, news)
    if not olds or not news:
        return
    if len(olds) * len(news) > CELLS:
        note = f"{len(olds):,} × {len(news):,} open keys are too many to be compared by their order"
        state.notes += [note] if note not in state.notes else []
        return
    found = table(state, olds, news)
    chosen, doubtful = _best_path(found.scores)
    doubtful |= _replaceable(found.scores, chosen) | _confusable(state, found, chosen) | _outdone(found, chosen)
    doubtful |= {
        cell for cell in chosen
        if not state.alike(olds[cell[0]], news[cell[1]]) or is_denied(state, olds[cell[0]], news[cell[1]])
    }  # fmt: skip
    for row, column in chosen:
        if (row, column) not in doubtful:
            state.settle(olds[row], news[column], "same shape in the same order", "likely")
    _open_groups(state, [(olds[row], news[column]) for row, column in chosen if (row, column) in doubtful])


def _comparable(state: State, olds: list[str], news: list[str]) -> tuple[list[str], list[str]]:
    """The keys whose number of elements occurs on both sides."""
    from math import prod

    ours = {old: prod(state.source[old].shape) for old in olds}
    theirs = {new: prod(state.target[new].shape) for new in news}
    common = set(ours.values()) & set(theirs.values())
    return [old for old in olds if ours[old] in common], [new for new in news if theirs[new] in common]


def _best_path(scores: NDArray[np.int32]) -> tuple[list[_Cell], set[_Cell]]:
    """The monotone path with the greatest sum, and those of its cells that another best path avoids."""
    import numpy as np

    ahead = _sums(scores)
    behind = _sums(scores[::-1, ::-1])[::-1, ::-1]
    total = ahead[-1, -1]
    best = (scores > 0) & (ahead[:-1, :-1] + scores + behind[1:, 1:] == total)
    skippable = (ahead[:-1] + behind[1:] == total).any(axis=1)
    counts = best.sum(axis=1)
    chosen: list[_Cell] = []
    doubtful: set[_Cell] = set()
    last = -1
    for row in np.nonzero(counts)[0].tolist():
        following = np.nonzero(best[row, last + 1 :])[0]
        if not len(following):
            continue
        last += 1 + int(following[0])
        chosen.append((row, last))
        if counts[row] > 1 or skippable[row]:
            doubtful.add((row, last))
    return chosen, doubtful


def _sums(scores: NDArray[np.int32]) -> NDArray[np.int32]:
    """sums[i, j]: the best path through the first i rows and j columns."""
    import numpy as np

    rows, columns = scores.shape
    sums = np.zeros((rows + 1, columns + 1), dtype=np.int32)
    for row in range(rows):
        taken = np.where(scores[row] > 0, sums[row, :-1] + scores[row], 0)
        np.maximum.accumulate(np.maximum(taken, sums[row, 1:]), out=sums[row + 1, 1:])
    return sums


def _replaceable(scores: NDArray[np.int32], chosen: Sequence[_Cell]) -> set[_Cell]:
    """The chosen cells that a row or column outside the path fits as well: only its place kept it out."""
    import numpy as np

    rows, columns = (np.ones(size, dtype=bool) for size in scores.shape)
    for row, column in chosen:
        rows[row] = columns[column] = False
    by_row = scores[rows].max(axis=0, initial=0)
    by_column = scores[:, columns].max(axis=1, initial=0)
    return {cell for cell in chosen if max(by_row[cell[1]], by_column[cell[0]]) >= scores[cell]}


def _outdone(found: Table, chosen: Sequence[_Cell]) -> set[_Cell]:
    """The chosen cells of which one key ends more alike with another open key of the same shape, numbers and all."""
    import numpy as np

    fitting = np.where(found.same_shape, found.endings, -1)
    rows, columns = fitting.max(axis=1, initial=-1), fitting.max(axis=0, initial=-1)
    return {cell for cell in chosen if max(rows[cell[0]], columns[cell[1]]) > found.endings[cell]}


def _confusable(state: State, found: Table, chosen: Sequence[_Cell]) -> set[_Cell]:
    """The cells that could change places with another, and that neither names nor numbering tell apart."""
    import numpy as np

    groups: dict[tuple[object, ...], list[_Cell]] = {}
    for row, column in chosen:
        old, new = found.olds[row], found.news[column]
        groups.setdefault((*state.shapes(old, new), kind(state.spelling[old])), []).append((row, column))
    doubtful: set[_Cell] = set()
    for group in groups.values():
        rows, columns = [row for row, _ in group], [column for _, column in group]
        alike = found.likeness[np.ix_(rows, columns)]
        straight = alike.diagonal()[:, None] + alike.diagonal()[None, :]
        crossed = alike + alike.T
        doubtful |= {group[at] for at in np.nonzero((straight < crossed).any(axis=1))[0].tolist()}
        ones, twos = np.nonzero(np.triu(straight == crossed, 1))
        if len(ones) > TIES:
            doubtful |= set(group)
            continue
        for one, two in zip(ones.tolist(), twos.tolist(), strict=True):
            if not _told_apart(state, found, group[one], group[two]):
                doubtful |= {group[one], group[two]}
    return doubtful


def _told_apart(state: State, found: Table, one: _Cell, two: _Cell) -> bool:
    """Whether two pairs of equal shape and likeness have numbers that rise on both sides, or one module."""
    ours = state.spelling[found.olds[one[0]]], state.spelling[found.olds[two[0]]]
    theirs = state.wanted_spelling[found.news[one[1]]], state.wanted_spelling[found.news[two[1]]]
    if parent(ours[0]) == parent(ours[1]) and parent(theirs[0]) == parent(theirs[1]):
        return ours[0].rpartition(".")[2] == theirs[0].rpartition(".")[2]
    risen = _risen(*ours)
    return risen != "" and risen == _risen(*theirs)


def _risen(first: str, second: str) -> str:
    """What the first difference between two keys is: a "number" that grows, a "step" out of numbered parts, or ""."""
    ones, twos = first.split("."), second.split(".")
    at = next((at for at, (one, two) in enumerate(zip(ones, twos, strict=False)) if one != two), -1)
    one, two = DIGITS.split(ones[at]), DIGITS.split(twos[at])
    if one[::2] == two[::2]:
        return "number" if [int(number) for number in one[1::2]] < [int(number) for number in two[1::2]] else ""
    is_step = DIGITS.search(".".join(ones[at:])) and not DIGITS.search(".".join(twos[at:]))
    return "step" if is_step else ""


def _open_groups(state: State, pairs: Iterable[tuple[str, str]]) -> None:
    """Say what was left open, group by group of equal shapes."""
    groups: dict[tuple[tuple[int, ...], str], list[tuple[str, str]]] = {}
    for old, new in pairs:
        groups.setdefault((tuple(state.source[old].shape), kind(state.spelling[old])), []).append((old, new))
    for (shape, what), group in groups.items():
        olds = {old for old, _ in group}
        wanted = {new for _, new in group}
        others = [
            old
            for old in state.olds
            if old not in olds and (tuple(state.source[old].shape), kind(state.spelling[old])) == (shape, what)
        ]
        of_kind = kind(state.wanted_spelling[group[0][1]])
        news = [
            new
            for new in state.news
            if new in wanted
            or (tuple(state.target[new].shape) == shape and kind(state.wanted_spelling[new]) == of_kind)
        ]
        reason = f"all have shape {list(shape)}, and neither names nor numbers tell them apart"
        ordered = [old for old in state.olds if old in olds]
        state.ambiguous.append(Ambiguity((*ordered, *others), tuple(news), reason))
