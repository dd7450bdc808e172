"""What a tensor on disk is: a place, not a value.

A :class:`StoredTensor` says where its elements lie (a :class:`Storage` and dtype, shape, stride, offset); a
:class:`ComputedTensor` says how its bytes will be made when they are written; an :class:`OpaqueTensor` is one
that no plain container can hold (sparse, quantized …) and that can only be named.  A writer asks one question,
"are you one span?", and otherwise takes ``blocks()``: the elements in row-major order, little-endian, in pieces
of about :data:`BLOCK` bytes.  Nothing here imports torch.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeAlias, cast

from .. import hooks
from ..errors import BrokenFile, EditError
from ..files.paths import FilePath
from ..files.spans import BLOCK, Block, ByteSpan
from ..text import Shown
from .dtypes import EXTRA_STATE, DType
from .strides import gather, row_major, swapped

if TYPE_CHECKING:
    import torch

DIMENSIONS = 64  # more than any tensor has
ELEMENTS = (1 << 63) - 1  # torch counts them in 64 bits

EXPANDED = 1 << 30  # bytes that a tensor may have whose elements lie over each other, beside ...
EXPANSION = 64  # ... this many times those of its storage
UNPACKED = 1 << 28  # bytes of a packed storage that are unpacked into memory for elements that do not lie in order
CHECKED = 1 << 30  # bytes of a storage whose checksum is compared before any part of it is used
SHARE = 4  # a part of at least one in so many has its storage's checksum compared, however large that is

_FLIP_SIGN = bytes(value ^ 0x80 for value in range(256))


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Storage(Shown):
    """The bytes behind one or more tensors; two tensors share storage when this is the same object.

    ``nbytes`` counts the bytes once they are unpacked; ``span`` is where they lie (packed, if ``deflated``),
    ``memory`` holds them instead when they are in this process, ``crc32`` is the container's checksum of them.
    """

    span: ByteSpan | None
    nbytes: int
    device: str = "cpu"  # where the tensor lived when it was saved
    crc32: int | None = None
    deflated: bool = False
    big_endian: bool = False
    memory: memoryview | None = None
    source: ComputedTensor | None = None  # makes the bytes when they are asked for
    _checked: list[bool] = field(default_factory=list, repr=False)  # True once the checksum was compared

    def check(self, used: int | None = None) -> None:
        """Compare the checksum, once, where there is one; ``used`` says how many bytes are to be used.

        A small part of a large storage is used unchecked.  Raises BrokenFile when the checksum does not match.
        """
        if self.crc32 is None or self._checked or self.deflated:
            return
        if used is None or self.nbytes <= max(CHECKED, used * SHARE):
            for _ in self.blocks():
                pass

    @property
    def is_lost(self) -> bool:
        """Whether its bytes are nowhere: what a truncated file announces and does not have."""
        return self.span is None and self.memory is None and self.source is None and self.nbytes > 0

    @property
    def plain(self) -> ByteSpan | None:
        """The span, if its bytes can be copied as they are."""
        return None if self.deflated or self.big_endian else self.span

    @property
    def files(self) -> tuple[FilePath, ...]:
        """The files that its bytes come from."""
        if self.span is not None:
            return (self.span.path,)
        return self.source.files if self.source is not None else ()

    def blocks(self) -> Iterator[bytes]:
        """Yield all the bytes, unpacked, in stored byte order.

        Raises BrokenFile when they do not unpack or, after the last, when their checksum does not match.
        """
        if self.source is not None:
            yield from map(bytes, self.source.blocks())
            return
        if self.span is None:
            memory = self.memory if self.memory is not None else memoryview(b"")
            yield from (bytes(memory[start : start + BLOCK]) for start in range(0, self.nbytes, BLOCK))
            return
        raw = _uncut(_inflated(self.span, self.nbytes)) if self.deflated else self.span.blocks()
        if self.crc32 is None:
            yield from raw
            return
        crc32 = 0
        for block in raw:
            crc32 = zlib.crc32(block, crc32)
            yield block
        if crc32 != self.crc32:
            place = f"bytes {self.span.start:,} to {self.span.stop:,}"
            raise BrokenFile(self.span.path, f"is damaged: the CRC of {place} does not match", "fetch it again")
        self._checked.append(True)

    @contextmanager
    def opened(self) -> Iterator[tuple[memoryview, Callable[[], None]]]:
        """Yield the bytes as one view, and a function to call between uses that bounds the memory taken."""
        if self.memory is not None:
            yield self.memory, _nothing
        elif self.nbytes == 0:
            yield memoryview(b""), _nothing
        elif self.span is None or self.deflated:
            yield memoryview(b"".join(self.blocks())), _nothing
        else:
            with self.span.mapped() as mapped:
                yield mapped


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
            yield from _uncut(_part(self.storage.blocks(), start, start + self.nbytes))
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
        raw = b"".join(_part(self.storage.blocks(), start, stop))
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


@dataclass(slots=True, eq=False)
class Outcome:
    """What turned out while a tensor was computed: a problem that forbids the result, a note on it."""

    problem: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ComputedTensor(Loadable):
    """A tensor whose bytes are made from ``inputs`` when they are written, block by block.

    ``make`` is called with the inputs and yields the elements in row-major order, little-endian; what it finds out
    on the way it leaves in ``outcome``, where the writer looks before anything is replaced.  ``files`` are those that
    it reads itself, beside the inputs.
    """

    dtype: DType
    shape: tuple[int, ...]
    inputs: tuple[Tensor, ...]
    make: Callable[[tuple[Tensor, ...]], Iterator[Block]]
    outcome: Outcome | None = None
    files: tuple[FilePath, ...] = ()

    device = "cpu"
    span = None
    crc32 = None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def tie(self) -> Hashable:
        """An edit gives tied inputs one and the same result, so identity is the tie."""
        return id(self)

    def blocks(self) -> Iterator[Block]:
        """Yield the elements in row-major order, little-endian."""
        return self.make(self.inputs)

    def stored(self) -> StoredTensor:
        """The same elements as a tensor in a storage that is made when it is read, so that it can be viewed."""
        storage = Storage(None, self.nbytes, source=self)
        return StoredTensor(self.dtype, self.shape, row_major(self.shape), 0, storage)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class OpaqueTensor(Loadable):
    """A tensor that is more than elements in a storage: named and counted, never copied.

    ``kind`` says what it is ("sparse_coo", "quantized", "meta", a subclass's name).
    """

    kind: str
    dtype: DType
    shape: tuple[int, ...]
    device: str = "cpu"

    span = None
    crc32 = None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return 0

    @property
    def tie(self) -> Hashable:
        return id(self)

    def blocks(self) -> Iterator[bytes]:
        """Raises EditError: there are no plain bytes."""
        raise EditError([f"a {self.kind} tensor has no plain bytes to copy"])


@dataclass(frozen=True, slots=True, eq=False)
class ExtraState(Loadable):
    """A value under a key of a state_dict that is no tensor, as a module's ``get_extra_state`` returns it.

    ``value`` is data (see :mod:`ckpt_surgeon.tensors.extra_state`), ``kind`` says what it is in a few words.
    """

    value: object
    kind: str

    dtype = EXTRA_STATE
    shape: ClassVar[tuple[int, ...]] = ()
    device = "cpu"
    span = None
    crc32 = None
    numel = 0
    nbytes = 0

    @property
    def tie(self) -> Hashable:
        return id(self)

    def blocks(self) -> Iterator[bytes]:
        """Raises EditError: there are no elements."""
        raise EditError([f"an extra state ({self.kind}) is no tensor and has no elements"])


class Shaped(Protocol):
    """What is compared of a tensor, ours or torch's; a dtype counts by its name."""

    @property
    def dtype(self) -> object: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


Tensor: TypeAlias = StoredTensor | ComputedTensor | OpaqueTensor | ExtraState


def outcomes(tensors: Iterable[Tensor]) -> Iterator[Outcome]:
    """What turned out while these tensors were computed, their inputs included."""
    seen: set[int] = set()
    waiting = deque(tensors)
    while waiting:
        tensor = waiting.popleft()
        if isinstance(tensor, StoredTensor) and tensor.storage.source is not None:
            tensor = tensor.storage.source
        if isinstance(tensor, ComputedTensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            waiting.extend(tensor.inputs)
            if tensor.outcome is not None:
                yield tensor.outcome


def spans_of(tensors: Iterable[Tensor]) -> Iterator[ByteSpan]:
    """The bytes of files that reading these tensors, one after another, reads."""
    for tensor in tensors:
        if isinstance(tensor, ComputedTensor):
            yield from spans_of(tensor.inputs)
        elif isinstance(tensor, StoredTensor):
            if tensor.storage.source is not None:
                yield from spans_of([tensor.storage.source])
            elif (span := tensor.span or tensor.storage.span) is not None:
                yield span


def _inflated(span: ByteSpan, nbytes: int) -> Iterator[bytes]:
    """Unpack a raw deflate stream, never more than ``nbytes`` of it."""
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    left = nbytes
    try:
        for packed in span.blocks():
            while packed:
                piece = unpacker.decompress(packed, BLOCK)
                packed = unpacker.unconsumed_tail
                left -= len(piece)
                if left < 0:
                    raise BrokenFile(span.path, f"a packed record unpacks to more than its {nbytes:,} bytes")
                yield piece
                if not piece and unpacker.eof:
                    break
    except zlib.error as error:
        raise BrokenFile(span.path, f"a packed record does not unpack ({error})") from error
    tail = unpacker.flush()
    if left != len(tail):
        raise BrokenFile(span.path, f"a packed record unpacks to {nbytes - left:,} of its {nbytes:,} bytes")
    if tail:
        yield tail


def _part(pieces: Iterator[bytes], start: int, stop: int) -> Iterator[bytes]:
    """The bytes from ``start`` to ``stop`` of a stream, which is read to its end: there its checksum is compared."""
    at = 0
    for piece in pieces:
        part = piece[max(start - at, 0) : max(stop - at, 0)]
        at += len(piece)
        if part:
            yield part


def _uncut(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces that cut no element, however wide, in two."""
    rest = b""
    for piece in pieces:
        whole = rest + piece
        end = len(whole) - len(whole) % 16
        rest = whole[end:]
        if end:
            yield whole[:end]
    if rest:
        yield rest


def _nothing() -> None:
    pass
