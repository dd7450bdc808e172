"""TorchScript archives (``torch.jit.save``): the weights of a scripted module.

The pickle holds attributes; which of them are parameters and buffers stands in the class's source, in the archive's
``code/`` folder, as ``__parameters__`` and ``__buffers__``.  The source is read as text and never run.
"""

from __future__ import annotations

import ast
import re

from ..tensors import OpaqueTensor, StoredTensor
from .contents import Contents
from .torch_zip import load, storages
from .unpickle import Global, Object, Ordered, Value
from .zip_archive import Archive

CONTAINER = "TorchScript"
DEPTH = 100

_CLASS = re.compile(r"^class (\w+)\(Module\):\n((?:^ .*\n?|^\n)*)", re.MULTILINE)
_LIST = re.compile(r"^  (__parameters__|__buffers__) = (\[.*?\])$", re.MULTILINE | re.DOTALL)


def holds(archive: Archive) -> bool:
    """Whether a zip is a TorchScript archive."""
    return any(name.endswith("constants.pkl") for name in archive.members) and _pickle(archive) is not None


def _pickle(archive: Archive) -> str | None:
    names = [name for name in archive.members if name == "data.pkl" or name.endswith("/data.pkl")]
    return min(names, key=len, default=None)


def read(archive: Archive, *, salvage: bool = False) -> Contents:
    """Read a scripted module's state_dict, names and order as torch's own gives them."""
    pickle = _pickle(archive) or ""
    folder = pickle.removesuffix("data.pkl")
    find = storages(archive, folder, folder + "data/{}", salvage=salvage)
    root, names = load(archive, pickle, find)
    state = Ordered()
    _collect(state, root, "", _declared(archive, folder), 0)
    notes = ("a TorchScript archive: its code stays behind, its parameters and buffers are listed",)
    return Contents(archive.path, CONTAINER, state, notes=notes, globals=names)


def _declared(archive: Archive, folder: str) -> dict[str, tuple[list[str], list[str]]]:
    """Parameters and buffers by the qualified name of their class."""
    found = {}
    code = folder + "code/"
    for name in archive.members:
        if name.startswith(code) and name.endswith(".py"):
            module = name.removeprefix(code).removesuffix(".py").replace("/", ".")
            source = archive.read(name).decode("utf-8", "replace")
            for one in _CLASS.finditer(source):
                lists = {key: ast.literal_eval(value) for key, value in _LIST.findall(one[2])}
                found[f"{module}.{one[1]}"] = (lists.get("__parameters__", []), lists.get("__buffers__", []))
    return found


def _collect(
    state: Ordered, node: Value, prefix: str, declared: dict[str, tuple[list[str], list[str]]], depth: int
) -> None:
    if not isinstance(node, Object) or not isinstance(node.state, dict) or depth > DEPTH:
        return
    parameters, buffers = declared.get(str(node.cls), ([], [])) if isinstance(node.cls, Global) else ([], [])
    for name in (*parameters, *buffers):
        value = node.state.get(name)
        if isinstance(value, (StoredTensor, OpaqueTensor)):
            state[prefix + name] = value
    for name, value in node.state.items():
        _collect(state, value, f"{prefix}{name}.", declared, depth + 1)
