"""Tensor records as torch values, block by block, and back: what the value edits compute with."""

from __future__ import annotations

import ctypes
import mmap
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import EditError
from ..files.remote import RemotePath
from .dtypes import DType
from .records import Block, StoredTensor, Tensor

if TYPE_CHECKING:
    import torch

PIECE = 4 << 20  # bytes of input computed with at a time: large enough for torch, small enough for the caches

_NO_NUMBERS = re.compile(r"bits\w+|float4\w+|bcomplex32|u?int[1-7]|qu?int\w+")


def is_computable(dtype: DType) -> bool:
    """Whether torch computes with a dtype; packed bits and the like it only stores."""
    return not _NO_NUMBERS.fullmatch(dtype.name)


def check_computable(key: str, dtype: DType) -> None:
    """Raise EditError for a dtype that torch only stores."""
    if not is_computable(dtype):
        raise EditError([f"{key!r}: torch does not compute with {dtype}"])


def elements(tensor: Tensor) -> Iterator[torch.Tensor]:
    """Yield a tensor's elements in row-major order as 1-d torch tensors of about PIECE bytes.

    They are only valid until the next one is asked for.
    """
    span = tensor.span if isinstance(tensor, StoredTensor) else None
    if span is None or span.start % tensor.dtype.part or isinstance(span.path, RemotePath):
        for block in tensor.blocks():
            yield typed(bytearray(block), tensor)
        return
    if not len(span):
        return
    low = span.start - span.start % mmap.ALLOCATIONGRANULARITY
    with open(span.path, "rb") as file:  # copy-on-write: torch wants memory that could be written
        mapping = mmap.mmap(file.fileno(), span.stop - low, access=mmap.ACCESS_COPY, offset=low)
    for start in range(span.start - low, span.stop - low, PIECE):
        stop = min(start + PIECE, span.stop - low)
        yield typed(memoryview(mapping)[start:stop], tensor)
        if hasattr(mapping, "madvise"):
            page = start - start % mmap.PAGESIZE
            mapping.madvise(mmap.MADV_DONTNEED, page, stop - page)


def typed(raw: bytearray | memoryview, tensor: Tensor) -> torch.Tensor:
    """Bytes as a 1-d torch tensor of a record's dtype, sharing their memory."""
    import torch

    return torch.frombuffer(raw, dtype=torch.uint8).view(torch_dtype(tensor))


def torch_dtype(tensor: Tensor) -> torch.dtype:
    """torch's dtype of a record."""
    import torch

    found: torch.dtype = getattr(torch, tensor.dtype.name)
    return found


def whole(tensor: Tensor) -> torch.Tensor:
    """One whole tensor in memory, contiguous."""
    import torch

    raw = bytearray(b"".join(tensor.blocks()))
    if not raw:
        return torch.empty(tensor.shape, dtype=torch_dtype(tensor))
    return typed(raw, tensor).reshape(tensor.shape)


def raw_bytes(value: torch.Tensor) -> memoryview:
    """The bytes of a contiguous torch tensor on the CPU; the view keeps it alive."""
    nbytes = value.numel() * value.element_size()
    if nbytes == 0:
        return memoryview(b"")
    raw = (ctypes.c_char * nbytes).from_address(value.data_ptr())
    raw._kept = value  # type: ignore[attr-defined]
    return memoryview(raw).cast("B")


def pieces(value: torch.Tensor) -> Iterator[Block]:
    """A torch tensor's bytes in row-major order."""
    yield raw_bytes(value.detach().contiguous())
