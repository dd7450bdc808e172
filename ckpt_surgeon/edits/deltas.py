"""Edits with differences of checkpoints: subtract, add, and merge, which adds several fine-tunings to their base.

What is added is small beside the weights that it is added to; each of these edits says how much of it the output's
dtype keeps (see :class:`~ckpt_surgeon.tensors.combining.Kept`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal, cast

from ..errors import EditError, NothingMatched, listed
from ..tensors.arithmetic import magnitude_of_rank
from ..tensors.checkpoint import Checkpoint
from ..tensors.combining import Kept, random_numbers
from ..tensors.records import Tensor
from ..text import plural
from .alike import Alike, Common, HowRounded, Integers, OutDType, Seed, rounding_of
from .arguments import Input
from .change import Change, Inline
from .inputs import label
from .value_edit import value_edit

if TYPE_CHECKING:
    from ..tensors.combining import Formula
    from ..tensors.conversion import Array

Method = Literal["task-arithmetic", "ties-peft", "ties-mergekit", "dare", "dare-ties-peft", "dare-ties-mergekit"]


@value_edit(
    "The difference of two checkpoints.",
    "tuned.safetensors pretrained.safetensors delta.safetensors",
    inline=[Inline("", help="Subtract the second input.")],
    computes=True,
)
def subtract(
    state_dict: Checkpoint,
    base: Annotated[Input, "The checkpoint that is subtracted."],
    *,
    common: Common = False,
    dtype: OutDType = "float32",
    rounding: HowRounded = "nearest",
    seed: Seed = 0,
) -> Change[Checkpoint]:
    """The difference of two checkpoints of one model, x − base, in float32 unless ``dtype`` says otherwise.

    Only floating-point tensors have one; integers and bools are left out, and said.  ``ckpt add`` adds it again.

    >>> import torch
    >>> subtract({"w": torch.tensor([3.0])}, {"w": torch.tensor([1.0])})
    {'w': tensor([2.])}
    """
    numbers, left = _floating(state_dict)
    theirs = cast(Checkpoint, base)
    alike = Alike(numbers, [_without(theirs, left)], common=common, dtype=dtype)
    if left:
        alike.notes.append(f"in no difference, being integers or bools: {listed(left, 3)}")
    return alike.change(lambda *_: _difference, rounding_of(rounding, seed), averages=False)


def _difference(_: int, wide: list[Array]) -> Array:
    made = wide[0]
    made -= wide[1]
    return made


@value_edit(
    "Add a difference to a checkpoint.",
    "pretrained.safetensors delta.safetensors tuned.safetensors --scale 0.8",
    inline=[Inline("{scale}")],
    computes=True,
)
def add(
    state_dict: Checkpoint,
    *deltas: Annotated[Input, "Differences, as ckpt subtract writes them."],
    scale: Annotated[Sequence[float], "What each difference is multiplied by; one number for all of them."] = (1.0,),
    dtype: OutDType = "",
    rounding: HowRounded = "nearest",
    seed: Seed = 0,
) -> Change[Checkpoint]:
    """Add differences to a checkpoint: base + Σ scaleᵢ · deltaᵢ, in float64 and rounded once.

    A tensor that no difference has stays as it is; a key of a difference that the checkpoint lacks is an error.  The
    output says how much of the change its dtype keeps.

    >>> import torch
    >>> add({"w": torch.tensor([1.0]), "n": torch.tensor(3)}, {"w": torch.tensor([2.0])}, scale=[0.5])
    {'w': tensor([2.]), 'n': tensor(3)}
    """
    given = cast(Sequence[Checkpoint], deltas)
    factors = list(scale) * len(given) if len(scale) == 1 else list(scale)
    if state_dict and len(factors) != len(given):
        raise EditError([f"{plural(len(given), 'difference')} need as many scales, given were {len(factors)}"])
    unknown = [f"{label(str(number), delta)} has {key!r}, which is not in the checkpoint"
               for number, delta in enumerate(given, 2) for key in delta if key not in state_dict]  # fmt: skip
    if unknown:
        raise EditError(unknown)
    touched = dict.fromkeys(key for delta in given for key in delta)
    if not touched:
        raise NothingMatched(["*"], what="key of a difference")
    if uneven := [key for key in touched if any(key not in delta for delta in given)]:
        raise EditError([f"{listed(uneven, 3)}: not in all differences"], remedy="add them one after the other")
    base = state_dict.with_tensors({key: state_dict[key] for key in state_dict if key in touched}, state_dict.versions)
    alike = Alike(base, given, dtype=dtype, integers="first")

    def total(_: int, wide: list[Array]) -> Array:
        made = wide[0].copy()
        for factor, delta in zip(factors, wide[1:], strict=True):
            delta *= factor
            made += delta
        return made

    change = alike.change(lambda *_: total, rounding_of(rounding, seed), kept=Kept(), averages=False)
    return _with_rest(change, state_dict)


@value_edit(
    "Merge fine-tunings of one base.",
    "base.safetensors math.safetensors code.safetensors merged.safetensors --method ties-mergekit --density 0.5",
    "base.safetensors math.safetensors code.safetensors merged.safetensors --method dare --density 0.5",
    inline=[Inline("{method}")],
    computes=True,
)
def merge(
    state_dict: Checkpoint,
    *tuned: Annotated[Input, "Fine-tunings of the first checkpoint."],
    method: Annotated[Method, "How their differences from the base are put together."] = "task-arithmetic",
    weights: Annotated[Sequence[float], "A weight for each fine-tuning, in their order; 1 without it."] = (),
    density: Annotated[float, "The share of each difference that ties and dare keep."] = 1.0,
    common: Common = False,
    integers: Integers = "equal",
    dtype: OutDType = "",
    rounding: HowRounded = "nearest",
    seed: Seed = 0,
) -> Change[Checkpoint]:
    """Merge fine-tunings of one base, with δᵢ = xᵢ − base and weights wᵢ, in float64 and rounded once.

    task-arithmetic (Ilharco 2023) is base + Σ wᵢ δᵢ.  ties (Yadav 2023) first keeps of each δ the ``density`` largest
    magnitudes, tensor by tensor, and then adds only what has the elected sign:

    - ties-peft elects the sign of Σ δᵢ and divides Σ wᵢ δᵢ by how many agree (peft's ``merge_utils.ties``);
    - ties-mergekit elects the sign of Σ wᵢ δᵢ and divides by the sum of the weights of those that agree (mergekit's
      ``ties`` with ``normalize``).

    dare (Yu 2023) instead keeps a random ``density`` of each δ, divides by ``density``, and adds; dare-ties-peft and
    dare-ties-mergekit (without ``normalize``, as there) elect signs after that.  Of values as large as the smallest
    one that ties keeps, all are kept.  The output says how much of the change its dtype keeps.

    >>> import torch
    >>> base, one, two = ({"w": torch.tensor(values)} for values in ([0.0, 0.0], [1.0, 2.0], [3.0, -4.0]))
    >>> merge(base, one, two, weights=[0.5, 0.5])
    {'w': tensor([ 2., -1.])}
    >>> merge(base, one, two, method="ties-mergekit")
    {'w': tensor([ 2., -4.])}
    """
    given = list(weights) or [1.0] * len(tuned)
    if state_dict and len(given) != len(tuned):
        raise EditError([f"{plural(len(tuned), 'fine-tuning')} need as many weights, given were {len(given)}"])
    if not 0 < density <= 1:
        raise EditError([f"a density is above 0 and at most 1, not {density}"])
    alike = Alike(state_dict, tuned, common=common, integers=integers, dtype=dtype)
    mixing = _MIXING[method.replace("dare-", "")]

    def prepare(key: str, tensors: Sequence[Tensor]) -> Formula:
        keep: Callable[[int, int, Array], Array] = lambda _, __, delta: delta  # noqa: E731
        if method.startswith("dare") and density < 1:
            keep = partial(_random_part, seed, density, key)
        elif method.startswith("ties") and density < 1:
            least = [magnitude_of_rank(tensors[0], tensor, int(density * tensor.numel)) for tensor in tensors[1:]]
            keep = partial(_largest_part, least)

        def merged(index: int, wide: list[Array]) -> Array:
            base, deltas = wide[0], wide[1:]
            for number, delta in enumerate(deltas):
                delta -= base
                deltas[number] = keep(number, index, delta)
            made: Array = base + mixing(deltas, given, normalized=not method.startswith("dare"))
            return made

        return merged

    return alike.change(prepare, rounding_of(rounding, seed), kept=Kept())


def _largest_part(least: Sequence[float], number: int, _: int, delta: Array) -> Array:
    """A difference without what is smaller than the least magnitude that is kept."""
    import numpy as np

    delta[np.abs(delta) < least[number]] = 0
    return delta


def _random_part(seed: int, density: float, key: str, number: int, index: int, delta: Array) -> Array:
    """A random part of a difference, as much larger as it is fewer."""
    import numpy as np

    random = random_numbers(seed, f"{number} {key}", index)
    assert isinstance(random, np.random.Generator)
    delta *= random.random(delta.shape) < density
    delta /= density
    return delta


# -- how differences are put together


def _sum(deltas: Sequence[Array], weights: Sequence[float], *, normalized: bool) -> Array:
    import numpy as np

    made: Array = np.add.reduce([delta * weight for delta, weight in zip(deltas, weights, strict=True)])
    return made


def _ties_peft(deltas: Sequence[Array], weights: Sequence[float], *, normalized: bool) -> Array:
    import numpy as np

    elected = np.where(sum(deltas) >= 0, 1, -1)
    agree = [np.sign(delta) == elected for delta in deltas]
    made = sum(delta * weight * one for delta, weight, one in zip(deltas, weights, agree, strict=True))
    count = np.maximum(np.add.reduce(agree, dtype=np.int64), 1)
    return cast("Array", made / count)


def _ties_mergekit(deltas: Sequence[Array], weights: Sequence[float], *, normalized: bool) -> Array:
    import numpy as np

    weighted = [delta * weight for delta, weight in zip(deltas, weights, strict=True)]
    elected = np.where(sum(weighted) >= 0, 1, -1)
    agree = [np.sign(delta) == elected for delta in weighted]
    made: Array = np.add.reduce([delta * one for delta, one in zip(weighted, agree, strict=True)])
    if normalized:
        divisor = np.add.reduce([weight * one for weight, one in zip(weights, agree, strict=True)])
        made /= np.where(divisor == 0, 1, divisor)
    return made


_MIXING = {
    "task-arithmetic": _sum,
    "dare": _sum,
    "ties-peft": _ties_peft,
    "ties-mergekit": _ties_mergekit,
}


# -- which tensors


def _floating(state_dict: Checkpoint) -> tuple[Checkpoint, list[str]]:
    """The tensors of floating-point and complex numbers, and the keys of the others."""
    left = [key for key, tensor in state_dict.items() if not (tensor.dtype.is_floating or tensor.dtype.is_complex)]
    return _without(state_dict, left), left


def _without(state_dict: Checkpoint, left: Sequence[str]) -> Checkpoint:
    gone = set(left)
    kept = {key: tensor for key, tensor in state_dict.items() if key not in gone}
    return state_dict.with_tensors(kept, state_dict.versions)


def _with_rest(change: Change[Checkpoint], state_dict: Checkpoint) -> Change[Checkpoint]:
    """A change of some tensors of a checkpoint, beside the others as they are, all in the checkpoint's order."""
    tensors = {key: change.result.get(key, tensor) for key, tensor in state_dict.items()}
    before = dict(state_dict) | dict(change.before)
    return replace(
        change,
        before=state_dict.with_tensors(before, state_dict.versions),
        result=state_dict.with_tensors(tensors, state_dict.versions),
        origins={key: change.origins.get(key, (key,)) for key in tensors},
    )
