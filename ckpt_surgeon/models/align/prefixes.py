"""Evidence of prefixes: one change of a leading path that turns many keys of the checkpoint into the target's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from ...edits.keys import without_wrappers
from .counting import Counted
from .names import is_denied
from .parts import by_prefix, is_name, number, parent, parts
from .results import Ambiguity
from .state import State

# Of two copies that a training method keeps, the one that people reuse: with its reason.
PREFERRED = {("encoder_q", "encoder_k"): "encoder_k is the momentum copy of encoder_q (MoCo)"}
CHANGES = 64  # changes of prefixes that are looked for; what many explain, order explains as well
RIVALS = 32  # keys of one ending and shape beyond which an ending says nothing
LOOKUPS = 400_000  # open keys that are looked at in all, over all changes


@dataclass(frozen=True)
class _Change:
    """One change of prefixes, and the pairs that it would settle."""

    said: str
    pairs: dict[str, str]
    before: str
    after: str
    trusted: bool = True  # False where numbers would have to mean the same on both sides, and may not

    @cached_property
    def back(self) -> dict[str, str]:
        return {new: old for old, new in self.pairs.items()}


def unwrapped(state: State) -> None:
    """Settle the keys that are the target's once wrappers (``module.``, ``_orig_mod.``) are taken out of them."""
    names = {old: without_wrappers(state.spelling[old]) for old in state.olds}
    if all(name == state.spelling[old] for old, name in names.items()):
        return
    every = [without_wrappers(name) for name in state.spelling.values()]
    counted = Counted.of(every, state.wanted_spelling.values())
    fitting = {
        old: state.by_spelling[name]
        for old, name in names.items()
        if name != state.spelling[old]
        and state.by_spelling.get(name) in state.news
        and counted.alike(name, name)
        and not is_denied(state, old, state.by_spelling[name])
    }
    if len(set(fitting.values())) < len(fitting):
        return
    said = "the same key without its wrappers"
    for old, new in fitting.items():
        if state.fits(old, new):
            state.settle(old, new, said, "certain")
        else:
            state.settle_other_shape(old, new, said)


def prefixes(state: State) -> None:
    """Change prefixes as long as one change settles several keys and every key that carries the prefix fits.

    What one or two tensors bear is left to other evidence: a head of the same shapes has such a name too.
    """
    looked = 0
    for _ in range(CHANGES):
        looked += len(state.olds) + len(state.news)
        if looked > LOOKUPS:
            state.notes.append(f"more changes of prefixes were not looked for among {len(state.olds):,} open keys")
            return
        table = _Table.of(state)
        best = next((change for change in table.changes if change.trusted and table.is_sound(change)), None)
        if best is None:
            return
        rivals = table.same_place(best)
        chosen, why = _preferred([best, *rivals]) if rivals else (best, "")
        if chosen is None:
            _leave_open(state, best, rivals)
            continue
        certainty = _certainty(state, chosen, table)
        if certainty == "possible":
            state.aside.add((chosen.before, chosen.after))
            continue
        for old, new in chosen.pairs.items():
            state.settle(old, new, chosen.said + (f"; {why}" if why else ""), certainty)
        if certainty == "certain":
            state.changes.append((chosen.before, chosen.after, chosen.said))


class _Table:
    """The changes that the open keys allow, the one of most keys first, and which of them are about the same keys."""

    def __init__(self, state: State, changes: list[_Change]) -> None:
        self.state = state
        self.changes = changes
        self.olds_under = by_prefix(state.olds, state.spelling)
        self.all_olds_under = by_prefix(state.source, state.spelling)
        self.all_news_under = by_prefix(state.target, state.wanted_spelling)
        self.of_old: dict[str, list[_Change]] = {}
        self.of_new: dict[str, list[_Change]] = {}
        self._verdicts: dict[int, bool] = {}
        for change in changes:
            for old, new in change.pairs.items():
                self.of_old.setdefault(old, []).append(change)
                self.of_new.setdefault(new, []).append(change)

    @classmethod
    def of(cls, state: State) -> _Table:
        votes: dict[tuple[str, str, bool], dict[str, str]] = {}
        for old, new, before, after in _candidates(state):
            trusted = state.alike(old, new) and state.counted.in_turn(before, after)
            votes.setdefault((before, after, trusted), {})[old] = new
        changes = [
            _Change(_said(before, after), pairs, before, after, trusted)
            for (before, after, trusted), pairs in votes.items()
            if len(set(pairs.values())) == len(pairs)
            and (len(pairs) > 1 or len(state.news) == 1)
            and (before, after) not in state.aside
        ]
        return cls(state, sorted(changes, key=lambda change: -len(change.pairs)))

    def is_sound(self, change: _Change) -> bool:
        """Whether a change contradicts nothing, and its keys fit no other place."""
        return self.is_consistent(change) and not self.is_doubtful(change)

    def is_consistent(self, change: _Change) -> bool:
        found = self._verdicts.get(id(change))
        if found is None:
            found = self._verdicts[id(change)] = self._fits_throughout(change)
        return found

    def _fits_throughout(self, change: _Change) -> bool:
        state = self.state
        wrong = 0
        for old in self.olds_under.get(change.before, ()):
            if old not in change.pairs:
                new = state.by_spelling.get(change.after + state.spelling[old][len(change.before) :])
                wrong += new in state.news and state.alike(old, new) and not state.fits(old, new)
        return 3 * wrong <= len(change.pairs) - 3 * (wrong > 0) and not any(
            is_denied(state, old, new) for old, new in change.pairs.items()
        )

    def is_doubtful(self, change: _Change) -> bool:
        """Whether the same keys fit another place as well, or the place may be that of others: order may tell."""
        elsewhere = self._overlapping(self.of_old, change.pairs, change)
        if any(not other.back.keys() & change.back.keys() for other in elsewhere):
            return True
        return any(not other.trusted and not other.pairs.keys() & change.pairs.keys() for other in self._rivals(change))

    def same_place(self, change: _Change) -> list[_Change]:
        """The changes that bring other keys to the same place."""
        return [other for other in self._rivals(change) if not other.pairs.keys() & change.pairs.keys()]

    def _rivals(self, change: _Change) -> list[_Change]:
        return self._overlapping(self.of_new, change.back, change)

    def _overlapping(
        self, index: Mapping[str, list[_Change]], keys: Mapping[str, str], change: _Change
    ) -> list[_Change]:
        """The sound changes about the same keys: a head more or less does not decide between two copies."""
        counts: dict[int, int] = {}
        others: dict[int, _Change] = {}
        for key in keys:
            for other in index.get(key, ()):
                counts[id(other)] = counts.get(id(other), 0) + 1
                others[id(other)] = other
        return [
            others[one]
            for one, count in counts.items()
            if others[one] is not change and 10 * count >= 9 * len(keys) and self.is_consistent(others[one])
        ]


def _candidates(state: State) -> Iterator[tuple[str, str, str, str]]:
    """Pairs of open keys of one shape with the longest common ending for one of the two, and the prefixes in front.

    More than the leaf has to be the same, unless nothing is in front of it on one side.
    """
    olds = [(key, state.spelling[key]) for key in state.olds]
    news = [(key, state.wanted_spelling[key]) for key in state.news]
    seen: set[tuple[str, str]] = set()
    ours, theirs = _by_ending(olds), _by_ending(news)
    for keys, others, forwards in ((olds, theirs, True), (news, ours, False)):
        for key, name in keys:
            for before, ending in _endings(name):
                found = others.get(ending, ())
                if len(found) > RIVALS:
                    break
                fitting = [
                    (other, after)
                    for other, after in found
                    if ("." in ending or not before or not after)
                    and before != after
                    and (state.fits(key, other) if forwards else state.fits(other, key))
                ]
                for other, after in fitting:
                    pair = (key, other) if forwards else (other, key)
                    if pair not in seen:
                        seen.add(pair)
                        yield (*pair, before, after) if forwards else (*pair, after, before)
                if fitting:
                    break


def _endings(name: str) -> Iterator[tuple[str, str]]:
    """A name cut in two at each dot, the longest ending first: what is in front, and the ending."""
    at = 0
    while True:
        yield name[:at], name[at:]
        at = name.find(".", at) + 1
        if not at:
            return


def _by_ending(keys: Iterable[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for key, name in keys:
        for before, ending in _endings(name):
            found.setdefault(ending, []).append((key, before))
    return found


def _certainty(state: State, change: _Change, table: _Table) -> str:
    """How sure a change is: by how much it carries, and whether the same names stand behind both prefixes.

    Certain is a prefix put in front of most of a model or taken off, and a whole sub-tree of several named modules
    under another path.  Likely is a smaller sub-tree that is complete on both sides.
    """
    pairs = change.pairs
    if not change.before or not change.after:
        share = 2 * len(pairs) >= min(len(state.source), len(state.target))
        whole = len(pairs) == len(state.source) == len(state.target)
        if whole or (share and len(pairs) > 2):
            return "certain"
    old_side, new_side = table.all_olds_under.get(change.before, ()), table.all_news_under.get(change.after, ())
    complete = 10 * len(pairs) >= 9 * max(len(old_side), len(new_side))
    modules = {parent(state.spelling[old])[len(change.before) :] for old in pairs}
    names = {part for path in modules for part in parts(path) if part and is_name(part)}
    shapes = {tuple(state.source[old].shape) for old in pairs}
    many = (len(modules) >= 3 and len(names) >= 2 and len(pairs) >= 6) or (len(modules) >= 8 and len(shapes) >= 6)
    if many and complete and not _is_of_another_family(state, change, table):
        return "certain"
    if many or (complete and len(modules) >= 2 and len(pairs) >= 3):
        return "likely"
    return "possible"


def _is_of_another_family(state: State, change: _Change, table: _Table) -> bool:
    """Whether the numbered parts beside the new place came from somewhere else than from beside the old one."""
    path = change.after.split(".")[:-1]
    if not path or number(path[-1]) is None:
        return False
    beside = table.all_news_under.get("".join(part + "." for part in path[:-1]), ())
    came = {one.new: one.old for one in state.settled.values()}
    old_path = "".join(part + "." for part in change.before.split(".")[:-2])
    return any(new in came and not state.spelling[came[new]].startswith(old_path) for new in beside) or (
        any(new in came for new in beside) and not change.before
    )


def _preferred(rivals: list[_Change]) -> tuple[_Change | None, str]:
    for (chosen, copy), why in PREFERRED.items():
        prefixes = {change.before: change for change in rivals}
        ours = [change for prefix, change in prefixes.items() if chosen in prefix.split(".")]
        theirs = [change for prefix, change in prefixes.items() if copy in prefix.split(".")]
        if len(ours) == 1 and len(ours) + len(theirs) == len(rivals):
            return ours[0], why
    return None, ""


def _leave_open(state: State, best: _Change, rivals: list[_Change]) -> None:
    """Several sub-trees fit one place equally well: none is taken."""
    olds = {old for change in (best, *rivals) for old in change.pairs}
    news = {new for change in (best, *rivals) for new in change.pairs.values()}
    names = ", ".join(repr(change.before) for change in (best, *rivals))
    reason = f"the sub-trees {names} fit equally well"
    ordered = [tuple(key for key in keys if key in found) for keys, found in ((state.olds, olds), (state.news, news))]
    state.ambiguous.append(Ambiguity(ordered[0], ordered[1], reason))
    for key in olds:
        state.olds.pop(key, None)
    for key in news:
        state.news.pop(key, None)


def _said(before: str, after: str) -> str:
    if not after:
        return f"{before!r} taken off"
    return f"{after!r} put in front" if not before else f"{before!r} became {after!r}"
