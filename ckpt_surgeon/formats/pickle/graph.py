"""A pickle as the graph of what it builds, exact enough to be written again.

The inert machine makes records that say what a file *means* to a reader of weights: an OrderedDict is a dict, a
parameter is its tensor.  Whoever writes a whole file back needs more: how each object is made (called, or made by
``__new__``), what was done to it afterwards and in which order, and which objects are one and the same.  That is this
graph.  Nothing in it is imported or called.

>>> import pickle
>>> recorded(pickle.dumps({"epoch": 3}, protocol=2)).pairs
[('epoch', 3)]
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeAlias

from .machine import Handler, Machine
from .unpickler import HANDLERS, Unpickler
from .values import Global, Value

Kind: TypeAlias = Literal["reduce", "new", "new_ex", "obj"]
Pair: TypeAlias = tuple[Value, Value]


@dataclass(slots=True, eq=False, repr=False)
class Node:
    """Something with an identity: what other nodes refer to is this very object."""


@dataclass(slots=True, eq=False, repr=False)
class DictNode(Node):
    """A plain dict; keys may be anything that a pickle can say."""

    pairs: list[Pair] = field(default_factory=list)


@dataclass(slots=True, eq=False, repr=False)
class ListNode(Node):
    """A plain list."""

    items: list[Value] = field(default_factory=list)


@dataclass(slots=True, eq=False, repr=False)
class SetNode(Node):
    """A set or a frozenset of protocol 4 and later."""

    items: list[Value] = field(default_factory=list)
    frozen: bool = False


@dataclass(slots=True, eq=False, repr=False)
class ByteArrayNode(Node):
    """A bytearray of protocol 5."""

    raw: bytes


@dataclass(frozen=True, slots=True)
class Python2Text:
    """A ``str`` of Python 2, text or bytes as the reader's ``encoding`` has it."""

    raw: bytes


@dataclass(slots=True, eq=False, repr=False)
class PersistentNode(Node):
    """A persistent id; for torch, ``("storage", class, key, location, count of elements)``."""

    name: Value


@dataclass(slots=True, eq=False, repr=False)
class CallNode(Node):
    """An object made by calling ``cls``, and what was done to it then, in order.

    ``kind`` says how: ``cls(*args)`` by REDUCE, ``cls.__new__(cls, *args)`` by NEWOBJ, with keyword arguments by
    NEWOBJ_EX, or OBJ as protocol 0 has it.  ``after`` holds opcodes (``b"b"`` BUILD, ``b"u"`` SETITEMS, ``b"a"``
    APPEND, ``b"e"`` APPENDS, ``b"\\x90"`` ADDITEMS) and their operands.
    """

    kind: Kind
    cls: Value
    args: Value = ()
    kwargs: Value = None
    after: list[tuple[bytes, list[Value]]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The class or function as ``module.name``, "" where a call's result is called."""
        return str(self.cls) if isinstance(self.cls, Global) else ""

    @property
    def pairs(self) -> list[Pair]:
        """The keys and values that were set on it."""
        flat = [value for code, operands in self.after if code == b"u" for value in operands]
        return list(zip(flat[::2], flat[1::2], strict=True))

    @property
    def state(self) -> Value:
        """The operand of its last BUILD, None without one."""
        return next((operands[0] for code, operands in reversed(self.after) if code == b"b"), None)


class Recorder(Unpickler):
    """An unpickler that makes the graph; every name stays a name, every call a :class:`CallNode`."""

    handlers: ClassVar[dict[int, Handler]] = dict(HANDLERS)
    decodes = False  # whether a str of Python 2 is taken for text in UTF-8, as torch.load takes it


def recorded(
    data: bytes | mmap.mmap,
    persistent: Callable[[Value], Value] = PersistentNode,
    start: int = 0,
    *,
    decodes: bool = False,
) -> Value:
    """The graph of the pickle that begins at byte ``start``, its persistent ids made by ``persistent``.

    With ``decodes``, a ``str`` of Python 2 is text where it is UTF-8, as torch.load has it.
    Raises PickleError when it is damaged, ValueError for what cannot be recorded.
    """
    machine = Recorder(data, persistent=persistent)
    machine.shortcuts = False
    machine.decodes = decodes
    return machine.load(start)


def _on(*opcodes: bytes) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        Recorder.handlers.update({opcode[0]: handler for opcode in opcodes})
        return handler

    return register


@_on(b"}")
def _empty_dict(machine: Machine, at: int) -> int:
    machine.stack.append(DictNode())
    return at


@_on(b"d")
def _dict(machine: Machine, at: int) -> int:
    items = machine.pop_mark()
    machine.stack.append(DictNode(list(zip(items[::2], items[1::2], strict=True))))
    return at


@_on(b"]")
def _empty_list(machine: Machine, at: int) -> int:
    machine.stack.append(ListNode())
    return at


@_on(b"l")
def _list(machine: Machine, at: int) -> int:
    items = machine.pop_mark()
    machine.stack.append(ListNode(items))
    return at


@_on(b"\x8f")
def _empty_set(machine: Machine, at: int) -> int:
    machine.stack.append(SetNode())
    return at


@_on(b"\x91")
def _frozenset(machine: Machine, at: int) -> int:
    items = machine.pop_mark()
    machine.stack.append(SetNode(items, frozen=True))
    return at


@_on(b"s")
def _setitem(machine: Machine, at: int) -> int:
    value, key = machine.stack.pop(), machine.stack.pop()
    _set(machine.stack[-1], [key, value])
    return at


@_on(b"u")
def _setitems(machine: Machine, at: int) -> int:
    items = machine.pop_mark()
    _set(machine.stack[-1], items)
    return at


def _set(target: Value, items: list[Value]) -> None:
    if len(items) % 2:
        raise ValueError("a key without a value")
    if isinstance(target, DictNode):
        target.pairs.extend(zip(items[::2], items[1::2], strict=True))
    else:
        _do(target, b"u", items)


@_on(b"a")
def _append(machine: Machine, at: int) -> int:
    value = machine.stack.pop()
    _add(machine.stack[-1], b"a", [value])
    return at


@_on(b"e", b"\x90")
def _appends(machine: Machine, at: int) -> int:
    items = machine.pop_mark()
    _add(machine.stack[-1], bytes(machine.data[at - 1 : at]), items)
    return at


def _add(target: Value, code: bytes, items: list[Value]) -> None:
    if isinstance(target, ListNode) or (isinstance(target, SetNode) and not target.frozen):
        target.items.extend(items)
    else:
        _do(target, code, items)


@_on(b"b")
def _build(machine: Machine, at: int) -> int:
    state = machine.stack.pop()
    _do(machine.stack[-1], b"b", [state])
    return at


def _do(target: Value, code: bytes, operands: list[Value]) -> None:
    if not isinstance(target, CallNode):
        raise ValueError(f"something is done to a {type(target).__name__} that cannot be written again")
    target.after.append((code, operands))


@_on(b"R")
def _reduce(machine: Machine, at: int) -> int:
    args, cls = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(CallNode("reduce", cls, args))
    return at


@_on(b"\x81")
def _newobj(machine: Machine, at: int) -> int:
    args, cls = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(CallNode("new", cls, args))
    return at


@_on(b"\x92")
def _newobj_ex(machine: Machine, at: int) -> int:
    kwargs, args, cls = machine.stack.pop(), machine.stack.pop(), machine.stack.pop()
    machine.stack.append(CallNode("new_ex", cls, args, kwargs))
    return at


@_on(b"o")
def _obj(machine: Machine, at: int) -> int:
    cls, *args = machine.pop_mark()
    machine.stack.append(CallNode("obj", cls, tuple(args)))
    return at


@_on(b"i")
def _inst(machine: Machine, at: int) -> int:
    module, at = machine.line(at)
    name, at = machine.line(at)
    machine.stack.append(CallNode("obj", machine.name(module, name), tuple(machine.pop_mark())))
    return at


@_on(b"T")
def _binstring(machine: Machine, at: int) -> int:
    length = int.from_bytes(machine.take(at, 4), "little", signed=True)
    machine.stack.append(_text(machine, machine.take(at + 4, length)))
    return at + 4 + length


@_on(b"U")
def _short_binstring(machine: Machine, at: int) -> int:
    length = machine.data[at]
    machine.stack.append(_text(machine, machine.take(at + 1, length)))
    return at + 1 + length


@_on(b"S")
def _string(machine: Machine, at: int) -> int:
    after = HANDLERS[b"S"[0]](machine, at)
    text = machine.stack.pop()
    machine.stack.append(_text(machine, text if isinstance(text, bytes) else str(text).encode("ascii")))
    return after


def _text(machine: Machine, raw: bytes) -> Value:
    try:
        return raw.decode("utf-8") if isinstance(machine, Recorder) and machine.decodes else Python2Text(raw)
    except UnicodeDecodeError:
        return Python2Text(raw)


@_on(b"\x96")
def _bytearray8(machine: Machine, at: int) -> int:
    length = int.from_bytes(machine.take(at, 8), "little")
    machine.stack.append(ByteArrayNode(machine.take(at + 8, length)))
    return at + 8 + length


@_on(b"\x82", b"\x83", b"\x84")
def _extension(machine: Machine, at: int) -> int:
    raise ValueError("it uses the registry of extensions, whose names are not in the file")


@_on(b"\x97", b"\x98")
def _out_of_band(machine: Machine, at: int) -> int:
    raise ValueError("it has buffers outside of itself")
