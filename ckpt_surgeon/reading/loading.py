"""A checkpoint as torch tensors."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from ..files.paths import AnyPath
from ..tensors.checkpoint import Checkpoint
from ..tensors.torch_bridge import to_torch
from .opening import open as open_checkpoint

if TYPE_CHECKING:
    import torch

    from ..tensors.torch_bridge import MapLocation


def load(
    source: AnyPath | Checkpoint, *, map_location: MapLocation = "cpu", select: str | None = None
) -> OrderedDict[str, torch.Tensor]:
    """Load a checkpoint as a state_dict of torch tensors; its memory is the file's, mapped, until it is changed.

    ``source`` is a path or an opened (and perhaps edited) :class:`Checkpoint`; ``map_location`` is what torch.load
    takes: a device, a dict from saved to wanted device, a callable ``(storage, location)``, or None for the devices
    that the tensors were saved from.  Ties share memory, strides are kept, ``_metadata`` is there.  Do not write
    into the file while the tensors are in use.  Raises what :func:`ckpt_surgeon.open` raises, EditError for
    sparse or quantized tensors, and RuntimeError (torch's own) where the device is not there.

    >>> import ckpt_surgeon, torch
    >>> torch.save({"module.fc.bias": torch.ones(3)}, "parallel.pth")
    >>> ckpt_surgeon.strip_prefix(ckpt_surgeon.load("parallel.pth"))["fc.bias"]
    tensor([1., 1., 1.])
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source, select=select)
    return to_torch(checkpoint, map_location=map_location)
