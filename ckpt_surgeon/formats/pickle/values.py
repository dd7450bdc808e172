"""What pickles are read as: names, inert objects, dicts, byte strings that stay in their file, and keys as text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from ...files.paths import FilePath

Value: TypeAlias = object  # anything a pickle can hold; every reader checks what it takes
Constructor: TypeAlias = Callable[..., Value]

_HASHED = sys.hash_info.modulus - 1  # integers up to here are their own hashes


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
        """BUILD: attributes are added, as Python adds them to an object's dict."""
        if not isinstance(state, dict):
            raise ValueError("an OrderedDict whose attributes are no dict")
        self.attributes = {**self.attributes, **state} if isinstance(self.attributes, dict) else dict(state)


@dataclass(frozen=True, slots=True)
class Class:
    """A constructor that is a class: what a call builds, and what NEWOBJ, which calls its ``__new__`` only, builds."""

    call: Constructor
    new: Constructor

    def __call__(self, *args: Value) -> Value:
        return self.call(*args)


@dataclass(frozen=True, slots=True)
class Inline:
    """A byte string of a pickle that was left in its file."""

    path: FilePath
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Pickled(Inline):
    """An entry of a distributed checkpoint that is no tensor: a pickle of its own in one of the files."""


def hashable(key: Value) -> Value:
    """The key itself when it can safely be one, else a stand-in that keeps it apart from all others.

    Deep tuples are hashed by a recursion in C that a hostile pickle could overflow, and integers can be chosen so
    that all have one hash, hence the narrow rules.  Raises ValueError for what Python cannot hash either.
    """
    if isinstance(key, (list, dict, set)):
        raise ValueError(f"a {type(key).__name__} as a key, which Python cannot hash")
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
        return f"({', '.join(repr(item) if type(item) is str else spelled(item) for item in value)})"
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
