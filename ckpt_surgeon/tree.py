"""The object tree that a file holds: its children, its tensors, its whole modules, and what each object is.

A hostile pickle can make objects that hold themselves or each other a million times, so every walk here enters an
object once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .errors import listed
from .formats.unpickle import Global, Object, Value
from .tensors import ComputedTensor, OpaqueTensor, StoredTensor, Tensor

TENSORS = (StoredTensor, ComputedTensor, OpaqueTensor)
SHOWN = 80  # characters of a module's settings
DEPTH = 40  # how deep modules or dicts may nest before they are taken for an accident


def children(node: Value) -> Iterator[tuple[str, Value]]:
    """The named children of a dict, list, tuple or object (its items, its entries, its attributes)."""
    if isinstance(node, dict):
        yield from ((key if type(key) is str else str(key), value) for key, value in node.items())
    elif isinstance(node, (list, tuple)):
        yield from ((str(index), value) for index, value in enumerate(node))
    elif isinstance(node, Object):
        yield from ((str(key), value) for key, value in node.pairs)
        yield from ((str(index), value) for index, value in enumerate(node.items))
        yield from attributes(node).items()


def attributes(node: Object) -> dict[str, Value]:
    """An object's attributes, from its state: a dict, or a dict and one of slots."""
    parts = node.state if isinstance(node.state, tuple) else (node.state,)
    found: dict[str, Value] = {}
    for part in parts:
        if isinstance(part, dict):
            found |= {str(name): value for name, value in part.items()}
    return found


def tensors_below(node: Value) -> Iterator[Tensor]:
    """The tensors below a node."""
    seen: set[int] = set()
    ahead = [node]
    while ahead:
        node = ahead.pop()
        if isinstance(node, TENSORS):
            yield node
        elif isinstance(node, (dict, list, tuple, Object)) and id(node) not in seen:
            seen.add(id(node))
            ahead.extend(reversed([child for _, child in children(node)]))


def holds_tensors(node: Value) -> bool:
    """Whether there is any tensor below a node."""
    return next(tensors_below(node), None) is not None


# -- whole modules


def is_module(node: Value) -> bool:
    """Whether a node is a torch.nn.Module that was saved whole (whatever its class)."""
    if not isinstance(node, Object):
        return False
    state = attributes(node)
    return isinstance(state.get("_modules"), dict) and isinstance(state.get("_parameters"), dict)


def module_state(node: Value) -> dict[str, Tensor]:
    """The state_dict of a whole module, names and order as its own ``state_dict()`` gives them.

    Parameters, then persistent buffers, then sub-modules, as in ``torch.nn.Module._save_to_state_dict``; what is
    None is skipped.  A module within itself adds nothing.
    """
    found: dict[str, Tensor] = {}
    _add_module(found, node, "", ())
    return found


def _add_module(found: dict[str, Tensor], node: Value, prefix: str, within: tuple[int, ...]) -> None:
    if not isinstance(node, Object) or id(node) in within or len(within) > DEPTH:
        return
    state = attributes(node)
    transient = state.get("_non_persistent_buffers_set")
    skipped = transient if isinstance(transient, (set, frozenset)) else set()
    for group in ("_parameters", "_buffers"):
        entries = state.get(group)
        for name, value in entries.items() if isinstance(entries, dict) else ():
            if isinstance(value, TENSORS) and name not in skipped:
                found[f"{prefix}{name}"] = value
    modules = state.get("_modules")
    for name, child in modules.items() if isinstance(modules, dict) else ():
        if is_module(child):
            _add_module(found, child, f"{prefix}{name}.", (*within, id(node)))


# -- what things are


@dataclass(frozen=True, slots=True)
class Entry:
    """One object in a file: its dotted path, its class or type, and its value where that is short."""

    path: str
    kind: str
    value: str = ""


def entries(root: Value, limit: int = 100_000) -> Iterator[Entry]:
    """Every object in a file that is no tensor, in order; one that stands in two places is entered once.

    Plain dicts, lists and tuples are entered but not listed.  At most ``limit`` objects.
    """
    seen: set[int] = set()
    ahead: list[tuple[str, Value]] = [("", root)]
    while ahead and limit:
        path, node = ahead.pop()
        if isinstance(node, TENSORS):
            continue
        if is_module(node) and isinstance(node, Object):
            limit -= 1
            yield Entry(path or ".", node.class_name, _settings(node))
            if id(node) not in seen:
                seen.add(id(node))
                ahead.extend(reversed([(_below(path, name), child) for name, child in _module_children(node)]))
            continue
        container = isinstance(node, (dict, list, tuple, Object))
        if not container or isinstance(node, Object):
            limit -= 1
            yield Entry(path or ".", *_named(node))
        if container and id(node) not in seen:
            seen.add(id(node))
            ahead.extend(reversed([(_below(path, name), child) for name, child in children(node)]))


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _settings(node: Object) -> str:
    """A module's own plain attributes, as ``name=value``."""
    plain = (bool, int, float, str)
    shown = [
        f"{name}={value!r}"
        for name, value in attributes(node).items()
        if not name.startswith("_") and isinstance(value, plain) and name != "training"
    ]
    text = ", ".join(shown)
    return text if len(text) <= SHOWN else text[:SHOWN] + " …"


def _module_children(node: Object) -> Iterator[tuple[str, Value]]:
    """A module's sub-modules, and what else it holds that is more than a setting."""
    for name, value in attributes(node).items():
        if name == "_modules" and isinstance(value, dict):
            yield from ((str(child), module) for child, module in value.items() if module is not None)
        elif not name.startswith("_") and isinstance(value, (Object, Global, dict, list)):
            yield name, value


def _named(node: Value) -> tuple[str, str]:
    if isinstance(node, Object):
        shown = ", ".join(_argument(arg) for arg in node.args[:3])
        return node.class_name, shown
    if isinstance(node, Global):
        return "class or function", str(node)
    if isinstance(node, (bool, int, float, str, bytes, type(None))):
        kind, _, value = describe(node).partition(" ")
        return (kind, value) if value else (type(node).__name__.removesuffix("Type"), kind)
    return type(node).__name__, ""


def _argument(value: Value) -> str:
    return describe(value) if not isinstance(value, (dict, list, tuple, set, frozenset)) else type(value).__name__


def describe(value: Value, *, training: bool = False) -> str:
    """What a value is, in a few words: numbers and strings are shown, objects named by their class."""
    if value is None or isinstance(value, bool):
        return str(value)
    if isinstance(value, int):
        return f"int {value}" if value.bit_length() < 256 else f"int of {value.bit_length():,} bits"
    if isinstance(value, float):
        return f"float {value:g}"
    if isinstance(value, (str, bytes)):
        return f"{type(value).__name__} {value[:40]!r}" + (" …" if len(value) > 40 else "")
    if isinstance(value, TENSORS):
        return f"tensor {value.dtype} {list(value.shape)}"
    if isinstance(value, Object):
        return f"{'module' if is_module(value) else 'object'} of class {value.class_name}"
    if isinstance(value, Global):
        return f"class {value}"
    if isinstance(value, dict):
        inside = [key for key in value if isinstance(key, str)]
        kind = "training state" if training else "dict"
        return f"{kind} of {len(value):,}" + (f" ({listed(inside, 3)})" if inside else "")
    if isinstance(value, (list, tuple, set, frozenset)):
        return f"{type(value).__name__} of {len(value):,}"
    return type(value).__name__
