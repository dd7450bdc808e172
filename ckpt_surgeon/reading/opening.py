"""Opening a checkpoint: read the index, find the state_dict, touch no tensor."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from ..errors import NEW_FILE, FileError
from ..files import journal
from ..files.paths import AnyPath, file_path
from ..formats import registry
from ..formats.contents import Contents, Index
from ..tensors.checkpoint import Checkpoint
from .adapter_configs import with_adapter_config
from .selecting import select_state_dict

INTERRUPTED = "a rename in place was interrupted"  # how the note on it begins


def open(path: AnyPath, *, select: str | None = None, salvage: bool = False, allow_part: bool = False) -> Checkpoint:
    """Open any checkpoint as a lazy :class:`Checkpoint`; nothing in it is run and no tensor is read.

    ``path`` is a file (recognised by its content: torch zip or legacy, safetensors, TorchScript, pickle …), an
    index of shards, or a folder, local or at a URL that fsspec knows; ``select`` is the dotted path of the
    state_dict where the file holds several.  With ``salvage`` a truncated file gives the tensors that are whole; the
    notes name those that are lost.  One rank's part of a model opens, and is written or loaded only where
    ``allow_part`` takes it for a whole.  Raises NotACheckpoint, BrokenFile, FileError or SelectionError.

    >>> import ckpt_surgeon, torch
    >>> torch.save({"state_dict": {"fc.weight": torch.zeros(2, 3)}, "epoch": 7}, "training.pth")
    >>> checkpoint = ckpt_surgeon.open("training.pth")
    >>> checkpoint["fc.weight"].shape, checkpoint.selected, checkpoint.left_out[0].path
    ((2, 3), 'state_dict', 'epoch')
    """
    with _paused_collector():
        return select_state_dict(read(path, salvage=salvage), select, allow_part=allow_part)


def read(path: AnyPath, *, salvage: bool = False) -> Contents:
    """Everything a file holds, before a state_dict is selected; a rename in place that was interrupted is finished."""
    where = file_path(path)
    with _paused_collector():
        local = where.local
        outcome = journal.recover(registry.located(local)) if local is not None else None
        return _told(with_adapter_config(registry.read_named(where, salvage=salvage)), outcome)


def index_of(path: AnyPath) -> Index:
    """What :func:`read` reads, as an index that can be rewritten in the file.

    See :func:`ckpt_surgeon.formats.registry.index_of`.
    """
    with _paused_collector():
        where = file_path(path)
        if (local := where.local) is None:
            raise FileError(where, "is not on this machine, so nothing in it can be changed in place", NEW_FILE)
        here = registry.located(local)
        outcome = journal.recover(here)
        index = registry.index_of(here)
        index.contents = _told(index.contents, outcome)
        return index


def _told(contents: Contents, outcome: journal.Recovery | None) -> Contents:
    """Contents with a note on what became of an interrupted rename in place."""
    if outcome is None:
        return contents
    became = "was finished now" if outcome == "finished" else "had not begun to write, and was given up"
    return replace(contents, notes=(*contents.notes, f"{INTERRUPTED}, and {became}"))


@contextmanager
def _paused_collector() -> Iterator[None]:
    """Hundreds of thousands of small records are made and all are kept: collecting garbage finds none."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
