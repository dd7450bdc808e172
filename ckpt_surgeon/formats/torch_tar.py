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

from ..errors import BrokenFile
from ..files.fetched import ensure_all_fetched
from ..files.paths import FilePath
from ..files.spans import ByteSpan
from ..tensors.records import Storage
from .contents import Contents
from .pickle.machine import Global, PickleError, Unpickler, Value, spelled
from .pickle.torch_objects import CONSTRUCTORS, TypedStorage, rebuild_tensor, storage_dtype

CONTAINER = "torch tar (0.1)"

_NEEDED = ("storages", "tensors", "pickle")


def matches(head: bytes) -> bool:
    """Whether a file begins like a tar archive."""
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
    with path.mapped() as data:
        ensure_all_fetched(data)
        reader = _Reader(path, data)
        try:
            reader.storages(members["storages"].offset_data)
            reader.tensors(members["tensors"].offset_data)
            machine = Unpickler(data, constructors=CONSTRUCTORS, persistent=reader.found)
            root = machine.load(members["pickle"].offset_data)
        except (PickleError, ValueError, KeyError, TypeError, struct.error) as error:
            raise BrokenFile(path, f"is damaged or truncated: {error}", "fetch it again") from error
    names = dict.fromkeys((*machine.globals.values(), *reader.globals))
    return Contents(path, CONTAINER, root, globals=tuple(names))


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

    def _machine(self) -> Unpickler:
        self._pickles.append(Unpickler(self._data, constructors=CONSTRUCTORS))
        return self._pickles[-1]

    def storages(self, at: int) -> None:
        machine = self._machine()
        count = machine.load(at)
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
            self._made[spelled(key)] = TypedStorage(storage, dtype)
            machine.position = stop
        views = machine.load(machine.position)
        for view in views if isinstance(views, list) else []:
            target, root, offset, _numel = view
            base = self._made[spelled(root)]
            if not isinstance(base, TypedStorage) or type(offset) is not int:
                raise ValueError("a view of something else than a storage")
            self._made[spelled(target)] = TypedStorage(base.storage, base.dtype, base.base + offset)

    def tensors(self, at: int) -> None:
        machine = self._machine()
        count = machine.load(at)
        for _ in range(count if isinstance(count, int) else 0):
            entry = machine.load(machine.position)
            if not isinstance(entry, tuple) or len(entry) != 3:
                raise ValueError("a tensor that is no triple")
            key, storage, _cls = entry
            (ndim,) = struct.unpack_from("<i", self._data, machine.position)
            if not 0 <= ndim <= 64:
                raise ValueError(f"a tensor of {ndim} dimensions")
            numbers = struct.unpack_from(f"<{2 * ndim + 1}q", self._data, machine.position + 8)
            shape = numbers[:ndim] if ndim else (0,)  # torch 0.1 had no 0-d tensors: none is empty
            stride = numbers[ndim : 2 * ndim] if ndim else (1,)
            self._made[spelled(key)] = rebuild_tensor(self._made[spelled(storage)], numbers[-1], shape, stride)
            machine.position += 8 + 8 * (2 * ndim + 1)

    def found(self, saved: Value) -> Value:
        if isinstance(saved, tuple) and saved:
            return saved[0]  # a container's class and its source
        return self._made[spelled(saved)]
