"""Edits of the values of single tensors: cast, scale, reshape, transpose, slice, pad.

They compute nothing when they are called: a Checkpoint gets tensors that know how their bytes will be made, and
whatever is only another view of stored elements stays stored.  Keys are named by globs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

from ..errors import Argument, EditError, Phrase
from ..files.spans import Block
from ..tensors import arithmetic, casts
from ..tensors.checkpoint import Checkpoint
from ..tensors.dtypes import DType
from ..tensors.dtypes import parse as parse_dtype
from ..tensors.records import ComputedTensor, Finding, Tensor
from ..tensors.views import axis_of, concatenated, filled, reshaped, restrided, sliced, viewed
from .arguments import DTypeLike, Patterns
from .change import AllowUnmatched, Change, Inline, listed_patterns, matching
from .companions import left_alone
from .value_edit import each, value_edit

# Statistics that float16 cannot hold safely (a variance above 65504 becomes inf): left alone unless asked for.
STATISTICS = ("running_mean", "running_var")


@value_edit(
    "Convert to another dtype.",
    "model.safetensors half.safetensors --dtype bf16 --except '*norm*'",
    inline=[Inline("{dtype}")],
    computes=True,
)
def cast(
    state_dict: Checkpoint,
    dtype: Annotated[DTypeLike, "The dtype: bf16, fp16, fp32 or any name of torch."],
    *,
    only: Annotated[Patterns, "Cast only keys that match this glob."] = (),
    except_: Annotated[Patterns, "Cast no key that matches this glob."] = (),
    integers: Annotated[bool, "Cast integer and bool tensors too."] = False,
    statistics: Annotated[bool, "Cast running means and variances to float16 too."] = False,
    allow_inf: Annotated[bool, "Values that become inf are no error."] = False,
    allow_codes: Annotated[bool, "Cast codes of quantised weights, and their scales, as plain numbers."] = False,
    allow_unmatched: AllowUnmatched = False,
) -> Change[Checkpoint]:
    """Convert floating-point tensors to another dtype (``bf16``, ``fp16``, ``float32`` …).

    ``only`` and ``except_`` are globs on keys.  Integer and bool tensors are left alone without ``integers``; for
    float16 so are BatchNorm's running statistics without ``statistics``.  Values that become inf, or are too large
    for a dtype without inf, are an error naming every tensor, unless ``allow_inf``; those that flush to zero are
    counted in a note.  Scales and maps of quantised weights stay as they are, and their codes are an error, unless
    ``allow_codes`` takes both as plain numbers.  Integers, and the powers of two of float8_e8m0fnu, have to be exact.

    >>> import torch
    >>> state = {"fc.weight": torch.ones(2), "bn.running_var": torch.ones(2), "steps": torch.tensor(3)}
    >>> [str(tensor.dtype) for tensor in cast(state, "fp16").values()]
    ['torch.float16', 'torch.float32', 'torch.int64']
    """
    wanted = _dtype(dtype)
    chosen = matching(state_dict, only, allow_unmatched=allow_unmatched) if listed_patterns(only) else set(state_dict)
    chosen -= matching(state_dict, except_, allow_unmatched=allow_unmatched)
    left = {"integers": 0, "statistics": 0}
    companions = set() if allow_codes else left_alone(state_dict) & chosen
    chosen -= companions
    elements = sum(state_dict[key].numel for key in chosen)

    def convert(key: str, tensor: Tensor) -> Tensor:
        if tensor.dtype == wanted:
            return tensor
        if not (tensor.dtype.is_floating or tensor.dtype.is_complex) and not integers:
            left["integers"] += 1
            return tensor
        if wanted.name == "float16" and key.rpartition(".")[2] in STATISTICS and not statistics:
            left["statistics"] += 1
            return tensor
        casts.check_computable(key, tensor.dtype)
        casts.check_computable(key, wanted)
        if tensor.dtype.is_complex and not wanted.is_complex:
            raise EditError([f"{key!r} is {tensor.dtype}, casting it to {wanted} would lose its imaginary part"])
        return _cast(key, tensor, wanted, elements=elements, allow_inf=allow_inf)

    change = each(state_dict, chosen, convert)
    notes = list(change.notes)
    if left["integers"]:
        notes.append(f"{left['integers']:,} integer or bool tensors keep their dtype")
    if left["statistics"]:
        notes.append(f"{left['statistics']:,} normalisation statistics keep their dtype")
    if companions:
        notes.append(f"{len(companions):,} scales, maps, masks or extra states belong to other tensors and stay as is")
    settled = frozenset(state_dict) if allow_codes else frozenset[str]()
    return Change(change.before, change.result, change.origins, tuple(notes), settled)


def _dtype(spelling: DTypeLike) -> DType:
    try:
        return parse_dtype(spelling)
    except ValueError as error:
        raise EditError([str(error)]) from None


def _cast(key: str, tensor: Tensor, wanted: DType, *, elements: int, allow_inf: bool) -> ComputedTensor:
    finding = Finding()

    def make(inputs: tuple[Tensor, ...]) -> Iterator[Block]:
        losses = casts.Losses()
        yield from casts.cast(inputs[0], wanted, losses, elements=elements)
        infinite, flushed = losses.infinite, losses.flushed
        became = f"became inf in {wanted}" if wanted.has_inf else f"were too large for {wanted}"
        if infinite and not allow_inf:
            finding.problem = Phrase(
                f"{key!r}: {infinite:,} values {became} (", Argument("allow_inf", True), " accepts that)"
            )
        if losses.inexact:
            finding.problem = f"{key!r}: {losses.inexact:,} values are not exact in {wanted}"
        lost = [f"{infinite:,} values {became}"] * bool(infinite) + [f"{flushed:,} flushed to zero"] * bool(flushed)
        finding.note = f"{key}: {', '.join(lost)}" if lost else ""

    return ComputedTensor(wanted, tensor.shape, (tensor,), make, finding)


@value_edit(
    "Multiply by a factor.",
    "model.pth scaled.pth 'logit_scale' --factor 0.5",
    inline=[Inline("{patterns}={factor}")],
    computes=True,
)
def scale(
    state_dict: Checkpoint,
    patterns: Annotated[Patterns, "Globs on keys."],
    factor: Annotated[float, "What every value is multiplied by."],
) -> Change[Checkpoint]:
    """Multiply floating-point tensors by a factor, in their own dtype.  Raises NothingMatched, EditError.

    >>> import torch
    >>> scale({"fc.weight": torch.ones(2)}, "fc.*", 0.5)["fc.weight"]
    tensor([0.5000, 0.5000])
    """

    def scaled(key: str, tensor: Tensor) -> Tensor:
        if not (tensor.dtype.is_floating or tensor.dtype.is_complex):
            raise EditError([f"{key!r} is {tensor.dtype}, only floating-point tensors are scaled"])
        casts.check_computable(key, tensor.dtype)

        def make(inputs: tuple[Tensor, ...]) -> Iterator[Block]:
            return arithmetic.scaled(inputs[0], factor, elements=elements)

        return ComputedTensor(tensor.dtype, tensor.shape, (tensor,), make)

    chosen = matching(state_dict, patterns)
    elements = sum(state_dict[key].numel for key in chosen)
    return each(state_dict, chosen, scaled)


@value_edit(
    "Give tensors another shape.",
    "vgg.pth fcn.pth 'classifier.0.weight' --shape 4096,512,7,7",
    inline=[Inline("{patterns}={shape}")],
)
def reshape(
    state_dict: Checkpoint,
    patterns: Annotated[Patterns, "Globs on keys."],
    shape: Annotated[Sequence[int], "The new shape, as 4096,512,7,7; one size may be -1."],
) -> Change[Checkpoint]:
    """Give tensors another shape, elements in row-major order; one size may be -1.

    A Linear's weight becomes that of a convolution and back.  Raises NothingMatched, EditError naming every tensor
    that does not fit.

    >>> import torch
    >>> reshape({"fc6.weight": torch.zeros(8, 50)}, "fc6.weight", [8, 2, 5, 5])["fc6.weight"].shape
    torch.Size([8, 2, 5, 5])
    """
    return each(state_dict, matching(state_dict, patterns), lambda key, tensor: reshaped(key, tensor, tuple(shape)))


@value_edit("Permute dimensions.", "gpt2.pth linear.pth '*.c_attn.weight'")
def transpose(
    state_dict: Checkpoint,
    patterns: Annotated[Patterns, "Globs on keys."],
    dims: Annotated[
        Sequence[int], "The new order of the dimensions, as 0,2,1; without it, the two of a matrix are swapped."
    ] = (),
) -> Change[Checkpoint]:
    """Permute dimensions; without ``dims``, swap the two of a matrix.  Raises NothingMatched, EditError.

    >>> import torch
    >>> transpose({"c_attn.weight": torch.zeros(3, 9)}, "c_attn.weight")["c_attn.weight"].shape
    torch.Size([9, 3])
    """

    def permuted(key: str, tensor: Tensor) -> Tensor:
        order = tuple(dims) or ((1, 0) if len(tensor.shape) == 2 else ())
        if sorted(order) != list(range(len(tensor.shape))):
            raise EditError([f"{key!r} of shape {list(tensor.shape)} cannot be permuted by {list(dims)}"])
        view = viewed(tensor)
        sizes, strides = (tuple(values[dim] for dim in order) for values in (view.shape, view.stride))
        return restrided(view, sizes, strides, view.offset)

    return each(state_dict, matching(state_dict, patterns), permuted)


@value_edit(
    "Take some indices of a dimension.",
    "model.pth cut.pth 'fc.*' --start 0 --stop 10",
    inline=[Inline("{patterns}={start}:{stop}")],
)
def slice_(
    state_dict: Checkpoint,
    patterns: Annotated[Patterns, "Globs on keys."],
    start: Annotated[int, "The first index that is taken, from 0."],
    stop: Annotated[int, "The index behind the last one that is taken."],
    *,
    dim: Annotated[int, "The dimension."] = 0,
    step: Annotated[int, "Take every STEP-th index."] = 1,
) -> Change[Checkpoint]:
    """Take indices ``start`` to ``stop`` (exclusive) of one dimension.  Raises NothingMatched, EditError.

    >>> import torch
    >>> slice_({"fc.bias": torch.arange(5)}, "fc.bias", 1, 4)["fc.bias"]
    tensor([1, 2, 3])
    """

    def cut(key: str, tensor: Tensor) -> Tensor:
        axis = axis_of(key, tensor, dim)
        if not 0 <= start <= stop <= tensor.shape[axis] or step < 1:
            asked = f"{start} to {stop} by {step}"
            raise EditError([f"{key!r} has {tensor.shape[axis]:,} indices in dimension {dim}, asked were {asked}"])
        return sliced(tensor, axis, start, stop, step)

    return each(state_dict, matching(state_dict, patterns), cut)


@value_edit("Add indices to a dimension.", "model.pth padded.pth 'embed.weight' --after 2", fills="value")
def pad(
    state_dict: Checkpoint,
    patterns: Annotated[Patterns, "Globs on keys."],
    *,
    before: Annotated[int, "How many indices are added in front."] = 0,
    after: Annotated[int, "How many indices are added behind."] = 0,
    dim: Annotated[int, "The dimension."] = 0,
    value: Annotated[float, "What the new indices hold."] = 0.0,
) -> Change[Checkpoint]:
    """Add indices before and after in one dimension, filled with ``value``.  Raises NothingMatched, EditError.

    >>> import torch
    >>> pad({"fc.bias": torch.ones(2)}, "fc.bias", after=2)["fc.bias"]
    tensor([1., 1., 0., 0.])
    """

    def padded(key: str, tensor: Tensor) -> Tensor:
        axis = axis_of(key, tensor, dim)
        if before < 0 or after < 0:
            raise EditError([f"{key!r} cannot be padded by {before} and {after} indices; to cut, use slice"])
        casts.check_computable(key, tensor.dtype)
        if not (tensor.dtype.is_floating or tensor.dtype.is_complex or float(value).is_integer()):
            raise EditError([f"{key!r} is {tensor.dtype} and cannot be padded with {value}"])
        parts = [filled(tensor, axis, before, value), tensor, filled(tensor, axis, after, value)]
        return concatenated([part for part in parts if part.shape[axis]] or [tensor], axis)

    return each(state_dict, matching(state_dict, patterns), padded)
