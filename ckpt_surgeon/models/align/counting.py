"""Whether a number means the same part on both sides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .parts import number, parts

_NEVER = 1 << 62


@dataclass(frozen=True, slots=True)
class Counted:
    """The numbers below each path of both sides."""

    ours: Mapping[str, frozenset[int]]
    theirs: Mapping[str, frozenset[int]]
    _apart: dict[tuple[str, str], int] = field(default_factory=dict)

    @classmethod
    def of(cls, source: Iterable[str], target: Iterable[str]) -> Counted:
        return cls(_numbers(source), _numbers(target))

    def alike(self, old: str, new: str) -> bool:
        """Whether the numbers that both keys end alike with are counted from the same beginning on both sides.

        A part's number says nothing where the two sides have other numbers below it: the parts may have moved up.
        """
        olds, news = parts(old), parts(new)
        for back in range(2, 1 + min(len(olds), len(news))):
            if olds[-back] != news[-back]:
                return True
            value = number(olds[-back])
            if value is not None and value > self._same_until(".".join(olds[:-back]), ".".join(news[:-back])):
                return False
        return True

    def _same_until(self, ours: str, theirs: str) -> int:
        """The first number that only one of two paths has."""
        found = self._apart.get((ours, theirs))
        if found is None:
            found = min(self.ours[ours] ^ self.theirs[theirs], default=_NEVER)
            self._apart[ours, theirs] = found
        return found

    def in_turn(self, before: str, after: str) -> bool:
        """Whether two numbered prefixes (``blocks.1.``) come after as many others on both sides."""
        ours, theirs = before.split(".")[:-1], after.split(".")[:-1]
        numbers = number(ours[-1]) if ours else None, number(theirs[-1]) if theirs else None
        if numbers[0] is None or numbers[1] is None:
            return True
        earlier = sum(one < numbers[0] for one in self.ours[".".join(ours[:-1])])
        return earlier == sum(one < numbers[1] for one in self.theirs[".".join(theirs[:-1])])


def _numbers(keys: Iterable[str]) -> dict[str, frozenset[int]]:
    found: dict[str, set[int]] = {}
    for key in keys:
        split = parts(key)
        for depth, part in enumerate(split[:-1]):
            value = number(part)
            if value is not None:
                found.setdefault(".".join(split[:depth]), set()).add(value)
    return {path: frozenset(numbers) for path, numbers in found.items()}
