"""Evidence of spelling: names that are known to mean the same, written alike on both sides."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache

from .conventions import Convention, Replacement, conventions_of
from .parts import by_number

LEAVES = {"gamma": "weight", "beta": "bias"}  # spellings of TensorFlow's that BERT ports kept
WEIGHT_NORM = {"original0": "g", "original1": "v"}  # torch.nn.utils.parametrizations.weight_norm
_PARAMETRIZED = re.compile(r"(?<![^.])parametrizations\.(\w+)$")
_RANKED = re.compile(r"(block|down)<(\d+)(?:-(\d+))?>")
_FIELD = re.compile(r"\{(\d)(\+\d+)?\}")


def spelled(source: Iterable[str], target: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The keys of both sides as they are compared: today's names of leaves, one spelling for two libraries' names.

    No two keys of a side are spelled alike: such keys keep their own names.

    >>> spelled(["LayerNorm.gamma"], ["LayerNorm.weight"])
    ({'LayerNorm.gamma': 'LayerNorm.weight'}, {'LayerNorm.weight': 'LayerNorm.weight'})
    """
    olds, news = list(source), list(target)
    known = conventions_of(olds, news)
    if known is None:
        return _apart({key: modern(key) for key in olds}), _apart({key: modern(key) for key in news})
    ours, theirs = (_written(keys, one) for keys, one in zip((olds, news), known, strict=True))
    return _apart(_ranked(ours, theirs)), _apart(_ranked(theirs, ours))


def modern(key: str) -> str:
    """A key with today's spelling of its leaf, and the first spelling of what weight norm makes of a weight."""
    parent, dot, leaf = key.rpartition(".")
    if leaf in WEIGHT_NORM and (found := _PARAMETRIZED.search(parent)):
        return f"{parent[: found.start()]}{found[1]}_{WEIGHT_NORM[leaf]}"
    return parent + dot + LEAVES.get(leaf, leaf)


def _apart(names: dict[str, str]) -> dict[str, str]:
    """Names of which no two are the same."""
    counts: dict[str, int] = {}
    for name in names.values():
        counts[name] = counts.get(name, 0) + 1
    return {key: name if counts[name] == 1 else key for key, name in names.items()}


def _written(keys: list[str], convention: Convention) -> dict[str, str]:
    """The keys in timm's names, by the rules of the convention that they follow."""
    expanding = set()
    if convention.without:
        found = (re.search(rf"(?:^|\.){convention.without}(?:\.|$)", key) for key in keys)
        expanding = {match[1] + "." for match in found if match}
    written = {}
    for key in by_number(keys):
        plain = bool(convention.plain) and not any(f".{path}" in f".{key}" for path in expanding)
        name = key
        for pattern, replace in _compiled(convention.plain if plain else convention.rules):
            name = pattern.sub(replace, name)
        written[key] = modern(name)
    return written


@cache
def _compiled(rules: tuple[Replacement, ...]) -> list[tuple[re.Pattern[str], Callable[[re.Match[str]], str]]]:
    return [(re.compile(rf"(?<![^.])(?:{old})(?![^.])"), _filled(new)) for old, new in rules]


def _filled(template: str) -> Callable[[re.Match[str]], str]:
    """What puts the groups of a match into a template's fields."""

    def fill(match: re.Match[str]) -> str:
        def field(one: re.Match[str]) -> str:
            value = match[int(one[1])]
            return str(int(value) + int(one[2])) if one[2] else value

        return _FIELD.sub(field, template)

    return fill


def _ranked(names: Mapping[str, str], others: Mapping[str, str]) -> dict[str, str]:
    """Names whose blocks are counted through the model, where the other side has as many."""
    ours, theirs = _ranks(names.values()), _ranks(others.values())

    def rank(match: re.Match[str]) -> str:
        mine = ours[match[1]]
        return f"{match[1]}s.{mine[_position(match)]}" if len(mine) == len(theirs.get(match[1], {})) else match[0]

    return {key: _RANKED.sub(rank, name) for key, name in names.items()}


def _ranks(names: Iterable[str]) -> dict[str, dict[tuple[int, int], int]]:
    found: dict[str, set[tuple[int, int]]] = {}
    for name in names:
        for match in _RANKED.finditer(name):
            found.setdefault(match[1], set()).add(_position(match))
    return {word: {place: rank for rank, place in enumerate(sorted(places))} for word, places in found.items()}


def _position(match: re.Match[str]) -> tuple[int, int]:
    return int(match[2]), int(match[3] or 0)
