"""The tree of objects that a file holds: its children, its tensors, its whole modules.

A hostile pickle can make objects that hold themselves, or each other so often that walking them would never end:
every walk here either enters an object once or counts its steps against a :class:`Bound`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..errors import SelectionError
from ..files.paths import FilePath
from ..formats.pickle.values import Object, Value, spelled
from ..tensors.records import ComputedTensor, OpaqueTensor
from ..tensors.stored import StoredTensor
from .module_classes import has_own_state

Step = tuple[int, str]  # from a container (its identity) to a child of it
Trail = tuple[Step, ...]  # from the root of a file to one of its nodes

TENSORS = (StoredTensor, ComputedTensor, OpaqueTensor)
CONTAINERS = (dict, list, tuple, Object)
DEPTH = 40  # how deep dicts may nest before they are taken for an accident
ENTRIES = 2_000_000  # how many entries a walk may meet; no pickle that is read has so many that are different
SHARED = 64  # how often a walk may meet an entry on average: what has several names is met under each
FEW = 10_000  # entries that a walk may meet in any file
CHARACTERS = 1 << 28  # how long all keys together may be


class Bound:
    """What walks through one file may still spend: a multiple of the entries that are there below its root."""

    def __init__(self, path: FilePath, root: Value) -> None:
        self._path = path
        self._entries = min(FEW + SHARED * _entries_below(root, ENTRIES // SHARED), ENTRIES)
        self._characters = CHARACTERS

    def spend(self, entries: int, characters: int) -> None:
        """Raises SelectionError when too much is spent: objects that name each other have no end."""
        self._entries -= entries
        self._characters -= characters
        if self._entries < 0 or self._characters < 0:
            raise SelectionError(self._path, "has dicts or modules in each other almost without end")


def children(node: Value) -> Iterator[tuple[str, Value]]:
    """The named children of a dict, list, tuple or object (its items, its entries, what it was made of, its state)."""
    if isinstance(node, dict):
        yield from ((key if type(key) is str else spelled(key), value) for key, value in node.items())
    elif isinstance(node, (list, tuple)):
        yield from ((str(index), value) for index, value in enumerate(node))
    elif isinstance(node, Object):
        yield from own_children(node)
        for part in attribute_dicts(node):
            yield from ((spelled(name), value) for name, value in part.items())


def own_children(node: Object) -> Iterator[tuple[str, Value]]:
    """An object's children without its attributes."""
    yield from ((spelled(key), value) for key, value in node.pairs)
    yield from ((str(index), value) for index, value in enumerate(node.items))
    for index, value in enumerate(node.args):
        if isinstance(value, (*CONTAINERS, *TENSORS)):
            yield str(index), value
    if node.state is not None and not attribute_dicts(node):
        yield "state", node.state


def attribute_dicts(node: Object) -> list[dict[Value, Value]]:
    """The dicts that an object's attributes are in: one, or one and another of slots."""
    state = node.state
    if isinstance(state, dict):
        return [state]
    if isinstance(state, tuple) and len(state) == 2 and all(isinstance(part, (dict, type(None))) for part in state):
        return [part for part in state if isinstance(part, dict)]
    return []


def followed(root: Value, path: str) -> tuple[Value, Trail] | None:
    """The node at a dotted path, and the way to it; names may have dots themselves."""
    ahead: list[tuple[Value, str, Trail]] = [(root, path, ())]
    tried: set[tuple[int, int]] = set()
    while ahead:
        node, rest, trail = ahead.pop()
        if not rest:
            return node, trail
        if (id(node), len(rest)) in tried:
            continue
        tried.add((id(node), len(rest)))
        fitting = [
            (child, rest[len(name) + 1 :], (*trail, (id(node), name)))
            for name, child in children(node)
            if rest == name or rest.startswith(name + ".")
        ]
        ahead.extend(reversed(fitting))
    return None


def attribute(node: Value, name: str) -> Value:
    """One attribute of an object, None where it has none of that name."""
    if isinstance(node, Object):
        for part in attribute_dicts(node):
            if name in part:
                return part[name]
    return None


def _contents(node: Value) -> Iterable[Value]:
    """What a container refers to; an object refers to its state whole, which other objects may share."""
    if isinstance(node, dict):
        return node.values()
    if isinstance(node, Object):
        return [*(value for _, value in node.pairs), *node.items, *node.args, node.state]
    return node if isinstance(node, (list, tuple)) else ()


class Weights:
    """Counts tensors and their bytes below nodes, each node by itself while the steps last.

    After those, a container that was met below another node is not counted again.
    """

    def __init__(self) -> None:
        self._steps = ENTRIES
        self._seen: set[int] = set()

    def of(self, node: Value) -> tuple[int, int]:
        """Tensors and bytes below a node."""
        tensors = nbytes = 0
        seen = set[int]() if self._steps > 0 else self._seen
        ahead = [node]
        while ahead:
            node = ahead.pop()
            self._steps -= 1
            if isinstance(node, TENSORS):
                tensors, nbytes = tensors + 1, nbytes + node.nbytes
            elif isinstance(node, CONTAINERS) and id(node) not in seen:
                seen.add(id(node))
                ahead.extend(_contents(node))
        self._seen |= seen
        return tensors, nbytes


def _entries_below(root: Value, most: int) -> int:
    """How many entries the containers below a node have, each container counted once; about ``most`` if more."""
    count = 0
    seen: set[int] = set()
    ahead = [root]
    while ahead and count < most:
        node = ahead.pop()
        if isinstance(node, CONTAINERS) and id(node) not in seen:
            seen.add(id(node))
            contents = list(_contents(node))
            count += len(contents)
            ahead.extend(contents)
    return count


def holders(root: Value) -> set[int]:
    """The identities of all containers with a tensor somewhere below."""
    above: dict[int, list[int]] = {}
    found: list[int] = []
    seen: set[int] = set()
    ahead = [root]
    while ahead:
        node = ahead.pop()
        if id(node) in seen or not isinstance(node, CONTAINERS):
            continue
        seen.add(id(node))
        direct = False
        for child in _contents(node):
            if isinstance(child, TENSORS):
                direct = True
            elif isinstance(child, CONTAINERS):
                above.setdefault(id(child), []).append(id(node))
                ahead.append(child)
        if direct:
            found.append(id(node))
    holding = set(found)
    while found:
        for parent in above.get(found.pop(), ()):
            if parent not in holding:
                holding.add(parent)
                found.append(parent)
    return holding


def is_mapping(node: Value) -> bool:
    """Whether a node is a dict, of its own class or one that was saved with its class."""
    return isinstance(node, dict) or (isinstance(node, Object) and bool(node.pairs))


# -- whole modules


def is_module(node: Value) -> bool:
    """Whether a node is a torch.nn.Module that was saved whole, by its attributes or, of some of torch's, its class."""
    if isinstance(attribute(node, "_modules"), dict) and isinstance(attribute(node, "_parameters"), dict):
        return True
    return isinstance(node, Object) and has_own_state(node.class_name)
