"""Edits that average checkpoints of one model: average, ema, lerp, slerp.

All sums are computed in float64 and rounded once.  Of integers and bools (counters, indices) no average is taken:
those that are equal everywhere stay, BatchNorm's counters become the largest, others are refused unless it is said
which count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from ..errors import EditError, listed
from ..tensors.arithmetic import distance
from ..tensors.checkpoint import Checkpoint
from ..tensors.combining import WeightedSum
from ..tensors.records import Tensor
from .alike import Alike, Common, HowRounded, Integers, OutDType, Seed, rounding_of
from .arguments import Input
from .change import Change, Inline
from .value_edit import value_edit

COLLINEAR = 0.9995  # the cosine above which slerp is lerp, as in mergekit


@value_edit(
    "Average checkpoints.",
    "epoch7.pth epoch8.pth epoch9.pth average.pth",
    "a.safetensors b.safetensors soup.safetensors --weights 0.7,0.3",
    inline=[Inline("", help="Average all inputs.")],
    computes=True,
)
def average(
    state_dict: Checkpoint,
    *others: Annotated[Input, "The checkpoints that are averaged with the first."],
    weights: Annotated[Sequence[float], "A weight for each input, in their order; their sum is taken as 1."] = (),
    common: Common = False,
    integers: Integers = "equal",
    dtype: OutDType = "",
    rounding: HowRounded = "nearest",
    seed: Seed = 0,
) -> Change[Checkpoint]:
    """Average checkpoints of one model: Σ wᵢ xᵢ ÷ Σ wᵢ, summed in float64 and rounded once.

    A key that one input lacks, or has with another shape, is an error, unless ``common`` takes what all have.  For
    float32 the result is that of timm's ``avg_checkpoints.py``, bit for bit.  Raises EditError.

    >>> import torch
    >>> average({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 4.0])})
    {'w': tensor([2., 3.])}
    """
    count = 1 + len(others)
    given = list(weights) or [1.0] * count
    if state_dict and len(given) != count:
        raise EditError([f"{count} checkpoints need {count} weights, given were {len(given)}"])
    total = math.fsum(given)
    if not math.isfinite(total) or total == 0:
        raise EditError([f"the weights {listed([str(one) for one in given])} have no sum to divide by"])
    alike = Alike(state_dict, others, common=common, integers=integers, dtype=dtype)
    return alike.change(lambda *_: WeightedSum(given, total), rounding_of(rounding, seed))


@value_edit(
    "Average with weights that decay.",
    "step1.pth step2.pth step3.pth ema.pth --decay 0.999",
    inline=[Inline("{decay}")],
    computes=True,
)
def ema(
    state_dict: Checkpoint,
    *others: Annotated[Input, "Later checkpoints, in the order in which they were saved."],
    decay: Annotated[float, "How much of the average so far is kept at each checkpoint, from 0 to 1."],
    common: Common = False,
    integers: Integers = "largest",
    dtype: OutDType = "",
    rounding: HowRounded = "nearest",
    seed: Seed = 0,
) -> Change[Checkpoint]:
    """The exponential moving average of checkpoints in their order: e ← decay · e + (1 − decay) · x, from the first.

    As ``torch.optim.swa_utils.get_ema_multi_avg_fn``, summed in float64 and rounded once.  Raises EditError.

    >>> import torch
    >>> ema({"w": torch.tensor([0.0])}, {"w": torch.tensor([1.0])}, decay=0.75)
    {'w': tensor([0.2500])}
    """
    if not 0 <= decay <= 1:
        raise EditError([f"a decay is from 0 to 1, not {decay}"])
    later = [(1 - decay) * decay ** (len(others) - 1 - index) for index in range(len(others))]
    alike = Alike(state_dict, others, common=common, integers=integers, dtype=dtype)
    return alike.change(lambda *_: WeightedSum([decay ** len(others), *later]), rounding_of(rounding, seed))


@value_edit(
    "Interpolate between two checkpoints.",
    "pretrained.safetensors tuned.safetensors between.safetensors --t 0.5",
    inline=[Inline("{t}")],
    computes=True,
)
def lerp(
    state_dict: Checkpoint,
    other: Annotated[Input, "The checkpoint that t = 1 gives."],
    t: Annotated[float, "Where between: 0 is the first checkpoint, 1 the second; beyond, it extrapolates."],
    *,
    common: Common = False,
    integers: Integers = "equal",
    dtype: OutDType = "",
    rounding: HowRounded = "nearest",
    seed: Seed = 0,
) -> Change[Checkpoint]:
    """Interpolate between two checkpoints: (1 − t) · a + t · b, in float64 and rounded once (WiSE-FT).

    >>> import torch
    >>> lerp({"w": torch.tensor([0.0])}, {"w": torch.tensor([4.0])}, 0.25)
    {'w': tensor([1.])}
    """
    alike = Alike(state_dict, [other], common=common, integers=integers, dtype=dtype)
    return alike.change(lambda *_: WeightedSum([1 - t, t]), rounding_of(rounding, seed))


@value_edit(
    "Interpolate on the sphere.",
    "one.safetensors two.safetensors between.safetensors --t 0.5",
    inline=[Inline("{t}")],
    computes=True,
)
def slerp(
    state_dict: Checkpoint,
    other: Annotated[Input, "The checkpoint that t = 1 gives."],
    t: Annotated[float, "Where between, from 0 (the first checkpoint) to 1 (the second)."],
    *,
    common: Common = False,
    integers: Integers = "equal",
    dtype: OutDType = "",
    rounding: HowRounded = "nearest",
    seed: Seed = 0,
) -> Change[Checkpoint]:
    """Interpolate between two checkpoints along the arc between each pair of tensors, taken as vectors.

    With θ the angle between them, (sin((1 − t) θ) · a + sin(t θ) · b) ÷ sin θ (Shoemake 1985), as mergekit's ``slerp``;
    where they are nearly in line (|cos θ| > 0.9995) or one is zero it is that of :func:`lerp`.

    >>> import torch
    >>> slerp({"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}, 0.5)
    {'w': tensor([0.7071, 0.7071])}
    """
    alike = Alike(state_dict, [other], common=common, integers=integers, dtype=dtype)

    def weighing(tensors: Sequence[Tensor]) -> list[float]:
        found = distance(tensors[0], tensors[1])
        norms = math.sqrt(found.ours) * math.sqrt(found.theirs)
        cosine = found.product / norms if norms else 1.0
        if abs(cosine) > COLLINEAR:
            return [1 - t, t]
        angle = math.acos(cosine)
        return [math.sin(part * angle) / math.sin(angle) for part in (1 - t, t)]

    return alike.change(lambda _, tensors: WeightedSum(weighing(tensors)), rounding_of(rounding, seed))
