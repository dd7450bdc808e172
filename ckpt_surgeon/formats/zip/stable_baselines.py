"""Stable-Baselines3's zips: files of torch.save inside a zip (``policy.pth``, ``policy.optimizer.pth`` …).

``stable_baselines3/common/save_util.py`` writes them, stored as they are, beside ``data``, JSON with the arguments.
"""

from __future__ import annotations

from itertools import chain
from zipfile import ZIP_STORED

from ...errors import BrokenFile, NotACheckpoint
from ...files.spans import ByteSpan
from ..contents import Contents
from ..pickle.values import Value
from . import torch_zip
from .archive import MAGIC, Archive, read_archive

CONTAINER = "Stable-Baselines3"
MARKERS = ("data", "policy.pth")


def holds(archive: Archive) -> bool:
    """Whether a zip is one of Stable-Baselines3's."""
    return all(name in archive.members for name in MARKERS)


def read(archive: Archive, *, salvage: bool = False) -> Contents:
    """Read every file of torch.save inside, under its name without ``.pth``.

    Raises NotACheckpoint where one is compressed, since a tensor then lies nowhere in the file; BrokenFile.
    """
    found: dict[str, Contents] = {}
    for name, member in archive.members.items():
        if not name.endswith(".pth"):
            continue
        if member.method != ZIP_STORED:
            problem = f"is a zip of Stable-Baselines3's in which {name!r} is compressed"
            raise NotACheckpoint(archive.path, problem, f"unpack it (unzip) and give {name}")
        place = ByteSpan(archive.path, member.start, member.start + member.size)
        if b"".join(ByteSpan(archive.path, place.start, min(place.start + 4, place.stop)).blocks()) != MAGIC:
            raise BrokenFile(archive.path, f"its {name!r} is no zip of torch.save", f"unpack it and look at {name}")
        found[name.removesuffix(".pth")] = torch_zip.read(read_archive(archive.path, place), salvage=salvage)
    root: dict[Value, Value] = {name: contents.root for name, contents in found.items()}
    return Contents(
        archive.path,
        CONTAINER,
        root,
        notes=tuple(dict.fromkeys(note for contents in found.values() for note in contents.notes)),
        globals=tuple(dict.fromkeys(name for contents in found.values() for name in contents.globals)),
        globals_inside=lambda: chain.from_iterable(contents.globals_inside() for contents in found.values()),
    )
