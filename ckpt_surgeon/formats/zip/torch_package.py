"""torch.package archives: pickles in folders, storages as ``.data/N.storage``, source code that is never run."""

from __future__ import annotations

from functools import partial

from ...errors import BrokenFile
from ..contents import Contents
from ..payloads import names_in_loads
from ..pickle.machine import Load
from ..pickle.values import Global, Value
from .archive import Archive
from .torch_zip import load, package_object, storages

CONTAINER = "torch.package"


MARKER = ".data/extern_modules"


def holds(archive: Archive) -> bool:
    """Whether a zip is a torch.package archive."""
    return archive.find(archive.folder + MARKER) is not None


def read(archive: Archive, *, salvage: bool = False) -> Contents:
    """Read every pickle of a package, under its path in it."""
    folder = archive.folder
    pickles = [name for name in archive.members if name.endswith(".pkl") and not name.startswith(f"{folder}.data/")]
    if not pickles:
        raise BrokenFile(archive.path, "is a torch.package without a pickle: it holds code only")
    find = storages(archive, folder, lambda key: f"{folder}.data/{key}.storage", salvage=salvage, others=package_object)
    root: dict[Value, Value] = {}
    names: dict[Global, None] = {}
    loads: list[Load] = []
    for pickle in pickles:
        made = load(archive, pickle, find)
        root[pickle.removeprefix(folder).removesuffix(".pkl").replace("/", ".")] = made.root
        names.update(dict.fromkeys(made.globals))
        loads += made.loads
    inside = partial(names_in_loads, archive.path, loads)
    return Contents(archive.path, CONTAINER, root, globals=tuple(names), globals_inside=inside)
