"""Where in a pickle the keys of its dicts are said, so that they can be said anew and nothing else is.

A key is put on the stack by an opcode of its own: one that has the string, or one that fetches it from the memo, where
strings lie that the pickle says more than once (the names of a model that its averaged copy has too, a key ``0`` that
is also a storage's).  Each of these places is replaced by itself: what fetches a string that has changed, and should
not, says it anew, and the other way round.  All else stays byte for byte, except for FRAME opcodes, which promise
lengths and may be left out, and, where room is short, memo entries that nothing fetches.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from .machine import HANDLERS, Constructor, Handler, Unpickler, Value


class Place(NamedTuple):
    """An opcode with its argument: where it begins, and where the next one does."""

    start: int
    stop: int


class _Said(NamedTuple):
    """A string on the stack, and the opcode that put it there."""

    text: str
    place: Place


@dataclass(slots=True, eq=False)
class _Kept:
    """A memo entry: the opcode that makes it, its number, its string, and the opcodes that fetch it."""

    place: Place
    number: int
    said: _Said | None
    fetches: list[Place] = field(default_factory=list)


class Spotter(Unpickler):
    """An unpickler that also knows where the keys of the dicts that it makes are said.

    >>> spotter = Spotter(b"\\x80\\x02}X\\x03\\x00\\x00\\x00oldK\\x01s.")
    >>> places = spotter.places(spotter.load(), "old")
    >>> spotter.rewritten({place: "a" for place in places})
    b'\\x80\\x02}X\\x01\\x00\\x00\\x00aK\\x01s.'
    """

    def __init__(
        self,
        data: bytes,
        *,
        constructors: Mapping[tuple[str, str], Constructor] | None = None,
        persistent: Callable[[Value], Value] | None = None,
    ) -> None:
        super().__init__(data, constructors=constructors, persistent=persistent)
        self.shortcuts = False  # they would pass by the memo
        self._raw = data
        self._said: dict[tuple[int, int], _Said] = {}  # by the number of marks, and the place on the stack above
        self._keys: dict[int, tuple[Value, dict[str, list[Place]]]] = {}  # by the identity of a dict, which is held
        self._kept: list[_Kept] = []
        self._latest: dict[int, _Kept] = {}
        self._frames: list[Place] = []
        self._counts_memo = False  # MEMOIZE: an entry's number is how many there are

    def places(self, node: Value, name: str) -> list[Place]:
        """The opcodes that say one key of a dict; several where the pickle sets it again."""
        _, names = self._keys.get(id(node), (None, {}))
        return names.get(name, [])

    def rewritten(self, texts: Mapping[Place, str], *, lean: bool = False) -> bytes:
        """The pickle, up to its STOP, with these keys said instead; ``lean`` leaves out what the memo does not need."""
        changes = dict.fromkeys(self._frames, b"")
        fetches = {place for kept in self._kept for place in kept.fetches}
        changes |= {place: self._string(text, place) for place, text in texts.items() if place not in fetches}
        for kept in self._kept:
            if kept.said is not None:
                changes |= self._said_anew(kept, kept.said, texts)
            if lean and not kept.fetches and not self._counts_memo:
                changes[kept.place] = b""
        pieces, at = [], 0
        for place, replacement in sorted(changes.items()):
            pieces += [self._raw[at : place.start], replacement]
            at = place.stop
        return b"".join([*pieces, self._raw[at : self.position]])

    def _said_anew(self, kept: _Kept, said: _Said, texts: Mapping[Place, str]) -> dict[Place, bytes]:
        """What replaces the fetches of an entry whose string is no longer what they want."""
        old = said.text
        now = texts.get(said.place, old)
        ahead = Counter(texts.get(place, old) for place in kept.fetches)
        changes = {}
        for place in kept.fetches:
            wanted = texts.get(place, old)
            ahead[wanted] -= 1
            if wanted == now:
                continue
            changes[place] = self._string(wanted, place)
            if ahead[wanted]:
                changes[place] += _put(kept.number)
                now = wanted
        return changes

    def _string(self, text: str, place: Place) -> bytes:
        encoded = text.encode("utf-8", "surrogatepass")
        if len(encoded) < 256 and (self._counts_memo or self._raw[place.start] == 0x8C):
            return b"\x8c" + bytes((len(encoded),)) + encoded
        return b"X" + struct.pack("<I", len(encoded)) + encoded

    # -- what the handlers below tell

    def push(self, place: Place) -> None:
        """The opcode at ``place`` put what is on top there."""
        top = self.stack[-1]
        if isinstance(top, str):
            self._said[len(self.marks), len(self.stack) - 1] = _Said(top, place)

    def keep(self, place: Place, number: int) -> None:
        """The opcode at ``place`` made a memo entry of what is on top."""
        self._kept.append(_Kept(place, number, self._at(len(self.stack) - 1)))
        self._latest[number] = self._kept[-1]

    def memoize(self, place: Place) -> None:
        """The same, the entry's number being how many there were; only strings matter then."""
        self._counts_memo = True
        number = len(self.memo) - 1
        self._latest.pop(number, None)
        if isinstance(self.stack[-1], str):
            self.keep(place, number)

    def fetch(self, place: Place, number: int) -> None:
        """The opcode at ``place`` fetched a memo entry."""
        if number in self._latest:
            self._latest[number].fetches.append(place)
        self.push(place)

    def double(self) -> None:
        """What is on top was put there twice by one opcode: it cannot be said anew in one place."""
        self._said.pop((len(self.marks), len(self.stack) - 1), None)

    def frame(self, place: Place) -> None:
        """The opcode at ``place`` is a FRAME."""
        self._frames.append(place)

    def keys_from(self, first: int) -> list[_Said]:
        """Every second string of those on the stack, from ``first`` on."""
        found = (self._at(index) for index in range(max(first, 0), len(self.stack), 2))
        return [said for said in found if said is not None]

    def fill(self, keys: Iterable[_Said]) -> None:
        """The dict on top was given these keys."""
        node = self.stack[-1]
        _, names = self._keys.setdefault(id(node), (node, {}))
        for said in keys:
            names.setdefault(said.text, []).append(said.place)

    def _at(self, index: int) -> _Said | None:
        """The string at an index of the stack, if it is still the one that an opcode put there."""
        said = self._said.get((len(self.marks), index))
        return said if said is not None and said.text is self.stack[index] else None


# -- the plain unpickler's handlers, told on


def _pushing(handler: Handler) -> Handler:
    """For the opcodes that have a string."""

    def run(machine: Unpickler, at: int) -> int:
        stop = handler(machine, at)
        _spotter(machine).push(Place(at - 1, stop))
        return stop

    return run


def _keeping(handler: Handler) -> Handler:
    def run(machine: Unpickler, at: int) -> int:
        stop = handler(machine, at)
        _spotter(machine).keep(Place(at - 1, stop), _number(machine, at, stop))
        return stop

    return run


def _fetching(handler: Handler) -> Handler:
    def run(machine: Unpickler, at: int) -> int:
        stop = handler(machine, at)
        _spotter(machine).fetch(Place(at - 1, stop), _number(machine, at, stop))
        return stop

    return run


def _filling(handler: Handler, *, whole: bool = True) -> Handler:
    """For the opcodes that set items of a dict: all above the mark, or the two on top."""

    def run(machine: Unpickler, at: int) -> int:
        spotter = _spotter(machine)
        keys = spotter.keys_from(0 if whole else len(machine.stack) - 2)
        stop = handler(machine, at)
        spotter.fill(keys)
        return stop

    return run


def _memoize(machine: Unpickler, at: int) -> int:
    stop = HANDLERS[0x94](machine, at)
    _spotter(machine).memoize(Place(at - 1, stop))
    return stop


def _dup(machine: Unpickler, at: int) -> int:
    _spotter(machine).double()
    return HANDLERS[0x32](machine, at)


def _frame(machine: Unpickler, at: int) -> int:
    stop = HANDLERS[0x95](machine, at)
    _spotter(machine).frame(Place(at - 1, stop))
    return stop


def _spotter(machine: Unpickler) -> Spotter:
    assert isinstance(machine, Spotter)
    return machine


def _number(machine: Unpickler, at: int, stop: int) -> int:
    """The number of a memo entry: a line for GET and PUT, else one byte or four."""
    argument = bytes(machine.data[at:stop])
    return int(argument) if machine.data[at - 1] in b"gp" else int.from_bytes(argument, "little")


def _put(number: int) -> bytes:
    return b"q" + bytes((number,)) if number < 256 else b"r" + struct.pack("<I", number)


Spotter.handlers = {
    **HANDLERS,
    **{opcode: _pushing(HANDLERS[opcode]) for opcode in b"STUVX\x8c\x8d"},
    **{opcode: _keeping(HANDLERS[opcode]) for opcode in b"pqr"},
    **{opcode: _fetching(HANDLERS[opcode]) for opcode in b"ghj"},
    **{opcode: _filling(HANDLERS[opcode]) for opcode in b"ud"},
    **{opcode: _filling(HANDLERS[opcode], whole=False) for opcode in b"s"},
    0x94: _memoize,
    0x32: _dup,
    0x95: _frame,
}
