"""The container of ``torch.save`` before 1.6: four pickles, then a list of keys, then the storages.

Layout, from ``_legacy_save`` and ``_legacy_load`` in torch/serialization.py: pickles of a magic number, the
protocol version (1001), the writer's byte order and type sizes, the object; a pickle of the storages' keys;
then for each key eight bytes of element count and the elements.  Only reading: nothing needs new ones.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from ..errors import BrokenFile
from ..files.fetched import ensure_fetched, retry_with_more
from ..files.paths import FilePath
from ..files.spans import ByteSpan
from ..tensors.dtypes import DType
from ..tensors.storage import Storage
from .contents import Contents
from .payloads import LEGACY, names_in_loads
from .pickle.graph import PersistentNode, recorded
from .pickle.machine import PickleError, Unpickled
from .pickle.torch_objects import CONSTRUCTORS, TypedStorage, storage_dtype
from .pickle.unpickler import Unpickler
from .pickle.values import Value, spelled
from .zip.archive import TRUNCATED

CONTAINER = "torch legacy"
_PROTOCOL = 1001


class _Declared(NamedTuple):
    """A storage as the pickle announces it."""

    dtype: DType
    numel: int
    location: str

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def matches(head: bytes) -> bool:
    """Whether the first pickle is the magic number (in any pickle protocol)."""
    if not head or head[:1] not in (b"\x80", b"L"):
        return False
    try:
        return Unpickler(head).load() == LEGACY
    except PickleError:
        return False


def read(path: FilePath, *, salvage: bool = False) -> Contents:
    """Read the pickles and find the storages behind them; with ``salvage``, some may be cut off.

    Raises BrokenFile when the file is damaged or truncated.
    """
    with path.mapped() as data:
        try:
            made = retry_with_more(data, lambda: read_object(path, data, salvage=salvage), (PickleError, BrokenFile))
        except PickleError as error:
            raise BrokenFile(path, f"is truncated or damaged: {error}", TRUNCATED) from error
    inside = partial(names_in_loads, path, made.loads)
    return Contents(path, CONTAINER, made.root, globals=made.globals, globals_inside=inside)


def read_object(
    path: FilePath, data: bytes | mmap.mmap, *, start: int = 0, stop: int | None = None, salvage: bool = False
) -> Unpickled:
    """The object that a legacy save holds, and the names that it mentions.

    The save is ``data`` from ``start`` to ``stop``: a whole file, mapped, or bytes inside another one.  Raises
    PickleError, BrokenFile.
    """
    opened = _opened(_Source(path, data, len(data) if stop is None else stop, salvage), start)
    finder = Unpickler(data, constructors=CONSTRUCTORS, persistent=opened.find)
    # the names are those of all the pickles
    names = tuple(opened.machine.globals.values())
    return Unpickled(finder.load(opened.body), names, tuple(opened.machine.loads))


def read_graph(path: FilePath) -> tuple[Value, Callable[[Value], Value]]:
    """The graph of the object that a file holds, and what finds the storage behind a persistent id.

    Classes that were saved with their source are the classes alone, as torch loads them.  Raises BrokenFile where the
    file is damaged, or holds what cannot be kept whole.
    """

    def graph_of(data: mmap.mmap) -> tuple[Value, Callable[[Value], Value]]:
        opened = _opened(_Source(path, data, len(data), salvage=False), 0)
        return recorded(data, _node, opened.body, decodes=True), opened.find

    with path.mapped() as data:
        try:
            return retry_with_more(data, lambda: graph_of(data), (PickleError, BrokenFile))
        except PickleError as error:
            remedy = "leave out --whole to take the weights alone"
            raise BrokenFile(path, f"its pickle cannot be kept whole: {error}", remedy) from error


def _node(saved: Value) -> Value:
    """A persistent id of a graph: a class with its source is that class, a storage one as files of today have it."""
    if isinstance(saved, tuple) and _is_module(saved):
        return saved[1]
    fields = _fields(saved)
    if fields.view is not None:
        raise ValueError("a storage that is a view of another one")
    return PersistentNode(saved)


class _Opened(NamedTuple):
    """A save whose storages have their places."""

    machine: Unpickler
    body: int
    find: Callable[[Value], Value]


def _opened(source: _Source, start: int) -> _Opened:
    """Read the pickles from ``start`` on, and find the storages behind them.  Raises PickleError, BrokenFile."""
    path, data = source.path, source.data
    survey = _Survey()
    machine = Unpickler(data, constructors=CONSTRUCTORS, persistent=survey.see)
    if machine.load(start) != LEGACY:
        raise BrokenFile(path, "holds bytes that are no torch save")
    protocol = machine.load(machine.position)
    if protocol != _PROTOCOL:
        raise BrokenFile(path, f"has legacy protocol {spelled(protocol)}, only {_PROTOCOL} is known")
    machine.load(machine.position)  # byte order and type sizes of the writer; the storages are little-endian anyway
    body = machine.position
    machine.load(body)
    keys = machine.load(machine.position)
    if machine.position > source.stop:
        raise BrokenFile(path, "holds a torch save that goes on beyond its end")
    storages = _placed(source, machine.position, keys, survey.storages)
    return _Opened(machine, body, _Storages(survey.storages, storages).find)


@dataclass(frozen=True, slots=True)
class _Source:
    """The bytes of a save, and how they are to be taken."""

    path: FilePath
    data: bytes | mmap.mmap
    stop: int
    salvage: bool

    def storage(self, start: int, declared: _Declared) -> Storage:
        if isinstance(self.data, bytes):
            memory = memoryview(self.data)[start : start + declared.nbytes]
            return Storage(None, declared.nbytes, declared.location, memory=memory)
        return Storage(ByteSpan(self.path, start, start + declared.nbytes), declared.nbytes, declared.location)


class _Fields(NamedTuple):
    """A storage's persistent id."""

    cls: Value
    key: str
    location: str
    numel: int
    view: Value


def _fields(saved: Value) -> _Fields:
    """Raises ValueError for a persistent id that is no storage."""
    if not isinstance(saved, tuple) or len(saved) != 6 or saved[0] not in ("storage", b"storage"):
        raise ValueError("a persistent id that is no storage")
    _, cls, key, location, numel, view = saved
    if type(numel) is not int or numel < 0:
        raise ValueError("a storage without a proper size")
    return _Fields(cls, _key(key), spelled(location), numel, view)


def _key(key: Value) -> str:
    """A storage's key as text; those that are equal as text only stay apart."""
    return key if type(key) is str else f"{type(key).__name__} {spelled(key)}"


def _is_module(saved: Value) -> bool:
    """Whether a persistent id is a class with its source, (module, class, file, source)."""
    return isinstance(saved, tuple) and len(saved) > 1 and saved[0] in ("module", b"module")


class _Survey:
    """The first reading of the pickle: which storages it will need, since their places come after it."""

    def __init__(self) -> None:
        self.storages: dict[str, _Declared] = {}

    def see(self, saved: Value) -> Value:
        if isinstance(saved, tuple) and _is_module(saved):
            return saved[1]
        fields = _fields(saved)
        dtype = storage_dtype(fields.cls)
        self.storages.setdefault(fields.key, _Declared(dtype, fields.numel, fields.location))
        return TypedStorage(Storage(None, 1 << 62), dtype)


class _Storages:
    """The second reading: a storage has the class and the size that its first mention gives it, as in torch."""

    def __init__(self, declared: Mapping[str, _Declared], storages: Mapping[str, Storage]) -> None:
        self._declared = declared
        self._storages = storages
        self._views: dict[str, TypedStorage] = {}

    def find(self, saved: Value) -> Value:
        """The storage, or the view of one, of a persistent id."""
        if isinstance(saved, tuple) and _is_module(saved):
            return saved[1]
        fields = _fields(saved)
        if fields.key not in self._storages:
            raise ValueError(f"storage {fields.key!r} is not in the file's list")
        storage, own = self._storages[fields.key], storage_dtype(fields.cls)
        if fields.view is None:  # torch gives each mention of an empty storage the class that it names
            return TypedStorage(storage, self._declared[fields.key].dtype if storage.nbytes else own)
        if not isinstance(fields.view, tuple) or len(fields.view) != 3:
            raise ValueError("a view of a storage that is no triple")
        key, offset, numel = fields.view
        if not (type(offset) is type(numel) is int) or offset < 0 or numel < 0 or _key(key) in self._storages:
            raise ValueError("a view of a storage without a proper key, offset and size")
        return self._views.setdefault(_key(key), TypedStorage(storage, own, offset, numel))


def _placed(source: _Source, position: int, keys: Value, declared: dict[str, _Declared]) -> dict[str, Storage]:
    """Walk the storages behind the pickles."""
    if not isinstance(keys, list):
        raise BrokenFile(source.path, "is damaged: the list of its storages is missing", TRUNCATED)
    names = [_key(key) for key in keys]
    unknown = [key for key in names if key not in declared]
    if unknown:
        raise BrokenFile(source.path, f"is damaged: it lists a storage {unknown[0]!r} that nothing refers to")
    needed = position + sum(8 + declared[key].nbytes for key in names)
    if needed > source.stop and not source.salvage:
        problem = f"is truncated: it has {source.stop:,} bytes of the {needed:,} that it announces"
        raise BrokenFile(source.path, problem, TRUNCATED)
    ensure_fetched(source.data, _counts(position, [declared[key] for key in names]))
    placed: dict[str, Storage] = {}
    for key in names:
        storage = declared[key]
        nbytes = storage.nbytes
        if position + 8 + nbytes > source.stop:
            placed[key] = Storage(None, nbytes, storage.location)
            position = source.stop
            continue
        (count,) = struct.unpack_from("<q", source.data, position)
        if count != storage.numel:
            problem = f"is damaged: storage {key!r} has {count:,} elements, announced are {storage.numel:,}"
            raise BrokenFile(source.path, problem)
        placed[key] = source.storage(position + 8, storage)
        position += 8 + nbytes
    return placed


def _counts(position: int, storages: list[_Declared]) -> Iterator[tuple[int, int]]:
    """Where the element counts stand, each in front of its storage."""
    for storage in storages:
        yield position, position + 8
        position += 8 + storage.nbytes
