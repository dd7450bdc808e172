"""How well open keys of both sides fit, as a table of numbers: 0 where they cannot be one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...tensors.records import Shaped
from .parts import is_name, kind, number, parts
from .shapes import reshapes
from .state import State

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SAME_SHAPE, RESHAPED = 100, 60


@dataclass(frozen=True, slots=True)
class Table:
    """Open keys in order, and for each pair of them three numbers, in arrays of shape [olds, news].

    ``likeness`` is four times the number of components that both names end alike with, and the number of names that
    they share: numbers count only where they are counted alike.  ``endings`` counts the components alone, numbers as
    they are.  ``scores`` is likeness above a base for the same or a reshaped shape, 0 where kind or shape forbids.
    """

    olds: Sequence[str]
    news: Sequence[str]
    scores: NDArray[np.int32]
    likeness: NDArray[np.int32]
    endings: NDArray[np.int32]
    same_shape: NDArray[np.bool_]


def table(state: State, olds: Sequence[str], news: Sequence[str]) -> Table:
    """The table of all pairs of these keys; the caller keeps their product small."""
    import numpy as np

    ours = [parts(state.spelling[old]) for old in olds]
    theirs = [parts(state.wanted_spelling[new]) for new in news]
    with_numbers, names_only = _endings(ours, theirs)
    endings = with_numbers.copy()
    for row, column in zip(*np.nonzero(with_numbers > names_only), strict=True):
        if not state.alike(olds[row], news[column]):
            with_numbers[row, column] = names_only[row, column]
    likeness = 4 * with_numbers + _shared(ours, theirs)
    base = _bases([state.source[old] for old in olds], [state.target[new] for new in news])
    base[_of_two_kinds(state, olds, news)] = 0
    scores = np.where(base > 0, base + likeness, 0).astype(np.int32)
    return Table(olds, news, scores, likeness, endings, base == SAME_SHAPE)


def _endings(
    ours: Sequence[tuple[str, ...]], theirs: Sequence[tuple[str, ...]]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """How many components each pair ends alike with: with numbers as names, and up to the first number."""
    import numpy as np

    ids: dict[str, int] = {}
    depth = max((len(key) for key in (*ours, *theirs)), default=0)
    mine = _coded(ours, ids, depth, -1)
    other = _coded(theirs, ids, depth, -2)
    numeric = np.array([number(part) is not None for part in ids] + [False, False], dtype=bool)
    alike = np.ones((len(ours), len(theirs)), dtype=bool)
    named = alike.copy()
    every = np.zeros(alike.shape, dtype=np.int32)
    names = every.copy()
    for at in range(depth):
        alike &= mine[:, at, None] == other[None, :, at]
        named &= alike & ~numeric[mine[:, at], None]
        every += alike
        names += named
        if not alike.any():
            break
    return every, names


def _coded(keys: Sequence[tuple[str, ...]], ids: dict[str, int], depth: int, filler: int) -> NDArray[np.int32]:
    """Components as numbers, the last one first; ``filler`` where a key has no more."""
    import numpy as np

    found = np.full((len(keys), depth), filler, dtype=np.int32)
    for row, key in enumerate(keys):
        found[row, : len(key)] = [ids.setdefault(part, len(ids)) for part in reversed(key)]
    return found


def _shared(ours: Sequence[tuple[str, ...]], theirs: Sequence[tuple[str, ...]]) -> NDArray[np.int32]:
    """How many names each pair shares, wherever they stand."""
    import numpy as np

    common = {part for key in ours for part in key} & {part for key in theirs for part in key}
    columns = {part: at for at, part in enumerate(sorted(part for part in common if is_name(part)))}
    held = [np.zeros((len(keys), len(columns)), dtype=np.float32) for keys in (ours, theirs)]
    for keys, matrix in zip((ours, theirs), held, strict=True):
        for row, key in enumerate(keys):
            matrix[row, [columns[part] for part in set(key) if part in columns]] = 1
    return (held[0] @ held[1].T).astype(np.int32)


def _bases(ours: Sequence[Shaped], theirs: Sequence[Shaped]) -> NDArray[np.int32]:
    """What each pair's shapes are worth."""
    import numpy as np

    mine = [tuple(tensor.shape) for tensor in ours]
    other = [tuple(tensor.shape) for tensor in theirs]
    kinds = {shape: at for at, shape in enumerate(dict.fromkeys((*mine, *other)))}
    worth = np.zeros((len(kinds), len(kinds)), dtype=np.int32)
    np.fill_diagonal(worth, SAME_SHAPE)
    if len(kinds) <= 2000:
        for one in dict.fromkeys(mine):
            for two in dict.fromkeys(other):
                if reshapes(one, two):
                    worth[kinds[one], kinds[two]] = RESHAPED
    found: NDArray[np.int32] = worth[np.ix_([kinds[shape] for shape in mine], [kinds[shape] for shape in other])]
    return found


def _of_two_kinds(state: State, olds: Sequence[str], news: Sequence[str]) -> NDArray[np.bool_]:
    """Which pairs are of two kinds of leaves."""
    import numpy as np

    names = ["", "running_mean", "running_var", "bias", "weight"]
    mine = np.array([names.index(kind(state.spelling[old])) for old in olds])
    other = np.array([names.index(kind(state.wanted_spelling[new])) for new in news])
    found: NDArray[np.bool_] = (mine[:, None] > 0) & (other[None, :] > 0) & (mine[:, None] != other[None, :])
    return found
