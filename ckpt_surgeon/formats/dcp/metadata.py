"""torch.distributed.checkpoint: a folder of files that processes wrote side by side, and ``.metadata``, which says
where in them each piece of each tensor lies.

``.metadata`` is a pickle, read here as data; torch itself would run it.  The classes are those of
``torch/distributed/checkpoint/metadata.py``.  State_dicts were flattened when they were saved; the metadata's
``planner_data`` has the path of each entry, in the order of the state_dict, and the tree is built again from it.
What is no tensor was pickled for itself (``step``, an optimizer's options): listed, not read.
"""

from __future__ import annotations

import mmap
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from typing import NamedTuple, TypeAlias

from ...errors import BrokenFile, EditError, listed
from ...files.local import LocalPath
from ...files.spans import Block, ByteSpan
from ...tensors.dtypes import DType
from ...tensors.records import ComputedTensor, OpaqueTensor, Tensor
from ...tensors.stored import DIMENSIONS, ELEMENTS
from ..contents import Contents
from ..payloads import Names, names_in_loads, names_in_pickles
from ..pickle import torch_objects
from ..pickle.machine import Load, PickleError, Unpickled
from ..pickle.torch_objects import LOST, named_dtype
from ..pickle.unpickler import Unpickler
from ..pickle.values import Class, Global, Pickled, Value, spelled
from ..shard_names import DCP_METADATA
from ..sharded import listed_problems, stays_inside
from ..zip import torch_zip
from ..zip.archive import MAGIC, READ_LIMIT, read_archive
from . import torch_io
from .pieces import Piece, Pieced, Sizes, flaw

CONTAINER = "torch distributed"
SUFFIXES: tuple[str, ...] = (".dcp",)
HOLDS_EXTRA_STATES = True
METADATA = DCP_METADATA
DATA_SUFFIX = ".distcp"
STEPS = 64  # how deep a state_dict may nest

_MODULE = "torch.distributed.checkpoint.metadata"
_AGAIN = "fetch the folder again, or save it again"


Entry: TypeAlias = tuple[tuple[str | int, ...], Value]  # the path of an entry, and what it is


# -- the pickle


class _Record:
    """An instance of one of torch's classes, as far as it was saved."""

    __slots__ = ("kind", "state")

    def __init__(self, kind: str, *_: Value) -> None:
        self.kind = kind
        self.state: Value = None

    def build(self, state: Value) -> None:
        if self.state is not None:
            raise ValueError(f"a {self.kind} that is changed after it was made")
        self.state = state


def _layout(name: Value) -> Value:
    """torch.serialization._get_layout."""
    return name


CONSTRUCTORS = (
    torch_objects.CONSTRUCTORS
    | {
        (module, name): Class(partial(_Record, name), partial(_Record, name))
        for module, names in (
            (_MODULE, ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
                       "TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
            ("torch.distributed._shard.sharded_tensor.metadata", ("TensorProperties", "MEM_FORMAT_ENCODING")),
            ("torch.distributed.checkpoint.filesystem", ("_StorageInfo",)),
        )
        for name in names
    }
    | {("torch.serialization", "_get_layout"): _layout}
)  # fmt: skip


def matches(head: bytes) -> bool:
    """Whether a file begins like a ``.metadata``."""
    return head[:1] == b"\x80" and _MODULE.encode() in head[:64] and b"Metadata" in head[:96]


def read(path: LocalPath, *, salvage: bool = False) -> Contents:
    """Read a ``.metadata``; with ``salvage``, the files that it names may be missing or cut off.

    Raises BrokenFile, naming every entry and file, when it is damaged, contradicts itself or the files do not fit.
    """
    made = _unpickled(path)
    return _Reading(path, made, salvage=salvage).contents()


def read_entries(path: LocalPath) -> dict[str, Entry]:
    """Every entry of a ``.metadata`` by its key, with its path in the state_dict.  Raises what :func:`read` raises."""
    return _Reading(path, _unpickled(path), salvage=False).entries()


def _unpickled(path: LocalPath) -> Unpickled:
    if not path.stat().st_size:
        raise BrokenFile(path, "is empty", _AGAIN)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        machine = Unpickler(data, constructors=CONSTRUCTORS)
        try:
            return machine.unpickled()
        except PickleError as error:
            raise BrokenFile(path, f"is truncated or damaged: {error}", _AGAIN) from error


def _state(value: Value, *kinds: str) -> Mapping[Value, Value]:
    """The attributes of a record of one of these classes."""
    if isinstance(value, _Record) and value.kind in kinds and isinstance(value.state, dict):
        return value.state
    found = value.kind if isinstance(value, _Record) else spelled(value)
    raise ValueError(f"a {found} where a {kinds[0]} should be")


def _sizes(value: Value) -> Sizes:
    if not isinstance(value, tuple) or len(value) > DIMENSIONS or not all(map(_is_count, value)):
        raise ValueError("a shape or an offset that is no tuple of at most 64 numbers from 0 to 2**63")
    return value


def _number(value: Value) -> int:
    if isinstance(value, int) and _is_count(value):
        return value
    raise ValueError(f"an offset or a length of {spelled(value)}")


def _is_count(value: Value) -> bool:
    return type(value) is int and 0 <= value <= ELEMENTS


def _is_path(value: Value) -> bool:
    """Whether a value is the path of an entry: the keys and indices that lead to it."""
    return (
        isinstance(value, tuple)
        and 0 < len(value) <= STEPS
        and all(type(step) is str or _is_count(step) for step in value)
    )


class _Place(NamedTuple):
    """Where a piece lies, what packs it ("" as a rule), and whether its bytes are missing."""

    span: ByteSpan
    packed: str
    is_lost: bool


class _Reading:
    """One ``.metadata`` on its way to a tree of tensors; problems are gathered and reported all at once."""

    def __init__(self, path: LocalPath, made: Unpickled, *, salvage: bool) -> None:
        self._path = path
        self._names = made.globals
        self._loads = made.loads
        self._salvage = salvage
        self._problems: list[str] = []
        self._files: dict[str, tuple[LocalPath, int]] = {}  # by name in the metadata; the size, -1 if it is not there
        self._pickled: list[ByteSpan] = []
        try:
            self._metadata = _state(made.root, "Metadata")
            self._stored = dict(self._storage_data())
        except ValueError as error:
            raise BrokenFile(path, f"is no metadata of a distributed checkpoint: {error}", _AGAIN) from None

    def contents(self) -> Contents:
        entries = self.entries()
        count = len(self._files)
        container = f"{CONTAINER}, {count:,} file{'' if count == 1 else 's'}"
        root = tree(self._path, entries)
        inside = partial(_names_inside, self._path, self._pickled, self._loads)
        notes = self._strays()
        return Contents(self._path.parent, container, root, notes=notes, globals=self._names, globals_inside=inside)

    def entries(self) -> dict[str, Entry]:
        """Every entry by its key, with its path in the state_dict."""
        described = self._metadata.get("state_dict_metadata")
        if not isinstance(described, dict):
            raise BrokenFile(self._path, "has no state_dict_metadata", _AGAIN)
        entries: dict[str, Entry] = {}
        paths = self._paths(described)
        for key in paths:
            try:
                entries[key] = paths[key], self._entry(key, described[key])
            except ValueError as error:
                self._problems.append(f"{key!r}: {error}")
        missing = [name for name, (_, size) in self._files.items() if size < 0]
        if missing and not self._salvage:
            self._problems.insert(0, f"missing files: {listed(missing)}")
        if self._problems:
            raise BrokenFile(self._path, listed_problems(self._problems), _AGAIN)
        return entries

    def _strays(self) -> tuple[str, ...]:
        names = sorted(os.listdir(self._path.parent))
        strays = [name for name in names if name.endswith(DATA_SUFFIX) and name not in self._files]
        return (f"not named in {METADATA}, not read: {listed(strays)}",) if strays else ()

    def _storage_data(self) -> Iterator[tuple[tuple[str, str], Mapping[Value, Value]]]:
        """Where each piece lies: by its entry's key and, for a tensor, its offset in that.

        As text, whose hashes nobody can choose.
        """
        stored = self._metadata.get("storage_data")
        if not isinstance(stored, dict):
            raise ValueError("no storage_data")
        for index, info in stored.items():
            named = _state(index, "MetadataIndex")
            offset = named.get("offset")
            key = named.get("fqn")
            if type(key) is str:
                yield (key, "" if offset is None else str(_sizes(offset))), _state(info, "_StorageInfo")

    def _paths(self, described: Mapping[Value, Value]) -> dict[str, tuple[str | int, ...]]:
        """The path of each entry in the state_dict, in the state_dict's order where that is known."""
        given = self._metadata.get("planner_data")
        paths: dict[str, tuple[str | int, ...]] = {}
        for key, path in given.items() if isinstance(given, dict) else ():
            if key in described and type(key) is str:
                if not isinstance(path, tuple) or not _is_path(path):
                    raise BrokenFile(self._path, f"its planner_data has no proper path for {key!r}", _AGAIN)
                paths[key] = path
        for key in described:
            if type(key) is not str:
                raise BrokenFile(self._path, f"has an entry under {spelled(key)!r}, which is no string", _AGAIN)
            paths.setdefault(key, (key,))
        return paths

    def _entry(self, key: str, described: Value) -> Value:
        if isinstance(described, _Record) and described.kind == "BytesStorageMetadata":
            place = self._place(key, None)
            self._pickled += [] if place.is_lost else [place.span]
            return Pickled(place.span.path, place.span.start, place.span.stop)
        state = _state(described, "TensorStorageMetadata")
        dtype, layout = self._properties(state.get("properties"))
        shape = _sizes(state.get("size"))
        if prod(shape) > ELEMENTS:
            raise ValueError(f"a shape {list(shape)} that no tensor has")
        kind = "quantized" if dtype.quantized else spelled(layout).removeprefix("torch.")
        if kind != "strided":
            return OpaqueTensor(kind, dtype, shape)
        return self._tensor(key, dtype, shape, state.get("chunks"))

    @staticmethod
    def _properties(value: Value) -> tuple[DType, Value]:
        state = value.state if isinstance(value, _Record) and value.kind == "TensorProperties" else None
        if isinstance(state, dict):
            return named_dtype(state.get("dtype")), state.get("layout", "torch.strided")
        if isinstance(state, tuple) and len(state) >= 2:
            return named_dtype(state[0]), state[1]
        raise ValueError("no properties")

    def _tensor(self, key: str, dtype: DType, shape: Sizes, chunks: Value) -> Tensor:
        if not isinstance(chunks, list):
            raise ValueError("no list of its pieces")
        states = [_state(chunk, "ChunkStorageMetadata") for chunk in chunks]
        boxes = [(_sizes(state.get("offsets")), _sizes(state.get("sizes"))) for state in states]
        if problem := flaw(shape, boxes):
            raise ValueError(problem)
        # a process for which nothing was left has an empty piece
        placed = [(*box, self._place(key, box[0])) for box in boxes if 0 not in box[1]]
        for offsets, sizes, place in placed:
            if place.packed:
                return OpaqueTensor(f"packed by {place.packed}", dtype, shape)
            if len(place.span) < prod(sizes) * dtype.itemsize:
                where = f"its piece at {list(offsets)}"
                raise ValueError(f"{where} has {len(place.span):,} bytes, fewer than {list(sizes)} of {dtype}")
        if any(place.is_lost for _, _, place in placed):
            return OpaqueTensor(LOST, dtype, shape)
        self._pickled += [place.span for _, _, place in placed]
        pieces = (Piece(offsets, sizes, place.span) for offsets, sizes, place in placed)
        return in_pieces(Pieced(key, dtype, shape, tuple(pieces)))

    def _place(self, key: str, offsets: Sizes | None) -> _Place:
        info = self._stored.get((key, "" if offsets is None else str(offsets)))
        if info is None:
            where = f"its piece at {list(offsets)}" if offsets is not None else "it"
            raise ValueError(f"{where} is in no file")
        name, start, length = info.get("relative_path"), _number(info.get("offset")), _number(info.get("length"))
        if type(name) is not str or not stays_inside(name):
            raise ValueError(f"it lies in {spelled(name)!r}, outside of the folder; do not use it")
        path, size = self._file(name)
        if start + length > size >= 0 and not self._salvage:
            raise ValueError(f"{name!r} is truncated: it should go on to byte {start + length:,} and has {size:,}")
        packed = info.get("transform_descriptors") or ()
        packing = ", ".join(map(spelled, packed)) if isinstance(packed, (list, tuple)) else spelled(packed)
        return _Place(ByteSpan(path, start, start + length), packing, start + length > size)

    def _file(self, name: str) -> tuple[LocalPath, int]:
        if name not in self._files:
            path = self._path.parent / name
            try:
                path.remember()
                found = path.stat()
                size = found.st_size if stat.S_ISREG(found.st_mode) else -1
            except FileNotFoundError:
                size = -1
            self._files[name] = path, size
        return self._files[name]


def in_pieces(whole: Pieced, *, safetensors: bool = False) -> Tensor:
    """The tensor that pieces make up when it is read."""
    files = tuple(dict.fromkeys(piece.place.path for piece in whole.pieces))
    make = partial(_made, whole, safetensors)
    return ComputedTensor(whole.dtype, whole.shape, (), make, files=files).stored()


def _made(whole: Pieced, safetensors: bool, _: Sequence[Tensor]) -> Iterator[Block]:
    return torch_io.blocks(whole, safetensors=safetensors)


def tree(path: LocalPath, entries: Mapping[str, Entry]) -> dict[Value, Value]:
    """The nested dicts and lists that were flattened.  Raises BrokenFile where two entries have one place."""
    root: dict[Value, Value] = {}
    for key, (steps, entry) in entries.items():
        node = root
        *above, last = steps
        for step in above:
            below = node.setdefault(step, {})
            if type(below) is not dict:
                raise BrokenFile(path, f"has {key!r} inside of something that is no dict", _AGAIN)
            node = below
        if last in node:
            raise BrokenFile(path, f"has two entries at the place of {key!r}", _AGAIN)
        node[last] = entry
    _make_lists(root)
    return root


def _make_lists(root: dict[Value, Value]) -> None:
    """Turn dicts from 0, 1, 2 … into the lists that they were."""
    dicts: list[tuple[dict[Value, Value], Value, dict[Value, Value]]] = [({}, None, root)]
    for _, _, node in dicts:  # grows on the way
        dicts += [(node, step, below) for step, below in node.items() if type(below) is dict]
    for above, step, node in reversed(dicts[1:]):
        if all(type(one) is int for one in node) and node.keys() == set(range(len(node))):
            above[step] = [node[index] for index in range(len(node))]


def _names_inside(path: LocalPath, places: Iterable[ByteSpan], own: Sequence[Load]) -> Iterator[Global]:
    """The names in the pickles of all entries; torch.distributed.checkpoint runs those that are no tensors'."""
    loads = list(own)
    for place in places:
        try:
            found = list(_pickles_at(place))
        except (PickleError, BrokenFile, ValueError):
            yield Global("entry", f"at byte {place.start:,} of {place.path.name}, which cannot be read here")
            continue
        for names in found:
            yield from names.globals
            loads += names.loads
    yield from names_in_loads(path, loads)


def _pickles_at(place: ByteSpan) -> Iterator[Names]:
    """The names in one entry: in the pickles of a zip or, what torch takes for its old format, in those in a row."""
    if next(place.blocks(len(MAGIC)), b"") != MAGIC:
        with place.mapped() as (view, _):
            yield names_in_pickles(bytes(view[:READ_LIMIT]))
        return
    archive = read_archive(place.path, place)
    for name in archive.members:
        if name.lower().endswith(".pkl"):
            yield names_in_pickles(archive.read(name))


# -- writing


def is_part(name: str) -> bool:
    """Whether a file of this name is one that torch gives to a part of a distributed checkpoint.

    >>> [is_part(name) for name in (".metadata", "__0_0.distcp", "mine.distcp")]
    [True, True, False]
    """
    return name == METADATA or re.fullmatch(r"__\d+_\d+" + re.escape(DATA_SUFFIX), name) is not None


def check(tensors: Mapping[str, Tensor]) -> None:
    """Raise EditError naming the tensors that cannot be written."""
    torch_zip.check(tensors)
    bits = [f"{key!r} ({tensor.dtype})" for key, tensor in tensors.items() if tensor.dtype.name.startswith("bits")]
    if bits:
        raise EditError(f"torch's distributed checkpoints cannot hold {', '.join(bits)}", remedy="write a .pth")


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """About how many bytes their files will have: the elements, and for each tensor a zip and its place."""
    return sum(tensor.nbytes + 2 * len(key) + 1_800 for key, tensor in tensors.items())


def layout(tensors: Mapping[str, Tensor], max_file_size: int | None = None) -> torch_io.Layout:
    """The files of a folder that holds every tensor, under each of its keys.

    Writing one takes the memory of two pieces; large tensors are cut into several, of about SLAB bytes.
    """
    return torch_io.Layout(tensors, max_file_size)
