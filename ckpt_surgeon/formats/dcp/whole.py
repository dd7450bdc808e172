"""A distributed checkpoint with everything in it: its entries as a graph, and a graph as entries again.

A distributed checkpoint is flat: ``torch/distributed/checkpoint/_nested_dict.py`` cuts dicts, and lists that hold
tensors, into entries, each a tensor in pieces or a file of torch.save.  The graph puts them together, as
:mod:`ckpt_surgeon.formats.zip.whole` has it of a zip; so a run goes from one container to the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

from ...errors import EditError, FileError
from ...files.local import LocalPath
from ...files.sinks import MemorySink
from ...files.spans import ByteSpan
from ...tensors.records import OpaqueTensor, Tensor
from ...tensors.stored import StoredTensor
from ..pickle.graph import CallNode, DictNode, ListNode
from ..pickle.values import Pickled, Value
from ..zip.whole import Whole, read_entry, tensor_node, write_whole
from .metadata import read_entries

Path = tuple[str | int, ...]


# -- reading


def read_whole_folder(path: LocalPath) -> Whole:
    """The graph of a distributed checkpoint; ``path`` is that of its ``.metadata``, or its folder.

    Raises what :func:`ckpt_surgeon.formats.dcp.metadata.read` raises, and FileError for what cannot be kept whole.
    """
    folder = path if path.is_dir() else path.parent
    root = DictNode()
    known: dict[Path, Value] = {(): root}
    for key, (steps, entry) in read_entries(folder / ".metadata").items():
        _put(known, steps, _node(folder, key, entry))
    return Whole(folder, _with_lists(root), _no_storage)


def _no_storage(name: Value) -> Value:
    raise ValueError("a storage outside of every entry")


def _node(folder: LocalPath, key: str, entry: Value) -> Value:
    if isinstance(entry, Pickled):
        return read_entry(ByteSpan(entry.path, entry.start, entry.stop))
    if isinstance(entry, StoredTensor):
        return tensor_node(entry)
    kind = entry.kind if isinstance(entry, OpaqueTensor) else type(entry).__name__
    raise FileError(folder, f"{key!r} ({kind}) cannot be kept whole", "leave out --whole to take the weights alone")


def _put(known: dict[Path, Value], steps: Path, value: Value) -> None:
    """Put a value at its place, and dicts on the way there."""
    missing: list[tuple[Path, Value]] = [(steps, value)]
    while steps[:-1] not in known:
        steps = steps[:-1]
        known[steps] = made = DictNode()
        missing.append((steps, made))
    for at, below in reversed(missing):
        above = known[at[:-1]]
        assert isinstance(above, DictNode)  # two entries at one place were refused before
        above.pairs.append((at[-1], below))


def _with_lists(root: DictNode) -> DictNode:
    """Lists where the steps were numbers, and an optimizer's ids as numbers: torch writes keys of dicts as text."""
    found = [root]
    for node in found:  # grows on the way
        found += [below for _, below in node.pairs if isinstance(below, DictNode)]
    for node in reversed(found):
        node.pairs = [(key, _list_or_dict(value)) for key, value in node.pairs]
        names = [name for name, _ in node.pairs]
        if "state" in names and "param_groups" in names:
            node.pairs = [(key, _with_numbers(value) if key == "state" else value) for key, value in node.pairs]
    return root


def _list_or_dict(node: Value) -> Value:
    if isinstance(node, DictNode) and node.pairs and {key for key, _ in node.pairs} == set(range(len(node.pairs))):
        return ListNode([value for _, value in sorted(node.pairs, key=lambda pair: pair[0])])  # type: ignore[arg-type,return-value]
    return node


def _with_numbers(state: Value) -> Value:
    if isinstance(state, ListNode):  # as torch before 2.4 wrote it
        return DictNode(list(enumerate(state.items)))
    if isinstance(state, DictNode) and all(isinstance(key, str) and key.isdecimal() for key, _ in state.pairs):
        return DictNode([(int(str(key)), value) for key, value in state.pairs])
    return state


# -- writing


@dataclass(slots=True, eq=False)
class Entries:
    """A graph as entries of a distributed checkpoint: tensors, what makes the files of all others, the path of each."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    pickled: dict[str, Callable[[], bytes]] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)


def entries_of(whole: Whole, instead: Mapping[int, Value]) -> Entries:
    """The entries of a graph, other nodes in place of some, as torch's ``flatten_state_dict`` has them.

    Raises EditError for a root that is no dict and for two entries of one name.
    """
    root = instead.get(id(whole.root), whole.root)
    if (pairs := _pairs(root)) is None:
        raise EditError([f"{whole.path}: only a dict can be written as a distributed checkpoint"])
    made = Entries()
    for key, value in pairs:
        for path, leaf in _flattened((str(key),), value, whole, instead):
            name = ".".join(map(str, path))
            if name in made.paths:
                raise EditError([f"two entries would both be {name!r} in a distributed checkpoint"])
            made.paths[name] = path
            tensor = whole.tensor(leaf)
            if tensor is not None:
                made.tensors[name] = tensor
            else:
                made.pickled[name] = partial(_file_of, whole, leaf, instead)
    return made


def _pairs(node: Value) -> list[tuple[Value, Value]] | None:
    """The entries of a mapping; None for anything else."""
    if isinstance(node, DictNode):
        return node.pairs
    if isinstance(node, CallNode) and (node.name.endswith("Dict") or any(code == b"u" for code, _ in node.after)):
        return node.pairs
    return None


def _flattened(path: Path, node: Value, whole: Whole, instead: Mapping[int, Value]) -> Iterator[tuple[Path, Value]]:
    node = instead.get(id(node), node)
    if (pairs := _pairs(node)) is not None:
        for key, value in pairs:
            yield from _flattened((*path, str(key)), value, whole, instead)
    elif isinstance(node, ListNode) and not _is_terminal(node, whole, instead):
        for index, value in enumerate(node.items):
            yield from _flattened((*path, index), value, whole, instead)
    else:
        yield path, node


def _is_terminal(node: Value, whole: Whole, instead: Mapping[int, Value]) -> bool:
    """Whether torch takes a value as one entry: anything but dicts, and lists with dicts or tensors in them."""
    node = instead.get(id(node), node)
    if _pairs(node) is not None:
        return False
    if not isinstance(node, ListNode):
        return True
    return all(whole.tensor(item) is None and _is_terminal(item, whole, instead) for item in node.items)


def _file_of(whole: Whole, leaf: Value, instead: Mapping[int, Value]) -> bytes:
    """The file of torch.save that holds one entry."""
    sink = MemorySink()
    write_whole(sink, Whole(whole.path, leaf, whole.find), instead)
    return bytes(sink.made)
