"""Everything that computes with the values of tensors: the one place where numpy or torch is chosen.

numpy and ml_dtypes compute casts, products, statistics and comparisons, in blocks and by several threads.  torch is
asked for what only it has (:func:`by_torch`: interpolation, matrix products, random numbers), and for conversions to
and from float16, which its vector code makes several times faster: where it is imported already, and where there are
so many elements that it pays to import it (:data:`TORCH_PAYS`).  Both ways give the same bits: blocks with values
on which torch's own code paths or releases differ (NaN, too large, flushed to zero) are always computed by numpy.

Nothing here imports numpy, ml_dtypes or torch before a value is asked for.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ..errors import EditError
from ..files.spans import BLOCK, Block
from .blocks import Piece, in_order, paired, pieces
from .conversion import converted, is_coded, narrowed, numbers, real, rounded_to_odd, too_large, widened
from .dtypes import BY_NAME, DType
from .records import Tensor
from .torch_bridge import raw_bytes, typed, whole

if TYPE_CHECKING:
    import torch

    from .conversion import Array, Number

# Elements from which on importing torch pays.  Measured on two cores: the import takes 2.6 s, and each element that
# becomes a float16 takes 1.3 ns less by torch.
TORCH_PAYS = 2_000_000_000

_FASTER_BY_TORCH = {("float32", "float16"), ("float64", "float16"), ("float16", "float32"), ("float16", "float64")}

_INF = {"float16": 0x7C00, "bfloat16": 0x7F80}  # the code of inf


def check_computable(key: str, dtype: DType) -> None:
    """Raise EditError for a dtype that torch only stores."""
    if not dtype.is_computable:
        raise EditError([f"{key!r}: torch does not compute with {dtype}"])


# -- casts


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
    torch_is_faster = (tensor.dtype.name, target.name) in _FASTER_BY_TORCH and _torch_pays(elements)
    by = cast_by_torch if torch_is_faster else cast_by_numpy

    def convert(piece: Piece) -> tuple[Block, Losses]:
        return by(piece.read(0), tensor.dtype, target)

    for block, lost in in_order(convert, pieces(tensor), tensor.nbytes):
        losses.add(lost)
        yield block


def _torch_pays(elements: int) -> bool:
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
        return _bytes(made), losses


def _bytes(values: Array) -> memoryview:
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


# -- products, constants


def scaled(tensor: Tensor, factor: float, *, elements: int = 0) -> Iterator[Block]:
    """Yield a tensor's elements times a factor, in their own dtype; short floats are multiplied as float32.

    ``elements`` as in :func:`cast`.  complex32 is always left to torch, which rounds in the middle of such products.
    """
    by = _scaled_by_numpy
    if tensor.dtype.name == "complex32" or (tensor.dtype.name == "float16" and _torch_pays(elements)):
        by = _scaled_by_torch

    def multiply(piece: Piece) -> Block:
        return by(piece.read(0), tensor.dtype, factor)

    return in_order(multiply, pieces(tensor), tensor.nbytes)


def _scaled_by_numpy(raw: Block | bytearray, dtype: DType, factor: float) -> Block:
    import numpy as np

    with np.errstate(all="ignore"):
        part = real(dtype)
        wide = widened(numbers(raw, dtype), part)
        times = wide.dtype.type(factor)
        made = _complex_product(wide, times) if dtype.is_complex else wide * times
        if is_coded(part):
            made = narrowed(made, part)
        return _bytes(made)


def _complex_product(parts: Array, factor: Number) -> Array:
    """Complex numbers times factor + 0i, by the plain formula, so that inf and NaN come out as torch has them."""
    import numpy as np

    pairs, nothing = parts.reshape(-1, 2), parts.dtype.type(0)
    a, b = pairs[:, 0], pairs[:, 1]
    return np.stack([a * factor - b * nothing, a * nothing + b * factor], axis=-1)


def _scaled_by_torch(raw: Block | bytearray, dtype: DType, factor: float) -> Block:
    made = typed(raw, dtype) * factor
    if dtype.name == "complex32":
        return raw_bytes(made)
    if not made.numel() or not bool(made.abs().max() < math.inf):
        return _scaled_by_numpy(raw, dtype, factor)
    return raw_bytes(made)


def filled(dtype: DType, count: int, value: float) -> Iterator[Block]:
    """Yield ``count`` elements of one value.  Raises EditError where a dtype does not have it, rounding apart."""
    import numpy as np

    if not count:
        return
    raw, losses = cast_by_numpy(np.array([value], np.float64).tobytes(), BY_NAME["float64"], dtype)
    if losses.infinite or losses.inexact:
        raise EditError([f"{dtype} has no {value}"])
    whole = memoryview(bytes(raw) * min(count, BLOCK // dtype.itemsize))
    for start in range(0, count * dtype.itemsize, len(whole)):
        yield whole[: count * dtype.itemsize - start]


# -- statistics


@dataclass(slots=True)
class Sums:
    """Sums over numbers: of ``count`` finite ones their mean, squared deviations, least and greatest; NaN and inf."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    low: float = math.inf
    high: float = -math.inf
    nan: int = 0
    inf: int = 0

    def add(self, other: Sums) -> None:
        """Join two sums (Chan, Golub, LeVeque: the parallel form of the variance)."""
        self.nan, self.inf = self.nan + other.nan, self.inf + other.inf
        if other.count:
            gap, total = other.mean - self.mean, self.count + other.count
            self.squares += other.squares + gap * gap * self.count * other.count / total
            self.mean += gap * other.count / total
            self.count = total
            self.low, self.high = min(self.low, other.low), max(self.high, other.high)


def summed(tensor: Tensor) -> Sums:
    """Sum up a tensor, computed in float64; complex numbers by their magnitudes."""
    total = Sums()
    for sums in in_order(lambda piece: _summed(piece.read(0), tensor.dtype), pieces(tensor), tensor.nbytes):
        total.add(sums)
    return total


def _summed(raw: Block | bytearray, dtype: DType) -> Sums:
    import numpy as np

    with np.errstate(all="ignore"):
        values = widened(numbers(raw, dtype), real(dtype))
        if dtype.is_complex:
            values = np.hypot(values[::2], values[1::2])
        found = Sums()
        low, high = float(values.min()), float(values.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            found.nan, found.inf = int(np.isnan(values).sum()), int(np.isinf(values).sum())
            values = values[np.isfinite(values)]
            low, high = (float(values.min()), float(values.max())) if values.size else (math.inf, -math.inf)
        if values.size:
            found.count, found.low, found.high = values.size, low, high
            wide = values.astype(np.float64)
            found.mean = float(wide.mean())
            wide -= found.mean
            wide *= wide
            found.squares = float(wide.sum())
        return found


# -- comparisons


@dataclass(slots=True)
class Distance:
    """How far two tensors are apart: sums over what is finite on both sides, NaN and inf counted on each.

    ``greatest`` absolute difference; sums of squares of the ``difference``, of ``ours`` and ``theirs``, and of the
    ``product``.
    """

    greatest: float = 0.0
    difference: float = 0.0
    ours: float = 0.0
    theirs: float = 0.0
    product: float = 0.0
    nan: tuple[int, int] = (0, 0)
    inf: tuple[int, int] = (0, 0)

    def add(self, other: Distance) -> None:
        self.greatest = max(self.greatest, other.greatest)
        self.difference += other.difference
        self.ours += other.ours
        self.theirs += other.theirs
        self.product += other.product
        self.nan = (self.nan[0] + other.nan[0], self.nan[1] + other.nan[1])
        self.inf = (self.inf[0] + other.inf[0], self.inf[1] + other.inf[1])


def distance(ours: Tensor, theirs: Tensor) -> Distance:
    """Measure two tensors of one shape, computed in float64; the parts of complex numbers are numbers of their own."""
    compare = partial(_distance, ours.dtype, theirs.dtype)
    total = Distance()
    for found in in_order(lambda pair: compare(pair[0].read(0), pair[1].read(1)), paired(ours, theirs), ours.nbytes):
        total.add(found)
    return total


def _distance(ours: DType, theirs: DType, mine: Block | bytearray, other: Block | bytearray) -> Distance:
    import numpy as np

    with np.errstate(all="ignore"):
        one, two = (widened(numbers(raw, dtype), real(dtype)) for raw, dtype in ((mine, ours), (other, theirs)))
        if ours.is_complex != theirs.is_complex:
            one, two = (side if dtype.is_complex else _with_zeros(side) for side, dtype in ((one, ours), (two, theirs)))
        a, b = one.astype(np.float64), two.astype(np.float64)
        found = Distance()
        gap = a - b
        if ours == theirs and not (ours.is_floating or ours.is_complex):
            gap[(gap == 0) & (one != two)] = 1.0  # 64-bit integers that float64 takes for the same
        if not np.isfinite(gap).all():
            found.nan = (int(np.isnan(a).sum()), int(np.isnan(b).sum()))
            found.inf = (int(np.isinf(a).sum()), int(np.isinf(b).sum()))
            finite = np.isfinite(a) & np.isfinite(b)
            a, b, gap = a[finite], b[finite], gap[finite]
        if gap.size:
            found.greatest = float(max(gap.max(), -gap.min()))
            found.difference, found.product = float(np.square(gap).sum()), float((a * b).sum())
            found.ours, found.theirs = float(np.square(a).sum()), float(np.square(b).sum())
        return found


def _with_zeros(values: Array) -> Array:
    import numpy as np

    return np.stack([values, np.zeros_like(values)], axis=-1).reshape(-1)


# -- what only torch computes


def by_torch(inputs: tuple[Tensor, ...], formula: Callable[..., torch.Tensor], dtype: DType) -> Iterator[Block]:
    """Yield the bytes of what a formula makes of whole torch tensors, in a dtype."""
    import torch

    made = formula(*(whole(tensor) for tensor in inputs))
    yield raw_bytes(made.detach().to(getattr(torch, dtype.name)).contiguous())
