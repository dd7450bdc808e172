"""TorchScript archives (``torch.jit.save``): the weights of a scripted module.

The pickle holds attributes; which of them are parameters and buffers stands in the class's source, in the archive's
``code/`` folder, as ``__parameters__`` and ``__buffers__``.  The source is read as text and never run.
"""

from __future__ import annotations

import re
from functools import partial

from ...errors import BrokenFile
from ...tensors.records import OpaqueTensor
from ...tensors.stored import StoredTensor
from ..contents import Contents
from ..payloads import names_in_loads
from ..pickle.values import Object, Ordered, Value, spelled
from . import torch_zip
from .archive import Archive
from .torch_zip import load, main_pickle, storages

CONTAINER = "TorchScript"
DEPTH = 100
ENTRIES = 1_000_000  # attributes that are looked at; a small pickle can name one object so often that it has more

_CLASS = re.compile(r"^class (\w+)\(Module\):\n((?:^ .*\n?|^\n)*)", re.MULTILINE)
_LIST = re.compile(r"^  (__parameters__|__buffers__) = \[(.*)\]$", re.MULTILINE)
_WORD = re.compile(r'"([^"\\]*)"')


def holds(archive: Archive) -> bool:
    """Whether a zip is a TorchScript archive."""
    return torch_zip.holds(archive) and _folder(archive) + "constants.pkl" in archive.members


def _folder(archive: Archive) -> str:
    return main_pickle(archive)[: -len("data.pkl")]


def read(archive: Archive, *, salvage: bool = False) -> Contents:
    """Read a scripted module's state_dict, names and order as torch's own gives them."""
    folder = _folder(archive)
    find = storages(archive, folder, lambda key: f"{folder}data/{key}", salvage=salvage)
    made = load(archive, main_pickle(archive), find)
    state = _Collected(_declared(archive, folder))
    state.add(made.root, "", 0)
    notes = ("a TorchScript archive: its code stays behind, its parameters and buffers are listed",)
    if state.left < 0:
        raise BrokenFile(archive.path, f"has modules with more than {ENTRIES:,} attributes")
    inside = partial(names_in_loads, archive.path, made.loads)
    return Contents(archive.path, CONTAINER, state.found, notes=notes, globals=made.globals, globals_inside=inside)


def _declared(archive: Archive, folder: str) -> dict[str, tuple[list[str], list[str]]]:
    """Parameters and buffers by the qualified name of their class."""
    found = {}
    code = folder + "code/"
    for name in archive.members:
        if name.startswith(code) and name.endswith(".py"):
            module = name.removeprefix(code).removesuffix(".py").replace("/", ".")
            source = archive.read(name).decode("utf-8", "replace")
            for declared in _CLASS.finditer(source):
                lists = {key: _WORD.findall(words) for key, words in _LIST.findall(declared[2])}
                found[f"{module}.{declared[1]}"] = (lists.get("__parameters__", []), lists.get("__buffers__", []))
    return found


class _Collected:
    """The state_dict under construction."""

    def __init__(self, declared: dict[str, tuple[list[str], list[str]]]) -> None:
        self.found = Ordered()
        self.left = ENTRIES
        self._declared = declared

    def add(self, node: Value, prefix: str, depth: int) -> None:
        """Add a module's parameters and buffers, then those of its attributes; what packs its state stays an object."""
        if not isinstance(node, Object) or depth > DEPTH:
            return
        if not isinstance(node.state, dict):
            if node.state is not None:  # of a class with a __getstate__, as those of quantised layers
                self.left -= 1
                self.found[prefix.removesuffix(".")] = node
            return
        self.left -= len(node.state)
        if self.left < 0:
            return
        parameters, buffers = self._declared.get(node.class_name, ([], []))
        for name in (*parameters, *buffers):
            value = node.state.get(name)
            if isinstance(value, (StoredTensor, OpaqueTensor)):
                self.found[prefix + name] = value
        for name, value in node.state.items():
            if isinstance(value, Object):
                self.add(value, f"{prefix}{spelled(name)}.", depth + 1)
