"""A graph written as a pickle again: same types, values, sharing and order.

>>> import collections, pickle
>>> from ckpt_surgeon.formats.pickle.graph import recorded
>>> raw = pickle.dumps({"epoch": 3, "model": collections.OrderedDict(a=1.5)}, protocol=2)
>>> pickle.loads(written(recorded(raw)))
{'epoch': 3, 'model': OrderedDict([('a', 1.5)])}
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

from .graph import ByteArrayNode, CallNode, DictNode, ListNode, Node, PersistentNode, Python2Text, SetNode
from .values import Global, Value


def below(value: Value) -> Iterator[Value]:
    """What a node refers to directly."""
    if isinstance(value, DictNode):
        for pair in value.pairs:
            yield from pair
    elif isinstance(value, (ListNode, SetNode)):
        yield from value.items
    elif isinstance(value, tuple):
        yield from value
    elif isinstance(value, PersistentNode):
        yield from value.name if isinstance(value.name, tuple) else ()
    elif isinstance(value, CallNode):
        yield from (value.cls, value.args, value.kwargs)
        for _, operands in value.after:
            yield from operands


def _shared(root: Value, instead: Mapping[int, Value]) -> set[object]:
    """What is referred to more than once: nodes and tuples by identity, strings and names by value.

    What lies between a tuple and a reference to itself counts too, so that a writer comes to an end there.
    """
    met: set[object] = set()
    shared: set[object] = set()
    path: list[object] = []  # the keys from the root to here
    ahead: list[tuple[Value, bool]] = [(root, True)]
    while ahead:
        value, enters = ahead.pop()
        if not enters:
            path.pop()
            continue
        value = instead.get(id(value), value)
        key = value if isinstance(value, (str, Global)) else id(value) if isinstance(value, (Node, tuple)) else None
        if key is None:
            continue
        if key in met:
            shared.add(key)
            if isinstance(value, tuple) and value and key in path:
                shared.update(path[path.index(key) :])
            continue
        met.add(key)
        if isinstance(value, (Node, tuple)):
            path.append(key)
            ahead.append((None, False))
            ahead.extend((one, True) for one in below(value))
    return shared


def written(
    root: Value,
    name_of: Callable[[PersistentNode], Value] | None = None,
    instead: Mapping[int, Value] | None = None,
) -> bytes:
    """A pickle that builds the graph: same types, values, sharing and order.

    ``name_of`` gives the persistent id that a node gets, its own without it; ``instead`` maps the identity of nodes to
    what is written in their place, wherever they are referred to.  The protocol is 2 unless something in the
    graph needs a later one.  Raises ValueError where an object is made of arguments that hold the object itself.
    """
    writer = _Writer(name_of or (lambda node: node.name), instead or {}, root)
    writer.write(root)
    head = b"\x80" + bytes((writer.protocol,))
    return head + bytes(writer.out) + b"."


_Task: TypeAlias = "Callable[[], None]"


class _Writer:
    """Writes depth first, by a stack of its own: graphs may be deeper than Python's stack."""

    def __init__(self, name_of: Callable[[PersistentNode], Value], instead: Mapping[int, Value], root: Value) -> None:
        self.out = bytearray()
        self.protocol = 2
        self._name_of = name_of
        self._instead = instead
        self._shared = _shared(root, instead)
        self._memo: dict[object, int] = {}
        self._kept: list[Value] = []  # what the memo knows by id must stay alive
        self._making: set[int] = set()
        self._ahead: list[_Task] = []

    def write(self, root: Value) -> None:
        self._ahead.append(self._task(root))
        while self._ahead:
            self._ahead.pop()()

    def _run(self, tasks: list[_Task]) -> None:
        self._ahead.extend(reversed(tasks))  # the last one runs first

    def _put(self, key: object, value: Value) -> None:
        if key not in self._shared:
            return
        index = self._memo[key] = len(self._memo)
        self._kept.append(value)
        self.out += b"q" + bytes((index,)) if index < 256 else b"r" + struct.pack("<I", index)

    def _got(self, key: object) -> bool:
        """Write the fetch of what the memo has; False where it has not."""
        index = self._memo.get(key)
        if index is None:
            return False
        self.out += b"h" + bytes((index,)) if index < 256 else b"j" + struct.pack("<I", index)
        return True

    def _needs(self, protocol: int) -> None:
        self.protocol = max(self.protocol, protocol)

    def _value(self, value: Value) -> None:
        value = self._instead.get(id(value), value)
        if isinstance(value, Node):
            if not self._got(id(value)):
                self._node(value)
        elif type(value) is tuple:
            self._tuple(value)
        elif isinstance(value, str):
            if not self._got(value):
                self.out += text(value)
                self._put(value, value)
        elif isinstance(value, Global):
            if not self._got(value):
                self.out += b"c" + f"{value.module}\n{value.name}\n".encode("utf-8", "surrogateescape")
                self._put(value, value)
        else:
            self.out += self._plain(value)

    def _plain(self, value: Value) -> bytes:
        if value is None or isinstance(value, bool):
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        if isinstance(value, int):
            return integer(value)
        if isinstance(value, float):
            return b"G" + struct.pack(">d", value)
        if isinstance(value, Python2Text):
            return b"T" + struct.pack("<i", len(value.raw)) + value.raw
        if isinstance(value, bytes):
            self._needs(3)
            return b"B" + struct.pack("<I", len(value)) + value
        raise ValueError(f"a {type(value).__name__} cannot be written")

    def _tuple(self, value: tuple[Value, ...]) -> None:
        if not value:
            self.out += b")"
            return
        if self._got(id(value)):
            return
        short = len(value) <= 3

        def end() -> None:
            if id(value) in self._memo:  # one of its items holds it, and has written it
                self.out += b"0" * len(value) if short else b"1"
                self._got(id(value))
                return
            self.out += (b"", b"\x85", b"\x86", b"\x87")[len(value)] if short else b"t"
            self._put(id(value), value)

        if not short:
            self.out += b"("
        self._run([*(self._task(item) for item in value), end])

    def _task(self, value: Value) -> _Task:
        return lambda: self._value(value)

    def _code(self, opcodes: bytes) -> _Task:
        return lambda: self.out.extend(opcodes)

    def _node(self, node: Node) -> None:
        if isinstance(node, DictNode):
            self._made(node, b"}")
            self._items(b"u", [value for pair in node.pairs for value in pair])
        elif isinstance(node, ListNode):
            self._made(node, b"]")
            self._items(b"e", node.items)
        elif isinstance(node, SetNode):
            self._set(node)
        elif isinstance(node, ByteArrayNode):
            self._needs(5)
            self._made(node, b"\x96" + struct.pack("<Q", len(node.raw)) + node.raw)
        elif isinstance(node, PersistentNode):
            self._run([self._task(self._name_of(node)), self._code(b"Q"), lambda: self._put(id(node), node)])
        elif isinstance(node, CallNode):
            self._call(node)

    def _made(self, node: Node, opcodes: bytes) -> None:
        self.out += opcodes
        self._put(id(node), node)

    def _items(self, opcode: bytes, items: list[Value]) -> None:
        if items:
            self._run([self._code(b"("), *map(self._task, items), self._code(opcode)])

    def _set(self, node: SetNode) -> None:
        self._needs(4)
        if not node.frozen:
            self._made(node, b"\x8f")
            self._items(b"\x90", node.items)
            return
        self._enter(node)
        self._run([self._code(b"("), *map(self._task, node.items), self._code(b"\x91"), lambda: self._leave(node)])

    def _call(self, node: CallNode) -> None:
        self._enter(node)
        if node.kind == "obj":
            args = node.args if isinstance(node.args, tuple) else ()
            made = [self._code(b"("), self._task(node.cls), *map(self._task, args), self._code(b"o")]
        elif node.kind == "new_ex":
            self._needs(4)
            made = [self._task(node.cls), self._task(node.args), self._task(node.kwargs), self._code(b"\x92")]
        else:
            made = [self._task(node.cls), self._task(node.args), self._code(b"R" if node.kind == "reduce" else b"\x81")]
        self._run([*made, lambda: self._leave(node), *self._done(node)])

    def _done(self, node: CallNode) -> Iterator[_Task]:
        for code, operands in node.after:
            if code in (b"a", b"b"):
                yield from (self._task(operands[0]), self._code(code))
                continue
            if code == b"\x90":
                self._needs(4)
            yield from (self._code(b"("), *map(self._task, operands), self._code(code))

    def _enter(self, node: Node) -> None:
        if id(node) in self._making:
            raise ValueError("an object that is made of itself cannot be written")
        self._making.add(id(node))

    def _leave(self, node: Node) -> None:
        self._making.discard(id(node))
        self._put(id(node), node)


def text(value: str) -> bytes:
    """The opcodes that push a string."""
    encoded = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def integer(value: int) -> bytes:
    """The opcodes that push an integer.

    >>> integer(3), integer(-1)
    (b'K\\x03', b'J\\xff\\xff\\xff\\xff')
    """
    if 0 <= value < 256:
        return b"K" + bytes((value,))
    if 0 <= value < 65536:
        return b"M" + struct.pack("<H", value)
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    encoded = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    if len(encoded) < 256:
        return b"\x8a" + bytes((len(encoded),)) + encoded
    return b"\x8b" + struct.pack("<i", len(encoded)) + encoded
