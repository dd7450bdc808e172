"""Between records and torch tensors, both ways; torch is imported inside the functions."""

from __future__ import annotations

import ctypes
import io
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

from ..errors import BrokenFile, EditError
from ..files.prefetch import reading_ahead
from ..files.spans import Block, fill
from .checkpoint import Checkpoint, versions_of
from .dtypes import BY_NAME, DType
from .extra_state import Device, Unknown, extra_state, is_extra_state, unknown_in
from .opaque import ways_to_load
from .records import ComputedTensor, ExtraState, OpaqueTensor, Tensor, spans_of
from .storage import Storage
from .stored import StoredTensor
from .strides import row_major, swapped

if TYPE_CHECKING:
    import torch

    MapLocation: TypeAlias = (
        "str | torch.device | Mapping[str, str] | "
        "Callable[[torch.UntypedStorage, str], torch.UntypedStorage | None] | None"
    )
    Restore: TypeAlias = "Callable[[torch.UntypedStorage, str], torch.UntypedStorage]"


# -- whole checkpoints


def to_torch(checkpoint: Checkpoint, *, map_location: MapLocation = "cpu") -> OrderedDict[str, torch.Tensor]:
    """A checkpoint's tensors as torch's: mapped where they can be, ties shared, ``_metadata`` and extra states kept.

    ``map_location`` is what torch.load takes.  Raises EditError for sparse or quantized tensors and for
    extra states that are more than data.
    """
    loader = _Loader(_restore(map_location))
    opaque = [
        f"{key!r} is a {tensor.kind} tensor" for key, tensor in checkpoint.items() if isinstance(tensor, OpaqueTensor)
    ]
    if opaque:
        raise EditError(opaque, remedy=ways_to_load(checkpoint))
    unknown = [f"{key!r} holds an {what}" for key, tensor in checkpoint.items() if (what := unknown_in(tensor))]
    if unknown:
        raise EditError(unknown, remedy="drop '*_extra_state', or load the file with torch.load")
    with reading_ahead(spans_of(checkpoint.values())):
        loaded = OrderedDict(
            # torch's own state_dicts hold extra states among tensors, whatever the annotation says
            (key, cast("torch.Tensor", loader.value(tensor.value)) if isinstance(tensor, ExtraState)
             else loader.tensor(tensor))
            for key, tensor in checkpoint.items()
        )  # fmt: skip
    if checkpoint.versions is not None:
        loaded._metadata = OrderedDict(checkpoint.versions)  # type: ignore[attr-defined]
    return loaded


def load_tensor(tensor: Tensor, *, map_location: MapLocation = "cpu") -> torch.Tensor:
    """One record as a torch tensor; see :func:`to_torch`."""
    return to_torch(Checkpoint({"tensor": tensor}), map_location=map_location)["tensor"]


def from_torch(state_dict: Mapping[str, torch.Tensor]) -> Checkpoint:
    """A Checkpoint of tensors in memory, for writing; views and ties are seen as such.

    >>> import torch
    >>> weight = torch.zeros(4, 2)
    >>> checkpoint = from_torch({"a": weight, "tied": weight, "view": weight[:1]})
    >>> checkpoint["a"].tie == checkpoint["tied"].tie, checkpoint["a"].tie == checkpoint["view"].tie
    (True, False)
    """
    storages: dict[tuple[str, int, int], Storage] = {}
    tensors = {key: _record(key, tensor, storages) for key, tensor in state_dict.items()}
    return Checkpoint(tensors, container="memory", versions=versions_of(state_dict))


def _record(key: str, tensor: torch.Tensor, storages: dict[tuple[str, int, int], Storage]) -> Tensor:
    import torch

    if not isinstance(tensor, torch.Tensor):
        if is_extra_state(key):
            return extra_state(_recorded(tensor, storages, {}))
        raise EditError(f"{key!r} is a {type(tensor).__name__}, not a tensor", remedy="leave it out")
    dtype = BY_NAME[str(tensor.dtype).removeprefix("torch.")]
    kind = _opaque_kind(tensor)
    if kind:
        return OpaqueTensor(kind, dtype, tuple(tensor.shape), str(tensor.device))
    place = tensor.untyped_storage()
    name = (str(tensor.device), place.data_ptr(), place.nbytes())
    if name not in storages:
        storages[name] = Storage(None, place.nbytes(), str(tensor.device), memory=_memory(place.cpu()))
    return StoredTensor(
        dtype,
        tuple(tensor.shape),
        tensor.stride(),
        int(tensor.storage_offset()),
        storages[name],
        tensor.is_conj(),
        tensor.is_neg(),
    )


def python_value(value: object) -> object:
    """The value of an extra state as a module's ``set_extra_state`` gets it, its tensors on the CPU."""
    return _Loader(_restore("cpu")).value(value)


def _recorded(value: object, storages: dict[tuple[str, int, int], Storage], known: dict[int, object]) -> object:
    """The value of an extra state with records for torch's tensors, dtypes and devices."""
    import torch

    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, bytearray, io.BytesIO)):
        return value
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, torch.Tensor):
        return _record("", value, storages)
    if isinstance(value, torch.dtype):
        return BY_NAME[str(value).removeprefix("torch.")]
    if isinstance(value, torch.device):
        return Device(str(value))
    if type(value) in (dict, OrderedDict):
        pairs = cast("dict[object, object]", value)
        made = known[id(value)] = type(pairs)()
        made.update((key, _recorded(item, storages, known)) for key, item in pairs.items())
        return made
    if type(value) is list:
        row: list[object] = []
        known[id(value)] = row
        row.extend(_recorded(item, storages, known) for item in value)
        return row
    if isinstance(value, (torch.Size, set, frozenset)) or type(value) is tuple:
        kind = tuple if isinstance(value, torch.Size) else type(value)
        return kind(_recorded(item, storages, known) for item in value)
    return Unknown(f"object of class {type(value).__module__}.{type(value).__qualname__}")


def _opaque_kind(tensor: torch.Tensor) -> str:
    """What makes a tensor more than elements in a storage, "" where nothing does."""
    import torch

    if tensor.layout != torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    if tensor.is_quantized:
        return "quantized"
    if tensor.is_meta:
        return "meta"
    if hasattr(tensor, "__tensor_flatten__"):
        return f"subclass {type(tensor).__name__}"
    return ""


def _restore(map_location: MapLocation) -> Restore:
    """What torch.load does with its map_location, as one function."""
    from torch.serialization import default_restore_location

    def restore(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        wanted: object = location
        if callable(map_location):
            moved = map_location(storage, location)
            if moved is not None:
                return moved
        elif isinstance(map_location, Mapping):
            wanted = map_location.get(location, location)
        elif map_location is not None:
            wanted = map_location
        placed: torch.UntypedStorage = default_restore_location(storage, str(wanted))
        return placed

    return restore


class _Loader:
    """Makes tensors, each file mapped once and each storage made once."""

    def __init__(self, restore: Restore) -> None:
        self._restore = restore
        self._files: dict[Path, torch.UntypedStorage] = {}
        self._storages: dict[Storage, torch.UntypedStorage] = {}
        self._values: dict[object, torch.Tensor] = {}

    def tensor(self, tensor: Tensor) -> torch.Tensor:
        import torch

        dtype = getattr(torch, tensor.dtype.name)
        if not isinstance(tensor, StoredTensor):
            return self._computed(tensor, dtype)
        storage = self._storages.get(tensor.storage)
        if storage is None:
            whole, part = tensor.storage.plain, tensor.dtype.part
            if whole is None:
                unplaced = _read(tensor.storage, part)
            elif (local := whole.path.local) is None:
                unplaced = _fetched(tensor.storage)
            else:
                unplaced = self._mapped(local, whole.start, whole.stop, part)
            storage = self._storages[tensor.storage] = self._restore(unplaced, tensor.storage.device)
        empty = torch.empty(0, dtype=dtype, device=storage.device)
        made = empty.set_(storage, tensor.offset, tensor.shape, tensor.stride)
        made = made.conj() if tensor.conjugate else made
        return torch._neg_view(made) if tensor.negative else made

    def value(self, value: object) -> object:
        """The value of an extra state, with torch's tensors, dtypes and devices for their records."""
        import torch

        if isinstance(value, (StoredTensor, ComputedTensor)):
            return self.tensor(value)
        if isinstance(value, DType):
            return getattr(torch, value.name)
        if isinstance(value, Device):
            return torch.device(value.name)
        if isinstance(value, io.BytesIO):
            made = io.BytesIO(value.getvalue())
            made.seek(value.tell())
            return made
        if isinstance(value, dict):
            return type(value)((key, self.value(item)) for key, item in value.items())
        if isinstance(value, (list, tuple, set, frozenset)):
            return type(value)(self.value(item) for item in value)
        return value

    def _mapped(self, path: Path, start: int, stop: int, alignment: int) -> torch.UntypedStorage:
        import torch

        if start == stop:
            return torch.UntypedStorage(0)
        if start % alignment:  # as in legacy files: torch wants aligned memory, so it is read into some
            storage = torch.UntypedStorage(stop - start)
            with open(path, "rb", buffering=0) as file:
                file.seek(start)
                if fill(file, _memory(storage)) < stop - start:
                    raise BrokenFile(path, "became shorter while it was read")
            return storage
        if path not in self._files:
            whole = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
            self._files[path] = cast("torch.UntypedStorage", whole)
        return cast("torch.UntypedStorage", self._files[path][start:stop])

    def _computed(self, tensor: Tensor, dtype: torch.dtype) -> torch.Tensor:
        import torch

        if tensor.tie not in self._values:
            placed = self._restore(_untyped(b"".join(tensor.blocks())), tensor.device)
            empty = torch.empty(0, dtype=dtype, device=placed.device)
            self._values[tensor.tie] = empty.set_(placed, 0, tensor.shape, row_major(tensor.shape))
        return self._values[tensor.tie]


def _read(storage: Storage, part: int) -> torch.UntypedStorage:
    """A storage that cannot be mapped as it is: packed, in memory, or in the other byte order."""
    raw = b"".join(storage.blocks())
    return _untyped(swapped(raw, part) if storage.big_endian else raw)


def _fetched(storage: Storage) -> torch.UntypedStorage:
    """A storage at a URL, compared with its checksum as it comes."""
    raw = bytearray(storage.nbytes)
    at = 0
    for block in storage.blocks():
        raw[at : at + len(block)] = block
        at += len(block)
    return _untyped(raw)


def _untyped(raw: bytes | bytearray) -> torch.UntypedStorage:
    import torch

    if not raw:
        return torch.UntypedStorage(0)
    writable = raw if isinstance(raw, bytearray) else bytearray(raw)
    return torch.frombuffer(writable, dtype=torch.uint8).untyped_storage()


def _memory(storage: torch.UntypedStorage) -> memoryview:
    """The bytes of a storage on the CPU; the view keeps it alive."""
    if storage.nbytes() == 0:
        return memoryview(b"")
    raw = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    raw._storage = storage  # type: ignore[attr-defined]
    return memoryview(raw).cast("B")


# -- blocks of bytes as torch tensors, and back


def typed(raw: Block | bytearray, dtype: DType) -> torch.Tensor:
    """Bytes as a 1-d torch tensor; it shares their memory where that can be written."""
    import torch

    view = memoryview(raw)
    kind: torch.dtype = getattr(torch, dtype.name)
    return torch.frombuffer(bytearray(view) if view.readonly else view, dtype=torch.uint8).view(kind)


def whole(tensor: Tensor) -> torch.Tensor:
    """One whole tensor in memory, contiguous."""
    import torch

    raw = bytearray().join(tensor.blocks())
    if not raw:
        return torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype.name))
    return typed(raw, tensor.dtype).reshape(tensor.shape)


def raw_bytes(value: torch.Tensor) -> memoryview:
    """The bytes of a contiguous torch tensor on the CPU; the view keeps it alive."""
    nbytes = value.numel() * value.element_size()
    if nbytes == 0:
        return memoryview(b"")
    raw = (ctypes.c_char * nbytes).from_address(value.data_ptr())
    raw._kept = value  # type: ignore[attr-defined]
    return memoryview(raw).cast("B")
