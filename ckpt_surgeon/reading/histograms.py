"""Histograms of the values of a tensor, in a range that outliers do not stretch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..tensors.arithmetic import Sums, summed
from ..tensors.counting import counted
from ..tensors.records import ExtraState, OpaqueTensor, Tensor
from ..text import Shown

BINS = 32
REACH = 4.0  # standard deviations around the mean that the bins cover; what is beyond is counted on either side


@dataclass(frozen=True, slots=True, repr=False)
class Histogram(Shown):
    """How many values are in each of ``counts`` bins of equal width from ``low`` to ``high``.

    ``below`` and ``above`` are beyond these; ``zeros`` are in the bins, too, ``nan`` and ``inf`` are not.
    """

    low: float
    high: float
    counts: tuple[int, ...]
    below: int = 0
    above: int = 0
    zeros: int = 0
    nan: int = 0
    inf: int = 0

    @property
    def total(self) -> int:
        """How many values there are, of whatever kind."""
        return sum(self.counts) + self.below + self.above + self.nan + self.inf


def histogram(tensor: Tensor, *, sums: Sums | None = None) -> Histogram | None:
    """The histogram of a tensor, over its values within four standard deviations of their mean; complex numbers by
    magnitude.

    ``sums`` are those of the tensor, where they are known.  None where there are no numbers (an extra state, packed
    bits, no elements).

    >>> import torch
    >>> from ckpt_surgeon import from_torch
    >>> found = histogram(from_torch({"w": torch.tensor([0.0, 1.0, 2.0, float("nan")])})["w"])
    >>> found.low, found.high, found.counts[0], found.counts[-1], found.zeros, found.nan
    (0.0, 2.0, 1, 1, 1, 1)
    """
    return histograms([tensor], [sums] if sums else None)[0]


def histograms(tensors: Sequence[Tensor], sums: Sequence[Sums] | None = None) -> list[Histogram | None]:
    """The histograms of some tensors over one range, which covers all of theirs; see :func:`histogram`."""
    if any(isinstance(tensor, (OpaqueTensor, ExtraState)) or not tensor.dtype.is_computable for tensor in tensors):
        return [None] * len(tensors)
    known = sums or [summed(tensor) for tensor in tensors]
    ranges = [_range(one) for one in known if one.count]
    if not ranges or any(not tensor.numel for tensor in tensors):
        return [None] * len(tensors)
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    return [_histogram(tensor, low, high) for tensor in tensors]


def _range(sums: Sums) -> tuple[float, float]:
    reach = REACH * math.sqrt(sums.squares / sums.count)
    return max(sums.low, sums.mean - reach), min(sums.high, sums.mean + reach)


def _histogram(tensor: Tensor, low: float, high: float) -> Histogram:
    found = counted(tensor, low, high, BINS)
    return Histogram(low, high, tuple(found.bins), found.below, found.above, found.zeros, found.nan, found.inf)
