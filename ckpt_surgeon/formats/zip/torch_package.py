"""torch.package archives: pickles in folders, storages as ``.data/N.storage``, source code that is never run."""

from __future__ import annotations

from ...errors import BrokenFile
from ..contents import Contents
from ..pickle.machine import Global, Value
from .archive import Archive
from .torch_zip import load, storages

CONTAINER = "torch.package"


def holds(archive: Archive) -> bool:
    """Whether a zip is a torch.package archive."""
    return any(name.endswith(".data/extern_modules") for name in archive.members)


def read(archive: Archive, *, salvage: bool = False) -> Contents:
    """Read every pickle of a package, under its path in it."""
    marker = min((name for name in archive.members if name.endswith(".data/extern_modules")), key=len)
    folder = marker.removesuffix(".data/extern_modules")
    pickles = [name for name in archive.members if name.endswith(".pkl") and not name.startswith(f"{folder}.data/")]
    if not pickles:
        raise BrokenFile(archive.path, "is a torch.package without a pickle: it holds code only")
    find = storages(archive, folder, folder + ".data/{}.storage", salvage=salvage)
    root: dict[Value, Value] = {}
    names: dict[Global, None] = {}
    for pickle in pickles:
        root[pickle.removeprefix(folder).removesuffix(".pkl").replace("/", ".")], mentioned = load(
            archive, pickle, find
        )
        names.update(dict.fromkeys(mentioned))
    return Contents(archive.path, CONTAINER, root, globals=tuple(names))
