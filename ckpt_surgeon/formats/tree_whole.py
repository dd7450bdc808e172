"""A checkpoint that was put together out of many files as a graph, so that all of it can be written as one file."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from ..errors import FileError
from ..files.paths import FilePath
from ..tensors.records import ComputedTensor, OpaqueTensor
from ..tensors.stored import StoredTensor
from .pickle.graph import CallNode, DictNode, ListNode
from .pickle.values import Ordered, Value
from .zip.whole import Whole, ordered, plain_node, tensor_node


@dataclass(slots=True)
class _Nodes:
    """The nodes of a tree: one for each tensor, however many names it has, and the paths of what was left out."""

    path: FilePath
    tensors: dict[Hashable, CallNode] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    def of(self, value: Value, path: str) -> Value:
        """Raises FileError for a tensor that has no plain elements."""
        if isinstance(value, (StoredTensor, ComputedTensor)):
            return self.tensors.setdefault(value.tie, tensor_node(value))
        if isinstance(value, OpaqueTensor):
            raise FileError(self.path, f"{path!r} ({value.kind}) cannot be kept whole",
                            "leave out --whole to take the weights alone")  # fmt: skip
        if isinstance(value, dict):
            pairs = [(key, self.of(below, f"{path}.{key}" if path else str(key))) for key, below in value.items()
                     if self._is_kept(below, f"{path}.{key}" if path else str(key))]  # fmt: skip
            if not isinstance(value, Ordered):
                return DictNode(pairs)
            attributes = value.attributes if isinstance(value.attributes, dict) else None
            named = [(name, plain_node(below)) for name, below in attributes.items()] if attributes else None
            return ordered(pairs, named)
        if isinstance(value, (list, tuple)):
            items = [self.of(below, f"{path}.{index}") for index, below in enumerate(value)]
            return ListNode(items) if isinstance(value, list) else tuple(items)
        return value if _is_plain(value) else None

    def _is_kept(self, value: Value, path: str) -> bool:
        kept = _is_plain(value) or isinstance(value, (dict, list, tuple, StoredTensor, ComputedTensor, OpaqueTensor))
        if not kept:
            self.left.append(path)
        return kept


def _is_plain(value: Value) -> bool:
    return value is None or isinstance(value, (bool, int, float, complex, str, bytes))


def whole_of(path: FilePath, root: Value) -> tuple[Whole, tuple[str, ...]]:
    """The graph of a tree, and the paths of objects in it that are no plain data and are left out.

    Raises FileError for a tensor that has no plain elements.
    """
    nodes = _Nodes(path)
    return Whole(path, nodes.of(root, ""), _no_storage), tuple(nodes.left)


def _no_storage(name: Value) -> Value:
    raise ValueError("a storage outside of every file")
