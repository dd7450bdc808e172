"""Pairs the parameters of two models by what they meet in a forward pass.

The source runs once, and every operation is noted with what goes into it.  Then the target runs on the same input:
before each operation, the source's operation that was given the same activation is looked up and its values are
copied into the target, so that the next activation is the same again.  Where several fit (query, key and value are
given the same), they are taken in order; if nothing fits further on, the next choice is tried.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice, permutations
from typing import TYPE_CHECKING

from .elements import Numbered
from .tracing import Again, Operation, Tracer, is_same

if TYPE_CHECKING:
    import torch

UNSET, NOTHING = -2, -1
RUNS = 400  # forward passes of the target, at most
FRUITLESS = 40  # other choices that are tried for one operation
OPTIONS = 24  # ways to fill one operation that are looked at

Turn = tuple[int, int]  # which of two orders the rows of a head get, and how many there are
Choice = tuple[int, int]  # the option that was tried first, and how many others were tried after it


@dataclass(frozen=True, slots=True)
class _Option:
    """Rows of the source's operations that may be those of the target's, put in ``order``."""

    parts: tuple[tuple[int, torch.Tensor], ...]  # an operation's number, and its rows
    order: torch.Tensor | None = None
    group: tuple[int, ...] = ()  # the source's operations that are given the same
    turn: Turn | None = None


class _Stuck(Exception):
    """No operation of the source was given what this one is given."""


@dataclass(slots=True)
class _Attempt:
    """One forward pass of the target: what it chose, and how far it came."""

    origin: torch.Tensor
    used: list[torch.Tensor]
    choices: tuple[Choice, ...]
    made: list[tuple[Choice, int, tuple[int, ...]]] = field(default_factory=list)
    matched: int = 0
    turns: dict[tuple[int, ...], list[Turn | None]] = field(default_factory=dict)  # of each group, in order
    stuck: int | None = None  # the first element of the operation for which nothing was found


@dataclass(slots=True)
class Search:
    """The search for pairs; ``heads`` are the numbers of heads whose rows may be interleaved."""

    source: Numbered
    target: Numbered
    example: object
    seconds: float
    heads: tuple[int, ...] = ()
    turns: bool = False  # whether rows may stand in another order within each head (rotary embeddings)
    operations: list[Operation] = field(default_factory=list)
    forgiven: set[int] = field(default_factory=set)
    habits: dict[tuple[int, ...], int] = field(default_factory=dict)  # what was right where as much was to choose
    groups: set[tuple[str, ...]] = field(default_factory=set)  # the target's keys that meet in one operation
    ended: bool = False

    def origins(self) -> torch.Tensor:
        """Which of the source's elements each of the target's is; UNSET where none was found."""
        Tracer(self.source, self.operations.append).run(self.example)
        end = time.monotonic() + self.seconds
        best = last = self._attempted(())
        fruitless = runs = 0
        while best.stuck is not None:
            runs += 1
            self.ended = runs > RUNS or time.monotonic() > end
            following = _following(last)
            if self.ended or following is None or fruitless >= FRUITLESS:
                self.forgiven.add(best.stuck)
                best = last = self._attempted(tuple(choice for choice, _, _ in best.made), lenient=self.ended)
                fruitless = 0
                continue
            last = self._attempted(following)
            fruitless += 1
            if last.stuck is None or last.matched > best.matched:
                best, fruitless = last, 0
                self.habits |= {kind: (first + more) % count for (first, more), count, kind in best.made}
        return best.origin

    def _attempted(self, choices: tuple[Choice, ...], *, lenient: bool = False) -> _Attempt:
        import torch

        used = [torch.zeros(len(one.rows), dtype=torch.bool) for one in self.operations]
        attempt = _Attempt(torch.full((len(self.target.flat),), UNSET), used, choices)
        tracer = Tracer(self.target, lambda operation: self._meet(operation, attempt, tracer, lenient))
        while True:
            try:
                tracer.run(self.example)
            except Again:
                continue
            except _Stuck:
                pass
            return attempt

    def _meet(self, operation: Operation, attempt: _Attempt, tracer: Tracer, lenient: bool) -> None:
        """Find the target's operation among the source's, and copy the values that it needs."""
        import torch

        rows = operation.rows
        own = rows[rows >= 0]
        if bool((attempt.origin[own] != UNSET).all()):
            return
        if operation.kind == "batch_norm":
            self.groups.add(tuple(self.target.key_of(int(number)) for number in rows[0] if number >= 0))
        options = [one for one in self._options(operation, attempt) if self._fits(one, operation, attempt)]
        if not options:
            if lenient or int(own[0]) in self.forgiven or self._has_other_size(operation, attempt.used):
                return
            attempt.stuck = int(own[0])
            raise _Stuck
        chosen = self._chosen(options, operation, attempt)
        found = self._rows(chosen)
        attempt.turns.setdefault(chosen.group, []).append(chosen.turn)
        for number, taken in chosen.parts:
            attempt.used[number][taken] = True
        attempt.origin[own] = found[rows >= 0]
        values = self.source.flat[found.clamp(min=0)]
        self.target.flat[own] = torch.where(found >= 0, values, torch.zeros(()).to(values))[rows >= 0]
        attempt.matched += 1
        if tracer.computed and bool(torch.isin(own, torch.tensor(sorted(tracer.computed))).any()):
            raise Again

    def _has_other_size(self, operation: Operation, used: list[torch.Tensor]) -> bool:
        """Whether a matrix of the source that is free was given the same, and has more or fewer rows: a head."""
        return operation.is_matrix and any(
            one.kind == operation.kind
            and one.rows.shape[1] == operation.rows.shape[1]
            and not bool(used[number].any())
            and is_same(one.fingerprint, operation.fingerprint)
            for number, one in enumerate(self.operations)
        )

    def _chosen(self, options: list[_Option], operation: Operation, attempt: _Attempt) -> _Option:
        if len(options) == 1:
            return options[0]
        kind = (len(options), *operation.rows.shape)
        if len(attempt.made) < len(attempt.choices):
            first, more = attempt.choices[len(attempt.made)]
        else:
            first, more = min(self.habits.get(kind, 0), len(options) - 1), 0
        attempt.made.append(((first, more), len(options), kind))
        return options[(first + more) % len(options)]

    def _rows(self, option: _Option) -> torch.Tensor:
        import torch

        rows = torch.cat([self.operations[number].rows[taken] for number, taken in option.parts])
        return rows if option.order is None else rows[option.order]

    def _fits(self, option: _Option, operation: Operation, attempt: _Attempt) -> bool:
        """Whether the target has an element for each of the source's, and none that is another's already."""
        theirs, ours = operation.rows, self._rows(option)
        if theirs.shape != ours.shape or bool(((ours >= 0) & (theirs < 0)).any()):
            return False
        # A matrix's last column is its bias: one that the source has not is zero.
        missing = (theirs >= 0) & (ours < 0)
        if bool((missing[:, :-1] if operation.is_matrix else missing).any()):
            return False
        settled = attempt.origin[theirs.clamp(min=0)]
        return not bool(((settled != UNSET) & (theirs >= 0) & (settled != ours)).any())

    def _options(self, operation: Operation, attempt: _Attempt) -> list[_Option]:
        used = attempt.used
        found = [
            number
            for number, one in enumerate(self.operations)
            if one.kind == operation.kind
            and one.rows.shape[1] == operation.rows.shape[1]
            and (operation.is_matrix or one.shape == operation.shape)
            and is_same(one.fingerprint, operation.fingerprint)
        ]
        whole = [number for number in found if not bool(used[number].any())]
        count = len(operation.rows)
        exact = [self._whole(number) for number in whole if len(used[number]) == count]
        if exact or not operation.is_matrix:
            group = tuple(found)
            return [turned for one in exact for turned in self._turned(one, group, operation, attempt)]
        parts = [one for number in found for one in self._parts(number, count, used[number])]
        return list(islice(parts or self._joined(whole, count), OPTIONS))

    def _whole(self, number: int) -> _Option:
        import torch

        return _Option(((number, torch.arange(len(self.operations[number].rows))),))

    def _turned(
        self, whole: _Option, group: tuple[int, ...], operation: Operation, attempt: _Attempt
    ) -> Iterator[_Option]:
        """An option, and for queries and keys the rows of each head in the other order: by turns, or half by half.

        Queries, keys and values are given the same; the first two of them are turned alike, the values are not.
        """
        import torch

        before, count = attempt.turns.get(group, []), len(operation.rows)
        if not self.turns or len(group) < 3 or not operation.is_matrix or len(before) > 1 or before == [None]:
            yield whole
            return
        turns: list[Turn | None] = [None, *((turn, count // heads) for heads in self.heads for turn in (0, 1))]
        for turn in before or turns:
            if turn is None:
                yield _Option(whole.parts, None, group)
            elif count % turn[1] == 0 and turn[1] % 2 == 0:
                sizes = (count // turn[1], 2, -1) if turn[0] else (count // turn[1], -1, 2)
                order = torch.arange(count).view(sizes).transpose(1, 2).flatten()
                yield _Option(whole.parts, order, group, turn)

    def _parts(self, number: int, count: int, used: torch.Tensor) -> Iterator[_Option]:
        """Parts of one operation: thirds of a fused query, key and value, head by head too."""
        import torch

        rows = torch.arange(len(used))
        if len(rows) <= count:
            return
        if len(rows) % count:
            free = rows[~used]
            if len(free) >= count:
                yield _Option(((number, free[:count]),))
            return
        pieces = len(rows) // count
        for heads in (1, *self.heads):
            if count % heads:
                continue
            for part in rows.view(heads, pieces, count // heads).unbind(1):
                taken = part.reshape(-1)
                if not bool(used[taken].any()):
                    yield _Option(((number, taken),))

    def _joined(self, numbers: list[int], count: int) -> Iterator[_Option]:
        """Several operations as one: query, key and value that the target has fused, head by head too."""
        import torch

        sizes = {number: len(self.operations[number].rows) for number in numbers}
        for pieces in range(2, min(4, len(numbers)) + 1):
            for order in permutations(numbers, pieces):
                if sum(sizes[number] for number in order) != count:
                    continue
                parts = tuple(part for number in order for part in self._whole(number).parts)
                yield _Option(parts)
                size = count // pieces
                for heads in self.heads:
                    if heads > 1 and all(sizes[number] == size for number in order) and size % heads == 0:
                        turned = torch.arange(count).view(pieces, heads, size // heads).transpose(0, 1)
                        yield _Option(parts, turned.reshape(-1))


def _following(attempt: _Attempt) -> tuple[Choice, ...] | None:
    """The choices to try next: the last one that has another option left."""
    for at in range(len(attempt.made) - 1, -1, -1):
        (first, more), count, _ = attempt.made[at]
        if more + 1 < count:
            return (*(choice for choice, _, _ in attempt.made[:at]), (first, more + 1))
    return None
