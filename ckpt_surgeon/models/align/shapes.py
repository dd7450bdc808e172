"""What shapes can say: the only two keys of a shape, and one name with two shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

from ...edits.keys import is_derivable
from ...tensors.records import Shaped
from .parts import kind, parts
from .state import State


def reshapes(ours: tuple[int, ...], theirs: tuple[int, ...]) -> bool:
    """Whether a shape is the other with its elements in the same order: Linear and convolution, squeezed dimensions."""
    if prod(ours) != prod(theirs) or ours == theirs or not ours or not theirs:
        return False
    squeezed = [size for size in ours if size != 1] == [size for size in theirs if size != 1]
    return squeezed or (ours[0] == theirs[0] and {len(ours), len(theirs)} == {2, 4})


def of_one_kind(old: str, new: str) -> bool:
    """Whether two leaves may be one: a weight never becomes a bias."""
    kinds = kind(old), kind(new)
    return not all(kinds) or kinds[0] == kinds[1]


def only_ones(state: State) -> None:
    """Settle two keys that are the only ones of their shape, of more than one element."""
    open_olds, open_news = state.undecided()
    ours, theirs = _by_shape(state.source, open_olds), _by_shape(state.target, open_news)
    for shape, olds in ours.items():
        news = theirs.get(shape, [])
        if len(olds) == len(news) == 1 and prod(shape) > 1 and not is_derivable(olds[0]):
            old, new = olds[0], news[0]
            if of_one_kind(state.spelling[old], state.wanted_spelling[new]):
                state.settle(old, new, "the only ones of their shape", "likely")


def other_shapes(state: State) -> None:
    """Settle keys of one name and two shapes: the same key, a prefix's key, or an ending that only two keys have."""
    olds, news = state.undecided()
    wanted = set(news)
    for old in olds:
        same = old if old in wanted else state.by_spelling.get(state.spelling[old], "")
        if same in wanted and same in state.news and state.alike(old, same):
            state.settle_other_shape(old, same, "the same name")
    for before, after, said in state.changes:
        for old in [key for key in state.olds if state.spelling[key].startswith(before)]:
            new = state.by_spelling.get(after + state.spelling[old][len(before) :], "")
            if new in state.news and state.alike(old, new):
                state.settle_other_shape(old, new, said)
    olds, news = state.undecided()
    ours, theirs = _by_end(olds, state.spelling), _by_end(news, state.wanted_spelling)
    for ending, found in ours.items():
        if len(found) == len(theirs.get(ending, [])) == 1:
            state.settle_other_shape(found[0], theirs[ending][0], "the same ending", "possible")


def _by_end(keys: Iterable[str], spelling: Mapping[str, str]) -> dict[str, list[str]]:
    """Keys by their last two components."""
    found: dict[str, list[str]] = {}
    for key in keys:
        found.setdefault(".".join(parts(spelling[key])[-2:]), []).append(key)
    return found


def _by_shape(tensors: Mapping[str, Shaped], keys: Iterable[str]) -> dict[tuple[int, ...], list[str]]:
    found: dict[tuple[int, ...], list[str]] = {}
    for key in keys:
        found.setdefault(tuple(tensors[key].shape), []).append(key)
    return found
