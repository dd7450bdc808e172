"""What an alignment says: proposals with reason and certainty, choices that stay open, keys without a counterpart."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ...errors import EditError
from ...text import Shown

# From the weakest to the strongest.  "certain": names or values say so and nothing else fits.  "likely": order and
# structure fit all round.  "possible": the shape fits.  "proven": both models gave the same outputs.
CERTAINTIES = ("possible", "likely", "certain", "proven")
OTHER_SHAPE = "other shape"  # the names say that two keys are one parameter, and the shapes differ


@dataclass(frozen=True, slots=True, repr=False)
class Proposal(Shown):
    """One key's new name, why, and how sure that is: one of :data:`CERTAINTIES`, or :data:`OTHER_SHAPE`.

    ``reshape`` is the target's shape where the elements are the same and the shape is not (Linear to convolution).
    ``permute`` comes before that: the shape in which the tensor is viewed (its own where it is empty), and the new
    order of these dimensions.
    """

    old: str
    new: str
    reason: str
    certainty: str
    reshape: tuple[int, ...] | None = None
    permute: tuple[tuple[int, ...], tuple[int, ...]] | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Ambiguity(Shown):
    """Keys between which nothing decides: any of ``olds`` could become any of ``news``."""

    olds: tuple[str, ...]
    news: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True, repr=False)
class Made(Shown):
    """A key of the target that is part ``part[0]`` of ``part[1]`` of one key, or several keys joined.

    That is along ``dim``, interleaved in so many ``groups``; ``sizes`` are those of all parts.  Then the dimensions
    are put in the order ``dims``, where that is not empty.  With ``stacked``, parts are the indices of a dimension of
    their own, and so many keys, joined, make each of them.
    """

    new: str
    olds: tuple[str, ...]
    part: tuple[int, int]
    reason: str
    dim: int = 0
    groups: int = 1
    sizes: tuple[int, ...] = ()
    dims: tuple[int, ...] = ()
    stacked: int = 0
    certainty: str = "proven"

    @property
    def how(self) -> str:
        """What happens to the keys, in a word or two.

        >>> Made("experts.w", ("experts.0.w", "experts.1.w"), (0, 1), "why", stacked=1).how
        'stacked'
        """
        if self.stacked:
            return "stacked" if len(self.olds) > 1 else "taken off a stack"
        return "joined" if len(self.olds) > 1 else "taken apart"


@dataclass(frozen=True, slots=True, repr=False)
class Alignment(Shown):
    """What :func:`align` found; ``unused`` and ``missing`` are the keys for which there is no proposal.

    ``possible`` holds what fits by its shape alone: its keys are among the unused and missing ones.  ``notes`` say
    what was not looked for.  ``made`` are the target's keys that are no renamed ones: parts, and several joined.
    """

    proposals: tuple[Proposal, ...]
    ambiguous: tuple[Ambiguity, ...]
    unused: tuple[str, ...]
    missing: tuple[str, ...]
    possible: tuple[Proposal, ...] = ()
    notes: tuple[str, ...] = ()
    made: tuple[Made, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every key of the target is settled, in name and shape."""
        return not (self.missing or self.ambiguous or any(one.certainty == OTHER_SHAPE for one in self.proposals))

    @property
    def pairs(self) -> dict[str, str]:
        """Old key to new key, for every proposal."""
        return {one.old: one.new for one in self.proposals}

    def at_least(self, certainty: str) -> Alignment:
        """What is at least that certain, as an alignment: the other keys are unused and missing, and possible.

        Keys of another shape stay: their names are certain.  Raises EditError for a word that is no certainty.

        >>> found = Alignment((Proposal("a", "b", "same order", "likely"),), (), (), ())
        >>> found.at_least("certain").missing, found.at_least("likely").missing
        (('b',), ())
        """
        if certainty not in CERTAINTIES:
            raise EditError([f"a certainty is one of {', '.join(CERTAINTIES)}, not {certainty!r}"])
        taken = CERTAINTIES[CERTAINTIES.index(certainty) :]
        every = (*self.proposals, *self.possible)
        kept = tuple(one for one in every if one.certainty in (*taken, OTHER_SHAPE))
        left = tuple(one for one in every if one.certainty not in (*taken, OTHER_SHAPE))
        made = tuple(one for one in self.made if one.certainty in taken)
        unmade = [one for one in self.made if one.certainty not in taken]
        olds = {one.old for one in kept} | {old for one in made for old in one.olds}
        news = {one.new for one in kept}
        said = [f"not taken, since it is {one.certainty}: {one.new}, {one.how}; {one.reason}" for one in unmade[:1]]
        return Alignment(
            kept,
            self.ambiguous,
            _left(self.unused, (*(one.old for one in left), *(old for one in unmade for old in one.olds)), olds),
            _left(self.missing, (*(one.new for one in left), *(one.new for one in unmade)), news),
            left,
            (*self.notes, *said),
            made,
        )


def _left(keys: Iterable[str], more: Iterable[str], taken: set[str]) -> tuple[str, ...]:
    return tuple(key for key in dict.fromkeys((*keys, *more)) if key not in taken)
