"""The opcodes that push one plain value: numbers, text, bytes."""

from __future__ import annotations

import codecs
import re
import struct

from .machine import LONG, Handlers, Machine, handling
from .values import Inline, Value

HANDLERS: Handlers = {}
_on = handling(HANDLERS)

_F64 = struct.Struct(">d").unpack_from
_I32 = struct.Struct("<i").unpack_from
_U16 = struct.Struct("<H").unpack_from
_U32 = struct.Struct("<I").unpack_from
_U64 = struct.Struct("<Q").unpack_from


@_on(b"N")
def _none(machine: Machine, at: int) -> int:
    machine.stack.append(None)
    return at


@_on(b"\x88")
def _newtrue(machine: Machine, at: int) -> int:
    machine.stack.append(True)
    return at


@_on(b"\x89")
def _newfalse(machine: Machine, at: int) -> int:
    machine.stack.append(False)
    return at


@_on(b"K")
def _binint1(machine: Machine, at: int) -> int:
    machine.stack.append(machine.data[at])
    return at + 1


@_on(b"M")
def _binint2(machine: Machine, at: int) -> int:
    machine.stack.append(_U16(machine.data, at)[0])
    return at + 2


@_on(b"J")
def _binint(machine: Machine, at: int) -> int:
    machine.stack.append(_I32(machine.data, at)[0])
    return at + 4


@_on(b"I")
def _int(machine: Machine, at: int) -> int:
    text, at = machine.line(at)
    machine.stack.append({"00": False, "01": True}.get(text) if text in ("00", "01") else int(text, 0))
    return at


@_on(b"L")
def _long(machine: Machine, at: int) -> int:
    text, at = machine.line(at)
    machine.stack.append(int(text.rstrip("L"), 0))
    return at


@_on(b"\x8a")
def _long1(machine: Machine, at: int) -> int:
    length = machine.data[at]
    machine.stack.append(int.from_bytes(machine.take(at + 1, length), "little", signed=True))
    return at + 1 + length


@_on(b"\x8b")
def _long4(machine: Machine, at: int) -> int:
    length: int = _I32(machine.data, at)[0]
    machine.stack.append(int.from_bytes(machine.take(at + 4, length), "little", signed=True))
    return at + 4 + length


@_on(b"F")
def _float(machine: Machine, at: int) -> int:
    text, at = machine.line(at)
    machine.stack.append(float(text))
    return at


@_on(b"G")
def _binfloat(machine: Machine, at: int) -> int:
    machine.stack.append(_F64(machine.data, at)[0])
    return at + 8


@_on(b"X")
def _binunicode(machine: Machine, at: int) -> int:
    start = at + 4
    end: int = start + _U32(machine.data, at)[0]
    if end > machine.size:
        machine.take(start, end - start)
    machine.stack.append(str(machine.data[start:end], "utf-8", "surrogatepass"))
    return end


@_on(b"\x8c")
def _short_binunicode(machine: Machine, at: int) -> int:
    end = at + 1 + machine.data[at]
    machine.stack.append(str(machine.take(at + 1, end - at - 1), "utf-8", "surrogatepass"))
    return end


@_on(b"\x8d")
def _binunicode8(machine: Machine, at: int) -> int:
    length: int = _U64(machine.data, at)[0]
    machine.stack.append(str(machine.take(at + 8, length), "utf-8", "surrogatepass"))
    return at + 8 + length


@_on(b"V")
def _unicode(machine: Machine, at: int) -> int:
    end = machine.data.find(b"\n", at)
    if end < 0:
        raise ValueError("a line without an end")
    machine.stack.append(bytes(machine.data[at:end]).decode("raw-unicode-escape"))
    return end + 1


@_on(b"C")
def _short_binbytes(machine: Machine, at: int) -> int:
    length = machine.data[at]
    machine.stack.append(machine.take(at + 1, length))
    return at + 1 + length


@_on(b"B")
def _binbytes(machine: Machine, at: int) -> int:
    length: int = _U32(machine.data, at)[0]
    machine.stack.append(machine.take_or_leave(at + 4, length))
    return at + 4 + length


@_on(b"\x8e", b"\x96")
def _binbytes8(machine: Machine, at: int) -> int:
    length: int = _U64(machine.data, at)[0]
    machine.stack.append(machine.take_or_leave(at + 8, length))
    return at + 8 + length


# Backslashes that begin no escape (\d), or one of more than a byte (\400): Python keeps them, with a warning.
_KEPT_BACKSLASH = re.compile(rb"(?<!\\)((?:\\\\)*)\\([^\n\\'\"abfnrtvx0-7]|[4-7][0-7]{2})")


def python2_text(raw: bytes) -> Value:
    """A ``str`` of Python 2 may be text or bytes: short ASCII is text, anything else stays bytes."""
    return raw.decode("ascii") if len(raw) <= LONG and raw.isascii() else raw


@_on(b"S")
def _string(machine: Machine, at: int) -> int:
    text, at = machine.line(at)
    text = text.strip()
    if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"":
        raise ValueError("a string without its quotes")
    raw = _KEPT_BACKSLASH.sub(rb"\1\\\\\2", text[1:-1].encode("utf-8", "surrogateescape"))
    machine.stack.append(python2_text(codecs.escape_decode(raw)[0]))
    return at


@_on(b"T")
def _binstring(machine: Machine, at: int) -> int:
    length: int = _I32(machine.data, at)[0]
    raw = machine.take_or_leave(at + 4, length)
    machine.stack.append(raw if isinstance(raw, Inline) else python2_text(raw))
    return at + 4 + length


@_on(b"U")
def _short_binstring(machine: Machine, at: int) -> int:
    length = machine.data[at]
    machine.stack.append(python2_text(machine.take(at + 1, length)))
    return at + 1 + length
