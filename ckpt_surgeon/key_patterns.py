"""Fold long lists of keys for display: ``layer{1..4}.0.bn{1,2}.{weight,bias}`` instead of sixteen lines.

A pattern is a key whose components are sets of alternatives.  Patterns that differ in one component only are
merged into one, so that a pattern stands for exactly the product of its alternatives.  Where that leaves too
many patterns, integers that differ become ``*``, and the count beside the pattern tells how many keys it covers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, TypeAlias

_DIGITS = "0123456789"
_LONGEST_NUMBER = 18  # digits; beyond that a component is text (Python refuses to parse thousands of digits)
_DEEPEST = 24  # components; the rest of a deeper key is one, which bounds the work that a hostile key makes
_SWEEPS = 8  # one or two do for real models; the bound is for hostile keys again

_COMPARED = 5000  # keys that a mistyped pattern is compared with, letter by letter

# What wrappers put in front of the keys of the module that they wrap.
WRAPPERS = (
    "module",  # DataParallel, DistributedDataParallel
    "_orig_mod",  # torch.compile
    "_fsdp_wrapped_module",  # FullyShardedDataParallel
    "_fpw_module",  # the same, before torch 2.0
    "_checkpoint_wrapped_module",  # activation checkpointing
    "_dist_wrapped_module",  # DDP inside accelerate and others
)

FEW = 12  # lines that a list may take before it is cut, where it can be


@dataclass(frozen=True, slots=True)
class Folded:
    """Keys shown as one pattern: how many there are, and the index of the first of them in the list."""

    pattern: str
    count: int
    first: int


class _Words(frozenset[str]):
    """The alternatives of a component: compared as a set, shown in the order of the keys."""

    __slots__ = ("order",)
    order: tuple[str, ...]

    @classmethod
    def ordered(cls, words: Iterable[str]) -> _Words:
        order = tuple(dict.fromkeys(words))
        made = cls(order)
        made.order = order
        return made


_Parts: TypeAlias = tuple[_Words, ...]


class _Pattern(NamedTuple):
    parts: _Parts  # what is compared
    shown: _Parts  # what is displayed: the same, but for integers that are compared as a star
    covered: int
    first: int


def fold(keys: Iterable[str], *, limit: int | None = 12) -> list[Folded]:
    """Fold keys into patterns, in the order of the first key that each covers; keys given twice count once.

    Patterns without ``*`` expand to exactly the keys they cover.  Stars are drawn only when there would be more
    than ``limit`` patterns, and only for integers that differ between the patterns they join; ``None`` draws
    none.  Even so there can be more than ``limit``.

    >>> keys = [f"{block}.fc{i}.{leaf}" for block in "ab" for i in (1, 2, 3) for leaf in ("weight", "bias")]
    >>> fold(keys)
    [Folded(pattern='{a,b}.fc{1..3}.{weight,bias}', count=12, first=0)]
    >>> [folded.pattern for folded in fold(["a.0.w", "a.1.w", "b.0.w"], limit=1)]
    ['{a,b}.*.w']
    """
    firsts: dict[str, int] = {}
    for index, key in enumerate(keys):
        firsts.setdefault(key, index)
    patterns = _swept(_single_patterns(firsts))
    if limit is not None and len(patterns) > limit:
        patterns = _starred(patterns)
    return [
        Folded(".".join(map(_rendered, pattern.shown)), pattern.covered, pattern.first)
        for pattern in sorted(patterns, key=lambda pattern: pattern.first)
    ]


def _single_patterns(firsts: Mapping[str, int]) -> list[_Pattern]:
    """Make each key a pattern by itself; equal words share one set."""
    split = [key.split(".", _DEEPEST - 1) for key in firsts]
    alone = {word: _Words.ordered([word]) for word in set(chain.from_iterable(split))}
    patterns = []
    for words, first in zip(split, firsts.values(), strict=True):
        parts = tuple([alone[word] for word in words])
        patterns.append(_Pattern(parts, parts, 1, first))
    return patterns


def _starred(patterns: list[_Pattern]) -> list[_Pattern]:
    """Merge patterns as if every integer were the same."""
    stars = {
        words: _Words.ordered("*" if _is_number(word) else word for word in words.order)
        for words in {words for pattern in patterns for words in pattern.parts}
    }
    patterns = [pattern._replace(parts=tuple([stars[words] for words in pattern.parts])) for pattern in patterns]
    for _ in range(_SWEEPS):
        before = len(patterns)
        patterns = _swept(patterns)
        if len(patterns) == before:
            break
    return patterns


def _swept(patterns: list[_Pattern]) -> list[_Pattern]:
    """Merge the patterns that differ in one component, trying each component once, the last one first.

    One sweep is enough for single keys: as long as a component has not been tried, the ones before it are single
    words, so two patterns that a later merge makes alike up to it had parts that were merged when it was tried.
    """
    by_depth: defaultdict[int, list[_Pattern]] = defaultdict(list)
    for pattern in patterns:
        by_depth[len(pattern.parts)].append(pattern)
    for depth, alike in by_depth.items():
        for column in reversed(range(depth)):
            alike = _merged(alike, column)
        by_depth[depth] = alike
    return [pattern for alike in by_depth.values() for pattern in alike]


def _merged(patterns: list[_Pattern], column: int) -> list[_Pattern]:
    """Merge the patterns that are equal but for one column."""
    rests = [hash(parts[:column] + parts[column + 1 :]) for parts, *_ in patterns]
    if len(set(rests)) == len(patterns):  # most columns of most lists: not worth a table of tuples
        return patterns
    groups: dict[_Parts, list[_Pattern]] = {}
    for pattern in patterns:
        parts = pattern.parts
        groups.setdefault(parts[:column] + parts[column + 1 :], []).append(pattern)
    return [_union(group, column) if len(group) > 1 else group[0] for group in groups.values()]


def _union(patterns: list[_Pattern], column: int) -> _Pattern:
    """One pattern for several, in order, that differ in one column."""
    first = patterns[0]
    words = _Words.ordered(chain.from_iterable([pattern.parts[column].order for pattern in patterns]))
    parts = (*first.parts[:column], words, *first.parts[column + 1 :])
    covered = sum([pattern.covered for pattern in patterns])
    if all(pattern.shown is pattern.parts for pattern in patterns):
        return _Pattern(parts, parts, covered, first.first)
    columns = zip(*(pattern.shown for pattern in patterns), strict=True)
    shown = (every[0] if len(set(every)) == 1 else part for part, every in zip(parts, columns, strict=True))
    return _Pattern(parts, tuple(shown), covered, first.first)


def _rendered(words: _Words) -> str:
    """Spell alternatives: as numbers after a common stem if they are that, otherwise in the order of the keys.

    >>> _rendered(_Words.ordered(["conv1", "conv2", "conv3", "conv5"]))
    'conv{1..3,5}'
    >>> _rendered(_Words.ordered(["weight", "bias"]))
    '{weight,bias}'
    """
    if len(words) == 1:
        return words.order[0]
    stem = words.order[0].rstrip(_DIGITS)
    numbers = [word.removeprefix(stem) for word in words.order if word.startswith(stem)]
    if len(numbers) == len(words) and all(map(_is_number, numbers)) and _is_one_style(numbers):
        return f"{stem}{{{_runs(numbers)}}}"
    return f"{{{','.join(words.order)}}}"


def _is_number(word: str) -> bool:
    return 0 < len(word) <= _LONGEST_NUMBER and word.isascii() and word.isdigit()


def _is_one_style(numbers: list[str]) -> bool:
    """Whether the numbers are all padded to one width, or none is padded; ``{8..11}`` must not mean ``08``."""
    return len(set(map(len, numbers))) == 1 or not any(len(number) > 1 and number[0] == "0" for number in numbers)


def _runs(numbers: list[str]) -> str:
    """Spell numbers in order, three or more consecutive ones as ``first..last``.

    >>> _runs(["5", "0", "2", "1", "7", "8"])
    '0..2,5,7,8'
    """
    runs: list[list[str]] = []
    for number in sorted(numbers, key=int):
        if runs and int(runs[-1][-1]) + 1 == int(number):
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(run) for run in runs)


def folded(keys: Iterable[str], *, limit: int | None = FEW) -> list[tuple[str, int]]:
    """Keys as patterns and counts; at most ``limit`` of them, the rest as one line."""
    found = [(one.pattern, one.count) for one in fold(keys)]
    if limit is None or len(found) <= limit:
        return found
    rest = found[limit - 1 :]
    return [*found[: limit - 1], (f"… {len(rest):,} more patterns (--full lists all)", sum(count for _, count in rest))]


def pattern_instead(pattern: str, keys: Iterable[str]) -> str:
    """What to write instead of a glob that matches no key: a glob on what is there, or a key of a like name.

    >>> pattern_instead("fc", ["fc.weight", "fc.bias"])
    "'fc.*' would match 2 keys"
    >>> pattern_instead("fc.wieght", ["fc.weight"]), pattern_instead("head.*", ["fc.weight"])
    ("there is 'fc.weight'", '')
    """
    from difflib import get_close_matches
    from fnmatch import fnmatchcase

    there = list(keys)
    stem = pattern.rstrip(".*")
    for wider in (f"{stem}.*", f"*.{stem}.*", f"*.{stem}", f"*{pattern}" if pattern[:1] != "*" else "") if stem else ():
        hits = sum(fnmatchcase(key, wider) for key in there) if wider else 0
        if hits:
            return f"{wider!r} would match {hits:,} key{'' if hits == 1 else 's'}"
    close = get_close_matches(pattern, there[:_COMPARED], n=2)
    if close:
        return f"there is {' and '.join(map(repr, close))}"
    parts = sorted({".".join(key.split(".")[:depth]) for key in there[:_COMPARED] for depth in (1, 2, 3)})
    close = get_close_matches(stem, parts[:_COMPARED], n=1, cutoff=0.75)
    return f"there are keys {close[0] + '.*'!r}" if close else ""
