"""What a change of values is, as the values themselves show it: a cast, a scaling, few elements, a low rank.

A kind is named only where the numbers prove it within the rounding of the dtype; every other change is "all".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..tensors.arithmetic import Distance
from ..tensors.records import Tensor
from ..text import Shown

if TYPE_CHECKING:
    import torch

SPARSE = 0.05  # share of elements that a sparse change may touch
LARGEST = 4096  # the shorter side of the largest matrix whose singular values are computed

_DIGITS = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}  # bits of a significand


@dataclass(frozen=True, slots=True, repr=False)
class Spectrum(Shown):
    """The singular values of a difference, as a matrix of its first dimension by all others.

    ``values`` are the greatest, at most eight.  ``stable`` is the stable rank (sum of squares over the greatest
    square), ``effective`` the effective rank (the exponential of the entropy of the values' shares: Roy and Vetterli,
    2007), ``rank`` how many singular values stand above what rounding the second tensor makes, of ``full``.
    """

    values: tuple[float, ...]
    stable: float
    effective: float
    rank: int
    full: int


def kind_of(ours: Tensor, theirs: Tensor, found: Distance) -> str:
    """The kind of a change of measured tensors: "scaled by 0.5", "sparse, 3 of 4,096 elements", or "all".

    >>> from ckpt_surgeon import from_torch
    >>> import torch
    >>> from ckpt_surgeon.tensors.arithmetic import distance
    >>> a, b = from_torch({"a": torch.tensor([1.0, 2.0, 4.0]), "b": torch.tensor([0.5, 1.0, 2.0])}).values()
    >>> kind_of(a, b, distance(a, b))
    'scaled by 0.5'
    """
    unusual = sum(found.nan) + sum(found.inf)
    if not unusual and found.ours and found.theirs:
        factor = found.product / found.ours
        rest = max(found.theirs - factor * found.product, 0.0)
        allowed = (_rounding(theirs) ** 2 + 1e-14) * found.theirs  # 1e-14: what float64 itself loses in such sums
        if rest <= allowed and rest <= 0.01 * found.difference and theirs.numel > 1:
            return f"scaled by {factor:.6g}"
    if not unusual and 0 < found.differing <= SPARSE * theirs.numel:
        return f"sparse, {found.differing:,} of {theirs.numel:,} elements"
    return "all"


def _rounding(tensor: Tensor) -> float:
    """The greatest relative error of rounding to a tensor's dtype; 0 where nothing is rounded."""
    digits = _DIGITS.get(tensor.dtype.name)
    return 2.0**-digits if digits else 0.0


def spectrum(ours: Tensor, theirs: Tensor) -> Spectrum | None:
    """The singular values of ``theirs - ours``; None for vectors, for very large matrices, and where some value is
    not finite."""
    import torch

    if len(theirs.shape) < 2 or not (ours.dtype.is_floating and theirs.dtype.is_floating) or not theirs.numel:
        return None
    rows = theirs.shape[0]
    if min(rows, theirs.numel // rows) > LARGEST:
        return None
    second = theirs.load().to(torch.float64).reshape(rows, -1)
    gap = second - ours.load().to(torch.float64).reshape(rows, -1)
    if not bool(torch.isfinite(gap).all()):
        return None
    return _described(torch.linalg.svdvals(gap), _rounding(theirs) * float(second.norm()))


def _described(values: torch.Tensor, noise: float) -> Spectrum:
    """What singular values say; ``noise`` is the norm that rounding alone can have."""
    squares = values.square()
    total = float(squares.sum())
    if not total:
        return Spectrum((), 0.0, 0.0, 0, len(values))
    tails = squares.flip(0).cumsum(0).flip(0).sqrt()  # the norm of what is left from each singular value on
    floor = max(noise, 1e-12 * math.sqrt(total))
    shares = values[values > 0] / values.sum()
    entropy = float(-(shares * shares.log()).sum())
    greatest = tuple(map(float, values[:8]))
    return Spectrum(greatest, total / float(squares[0]), math.exp(entropy), int((tails > floor).sum()), len(values))


def with_rank(kind: str, found: Spectrum | None) -> str:
    """A kind, made "low-rank, rank 4" where singular values show that of a change that is "all".

    >>> with_rank("all", Spectrum((1.0,), 1.0, 1.0, 1, 64)), with_rank("all", None)
    ('low-rank, rank 1', 'all')
    """
    if kind != "all" or found is None or not 0 < found.rank <= found.full // 4:
        return kind
    return f"low-rank, rank {found.rank}"
