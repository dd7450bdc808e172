"""Between checkpoints and torch tensors: both directions (torch is imported inside the functions)."""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

from ..edits.keys import versions_of
from ..errors import BrokenFile, EditError, listed
from ..files.paths import AnyPath
from ..files.prefetch import reading_ahead
from ..files.remote import RemotePath
from ..reading.opening import open as open_checkpoint
from ..tensors.checkpoint import Checkpoint
from ..tensors.dtypes import BY_NAME
from ..tensors.records import OpaqueTensor, Storage, StoredTensor, Tensor, fill, row_major, spans_of, swapped

if TYPE_CHECKING:
    import torch

    from ..edits.recipe import Recipe
    from .fit import Fit

    MapLocation: TypeAlias = (
        "str | torch.device | Mapping[str, str] | "
        "Callable[[torch.UntypedStorage, str], torch.UntypedStorage | None] | None"
    )
    Restore: TypeAlias = "Callable[[torch.UntypedStorage, str], torch.UntypedStorage]"


def load(
    source: AnyPath | Checkpoint, *, map_location: MapLocation = "cpu", select: str | None = None
) -> OrderedDict[str, torch.Tensor]:
    """Load a checkpoint as a state_dict of torch tensors; its memory is the file's, mapped, until it is changed.

    ``source`` is a path or an opened (and perhaps edited) :class:`Checkpoint`; ``map_location`` is what torch.load
    takes: a device, a dict from saved to wanted device, a callable ``(storage, location)``, or None for the devices
    that the tensors were saved from.  Ties share memory, strides are kept, ``_metadata`` is there.  Do not write
    into the file while the tensors are in use.  Raises what :func:`ckpt_surgeon.open` raises, EditError for
    sparse or quantized tensors, and RuntimeError (torch's own) where the device is not there.

    >>> import ckpt_surgeon, torch
    >>> torch.save({"module.fc.bias": torch.ones(3)}, "parallel.pth")
    >>> ckpt_surgeon.strip_prefix(ckpt_surgeon.load("parallel.pth"))["fc.bias"]
    tensor([1., 1., 1.])
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source, select=select)
    loader = _Loader(_restore(map_location))
    odd = [
        f"{key!r} is a {tensor.kind} tensor" for key, tensor in checkpoint.items() if isinstance(tensor, OpaqueTensor)
    ]
    if odd:
        raise EditError([*odd, "leave them out or load the file with torch.load"])
    with reading_ahead(spans_of(checkpoint.values())):
        loaded = OrderedDict((key, loader.tensor(tensor)) for key, tensor in checkpoint.items())
    if checkpoint.versions is not None:
        loaded._metadata = OrderedDict(checkpoint.versions)  # type: ignore[attr-defined]
    return loaded


def load_into(
    model: torch.nn.Module,
    source: AnyPath | Checkpoint,
    *,
    map_location: MapLocation = "cpu",
    select: str | None = None,
    recipe: Recipe | None = None,
    adapt: Recipe | None = None,
    on_mismatch: str = "error",
    allow_missing: Iterable[str] = (),
    min_match: float = 0.0,
    assign: bool | None = None,
    seed: int = 0,
) -> LoadReport:
    """Load a checkpoint into a model, all or nothing, and report what became of every key.

    Keys are found, shapes settled and missing keys allowed as in :func:`ckpt_surgeon.fit`; what is not loaded keeps
    the model's own values.  Parameters keep requires_grad, dtype and device.  ``assign`` puts the file's mapped
    memory in place of the parameters instead of copying into them; without it, that is done exactly for a model on
    the meta device.  Wrapped (DataParallel, DDP) and compiled models are loaded inside.  Raises what ``fit`` raises,
    and then nothing in the model has changed.

    >>> import ckpt_surgeon, torch
    >>> torch.save({"module.weight": torch.ones(2, 3), "module.bias": torch.ones(2)}, "layer.pth")
    >>> report = ckpt_surgeon.load_into(torch.nn.Linear(3, 2), "layer.pth")
    >>> report.loaded, report.matched
    (('weight', 'bias'), 1.0)
    """
    from . import modules
    from .fit import own_values, plan_fit
    from .targets import expected

    inner = modules.unwrapped(model)
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source, select=select)
    own = inner.state_dict()
    on_meta = {key for key, value in own.items() if getattr(value, "is_meta", False)}
    found = plan_fit(
        checkpoint, expected(inner), lambda keys: own_values(inner, [key for key in keys if key in on_meta]),
        recipe=recipe, adapt=adapt, on_mismatch=on_mismatch, allow_missing=allow_missing, min_match=min_match,
        seed=seed, ties=modules.tied(inner),
    )  # fmt: skip
    proof = None if modules.loads_plainly(inner) else modules.verdict(inner, {**expected(inner), **found.result})
    if proof is not None and not proof.accepted:
        raise EditError([f"torch would not load the result strictly: {proof.refused or listed(proof.missing)}"])
    _refuse_two_values(inner, found.result)
    assigning = bool(on_meta) if assign is None else assign
    _put(inner, load(found.result, map_location=map_location), assign=assigning)
    return LoadReport(found, assigning)


def _refuse_two_values(model: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """A parameter of several names has one value; a checkpoint that has two is not this model's."""
    from ..reading.comparing import same_bytes
    from .modules import tied

    problems = []
    for names in tied(model):
        first, *others = [name for name in names if name in tensors] or [""]
        odd = [name for name in others if not same_bytes(tensors[first], tensors[name])]
        if odd:
            problems.append(f"{first!r} and {listed(odd)} are one parameter in the model and differ in the checkpoint")
    if problems:
        raise EditError([*problems, "drop one of them, or untie the model"])


def _put(model: torch.nn.Module, values: Mapping[str, torch.Tensor], *, assign: bool) -> None:
    """Load what was proven to fit; devices, dtypes, ties and requires_grad stay the model's."""
    from . import modules

    state = model.state_dict()
    ties = modules.tied(model)
    if assign:
        placed = {
            key: value.to(value.device if state[key].is_meta else state[key].device, state[key].dtype)
            for key, value in values.items()
        }
        model.load_state_dict({**state, **placed}, strict=True, assign=True)
        modules.tie_again(model, ties)
    else:
        model.load_state_dict({**state, **values}, strict=True)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What :func:`load_into` did; ``str()`` of it is the table that ``ckpt fit`` prints."""

    fit: Fit
    assigned: bool

    @property
    def loaded(self) -> tuple[str, ...]:
        """The model's keys that have values of the checkpoint now."""
        return self.fit.loaded

    @property
    def initialized(self) -> tuple[str, ...]:
        """The model's keys that kept their own values, or got fresh ones by name."""
        return self.fit.initialized

    @property
    def matched(self) -> float:
        """The share of the model's elements that were loaded, 0 to 1."""
        return self.fit.matched

    def __str__(self) -> str:
        from ..report.texts import fit_text

        return fit_text(self.fit)


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
            elif isinstance(whole.path, RemotePath):
                unplaced = _untyped(whole.fetched())
            else:
                unplaced = self._mapped(whole.path, whole.start, whole.stop, part)
            storage = self._storages[tensor.storage] = self._restore(unplaced, tensor.storage.device)
        empty = torch.empty(0, dtype=dtype, device=storage.device)
        made = empty.set_(storage, tensor.offset, tensor.shape, tensor.stride)
        made = made.conj() if tensor.conjugate else made
        return torch._neg_view(made) if tensor.negative else made

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


def _untyped(raw: bytes | bytearray) -> torch.UntypedStorage:
    import torch

    if not raw:
        return torch.UntypedStorage(0)
    writable = raw if isinstance(raw, bytearray) else bytearray(raw)
    return torch.frombuffer(writable, dtype=torch.uint8).untyped_storage()


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
        raise EditError([f"{key!r} is a {type(tensor).__name__}, not a tensor; leave it out"])
    dtype = BY_NAME[str(tensor.dtype).removeprefix("torch.")]
    kind = _odd_kind(tensor)
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


def _odd_kind(tensor: torch.Tensor) -> str:
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


def _memory(storage: torch.UntypedStorage) -> memoryview:
    """The bytes of a storage on the CPU; the view keeps it alive."""
    if storage.nbytes() == 0:
        return memoryview(b"")
    raw = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    raw._storage = storage  # type: ignore[attr-defined]
    return memoryview(raw).cast("B")
