"""Reading ahead: remote bytes that will be needed soon are fetched while earlier ones are worked on.

Callers that read many tensors announce their spans in the order of reading.  From then on, reading one of them
keeps the next ones coming: at most AHEAD bytes, in at most REQUESTS requests, so that memory stays bounded and no byte
is fetched that was not announced (but for the small gaps between neighbours).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from concurrent.futures import Future

    from .patience import Threads

Range: TypeAlias = tuple[int, int]  # start and stop (exclusive) of bytes

CONCURRENT = 32  # requests at a time
PIECE = 8 << 20  # bytes of one request
AHEAD = 4 * PIECE  # bytes that may be on their way or waiting
REQUESTS = 16  # requests that may
GAP = 16 << 10  # bytes between two spans up to which fetching them costs less than a request


class Fetchable(Hashable, Protocol):
    """A file whose bytes are fetched from a server."""

    @property
    def size(self) -> int: ...

    def head(self) -> bytes: ...

    def fetch(self, start: int, stop: int, /) -> bytes: ...

    def fetch_ahead(self, ranges: Sequence[Range], /) -> None: ...

    def check_unchanged(self) -> None: ...


class Source(Protocol):
    """Where bytes come from: a file of this machine, or one that is fetched."""

    @property
    def remote(self) -> Fetchable | None: ...

    def remember(self) -> None: ...

    def check_unchanged(self) -> None: ...


class Span(Protocol):
    """Bytes of a file."""

    @property
    def path(self) -> Source: ...

    @property
    def start(self) -> int: ...

    @property
    def stop(self) -> int: ...


class _Ahead:
    """The pieces of one remote file in the order in which they will be read."""

    def __init__(self, path: Fetchable, ranges: Iterable[Range]) -> None:
        self._path = path
        self._pieces = list(_pieces(ranges))
        self._by_place = sorted(range(len(self._pieces)), key=lambda index: (self._pieces[index][0], -index))
        self._starts = [self._pieces[index][0] for index in self._by_place]
        self._cursor = 0
        self._coming: dict[int, Future[bytes]] = {}

    def read(self, start: int, stop: int) -> Iterator[memoryview]:
        """Yield the bytes in some pieces."""
        while start < stop:
            index = self._piece_at(start)
            if index is None:  # not announced, or passed already
                yield from _Ahead(self._path, [(start, stop)]).read(start, stop)
                return
            low, high = self._pieces[index]
            end = min(stop, high)
            yield memoryview(self._arrived(index))[start - low : end - low]
            if end == high:
                del self._coming[index]
                self._cursor = index + 1
            start = end

    def _piece_at(self, position: int) -> int | None:
        """The first piece from the cursor on that has this byte: mostly that at the cursor, or the next."""
        near = range(self._cursor, min(self._cursor + REQUESTS, len(self._pieces)))
        for index in near:
            if self._pieces[index][0] <= position < self._pieces[index][1]:
                return index
        at = bisect_right(self._starts, position) - 1
        index = self._by_place[at] if at >= 0 else -1
        return index if index >= self._cursor and position < self._pieces[index][1] else None

    def _arrived(self, index: int) -> bytes:
        """One piece's bytes; the pieces after it are asked for, those before it are let go."""
        if index != self._cursor:
            self._cursor = index
            for passed in [other for other in self._coming if other < index]:
                self._coming.pop(passed).cancel()
        waiting = 0
        for other in range(index, min(index + REQUESTS, len(self._pieces))):
            start, stop = self._pieces[other]
            waiting += stop - start
            if waiting > AHEAD and other > index:
                break
            if other not in self._coming:
                self._coming[other] = requests().submit(self._path.fetch, start, stop)
        return self._coming[index].result()

    def stop(self) -> None:
        """Give up what is on its way."""
        for future in self._coming.values():
            future.cancel()
        self._coming.clear()


def _pieces(ranges: Iterable[Range]) -> Iterator[Range]:
    """Ranges as requests: neighbours joined, long ones cut."""
    run: Range | None = None
    for start, stop in ranges:
        if run is not None and run[1] <= start <= run[1] + GAP and stop - run[0] <= PIECE:
            run = (run[0], stop)
            continue
        if run is not None:
            yield run
        while stop - start > PIECE:
            yield (start, start + PIECE)
            start += PIECE
        run = (start, stop) if start < stop else None
    if run is not None:
        yield run


_ANNOUNCED: ContextVar[dict[Fetchable, _Ahead] | None] = ContextVar("announced", default=None)


@cache
def requests() -> Threads:
    """The threads that wait for servers."""
    from .patience import Threads

    return Threads("ckpt-fetch", CONCURRENT)


@contextmanager
def reading_ahead(spans: Iterable[Span]) -> Iterator[None]:
    """Announce the spans that will be read inside, in order; at the end no file may have changed.

    Raises BrokenFile when a file is not the one any more that was opened: by its size, time and inode, or by what its
    server tells.
    """
    here: dict[int, Source] = {}  # by identity: each path knows which file it was when it was opened
    ranges: dict[Fetchable, list[Range]] = {}
    for span in spans:
        if (source := span.path.remote) is not None:
            ranges.setdefault(source, []).append((span.start, span.stop))
        else:
            here[id(span.path)] = span.path
    for path in here.values():
        path.remember()
    plans = {path: _Ahead(path, found) for path, found in ranges.items()}
    token = _ANNOUNCED.set(plans)
    try:
        yield
    finally:
        _ANNOUNCED.reset(token)
        for plan in plans.values():
            plan.stop()
    list(requests().map(lambda path: path.check_unchanged(), plans) if plans else ())
    for path in here.values():
        path.check_unchanged()


def blocks(path: Fetchable, start: int, stop: int, size: int) -> Iterator[bytes]:
    """Yield bytes of a remote file in blocks of ``size``, reading ahead."""
    plan = (_ANNOUNCED.get() or {}).get(path) or _Ahead(path, [(start, stop)])
    for low in range(start, stop, size):
        yield b"".join(plan.read(low, min(low + size, stop)))
