"""A tensor whose elements lie in a storage: which of its bytes they are, in which order.

Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Protocol, cast

from .. import hooks
from ..errors import EditError
from ..files.spans import BLOCK, ByteSpan
from ..text import Shown
from .dtypes import DType
from .storage import SHARE, Storage, part_of, whole_elements
from .strides import gather, row_major, swapped

if TYPE_CHECKING:
    import torch

DIMENSIONS = 64  # more than any tensor has
ELEMENTS = (1 << 63) - 1  # torch counts them in 64 bits

EXPANDED = 1 << 30  # bytes that a tensor may have whose elements lie over each other, beside ...
EXPANSION = 64  # ... this many times those of its storage
UNPACKED = 1 << 28  # bytes of a packed storage that are unpacked into memory for elements that do not lie in order

_FLIP_SIGN = bytes(value ^ 0x80 for value in range(256))


class Described(Protocol):
    """What one line says of a tensor."""

    @property
    def dtype(self) -> DType: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...


class Loadable(Shown):
    """A tensor that torch can have."""

    __slots__ = ()

    def __repr__(self: Described) -> str:
        return f"<{type(self).__name__} {self.dtype} {list(self.shape)}, {self.nbytes:,} bytes>"

    def load(self) -> torch.Tensor:
        """The tensor as torch's, mapped where it can be.  Raises EditError for one that is more than its elements.

        >>> import torch
        >>> from ckpt_surgeon import from_torch
        >>> from_torch({"fc.bias": torch.ones(2)})["fc.bias"].load()
        tensor([1., 1.])
        """
        return cast("torch.Tensor", hooks.answer("load tensor")(self))


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class StoredTensor(Loadable):
    """A tensor whose elements lie in a storage.

    ``shape``, ``stride`` and ``offset`` are counted in elements, as torch counts them.  Raises ValueError when
    they reach outside the storage.

    >>> from pathlib import Path
    >>> from ckpt_surgeon.tensors.dtypes import parse
    >>> storage = Storage(ByteSpan(Path("w.bin"), 0, 24), 24)
    >>> StoredTensor(parse("float32"), (2, 3), (3, 1), 0, storage).span
    ByteSpan(path=PosixPath('w.bin'), start=0, stop=24)
    >>> StoredTensor(parse("float32"), (3, 2), (1, 3), 0, storage).span is None  # transposed: not in order
    True
    """

    dtype: DType
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    storage: Storage
    conjugate: bool = False  # torch's lazy conj() and neg(): the stored bytes are not yet flipped
    negative: bool = False

    def __post_init__(self) -> None:
        shape, stride = self.shape, self.stride
        if len(shape) != len(stride):
            raise ValueError(f"{len(shape)} sizes but {len(stride)} strides")
        if len(shape) > DIMENSIONS or prod(shape) > ELEMENTS:
            raise ValueError(f"{len(shape)} dimensions, or more elements than can be counted")
        last = self.offset
        for size, step in zip(shape, stride):  # noqa: B905 (their lengths are equal)
            if size < 0 or step < 0:
                raise ValueError(f"negative size or stride in shape {shape}, stride {stride}")
            last += (size - 1) * step
        if self.offset < 0:
            raise ValueError(f"negative offset {self.offset}")
        needed = (last + 1) * self.dtype.itemsize
        if needed > self.storage.nbytes and 0 not in shape:
            raise ValueError(
                f"shape {shape}, stride {stride}, offset {self.offset} need {needed:,} bytes "
                f"of a storage that has {self.storage.nbytes:,}"
            )

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements, however many the storage behind them has."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def device(self) -> str:
        """The device it was saved from."""
        return self.storage.device

    @property
    def tie(self) -> Hashable:
        """Equal for two keys exactly when they are one tensor: same storage, offset, shape and stride."""
        return (id(self.storage), self.offset, self.shape, self.stride, self.dtype.name, self.conjugate, self.negative)

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in row-major order without gaps."""
        return all(size == 1 or step == want for size, step, want in self._steps()) or 0 in self.shape

    def _steps(self) -> Iterator[tuple[int, int, int]]:
        return zip(self.shape, self.stride, row_major(self.shape), strict=True)

    @property
    def is_dense(self) -> bool:
        """Whether the elements fill one span in some order of the dimensions (as channels_last does)."""
        expected = 1
        for step, size in sorted((step, size) for size, step in zip(self.shape, self.stride, strict=True) if size > 1):
            if step != expected:
                return False
            expected *= size
        return True

    @property
    def in_place(self) -> StoredTensor | None:
        """The elements in the order in which they lie, as one dimension, where they fill one span of the storage."""
        if not self.is_dense:
            return None
        offset = self.offset if self.nbytes else 0
        return StoredTensor(self.dtype, (self.numel,), (1,), offset, self.storage, self.conjugate, self.negative)

    @property
    def span(self) -> ByteSpan | None:
        """The one span that holds exactly this tensor's elements in row-major order, or None."""
        whole = self.storage.plain
        if whole is None or self.conjugate or self.negative or not self.is_contiguous:
            return None
        start = whole.start + (self.offset * self.dtype.itemsize if self.nbytes else 0)
        return ByteSpan(whole.path, start, start + self.nbytes)

    @property
    def crc32(self) -> int | None:
        """The container's checksum of this tensor's bytes, where it is known."""
        covers = self.nbytes == self.storage.nbytes and self.storage.plain is not None
        return self.storage.crc32 if covers else None

    def blocks(self) -> Iterator[bytes]:
        """Yield the elements in row-major order, little-endian, in pieces of about BLOCK bytes.

        Raises EditError for a tensor that is far larger than its storage, BrokenFile where a checksum does not match.
        """
        if self.nbytes == 0:
            return
        if self.nbytes > max(EXPANDED, self.storage.nbytes * EXPANSION):
            what = f"a tensor of shape {list(self.shape)} over a storage of {self.storage.nbytes:,} bytes"
            raise EditError([f"{what} would make {self.nbytes:,} bytes"], remedy="leave it out by pattern")
        pieces = self._contiguous_blocks() if self.is_contiguous else self._gathered_blocks()
        for piece in pieces:
            yield self._finished(piece)

    def _contiguous_blocks(self) -> Iterator[bytes]:
        start = self.offset * self.dtype.itemsize
        whole = self.storage.span
        if self.nbytes == self.storage.nbytes:
            yield from self.storage.blocks()
            return
        if self.storage.deflated or self.storage.source is not None:
            yield from whole_elements(part_of(self.storage.blocks(), start, start + self.nbytes))
            return
        self.storage.check(self.nbytes)
        if whole is not None:
            yield from ByteSpan(whole.path, whole.start + start, whole.start + start + self.nbytes).blocks()
            return
        with self.storage.opened() as (view, _):
            for low in range(start, start + self.nbytes, BLOCK):
                yield bytes(view[low : min(low + BLOCK, start + self.nbytes)])

    def _gathered_blocks(self) -> Iterator[bytes]:
        if self.storage.deflated or self.storage.source is not None:
            yield from self._gathered_from_stream()
            return
        self.storage.check(self.nbytes)
        with self.storage.opened() as (view, forget):
            for piece in gather(view, self.dtype.itemsize, self.shape, self.stride, self.offset):
                yield piece
                forget()

    def _gathered_from_stream(self) -> Iterator[bytes]:
        """Elements of a storage that is unpacked or computed: only the bytes from the first to the last are kept."""
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        start, stop = (at * self.dtype.itemsize for at in (self.offset, self.offset + last + 1))
        if self.storage.deflated and stop - start > max(UNPACKED, self.nbytes * SHARE):
            what = f"a tensor of {self.nbytes:,} bytes lies scattered over {stop - start:,} bytes of a packed record"
            raise EditError([what], remedy="leave it out by pattern, or repack the zip without compression")
        raw = b"".join(part_of(self.storage.blocks(), start, stop))
        yield from gather(memoryview(raw), self.dtype.itemsize, self.shape, self.stride, 0)

    def _finished(self, piece: bytes) -> bytes:
        part = self.dtype.part
        if self.storage.big_endian:
            piece = swapped(piece, part)
        if not (self.conjugate or self.negative):
            return piece
        flipped = bytearray(piece)
        if self.negative:
            flipped[part - 1 :: part] = flipped[part - 1 :: part].translate(_FLIP_SIGN)
        if self.conjugate:
            flipped[2 * part - 1 :: 2 * part] = flipped[2 * part - 1 :: 2 * part].translate(_FLIP_SIGN)
        return bytes(flipped)
