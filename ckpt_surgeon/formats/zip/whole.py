"""A torch zip with everything in it: its pickle as a graph, its storages as places, and both written again.

What was not edited comes back equal under ``torch.load``: every object is made as the source makes it, storages that
are shared stay shared, and their bytes are copied by the kernel.  Tensors that an edit made get storages of their own.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial

from ...errors import BrokenFile, FileError, text_of
from ...files.paths import FilePath
from ...files.prefetch import reading_ahead
from ...files.sinks import Sink
from ...files.spans import ByteSpan
from ...tensors.records import OpaqueTensor, Tensor, spans_of
from ...tensors.stored import StoredTensor
from ...tensors.strides import row_major
from .. import torch_legacy
from ..pickle import graph, graph_writer
from ..pickle.graph import CallNode, DictNode, ListNode, Node, PersistentNode
from ..pickle.graph_writer import below
from ..pickle.machine import PickleError
from ..pickle.torch_objects import CONSTRUCTORS, TypedStorage
from ..pickle.values import Global, Value
from . import torch_zip, torchscript
from .archive import Archive, Directory, matches, read_archive

ORDERED = Global("collections", "OrderedDict")
PARAMETER = "torch._utils._rebuild_parameter"
_REBUILT = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")


@dataclass(frozen=True, slots=True, eq=False)
class Whole:
    """A file's graph, and how its persistent ids become storages."""

    path: FilePath
    root: Value
    find: Callable[[Value], Value]

    def storage(self, node: PersistentNode) -> TypedStorage:
        """The storage that a persistent id names.  Raises BrokenFile where there is none."""
        why = "a persistent id that is no storage"
        try:
            found = node.find(node.name) if isinstance(node, PlacedStorage) else self.find(node.name)
        except ValueError as error:
            found, why = None, str(error)
        if not isinstance(found, TypedStorage):
            raise BrokenFile(self.path, f"cannot be kept whole: {why}", "leave out --whole to take the weights alone")
        return found

    def tensor(self, node: Value) -> Tensor | None:
        """The record of a node that is a plain tensor or parameter, None for anything else.  Raises BrokenFile."""
        if not isinstance(node, CallNode) or node.kind != "reduce" or not isinstance(node.args, tuple):
            return None
        if node.name in (PARAMETER, "torch._utils._rebuild_parameter_with_state"):
            return self.tensor(node.args[0]) if node.args else None
        if node.name not in _REBUILT or not isinstance(node.cls, Global):
            return None
        if node.args and isinstance(node.args[0], FreshStorage):
            return node.args[0].tensor
        try:
            args = [self.storage(arg) if isinstance(arg, PersistentNode) else _plain(arg) for arg in node.args]
            made = CONSTRUCTORS[node.cls.module, node.cls.name](*args)
        except (ValueError, TypeError, LookupError, OverflowError, PickleError) as error:
            problem = f"holds a tensor that cannot be kept whole ({text_of(error)})"
            raise BrokenFile(self.path, problem, "leave out --whole to take the weights alone") from error
        return made if isinstance(made, (StoredTensor, OpaqueTensor)) else None


def _plain(value: Value) -> Value:
    """An argument of a tensor as its constructor takes it: hooks are left aside, flags become a dict."""
    if isinstance(value, DictNode):
        return dict(value.pairs)
    return None if isinstance(value, Node) else value


def read_whole(path: FilePath) -> Whole:
    """Read a file of torch.save whole.  Raises FileError where it is none, BrokenFile where it is damaged."""
    head = path.head()
    if torch_legacy.matches(head):
        return Whole(path, *torch_legacy.read_graph(path))
    if not matches(head):
        raise FileError(path, "is no file of torch.save, and no other file can be kept whole", "leave out --whole")
    archive = read_archive(path)
    if not torch_zip.holds(archive):
        raise FileError(path, "is no file of torch.save", "only those hold more than weights that can be kept")
    if torchscript.holds(archive):
        problem = "is a TorchScript archive, whose code is no part of a file of torch.save"
        raise FileError(path, problem, "leave out --whole to take the weights alone")
    root, find = _graph_of(archive)
    return Whole(path, root, find)


def read_entry(place: ByteSpan) -> Value:
    """The graph of a file of torch.save that lies within another file; its storages know where they lie.

    Raises FileError or BrokenFile where it cannot be kept whole.
    """
    archive = read_archive(place.path, place)
    if not torch_zip.holds(archive):
        problem = f"what lies at byte {place.start:,} is no file of torch.save"
        raise FileError(place.path, problem, "leave out --whole to take the weights alone")
    return _graph_of(archive, of_its_own=True)[0]


def _graph_of(archive: Archive, *, of_its_own: bool = False) -> tuple[Value, Callable[[Value], Value]]:
    """The graph of a zip and what finds its storages; ``of_its_own`` lets each of them find itself."""
    pickle = torch_zip.main_pickle(archive)
    folder = pickle[: -len("data.pkl")]
    find = torch_zip.storages(archive, folder, lambda key: f"{folder}data/{key}")
    try:
        made = partial(PlacedStorage, find) if of_its_own else PersistentNode
        return graph.recorded(archive.read(pickle), made), find
    except PickleError as error:
        remedy = "leave out --whole to take the weights alone"
        raise BrokenFile(archive.path, f"its pickle cannot be kept whole: {error}", remedy) from error


# -- nodes that are made here


class PlacedStorage(PersistentNode):
    """A storage of a file that lies within another one; ``find`` leads from its persistent id to its place."""

    def __init__(self, find: Callable[[Value], Value], name: Value) -> None:
        super().__init__(name)
        self.find = find


class FreshStorage(PersistentNode):
    """A storage that an edit made: the bytes of a tensor, contiguous."""

    def __init__(self, tensor: Tensor, device: str) -> None:
        dtype = tensor.dtype
        cls = Global("torch", dtype.storage) if dtype.storage else Global("torch.storage", "UntypedStorage")
        count = tensor.numel if dtype.storage else tensor.nbytes
        super().__init__(("storage", cls, "", device, count))
        self.tensor = tensor


def ordered(pairs: list[tuple[Value, Value]], attributes: list[tuple[Value, Value]] | None = None) -> CallNode:
    """An OrderedDict of these pairs, with attributes where it has any."""
    made = CallNode("reduce", ORDERED, ())
    if pairs:
        made.after.append((b"u", [value for pair in pairs for value in pair]))
    if attributes is not None:
        made.after.append((b"b", [DictNode(attributes)]))
    return made


def tensor_node(tensor: Tensor, like: Value = None, *, device: str = "cpu") -> CallNode:
    """A node that rebuilds a tensor; a parameter where ``like`` is one."""
    dtype = tensor.dtype
    rebuild = Global("torch._utils", "_rebuild_tensor_v2" if dtype.storage else "_rebuild_tensor_v3")
    storage = FreshStorage(tensor, device)
    args: tuple[Value, ...] = (storage, 0, tuple(tensor.shape), row_major(tensor.shape), False, ordered([]))
    if not dtype.storage:
        args = (*args, Global("torch", dtype.name))
    made = CallNode("reduce", rebuild, args)
    if isinstance(like, CallNode) and like.name == PARAMETER and isinstance(like.args, tuple):
        return CallNode("reduce", like.cls, (made, *like.args[1:]))
    return made


def plain_node(value: Value) -> Value:
    """A value of dicts, lists, tuples, numbers and strings as a graph.

    >>> plain_node({"version": 2}).pairs
    [('version', 2)]
    """
    if isinstance(value, Mapping):
        return DictNode([(plain_node(key), plain_node(item)) for key, item in value.items()])
    if isinstance(value, list):
        return ListNode([plain_node(item) for item in value])
    if isinstance(value, tuple):
        return tuple(plain_node(item) for item in value)
    return value


def storages_of(root: Value, instead: Mapping[int, Value]) -> list[PersistentNode]:
    """Every reference to a storage in a graph, in the order in which it is written."""
    found, seen, ahead = [], set[int](), [root]
    while ahead:
        value = ahead.pop()
        value = instead.get(id(value), value)
        if not isinstance(value, (Node, tuple)) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, PersistentNode):
            found.append(value)
        ahead.extend(reversed(list(below(value))))
    return found


# -- writing


def size_of(whole: Whole, instead: Mapping[int, Value]) -> int:
    """About how many bytes :func:`write_whole` writes."""
    sizes = {tie: tensor.nbytes for tie, tensor in _records(whole, instead)[1].items()}
    return sum(sizes.values()) + 200 * len(sizes)


def write_whole(sink: Sink, whole: Whole, instead: Mapping[int, Value]) -> None:
    """Write a file anew, other nodes in place of some: its storages are copied as they lie, fresh ones computed."""
    keys, records = _records(whole, instead)
    directory = Directory()

    def literal(name: str, raw: bytes) -> None:
        sink.literal(directory.local(f"{torch_zip.ROOT}/{name}", len(raw), zlib.crc32(raw), sink.position))
        sink.literal(raw)

    literal("data.pkl", _pickled(whole, keys, instead))
    literal("byteorder", b"little")
    with reading_ahead(spans_of(records.values())):
        for index, tensor in enumerate(records.values()):
            torch_zip.write_record(sink, directory, f"{torch_zip.ROOT}/data/{index}", tensor)
    literal("version", b"3\n")
    sink.literal(directory.finish(sink.position))


def _pickled(whole: Whole, keys: Mapping[int, str], instead: Mapping[int, Value]) -> bytes:
    def name(node: PersistentNode) -> Value:
        kind, cls, _, device, count = _parts(node)
        return kind, cls, keys[id(node)], device, count

    return graph_writer.written(whole.root, name, instead)


def _parts(node: PersistentNode) -> tuple[Value, ...]:
    if not isinstance(node.name, tuple) or len(node.name) not in (5, 6):  # 6 in files of before torch 1.6
        raise ValueError("a persistent id that is no storage cannot be written")
    return node.name[:5]


def _records(whole: Whole, instead: Mapping[int, Value]) -> tuple[dict[int, str], dict[Hashable, Tensor]]:
    """The record's key for each reference (by its identity), and the records in order, as flat tensors."""
    keys: dict[int, str] = {}
    records: dict[Hashable, Tensor] = {}
    numbers: dict[Hashable, str] = {}
    for node in storages_of(whole.root, instead):
        if isinstance(node, FreshStorage):
            tie, tensor = node.tensor.tie, node.tensor
        else:
            found = whole.storage(node)
            count = found.storage.nbytes // found.dtype.itemsize
            tie, tensor = id(found.storage), StoredTensor(found.dtype, (count,), (1,), 0, found.storage)
        if tie not in numbers:
            numbers[tie] = str(len(numbers))
            records[tie] = tensor
        keys[id(node)] = numbers[tie]
    return keys, records
