"""How often which values occur in a tensor: counts in bins of equal width, zeros, NaN and inf apart."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..files.spans import Block
from .blocks import in_order, pieces
from .conversion import numbers, real, widened
from .dtypes import DType
from .records import Tensor

if TYPE_CHECKING:
    from .conversion import Array


@dataclass(slots=True)
class Counts:
    """How many values are in each of some bins between two numbers, below and above them, zero, NaN and infinite.

    Zeros are in their bin, too.
    """

    bins: list[int] = field(default_factory=list)
    below: int = 0
    above: int = 0
    zeros: int = 0
    nan: int = 0
    inf: int = 0

    def add(self, other: Counts) -> None:
        """Add the counts of other values."""
        self.bins = [mine + others for mine, others in zip(self.bins, other.bins, strict=True)]
        self.below, self.above = self.below + other.below, self.above + other.above
        self.zeros, self.nan, self.inf = self.zeros + other.zeros, self.nan + other.nan, self.inf + other.inf


def counted(tensor: Tensor, low: float, high: float, bins: int) -> Counts:
    """Count a tensor's values in so many bins of equal width from ``low`` to ``high``; complex ones by magnitude.

    The last bin holds ``high``, too.  Where both numbers are the same, all bins but the first are empty.
    """
    total = Counts([0] * bins)
    for found in in_order(
        lambda piece: _counted(piece.read(0), tensor.dtype, low, high, bins), pieces(tensor), tensor.nbytes
    ):
        total.add(found)
    return total


def _counted(raw: Block | bytearray, dtype: DType, low: float, high: float, bins: int) -> Counts:
    import numpy as np

    with np.errstate(all="ignore"):
        values = widened(numbers(raw, dtype), real(dtype)).astype(np.float64)
        if dtype.is_complex:
            values = np.hypot(values[::2], values[1::2])
        found = Counts([0] * bins, zeros=int(np.count_nonzero(values == 0)))
        if not np.isfinite(values).all():
            found.nan, found.inf = int(np.isnan(values).sum()), int(np.isinf(values).sum())
            values = values[np.isfinite(values)]
        found.below, found.above = int((values < low).sum()), int((values > high).sum())
        found.bins = _binned(values[(values >= low) & (values <= high)], low, high, bins)
        return found


def _binned(values: Array, low: float, high: float, bins: int) -> list[int]:
    import numpy as np

    width = (high - low) / bins
    if not (width > 0 and math.isfinite(width)):
        return [len(values)] + [0] * (bins - 1)
    places = np.minimum(((values - low) / width).astype(np.int64), bins - 1)
    return [int(count) for count in np.bincount(places, minlength=bins)]
