"""The container of ``torch.save`` before 1.6: four pickles, then a list of keys, then the storages.

Layout, from ``_legacy_save`` and ``_legacy_load`` in torch/serialization.py: pickles of a magic number, the
protocol version (1001), the writer's byte order and type sizes, the object; a pickle of the storages' keys;
then for each key eight bytes of element count and the elements.  Only reading: nothing needs new ones.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import NamedTuple

from ..errors import BrokenFile
from ..tensors import ByteSpan, Storage
from .contents import Contents
from .torch_objects import CONSTRUCTORS, TypedStorage, storage_dtype
from .unpickle import PickleError, Unpickler, Value

CONTAINER = "torch legacy"
MAGIC = 0x1950A86A20F9469CFC6C  # torch's own number, the file's first pickle

_PROTOCOL = 1001


class _Declared(NamedTuple):
    """A storage as the pickle announces it."""

    dtype_name: str
    itemsize: int
    numel: int
    location: str


def matches(head: bytes) -> bool:
    """Whether the first pickle is the magic number (in any pickle protocol)."""
    if not head or head[:1] not in (b"\x80", b"L"):
        return False
    try:
        return Unpickler(head).load() == MAGIC
    except PickleError:
        return False


def read(path: Path) -> Contents:
    """Read the pickles and find the storages behind them.  Raises BrokenFile when it is damaged or truncated."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _read(path, data)
        except PickleError as error:
            raise BrokenFile(path, f"is truncated or damaged: {error}") from error


def _read(path: Path, data: mmap.mmap) -> Contents:
    declared = _Survey()
    machine = Unpickler(data, constructors=CONSTRUCTORS, persistent=declared.see)
    machine.load()
    protocol = machine.load(machine.position)
    if protocol != _PROTOCOL:
        raise BrokenFile(path, f"has legacy protocol {protocol}, only {_PROTOCOL} is known")
    machine.load(machine.position)  # byte order and type sizes of the writer; the storages are little-endian anyway
    body = machine.position
    machine.load(body)
    keys = machine.load(machine.position)
    storages = _placed(path, data, machine.position, keys, declared.storages)
    finder = Unpickler(data, constructors=CONSTRUCTORS, persistent=lambda saved: _found(saved, storages))
    return Contents(path, CONTAINER, finder.load(body))


def _fields(saved: Value) -> tuple[Value, str, str, int, Value]:
    """class, key, location, element count and view of a storage's persistent id."""
    if not isinstance(saved, tuple) or len(saved) not in (5, 6) or saved[0] != "storage":
        raise ValueError("a persistent id that is no storage")
    cls, key, location, numel = saved[1:5]
    if type(numel) is not int or numel < 0:
        raise ValueError("a storage without a proper size")
    return cls, str(key), str(location), numel, saved[5] if len(saved) == 6 else None


class _Survey:
    """The first reading of the pickle: which storages it will need, since their places come after it."""

    def __init__(self) -> None:
        self.storages: dict[str, _Declared] = {}

    def see(self, saved: Value) -> Value:
        if isinstance(saved, tuple) and saved and saved[0] == "module":
            return saved[1]
        cls, key, location, numel, _view = _fields(saved)
        dtype = storage_dtype(cls)
        self.storages.setdefault(key, _Declared(dtype.name, dtype.itemsize, numel, location))
        return TypedStorage(Storage(None, 1 << 62), dtype)


def _found(saved: Value, storages: dict[str, Storage]) -> Value:
    if isinstance(saved, tuple) and saved and saved[0] == "module":
        return saved[1]
    cls, key, _location, _numel, view = _fields(saved)
    base = 0
    if isinstance(view, tuple) and len(view) == 3 and type(view[1]) is int:
        base = view[1]
    if key not in storages:
        raise ValueError(f"storage {key!r} is not in the file's list")
    return TypedStorage(storages[key], storage_dtype(cls), base)


def _placed(
    path: Path, data: mmap.mmap, position: int, keys: Value, declared: dict[str, _Declared]
) -> dict[str, Storage]:
    """Walk the storages behind the pickles."""
    if not isinstance(keys, list):
        raise BrokenFile(path, "is damaged: the list of its storages is missing")
    placed: dict[str, Storage] = {}
    size = len(data)
    for key in map(str, keys):
        if key not in declared:
            raise BrokenFile(path, f"is damaged: it lists a storage {key!r} that nothing refers to")
        one = declared[key]
        nbytes = one.numel * one.itemsize
        start = position + 8
        if start + nbytes > size:
            needed = (
                start
                + nbytes
                + sum(
                    8 + declared[rest].numel * declared[rest].itemsize
                    for rest in map(str, keys[len(placed) + 1 :])
                    if rest in declared
                )
            )
            raise BrokenFile(
                path,
                f"is truncated: it has {size:,} bytes of the {needed:,} that it announces",
                "fetch it again and compare its size with the original's",
            )
        (count,) = struct.unpack_from("<q", data, position)
        if count != one.numel:
            raise BrokenFile(path, f"is damaged: storage {key!r} has {count:,} elements, announced are {one.numel:,}")
        placed[key] = Storage(ByteSpan(path, start, start + nbytes), nbytes, one.location)
        position = start + nbytes
    return placed
