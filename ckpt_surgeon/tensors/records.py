"""Tensors of a checkpoint as records: where their elements lie or how they are made, never the values.

A :class:`StoredTensor` says where its elements lie (a :class:`~ckpt_surgeon.tensors.storage.Storage` and dtype,
shape, stride, offset).  A :class:`ComputedTensor` says how its bytes will be made when they are written.  An
:class:`OpaqueTensor` (sparse, quantized …) fits into no plain container and can only be named.  A writer first asks
whether a tensor is one span; otherwise it takes ``blocks()``: the elements in row-major order, little-endian, in
pieces of about :data:`~ckpt_surgeon.files.spans.BLOCK` bytes.  Nothing here imports torch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Protocol, TypeAlias

from ..errors import EditError
from ..files.paths import FilePath
from ..files.spans import Block, ByteSpan
from .dtypes import EXTRA_STATE, DType
from .storage import Storage
from .stored import Loadable, StoredTensor
from .strides import row_major


@dataclass(slots=True, eq=False)
class Finding:
    """What computing a tensor brought to light: a problem that forbids the result, a note on it."""

    problem: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ComputedTensor(Loadable):
    """A tensor whose bytes are made from ``inputs`` when they are written, block by block.

    ``make`` takes the inputs and yields the elements in row-major order, little-endian.  It leaves what it finds out
    in ``finding``; the writer looks there before it replaces anything.  ``files`` are those that ``make`` reads
    beside the inputs.  ``in_sequence`` says that the bytes are those of the inputs, one after the other.
    """

    dtype: DType
    shape: tuple[int, ...]
    inputs: tuple[Tensor, ...]
    make: Callable[[tuple[Tensor, ...]], Iterator[Block]]
    finding: Finding | None = None
    files: tuple[FilePath, ...] = ()
    in_sequence: bool = False

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

    ``kind`` says what it is ("sparse_coo", "quantized", "meta", a subclass's name).  Where the file has one rank's part
    of a tensor, ``shape`` is that of the whole, ``local`` has the elements that are there, and ``part`` says which;
    ``offsets`` are where those begin in the whole, if that is known and they are a box of it.
    """

    kind: str
    dtype: DType
    shape: tuple[int, ...]
    device: str = "cpu"
    local: StoredTensor | None = None
    part: str = ""
    offsets: tuple[int, ...] | None = None

    span = None
    crc32 = None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.local.nbytes if self.local is not None else 0

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


def producer(tensor: Tensor) -> ComputedTensor | None:
    """The computed tensor that makes a tensor's bytes: itself, or the one behind its storage; None for stored bytes."""
    found = tensor.storage.source if isinstance(tensor, StoredTensor) else tensor
    return found if isinstance(found, ComputedTensor) else None


def findings(tensors: Iterable[Tensor]) -> Iterator[Finding]:
    """What computing these tensors, and their inputs, brought to light."""
    seen: set[int] = set()
    waiting = deque(tensors)
    while waiting:
        computed = producer(waiting.popleft())
        if computed is not None and id(computed) not in seen:
            seen.add(id(computed))
            waiting.extend(computed.inputs)
            if computed.finding is not None and id(computed.finding) not in seen:
                seen.add(id(computed.finding))
                yield computed.finding


def sequence_of(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors whose bytes, one after the other, are a tensor's: itself, or those that it is joined of."""
    made = producer(tensor) if isinstance(tensor, ComputedTensor) or _is_all_of_its_storage(tensor) else None
    if made is not None and made.in_sequence:
        for part in made.inputs:
            yield from sequence_of(part)
    else:
        yield tensor


def _is_all_of_its_storage(tensor: Tensor) -> bool:
    """Whether a tensor's bytes are those of its storage, in their order."""
    return (
        isinstance(tensor, StoredTensor)
        and tensor.nbytes == tensor.storage.nbytes
        and tensor.is_contiguous
        and not (tensor.conjugate or tensor.negative)
    )


def unseen_span(tensor: Tensor) -> ByteSpan | None:
    """The span that may be copied without a look at its bytes, where a tensor is one.

    What comes from a server and has a checksum is read instead, which compares it: it passes through memory anyway.
    """
    span = tensor.span
    if span is None or span.path.remote is None or not isinstance(tensor, StoredTensor):
        return span
    return span if tensor.storage.crc32 is None else None


def spans_of(tensors: Iterable[Tensor]) -> Iterator[ByteSpan]:
    """The spans of files that are read when these tensors are read one after another."""
    for tensor in tensors:
        if (computed := producer(tensor)) is not None:
            yield from spans_of(computed.inputs)
        elif isinstance(tensor, StoredTensor) and (span := tensor.span or tensor.storage.span) is not None:
            yield span
