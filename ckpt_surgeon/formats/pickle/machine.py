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

import mmap
import re
import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterator, Mapping
from itertools import repeat
from typing import ClassVar, NamedTuple, TypeAlias

from ...files.paths import FilePath
from .values import Class, Constructor
from .values import Global as Global
from .values import Inline as Inline
from .values import Object as Object
from .values import Ordered as Ordered
from .values import Value as Value
from .values import spelled as spelled

OPCODES = 1 << 25
LONG = 1 << 12  # the most bytes of Python 2 that pass for text
INLINE = 1 << 12  # bytes from which on a byte string in a mapped file stays where it is
MEMO = 1 << 32  # memo entries have numbers below this
SHOWN = 200  # characters of an error's text that are shown
_SIZED = frozenset({str, bytes, list, dict, tuple})

# What loads the bytes that it is given as one more file or pickle, by Python's own, full unpickler.
LOADERS = frozenset({
    ("torch.storage", "_load_from_bytes"), ("torch", "load"), ("torch.serialization", "load"),
    *((module, name) for module in ("pickle", "_pickle", "cPickle", "dill", "dill._dill", "cloudpickle",
                                    "cloudpickle.cloudpickle", "joblib", "marshal")
      for name in ("load", "loads")),
})  # fmt: skip
_REBUILD_FROM_TYPE = frozenset({("torch._tensor", "_rebuild_from_type"), ("torch._tensor", "_rebuild_from_type_v2")})
_CALLS = 16  # how many calls that only call another one may stand in each other


class PickleError(ValueError):
    """The pickle is damaged: what is wrong, and at which byte."""

    def __init__(self, problem: str, position: int) -> None:
        self.problem = problem
        self.position = position
        super().__init__(f"{problem} at byte {position:,} of the pickle")


class Load(NamedTuple):
    """A call that a full unpickler would make and that would load bytes again: what is called, with what."""

    loader: Global
    args: tuple[Value, ...]


class Unpickled(NamedTuple):
    """What a pickle holds, the names that it mentions, and the calls in it that would load bytes again."""

    root: Value
    globals: tuple[Global, ...]
    loads: tuple[Load, ...]


Handler: TypeAlias = "Callable[[Machine, int], int]"  # the position after its opcode -> that of the next one
Handlers: TypeAlias = dict[int, Handler]


def handling(handlers: Handlers) -> Callable[..., Callable[[Handler], Handler]]:
    """A decorator that puts a function into a table under the opcodes that it handles."""

    def on(*opcodes: bytes) -> Callable[[Handler], Handler]:
        def register(handler: Handler) -> Handler:
            handlers.update({opcode[0]: handler for opcode in opcodes})
            return handler

        return register

    return on


class Stop(Exception):
    """The STOP opcode: the value on top, and the position after it."""

    def __init__(self, value: Value, position: int) -> None:
        self.value = value
        self.position = position


class Machine:
    """Stack, marks and memo of one pickle in ``data``, and the loop over its opcodes.

    ``constructors`` maps ``(module, name)`` to the function of ours that builds its record; ``persistent`` is
    called with each persistent id.  After :meth:`load`, ``position`` is the byte after the pickle, ``globals`` holds
    every name that it mentioned, in order, and ``loads`` the calls that would load bytes again.
    """

    GLOBAL_LIMIT: ClassVar[int] = 100_000  # distinct names; real checkpoints have dozens
    handlers: ClassVar[Mapping[int, Handler]] = {}
    sizes_by_opcodes: ClassVar[type[dict[bytes, tuple[int, ...]]]] = dict  # integers by the opcodes that push them

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
        self.sizes = self.sizes_by_opcodes()
        self.loads: list[Load] = []
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
        except Stop as stop:
            if not self.memo.keys().isdisjoint(entry_numbers(self.skipped)):
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
            raise PickleError(str(error)[:SHOWN], at) from None

    def _is_cut(self, at: int) -> bool:
        return at + 9 >= self.size and self.data[at] != 0x2E

    def unpickled(self, start: int = 0) -> Unpickled:
        """Run the machine; what it made, with the names and calls that it met, those of earlier runs included."""
        root = self.load(start)
        return Unpickled(root, tuple(self.globals.values()), tuple(self.loads))

    def take(self, position: int, length: int) -> bytes:
        """The ``length`` bytes at ``position``, which must be there."""
        if length < 0 or position + length > self.size:
            raise ValueError(f"it announces {length:,} bytes where {max(self.size - position, 0):,} are left")
        return bytes(self.data[position : position + length])

    def take_or_leave(self, position: int, length: int) -> bytes | Inline:
        """The ``length`` bytes at ``position``, or, where they are many, their place in the file."""
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
            constructor = self._constructor(function)
            self._note_load(function, args)
            if constructor is not None and not kwargs:
                if args:
                    self._weigh(args)
                return constructor(*args)
        return Object(function, args, kwargs or {})

    def new(self, cls: Value, args: Value, kwargs: Mapping[Value, Value] | None = None) -> Value:
        """What ``cls.__new__(cls, *args)`` builds, which does not call ``__init__``: a new OrderedDict is empty."""
        constructor = self._constructor(cls) if isinstance(cls, Global) else None
        if constructor is None or kwargs:
            return self.call(cls, args, kwargs)
        if not isinstance(args, tuple):
            raise ValueError("a new object whose arguments are no tuple")
        if isinstance(constructor, Class):
            self._weigh(args)
            return constructor.new(*args)
        if isinstance(constructor, type):
            return constructor(*args)
        raise ValueError(f"a new object of {cls}, which is a function")

    def _constructor(self, function: Global) -> Constructor | None:
        """Our constructor for a name, or for the name that Python 3 has for one of Python 2's."""
        found = self.constructors.get((function.module, function.name))
        if found is not None or function.module not in _OLD_MODULES:
            return found
        name = (function.module, function.name)
        return self.constructors.get(NAME_MAPPING.get(name, (IMPORT_MAPPING.get(name[0], name[0]), name[1])))

    def _note_load(self, function: Global, args: tuple[Value, ...]) -> None:
        """Note a call that would load bytes again, also where another call would make it."""
        for _ in range(_CALLS):
            name = (function.module, function.name)
            if name in LOADERS:
                self.loads.append(Load(function, args))
            if name not in _REBUILD_FROM_TYPE or len(args) < 3:
                return
            inner, inner_args = args[0], args[2]
            if not isinstance(inner, Global) or not isinstance(inner_args, tuple):
                return
            function, args = inner, inner_args
        raise ValueError(f"more than {_CALLS} calls in each other")

    def _weigh(self, args: tuple[Value, ...]) -> None:
        """Count what a constructor may copy: a pickle can hand one long value to it a million times."""
        if args:
            first = args[0]
            self.spend(len(args) + (len(first) if type(first) in _SIZED else 0))  # type: ignore[arg-type]

    def spend(self, count: int) -> None:
        """Count items that are copied.  Raises ValueError when they are more than the pickle can have by itself."""
        self.copies -= count
        if self.copies < 0:
            raise ValueError("it builds the same long values again and again")

    def pop_mark(self) -> list[Value]:
        items = self.stack
        self.stack = self.marks.pop()
        return items


def _unknown(machine: Machine, at: int) -> int:
    raise ValueError(f"byte 0x{machine.data[at - 1]:02x} is no pickle opcode")


_OLD_MODULES = frozenset(IMPORT_MAPPING) | {module for module, _ in NAME_MAPPING}
_PUTS = re.compile(rb"q.|r....", re.DOTALL)


def entry_numbers(puts: bytearray) -> Iterator[int]:
    """The memo entries that BINPUT and LONG_BINPUT opcodes make."""
    return (int.from_bytes(put[1:], "little") for put in _PUTS.findall(puts))
