"""What is settled and what is open while an alignment is made; every kind of evidence works on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...tensors.records import Shaped
from .counting import Counted
from .parts import by_number
from .results import OTHER_SHAPE, Ambiguity, Proposal
from .spelling import spelled


@dataclass(slots=True)
class State:
    """The open keys of both sides in order (``olds``, ``news``), and what became of the others.

    ``spelling`` and ``wanted_spelling`` are the keys of both sides as :func:`spelled` writes them.
    """

    source: Mapping[str, Shaped]
    target: Mapping[str, Shaped]
    olds: dict[str, None]
    news: dict[str, None]
    spelling: dict[str, str]
    wanted_spelling: dict[str, str]
    by_spelling: dict[str, str]
    counted: Counted
    settled: dict[str, Proposal] = field(default_factory=dict)
    ambiguous: list[Ambiguity] = field(default_factory=list)
    changes: list[tuple[str, str, str]] = field(default_factory=list)  # prefixes and the words for their change
    aside: set[tuple[str, str]] = field(default_factory=set)  # changes of prefixes that too few keys bear
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, source: Mapping[str, Shaped], target: Mapping[str, Shaped]) -> State:
        ours, theirs = spelled(source, target)
        back = {name: key for key, name in theirs.items()}
        counted = Counted.of(ours.values(), theirs.values())
        return cls(source, target, by_number(source), by_number(target), ours, theirs, back, counted)

    def settle(self, old: str, new: str, reason: str, certainty: str) -> None:
        ours, theirs = self.shapes(old, new)
        self.settled[old] = Proposal(old, new, reason, certainty, None if ours == theirs else theirs)
        del self.olds[old], self.news[new]

    def settle_other_shape(self, old: str, new: str, why: str, certainty: str = OTHER_SHAPE) -> None:
        ours, theirs = self.shapes(old, new)
        if ours == theirs:
            return
        reason = f"{why}; shape {list(ours)}, wanted is {list(theirs)}"
        self.settled[old] = Proposal(old, new, reason, certainty)
        del self.olds[old], self.news[new]

    def shapes(self, old: str, new: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(self.source[old].shape), tuple(self.target[new].shape)

    def fits(self, old: str, new: str) -> bool:
        ours, theirs = self.shapes(old, new)
        return ours == theirs

    def alike(self, old: str, new: str) -> bool:
        """Whether the numbers that both keys end alike with are counted from the same beginning on both sides."""
        return self.counted.alike(self.spelling[old], self.wanted_spelling[new])

    def undecided(self) -> tuple[list[str], list[str]]:
        """What is open on both sides and in no ambiguity."""
        olds = {key for one in self.ambiguous for key in one.olds}
        news = {key for one in self.ambiguous for key in one.news}
        return [key for key in self.olds if key not in olds], [key for key in self.news if key not in news]
