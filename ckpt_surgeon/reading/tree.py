"""The object tree that a file holds: its children, its tensors, its whole modules, and what each object is.

A hostile pickle can make objects that hold themselves, or each other so often that walking them would never end:
every walk here either enters an object once or counts its steps against a :class:`Bound`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from ..errors import SelectionError, listed
from ..files.paths import FilePath
from ..formats.dcp.metadata import Pickled
from ..formats.pickle.numpy_objects import NumpyArray, NumpyScalar
from ..formats.pickle.torch_objects import TypedStorage
from ..formats.pickle.values import Global, Inline, Object, Value, spelled
from ..tensors.records import ComputedTensor, OpaqueTensor, StoredTensor, Tensor

Step = tuple[int, str]  # from a container (its identity) to a child of it
Trail = tuple[Step, ...]  # from the root of a file to one of its nodes

TENSORS = (StoredTensor, ComputedTensor, OpaqueTensor)
CONTAINERS = (dict, list, tuple, Object)
SHOWN = 80  # characters of a module's settings
DEPTH = 40  # how deep dicts may nest before they are taken for an accident
ENTRIES = 2_000_000  # how many entries a walk may meet; no pickle that is read has so many that are different
CHARACTERS = 1 << 28  # how long all keys together may be
LISTED_DEPTH = 1000
PATH = 200  # characters of a path that are shown
MANY = 16  # how many numbers or strings in a list or tuple are listed one by one
FEW = 3  # how many of more are shown
_SIMPLE = frozenset({bool, int, float, complex, str, bytes, type(None)})


class Bound:
    """What walks through one file may still spend."""

    def __init__(self, path: FilePath) -> None:
        self._path = path
        self._entries = ENTRIES
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
        yield from _made_of(node)
        for part in _parts(node):
            yield from ((spelled(name), value) for name, value in part.items())


def _made_of(node: Object) -> Iterator[tuple[str, Value]]:
    """An object's children without its attributes."""
    yield from ((spelled(key), value) for key, value in node.pairs)
    yield from ((str(index), value) for index, value in enumerate(node.items))
    for index, value in enumerate(node.args):
        if isinstance(value, (*CONTAINERS, *TENSORS)):
            yield str(index), value
    if node.state is not None and not _parts(node):
        yield "state", node.state


def _parts(node: Object) -> list[dict[Value, Value]]:
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
        for part in _parts(node):
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
    """Counts tensors and their bytes below nodes, each by itself for as long as that takes not too many steps.

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
    """Whether a node is a torch.nn.Module that was saved whole (whatever its class)."""
    return isinstance(attribute(node, "_modules"), dict) and isinstance(attribute(node, "_parameters"), dict)


def module_state(node: Value, bound: Bound, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The state_dict of a whole module, names and order as its own ``state_dict()`` gives them.

    Parameters, then persistent buffers, then sub-modules, as in ``torch.nn.Module._save_to_state_dict``; what is
    None is skipped.  A module within itself adds nothing.
    """
    within: set[int] = set()
    ahead: list[tuple[str, Value, bool]] = [(prefix, node, True)]
    while ahead:
        prefix, node, enters = ahead.pop()
        if not enters:
            within.discard(id(node))
            continue
        if id(node) in within:
            continue
        within.add(id(node))
        ahead.append((prefix, node, False))
        for name, value in _own_tensors(node):
            bound.spend(1, len(prefix) + len(name))
            yield prefix + name, value
        modules = attribute(node, "_modules")
        named = list(modules.items()) if isinstance(modules, dict) else []
        bound.spend(len(named) + 1, sum(len(prefix) + len(spelled(name)) for name, _ in named))
        ahead += [(f"{prefix}{spelled(name)}.", child, True) for name, child in reversed(named) if is_module(child)]


def _own_tensors(node: Value) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and persistent buffers."""
    transient = attribute(node, "_non_persistent_buffers_set")
    skipped = transient if isinstance(transient, (set, frozenset)) else set()
    for group in ("_parameters", "_buffers"):
        entries = attribute(node, group)
        for name, value in entries.items() if isinstance(entries, dict) else ():
            if isinstance(value, TENSORS) and name not in skipped:
                yield spelled(name), value


# -- what things are


@dataclass(frozen=True, slots=True)
class Entry:
    """One object in a file: its dotted path, its class or type, and its value where that is short."""

    path: str
    kind: str
    value: str = ""


_OF_MODULES = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"})
_PRIVATE = (Object, Global, dict)  # what is listed of a module's private attributes
_LISTED = (*_PRIVATE, list, tuple)


def entries(root: Value, limit: int = 100_000) -> Iterator[Entry]:
    """Every object in a file that is no tensor, in order; one that stands in two places is entered once.

    Plain dicts, lists and tuples are entered but not listed, except for long ones of numbers or strings.  At most
    ``limit`` objects; an entry says where more are.
    """
    seen: set[int] = set()
    ahead: list[tuple[str, Iterator[tuple[str, Value]]]] = [("", iter([("", root)]))]
    while ahead:
        above, nodes = ahead[-1]
        name, node = next(nodes, (None, None))
        if name is None:
            ahead.pop()
            continue
        if isinstance(node, TENSORS):
            continue
        path = _below(above, name)
        entered = isinstance(node, CONTAINERS) and id(node) not in seen
        fresh = entered and not (isinstance(node, Object) and id(node.state) in seen)
        if entered:
            seen.add(id(node))
        if entered and isinstance(node, (list, tuple)) and len(node) > MANY and _SIMPLE.issuperset(map(type, node)):
            limit -= 1
            yield Entry(path or ".", type(node).__name__, _few(node))
            continue
        if not isinstance(node, (dict, list, tuple)):
            limit -= 1
            if limit < 0:
                yield Entry(path or ".", "…", "more objects, which are not listed")
                return
            yield Entry(path or ".", *_named(node, fresh=fresh))
        if entered and len(ahead) < LISTED_DEPTH:
            ahead.append((path, _below_it(node, seen)))
        elif entered:
            yield Entry(path or ".", "…", "what lies deeper is not listed")


def _below(path: str, name: str) -> str:
    text = f"{path}.{name[:PATH]}" if path and name else path or name[:PATH]
    return text if len(text) <= PATH else f"…{text[-PATH:]}"


def _below_it(node: Value, seen: set[int]) -> Iterator[tuple[str, Value]]:
    """The children of a node that :func:`entries` goes through; attributes that objects share, once."""
    if not isinstance(node, Object):
        yield from children(node)
        return
    whole = is_module(node)
    yield from _made_of(node)
    for part in _parts(node):
        if id(part) not in seen:
            seen.add(id(part))
            yield from _module_children(part) if whole else children(part)


def _module_children(part: dict[Value, Value]) -> Iterator[tuple[str, Value]]:
    """A module's sub-modules, and what else it holds that is more than a setting."""
    for name, value in part.items():
        if name == "_modules" and isinstance(value, dict):
            yield from ((spelled(child), module) for child, module in value.items() if module is not None)
        elif name in ("_parameters", "_buffers") and isinstance(value, dict):  # such as an uninitialized parameter
            yield from ((spelled(child), one) for child, one in value.items() if isinstance(one, Object))
        elif name not in _OF_MODULES and isinstance(value, _LISTED if spelled(name)[:1] != "_" else _PRIVATE):
            yield spelled(name), value


def _settings(node: Value) -> str:
    """A module's own plain attributes, as ``name=value``."""
    text = ""
    for part in _parts(node) if isinstance(node, Object) else ():
        for name, value in part.items():
            if name not in _OF_MODULES and type(name) is str and not name.startswith("_"):
                if isinstance(value, (bool, int, float, str)):
                    text += f"{', ' if text else ''}{name}={_plain(value)}"
                if len(text) > SHOWN:
                    return text[:SHOWN] + " …"
    return text


def _plain(value: Value) -> str:
    return repr(value[:SHOWN]) if isinstance(value, str) else spelled(value)


def _named(node: Value, *, fresh: bool = True) -> tuple[str, str]:
    """The class of an object, and its value or, of a module that was not met before, its settings."""
    if isinstance(node, NumpyArray):
        return node.class_name, _numbers(node)
    if isinstance(node, NumpyScalar):
        return node.class_name, spelled(node.args[0])
    if is_module(node):
        return class_name(node), _settings(node) if fresh else "(as above)"
    if isinstance(node, Object):
        return class_name(node), ", ".join(_argument(arg) for arg in node.args[:3])
    if isinstance(node, Global):
        return "class or function", str(node)
    if isinstance(node, (bool, int, float, str, bytes, Inline, TypedStorage, type(None))):
        kind, _, value = describe(node).partition(" ")
        return (kind, value) if value else (type(node).__name__.removesuffix("Type"), kind)
    return type(node).__name__, _few(node) if isinstance(node, (set, frozenset)) else ""


def _few(node: Collection[Value]) -> str:
    """A collection's size and first elements."""
    shown = ", ".join(_argument(value) for value in islice(node, FEW))
    return f"{len(node):,} ({shown}{', …' if len(node) > FEW else ''})" if shown else "empty"


def class_name(node: Value) -> str:
    """The class or function that made an object, as the pickle names it."""
    return node.class_name if isinstance(node, Object) else type(node).__name__


def _numbers(node: NumpyArray) -> str:
    if node.tensor is None:
        return f"objects, {len(node.items):,}" if node.items else ""
    return f"{node.tensor.dtype} {list(node.tensor.shape)}"


def _argument(value: Value) -> str:
    return describe(value) if not isinstance(value, (dict, list, tuple, set, frozenset)) else type(value).__name__


def describe(value: Value, *, training: bool = False) -> str:
    """What a value is, in a few words: numbers and strings are shown, objects named by their class."""
    if value is None or isinstance(value, bool):
        return str(value)
    if isinstance(value, int):
        return f"int {value}" if value.bit_length() < 256 else f"int of {value.bit_length():,} bits"
    if isinstance(value, (float, complex)):
        return f"{type(value).__name__} {value:g}"
    if isinstance(value, (str, bytes)):
        return f"{type(value).__name__} {value[:40]!r}" + (" …" if len(value) > 40 else "")
    if isinstance(value, TENSORS):
        return f"tensor {value.dtype} {list(value.shape)}"
    if isinstance(value, NumpyScalar):
        return f"{value.class_name} {spelled(value.args[0])}"
    if isinstance(value, NumpyArray):
        return f"numpy.ndarray {_numbers(value)}".rstrip()
    if isinstance(value, Object):
        return f"{'module' if is_module(value) else 'object'} of class {value.class_name}"
    if isinstance(value, Global):
        return f"class {value}"
    if isinstance(value, Pickled):
        return f"pickle of {len(value):,} bytes"
    if isinstance(value, Inline):
        return f"bytes of {len(value):,}"
    if isinstance(value, TypedStorage):
        return f"storage of {value.storage.nbytes:,} bytes ({value.dtype})"
    if isinstance(value, dict):
        inside = [key for key in islice(value, 3) if isinstance(key, str)]
        more = f" and {len(value) - 3:,} more" if len(value) > 3 else ""
        kind = "training state" if training else "dict"
        return f"{kind} of {len(value):,}" + (f" ({listed(inside)}{more})" if inside else "")
    if isinstance(value, (list, tuple, set, frozenset)):
        return f"{type(value).__name__} of {len(value):,}"
    return type(value).__name__
