"""How long a server is waited for, and the threads that wait: none of them keeps the process from ending.

A server that is silent, or that sends a byte now and then, is given up: in each CKPT_TIMEOUT seconds (60) at least
LEAST bytes of an answer have to come, or its end.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from threading import Lock, Thread
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from ..errors import CheckpointError

if TYPE_CHECKING:
    from concurrent.futures import Future
    from queue import SimpleQueue

T = TypeVar("T")
Item = TypeVar("Item")
P = ParamSpec("P")

SECONDS = 60.0
VARIABLE = "CKPT_TIMEOUT"  # the environment variable that has other seconds
LEAST = 240_000  # bytes that have to come in that time: 4 kB a second


def seconds() -> float:
    """Seconds without LEAST bytes after which a server is given up.  Raises CheckpointError for a bad CKPT_TIMEOUT.

    >>> seconds()
    60.0
    """
    said = os.environ.get(VARIABLE, "")
    try:
        found = float(said) if said else SECONDS
    except ValueError:
        found = 0.0
    if not 0 < found < 1e9:
        raise CheckpointError(f"{VARIABLE}={said!r} is no number of seconds", remedy=f"set it to {SECONDS:.0f} or more")
    return found


def seconds_for(nbytes: int) -> float:
    """Seconds after which a request of so many bytes is given up, where nobody sees how many have come.

    >>> seconds_for(0), seconds_for(8 << 20) / 60 < 36
    (60.0, True)
    """
    return seconds() * (1 + nbytes / LEAST)


class Threads:
    """Threads that do what they are given, at most ``most`` at a time; a process ends without waiting for them.

    >>> threads = Threads("example", 2)
    >>> threads.submit(sum, [1, 2]).result(), list(threads.map(abs, [-1, 2]))
    (3, [1, 2])
    """

    def __init__(self, name: str, most: int | None = None) -> None:
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._begin)
        self._name = name
        self._most = most
        self._begin()

    def _begin(self) -> None:
        """Have no threads yet: a process that was forked has none of them either."""
        from queue import SimpleQueue

        self._started = 0
        self._free = 0  # threads that wait for work, less the work that waits for them
        self._lock = Lock()
        self._work: SimpleQueue[Callable[[], object]] = SimpleQueue()

    def submit(self, do: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Have this done; the future has its result."""
        from concurrent.futures import Future

        future: Future[T] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(do(*args, **kwargs))
            except BaseException as error:  # raised again where the result is asked for
                future.set_exception(error)

        with self._lock:
            self._free -= 1
            starts = self._free < 0 and (self._most is None or self._started < self._most)
            self._started += starts
            self._free += starts
        self._work.put(work)
        if starts:
            Thread(target=self._run, name=f"{self._name}-{self._started}", daemon=True).start()
        return future

    def map(self, do: Callable[[Item], T], items: Iterable[Item]) -> Iterator[T]:
        """Have it done with each item, all at a time; the results come in order."""
        return iter([future.result() for future in [self.submit(do, item) for item in items]])

    def _run(self) -> None:
        while True:
            self._work.get()()
            with self._lock:
                self._free += 1


@cache
def _waiting() -> Threads:
    return Threads("ckpt-wait")


def within(limit: float, do: Callable[[], T]) -> T:
    """What ``do`` returns; raises TimeoutError when it takes more than ``limit`` seconds, and lets it go on alone.

    >>> within(10, lambda: 1)
    1
    """
    future = _waiting().submit(do)
    try:
        return future.result(limit)
    finally:
        future.cancel()
