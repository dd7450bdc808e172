"""Products, constants, statistics and comparisons of the values of tensors.

numpy and ml_dtypes compute them in blocks and by several threads.  torch computes what only it has (:func:`by_torch`:
interpolation, matrix products, random numbers), and products of float16 where that pays (see
:mod:`ckpt_surgeon.tensors.casts`).  Both ways give the same bits.

Nothing here imports numpy, ml_dtypes or torch before a value is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ..errors import EditError
from ..files.spans import BLOCK, Block
from .blocks import Piece, alongside, in_order, pieces
from .casts import bytes_of, cast_by_numpy, torch_pays
from .conversion import is_coded, narrowed, numbers, real, widened
from .dtypes import BY_NAME, DType
from .records import Tensor
from .torch_bridge import raw_bytes, typed, whole

if TYPE_CHECKING:
    import torch

    from .conversion import Array, Number

# -- products, constants


def scaled(tensor: Tensor, factor: float, *, elements: int = 0) -> Iterator[Block]:
    """Yield a tensor's elements times a factor, in their own dtype; short floats are multiplied as float32.

    ``elements`` as in :func:`cast`.  complex32 is always left to torch, which rounds in the middle of such products.
    """
    by = _scaled_by_numpy
    if tensor.dtype.name == "complex32" or (tensor.dtype.name == "float16" and torch_pays(elements)):
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
        return bytes_of(made)


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


def magnitude_of_rank(base: Tensor, other: Tensor, rank: int) -> float:
    """The ``rank``-th largest magnitude of other − base, in float64; inf for rank 0.

    Two passes: the first counts magnitudes by their leading 16 bits (sign, exponent and four bits of the mantissa),
    the second looks at those alone that share them with the one that is looked for.
    """
    import numpy as np

    if rank <= 0:
        return math.inf
    counts = sum(_magnitudes(base, other, lambda bits: np.bincount(bits >> np.uint64(48), minlength=1 << 15)))
    at_least = np.cumsum(np.asarray(counts)[::-1])[::-1]
    bucket = int(np.nonzero(at_least >= rank)[0][-1])
    above = int(at_least[bucket + 1]) if bucket + 1 < len(at_least) else 0
    found = np.concatenate(list(_magnitudes(base, other, lambda bits: bits[bits >> np.uint64(48) == bucket])))
    place = len(found) - (rank - above)
    return float(np.partition(found, place)[place].view(np.float64))


def _magnitudes(base: Tensor, other: Tensor, function: Callable[[Array], Array]) -> Iterator[Array]:
    """What a function makes of the magnitudes of a difference, as bits of float64, block by block."""
    import numpy as np

    def compute(pair: tuple[Piece, ...]) -> Array:
        with np.errstate(all="ignore"):
            one, two = (
                widened(numbers(piece.read(slot), tensor.dtype), real(tensor.dtype)).astype(np.float64)
                for slot, (piece, tensor) in enumerate(zip(pair, (base, other), strict=True))
            )
            two -= one
            return function(np.abs(two).view(np.uint64))

    yield from in_order(compute, alongside(base, other), base.nbytes + other.nbytes)


# -- comparisons


@dataclass(slots=True)
class Distance:
    """How far two tensors are apart: sums over what is finite on both sides, NaN and inf counted on each.

    ``greatest`` absolute difference; sums of squares of the ``difference``, of ``ours`` and ``theirs``, and of the
    ``product``; how many elements are ``differing``.
    """

    greatest: float = 0.0
    difference: float = 0.0
    ours: float = 0.0
    theirs: float = 0.0
    product: float = 0.0
    nan: tuple[int, int] = (0, 0)
    inf: tuple[int, int] = (0, 0)
    differing: int = 0

    def add(self, other: Distance) -> None:
        self.greatest = max(self.greatest, other.greatest)
        self.difference += other.difference
        self.ours += other.ours
        self.theirs += other.theirs
        self.product += other.product
        self.differing += other.differing
        self.nan = (self.nan[0] + other.nan[0], self.nan[1] + other.nan[1])
        self.inf = (self.inf[0] + other.inf[0], self.inf[1] + other.inf[1])


def distance(ours: Tensor, theirs: Tensor) -> Distance:
    """Measure two tensors of one shape, computed in float64; the parts of complex numbers are numbers of their own."""
    compare = partial(_distance, ours.dtype, theirs.dtype)
    total = Distance()
    for found in in_order(lambda pair: compare(pair[0].read(0), pair[1].read(1)), alongside(ours, theirs), ours.nbytes):
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
            found.differing = int(np.count_nonzero(gap))
            found.greatest = float(max(gap.max(), -gap.min()))
            found.difference, found.product = float(np.square(gap).sum()), float((a * b).sum())
            found.ours, found.theirs = float(np.square(a).sum()), float(np.square(b).sum())
        return found


def _with_zeros(values: Array) -> Array:
    import numpy as np

    return np.stack([values, np.zeros_like(values)], axis=-1).reshape(-1)


def equal_blocks(tensors: Sequence[Tensor]) -> Iterator[tuple[Block, bool]]:
    """Yield the blocks of the first of some tensors of one dtype and shape, and whether the others' bytes are equal."""
    for first, *others in alongside(*tensors):
        mine = bytes(first.read(0))
        yield mine, all(bytes(other.read(1)) == mine for other in others)


def largest(tensors: Sequence[Tensor]) -> Iterator[Block]:
    """Yield the largest of the values of some tensors of one integer dtype, or bool, and shape."""
    import numpy as np

    dtype = tensors[0].dtype
    for parts in alongside(*tensors):
        values = [numbers(part.read(slot), dtype) for slot, part in enumerate(parts)]
        yield bytes_of(np.maximum.reduce(values))


# -- what only torch computes


def by_torch(inputs: tuple[Tensor, ...], formula: Callable[..., torch.Tensor], dtype: DType) -> Iterator[Block]:
    """Yield the bytes of what a formula makes of whole torch tensors, in a dtype."""
    import torch

    made = formula(*(whole(tensor) for tensor in inputs))
    yield raw_bytes(made.detach().to(getattr(torch, dtype.name)).contiguous())
