"""From what a pickle says to the value of an extra state: plain data, without anything being called."""

from __future__ import annotations

import io
from collections import OrderedDict

from ..errors import BrokenFile
from ..files.spans import ByteSpan
from ..formats.pickle.values import Global, Inline, Object, Ordered, Pickled, Value
from ..tensors.dtypes import BY_NAME
from ..tensors.extra_state import DEPTH, Device, Unknown, extra_state
from ..tensors.records import ComputedTensor, ExtraState, OpaqueTensor
from ..tensors.stored import StoredTensor

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_TENSORS = (StoredTensor, ComputedTensor, OpaqueTensor)
_LONGEST = 1 << 28  # bytes of one value that are taken into memory


def read_extra_state(value: Value) -> ExtraState:
    """The record of what a file has under an ``_extra_state`` key."""
    return extra_state(_Reading().value(value, 0))


class _Reading:
    """Reads one value; an object that occurs in it twice stays one object."""

    def __init__(self) -> None:
        self._made: dict[int, object] = {}
        self._kept: list[Value] = []  # so that no identity is given twice

    def value(self, value: Value, depth: int) -> object:
        if isinstance(value, (*_PLAIN, *_TENSORS)):
            return value
        if depth > DEPTH:
            return Unknown("a value that is nested too deeply")
        if id(value) not in self._made:
            self._kept.append(value)
            self._made[id(value)] = self._container(value, depth)
        return self._made[id(value)]

    def _container(self, value: Value, depth: int) -> object:
        if isinstance(value, dict):
            made: dict[object, object] = OrderedDict() if isinstance(value, Ordered) else {}
            self._made[id(value)] = made  # it may hold itself
            for key, item in value.items():
                name = self._key(key, depth)
                if isinstance(name, Unknown):
                    return name
                made[name] = self.value(item, depth + 1)
            return made
        if isinstance(value, list):
            row: list[object] = []
            self._made[id(value)] = row
            row.extend(self.value(item, depth + 1) for item in value)
            return row
        if isinstance(value, tuple):
            self._made[id(value)] = Unknown("a tuple in itself")
            return tuple(self.value(item, depth + 1) for item in value)
        if isinstance(value, (set, frozenset)):
            return type(value)(self._key(item, depth) for item in value)
        return self._other(value, depth)

    def _key(self, key: Value, depth: int) -> object:
        """A key of a dict; those that the unpickler keeps apart by a stand-in are what they were."""
        stands_in = isinstance(key, Object) and key.class_name in ("builtins.tuple", "builtins.int")
        made = self.value(key.args[0] if stands_in and isinstance(key, Object) else key, depth + 1)
        try:
            hash(made)
        except (TypeError, RecursionError):
            return Unknown("a dict whose keys are no plain values")
        return made

    def _other(self, value: Value, depth: int) -> object:
        if isinstance(value, Pickled):
            return self.value(_pickled(value), depth + 1)
        if isinstance(value, Inline):
            return _bytes(value)
        if isinstance(value, Global):
            named = BY_NAME.get(value.name) if value.module == "torch" else None
            return named or Unknown(f"class {value}")
        if not isinstance(value, Object):
            return Unknown(f"{type(value).__name__}")
        if value.class_name in ("_io.BytesIO", "io.BytesIO"):
            return self._bytes_io(value)
        if value.class_name == "torch.device" and all(isinstance(arg, (str, int)) for arg in value.args):
            return Device(":".join(map(str, value.args)))
        if value.class_name in ("builtins.bytearray", "__builtin__.bytearray") and len(value.args) < 2:
            raw = value.args[0] if value.args else b""
            return bytearray(raw) if isinstance(raw, bytes) else Unknown("bytearray")
        if value.class_name in ("builtins.complex", "__builtin__.complex") and len(value.args) == 2:
            real, imaginary = value.args
            if isinstance(real, float) and isinstance(imaginary, float):
                return complex(real, imaginary)
        return Unknown(f"object of class {value.class_name}")

    def _bytes_io(self, value: Object) -> object:
        """``io.BytesIO``: its state is its content, the position in it, its attributes."""
        content, position = b"", 0
        if isinstance(value.state, tuple) and len(value.state) == 3:
            raw, at, _ = value.state
            content = _bytes(raw) if isinstance(raw, Inline) else raw if isinstance(raw, bytes) else b""
            position = at if isinstance(at, int) and 0 <= at < 1 << 62 else 0
        elif value.args and isinstance(value.args[0], bytes):
            content = value.args[0]
        made = io.BytesIO(content)
        made.seek(position)
        return made


def _bytes(value: Inline) -> bytes:
    """A byte string that was left in its file."""
    if len(value) > _LONGEST:
        raise BrokenFile(value.path, f"has an extra state of {len(value):,} bytes", "leave it in its file")
    return b"".join(bytes(block) for block in ByteSpan(value.path, value.start, value.stop).blocks())


def _pickled(value: Pickled) -> Value:
    """An entry of a distributed checkpoint: what torch.save wrote of it, in a zip of its own."""
    span = ByteSpan(value.path, value.start, value.stop)
    try:
        from ..formats.zip import torch_zip
        from ..formats.zip.archive import read_archive

        return torch_zip.read(read_archive(value.path, span)).root
    except BrokenFile:
        return Object(Global("torch", "legacy_pickle"))
