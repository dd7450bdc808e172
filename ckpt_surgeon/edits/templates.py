"""Templates of keys: ``{n}`` stands for an integer, ``{n+1}`` for another beside it, and ``*`` for anything.

An edit of several tensors names its sources and its results by templates.  A placeholder has one value in all of them.
A placeholder of the sources that the result does not have stands for all its numbers, in their order.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from ..errors import EditError, NothingMatched

_PLACEHOLDER = re.compile(r"(\{[A-Za-z]\w*(?:[+-]\d+)?\}|\*)")
_NAME = re.compile(r"\{(\w+)([+-]\d+)?\}")

Group = tuple[tuple[tuple[str, str], ...], tuple[str, ...]]  # values of placeholders and of stars


@dataclass(frozen=True, slots=True)
class Bound:
    """A key that a template names: what its placeholders and its stars stand for."""

    key: str
    names: Mapping[str, str]
    stars: tuple[str, ...]

    def group(self, shared: Iterable[str]) -> Group:
        """What tells its set of keys from others: the values of the shared placeholders, and of the stars."""
        return tuple((name, self.names[name]) for name in shared if name in self.names), self.stars

    def numbers(self, names: Sequence[str]) -> tuple[int, ...]:
        """The numbers that some placeholders stand for."""
        return tuple(int(self.names[name]) for name in names)


def placeholders(template: str) -> tuple[str, ...]:
    """The names of a template's placeholders, each once.

    >>> placeholders("l.{n}.experts.{e}.*")
    ('n', 'e')
    """
    return tuple(dict.fromkeys(found[1] for found in _NAME.finditer(template) if found[1][0].isalpha()))


def bound(keys: Iterable[str], template: str) -> list[Bound]:
    """The keys that a template names.  Raises NothingMatched where there is none, EditError for a ``{n+1}`` in it.

    >>> bound(["l.0.w", "l.1.w", "bias"], "l.{n}.*")[1]
    Bound(key='l.1.w', names={'n': '1'}, stars=('w',))
    """
    names: set[str] = set()
    parts = []
    for part in _PLACEHOLDER.split(template):
        name = part[1:-1]
        if _PLACEHOLDER.fullmatch(part) and re.search(r"[+-]", name):
            raise EditError([f"{template!r}: a key is found by {{n}}; {part} stands in the templates that follow"])
        if part == "*":
            parts.append("(.*)")
        elif not _PLACEHOLDER.fullmatch(part):
            parts.append(re.escape(part))
        else:
            parts.append(f"(?P={name})" if name in names else rf"(?P<{name}>\d+)")
            names.add(name)
    pattern = re.compile("".join(parts))
    named = set(pattern.groupindex.values())
    keys = list(keys)
    found = []
    for key in keys:
        if match := pattern.fullmatch(key):
            stars = tuple(text for index, text in enumerate(match.groups(), 1) if index not in named)
            found.append(Bound(key, match.groupdict(), stars))
    if not found:
        raise NothingMatched([template], what="template", examples=keys)
    return found


def filled(template: str, names: Mapping[str, str], stars: Iterable[str]) -> str:
    """A template with the values of its placeholders.  Raises EditError for one without a value.

    >>> filled("l.{n}.*", {"n": "3"}, ["w"])
    'l.3.w'
    """
    waiting = iter(stars)

    def value(part: re.Match[str]) -> str:
        found = _NAME.fullmatch(part[0])
        text = names.get(found[1]) if found else next(waiting, None)
        if text is None:
            raise EditError([f"{template!r} has placeholders that the first template does not have"])
        return str(int(text) + int(found[2])) if found and found[2] else text

    return _PLACEHOLDER.sub(value, template)


@dataclass(frozen=True, slots=True)
class KeySet:
    """The keys that belong together, and the name of what is made of them."""

    keys: tuple[str, ...]
    new: str


def key_sets(
    keys: Iterable[str], sources: Sequence[str], into: str, optional: Sequence[str] = ()
) -> tuple[list[KeySet], list[str]]:
    """The sets of keys that ``sources`` name, one for each value of the placeholders of ``into``; and what is wrong.

    Within a set, keys come in the order of the templates, and those of one template in the order of the numbers that
    ``into`` does not have.  These have to be the same in every set, without a gap.  Keys that ``optional`` templates
    name, which may be absent, come behind.  Raises NothingMatched, EditError.

    >>> found, problems = key_sets(["l.0.e.1.w", "l.0.e.0.w"], ["l.{n}.e.{e}.w"], "l.{n}.e.w")
    >>> found
    [KeySet(keys=('l.0.e.0.w', 'l.0.e.1.w'), new='l.0.e.w')]
    """
    keys = list(keys)
    there = set(keys)
    shared = placeholders(into)
    first = sources[0] if sources else ""
    sets: dict[Group, Bound] = {}
    for one in bound(keys, first):
        sets.setdefault(one.group(shared), one)
    templates = [(template, True) for template in sources] + [(template, False) for template in optional]
    columns = [_column(keys, there, template, shared, sets.values(), must) for template, must in templates]
    made: list[KeySet] = []
    problems: list[str] = []
    for index, one in enumerate(sets.values()):
        new = filled(into, one.names, one.stars)
        found = [column[index] for column in columns]
        absent = [key for _, missing in found for key in missing]
        problems += [f"{key!r}, wanted beside {one.key!r}, is not there" for key in absent]
        if not absent:
            made.append(KeySet(tuple(key for held, _ in found for key in held), new))
    return made, problems


Column = list[tuple[list[str], list[str]]]  # for every set: the keys that are there, and those that are not


def _column(
    keys: list[str], there: set[str], template: str, shared: Sequence[str], sets: Iterable[Bound], must: bool
) -> Column:
    """What one template gives to every set."""
    own = [name for name in placeholders(template) if name not in shared]
    if not own:
        named = [filled(template, one.names, one.stars) for one in sets]
        return [([key], []) if key in there else ([], [key] if must else []) for key in named]
    try:
        found = bound(keys, template)
    except NothingMatched:
        if must:
            raise
        found = []
    numbered: dict[Group, list[Bound]] = {}
    for one in found:
        numbered.setdefault(one.group(shared), []).append(one)
    wanted = _without_gaps(found, own)
    return [_numbered(template, own, one, numbered.get(_group_of(template, shared, one), []), wanted if must else None)
            for one in sets]  # fmt: skip


def _group_of(template: str, shared: Sequence[str], one: Bound) -> Group:
    inside = placeholders(template)
    return one.group([name for name in shared if name in inside])[0], one.stars[: template.count("*")]


def _without_gaps(found: Iterable[Bound], names: Sequence[str]) -> list[tuple[int, ...]]:
    """All numbers from the least to the greatest that any set has."""
    numbers = [one.numbers(names) for one in found]
    if not numbers:
        return []
    return list(product(*(range(min(column), max(column) + 1) for column in zip(*numbers, strict=True))))


def _numbered(
    template: str, own: Sequence[str], one: Bound, found: list[Bound], wanted: list[tuple[int, ...]] | None
) -> tuple[list[str], list[str]]:
    """The keys of one set that a template with numbers of its own names, in their order, and those that are absent."""
    ordered = sorted(found, key=lambda item: item.numbers(own))
    counts = Counter(item.numbers(own) for item in ordered)
    if twice := [item.key for item in ordered if counts[item.numbers(own)] > 1]:
        raise EditError([f"{' and '.join(map(repr, twice[:2]))} have one number"])
    if wanted is None:
        return [item.key for item in ordered], []
    absent = [numbers for numbers in wanted if numbers not in counts]
    width = max((len(item.names[name]) for item in found for name in own if item.names[name][0] == "0"), default=1)
    names = [dict(one.names) | {name: f"{number:0{width}d}" for name, number in zip(own, numbers, strict=True)}
             for numbers in absent]  # fmt: skip
    return [item.key for item in ordered], [filled(template, values, one.stars) for values in names]
