"""The element types of ggml: blocks of numbers with their scales, decoded and encoded by the package ``gguf``.

A tensor of such a type has rows of whole blocks; each block is some bytes that stand for some numbers, by itself, so a
tensor is decoded a few hundred blocks at a time.  The sizes are those of ggml's ``type_traits``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, cast

from ..errors import EditError
from ..files.spans import Block, ByteSpan
from .dtypes import BY_NAME, DType
from .records import ComputedTensor, Tensor
from .stored import StoredTensor

if TYPE_CHECKING:
    from .conversion import Array

WORKED = 1 << 20  # bytes of numbers that are decoded or encoded at a time
FLOAT = BY_NAME["float32"]  # what codes stand for


class Coding(NamedTuple):
    """A type whose elements are coded in blocks: its name, its number, numbers a block and bytes a block."""

    name: str
    number: int
    numbers: int
    nbytes: int
    is_decoded: bool = True  # False for what no tool keeps weights in

    def bytes_of(self, numel: int) -> int:
        """Bytes of so many numbers, which are whole blocks.

        >>> CODINGS[8].bytes_of(64)
        68
        """
        return numel // self.numbers * self.nbytes


# Types of plain elements, by their numbers in a file.
PLAIN: dict[int, DType] = {
    0: BY_NAME["float32"],
    1: BY_NAME["float16"],
    24: BY_NAME["int8"],
    25: BY_NAME["int16"],
    26: BY_NAME["int32"],
    27: BY_NAME["int64"],
    28: BY_NAME["float64"],
    30: BY_NAME["bfloat16"],
}
NUMBERS = {dtype.name: number for number, dtype in PLAIN.items()}

CODINGS: dict[int, Coding] = {
    coding.number: coding
    for coding in (
        Coding("q4_0", 2, 32, 18),
        Coding("q4_1", 3, 32, 20),
        Coding("q5_0", 6, 32, 22),
        Coding("q5_1", 7, 32, 24),
        Coding("q8_0", 8, 32, 34),
        Coding("q8_1", 9, 32, 40, is_decoded=False),
        Coding("q2_k", 10, 256, 84),
        Coding("q3_k", 11, 256, 110),
        Coding("q4_k", 12, 256, 144),
        Coding("q5_k", 13, 256, 176),
        Coding("q6_k", 14, 256, 210),
        Coding("q8_k", 15, 256, 292, is_decoded=False),
        Coding("iq2_xxs", 16, 256, 66),
        Coding("iq2_xs", 17, 256, 74),
        Coding("iq3_xxs", 18, 256, 98),
        Coding("iq1_s", 19, 256, 50),
        Coding("iq4_nl", 20, 32, 18),
        Coding("iq3_s", 21, 256, 110),
        Coding("iq2_s", 22, 256, 82),
        Coding("iq4_xs", 23, 256, 136),
        Coding("iq1_m", 29, 256, 56),
        Coding("tq1_0", 34, 256, 54),
        Coding("tq2_0", 35, 256, 66),
        Coding("mxfp4", 39, 32, 17),
        Coding("nvfp4", 40, 64, 36),
    )
}
Q8_0 = CODINGS[8]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Coded(ComputedTensor):
    """A tensor whose elements are codes of ggml: float32 for whoever reads it, its codes for a GGUF file.

    ``span`` is where the codes lie (``codes_at``), or ``encode`` makes them of the inputs.
    """

    coding: Coding = Q8_0
    codes_at: ByteSpan | None = None

    def codes(self) -> Iterator[Block]:
        """Yield the codes, whole blocks of them.  Raises EditError where the package ``gguf`` is not installed."""
        if self.codes_at is not None:
            return self.codes_at.blocks(_step(self.coding) * self.coding.nbytes)
        return _encoded(self.inputs[0], self.coding)


def stored_codes(coding: Coding, shape: tuple[int, ...], span: ByteSpan) -> StoredTensor:
    """The tensor of codes that lie in a file, as the float32 that they stand for; they are decoded when it is read."""

    def make(_: tuple[Tensor, ...]) -> Iterator[Block]:
        return _decoded(span.blocks(_step(coding) * coding.nbytes), coding)

    return Coded(FLOAT, shape, (), make, files=(span.path,), coding=coding, codes_at=span).stored()


def encoded(tensor: Tensor, coding: Coding) -> StoredTensor:
    """A tensor with the values that its codes stand for, which are made when it is written.

    Its rows have to be whole blocks.
    """

    def make(inputs: tuple[Tensor, ...]) -> Iterator[Block]:
        return _decoded(_encoded(inputs[0], coding), coding)

    return Coded(FLOAT, tensor.shape, (tensor,), make, coding=coding).stored()


def coded(tensor: Tensor) -> Coded | None:
    """The codes behind a tensor, where it is all of them in their order, with rows of whole blocks; else None."""
    if not isinstance(tensor, StoredTensor) or not isinstance(found := tensor.storage.source, Coded):
        return None
    is_whole = tensor.nbytes == tensor.storage.nbytes and tensor.is_contiguous and tensor.dtype == FLOAT
    has_blocks = bool(tensor.shape) and tensor.shape[-1] % found.coding.numbers == 0
    return found if is_whole and has_blocks and not (tensor.conjugate or tensor.negative) else None


def _step(coding: Coding) -> int:
    """How many blocks are worked on at a time."""
    return max(WORKED // (FLOAT.itemsize * coding.numbers), 1)


def _package(coding: Coding) -> tuple[Callable[..., Array], Callable[..., Array], object]:
    """The functions of ``gguf`` that decode and encode, and its name of a type."""
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError as error:
        raise EditError([f"codes of {coding.name} need the package gguf"], remedy="pip install gguf") from error
    try:
        kind = GGMLQuantizationType(coding.number)
    except ValueError as error:
        raise EditError([f"the package gguf does not know {coding.name}"], remedy="pip install -U gguf") from error
    return cast("tuple[Callable[..., Array], Callable[..., Array], object]", (quants.dequantize, quants.quantize, kind))


def _decoded(codes: Iterator[Block], coding: Coding) -> Iterator[Block]:
    """The numbers of blocks, as float32."""
    import numpy as np

    dequantize, _, kind = _package(coding)
    for raw in codes:
        blocks = np.frombuffer(raw, np.uint8).reshape(-1, coding.nbytes)
        with np.errstate(all="ignore"):
            yield np.ascontiguousarray(dequantize(blocks, kind), dtype="<f4").reshape(-1).view(np.uint8).data


def _encoded(tensor: Tensor, coding: Coding) -> Iterator[Block]:
    """The codes of a tensor's numbers."""
    import numpy as np

    from .casts import Losses, cast

    _, quantize, kind = _package(coding)
    blocks = tensor.blocks() if tensor.dtype == FLOAT else cast(tensor, FLOAT, Losses())
    for raw in _in_steps(blocks, _step(coding) * coding.numbers * FLOAT.itemsize):
        numbers = np.frombuffer(raw, "<f4").reshape(-1, coding.numbers)
        with np.errstate(all="ignore"):
            yield np.ascontiguousarray(quantize(numbers, kind)).reshape(-1).view(np.uint8).data


def _in_steps(blocks: Iterator[Block], nbytes: int) -> Iterator[bytes]:
    """The same bytes in pieces of ``nbytes``; the last may be shorter."""
    rest = bytearray()
    for block in blocks:
        rest += block
        while len(rest) >= nbytes:
            yield bytes(rest[:nbytes])
            del rest[:nbytes]
    if rest:
        yield bytes(rest)
