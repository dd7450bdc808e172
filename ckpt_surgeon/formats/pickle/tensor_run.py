"""torch.save's run of opcodes for one tensor, taken in one step."""

from __future__ import annotations

import re
import struct

from .machine import Handlers, Machine, handling
from .values import Value

HANDLERS: Handlers = {}
_on = handling(HANDLERS)

_U16 = struct.Struct("<H").unpack_from
_I32 = struct.Struct("<i").unpack_from

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


class Sizes(dict[bytes, tuple[int, ...]]):
    """Integers by the opcodes that push them; shapes, strides and sizes repeat."""

    def __missing__(self, opcodes: bytes) -> tuple[int, ...]:
        made = self[opcodes] = _integers(opcodes)
        return made


def _whole_tensor(machine: Machine, found: re.Match[bytes]) -> int:
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


def _fetched(memo: dict[int, Value], get: bytes) -> Value:
    return memo[get[1] if len(get) == 2 else int.from_bytes(get[1:], "little")]


@_on(b"(")
def _mark(machine: Machine, at: int) -> int:
    if machine.shortcuts and machine.data[at] == 0x28:
        found = _TENSOR.match(machine.data, at)
        if found is not None and found[3][0] == len(found[4]):
            return _whole_tensor(machine, found)
    machine.marks.append(machine.stack)
    machine.stack = []
    return at
