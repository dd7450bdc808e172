"""Opening a checkpoint: read the index, find the state_dict, touch no tensor."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from . import formats
from .checkpoint import Checkpoint
from .formats.contents import Contents
from .places import AnyPath, place
from .selecting import select as select_state_dict


def open(path: AnyPath, *, select: str | None = None, salvage: bool = False) -> Checkpoint:
    """Open any checkpoint as a lazy :class:`Checkpoint`; nothing in it is run and no tensor is read.

    ``path`` is a file (told by content: torch zip or legacy, safetensors, TorchScript, pickle …), an index of
    shards, or a folder, local or at a URL that fsspec knows; ``select`` the dotted path of the state_dict where the
    file holds several.  With ``salvage`` a truncated file gives the tensors that are whole; the notes name those that
    are lost.  Raises NotACheckpoint, BrokenFile, FileError or SelectionError.

    >>> import ckpt_surgeon, torch
    >>> torch.save({"state_dict": {"fc.weight": torch.zeros(2, 3)}, "epoch": 7}, "training.pth")
    >>> checkpoint = ckpt_surgeon.open("training.pth")
    >>> checkpoint["fc.weight"].shape, checkpoint.selected, checkpoint.left_out[0].path
    ((2, 3), 'state_dict', 'epoch')
    """
    with _paused_collector():
        return select_state_dict(read(path, salvage=salvage), select)


def read(path: AnyPath, *, salvage: bool = False) -> Contents:
    """Everything a file holds, before a state_dict is selected."""
    with _paused_collector():
        return formats.read(place(path), salvage=salvage)


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
