"""Which opcodes of a pickle hold the keys of its dicts, so that keys can be replaced and nothing else.

A key is put on the stack by one opcode: one that has the string, or one that fetches it from the memo, where strings
lie that the pickle uses more than once (the names of a model that its averaged copy has too, a key ``0`` that is also
a storage's).  Each of these opcodes is replaced by one that pushes the new string.  An opcode that fetches a string
which has changed, and should not change there, is replaced by the old string, and the other way round.  All else stays
byte for byte, except for FRAME opcodes, which promise lengths and may be left out, and, where room is short, memo
entries that nothing fetches.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from .machine import Handler, Machine
from .unpickler import HANDLERS, Unpickler
from .values import Constructor, Value


class Opcode(NamedTuple):
    """An opcode with its argument: where it begins, and where the next one does."""

    start: int
    stop: int


class _Text(NamedTuple):
    """A string on the stack, and the opcode that put it there."""

    text: str
    opcode: Opcode


@dataclass(slots=True, eq=False)
class _Entry:
    """A memo entry: the opcode that makes it, its number, its string, and the opcodes that fetch it."""

    opcode: Opcode
    number: int
    string: _Text | None
    fetches: list[Opcode] = field(default_factory=list)


class KeyUnpickler(Unpickler):
    """An unpickler that also knows which opcodes hold the keys of the dicts that it makes.

    >>> unpickler = KeyUnpickler(b"\\x80\\x02}X\\x03\\x00\\x00\\x00oldK\\x01s.")
    >>> places = unpickler.places(unpickler.load(), "old")
    >>> unpickler.rewritten({opcode: "a" for opcode in places})
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
        self._texts: dict[tuple[int, int], _Text] = {}  # by the number of marks, and the place on the stack above
        self._keys: dict[int, tuple[Value, dict[str, list[Opcode]]]] = {}  # by the identity of a dict, which is held
        self._entries: list[_Entry] = []
        self._latest: dict[int, _Entry] = {}
        self._frames: list[Opcode] = []
        self._counts_memo = False  # MEMOIZE: an entry's number is how many there are

    def places(self, node: Value, name: str) -> list[Opcode]:
        """The opcodes that hold one key of a dict; several where the pickle sets it again."""
        _, names = self._keys.get(id(node), (None, {}))
        return names.get(name, [])

    def rewritten(self, texts: Mapping[Opcode, str], *, lean: bool = False) -> bytes:
        """The pickle, up to its STOP, with other keys; ``lean`` leaves out memo entries that nothing fetches."""
        changes = dict.fromkeys(self._frames, b"")
        fetches = {opcode for entry in self._entries for opcode in entry.fetches}
        changes |= {opcode: self._string(text, opcode) for opcode, text in texts.items() if opcode not in fetches}
        for entry in self._entries:
            if entry.string is not None:
                changes |= self._fetches_replaced(entry, entry.string, texts)
            if lean and not entry.fetches and not self._counts_memo:
                changes[entry.opcode] = b""
        pieces, at = [], 0
        for opcode, replacement in sorted(changes.items()):
            pieces += [self._raw[at : opcode.start], replacement]
            at = opcode.stop
        return b"".join([*pieces, self._raw[at : self.position]])

    def _fetches_replaced(self, entry: _Entry, string: _Text, texts: Mapping[Opcode, str]) -> dict[Opcode, bytes]:
        """What replaces the fetches of an entry whose string is no longer what they want."""
        old = string.text
        now = texts.get(string.opcode, old)
        ahead = Counter(texts.get(opcode, old) for opcode in entry.fetches)
        changes = {}
        for opcode in entry.fetches:
            wanted = texts.get(opcode, old)
            ahead[wanted] -= 1
            if wanted == now:
                continue
            changes[opcode] = self._string(wanted, opcode)
            if ahead[wanted]:
                changes[opcode] += _put(entry.number)
                now = wanted
        return changes

    def _string(self, text: str, opcode: Opcode) -> bytes:
        encoded = text.encode("utf-8", "surrogatepass")
        if len(encoded) < 256 and (self._counts_memo or self._raw[opcode.start] == 0x8C):
            return b"\x8c" + bytes((len(encoded),)) + encoded
        return b"X" + struct.pack("<I", len(encoded)) + encoded

    # -- called by the handlers below

    def push(self, opcode: Opcode) -> None:
        """``opcode`` put what is on top there."""
        top = self.stack[-1]
        if isinstance(top, str):
            self._texts[len(self.marks), len(self.stack) - 1] = _Text(top, opcode)

    def keep(self, opcode: Opcode, number: int) -> None:
        """``opcode`` made a memo entry of what is on top."""
        self._entries.append(_Entry(opcode, number, self._at(len(self.stack) - 1)))
        self._latest[number] = self._entries[-1]

    def memoize(self, opcode: Opcode) -> None:
        """MEMOIZE made an entry, whose number is how many there were; only strings matter then."""
        self._counts_memo = True
        number = len(self.memo) - 1
        self._latest.pop(number, None)
        if isinstance(self.stack[-1], str):
            self.keep(opcode, number)

    def fetch(self, opcode: Opcode, number: int) -> None:
        """``opcode`` fetched a memo entry."""
        if number in self._latest:
            self._latest[number].fetches.append(opcode)
        self.push(opcode)

    def double(self) -> None:
        """One opcode put the value on top there twice: replacing that opcode would change both."""
        self._texts.pop((len(self.marks), len(self.stack) - 1), None)

    def frame(self, opcode: Opcode) -> None:
        """``opcode`` is a FRAME."""
        self._frames.append(opcode)

    def keys_from(self, first: int) -> list[_Text]:
        """Every second string of those on the stack, from ``first`` on."""
        found = (self._at(index) for index in range(max(first, 0), len(self.stack), 2))
        return [string for string in found if string is not None]

    def fill(self, keys: Iterable[_Text]) -> None:
        """The dict on top was given these keys."""
        node = self.stack[-1]
        _, names = self._keys.setdefault(id(node), (node, {}))
        for string in keys:
            names.setdefault(string.text, []).append(string.opcode)

    def _at(self, index: int) -> _Text | None:
        """The string at an index of the stack, if it is still the one that an opcode put there."""
        string = self._texts.get((len(self.marks), index))
        return string if string is not None and string.text is self.stack[index] else None


# -- the plain unpickler's handlers, followed by a note to the unpickler


def _pushing(handler: Handler) -> Handler:
    """For the opcodes that have a string."""

    def run(machine: Machine, at: int) -> int:
        stop = handler(machine, at)
        _tracker(machine).push(Opcode(at - 1, stop))
        return stop

    return run


def _keeping(handler: Handler) -> Handler:
    def run(machine: Machine, at: int) -> int:
        stop = handler(machine, at)
        _tracker(machine).keep(Opcode(at - 1, stop), _number(machine, at, stop))
        return stop

    return run


def _fetching(handler: Handler) -> Handler:
    def run(machine: Machine, at: int) -> int:
        stop = handler(machine, at)
        _tracker(machine).fetch(Opcode(at - 1, stop), _number(machine, at, stop))
        return stop

    return run


def _filling(handler: Handler, *, whole: bool = True) -> Handler:
    """For the opcodes that set items of a dict: all above the mark, or the two on top."""

    def run(machine: Machine, at: int) -> int:
        unpickler = _tracker(machine)
        keys = unpickler.keys_from(0 if whole else len(machine.stack) - 2)
        stop = handler(machine, at)
        unpickler.fill(keys)
        return stop

    return run


def _memoize(machine: Machine, at: int) -> int:
    stop = HANDLERS[0x94](machine, at)
    _tracker(machine).memoize(Opcode(at - 1, stop))
    return stop


def _dup(machine: Machine, at: int) -> int:
    _tracker(machine).double()
    return HANDLERS[0x32](machine, at)


def _frame(machine: Machine, at: int) -> int:
    stop = HANDLERS[0x95](machine, at)
    _tracker(machine).frame(Opcode(at - 1, stop))
    return stop


def _tracker(machine: Machine) -> KeyUnpickler:
    assert isinstance(machine, KeyUnpickler)
    return machine


def _number(machine: Machine, at: int, stop: int) -> int:
    """The number of a memo entry: a line for GET and PUT, else one byte or four."""
    argument = bytes(machine.data[at:stop])
    return int(argument) if machine.data[at - 1] in b"gp" else int.from_bytes(argument, "little")


def _put(number: int) -> bytes:
    return b"q" + bytes((number,)) if number < 256 else b"r" + struct.pack("<I", number)


KeyUnpickler.handlers = {
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
