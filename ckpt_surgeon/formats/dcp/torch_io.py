"""torch's own engine for distributed checkpoints: it plans which pieces make up a tensor, and reads and writes them.

``FileSystemReader.read_metadata`` unpickles, that is runs, a ``.metadata``; it is never called here.  torch is given
what :mod:`.dcp` has read, one tensor at a time, and only pieces that our own reader has found to be a plain tensor of
the right dtype and shape, with the right checksum.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from itertools import groupby
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from ...errors import BrokenFile, EditError
from ...files.sinks import Sink
from ...files.spans import BLOCK, ByteSpan
from ...tensors.extra_state import without_extra_states
from ...tensors.records import ExtraState, Tensor
from ...tensors.stored import StoredTensor
from ...tensors.torch_bridge import python_value
from ..zip import torch_zip
from ..zip.archive import read_archive
from .pieces import SLAB, Piece, Pieced, Sizes, slabs

if TYPE_CHECKING:
    import torch
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
    from torch.distributed.checkpoint.storage import StorageReader
    from typing_extensions import Buffer


Pickled: TypeAlias = "dict[str, Callable[[], bytes]]"  # makes a file of torch.save for each entry


# -- reading


def blocks(whole: Pieced, *, safetensors: bool = False) -> Iterator[bytes]:
    """Yield a tensor's elements in row-major order, put together slab by slab.

    Takes the memory of one slab and of one piece.  Raises BrokenFile when a piece is not what it should be.
    """
    if not whole.nbytes:
        return
    metadata = _metadata(whole, safetensors)
    reader = _hf_reader() if safetensors else _reader()
    reader.set_up_storage_reader(metadata, True)
    unchecked = {} if safetensors else {piece.offsets: piece for piece in whole.pieces}
    for start, stop in slabs(whole):
        items = _read_items(whole, metadata, start, stop)
        for offsets in {tuple(item.storage_index.offset or ()) for item in items} & unchecked.keys():
            _check(whole, unchecked.pop(offsets))
        # torch keeps a piece until it has read the next, unless the next is asked for by itself
        plans = [items] if safetensors else [[item] for item in items]
        yield from _read(reader, whole, plans, stop - start)


def _read_items(whole: Pieced, metadata: Metadata, start: int, stop: int) -> list[ReadItem]:
    """What torch has to read for some rows of a tensor."""
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
    from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

    described = metadata.state_dict_metadata[whole.key]
    assert isinstance(described, TensorStorageMetadata)
    offsets = (start, *(0 for _ in whole.shape[1:])) if whole.shape else ()
    rows = ChunkStorageMetadata(_size(offsets), _size(_rows(whole, stop - start)))
    return create_read_items_for_chunk_list(whole.key, described, [rows])


def _read(reader: StorageReader, whole: Pieced, plans: list[list[ReadItem]], rows: int) -> Iterator[bytes]:
    """Have torch read a slab; it is forgotten with this generator."""
    from torch.distributed.checkpoint.planner import LoadPlan

    sizes = _rows(whole, rows)
    slab = bytearray(prod(sizes) * whole.dtype.itemsize)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*support is experimental")  # complex32, which is only copied
            planner = _planner(_typed(slab, whole, sizes))
            for items in plans:
                reader.read_data(LoadPlan(items), planner).wait()
    except (RuntimeError, ValueError, AssertionError, EOFError, UnpicklingError) as error:
        raise BrokenFile(whole.pieces[0].place.path, f"torch cannot read {whole.key!r} ({error})") from error
    view = memoryview(slab)
    yield from (bytes(view[low : low + BLOCK]) for low in range(0, len(slab), BLOCK))


def _rows(whole: Pieced, count: int) -> Sizes:
    return (count, *whole.shape[1:]) if whole.shape else ()


def _check(whole: Pieced, piece: Piece) -> None:
    """Read a piece with our own reader, which runs nothing.  Raises BrokenFile when it is not what it should be."""
    place = piece.place
    found = torch_zip.read(read_archive(place.path, place)).root
    if not isinstance(found, StoredTensor) or (found.dtype, found.shape) != (whole.dtype, piece.sizes):
        there = f"{found.dtype} {list(found.shape)}" if isinstance(found, StoredTensor) else "something else"
        problem = f"has {there} at byte {place.start:,} where a piece of {whole.key!r} should be"
        raise BrokenFile(place.path, f"{problem}, {whole.dtype} {list(piece.sizes)}", "fetch it again")
    if found.storage.deflated:
        raise BrokenFile(place.path, f"a piece of {whole.key!r} is packed, which torch never does", "do not use it")
    for _ in found.storage.blocks():  # compares its checksum
        pass


def _metadata(whole: Pieced, safetensors: bool) -> Metadata:
    """torch's description of one tensor and of the places of its pieces."""
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    chunks = [ChunkStorageMetadata(_size(piece.offsets), _size(piece.sizes)) for piece in whole.pieces]
    described = TensorStorageMetadata(TensorProperties(_dtype(whole)), _size(whole.shape), chunks)
    stored = _stored_safetensors if safetensors else _stored
    places = {MetadataIndex(whole.key, piece.offsets): stored(whole, piece) for piece in whole.pieces}
    return Metadata({whole.key: described}, storage_data=places)


def _stored(whole: Pieced, piece: Piece) -> object:
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    return _StorageInfo(str(piece.place.path), piece.place.start, len(piece.place))


def _stored_safetensors(whole: Pieced, piece: Piece) -> object:
    from torch.distributed.checkpoint._hf_utils import _HFStorageInfo

    return _HFStorageInfo(str(piece.place.path), _size(piece.sizes), _dtype(whole))


def _reader() -> StorageReader:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    return FileSystemReader(Path())


def _hf_reader() -> StorageReader:
    try:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    except ImportError as error:
        raise EditError(
            "tensors in pieces of safetensors need torch 2.9 or later", remedy="pip install -U torch"
        ) from error
    return HuggingFaceStorageReader(".")


def _planner(slab: torch.Tensor) -> LoadPlanner:
    """torch's planner, made to put pieces into one slab."""
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    planner = DefaultLoadPlanner()
    planner.lookup_tensor = lambda index: slab  # type: ignore[method-assign]
    planner.load_bytes = _refuse_pickle  # type: ignore[assignment, method-assign]  # torch's own would run it
    return planner


def _refuse_pickle(*_: object) -> None:
    raise ValueError("a pickle where a tensor should be")


# -- writing


class _Box(NamedTuple):
    """A part of a tensor that is written as one piece."""

    key: str
    offsets: Sizes
    sizes: Sizes
    nbytes: int


class Layout:
    """Which pieces of which tensors are in which file of a folder, and how each file and ``.metadata`` are made.

    The files are those of one process of torch's own; with ``max_file_size`` those of several.  Each can be written
    by itself, by any process: what :meth:`write` returns of all of them makes up ``.metadata``.

    ``pickled`` makes the files of torch.save for entries that are no tensors; ``paths`` has the path of every entry in
    the state_dict, in its order, where keys alone do not tell it.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], max_file_size: int | None = None, *,
        pickled: Mapping[str, Callable[[], bytes]] | None = None,
        paths: Mapping[str, tuple[str | int, ...]] | None = None,
    ) -> None:  # fmt: skip
        limit = min(SLAB, max_file_size or SLAB)
        self._paths = paths if paths is not None else {key: (key,) for key in tensors}
        self._states = {key: tensor for key, tensor in tensors.items() if isinstance(tensor, ExtraState)}
        self._extra: Pickled = {key: partial(_saved, state) for key, state in self._states.items()}
        self._extra |= pickled or {}
        self._tensors = without_extra_states(tensors)
        boxes = [box for key, tensor in self._tensors.items() for box in _boxes(key, tensor, limit)]
        self._shares = _shares(boxes, max_file_size)

    @property
    def files(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of which each file has pieces, by its name."""
        first: Mapping[str, Tensor] = self._states
        found = {}
        for number, share in enumerate(self._shares):
            own = {box.key: self._tensors[box.key] for box in share}
            found[f"__{number}_0.distcp"] = {**first, **own}
            first = {}
        return found

    @cached_property
    def _global_plan(self) -> tuple[list[SavePlan], Metadata]:
        from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

        paths: list[Mapping[str, tuple[str | int, ...]]] = [self._paths, *({} for _ in self._shares[1:])]
        extra = [list(self._extra), *([] for _ in self._shares[1:])]
        own = [_plan(self._tensors, *one) for one in zip(self._shares, paths, extra, strict=True)]
        plans, metadata = DefaultSavePlanner().create_global_plan(own)
        return _writer(io.BytesIO()).prepare_global_plan(plans), metadata

    def write(self, number: int, sink: Sink, tell: Callable[[int], object]) -> list[tuple[int, int]]:
        """Write one file; returns the offset and the length of each piece in it."""
        plan = self._global_plan[0][number]
        planner = _save_planner(self._tensors, self._shares[number], tell, self._extra)
        try:
            results = _writer(_SinkStream(sink)).write_data(plan, planner).wait()
        except RuntimeError as error:  # what torch's zip writer makes of a full disk
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise
        return [(result.storage_data.offset, result.storage_data.length) for result in results]

    def metadata(self, places: Sequence[Sequence[tuple[int, int]]]) -> bytes:
        """The bytes of ``.metadata``; ``places`` are what :meth:`write` returned of each file."""
        from torch.distributed.checkpoint.filesystem import _StorageInfo
        from torch.distributed.checkpoint.storage import WriteResult

        plans, metadata = self._global_plan
        results = [
            [
                WriteResult(item.index, length, _StorageInfo(name, offset, length))
                for item, (offset, length) in zip(plan.items, placed, strict=True)
            ]
            for name, plan, placed in zip(self.files, plans, places, strict=True)
        ]
        raw = _Kept()
        _writer(raw).finish(metadata, results)
        return raw.getvalue()


class _Kept(io.BytesIO):
    """Bytes that stay when torch closes the stream."""

    def close(self) -> None:
        pass


class _SinkStream(io.RawIOBase):
    """A sink as the stream that torch writes to."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._sink.position

    def write(self, raw: Buffer, /) -> int:
        view = memoryview(raw).cast("B")
        self._sink.literal(view)
        return len(view)


def _writer(stream: io.IOBase) -> FileSystemWriter:
    """torch's writer, made to write everything to one stream."""
    from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
    from torch.distributed.checkpoint.metadata import StorageMeta

    class OneStream(FileSystem):
        def create_stream(self, path: object, mode: str) -> AbstractContextManager[io.IOBase]:  # type: ignore[override]
            return nullcontext(stream)

        def exists(self, path: object) -> bool:
            return False

        def rename(self, path: object, new_path: object) -> None:
            pass

    # pieces are made in order, when they are written; the sink syncs its file itself
    writer = FileSystemWriter("", sync_files=False, per_thread_copy_ahead=0)
    writer.fs = OneStream()
    writer.storage_meta = StorageMeta  # type: ignore[method-assign]  # neither the folder's name of today nor a random id
    writer.set_up_storage_writer(True)
    return writer


def _boxes(key: str, tensor: Tensor, limit: int) -> Iterator[_Box]:
    """A tensor cut along its first dimension into boxes of about ``limit`` bytes."""
    shape = tensor.shape
    if tensor.nbytes <= limit:
        yield _Box(key, (0,) * len(shape), shape, tensor.nbytes)
        return
    row = tensor.nbytes // shape[0] if shape else tensor.nbytes
    step = max(limit // row, 1)
    for start in range(0, shape[0] if shape else 1, step):
        rows = min(step, shape[0] - start) if shape else 1
        sizes = (rows, *shape[1:]) if shape else ()
        yield _Box(key, (start, *(0 for _ in shape[1:])) if shape else (), sizes, rows * row)


def _shares(boxes: Sequence[_Box], max_file_size: int | None) -> list[list[_Box]]:
    """The boxes of each file."""
    shares: list[list[_Box]] = [[]]
    size = 0
    for box in boxes:
        if max_file_size and shares[-1] and size + box.nbytes > max_file_size:
            shares.append([])
            size = 0
        shares[-1].append(box)
        size += box.nbytes
    return shares


def _values(
    tensors: Mapping[str, Tensor], boxes: Sequence[_Box], tell: Callable[[int], object]
) -> Iterator[memoryview]:
    """The elements of each box, in order; a tensor is read once, from its first box to its last.

    All are views of one buffer: torch keeps every tensor until its file is complete, though it has written it.
    """
    buffer = memoryview(bytearray(max((box.nbytes for box in boxes), default=0)))
    for key, group in groupby(boxes, key=lambda box: box.key):
        own = list(group)
        at = _start(tensors[key], own[0])
        blocks = _blocks_from(tensors[key], at)
        rest = memoryview(b"")
        for box in own:
            raw = buffer[: box.nbytes]
            done = 0
            while done < len(raw):
                rest = rest or next(blocks, memoryview(b""))
                taken = rest[: len(raw) - done]
                if not taken:
                    raise EditError([f"{key!r} of {tensors[key].nbytes:,} bytes made fewer"])
                raw[done : done + len(taken)] = taken
                rest = rest[len(taken) :]
                done += len(taken)
                tell(len(taken))
            at += box.nbytes
            yield raw
        if at == tensors[key].nbytes and (rest or next(blocks, None) is not None):
            raise EditError([f"{key!r} of {tensors[key].nbytes:,} bytes made more"])


def _start(tensor: Tensor, box: _Box) -> int:
    """The byte of a tensor at which a box begins."""
    return box.offsets[0] * (tensor.nbytes // tensor.shape[0]) if box.offsets and tensor.nbytes else 0


def _blocks_from(tensor: Tensor, start: int) -> Iterator[memoryview]:
    """A tensor's bytes from ``start`` on; those before it, which another file has, are read past where they must be."""
    span = tensor.span if isinstance(tensor, StoredTensor) and tensor.storage.crc32 is None else None
    if span is not None and start:
        yield from (memoryview(block) for block in ByteSpan(span.path, span.start + start, span.stop).blocks())
        return
    for block in tensor.blocks():
        skipped = min(start, len(block))
        start -= skipped
        if len(block) > skipped:
            yield memoryview(block)[skipped:]


def _plan(
    tensors: Mapping[str, Tensor],
    share: Sequence[_Box],
    paths: Mapping[str, tuple[str | int, ...]],
    extra: Sequence[str],
) -> SavePlan:
    """What one process would write; ``paths`` are those of the keys in the state_dict, ``extra`` no tensors."""
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

    items = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in extra]
    for key, offsets, sizes, _ in share:
        tensor = tensors[key]
        chunk = ChunkStorageMetadata(_size(offsets), _size(sizes))
        data = TensorWriteData(chunk, TensorProperties(_dtype(tensor)), _size(tensor.shape))
        kind = WriteItemType.TENSOR if sizes == tensor.shape else WriteItemType.SHARD
        items.append(WriteItem(MetadataIndex(key, offsets), kind, tensor_data=data))
    return SavePlan(items, planner_data=dict(paths))


def _save_planner(
    tensors: Mapping[str, Tensor],
    boxes: Sequence[_Box],
    tell: Callable[[int], object],
    extra: Pickled,
) -> SavePlanner:
    """torch's planner, made to make each value when it is written."""
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    values = zip(boxes, _values(tensors, boxes, tell), strict=True)

    def resolve(item: WriteItem) -> torch.Tensor | io.BytesIO:
        if item.index.fqn in extra:
            return io.BytesIO(extra[item.index.fqn]())
        box, raw = next(values)
        if (box.key, box.offsets) != (item.index.fqn, item.index.offset):
            raise AssertionError("torch writes in another order than it was told")
        return _typed(raw, tensors[box.key], box.sizes)

    planner = DefaultSavePlanner()
    planner.resolve_data = resolve  # type: ignore[assignment, method-assign]
    return planner


def _saved(state: ExtraState) -> bytes:
    """An extra state as torch's planner hands it to the writer."""
    import torch

    made = io.BytesIO()
    torch.save(python_value(state.value), made)
    return made.getvalue()


# -- torch's types


def _typed(raw: bytearray | memoryview, like: Pieced | Tensor, sizes: Sizes) -> torch.Tensor:
    """Bytes as a tensor of a record's dtype that shares their memory."""
    import torch

    if not len(raw):
        return torch.empty(sizes, dtype=_dtype(like))
    return torch.frombuffer(raw, dtype=torch.uint8).view(_dtype(like)).view(sizes)


def _size(sizes: Sizes) -> torch.Size:
    import torch

    return torch.Size(sizes)


def _dtype(like: Pieced | Tensor) -> torch.dtype:
    import torch

    found: torch.dtype = getattr(torch, like.dtype.name)
    return found
