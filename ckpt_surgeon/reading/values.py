"""Values that a file holds beside its weights: the epoch, a learning rate, an argument.

Nothing of a file is made here but plain data.  An object of any class stays an :class:`Inert`: the name of its class,
its arguments and its attributes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from ..errors import SelectionError
from ..files.spans import ByteSpan
from ..formats.pickle.numpy_objects import NumpyArray, NumpyScalar
from ..formats.pickle.values import Global, Inline, Object, spelled
from ..tensors.checkpoint import Checkpoint
from ..tensors.records import Tensor
from ..text import Shown
from .objects import describe
from .tree import DEPTH, children, followed

SIMPLE = (bool, int, float, complex, str, bytes, type(None))
Plain: TypeAlias = object  # numbers, texts, None, tensors, Inert objects, and lists, tuples and dicts of them


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Inert(Shown, Mapping[str, object]):
    """An object of a file that was not made, since its class would have to be imported for that.

    A mapping from the names of its attributes and items to their values; ``arguments`` are the plain ones that its
    class would have been called with.

    >>> Inert("argparse.Namespace", {"lr": 0.1})["lr"]
    0.1
    """

    class_name: str
    entries: Mapping[str, object] = field(default_factory=dict)
    arguments: tuple[object, ...] = ()

    def __getitem__(self, name: str) -> object:
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def value_at(checkpoint: Checkpoint, path: str) -> object:
    """The value at a dotted path in the file that a checkpoint was opened from; see :meth:`Checkpoint.value`."""
    where = checkpoint.path if checkpoint.path is not None else "a checkpoint in memory"
    if checkpoint.root is None:
        raise SelectionError(where, f"has nothing at {path!r}: it holds its tensors alone")
    found = followed(checkpoint.root, path)
    if found is None:
        above = followed(checkpoint.root, path.rpartition(".")[0])
        names = [name for name, _ in children(above[0])] if above is not None else []
        there = [name for name in names if len(name) <= 80][:20]
        raise SelectionError(where, f"has nothing at {path!r}", there)
    return _Reader(where if isinstance(where, str) else str(where)).plain(found[0])


class _Reader:
    """Makes plain data of nodes; each node once, so that what holds itself has an end."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._made: dict[int, object] = {}

    def plain(self, node: object, depth: int = 0) -> object:
        if isinstance(node, (*SIMPLE, Tensor)):
            return node
        if depth > DEPTH:
            raise SelectionError(self._where, "has values in values without end")
        if id(node) not in self._made:
            self._made[id(node)] = self._of(node, depth + 1)
        return self._made[id(node)]

    def _of(self, node: object, depth: int) -> object:
        if isinstance(node, dict):
            made: dict[object, object] = {}
            self._made[id(node)] = made
            made |= {_key(key): self.plain(value, depth) for key, value in node.items()}
            return made
        if isinstance(node, list):
            values: list[object] = []
            self._made[id(node)] = values
            values += [self.plain(value, depth) for value in node]
            return values
        if isinstance(node, (tuple, set, frozenset)):
            return tuple(self.plain(value, depth) for value in node)
        if isinstance(node, NumpyScalar):
            return node.args[0]
        if isinstance(node, NumpyArray) and node.tensor is not None:
            return node.tensor
        if isinstance(node, Global):
            return str(node)
        if isinstance(node, Inline):
            return b"".join(ByteSpan(node.path, node.start, node.stop).blocks())
        return self._inert(node, depth)

    def _inert(self, node: object, depth: int) -> Inert:
        if not isinstance(node, Object):
            return Inert(type(node).__name__, {}, (describe(node),))
        entries: dict[str, object] = {}
        made = Inert(node.class_name, entries, tuple(arg for arg in node.args if isinstance(arg, SIMPLE)))
        self._made[id(node)] = made
        entries |= {name: self.plain(value, depth) for name, value in children(node)}
        return made


def _key(key: object) -> object:
    return key if isinstance(key, SIMPLE) else spelled(key)
