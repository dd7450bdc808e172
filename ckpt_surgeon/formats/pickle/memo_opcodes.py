"""The opcodes that move what is on the stack: memo, marks, frames, the end."""

from __future__ import annotations

import struct

from .machine import MEMO, Handlers, Machine, Stop, handling

HANDLERS: Handlers = {}
_on = handling(HANDLERS)

_U32 = struct.Struct("<I").unpack_from
_U64 = struct.Struct("<Q").unpack_from


@_on(b"q")
def _binput(machine: Machine, at: int) -> int:
    machine.memo[machine.data[at]] = machine.stack[-1]
    return at + 1


@_on(b"r")
def _long_binput(machine: Machine, at: int) -> int:
    machine.memo[_U32(machine.data, at)[0]] = machine.stack[-1]
    return at + 4


@_on(b"\x94")
def _memoize(machine: Machine, at: int) -> int:
    if machine.skipped:
        raise KeyError(at)  # the number of entries is not known
    machine.memo[len(machine.memo)] = machine.stack[-1]
    return at


@_on(b"h")
def _binget(machine: Machine, at: int) -> int:
    machine.stack.append(machine.memo[machine.data[at]])
    return at + 1


@_on(b"j")
def _long_binget(machine: Machine, at: int) -> int:
    machine.stack.append(machine.memo[_U32(machine.data, at)[0]])
    return at + 4


@_on(b"g")
def _get(machine: Machine, at: int) -> int:
    text, at = machine.line(at)
    machine.stack.append(machine.memo[int(text)])
    return at


@_on(b"p")
def _put(machine: Machine, at: int) -> int:
    text, at = machine.line(at)
    index = int(text)
    if not 0 <= index < MEMO:  # larger ones can be chosen so that all have one hash
        raise ValueError("a memo entry without a proper number")
    machine.memo[index] = machine.stack[-1]
    return at


@_on(b"0")
def _pop(machine: Machine, at: int) -> int:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.pop_mark()
    return at


@_on(b"1")
def _pop_mark(machine: Machine, at: int) -> int:
    machine.pop_mark()
    return at


@_on(b"2")
def _dup(machine: Machine, at: int) -> int:
    machine.stack.append(machine.stack[-1])
    return at


@_on(b"\x80")
def _proto(machine: Machine, at: int) -> int:
    if machine.data[at] > 5:
        raise ValueError(f"pickle protocol {machine.data[at]} is not known")
    return at + 1


@_on(b"\x95")
def _frame(machine: Machine, at: int) -> int:
    length: int = _U64(machine.data, at)[0]
    if at + 8 + length > machine.size:
        machine.take(at + 8, length)
    return at + 8


@_on(b".")
def _stop(machine: Machine, at: int) -> int:
    raise Stop(machine.stack.pop(), at)
