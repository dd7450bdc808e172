"""Casts of tensors to another dtype, block by block, and what they lose beyond rounding.

numpy and ml_dtypes convert.  torch's vector code makes conversions to and from float16 several times faster; it is
used where torch is imported already, and where there are so many elements that it pays to import it
(:data:`TORCH_PAYS`).  Both ways give the same bits: blocks with values on which torch's own code paths or releases
differ (NaN, too large, flushed to zero) are always computed by numpy.

Nothing here imports numpy, ml_dtypes or torch before a value is asked for.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import EditError
from ..files.spans import Block
from .blocks import Piece, in_order, pieces
from .conversion import converted, is_coded, narrowed, numbers, real, rounded_to_odd, too_large, widened
from .dtypes import BY_NAME, DType
from .records import Tensor
from .torch_bridge import raw_bytes, typed

if TYPE_CHECKING:
    from .conversion import Array

# Elements from which on importing torch pays.  Measured on two cores: the import takes 2.6 s, and each element that
# becomes a float16 takes 1.3 ns less by torch.
TORCH_PAYS = 2_000_000_000

_FASTER_BY_TORCH = {("float32", "float16"), ("float64", "float16"), ("float16", "float32"), ("float16", "float64")}

_INF = {"float16": 0x7C00, "bfloat16": 0x7F80}  # the code of inf


def check_computable(key: str, dtype: DType) -> None:
    """Raise EditError for a dtype that torch only stores."""
    if not dtype.is_computable:
        raise EditError([f"{key!r}: torch does not compute with {dtype}"])


@dataclass(slots=True)
class Losses:
    """How many values a cast changed by more than rounding.

    ``infinite`` became inf, or were too large for a dtype without inf; ``flushed`` became zero; ``inexact`` are not
    the same number any more, counted for integers and float8_e8m0fnu only.
    """

    infinite: int = 0
    flushed: int = 0
    inexact: int = 0

    def add(self, other: Losses) -> None:
        self.infinite += other.infinite
        self.flushed += other.flushed
        self.inexact += other.inexact


def cast(tensor: Tensor, target: DType, losses: Losses, *, elements: int = 0) -> Iterator[Block]:
    """Yield a tensor's elements in another dtype, and add up in ``losses`` what got lost.

    ``elements`` is how many will be computed with in all, this tensor's and others'; it chooses the engine.
    """
    torch_is_faster = (tensor.dtype.name, target.name) in _FASTER_BY_TORCH and torch_pays(elements)
    by = cast_by_torch if torch_is_faster else cast_by_numpy

    def convert(piece: Piece) -> tuple[Block, Losses]:
        return by(piece.read(0), tensor.dtype, target)

    for block, lost in in_order(convert, pieces(tensor), tensor.nbytes):
        losses.add(lost)
        yield block


def torch_pays(elements: int) -> bool:
    return "torch" in sys.modules or elements >= TORCH_PAYS


def cast_by_numpy(raw: Block | bytearray, source: DType, target: DType) -> tuple[Block, Losses]:
    """One block in another dtype, and what got lost."""
    import numpy as np

    with np.errstate(all="ignore"):
        values, kind, wanted = numbers(raw, source), real(source), real(target)
        if wanted.is_floating and wanted.itemsize == 1 and not is_coded(kind):
            values, kind = rounded_to_odd(np.asarray(values, np.float32)), BY_NAME["bfloat16"]
        made = converted(values, kind, wanted)
        if target.name == "complex32" and source.name == "float16":  # torch makes NaNs quiet here too
            made = narrowed(widened(values, kind), wanted)
        if is_exact(target):
            losses = Losses(inexact=_changed(numbers(raw, source), made, real(source), wanted))
        else:
            losses = Losses(_overflown(values, made, kind, wanted, per_number=1 + source.is_complex))
            if source.is_floating and target.itemsize <= source.itemsize and (zeros := _zeros(made, wanted)):
                losses.flushed = zeros - _zeros(values, kind)
        if target.is_complex and not source.is_complex:
            made = np.stack([made, np.zeros_like(made)], axis=-1)
        return bytes_of(made), losses


def bytes_of(values: Array) -> memoryview:
    import numpy as np

    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


def is_exact(target: DType) -> bool:
    """Whether a cast to this dtype has to keep every number: integers, bool, powers of two."""
    return target.name == "float8_e8m0fnu" or not (target.is_floating or target.is_complex)


def _changed(values: Array, made: Array, source: DType, target: DType) -> int:
    """How many numbers are others after a cast to a dtype that has to hold them exactly."""
    wide = widened(values, source)
    back = widened(made, target).astype(wide.dtype)
    differs = back != wide
    if target.is_floating:
        differs &= ~((back != back) & (wide != wide))  # NaN stays NaN
    if source.is_floating and not target.is_floating:  # what the processor makes of too large a number may seem equal
        differs |= wide >= 2.0 ** (8 * target.itemsize - (not target.name.startswith("u")))
    elif not target.is_floating:
        differs |= (made < 0) != (values < 0)
    return int(differs.sum())


def _overflown(values: Array, made: Array, source: DType, target: DType, *, per_number: int) -> int:
    """How many numbers were too large: they became inf, or in an 8-bit float without it NaN or the greatest one."""
    import numpy as np

    if target.name == "float64" or (target.name == "float32" and source.name != "float64"):
        return 0
    flags: Array | None = None
    if target.itemsize == 1:
        flags = too_large(values, source, target)
    elif not is_coded(target) or (made & 0x7FFF).max(initial=0) >= _INF[target.name]:
        before = np.isfinite(widened(values, source)).reshape(-1, per_number).all(axis=1)
        after = np.isfinite(widened(made, target)).reshape(-1, per_number).all(axis=1)
        flags = np.greater(before, after)
    return 0 if flags is None else int(flags.sum())


def _zeros(values: Array, dtype: DType) -> int:
    """How many numbers are zero, of either sign."""
    import numpy as np

    if dtype.name == "float8_e8m0fnu":
        return 0
    has_negative_zero = is_coded(dtype) and not dtype.name.endswith("fnuz")
    return values.size - int(np.count_nonzero(values << 1 if has_negative_zero else values))


def cast_by_torch(raw: Block | bytearray, source: DType, target: DType) -> tuple[Block, Losses]:
    """One block of floats in another dtype by torch, and what got lost; with NaN or inf in it, by numpy."""
    import torch

    before = typed(raw, source)
    after = before.to(getattr(torch, target.name))
    if not after.numel() or not bool(after.abs().max() < math.inf):  # NaN is not less either
        return cast_by_numpy(raw, source, target)
    losses = Losses()
    if target.itemsize <= source.itemsize:
        losses.flushed = int(torch.count_nonzero(before)) - int(torch.count_nonzero(after))
    return raw_bytes(after), losses
