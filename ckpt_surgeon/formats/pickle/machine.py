"""An inert pickle machine: it builds records and never imports or calls what a pickle names.

Python's own unpickler looks names up and calls them; that is what makes a checkpoint dangerous and what makes it
unreadable where a class is not installed.  This one knows all opcodes (protocols 0 to 5, see Python's
``pickletools``), but a name only becomes a :class:`Global`, and calling it an :class:`Object` that remembers the
arguments, unless the name is in the table of *constructors* that the caller hands in: our own functions, which
build our own records.  There is no way to switch that off.

Memory and time are bounded by the pickle's own length: each opcode makes at most one object of some 256 bytes,
lengths are checked against the bytes present, the memo is a dict, long runs of bytes stay in the file, and what a
constructor copies is counted.  A pickle of more than OPCODES opcodes (a state_dict of some millions of tensors) is
refused, so that no pickle takes more than 256 bytes for each of its own, and none more than 8 GiB.
"""

from __future__ import annotations

import codecs
import mmap
import re
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import repeat
from typing import ClassVar, TypeAlias

from ...files.paths import FilePath

Value: TypeAlias = object  # anything a pickle can say; every reader checks what it takes

_U16 = struct.Struct("<H").unpack_from
_I32 = struct.Struct("<i").unpack_from
_U32 = struct.Struct("<I").unpack_from
_U64 = struct.Struct("<Q").unpack_from
_F64 = struct.Struct(">d").unpack_from

OPCODES = 1 << 25
LONG = 1 << 12  # the most bytes of Python 2 that pass for text
INLINE = 1 << 12  # bytes from which on a byte string in a mapped file stays where it is
MEMO = 1 << 32  # memo entries have numbers below this
SAID = 200  # characters of an error's text that are passed on
_SIZED = frozenset({str, bytes, list, dict, tuple})
_HASHED = sys.hash_info.modulus - 1  # integers up to here are their own hashes


class PickleError(ValueError):
    """The pickle is damaged: what is wrong, and at which byte."""

    def __init__(self, problem: str, position: int) -> None:
        self.problem = problem
        self.position = position
        super().__init__(f"{problem} at byte {position:,} of the pickle")


@dataclass(frozen=True, slots=True)
class Global:
    """A name in a pickle: ``torch._utils _rebuild_tensor_v2``."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Object:
    """What a call in a pickle would have made: the class or function, its arguments, and what was added later."""

    cls: Value  # a Global, or an Object when the pickle calls what a call returned
    args: tuple[Value, ...] = ()
    kwargs: Mapping[Value, Value] = field(default_factory=dict)
    state: Value = None
    items: list[Value] = field(default_factory=list)
    pairs: list[tuple[Value, Value]] = field(default_factory=list)

    @property
    def class_name(self) -> str:
        return str(self.cls) if isinstance(self.cls, Global) else "object"


class Ordered(dict[Value, Value]):
    """An OrderedDict, with the attributes it was saved with (torch keeps ``_metadata`` there)."""

    attributes: Value = None

    def build(self, state: Value) -> None:
        self.attributes = state


@dataclass(frozen=True, slots=True)
class Inline:
    """A byte string of a pickle that was left in its file."""

    path: FilePath
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


Constructor: TypeAlias = Callable[..., Value]
Handler: TypeAlias = "Callable[[Unpickler, int], int]"  # the position after its opcode -> that of the next one
HANDLERS: dict[int, Handler] = {}


def _on(*opcodes: bytes) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS.update({opcode[0]: handler for opcode in opcodes})
        return handler

    return register


class _Stop(Exception):
    def __init__(self, value: Value, position: int) -> None:
        self.value = value
        self.position = position


class Unpickler:
    """Reads one pickle out of ``data``.

    ``constructors`` maps ``(module, name)`` to the function of ours that builds its record; ``persistent`` is
    called with each persistent id.  After :meth:`load`, ``position`` is the byte after the pickle and
    ``globals`` holds every name it mentioned, in order.

    >>> Unpickler(b"cos\\nsystem\\n(S'echo hi'\\ntR.").load().class_name
    'os.system'
    """

    GLOBAL_LIMIT: ClassVar[int] = 100_000  # distinct names; real checkpoints have dozens
    handlers: ClassVar[Mapping[int, Handler]] = HANDLERS

    def __init__(
        self,
        data: bytes | mmap.mmap,
        *,
        path: FilePath | None = None,
        constructors: Mapping[tuple[str, str], Constructor] | None = None,
        persistent: Callable[[Value], Value] | None = None,
    ) -> None:
        self.data = data
        self.path = path  # of the file that ``data`` is, whole; byte strings can then stay in it
        self.size = len(data)
        self.constructors = constructors or {}
        self.persistent = persistent
        self.globals: dict[tuple[str, str], Global] = {}
        self.position = 0
        self.stack: list[Value] = []
        self.marks: list[list[Value]] = []
        self.memo: dict[int, Value] = {}
        self.sizes = _Sizes()
        self.shortcuts = persistent is not None
        self.skipped = bytearray()  # opcodes that make the memo entries that shortcuts have left out
        self.copies = self.size + (1 << 20)  # items that constructors may still copy

    def load(self, start: int = 0) -> Value:
        """Run the machine from ``start`` to the STOP opcode.  Raises PickleError when it is damaged."""
        self.stack, self.marks, self.memo, self.skipped = [], [], {}, bytearray()
        table: list[Handler] = [_unknown] * 256
        for opcode, handler in self.handlers.items():
            table[opcode] = handler
        data = self.data
        at = position = start
        try:
            for _ in repeat(None, OPCODES):
                at = position
                position = table[data[position]](self, position + 1)
            raise PickleError(f"it has more than {OPCODES:,} opcodes", at)
        except _Stop as stop:
            if not self.memo.keys().isdisjoint(_numbers(self.skipped)):
                self.shortcuts = False
                return self.load(start)
            self.position = stop.position
            return stop.value
        except (IndexError, struct.error):
            if at >= self.size or self._is_cut(at):
                raise PickleError("it is cut off", at) from None
            raise PickleError("its stack or memo runs empty", at) from None
        except KeyError as error:
            if self.shortcuts:
                self.shortcuts = False
                return self.load(start)
            raise PickleError(f"it asks for memo entry {error} that was never made", at) from None
        except RecursionError:
            raise PickleError("it is nested too deeply", at) from None
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise PickleError(str(error)[:SAID], at) from None

    def _is_cut(self, at: int) -> bool:
        return at + 9 >= self.size and self.data[at] != 0x2E

    def take(self, position: int, length: int) -> bytes:
        """The ``length`` bytes at ``position``, which must be there."""
        if length < 0 or position + length > self.size:
            raise ValueError(f"it announces {length:,} bytes where {max(self.size - position, 0):,} are left")
        return bytes(self.data[position : position + length])

    def taken(self, position: int, length: int) -> bytes | Inline:
        """The same, left in the file where they are many."""
        if self.path is None or length < INLINE:
            return self.take(position, length)
        self.take(position + length, 0)
        return Inline(self.path, position, position + length)

    def line(self, position: int) -> tuple[str, int]:
        """The text up to the next newline, and the position after it."""
        end = self.data.find(b"\n", position)
        if end < 0:
            raise ValueError("a line without an end")
        return bytes(self.data[position:end]).decode("utf-8", "surrogateescape"), end + 1

    def name(self, module: Value, name: Value) -> Global:
        """The one record of a global."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a global whose name is no string")
        found = self.globals.get((module, name))
        if found is None:
            if len(self.globals) >= self.GLOBAL_LIMIT:
                raise ValueError(f"it names more than {self.GLOBAL_LIMIT:,} different globals")
            found = self.globals[module, name] = Global(module, name)
        return found

    def call(self, function: Value, args: Value, kwargs: Mapping[Value, Value] | None = None) -> Value:
        """What a call builds: our record for a known constructor, else an inert Object."""
        if not isinstance(args, tuple):
            raise ValueError("a call whose arguments are no tuple")
        if isinstance(function, Global):
            constructor = self.constructors.get((function.module, function.name))
            if constructor is not None and not kwargs:
                if args:
                    self._weigh(args)
                return constructor(*args)
        return Object(function, args, kwargs or {})

    def _weigh(self, args: tuple[Value, ...]) -> None:
        """Count what a constructor may copy: a pickle can hand one long value to it a million times."""
        first = args[0]
        self.copies -= len(args) + (len(first) if type(first) in _SIZED else 0)  # type: ignore[arg-type]
        if self.copies < 0:
            raise ValueError("it builds the same long values again and again")

    def pop_mark(self) -> list[Value]:
        items = self.stack
        self.stack = self.marks.pop()
        return items


def _unknown(machine: Unpickler, at: int) -> int:
    raise ValueError(f"byte 0x{machine.data[at - 1]:02x} is no pickle opcode")


def hashable(key: Value) -> Value:
    """The key itself when it can safely be one, else a stand-in that keeps it apart from all others.

    Deep tuples are hashed by a recursion in C that a hostile pickle could overflow, and integers can be chosen so
    that all have one hash, hence the narrow rules.
    """
    if isinstance(key, (str, bytes, float, bool, type(None), Global)):
        return key
    if isinstance(key, int) and abs(key) <= _HASHED:
        return key
    if type(key).__hash__ is object.__hash__:  # a record of ours, hashed by its identity
        return key
    if isinstance(key, tuple) and len(key) <= 8 and all(type(item) is str for item in key):
        return key
    return Object(Global("builtins", type(key).__name__), (key,))


def spelled(value: Value) -> str:
    """A key, a name or a number as text, short for anything else: tuples in tuples have no end.

    >>> spelled("fc.bias"), spelled(3), spelled(("a", 1)), spelled([])
    ('fc.bias', '3', "('a', 1)", '<list>')
    """
    if type(value) is str:
        return value
    if isinstance(value, bytes):
        return python2_name(value)
    if isinstance(value, int) and value.bit_length() >= 256:
        return f"<int of {value.bit_length():,} bits>"
    if isinstance(value, (int, float, complex, type(None), Global)):
        return str(value)
    if isinstance(value, Object) and len(value.args) == 1 and value.class_name in _STAND_INS:
        return spelled(value.args[0])
    if isinstance(value, tuple) and len(value) <= 8 and _PLAIN.issuperset(map(type, value)):
        return f"({', '.join(repr(one) if type(one) is str else spelled(one) for one in value)})"
    return f"<{value.class_name if isinstance(value, Object) else type(value).__name__}>"


_PLAIN = frozenset({str, int, float, bool, type(None)})
_STAND_INS = frozenset({"builtins.tuple", "builtins.int"})  # what hashable() makes of keys


def python2_name(raw: bytes) -> str:
    """A key that Python 2 wrote as bytes: UTF-8 if it is, else Latin-1."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def set_pairs(target: Value, items: list[Value]) -> None:
    """SETITEMS: key, value, key, value …"""
    if isinstance(target, dict):
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[key if type(key) is str else hashable(key)] = value
    elif isinstance(target, Object):
        target.pairs.extend(zip(items[::2], items[1::2], strict=True))
    else:
        raise ValueError(f"items are set on a {type(target).__name__}")


def add_items(target: Value, items: list[Value]) -> None:
    """APPENDS and ADDITEMS."""
    if isinstance(target, list):
        target.extend(items)
    elif isinstance(target, Object):
        target.items.extend(items)
    else:
        raise ValueError(f"items are appended to a {type(target).__name__}")


# -- The opcodes, in the order of their frequency in torch's checkpoints.  Each takes the position after its
# opcode and returns the position of the next one.


@_on(b"q")
def _binput(machine: Unpickler, at: int) -> int:
    machine.memo[machine.data[at]] = machine.stack[-1]
    return at + 1


@_on(b"r")
def _long_binput(machine: Unpickler, at: int) -> int:
    machine.memo[_U32(machine.data, at)[0]] = machine.stack[-1]
    return at + 4


@_on(b"\x94")
def _memoize(machine: Unpickler, at: int) -> int:
    if machine.skipped:
        raise KeyError(at)  # the number of entries is not known
    machine.memo[len(machine.memo)] = machine.stack[-1]
    return at


@_on(b"h")
def _binget(machine: Unpickler, at: int) -> int:
    machine.stack.append(machine.memo[machine.data[at]])
    return at + 1


@_on(b"j")
def _long_binget(machine: Unpickler, at: int) -> int:
    machine.stack.append(machine.memo[_U32(machine.data, at)[0]])
    return at + 4


@_on(b"K")
def _binint1(machine: Unpickler, at: int) -> int:
    machine.stack.append(machine.data[at])
    return at + 1


@_on(b"M")
def _binint2(machine: Unpickler, at: int) -> int:
    machine.stack.append(_U16(machine.data, at)[0])
    return at + 2


@_on(b"J")
def _binint(machine: Unpickler, at: int) -> int:
    machine.stack.append(_I32(machine.data, at)[0])
    return at + 4


# What torch.save writes for a tensor, from its second MARK to its REDUCE.  A checkpoint is little else, so taking
# the whole run in one step halves the time for large ones.  Anything that deviates goes opcode by opcode; so does
# the whole pickle, once it asks for one of the memo entries that are left out here (a shape, an argument tuple).
_GET, _PUT, _INT = rb"(h.|j....)", rb"(q.|r....)?", rb"K.|M..|J...."
_SIZES = rb"(\)|(?:%(i)s)\x85|(?:%(i)s){2}\x86|(?:%(i)s){3}\x87|\((?:%(i)s)+t)" % {b"i": _INT}
_TENSOR = re.compile(
    rb"\(" + _GET + _GET + rb"X(.)\0\0\0([0-9]{1,19})(q.|r....)?" + _GET + b"(%s)t" % _INT + _PUT
    + b"Q(%s)" % _INT + _SIZES + _PUT + _SIZES + _PUT + rb"\x89h.\)R" + _PUT + b"t" + _PUT + b"R",
    re.DOTALL,
)  # fmt: skip


def _integers(opcodes: bytes) -> tuple[int, ...]:
    """The integers that a run of BININT1, BININT2 and BININT pushes."""
    values = []
    at = 0
    while at < len(opcodes):
        kind = opcodes[at]
        if kind == 0x4B:
            values.append(opcodes[at + 1])
            at += 2
        elif kind == 0x4D:
            values.append(_U16(opcodes, at + 1)[0])
            at += 3
        elif kind == 0x4A:
            values.append(_I32(opcodes, at + 1)[0])
            at += 5
        else:  # the tuple's own opcodes
            at += 1
    return tuple(values)


class _Sizes(dict[bytes, tuple[int, ...]]):
    """Integers by the opcodes that push them; shapes, strides and sizes repeat."""

    def __missing__(self, opcodes: bytes) -> tuple[int, ...]:
        made = self[opcodes] = _integers(opcodes)
        return made


def _whole_tensor(machine: Unpickler, found: re.Match[bytes]) -> int:
    """Run the opcodes of :data:`_TENSOR` in one step."""
    (word, cls, _length, key, put_key, location, numel, put_saved, offset, shape, put_shape, stride, put_stride,
     put_hooks, put_args) = found.groups()  # fmt: skip
    memo, sizes, name = machine.memo, machine.sizes, key.decode()
    if put_key:
        memo[int.from_bytes(put_key[1:], "little")] = name
    saved = (_fetched(memo, word), _fetched(memo, cls), name, _fetched(memo, location), sizes[numel][0])
    typed = machine.persistent(saved) if machine.persistent else None
    args = (typed, sizes[offset][0], sizes[shape], sizes[stride], False, None)
    machine.stack[-1] = machine.call(machine.stack[-1], args)
    for put in (put_saved, put_shape, put_stride, put_hooks, put_args):
        if put:
            machine.skipped += put
    return found.end()


def _numbers(puts: bytearray) -> Iterator[int]:
    """The memo entries that BINPUT and LONG_BINPUT opcodes make."""
    return (int.from_bytes(put[1:], "little") for put in _PUTS.findall(puts))


_PUTS = re.compile(rb"q.|r....", re.DOTALL)


def _fetched(memo: dict[int, Value], get: bytes) -> Value:
    return memo[get[1] if len(get) == 2 else int.from_bytes(get[1:], "little")]


@_on(b"(")
def _mark(machine: Unpickler, at: int) -> int:
    if machine.shortcuts and machine.data[at] == 0x28:
        found = _TENSOR.match(machine.data, at)
        if found is not None and found[3][0] == len(found[4]):
            return _whole_tensor(machine, found)
    machine.marks.append(machine.stack)
    machine.stack = []
    return at


@_on(b"t")
def _tuple(machine: Unpickler, at: int) -> int:
    items = machine.stack
    machine.stack = machine.marks.pop()
    machine.stack.append(tuple(items))
    return at


@_on(b"X")
def _binunicode(machine: Unpickler, at: int) -> int:
    start = at + 4
    end: int = start + _U32(machine.data, at)[0]
    if end > machine.size:
        machine.take(start, end - start)
    machine.stack.append(str(machine.data[start:end], "utf-8", "surrogatepass"))
    return end


@_on(b"\x8c")
def _short_binunicode(machine: Unpickler, at: int) -> int:
    end = at + 1 + machine.data[at]
    machine.stack.append(str(machine.take(at + 1, end - at - 1), "utf-8", "surrogatepass"))
    return end


@_on(b"R")
def _reduce(machine: Unpickler, at: int) -> int:
    args = machine.stack.pop()
    machine.stack[-1] = machine.call(machine.stack[-1], args)
    return at


@_on(b")")
def _empty_tuple(machine: Unpickler, at: int) -> int:
    machine.stack.append(())
    return at


@_on(b"\x85", b"\x86", b"\x87")
def _short_tuple(machine: Unpickler, at: int) -> int:
    count = machine.data[at - 1] - 0x84
    stack = machine.stack
    if len(stack) < count:
        raise IndexError
    stack[-count:] = [tuple(stack[-count:])]
    return at


@_on(b"Q")
def _binpersid(machine: Unpickler, at: int) -> int:
    if machine.persistent is None:
        raise ValueError("it refers to storages, but no container holds any")
    machine.stack[-1] = machine.persistent(machine.stack[-1])
    return at


@_on(b"P")
def _persid(machine: Unpickler, at: int) -> int:
    text, after = machine.line(at)
    machine.stack.append(text)
    _binpersid(machine, after)
    return after


@_on(b"\x89")
def _newfalse(machine: Unpickler, at: int) -> int:
    machine.stack.append(False)
    return at


@_on(b"\x88")
def _newtrue(machine: Unpickler, at: int) -> int:
    machine.stack.append(True)
    return at


@_on(b"N")
def _none(machine: Unpickler, at: int) -> int:
    machine.stack.append(None)
    return at


@_on(b"s")
def _setitem(machine: Unpickler, at: int) -> int:
    value, key = machine.stack.pop(), machine.stack.pop()
    set_pairs(machine.stack[-1], [key, value])
    return at


@_on(b"u")
def _setitems(machine: Unpickler, at: int) -> int:
    items = machine.pop_mark()
    set_pairs(machine.stack[-1], items)
    return at


@_on(b"a")
def _append(machine: Unpickler, at: int) -> int:
    value = machine.stack.pop()
    add_items(machine.stack[-1], [value])
    return at


@_on(b"e", b"\x90")
def _appends(machine: Unpickler, at: int) -> int:
    items = machine.pop_mark()
    target = machine.stack[-1]
    if isinstance(target, set):
        target.update(hashable(item) for item in items)
    else:
        add_items(target, items)
    return at


@_on(b"}")
def _empty_dict(machine: Unpickler, at: int) -> int:
    machine.stack.append({})
    return at


@_on(b"]")
def _empty_list(machine: Unpickler, at: int) -> int:
    machine.stack.append([])
    return at


@_on(b"\x8f")
def _empty_set(machine: Unpickler, at: int) -> int:
    machine.stack.append(set())
    return at


@_on(b"\x91")
def _frozenset(machine: Unpickler, at: int) -> int:
    items = machine.pop_mark()
    machine.stack.append(frozenset(hashable(item) for item in items))
    return at


@_on(b"l")
def _list(machine: Unpickler, at: int) -> int:
    items = machine.pop_mark()
    machine.stack.append(items)
    return at


@_on(b"d")
def _dict(machine: Unpickler, at: int) -> int:
    items = machine.pop_mark()
    made: dict[Value, Value] = {}
    set_pairs(made, items)
    machine.stack.append(made)
    return at


@_on(b"c")
def _global(machine: Unpickler, at: int) -> int:
    module, at = machine.line(at)
    name, at = machine.line(at)
    machine.stack.append(machine.name(module, name))
    return at


@_on(b"\x93")
def _stack_global(machine: Unpickler, at: int) -> int:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(machine.name(module, name))
    return at


@_on(b"i")
def _inst(machine: Unpickler, at: int) -> int:
    module, at = machine.line(at)
    name, at = machine.line(at)
    args = tuple(machine.pop_mark())
    machine.stack.append(machine.call(machine.name(module, name), args))
    return at


@_on(b"o")
def _obj(machine: Unpickler, at: int) -> int:
    cls, *args = machine.pop_mark() or [None]
    machine.stack.append(machine.call(cls, tuple(args)))
    return at


@_on(b"\x81")
def _newobj(machine: Unpickler, at: int) -> int:
    return _reduce(machine, at)


@_on(b"\x92")
def _newobj_ex(machine: Unpickler, at: int) -> int:
    kwargs, args = machine.stack.pop(), machine.stack.pop()
    if not isinstance(kwargs, dict):
        raise ValueError("a call whose keyword arguments are no dict")
    machine.stack[-1] = machine.call(machine.stack[-1], args, kwargs)
    return at


@_on(b"b")
def _build(machine: Unpickler, at: int) -> int:
    state = machine.stack.pop()
    target = machine.stack[-1]
    build = getattr(target, "build", None)
    if build is not None:
        build(state)
    elif isinstance(target, Object):
        target.state = state
    return at


@_on(b"\x80")
def _proto(machine: Unpickler, at: int) -> int:
    if machine.data[at] > 5:
        raise ValueError(f"pickle protocol {machine.data[at]} is not known")
    return at + 1


@_on(b"\x95")
def _frame(machine: Unpickler, at: int) -> int:
    length: int = _U64(machine.data, at)[0]
    if at + 8 + length > machine.size:
        machine.take(at + 8, length)
    return at + 8


@_on(b".")
def _stop(machine: Unpickler, at: int) -> int:
    raise _Stop(machine.stack.pop(), at)


@_on(b"0")
def _pop(machine: Unpickler, at: int) -> int:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.pop_mark()
    return at


@_on(b"1")
def _pop_mark(machine: Unpickler, at: int) -> int:
    machine.pop_mark()
    return at


@_on(b"2")
def _dup(machine: Unpickler, at: int) -> int:
    machine.stack.append(machine.stack[-1])
    return at


@_on(b"g")
def _get(machine: Unpickler, at: int) -> int:
    text, at = machine.line(at)
    machine.stack.append(machine.memo[int(text)])
    return at


@_on(b"p")
def _put(machine: Unpickler, at: int) -> int:
    text, at = machine.line(at)
    index = int(text)
    if not 0 <= index < MEMO:  # larger ones can be chosen so that all have one hash
        raise ValueError("a memo entry without a proper number")
    machine.memo[index] = machine.stack[-1]
    return at


@_on(b"I")
def _int(machine: Unpickler, at: int) -> int:
    text, at = machine.line(at)
    machine.stack.append({"00": False, "01": True}.get(text) if text in ("00", "01") else int(text, 0))
    return at


@_on(b"L")
def _long(machine: Unpickler, at: int) -> int:
    text, at = machine.line(at)
    machine.stack.append(int(text.rstrip("L"), 0))
    return at


@_on(b"\x8a")
def _long1(machine: Unpickler, at: int) -> int:
    length = machine.data[at]
    machine.stack.append(int.from_bytes(machine.take(at + 1, length), "little", signed=True))
    return at + 1 + length


@_on(b"\x8b")
def _long4(machine: Unpickler, at: int) -> int:
    length: int = _I32(machine.data, at)[0]
    machine.stack.append(int.from_bytes(machine.take(at + 4, length), "little", signed=True))
    return at + 4 + length


@_on(b"F")
def _float(machine: Unpickler, at: int) -> int:
    text, at = machine.line(at)
    machine.stack.append(float(text))
    return at


@_on(b"G")
def _binfloat(machine: Unpickler, at: int) -> int:
    machine.stack.append(_F64(machine.data, at)[0])
    return at + 8


@_on(b"V")
def _unicode(machine: Unpickler, at: int) -> int:
    end = machine.data.find(b"\n", at)
    if end < 0:
        raise ValueError("a line without an end")
    machine.stack.append(bytes(machine.data[at:end]).decode("raw-unicode-escape"))
    return end + 1


@_on(b"\x8d")
def _binunicode8(machine: Unpickler, at: int) -> int:
    length: int = _U64(machine.data, at)[0]
    machine.stack.append(str(machine.take(at + 8, length), "utf-8", "surrogatepass"))
    return at + 8 + length


# Backslashes that begin no escape (\d), or one of more than a byte (\400): Python keeps them, with a warning.
_ODD_ESCAPE = re.compile(rb"(?<!\\)((?:\\\\)*)\\([^\n\\'\"abfnrtvx0-7]|[4-7][0-7]{2})")


def python2_text(raw: bytes) -> Value:
    """A ``str`` of Python 2 may be text or bytes: short ASCII is text, anything else stays bytes."""
    return raw.decode("ascii") if len(raw) <= LONG and raw.isascii() else raw


@_on(b"S")
def _string(machine: Unpickler, at: int) -> int:
    text, at = machine.line(at)
    text = text.strip()
    if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"":
        raise ValueError("a string without its quotes")
    raw = _ODD_ESCAPE.sub(rb"\1\\\\\2", text[1:-1].encode("utf-8", "surrogateescape"))
    machine.stack.append(python2_text(codecs.escape_decode(raw)[0]))
    return at


@_on(b"T")
def _binstring(machine: Unpickler, at: int) -> int:
    length: int = _I32(machine.data, at)[0]
    raw = machine.taken(at + 4, length)
    machine.stack.append(raw if isinstance(raw, Inline) else python2_text(raw))
    return at + 4 + length


@_on(b"U")
def _short_binstring(machine: Unpickler, at: int) -> int:
    length = machine.data[at]
    machine.stack.append(python2_text(machine.take(at + 1, length)))
    return at + 1 + length


@_on(b"C")
def _short_binbytes(machine: Unpickler, at: int) -> int:
    length = machine.data[at]
    machine.stack.append(machine.take(at + 1, length))
    return at + 1 + length


@_on(b"B")
def _binbytes(machine: Unpickler, at: int) -> int:
    length: int = _U32(machine.data, at)[0]
    machine.stack.append(machine.taken(at + 4, length))
    return at + 4 + length


@_on(b"\x8e", b"\x96")
def _binbytes8(machine: Unpickler, at: int) -> int:
    length: int = _U64(machine.data, at)[0]
    machine.stack.append(machine.taken(at + 8, length))
    return at + 8 + length


@_on(b"\x82", b"\x83", b"\x84")
def _ext(machine: Unpickler, at: int) -> int:
    width = {0x82: 1, 0x83: 2, 0x84: 4}[machine.data[at - 1]]
    code = int.from_bytes(machine.take(at, width), "little")
    machine.stack.append(machine.name("copyreg", f"extension_{code}"))
    return at + width
