"""The processes that torchrun started: they meet, exchange values, and tell which of them was lost.

Rendezvous and store are torch.distributed's; no collective is used, since one without a process waits for ever.  torch
is imported inside the functions.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from threading import Event, Thread
from typing import TYPE_CHECKING

from ..errors import CheckpointError, EditError, RankFailed, text_of
from ..files.paths import FilePath
from .plan import Plan
from .write import Json

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

STARTING = timedelta(minutes=30)  # in which every process has to be there, its plan made
SILENCE = 300.0  # seconds without a sign of life after which a process counts as lost
STANDSTILL = 3600.0  # seconds in which a process that is alive has to have written or computed something
BEAT = 5.0  # seconds between two signs of life
GRACE = 2.0  # seconds in which the others say that they are still there, once one has failed
LONGEST_PAUSE = 0.2  # seconds between two looks at where the others are
SAME = "do all nodes run the same command and version?"


def shares(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Share out shards among ``count`` processes by bytes: the largest first, each to whom has least so far.

    >>> shares([5, 4, 3, 3, 3], 2)
    [[0, 3], [1, 2, 4]]
    """
    made: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        least = loads.index(min(loads))
        made[least].append(index)
        loads[least] += sizes[index]
    return [sorted(share) for share in made]


# -- the other processes


class Group:
    """The processes of one torchrun, which meet at its store: there each says where it is, and gives signs of life.

    No process waits for ever: one that is silent, or does nothing, is named by the others.
    """

    def __init__(self, number: int, size: int, store: Store) -> None:
        self.rank = number
        self.size = size
        self.is_leaving = False
        self._store = store
        self._rounds = 0
        self._steps = 0
        self._beats = 0

    def share(self, planned: Plan) -> Sequence[int]:
        """The files that this process makes."""
        return shares(planned.sizes, self.size)[self.rank]

    def announce(self, doing: str) -> None:
        """Note what this process is at, for the others to tell if it dies."""
        self._steps += 1
        self._store.set(f"doing/{self.rank}", doing)

    def step(self) -> None:
        """Note that this process gets on."""
        self._steps += 1

    def beat(self) -> None:
        """Give a sign of life, which says how far this process is."""
        self._beats += 1
        self._store.set(f"beat/{self.rank}", f"{self._beats} {self._steps}")

    def wait(self) -> None:
        """Wait until every process is here.  Raises RuntimeError when one has left, RankFailed when one is lost."""
        self._rounds += 1
        self._store.set(f"here/{self._rounds}/{self.rank}", "")
        self.beat()
        signs = _Signs(self._store)
        missing, pause = list(range(self.size)), 0.001
        while missing:
            gone = [one for one in missing if self._store.check([f"left/{one}"])]  # before looking whether it is here
            missing = [one for one in missing if not self._store.check([f"here/{self._rounds}/{one}"])]
            if set(gone) & set(missing):
                raise RuntimeError("one of the processes has left")
            for one in missing:
                if problem := signs.problem(one):
                    raise self._failed(one, problem, "run the same command again to go on")
            time.sleep(pause if missing else 0)
            pause = min(2 * pause, LONGEST_PAUSE)

    def gathered(self, value: Json) -> list[Json]:
        """What each process brings, by rank.  Raises RankFailed where one brings what is no JSON."""
        place = self._rounds
        self._store.set(f"value/{place}/{self.rank}", json.dumps(value))
        self.wait()
        return [self._value(place, one) for one in range(self.size)]

    def _value(self, place: int, one: int) -> Json:
        try:
            found: Json = json.loads(self._store.get(f"value/{place}/{one}"))
        except (ValueError, RecursionError):
            raise self._failed(one, "says what is not understood", SAME) from None
        return found

    def agree(self, facts: Mapping[str, str], out: FilePath) -> None:
        """Raise EditError unless every process has planned the same.

        ``facts`` has a digest of each thing that a plan follows from, by its name.
        """
        first, *others = self.gathered(dict(facts))
        odd = {number: _differing(facts, first, other) for number, other in enumerate(others, 1) if other != first}
        if odd:
            ranks, what = ", ".join(map(str, odd)), ", ".join(dict.fromkeys(odd.values()))
            problem = f"{out}: rank {ranks} plans another output than rank 0: other {what}"
            raise EditError(problem, remedy=f"do all nodes see the same files? {SAME}")

    def _failed(self, one: int, problem: str, remedy: str) -> RankFailed:
        """The error that names a process; the first to notice tells it."""
        doing = self._store.get(f"doing/{one}").decode("utf-8", "replace") if self._has(f"doing/{one}") else ""
        is_first = self._store.add("told", 1) == 1
        return RankFailed(one, doing, problem, told_by=self.rank if is_first else -1, remedy=remedy)

    def _has(self, key: str) -> bool:
        return bool(self._store.check([key]))

    def leave(self, why: str = "") -> None:
        """Say that this process goes, and why where it is a trouble of its own."""
        self.is_leaving = True
        self._store.set(f"left/{self.rank}", why)

    def lost(self) -> RankFailed:
        """Which process the others have lost, and what it was at; the first of the others is to tell."""
        self.leave()
        time.sleep(GRACE)
        gone = [one for one in range(self.size) if not self._store.check([f"left/{one}"])]
        for one in range(self.size):
            if one not in gone and (why := self._store.get(f"left/{one}").decode("utf-8", "replace")):
                return RankFailed(one, "", why, told_by=one)  # it has told by itself
        if not gone:
            return RankFailed(self.rank, "", "was stopped", told_by=self.rank)
        doing = self._store.get(f"doing/{gone[0]}").decode("utf-8", "replace") if self._has(f"doing/{gone[0]}") else ""
        others = f", as did {', '.join(map(str, gone[1:]))}" if gone[1:] else ""
        first = min(set(range(self.size)) - set(gone))
        return RankFailed(gone[0], doing, f"died{others}", told_by=first, remedy="run the same command again to go on")


@dataclass(slots=True)
class _Sign:
    """The last sign of life of a process: how many there were, how far it was, and since when both are so."""

    count: str
    steps: str
    alive: float
    moving: float


class _Signs:
    """The signs of life of other processes, as one that waits for them sees them."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._begun = time.monotonic()
        self._seen: dict[int, _Sign] = {}

    def problem(self, rank: int) -> str:
        """Why a process counts as lost, "" while it does not."""
        now = time.monotonic()
        seen = self._seen.setdefault(rank, _Sign("", "", self._begun, self._begun))
        if self._store.check([f"beat/{rank}"]):
            count, _, steps = self._store.get(f"beat/{rank}").decode("utf-8", "replace").partition(" ")
            if count != seen.count:
                seen.count, seen.alive = count, now
            if steps != seen.steps:
                seen.steps, seen.moving = steps, now
        if not seen.count:
            limit = STARTING.total_seconds()
            return f"has not come within {limit:,.0f} seconds" if now - seen.alive > limit else ""
        if now - seen.alive > SILENCE:
            return f"gave no sign of life for {SILENCE:,.0f} seconds"
        return f"has done nothing for {STANDSTILL:,.0f} seconds" if now - seen.moving > STANDSTILL else ""


@contextmanager
def joined() -> Iterator[Group]:
    """Meet the other processes, and part; where one is lost, say which and what it was at."""
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, number, size = next(iter(rendezvous("env://", timeout=STARTING)))
    with member(Group(number, size, PrefixStore("ckpt", store))) as group:
        yield group


@contextmanager
def member(group: Group) -> Iterator[Group]:
    """Give signs of life while the body works with the others; where one of them is lost, say which."""
    stop = Event()
    beating = Thread(target=_beat, args=(group, stop), name="beating", daemon=True)
    with _stopped_once(group):
        beating.start()
        try:
            yield group
            group.leave()
        except CheckpointError as error:
            group.leave(str(error))
            raise
        except (RuntimeError, SystemExit) as error:  # one of the others has left, or torchrun's SIGTERM
            group.is_leaving = True
            raise group.lost() from error
        except Exception as error:
            group.leave(text_of(error))
            raise
        finally:
            stop.set()
            beating.join()


def _beat(group: Group, stop: Event) -> None:
    """Give signs of life until told to stop, or until there is nobody to give them to."""
    with suppress(RuntimeError):
        while not stop.is_set():
            group.beat()
            stop.wait(BEAT)


def _differing(facts: Mapping[str, str], ours: Json, theirs: Json) -> str:
    """The names of facts that another process has otherwise."""
    if not isinstance(ours, dict) or not isinstance(theirs, dict) or ours.keys() != theirs.keys():
        return "version of ckpt_surgeon"
    return ", ".join(name for name in facts if ours.get(name) != theirs.get(name)) or "facts"


@contextmanager
def _stopped_once(group: Group) -> Iterator[None]:
    """torchrun stops all processes once one has died: the first SIGTERM unwinds, but not while that is being told."""

    def stop(number: int, _frame: object) -> None:
        if not group.is_leaving:
            raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: signals are somebody else's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
