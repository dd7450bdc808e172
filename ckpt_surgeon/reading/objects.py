"""What each object in a file is: its class, its value, and the list of all objects that are no tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice

from ..errors import listed
from ..formats.pickle.numpy_objects import NumpyArray, NumpyScalar
from ..formats.pickle.torch_objects import TypedStorage
from ..formats.pickle.values import Global, Inline, Object, Pickled, Value, spelled
from .tree import CONTAINERS, TENSORS, attribute_dicts, children, is_module, own_children

SHOWN = 80  # characters of a module's settings
LISTED_DEPTH = 1000
PATH = 200  # characters of a path that are shown
MANY = 16  # how many numbers or strings in a list or tuple are listed one by one
FEW = 3  # how many of more are shown
_SIMPLE = frozenset({bool, int, float, complex, str, bytes, type(None)})


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
    """Every object in a file that is no tensor, in order; an object with several paths is entered once.

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
        path = _joined_path(above, name)
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
            yield Entry(path or ".", *_kind_and_value(node, fresh=fresh))
        if entered and len(ahead) < LISTED_DEPTH:
            ahead.append((path, _listed_children(node, seen)))
        elif entered:
            yield Entry(path or ".", "…", "what lies deeper is not listed")


def _joined_path(path: str, name: str) -> str:
    text = f"{path}.{name[:PATH]}" if path and name else path or name[:PATH]
    return text if len(text) <= PATH else f"…{text[-PATH:]}"


def _listed_children(node: Value, seen: set[int]) -> Iterator[tuple[str, Value]]:
    """The children of a node that :func:`entries` goes through; attributes that objects share, once."""
    if not isinstance(node, Object):
        yield from children(node)
        return
    whole = is_module(node)
    yield from own_children(node)
    for part in attribute_dicts(node):
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
    for part in attribute_dicts(node) if isinstance(node, Object) else ():
        for name, value in part.items():
            if name not in _OF_MODULES and type(name) is str and not name.startswith("_"):
                if isinstance(value, (bool, int, float, str)):
                    text += f"{', ' if text else ''}{name}={_plain(value)}"
                if len(text) > SHOWN:
                    return text[:SHOWN] + " …"
    return text


def _plain(value: Value) -> str:
    return repr(value[:SHOWN]) if isinstance(value, str) else spelled(value)


def _kind_and_value(node: Value, *, fresh: bool = True) -> tuple[str, str]:
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
