"""Pickles assembled from their opcodes, and payloads that are live when ``pickle`` itself loads them."""

from __future__ import annotations

import pickle as op
import struct
from collections.abc import Callable

# -- opcodes


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return op.BINUNICODE + struct.pack("<I", len(raw)) + raw


def call(module: str, name: str, *args: bytes) -> bytes:
    """GLOBAL, the arguments, REDUCE."""
    return named(module, name) + op.MARK + b"".join(args) + op.TUPLE + op.REDUCE


def named(module: str, name: str) -> bytes:
    return op.GLOBAL + f"{module}\n{name}\n".encode()


def number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return op.LONG4 + struct.pack("<i", len(raw)) + raw


def put(index: int) -> bytes:
    return op.LONG_BINPUT + struct.pack("<I", index)


def get(index: int) -> bytes:
    return op.LONG_BINGET + struct.pack("<I", index)


PROTO = op.PROTO + b"\x04"
STOP = op.STOP

# -- payloads: each makes a directory when pickle loads it


def mkdir(path: str) -> bytes:
    return call("posix", "mkdir", text(path))


def _partial(path: str) -> bytes:
    """functools.partial(os.mkdir, path), made by NEWOBJ."""
    return named("functools", "partial") + op.MARK + named("posix", "mkdir") + text(path) + op.TUPLE + op.NEWOBJ


def _partial_ex(path: str) -> bytes:
    args = op.MARK + named("posix", "mkdir") + text(path) + op.TUPLE
    return named("functools", "partial") + args + op.EMPTY_DICT + op.NEWOBJ_EX


def _built(path: str) -> bytes:
    """A partial of something harmless; BUILD calls its __setstate__ with the real thing."""
    harmless = named("functools", "partial") + op.MARK + named("builtins", "len") + op.TUPLE + op.NEWOBJ
    state = op.MARK + named("posix", "mkdir") + op.MARK + text(path) + op.TUPLE + op.EMPTY_DICT * 2 + op.TUPLE
    return harmless + state + op.BUILD


RUN = op.EMPTY_TUPLE + op.REDUCE
PAYLOADS: dict[str, tuple[Callable[[str], bytes], str]] = {
    "REDUCE": (mkdir, "posix.mkdir"),
    "STACK_GLOBAL": (
        lambda path: text("posix") + text("mkdir") + op.STACK_GLOBAL + text(path) + op.TUPLE1 + op.REDUCE,
        "posix.mkdir",
    ),
    "STACK_GLOBAL, dotted": (
        lambda path: text("pathlib") + text("os.mkdir") + op.STACK_GLOBAL + text(path) + op.TUPLE1 + op.REDUCE,
        "pathlib.os.mkdir",
    ),
    "STACK_GLOBAL from the memo": (
        lambda path: (
            text("posix") + put(900) + op.POP + text("mkdir") + put(901) + op.POP + get(900) + get(901)
            + op.STACK_GLOBAL + text(path) + op.TUPLE1 + op.REDUCE
        ),
        "posix.mkdir",
    ),
    "INST": (lambda path: op.MARK + text(path) + op.INST + b"posix\nmkdir\n", "posix.mkdir"),
    "OBJ": (lambda path: op.MARK + named("posix", "mkdir") + text(path) + op.OBJ, "posix.mkdir"),
    "NEWOBJ": (lambda path: _partial(path) + RUN, "functools.partial"),
    "NEWOBJ_EX": (lambda path: _partial_ex(path) + RUN, "functools.partial"),
    "BUILD": (lambda path: _built(path) + RUN, "functools.partial"),
    "eval": (lambda path: call("builtins", "eval", text(f"__import__('os').mkdir({path!r})")), "builtins.eval"),
    "exec": (lambda path: call("builtins", "exec", text(f"import os; os.mkdir({path!r})")), "builtins.exec"),
    "getattr": (
        lambda path: call("builtins", "getattr", call("importlib", "import_module", text("os")), text("mkdir"))
        + text(path) + op.TUPLE1 + op.REDUCE,
        "importlib.import_module",
    ),
    "map": (
        lambda path: call("builtins", "list", call("builtins", "map", named("posix", "mkdir"), text(path)
                          + op.TUPLE1)),
        "builtins.map",
    ),
    "EXT1": (lambda path: op.EXT1 + b"\xf0" + text(path) + op.TUPLE1 + op.REDUCE, "copyreg.extension_240"),
    "EXT4": (
        lambda path: op.EXT4 + struct.pack("<i", 240) + text(path) + op.TUPLE1 + op.REDUCE, "copyreg.extension_240"
    ),
    "as a key": (lambda path: op.EMPTY_DICT + mkdir(path) + op.NONE + op.SETITEM, "posix.mkdir"),
    "thrown away": (lambda path: mkdir(path) + op.POP + op.NONE, "posix.mkdir"),
    "thrown away with a mark": (lambda path: op.MARK + mkdir(path) + op.POP_MARK + op.NONE, "posix.mkdir"),
    "in a set": (lambda path: op.EMPTY_SET + op.MARK + mkdir(path) + op.ADDITEMS, "posix.mkdir"),
    "as a tensor subclass": (
        lambda path: call("torch._tensor", "_rebuild_from_type_v2", named("posix", "mkdir"), named("torch", "Tensor"),
                          text(path) + op.TUPLE1, op.EMPTY_DICT),
        "posix.mkdir",
    ),
}  # fmt: skip
