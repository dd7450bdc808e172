"""The opcodes that name, call and build what only this package's constructors make."""

from __future__ import annotations

from .machine import Handlers, Machine, handling
from .values import Object

HANDLERS: Handlers = {}
_on = handling(HANDLERS)


@_on(b"c")
def _global(machine: Machine, at: int) -> int:
    module, at = machine.line(at)
    name, at = machine.line(at)
    machine.stack.append(machine.name(module, name))
    return at


@_on(b"\x93")
def _stack_global(machine: Machine, at: int) -> int:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(machine.name(module, name))
    return at


@_on(b"\x82", b"\x83", b"\x84")
def _ext(machine: Machine, at: int) -> int:
    width = {0x82: 1, 0x83: 2, 0x84: 4}[machine.data[at - 1]]
    code = int.from_bytes(machine.take(at, width), "little")
    machine.stack.append(machine.name("copyreg", f"extension_{code}"))
    return at + width


@_on(b"R")
def _reduce(machine: Machine, at: int) -> int:
    args = machine.stack.pop()
    machine.stack[-1] = machine.call(machine.stack[-1], args)
    return at


@_on(b"\x81")
def _newobj(machine: Machine, at: int) -> int:
    args = machine.stack.pop()
    machine.stack[-1] = machine.new(machine.stack[-1], args)
    return at


@_on(b"\x92")
def _newobj_ex(machine: Machine, at: int) -> int:
    kwargs, args = machine.stack.pop(), machine.stack.pop()
    if not isinstance(kwargs, dict):
        raise ValueError("a call whose keyword arguments are no dict")
    machine.stack[-1] = machine.new(machine.stack[-1], args, kwargs)
    return at


@_on(b"i")
def _inst(machine: Machine, at: int) -> int:
    module, at = machine.line(at)
    name, at = machine.line(at)
    args = tuple(machine.pop_mark())
    machine.stack.append(machine.call(machine.name(module, name), args))
    return at


@_on(b"o")
def _obj(machine: Machine, at: int) -> int:
    cls, *args = machine.pop_mark() or [None]
    machine.stack.append(machine.call(cls, tuple(args)))
    return at


@_on(b"b")
def _build(machine: Machine, at: int) -> int:
    state = machine.stack.pop()
    target = machine.stack[-1]
    build = getattr(target, "build", None)
    if build is not None:
        if isinstance(state, dict):
            machine.spend(len(state))
        build(state)
    elif isinstance(target, Object):
        if isinstance(state, dict) and isinstance(target.state, dict):
            machine.spend(len(state) + len(target.state))
            state = {**target.state, **state}
        target.state = state
    else:  # torch sets another storage on a finished tensor; on anything else that is no object, Python raises
        raise ValueError(f"state is set on a {type(target).__name__}")
    return at


@_on(b"Q")
def _binpersid(machine: Machine, at: int) -> int:
    if machine.persistent is None:
        raise ValueError("it refers to storages, but no container holds any")
    machine.stack[-1] = machine.persistent(machine.stack[-1])
    return at


@_on(b"P")
def _persid(machine: Machine, at: int) -> int:
    text, after = machine.line(at)
    machine.stack.append(text)
    _binpersid(machine, after)
    return after
