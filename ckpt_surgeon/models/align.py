"""Proposes the renames that turn a checkpoint's keys into a target's, and says where it does not know.

Evidence is taken in this order, the strongest first; what one step settles the next ones build on:

1. *names*: numbered parts that are the same but for where the numbers begin; the same key; the same key behind
   another prefix; old spellings (gamma for weight);
2. *order*: both sides list their parameters in the order of definition, so the longest sequence of equal shapes
   that runs through both is an alignment.  Where parameters of equal shape could change places, it stands only if
   names or numbering tell them apart on both sides; else the choice is left open and said to be;
3. *siblings*: when the weight of a module is settled, so are its bias and statistics;
4. *shape*: two keys that are the only ones of their shape.

The result is data: :class:`Alignment`.  Nothing here reads a value or knows torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations, takewhile
from math import prod
from typing import TYPE_CHECKING

from ..edits.keys import is_derivable, without_wrappers
from ..reading.sources import state_dict_of
from ..tensors.records import Shaped
from ..text import Shown
from .targets import expected_of

if TYPE_CHECKING:
    from ..reading.sources import Source
    from .targets import Target

LEAVES = {"gamma": "weight", "beta": "bias"}  # spellings of TensorFlow's that BERT ports kept
# Of two copies that a training method keeps, the one that people reuse: with its reason.
PREFERRED = {("encoder_q", "encoder_k"): "encoder_k is the momentum copy of encoder_q (MoCo)"}
CHANGES = 64  # changes of prefixes that are looked for; what many explain, order explains as well
CELLS = 4_000_000  # pairs of keys that the sequence step looks at; beyond, names have to do

_NUMBER = re.compile(r"(\d+)")


@dataclass(frozen=True, slots=True, repr=False)
class Proposal(Shown):
    """One key's new name, why, and how sure that is: "certain", "likely", or "other shape" where only the name fits.

    ``reshape`` is the target's shape where the elements are the same and the shape is not (Linear to convolution).
    """

    old: str
    new: str
    reason: str
    certainty: str
    reshape: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Ambiguity(Shown):
    """Keys between which nothing decides: any of ``olds`` could become any of ``news``."""

    olds: tuple[str, ...]
    news: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True, repr=False)
class Alignment(Shown):
    """What :func:`align` found; ``unused`` and ``missing`` are the keys for which there is no proposal."""

    proposals: tuple[Proposal, ...]
    ambiguous: tuple[Ambiguity, ...]
    unused: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether every key of the target is settled, in name and shape."""
        return not (self.missing or self.ambiguous or any(one.certainty == "other shape" for one in self.proposals))

    @property
    def pairs(self) -> dict[str, str]:
        """Old key to new key, for every proposal."""
        return {one.old: one.new for one in self.proposals}


@dataclass(frozen=True, slots=True)
class _Counted:
    """The numbers below each path of both sides: whether a number means the same part on both."""

    ours: Mapping[str, frozenset[int]]
    theirs: Mapping[str, frozenset[int]]

    @classmethod
    def of(cls, source: Iterable[str], target: Iterable[str]) -> _Counted:
        return cls(_numbers(source), _numbers(target))

    def alike(self, old: str, new: str) -> bool:
        """Whether the numbers that both keys end alike with are counted from the same beginning on both sides.

        A part's number says nothing where the two sides have other numbers below it: the parts may have moved up.
        """
        olds, news = old.split("."), new.split(".")
        for back in range(2, 1 + min(len(olds), len(news))):
            if olds[-back] != news[-back]:
                return True
            number = _number(olds[-back])
            if number is None:
                continue
            ours = self.ours[".".join(olds[:-back])]
            theirs = self.theirs[".".join(news[:-back])]
            if {one for one in ours if one < number} != {one for one in theirs if one < number}:
                return False
        return True

    def in_turn(self, before: str, after: str) -> bool:
        """Whether two numbered prefixes (``blocks.1.``) come after as many others on both sides."""
        ours, theirs = before.split(".")[:-1], after.split(".")[:-1]
        numbers = _number(ours[-1]) if ours else None, _number(theirs[-1]) if theirs else None
        if numbers[0] is None or numbers[1] is None:
            return True
        earlier = [number for number in self.ours[".".join(ours[:-1])] if number < numbers[0]]
        return len(earlier) == sum(number < numbers[1] for number in self.theirs[".".join(theirs[:-1])])


def _numbers(keys: Iterable[str]) -> dict[str, frozenset[int]]:
    found: dict[str, set[int]] = {}
    for key in keys:
        parts = key.split(".")
        for depth, part in enumerate(parts[:-1]):
            number = _number(part)
            if number is not None:
                found.setdefault(".".join(parts[:depth]), set()).add(number)
    return {path: frozenset(numbers) for path, numbers in found.items()}


def _number(part: str) -> int | None:
    return int(part) if part.isascii() and part.isdecimal() else None


@dataclass(slots=True)
class _State:
    """What is settled and what is still open on both sides."""

    source: Mapping[str, Shaped]
    target: Mapping[str, Shaped]
    olds: dict[str, None]
    news: dict[str, None]
    counted: _Counted
    settled: dict[str, Proposal] = field(default_factory=dict)
    ambiguous: list[Ambiguity] = field(default_factory=list)

    def settle(self, old: str, new: str, reason: str, certainty: str) -> None:
        ours, theirs = tuple(self.source[old].shape), tuple(self.target[new].shape)
        reshape = None if ours == theirs else theirs
        self.settled[old] = Proposal(old, new, reason, certainty, reshape)
        del self.olds[old], self.news[new]

    def fits(self, old: str, new: str) -> bool:
        return tuple(self.source[old].shape) == tuple(self.target[new].shape)


def align(source: Source | Mapping[str, Shaped], target: Target) -> Alignment:
    """Propose which key of ``source`` becomes which of ``target``.

    Both are paths or URLs, opened Checkpoints, state_dicts, models, or mappings from keys to anything with a shape;
    ``target`` may be the spelling of a model too.

    >>> from ckpt_surgeon.tensors.dtypes import parse
    >>> from ckpt_surgeon.models.targets import Expected
    >>> def tensors(**shapes): return {key: Expected(parse("float32"), shape, True) for key, shape in shapes.items()}
    >>> found = align(tensors(a=(3, 2), b=(3,)), tensors(weight=(3, 2), bias=(3,)))
    >>> found.pairs
    {'a': 'weight', 'b': 'bias'}
    """
    source, target = state_dict_of(source), expected_of(target)
    counted = _Counted.of(source, target)
    state = _State(source, target, _by_number(source), _by_number(target), counted)
    _renumbered(state)
    _same_names(state)
    _prefixes(state)
    # A bias goes with its weight, where there is one; twice, for the parts that come in another order.
    for kinds in (("weight", ""), ("weight", ""), ("weight", "", "bias")):
        _sequence(state, kinds)
        _siblings(state)
    _only_ones(state)
    _other_shapes(state)
    open_keys = (
        tuple(key for key in keys if key in left) for keys, left in ((source, state.olds), (target, state.news))
    )
    proposals = tuple(state.settled[key] for key in source if key in state.settled)
    return Alignment(proposals, tuple(state.ambiguous), *open_keys)


def _by_number(keys: Iterable[str]) -> dict[str, None]:
    """Keys module by module, numbered parts by their numbers: files may list ``10`` before ``2``."""
    split = {key: key.split(".") for key in keys}
    named = {".".join(parts[:depth]) for parts in split.values() for depth, part in enumerate(parts) if _is_name(part)}
    ranks: dict[tuple[str, str], int] = {}
    places: dict[str, list[tuple[int, int]]] = {}
    for key, parts in split.items():
        paths = [".".join(parts[:depth]) for depth in range(len(parts))]
        places[key] = [
            (ranks.setdefault((path, part), len(ranks)), 0)
            if path in named
            else (ranks.setdefault((path, ""), len(ranks)), int(part))
            for path, part in zip(paths, parts, strict=True)
        ]
    return dict.fromkeys(sorted(split, key=places.__getitem__))


def _is_name(part: str) -> bool:
    return _number(part) is None


# -- names

_Part = frozenset[tuple[str, tuple[int, ...]]]  # what a numbered part holds: the rest of each key, and its shape
_Families = dict[str, dict[int, _Part]]


def _renumbered(state: _State) -> None:
    """Numbered parts (``blocks.0`` to ``blocks.11``) that the target counts from elsewhere."""
    ours, theirs = _families(state.source), _families(state.target)
    for path, parts in ours.items():
        numbers = sorted(parts)
        if len(numbers) < 2:
            continue
        other = _counterpart(state, path, ours, theirs)
        if other is None:
            continue
        wanted = sorted(theirs[other])
        if wanted == numbers or len({new - old for old, new in zip(numbers, wanted, strict=True)}) != 1:
            continue
        reason = f"{path}{numbers[0]} to {numbers[-1]} are {other}{wanted[0]} to {wanted[-1]}"
        for old, new in zip(numbers, wanted, strict=True):
            for key in [key for key in state.olds if key.startswith(f"{path}{old}.")]:
                renamed = f"{other}{new}.{_modern(key.removeprefix(f'{path}{old}.'))}"
                if renamed in state.news:
                    state.settle(key, renamed, reason, "likely")


def _counterpart(state: _State, path: str, ours: _Families, theirs: _Families) -> str | None:
    """The path of the target whose numbered parts hold the same in the same order, where there is only one."""
    held = _in_order(ours[path])
    found = [other for other, parts in theirs.items() if _in_order(parts) == held]
    if path in found and state.counted.alike(f"{path}0", f"{path}0"):
        return path
    rivals = [other for other, parts in ours.items() if _in_order(parts) == held]
    return found[0] if len(found) == len(rivals) == 1 else None


def _in_order(parts: Mapping[int, _Part]) -> list[_Part]:
    return [parts[number] for number in sorted(parts)]


def _families(tensors: Mapping[str, Shaped]) -> _Families:
    """The numbered parts of a model: path in front of the number, number, and what the part holds."""
    found: dict[str, dict[int, list[tuple[str, tuple[int, ...]]]]] = {}
    for key, tensor in tensors.items():
        parts = key.split(".")
        for depth, part in enumerate(parts[:-1]):
            number = _number(part)
            if number is not None:
                path, rest = ".".join(parts[:depth]), ".".join(parts[depth + 1 :])
                numbers = found.setdefault(f"{path}." if path else "", {})
                numbers.setdefault(number, []).append((_modern(rest), tuple(tensor.shape)))
    return {path: {number: frozenset(held) for number, held in numbers.items()} for path, numbers in found.items()}


def _same_names(state: _State) -> None:
    for key in list(state.olds):
        if key in state.news and state.fits(key, key) and state.counted.alike(key, key):
            state.settle(key, key, "same key", "certain")
    for key in list(state.olds):
        new = _modern(key)
        if new != key and new in state.news and state.fits(key, new) and state.counted.alike(key, new):
            state.settle(key, new, "old spelling of the same key", "certain")


def _modern(key: str) -> str:
    """A key with today's spelling of its leaf."""
    parent, dot, leaf = key.rpartition(".")
    return parent + dot + LEAVES.get(leaf, leaf)


@dataclass(frozen=True, slots=True)
class _Change:
    """One change of prefixes, and the pairs that it would settle."""

    said: str
    pairs: dict[str, str]
    old_prefix: str
    trusted: bool = True  # False where numbers would have to mean the same on both sides, and may not


def _prefixes(state: _State) -> None:
    """Change prefixes as long as one change settles at least two keys and every key that carries the prefix fits."""
    for _ in range(CHANGES):
        changes = [change for change in _changes(state) if len(change.pairs) > 1 or len(state.news) == 1]
        changes.sort(key=lambda change: -len(change.pairs))
        best = next((change for change in changes if change.trusted and not _is_doubtful(change, changes)), None)
        if best is None:
            return
        rivals = [change for change in changes if _comes_from_elsewhere(best, change)]
        chosen, why = _preferred([best, *rivals]) if rivals else (best, "")
        if chosen is None:
            _leave_open(state, best, rivals)
            continue
        for old, new in chosen.pairs.items():
            state.settle(old, new, chosen.said + (f"; {why}" if why else ""), "likely" if why else "certain")


def _is_doubtful(change: _Change, changes: Iterable[_Change]) -> bool:
    """Whether the same keys fit another place as well, or the place may be that of others: order may tell."""
    return _goes_elsewhere(change, changes) or any(
        not other.trusted and _comes_from_elsewhere(change, other) for other in changes
    )


def _goes_elsewhere(change: _Change, changes: Iterable[_Change]) -> bool:
    return any(
        _is_rival(change.pairs, other.pairs) and not set(change.pairs.values()) & set(other.pairs.values())
        for other in changes
    )


def _comes_from_elsewhere(change: _Change, other: _Change) -> bool:
    """Whether other keys fit the same place as well."""
    theirs = {new: old for old, new in other.pairs.items()}
    return _is_rival({new: old for old, new in change.pairs.items()}, theirs) and not set(change.pairs) & set(
        other.pairs
    )


def _is_rival(ours: Mapping[str, str], theirs: Mapping[str, str]) -> bool:
    """Whether two changes are about the same keys: a head more or less does not decide between two copies."""
    return 10 * len(ours.keys() & theirs.keys()) >= 9 * len(ours)


def _preferred(rivals: list[_Change]) -> tuple[_Change | None, str]:
    for (chosen, copy), why in PREFERRED.items():
        prefixes = {change.old_prefix: change for change in rivals}
        ours = [change for prefix, change in prefixes.items() if chosen in prefix.split(".")]
        theirs = [change for prefix, change in prefixes.items() if copy in prefix.split(".")]
        if len(ours) == 1 and len(ours) + len(theirs) == len(rivals):
            return ours[0], why
    return None, ""


def _leave_open(state: _State, best: _Change, rivals: list[_Change]) -> None:
    """Several sub-trees fit one place equally well: none is taken."""
    olds = {old for change in (best, *rivals) for old in change.pairs}
    news = {new for change in (best, *rivals) for new in change.pairs.values()}
    names = ", ".join(repr(change.old_prefix) for change in (best, *rivals))
    reason = f"the sub-trees {names} fit equally well"
    ordered = [tuple(key for key in keys if key in found) for keys, found in ((state.olds, olds), (state.news, news))]
    state.ambiguous.append(Ambiguity(ordered[0], ordered[1], reason))
    for key in olds:
        state.olds.pop(key, None)
    for key in news:
        state.news.pop(key, None)


def _changes(state: _State) -> Iterator[_Change]:
    """Every change of a leading path into another that settles keys and contradicts none."""
    counted = _Counted.of(map(without_wrappers, state.source), state.target)
    peeled = {old: new for old in state.olds if (new := _modern(without_wrappers(old))) in state.news}
    fitting = {
        old: new for old, new in peeled.items() if state.fits(old, new) and counted.alike(without_wrappers(old), new)
    }
    if len(set(fitting.values())) == len(fitting) and fitting:
        yield _Change("the same key without its wrappers", fitting, "")
    votes: dict[tuple[str, str, bool], dict[str, str]] = {}
    by_leaf: dict[str, list[str]] = {}
    for new in state.news:
        by_leaf.setdefault(new.rpartition(".")[2], []).append(new)
    for old in state.olds:
        news = by_leaf.get(_modern(old).rpartition(".")[2], [])
        for new in news if len(news) * len(state.olds) <= CELLS else []:
            if state.fits(old, new):
                alike = state.counted.alike(old, new)
                for before, after in _prefix_changes(_modern(old), new):
                    trusted = alike and state.counted.in_turn(before, after)
                    votes.setdefault((before, after, trusted), {})[old] = new
    for (before, after, trusted), pairs in votes.items():
        under = [old for old in state.olds if _modern(old).startswith(before)]
        wrong = [
            old
            for old in under
            if old not in pairs
            and (new := after + _modern(old)[len(before) :]) in state.news
            and state.counted.alike(old, new)
            and not state.fits(old, new)
        ]
        moved = any(
            _modern(old) != new
            and (
                (new in state.olds and state.fits(new, new))
                or (_modern(old) in state.news and state.fits(old, _modern(old)))
            )
            for old, new in pairs.items()
        )
        if not wrong and not moved and len(set(pairs.values())) == len(pairs):
            yield _Change(_said(before, after), pairs, before, trusted)


def _prefix_changes(old: str, new: str) -> Iterator[tuple[str, str]]:
    """The pair of prefixes that turns one key into the other, where more than the leaf is the same behind them."""
    olds, news = old.split("."), new.split(".")
    shorter = min(len(olds), len(news))
    common = next((at for at in range(shorter) if olds[-1 - at] != news[-1 - at]), shorter)
    before, after = olds[: len(olds) - common], news[: len(news) - common]
    if before != after and (common > 1 or not before or not after):
        yield "".join(part + "." for part in before), "".join(part + "." for part in after)


def _said(before: str, after: str) -> str:
    if not after:
        return f"{before!r} taken off"
    return f"{after!r} put in front" if not before else f"{before!r} became {after!r}"


# -- order


def _kind(key: str) -> str:
    """What a leaf is, where its name tells: kinds never change into each other."""
    leaf = _modern(key).rpartition(".")[2]
    for kind in ("running_mean", "running_var", "bias", "weight"):
        if leaf == kind or leaf.endswith("_" + kind):
            return kind
    return ""


def _reshapes(ours: tuple[int, ...], theirs: tuple[int, ...]) -> bool:
    """Whether a shape is the other with its elements in the same order: Linear and convolution, squeezed dimensions."""
    if prod(ours) != prod(theirs) or ours == theirs or not ours or not theirs:
        return False
    squeezed = [size for size in ours if size != 1] == [size for size in theirs if size != 1]
    return squeezed or (ours[0] == theirs[0] and {len(ours), len(theirs)} == {2, 4})


def _score(state: _State, old: str, new: str) -> int:
    """How well two keys fit, 0 where they cannot be one: shape first, then the components that end both."""
    kinds = _kind(old), _kind(new)
    if all(kinds) and kinds[0] != kinds[1]:
        return 0
    ours, theirs = tuple(state.source[old].shape), tuple(state.target[new].shape)
    if ours == theirs:
        return 100 + _likeness(state, old, new)
    return 60 + _likeness(state, old, new) if _reshapes(ours, theirs) else 0


def _likeness(state: _State, old: str, new: str) -> int:
    """How many components two keys end alike with, and how many they share at all, as a small number.

    Numbers count only at the end, and where they are counted alike.
    """
    olds, news = _modern(old).split("."), new.split(".")
    trusted = state.counted.alike(old, new)
    alike = 0
    for one, two in zip(reversed(olds), reversed(news), strict=False):
        if one != two or not (trusted or _is_name(one)):
            break
        alike += 1
    shared = set(olds) & set(news)
    return 4 * alike + sum(_is_name(part) for part in shared)


def _sequence(state: _State, kinds: tuple[str, ...]) -> None:
    """Align what is open in order: the best sequence of pairs, where it is the only best one."""
    olds, news = (
        [key for key in keys if _kind(key) in kinds and not is_derivable(key)] for keys in _not_ambiguous(state)
    )
    if not olds or not news or len(olds) * len(news) > CELLS:
        return
    scores = [[_score(state, old, new) for new in news] for old in olds]
    chosen, doubtful = _best_path(scores)
    pairs = [(olds[row], news[column]) for row, column in chosen]
    open_pairs = {(olds[row], news[column]) for row, column in (*doubtful, *_replaceable(scores, chosen))}
    open_pairs |= _confusable(state, pairs) | {
        pair for pair in pairs if _is_denied(state, *pair) or _is_outdone(state, pair, olds, news)
    }
    for old, new in pairs:
        if (old, new) not in open_pairs:
            state.settle(old, new, "same shape in the same order", "likely")
    _open_groups(state, [pair for pair in pairs if pair in open_pairs])


def _is_outdone(state: _State, pair: tuple[str, str], olds: Iterable[str], news: Iterable[str]) -> bool:
    """Whether one of the two ends more alike with another open key of the same shape, numbers and all."""
    old, new = pair
    alike = _ending(old, new)
    return any(_ending(old, other) > alike and state.fits(old, other) for other in news) or any(
        _ending(other, new) > alike and state.fits(other, new) for other in olds
    )


def _ending(old: str, new: str) -> int:
    """How many components two keys end alike with."""
    parts = zip(reversed(_modern(old).split(".")), reversed(new.split(".")), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], parts))


def _is_denied(state: _State, old: str, new: str) -> bool:
    """Whether names tell another story than order: one side has a key of the other one's name."""
    return (
        not state.counted.alike(old, new)
        or (_modern(old) in state.target and state.fits(old, _modern(old)) and _modern(old) != new)
        or (new in state.source and state.fits(new, new) and _modern(old) != new)
    )


def _best_path(scores: list[list[int]]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The monotone path with the greatest sum, and those of its cells that another best path avoids."""
    rows, columns = len(scores), len(scores[0])
    ahead = _sums(scores)
    behind = [row[::-1] for row in _sums([row[::-1] for row in scores[::-1]])[::-1]]
    total = ahead[rows][columns]
    best = [
        [
            column
            for column in range(columns)
            if scores[row][column] and ahead[row][column] + scores[row][column] + behind[row + 1][column + 1] == total
        ]
        for row in range(rows)
    ]
    skippable = [
        any(ahead[row][column] + behind[row + 1][column] == total for column in range(columns + 1))
        for row in range(rows)
    ]
    chosen, doubtful = [], []
    last = -1
    for row in range(rows):
        following = [column for column in best[row] if column > last]
        if not following:
            continue
        column = following[0]
        chosen.append((row, column))
        last = column
        if len(best[row]) > 1 or skippable[row]:
            doubtful.append((row, column))
    return chosen, doubtful


def _replaceable(scores: list[list[int]], chosen: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The chosen cells that a row or column outside the path fits as well: only its place kept it out."""
    rows = set(range(len(scores))) - {row for row, _ in chosen}
    columns = set(range(len(scores[0]))) - {column for _, column in chosen}
    for row, column in chosen:
        score = scores[row][column]
        if any(scores[other][column] >= score for other in rows) or any(
            scores[row][other] >= score for other in columns
        ):
            yield row, column


def _sums(scores: list[list[int]]) -> list[list[int]]:
    """sums[i][j]: the best path through the first i rows and j columns."""
    columns = len(scores[0])
    sums = [[0] * (columns + 1)]
    for row in scores:
        above = sums[-1]
        current = [0]
        left = 0
        for column in range(columns):
            score = row[column]
            value = above[column] + score if score else 0
            left = max(value, above[column + 1], left)
            current.append(left)
        sums.append(current)
    return sums


def _confusable(state: _State, pairs: list[tuple[str, str]]) -> set[tuple[str, str]]:
    """The pairs that could change places with another, and that neither names nor numbering tell apart."""
    groups: dict[tuple[tuple[int, ...], tuple[int, ...], str], list[tuple[str, str]]] = {}
    for old, new in pairs:
        kind = (tuple(state.source[old].shape), tuple(state.target[new].shape), _kind(old))
        groups.setdefault(kind, []).append((old, new))
    doubtful: set[tuple[str, str]] = set()
    for group in groups.values():
        for one, two in combinations(group, 2):
            if not _decided(state, one, two):
                doubtful |= {one, two}
    return doubtful


def _decided(state: _State, one: tuple[str, str], two: tuple[str, str]) -> bool:
    """Whether two pairs of equal shape are told apart: by likeness, or by numbers that rise on both sides."""
    straight = _likeness(state, *one) + _likeness(state, *two)
    crossed = _likeness(state, one[0], two[1]) + _likeness(state, two[0], one[1])
    if straight != crossed:
        return straight > crossed
    if (one[0].rpartition(".")[0], one[1].rpartition(".")[0]) == (two[0].rpartition(".")[0], two[1].rpartition(".")[0]):
        return one[0].rpartition(".")[2] == one[1].rpartition(".")[2]
    risen = _risen(one[0], two[0])
    return risen != "" and risen == _risen(one[1], two[1])


def _risen(first: str, second: str) -> str:
    """What the first difference between two keys is: a "number" that grows, a "step" out of numbered parts, or ""."""
    ones, twos = first.split("."), second.split(".")
    at = next((at for at, (one, two) in enumerate(zip(ones, twos, strict=False)) if one != two), -1)
    one, two = _NUMBER.split(ones[at]), _NUMBER.split(twos[at])
    if one[::2] == two[::2]:
        return "number" if [int(number) for number in one[1::2]] < [int(number) for number in two[1::2]] else ""
    is_step = _NUMBER.search(".".join(ones[at:])) and not _NUMBER.search(".".join(twos[at:]))
    return "step" if is_step else ""


def _open_groups(state: _State, pairs: Iterable[tuple[str, str]]) -> None:
    """Say what was left open, group by group of equal shapes."""
    groups: dict[tuple[tuple[int, ...], str], list[tuple[str, str]]] = {}
    for old, new in pairs:
        groups.setdefault((tuple(state.source[old].shape), _kind(old)), []).append((old, new))
    for (shape, _), group in groups.items():
        olds = [old for old in state.olds if any(old == one for one, _ in group)]
        news = [
            new
            for new in state.news
            if any(new == two for _, two in group)
            or (tuple(state.target[new].shape) == shape and _kind(new) == _kind(group[0][1]))
        ]
        others = [
            old
            for old in state.olds
            if old not in olds and tuple(state.source[old].shape) == shape and _kind(old) == _kind(group[0][0])
        ]
        reason = f"all have shape {list(shape)}, and neither names nor numbers tell them apart"
        state.ambiguous.append(Ambiguity((*olds, *others), tuple(news), reason))


# -- siblings and shapes


def _siblings(state: _State) -> None:
    """Where a module's keys went, its other keys go too, if all settled ones agree."""
    homes: dict[str, set[str]] = {}
    for one in state.settled.values():
        homes.setdefault(one.old.rpartition(".")[0], set()).add(one.new.rpartition(".")[0])
    open_keys = {key for one in state.ambiguous for key in one.olds}
    for old in list(state.olds):
        _, dot, leaf = _modern(old).rpartition(".")
        found = homes.get(old.rpartition(".")[0], set())
        if old in open_keys or len(found) != 1:
            continue
        home = next(iter(found))
        new = f"{home}{dot if home else ''}{leaf}"
        if new in state.news and state.fits(old, new):
            state.settle(old, new, "goes with its module", "likely")


def _only_ones(state: _State) -> None:
    """Two keys that are the only ones of their shape, of more than one element."""
    open_olds, open_news = _not_ambiguous(state)
    ours, theirs = _by_shape(state.source, open_olds), _by_shape(state.target, open_news)
    for shape, olds in ours.items():
        news = theirs.get(shape, [])
        if (
            len(olds) == len(news) == 1
            and prod(shape) > 1
            and not is_derivable(olds[0])
            and _score(state, olds[0], news[0])
        ):
            state.settle(olds[0], news[0], "the only ones of their shape", "likely")


def _other_shapes(state: _State) -> None:
    """Keys whose names are the same, or end alike (``fc.weight``), and whose shapes differ: parts of another size."""
    olds, news = _not_ambiguous(state)
    for old in olds:
        if old in news and state.counted.alike(old, old):
            _settle_other_shape(state, old, old)
    olds, news = _not_ambiguous(state)
    ours, theirs = _by_ending(olds), _by_ending(news)
    for ending, found in ours.items():
        if len(found) == len(theirs.get(ending, [])) == 1:
            _settle_other_shape(state, found[0], theirs[ending][0])


def _settle_other_shape(state: _State, old: str, new: str) -> None:
    if state.fits(old, new):
        return
    shapes = f"shape {list(state.source[old].shape)}, wanted is {list(state.target[new].shape)}"
    state.settled[old] = Proposal(old, new, f"the same name; {shapes}", "other shape")
    del state.olds[old], state.news[new]


def _not_ambiguous(state: _State) -> tuple[list[str], list[str]]:
    """What is open on both sides and in no ambiguity."""
    olds = {key for one in state.ambiguous for key in one.olds}
    news = {key for one in state.ambiguous for key in one.news}
    return [key for key in state.olds if key not in olds], [key for key in state.news if key not in news]


def _by_ending(keys: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key in keys:
        found.setdefault(".".join(_modern(key).split(".")[-2:]), []).append(key)
    return found


def _by_shape(tensors: Mapping[str, Shaped], keys: Iterable[str]) -> dict[tuple[int, ...], list[str]]:
    found: dict[tuple[int, ...], list[str]] = {}
    for key in keys:
        found.setdefault(tuple(tensors[key].shape), []).append(key)
    return found
