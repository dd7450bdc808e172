"""The opcodes that make and fill tuples, lists, dicts and sets."""

from __future__ import annotations

from .machine import Handlers, Machine, handling
from .values import Value, add_items, hashable, set_pairs

HANDLERS: Handlers = {}
_on = handling(HANDLERS)


@_on(b")")
def _empty_tuple(machine: Machine, at: int) -> int:
    machine.stack.append(())
    return at


@_on(b"\x85", b"\x86", b"\x87")
def _short_tuple(machine: Machine, at: int) -> int:
    count = machine.data[at - 1] - 0x84
    stack = machine.stack
    if len(stack) < count:
        raise IndexError
    stack[-count:] = [tuple(stack[-count:])]
    return at


@_on(b"t")
def _tuple(machine: Machine, at: int) -> int:
    items = machine.stack
    machine.stack = machine.marks.pop()
    machine.stack.append(tuple(items))
    return at


@_on(b"]")
def _empty_list(machine: Machine, at: int) -> int:
    machine.stack.append([])
    return at


@_on(b"l")
def _list(machine: Machine, at: int) -> int:
    items = machine.pop_mark()
    machine.stack.append(items)
    return at


@_on(b"a")
def _append(machine: Machine, at: int) -> int:
    value = machine.stack.pop()
    add_items(machine.stack[-1], [value])
    return at


@_on(b"e", b"\x90")
def _appends(machine: Machine, at: int) -> int:
    items = machine.pop_mark()
    target = machine.stack[-1]
    if isinstance(target, set):
        target.update(hashable(item) for item in items)
    else:
        add_items(target, items)
    return at


@_on(b"}")
def _empty_dict(machine: Machine, at: int) -> int:
    machine.stack.append({})
    return at


@_on(b"d")
def _dict(machine: Machine, at: int) -> int:
    items = machine.pop_mark()
    made: dict[Value, Value] = {}
    set_pairs(made, items)
    machine.stack.append(made)
    return at


@_on(b"s")
def _setitem(machine: Machine, at: int) -> int:
    value, key = machine.stack.pop(), machine.stack.pop()
    set_pairs(machine.stack[-1], [key, value])
    return at


@_on(b"u")
def _setitems(machine: Machine, at: int) -> int:
    items = machine.pop_mark()
    set_pairs(machine.stack[-1], items)
    return at


@_on(b"\x8f")
def _empty_set(machine: Machine, at: int) -> int:
    machine.stack.append(set())
    return at


@_on(b"\x91")
def _frozenset(machine: Machine, at: int) -> int:
    items = machine.pop_mark()
    machine.stack.append(frozenset(hashable(item) for item in items))
    return at
