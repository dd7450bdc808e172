"""SpeechBrain's folders (``CKPT+2026-…+00``): a file for each thing that is recovered, and ``CKPT.yaml``.

``speechbrain/utils/checkpoints.py`` writes ``NAME.ckpt`` for each: files of torch.save for modules and optimizers, text
for counters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

from ..errors import NotACheckpoint, listed
from ..files.paths import FilePath, prefetch_heads
from .contents import Contents
from .pickle.values import Value
from .sharded import Reader

CONTAINER = "SpeechBrain"
MARKER = "CKPT.yaml"
SUFFIX = ".ckpt"
TEXT = 4096  # bytes that a counter's file may have


def holds(names: Iterable[str]) -> bool:
    """Whether a folder with these names is such a checkpoint.

    >>> holds(["CKPT.yaml", "model.ckpt"]), holds(["model.ckpt"])
    (True, False)
    """
    known = set(names)
    return MARKER in known and any(name.endswith(SUFFIX) for name in known)


def step_folder(folder: FilePath, names: Sequence[str]) -> FilePath | None:
    """The one checkpoint in a folder of them, None where there is none.  Raises NotACheckpoint for several."""
    found = [name for name in names if name.startswith("CKPT+") and (folder / name).is_dir()]
    if len(found) > 1:
        raise NotACheckpoint(
            folder, f"has {len(found):,} checkpoints of SpeechBrain's", f"name one: {listed(found, 3)}"
        )
    return folder / found[0] if found else None


def read(folder: FilePath, names: Sequence[str], read_file: Reader, *, salvage: bool = False) -> Contents:
    """Read every file of torch.save under its name; a file that is none is its text, where it is short, or named.

    Raises BrokenFile for one that is damaged.
    """
    root: dict[Value, Value] = {}
    every: list[Contents] = []
    left: list[str] = []
    files = [name for name in names if name.endswith(SUFFIX) and (folder / name).is_file()]
    prefetch_heads([folder / name for name in files])
    for name in files:
        key = name.removesuffix(SUFFIX)
        try:
            contents = read_file(folder / name, salvage=salvage)
        except NotACheckpoint:
            text = _text(folder / name)
            if text is None:
                left.append(name)
            else:
                root[key] = text
            continue
        every.append(contents)
        root[key] = contents.root
    notes = (f"no files of torch.save, not read: {listed(left, 3)}",) if left else ()
    return Contents(
        folder,
        CONTAINER,
        root,
        notes=(*notes, *(note for contents in every for note in contents.notes)),
        globals=tuple(dict.fromkeys(name for contents in every for name in contents.globals)),
        globals_inside=lambda: chain.from_iterable(contents.globals_inside() for contents in every),
    )


def _text(path: FilePath) -> str | None:
    """The text of a small file; None for any other file."""
    if path.size > TEXT:
        return None
    try:
        return path.read_text("utf-8").strip()
    except UnicodeDecodeError:
        return None
