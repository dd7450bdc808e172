"""A checkpoint as torch tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..tensors.records import Tensor
from ..tensors.stored import StoredTensor
from ..tensors.torch_bridge import to_torch
from .sources import checkpoint_of

if TYPE_CHECKING:
    import torch

    from ..tensors.torch_bridge import MapLocation
    from .sources import Source


def load(
    source: Source, *, map_location: MapLocation = "cpu", select: str | None = None, check: bool = False
) -> OrderedDict[str, torch.Tensor]:
    """Load a checkpoint as a state_dict of torch tensors; its memory is the file's, mapped, until it is changed.

    ``source`` is a path or URL, an opened (and perhaps edited) :class:`Checkpoint`, a state_dict or a model;
    ``map_location`` is what torch.load takes: a device, a dict from saved to wanted device, a callable
    ``(storage, location)``, or None for the devices that the tensors were saved from.  Ties share memory, strides are
    kept, ``_metadata`` is there.  ``check`` reads every byte first and compares the checksums that the container has:
    mapped memory is not looked at otherwise.  Do not write into the file while the tensors are in use.  Raises what
    :func:`ckpt_surgeon.open` raises, EditError for sparse or quantized tensors, and RuntimeError (torch's own) where
    the device is not there.

    >>> import ckpt_surgeon, torch
    >>> torch.save({"module.fc.bias": torch.ones(3)}, "parallel.pth")
    >>> ckpt_surgeon.strip_prefix(ckpt_surgeon.load("parallel.pth"))["fc.bias"]
    tensor([1., 1., 1.])
    """
    checkpoint = checkpoint_of(source, select=select)
    if check:
        check_storages(checkpoint)
    return to_torch(checkpoint, map_location=map_location)


def check_storages(tensors: Mapping[str, Tensor]) -> None:
    """Compare the checksum of every storage that has one, each once.  Raises BrokenFile.

    >>> import ckpt_surgeon, torch
    >>> torch.save({"fc.bias": torch.ones(3)}, "model.pth")
    >>> check_storages(ckpt_surgeon.open("model.pth"))
    """
    for tensor in tensors.values():
        if isinstance(tensor, StoredTensor):
            tensor.storage.check()
