"""Plain pickles (``pickle.dump``) of numpy arrays or torch tensors, by Python 2 or 3, in any protocol.

Arrays and the bytes of tensors that are long stay in the file.  Tensors come as ``torch.storage._load_from_bytes``:
a legacy save of one storage inside the pickle.
"""

from __future__ import annotations

import mmap
from pathlib import Path

from ..errors import BrokenFile
from . import numpy_objects, torch_legacy, torch_objects
from .contents import Contents
from .numpy_objects import NumpyArray
from .unpickle import Inline, PickleError, Unpickler, Value

CONTAINER = "pickle"

_STARTS = (b"(dp", b"(lp", b"(d", b"(l", b"}q", b"]q", b"ccollections\n", b"cnumpy", b"c__builtin__\n", b"ctorch")


def matches(head: bytes) -> bool:
    """Whether a file begins like a pickle: a protocol, or the opcodes that text protocols begin with."""
    return (head[:1] == b"\x80" and head[1:2] in (b"\x01", b"\x02", b"\x03", b"\x04", b"\x05")) or head.startswith(
        _STARTS
    )


def read(path: Path, *, salvage: bool = False) -> Contents:
    """Read a plain pickle.  Raises BrokenFile when it is damaged or truncated."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:

        def load_from_bytes(raw: Value) -> Value:
            if isinstance(raw, Inline):
                return torch_legacy.read_object(path, data, start=raw.start, stop=raw.stop)[0]
            if isinstance(raw, bytes):
                return torch_legacy.read_object(path, raw)[0]
            raise ValueError("a storage without bytes")

        constructors = (
            torch_objects.CONSTRUCTORS
            | numpy_objects.CONSTRUCTORS
            | {("torch.storage", "_load_from_bytes"): load_from_bytes}
        )
        machine = Unpickler(data, path=path, constructors=constructors)
        try:
            root = machine.load()
        except PickleError as error:
            raise BrokenFile(path, f"is a truncated or damaged pickle: {error}", "fetch it again") from error
    return Contents(path, CONTAINER, arrays_as_tensors(root), globals=tuple(machine.globals.values()))


def arrays_as_tensors(root: Value) -> Value:
    """Put the tensor that an array is in its place, in dicts and lists."""
    if isinstance(root, NumpyArray):
        return root.tensor or root
    seen: set[int] = set()
    ahead = [root]
    while ahead:
        node = ahead.pop()
        if id(node) in seen or not isinstance(node, (dict, list, tuple)):
            continue
        seen.add(id(node))
        ahead.extend(node.values() if isinstance(node, dict) else node)
        places = list(node.items() if isinstance(node, dict) else enumerate(node))
        for place, value in places if isinstance(node, (dict, list)) else ():
            if isinstance(value, NumpyArray) and value.tensor is not None:
                node[place] = value.tensor  # type: ignore[index]
    return root
