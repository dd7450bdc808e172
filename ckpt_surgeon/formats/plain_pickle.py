"""Plain pickles (``pickle.dump``) of numpy arrays or torch tensors, by Python 2 or 3, in any protocol.

Arrays and the bytes of tensors that are long stay in the file.  Tensors come as ``torch.storage._load_from_bytes``:
a legacy save of one storage inside the pickle.
"""

from __future__ import annotations

import mmap
import re
from functools import partial

from ..errors import BrokenFile
from ..files.fetched import retry_with_more
from ..files.paths import FilePath
from . import torch_legacy
from .contents import Contents
from .payloads import names_in_loads
from .pickle import numpy_objects, torch_objects
from .pickle.machine import Load, PickleError, Unpickled
from .pickle.numpy_objects import NumpyArray
from .pickle.unpickler import Unpickler
from .pickle.values import Global, Inline, Object, Value

CONTAINER = "pickle"

# How pickles begin: a protocol, or (in protocols 0 and 1, which do not say theirs) a dict, a list, a call.
_START = re.compile(
    rb"""\x80[\1-\5] | [}\]]q\0 | \([dl](?:p\d+\n|q\0|[SVUXILKJMFG(.])
    | \(*c[\w.]+\n[\w.]+\n(?:p\d+\n|q\0|[(\)R]) | \(i[\w.]+\n[\w.]+\n""",
    re.VERBOSE | re.DOTALL,
)


def matches(head: bytes) -> bool:
    """Whether a file begins like a pickle."""
    return _START.match(head) is not None


def read(path: FilePath, *, salvage: bool = False) -> Contents:
    """Read a plain pickle.  Raises BrokenFile when it is damaged or truncated."""
    with path.mapped() as data:
        try:
            made = retry_with_more(data, lambda: load(path, data), (PickleError, BrokenFile))
        except PickleError as error:
            raise BrokenFile(path, f"is a truncated or damaged pickle: {error}", "fetch it again") from error
    inside = partial(names_in_loads, path, made.loads)
    return Contents(path, CONTAINER, arrays_as_tensors(made.root), globals=made.globals, globals_inside=inside)


def load(path: FilePath, data: bytes | mmap.mmap, start: int = 0) -> Unpickled:
    """Read the pickle that begins at ``start``, inertly; arrays come as :class:`NumpyArray`.

    Long byte strings stay in the file where ``data`` is its mapping.  Raises PickleError, BrokenFile.
    """
    nested = _Nested(path, data)
    constructors = (
        torch_objects.CONSTRUCTORS | numpy_objects.CONSTRUCTORS | {("torch.storage", "_load_from_bytes"): nested.load}
    )
    machine = Unpickler(data, path=path if isinstance(data, mmap.mmap) else None, constructors=constructors)
    made = machine.unpickled(start)
    names = dict.fromkeys((*made.globals, *nested.globals))
    return made._replace(globals=tuple(names), loads=(*made.loads, *nested.loads))


class _Nested:
    """Reads the saves of storages inside a pickle: each of their bytes once."""

    def __init__(self, path: FilePath, data: bytes | mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._left = len(data)
        self.globals: dict[Global, None] = {}
        self.loads: list[Load] = []

    def load(self, raw: Value) -> Value:
        """torch.storage._load_from_bytes."""
        if not isinstance(raw, (bytes, Inline)):
            raise ValueError("a storage without bytes")
        self._left -= len(raw)
        if self._left < 0:
            raise ValueError("the same storage is read again and again")
        data, start = (self._data, raw.start) if isinstance(raw, Inline) else (raw, 0)
        made = torch_legacy.read_object(self._path, data, start=start, stop=start + len(raw))
        self.globals.update(dict.fromkeys(made.globals))
        self.loads += made.loads
        return made.root


def arrays_as_tensors(root: Value) -> Value:
    """Put the tensor that an array is in its place: in dicts and lists, objects, and the tuples that stand there."""
    root = _array_as_tensor(root)
    seen: set[int] = set()
    ahead = [root]
    while ahead:
        node = ahead.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, dict):
            node.update({key: _array_as_tensor(value) for key, value in node.items()})
            ahead.extend(node.values())
        elif isinstance(node, list):
            node[:] = map(_array_as_tensor, node)
            ahead.extend(node)
        elif isinstance(node, tuple):
            ahead.extend(node)
        elif isinstance(node, Object):
            node.pairs[:] = [(key, _array_as_tensor(value)) for key, value in node.pairs]
            ahead += [node.state, node.items, *(value for _, value in node.pairs)]
    return root


def _array_as_tensor(value: Value) -> Value:
    if isinstance(value, NumpyArray):
        return value.tensor or value
    if isinstance(value, tuple) and NumpyArray in map(type, value):
        return tuple(one.tensor or one if isinstance(one, NumpyArray) else one for one in value)
    return value
