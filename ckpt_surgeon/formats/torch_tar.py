"""The tar container of torch 0.1: members ``storages``, ``tensors`` and ``pickle``.

Layout, from ``legacy_load`` in torch/serialization.py: ``storages`` is a count, then for each storage a pickle of
(key, location, class), eight bytes of element count and the elements; then a pickle of views.  ``tensors`` is a
count, then for each tensor a pickle of (key, storage key, class), the number of dimensions (4 bytes, 4 skipped),
sizes, strides and offset (8 bytes each).  ``pickle`` is the object, whose persistent ids are keys of tensors.
"""

from __future__ import annotations

import mmap
import struct
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from functools import partial

from ..errors import BrokenFile
from ..files.fetched import ensure_all_fetched
from ..files.paths import FilePath
from ..files.spans import ByteSpan
from ..tensors.storage import Storage
from .contents import Contents
from .payloads import names_in_loads
from .pickle.machine import Load, PickleError
from .pickle.torch_objects import CONSTRUCTORS, TypedStorage, rebuild_tensor, storage_dtype
from .pickle.unpickler import Unpickler
from .pickle.values import Global, Value, spelled

CONTAINER = "torch tar (0.1)"

_NEEDED = ("storages", "tensors", "pickle")


def matches(head: bytes) -> bool:
    """Whether a file begins like a tar archive: by its marks, or by a first header whose checksum is right."""
    if len(head) >= tarfile.BLOCKSIZE:
        with suppress(tarfile.HeaderError):
            tarfile.TarInfo.frombuf(head[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
            return True
    return head[257:262] == b"ustar" or head.startswith((b"sys_info\0", b"pickle\0", b"tensors\0", b"storages\0"))


def read(path: FilePath, *, salvage: bool = False) -> Contents:
    """Read a tar of torch 0.1.  Raises BrokenFile when it is damaged or another kind of tar."""
    try:
        with path.opened() as file, tarfile.open(fileobj=file, mode="r:") as archive:
            members = {member.name: member for member in archive.getmembers()}
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise BrokenFile(path, f"is a damaged or truncated tar archive ({error})", "fetch it again") from error
    if not all(name in members for name in _NEEDED):
        held = ", ".join(list(members)[:3])
        raise BrokenFile(path, f"is a tar archive, but no checkpoint (it holds {held} …)", "unpack it: tar -xf")
    for name in _NEEDED:
        if not members[name].isreg() or members[name].issparse():
            raise BrokenFile(path, f"has a {name!r} that is no plain file", "do not use it")
    with path.mapped() as data:
        ensure_all_fetched(data)
        reader = _Reader(path, data)
        try:
            reader.storages(members["storages"])
            reader.tensors(members["tensors"])
            machine = Unpickler(data, constructors=CONSTRUCTORS, persistent=reader.find)
            root = machine.load(members["pickle"].offset_data)
            _check_end(machine.position, members["pickle"])
        except (PickleError, ValueError, KeyError, TypeError, struct.error) as error:
            raise BrokenFile(path, f"is damaged or truncated: {error}", "fetch it again") from error
    names = dict.fromkeys((*machine.globals.values(), *reader.globals))
    inside = partial(names_in_loads, path, (*machine.loads, *reader.loads))
    return Contents(path, CONTAINER, root, globals=tuple(names), globals_inside=inside)


def _check_end(position: int, member: tarfile.TarInfo) -> None:
    """Raise ValueError where a member was read beyond its end."""
    if position > member.offset_data + member.size:
        raise ValueError(f"{member.name!r} goes on beyond its end")


class _Reader:
    """Storages and tensors by their keys, as the members tell them."""

    def __init__(self, path: FilePath, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._made: dict[str, Value] = {}
        self._pickles: list[Unpickler] = []

    @property
    def globals(self) -> Iterator[Global]:
        """The names that the pickles beside the object's own mention."""
        return (name for machine in self._pickles for name in machine.globals.values())

    @property
    def loads(self) -> Iterator[Load]:
        """The calls in them that would load bytes again."""
        return (load for machine in self._pickles for load in machine.loads)

    def _machine(self) -> Unpickler:
        self._pickles.append(Unpickler(self._data, constructors=CONSTRUCTORS))
        return self._pickles[-1]

    def storages(self, member: tarfile.TarInfo) -> None:
        """Find the storages and the views of them."""
        machine = self._machine()
        count = machine.load(member.offset_data)
        for _ in range(count if isinstance(count, int) else 0):
            entry = machine.load(machine.position)
            if not isinstance(entry, tuple) or len(entry) != 3:
                raise ValueError("a storage that is no triple")
            key, location, cls = entry
            dtype = storage_dtype(cls)
            (numel,) = struct.unpack_from("<q", self._data, machine.position)
            start = machine.position + 8
            stop = start + numel * dtype.itemsize
            if numel < 0 or stop > len(self._data):
                raise BrokenFile(
                    self._path,
                    f"is truncated: storage {spelled(key)} should end at byte {stop:,} of {len(self._data):,}",
                    "fetch it again",
                )
            storage = Storage(ByteSpan(self._path, start, stop), stop - start, spelled(location))
            self._made[_key(key)] = TypedStorage(storage, dtype)
            machine.position = stop
        views = machine.load(machine.position)
        for view in views if isinstance(views, list) else []:
            target, root, offset, numel = view
            base = self._made[_key(root)]
            if (
                not isinstance(base, TypedStorage)
                or not (type(offset) is type(numel) is int)
                or offset < 0
                or numel < 0
            ):
                raise ValueError("a view of something else than a storage")
            self._made[_key(target)] = TypedStorage(base.storage, base.dtype, base.base + offset, numel)
        _check_end(machine.position, member)

    def tensors(self, member: tarfile.TarInfo) -> None:
        """Find the tensors in the storages."""
        machine = self._machine()
        count = machine.load(member.offset_data)
        for _ in range(count if isinstance(count, int) else 0):
            entry = machine.load(machine.position)
            if not isinstance(entry, tuple) or len(entry) != 3:
                raise ValueError("a tensor that is no triple")
            key, storage, _cls = entry
            (ndim,) = struct.unpack_from("<i", self._data, machine.position)
            if not 0 <= ndim <= 64:
                raise ValueError(f"a tensor of {ndim} dimensions")
            numbers = struct.unpack_from(f"<{2 * ndim + 1}q", self._data, machine.position + 8)
            shape, stride = numbers[:ndim], numbers[ndim : 2 * ndim]
            source = self._made[_key(storage)]
            if not ndim and not (isinstance(source, TypedStorage) and source.storage.nbytes):
                shape, stride = (0,), (1,)  # an empty one: torch 0.1 had no 0-d tensors, and torch today refuses these
            self._made[_key(key)] = rebuild_tensor(source, numbers[-1], shape, stride)
            machine.position += 8 + 8 * (2 * ndim + 1)
        _check_end(machine.position, member)

    def find(self, saved: Value) -> Value:
        """What a persistent id of the object stands for: torch makes a number of it."""
        if isinstance(saved, tuple) and saved:
            return saved[0]  # a container's class and its source
        return self._made[str(int(saved)) if isinstance(saved, (str, int)) else spelled(saved)]


def _key(key: Value) -> str:
    """The number under which a storage or tensor is kept.  Raises ValueError for any other key."""
    if type(key) is not int:
        raise ValueError(f"a storage or tensor under {spelled(key)!r}, which is no number")
    return str(key)
