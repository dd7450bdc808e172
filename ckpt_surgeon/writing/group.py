"""The processes that torchrun started: they meet, exchange values, and tell which of them was lost.

Rendezvous and collectives are torch.distributed's (gloo).  torch is imported inside the functions.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from ..errors import CheckpointError, EditError, RankFailed
from ..files.paths import FilePath
from .plan import Plan
from .write import Json

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

PATIENCE = timedelta(days=7)  # that a process waits for the others, which may have much to write
GRACE = 2.0  # seconds in which the others say that they are still there, once one has failed


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
    """The processes of one torchrun: torch.distributed's store and its barrier."""

    def __init__(self, number: int, size: int, store: Store) -> None:
        self.rank = number
        self.size = size
        self.is_leaving = False
        self._store = store
        self._rounds = 0

    def share(self, planned: Plan) -> Sequence[int]:
        """The files that this process makes."""
        return shares(planned.sizes, self.size)[self.rank]

    def announce(self, doing: str) -> None:
        """Note what this process is at, for the others to tell if it dies."""
        self._store.set(f"doing/{self.rank}", doing)

    def wait(self) -> None:
        """Wait until every process is here.  Raises RuntimeError (torch's) when one is gone."""
        from torch import distributed

        distributed.barrier()

    def gathered(self, value: Json) -> list[Json]:
        """What each process brings, by rank."""
        self._rounds += 1
        self._store.set(f"{self._rounds}/{self.rank}", json.dumps(value))
        self.wait()
        return [json.loads(self._store.get(f"{self._rounds}/{one}")) for one in range(self.size)]

    def agree(self, digest: str, out: FilePath) -> None:
        """Raise EditError unless every process has planned the same."""
        first, *others = self.gathered(digest)
        odd = [str(number) for number, other in enumerate(others, 1) if other != first]
        if odd:
            problem = f"{out}: rank {', '.join(odd)} plans another output than rank 0"
            raise EditError(problem, remedy="do all nodes see the same files?")

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
            if one not in gone and (why := self._store.get(f"left/{one}").decode()):
                return RankFailed(one, "", why, told_by=one)  # it has told by itself
        if not gone:
            return RankFailed(self.rank, "", "was stopped", told_by=self.rank)
        doing = self._store.get(f"doing/{gone[0]}").decode() if self._store.check([f"doing/{gone[0]}"]) else ""
        others = f", as did {', '.join(map(str, gone[1:]))}" if gone[1:] else ""
        first = min(set(range(self.size)) - set(gone))
        return RankFailed(gone[0], doing, f"died{others}", told_by=first, remedy="run the same command again to go on")


@contextmanager
def joined() -> Iterator[Group]:
    """Meet the other processes, and part; where one is lost, say which and what it was at."""
    from torch import distributed
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, number, size = next(iter(rendezvous("env://", timeout=PATIENCE)))
    distributed.init_process_group(
        "gloo", store=PrefixStore("ckpt", store), rank=number, world_size=size, timeout=PATIENCE
    )
    group = Group(number, size, PrefixStore("ckpt_state", store))
    with _stopped_once(group):
        try:
            yield group
            group.leave()
        except CheckpointError as error:
            group.leave(str(error))
            raise
        except (RuntimeError, SystemExit) as error:  # a collective without one of the others, or torchrun's SIGTERM
            group.is_leaving = True
            raise group.lost() from error
        finally:
            distributed.destroy_process_group()


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
