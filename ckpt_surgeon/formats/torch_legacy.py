"""The container of ``torch.save`` before 1.6: four pickles, then a list of keys, then the storages.

Layout, from ``_legacy_save`` and ``_legacy_load`` in torch/serialization.py: pickles of a magic number, the
protocol version (1001), the writer's byte order and type sizes, the object; a pickle of the storages' keys;
then for each key eight bytes of element count and the elements.  Only reading: nothing needs new ones.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import BrokenFile
from ..files.fetched import ensure_fetched, retry_with_more
from ..files.paths import FilePath
from ..files.spans import ByteSpan
from ..tensors.records import Storage
from .contents import Contents
from .pickle.machine import Global, PickleError, Unpickler, Value, spelled
from .pickle.torch_objects import CONSTRUCTORS, TypedStorage, storage_dtype
from .zip.archive import TRUNCATED

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


def read(path: FilePath, *, salvage: bool = False) -> Contents:
    """Read the pickles and find the storages behind them; with ``salvage``, some may be cut off.

    Raises BrokenFile when the file is damaged or truncated.
    """
    with path.mapped() as data:
        try:
            root, names = retry_with_more(
                data, lambda: read_object(path, data, salvage=salvage), (PickleError, BrokenFile)
            )
        except PickleError as error:
            raise BrokenFile(path, f"is truncated or damaged: {error}", TRUNCATED) from error
    return Contents(path, CONTAINER, root, globals=names)


def read_object(
    path: FilePath, data: bytes | mmap.mmap, *, start: int = 0, stop: int | None = None, salvage: bool = False
) -> tuple[Value, tuple[Global, ...]]:
    """The object that a legacy save holds, and the names that it mentions.

    The save is ``data`` from ``start`` to ``stop``: a whole file, mapped, or bytes inside another one.  Raises
    PickleError, BrokenFile.
    """
    survey = _Survey()
    machine = Unpickler(data, constructors=CONSTRUCTORS, persistent=survey.see)
    if machine.load(start) != MAGIC:
        raise BrokenFile(path, "holds bytes that are no torch save")
    protocol = machine.load(machine.position)
    if protocol != _PROTOCOL:
        raise BrokenFile(path, f"has legacy protocol {spelled(protocol)}, only {_PROTOCOL} is known")
    machine.load(machine.position)  # byte order and type sizes of the writer; the storages are little-endian anyway
    body = machine.position
    machine.load(body)
    keys = machine.load(machine.position)
    end = len(data) if stop is None else stop
    storages = _placed(_Place(path, data, end, salvage), machine.position, keys, survey.storages)
    finder = Unpickler(data, constructors=CONSTRUCTORS, persistent=lambda saved: _found(saved, storages))
    return finder.load(body), tuple(machine.globals.values())  # those of all the pickles


@dataclass(frozen=True, slots=True)
class _Place:
    """The bytes of a save, and how they are to be taken."""

    path: FilePath
    data: bytes | mmap.mmap
    stop: int
    salvage: bool

    def storage(self, start: int, one: _Declared) -> Storage:
        nbytes = one.numel * one.itemsize
        if isinstance(self.data, bytes):
            memory = memoryview(self.data)[start : start + nbytes]
            return Storage(None, nbytes, one.location, memory=memory)
        return Storage(ByteSpan(self.path, start, start + nbytes), nbytes, one.location)


def _fields(saved: Value) -> tuple[Value, str, str, int, Value]:
    """class, key, location, element count and view of a storage's persistent id."""
    if not isinstance(saved, tuple) or len(saved) not in (5, 6) or saved[0] != "storage":
        raise ValueError("a persistent id that is no storage")
    cls, key, location, numel = saved[1:5]
    if type(numel) is not int or numel < 0:
        raise ValueError("a storage without a proper size")
    return cls, spelled(key), spelled(location), numel, saved[5] if len(saved) == 6 else None


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


def _placed(place: _Place, position: int, keys: Value, declared: dict[str, _Declared]) -> dict[str, Storage]:
    """Walk the storages behind the pickles."""
    if not isinstance(keys, list):
        raise BrokenFile(place.path, "is damaged: the list of its storages is missing", TRUNCATED)
    names = [spelled(key) for key in keys]
    unknown = [key for key in names if key not in declared]
    if unknown:
        raise BrokenFile(place.path, f"is damaged: it lists a storage {unknown[0]!r} that nothing refers to")
    needed = position + sum(8 + declared[key].numel * declared[key].itemsize for key in names)
    if needed > place.stop and not place.salvage:
        problem = f"is truncated: it has {place.stop:,} bytes of the {needed:,} that it announces"
        raise BrokenFile(place.path, problem, TRUNCATED)
    ensure_fetched(place.data, _counts(position, [declared[key] for key in names]))
    placed: dict[str, Storage] = {}
    for key in names:
        one = declared[key]
        nbytes = one.numel * one.itemsize
        if position + 8 + nbytes > place.stop:
            placed[key] = Storage(None, nbytes, one.location)
            position = place.stop
            continue
        (count,) = struct.unpack_from("<q", place.data, position)
        if count != one.numel:
            problem = f"is damaged: storage {key!r} has {count:,} elements, announced are {one.numel:,}"
            raise BrokenFile(place.path, problem)
        placed[key] = place.storage(position + 8, one)
        position += 8 + nbytes
    return placed


def _counts(position: int, storages: list[_Declared]) -> Iterator[tuple[int, int]]:
    """Where the element counts stand, each in front of its storage."""
    for one in storages:
        yield position, position + 8
        position += 8 + one.numel * one.itemsize
