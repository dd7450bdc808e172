"""Edits of batch norms that are part of the layer beside them when a model runs: fold_norm, norm_to_conv.

The formulas are those of torch.nn.utils.fusion (fuse_conv_bn_weights, fuse_linear_bn_weights): with γ, β, μ, σ² of the
norm, s = γ / √(σ² + ε) and t = β - μ s, a layer W x + b and the norm behind it are (s W) x + (s b + t).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Annotated

from ..errors import Argument, EditError, NothingMatched, Phrase, listed
from ..tensors.checkpoint import Checkpoint
from ..tensors.records import Tensor
from ..tensors.slabs import by_slabs, values_of
from ..text import plural
from .change import AllowUnmatched, Change, Inline
from .templates import bound, filled
from .value_edit import regrouped, value_edit

if TYPE_CHECKING:
    from ..tensors.conversion import Array

# A layer and the batch norm behind it, by names that are the same in most code.
DEFAULTS = (
    ("conv", "bn"), ("conv", "norm"), ("linear", "bn"), ("*.conv", "*.bn"), ("*.conv", "*.norm"), ("*.linear", "*.bn"),
    ("conv{n}", "bn{n}"), ("conv{n}", "norm{n}"), ("*.conv{n}", "*.bn{n}"), ("*.conv{n}", "*.norm{n}"),
)  # fmt: skip
_SAY = Phrase("say which, by ", Argument("layers"), " and ", Argument("norms"))
STATISTICS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

Eps = Annotated[float, "The norms' eps, which no file holds; 1e-5 is torch's default, 1e-3 TensorFlow's."]


@value_edit(
    "Fold batch norms into the layers before them.",
    "resnet.pth folded.pth --eps 1e-5",
    "vgg.pth folded.pth --eps 1e-5 --layers 'features.{n}' --norms 'features.{n+1}'",
    inline=[Inline("{eps}")],
    computes=True,
)
def fold_norm(
    state_dict: Checkpoint,
    eps: Eps,
    *,
    layers: Annotated[Sequence[str], "Templates of the layers' paths; without it, those of usual names."] = (),
    norms: Annotated[Sequence[str], "For each of them, the template of its norm's path."] = (),
    norm_first: Annotated[bool, "The norms come before their layers, which are linear or 1x1."] = False,
    transposed: Annotated[bool, "The layers are transposed convolutions."] = False,
    allow_unmatched: AllowUnmatched = False,
) -> Change[Checkpoint]:
    """Fold batch norms into the convolutions or linear layers that they belong to, which get a bias; the norms go.

    Which norm belongs to which layer, ``layers`` and ``norms`` say, as ``*.conv{n}`` and ``*.bn{n}``; for neighbours
    in a Sequential, ``features.{n}`` and ``features.{n+1}`` (all pairs of a layer and a norm that there are).  Without
    them, a layer called conv, conv1 … or linear and the bn or norm of that number beside it belong together where the
    norm comes behind the layer in the file.  For inference: W' = s W and b' = s (b - running_mean) + β, with
    s = γ / sqrt(running_var + eps), as torch.nn.utils.fuse_conv_bn_eval has it; with ``norm_first``, W' = W s and
    b' = b + W (β - running_mean s).  Computed in float64.  Raises NothingMatched, EditError.

    >>> import torch
    >>> from torch.nn.utils import fuse_conv_bn_eval
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
    >>> made = fold_norm(model.state_dict(), 1e-5, layers=["{n}"], norms=["{n+1}"])
    >>> torch.allclose(made["0.weight"], fuse_conv_bn_eval(*model).weight)
    True
    """
    if len(layers) != len(norms):
        raise EditError([f"{len(layers)} templates of layers and {len(norms)} of norms"])
    if norm_first and transposed:
        raise EditError(["a norm before a transposed convolution does not fold"])
    notes: list[str] = []
    if layers:
        pairs = _stated(state_dict, layers, norms, allow_unmatched)
    else:
        pairs = _by_name(state_dict, norm_first=norm_first, notes=notes)
        if not pairs and not allow_unmatched:
            raise NothingMatched(["conv and bn"], what="pair (also conv1 and bn1, linear and bn)", examples=state_dict,
                                 remedy=_SAY)  # fmt: skip
    problems: list[str] = []
    sets: list[tuple[tuple[str, ...], dict[str, Tensor]]] = []
    for layer, norm in pairs:
        try:
            folded = _folded(state_dict, layer, norm, eps, norm_first=norm_first, transposed=transposed)
            keys = (*(key for key in folded if key in state_dict), *_keys_of(state_dict, norm))
            sets.append((keys, folded))
        except EditError as error:
            problems += error.problems
    if problems:
        raise EditError(problems)
    change = regrouped(state_dict, sets)
    said = f"{plural(len(sets), 'batch norm')} folded, with eps {eps:g}"
    if stay := list(_norm_paths(change.result)):
        notes.append(f"{plural(len(stay), 'batch norm')} {'stays' if len(stay) == 1 else 'stay'}: {listed(stay, 3)}")
    return Change(change.before, change.result, change.origins, (said, *notes), change.settled)


@value_edit(
    "Make convolutions of batch norms that stand alone.",
    "repvgg.pth branches.pth --norms '*.identity' --into '*.identity' --eps 1e-5",
    inline=[Inline("{norms}={into}")],
    computes=True,
)
def norm_to_conv(
    state_dict: Checkpoint,
    norms: Annotated[str, "The template of the norms' paths."],
    into: Annotated[str, "The template of the convolutions' paths; the norms' own will do."],
    eps: Eps,
    *,
    groups: Annotated[int, "The groups of the convolutions."] = 1,
    dims: Annotated[int, "Over how many dimensions the convolutions go."] = 2,
) -> Change[Checkpoint]:
    """Make 1x1 convolutions of batch norms that stand alone, as the identity branch of a RepVGG block does.

    Of C channels, the weight has shape [C, C / groups, 1, 1]: s at its own channel, zeros elsewhere; the bias is
    β - running_mean s, with s = γ / sqrt(running_var + eps) (Ding et al. 2021, RepVGG, section 3.3).  :func:`sum_`
    adds them to larger kernels.  Computed in float64.  Raises NothingMatched, EditError.

    >>> import torch
    >>> norm = torch.nn.BatchNorm2d(2).eval()
    >>> made = norm_to_conv({f"identity.{key}": value for key, value in norm.state_dict().items()},
    ...                     "identity", "identity", 1e-5)
    >>> x = torch.randn(1, 2, 4, 4)
    >>> torch.allclose(torch.nn.functional.conv2d(x, made["identity.weight"], made["identity.bias"]), norm(x))
    True
    """
    problems: list[str] = []
    sets: list[tuple[tuple[str, ...], dict[str, Tensor]]] = []
    for one in bound(_norm_paths(state_dict), norms):
        try:
            new = filled(into, one.names, one.stars)
            keys = _keys_of(state_dict, one.key)
            sets.append((keys, _identity(state_dict, one.key, new, eps, groups, dims)))
        except EditError as error:
            problems += error.problems
    if problems:
        raise EditError(problems)
    return regrouped(state_dict, sets)


# -- which norm belongs to which layer


def _key(path: str, leaf: str) -> str:
    return f"{path}.{leaf}" if path else leaf


def _paths(state_dict: Checkpoint, leaf: str) -> dict[str, int]:
    """The modules that have a tensor of this name, and where it stands in the file."""
    tail = f".{leaf}"
    found = {}
    for position, key in enumerate(state_dict):
        if key == leaf or key.endswith(tail):
            found[key.removesuffix(leaf).removesuffix(".")] = position
    return found


def _norm_paths(state_dict: Checkpoint) -> dict[str, int]:
    return {path: at for path, at in _paths(state_dict, "running_var").items()
            if _key(path, "running_mean") in state_dict}  # fmt: skip


def _keys_of(state_dict: Checkpoint, norm: str) -> tuple[str, ...]:
    return tuple(key for leaf in STATISTICS if (key := _key(norm, leaf)) in state_dict)


def _stated(
    state_dict: Checkpoint, layers: Sequence[str], norms: Sequence[str], allow_unmatched: bool
) -> list[tuple[str, str]]:
    """The pairs that templates name.  Raises NothingMatched for a pair of templates that names none."""
    weights, statistics = _paths(state_dict, "weight"), _norm_paths(state_dict)
    found: list[tuple[str, str]] = []
    for layer, norm in zip(layers, norms, strict=True):
        try:
            candidates = bound([path for path in weights if path not in statistics], layer)
        except NothingMatched:
            if allow_unmatched:
                continue
            raise
        named = [(one.key, filled(norm, one.names, one.stars)) for one in candidates]
        pairs = [(path, other) for path, other in named if other in statistics]
        if not pairs and not allow_unmatched:
            others = [other for _, other in named]
            plain = [other for other in others if other in weights]
            if plain:
                raise EditError([f"{listed(plain, 3)}: no running statistics, so no batch norm that can be folded"])
            raise NothingMatched([norm], what="template of a norm", examples=statistics or state_dict)
        found += pairs
    twice = [norm for norm in dict.fromkeys(norm for _, norm in found) if [n for _, n in found].count(norm) > 1]
    if twice:
        raise EditError([f"{listed(twice, 3)}: more than one layer has this norm"])
    return found


def _by_name(state_dict: Checkpoint, *, norm_first: bool, notes: list[str]) -> list[tuple[str, str]]:
    """The pairs of usual names whose norm stands behind its layer (or before it, where that is asked for).

    Keys in alphabetical order do not tell which comes first: then only shapes do.  Raises EditError for what stays
    open.
    """
    weights, statistics = _paths(state_dict, "weight"), _norm_paths(state_dict)
    groups: dict[str, list[str]] = {}  # a file of safetensors is sorted within each dtype
    for key, tensor in state_dict.items():
        groups.setdefault(tensor.dtype.name, []).append(key)
    is_sorted = all(keys == sorted(keys) for keys in groups.values())
    found: list[tuple[str, str]] = []
    left: list[str] = []
    unclear: list[str] = []
    for layer, norm in _named(weights, statistics):
        shape, size = state_dict[_key(layer, "weight")].shape, state_dict[_key(norm, "running_var")].numel
        if len(shape) < 2 or size not in shape[:2]:
            continue
        fits_first, fits_behind = size % shape[1] == 0, size == shape[0]
        if is_sorted and fits_first and fits_behind:
            unclear.append(norm)
        elif (fits_behind if is_sorted else statistics[norm] > weights[layer]) != norm_first:
            found.append((layer, norm))
        else:
            left.append(norm)
    if unclear:
        problem = f"{listed(unclear, 3)}: the keys are in alphabetical order, so whether a norm comes first is open"
        raise EditError([problem], remedy=_SAY)
    if left:
        where_they_are = "behind" if norm_first else "before"
        notes.append(f"{listed(left, 3)}: stand {where_they_are} their layers in the file, so they are not folded")
    return found


def _named(weights: dict[str, int], statistics: dict[str, int]) -> Iterator[tuple[str, str]]:
    layers = [path for path in weights if path not in statistics]
    taken: set[str] = set()
    for layer, norm in DEFAULTS:
        try:
            candidates = bound(layers, layer)
        except NothingMatched:
            continue
        for one in candidates:
            other = filled(norm, one.names, one.stars)
            if other in statistics and one.key not in taken:
                taken.add(one.key)
                yield one.key, other


# -- the formulas


@dataclass(frozen=True, slots=True)
class _Norm:
    """A batch norm's tensors, and its scale and shift as numbers when they are asked for."""

    tensors: dict[str, Tensor]
    size: int
    eps: float

    @classmethod
    def of(cls, state_dict: Checkpoint, path: str, eps: float) -> _Norm:
        if not 0 < eps < 1:
            raise EditError([f"eps {eps} is no small positive number"])
        tensors = {leaf: state_dict[key] for leaf in STATISTICS[:4] if (key := _key(path, leaf)) in state_dict}
        size = tensors["running_var"].numel
        odd = [leaf for leaf, tensor in tensors.items() if tensor.shape != (size,) or not tensor.dtype.is_floating]
        if odd:
            raise EditError([f"{path!r} is no batch norm: its {listed(odd)} has another shape or dtype"])
        return cls(tensors, size, eps)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(self.tensors.values())

    def scale_and_shift(self) -> tuple[Array, Array]:
        import numpy as np

        values = {leaf: values_of(tensor) for leaf, tensor in self.tensors.items()}
        scale = values.get("weight", np.ones(self.size)) / np.sqrt(values["running_var"] + self.eps)
        return scale, values.get("bias", np.zeros(self.size)) - values["running_mean"] * scale


def _folded(
    state_dict: Checkpoint, layer: str, norm: str, eps: float, *, norm_first: bool, transposed: bool
) -> dict[str, Tensor]:
    """The weight and the bias of a layer with its norm in them."""
    key, bias_key = _key(layer, "weight"), _key(layer, "bias")
    weight, bias, found = state_dict[key], state_dict.get(bias_key), _Norm.of(state_dict, norm, eps)
    shape = weight.shape
    if len(shape) < 2 or not weight.dtype.is_floating:
        raise EditError([f"{key!r} ({weight.dtype} {list(shape)}) is no weight of a convolution or linear layer"])
    grouped = norm_first or transposed  # dimension 1 has one group's share of the norm's channels
    share = shape[1] if grouped else shape[0]
    parts = found.size // max(share, 1)
    if parts < 1 or parts * share != found.size or shape[0] % parts or (parts > 1 and not grouped):
        raise EditError([f"{norm!r} has {found.size} channels, {key!r} of shape {list(shape)} does not go with it"])
    if norm_first and prod(shape[2:]) != 1:
        raise EditError([f"{key!r} of shape {list(shape)}: a norm before a larger kernel does not fold at the edges"])
    outputs = shape[0] if norm_first else found.size
    if bias is not None and bias.shape != (outputs,):
        raise EditError([f"{bias_key!r} of shape {list(bias.shape)} does not go with {key!r} of shape {list(shape)}"])

    def new_weight(start: int, stop: int, rows: Array) -> Array:
        return rows * _factors(found.scale_and_shift()[0], start, stop, rows.ndim, parts if grouped else 0, shape[0])

    def new_bias(start: int, stop: int, *slabs: Array) -> Array:
        scale, shift = found.scale_and_shift()
        old = slabs[0] if bias is not None else 0.0
        if not norm_first:
            return shift[start:stop] + scale[start:stop] * old
        rows = slabs[-1].reshape(stop - start, share)
        made: Array = (rows * _factors(shift, start, stop, 2, parts, shape[0])).sum(1) + old
        return made

    inputs = [*([bias] if bias is not None else []), *([weight] if norm_first else [])]
    return {
        key: by_slabs(key, [weight], shape, new_weight, found.inputs),
        bias_key: by_slabs(bias_key, inputs, (outputs,), new_bias, found.inputs, dtype=weight.dtype),
    }


def _factors(values: Array, start: int, stop: int, ndim: int, parts: int, total: int) -> Array:
    """A norm's numbers for the slab of a weight: one for each row, or, of ``parts`` groups, for each index of dim 1."""
    import numpy as np

    ones = (1,) * (ndim - 2)
    if not parts:
        return values[start:stop].reshape(-1, 1, *ones)
    group = np.arange(start, stop) // (total // parts)
    return values.reshape(parts, -1)[group].reshape(stop - start, -1, *ones)


def _identity(state_dict: Checkpoint, norm: str, new: str, eps: float, groups: int, dims: int) -> dict[str, Tensor]:
    """The 1x1 convolution that does what a norm does."""
    found = _Norm.of(state_dict, norm, eps)
    if groups < 1 or found.size % groups or dims < 0:
        raise EditError([f"{norm!r} has {found.size} channels, not a multiple of {groups} groups"])
    share = found.size // groups
    model = found.tensors.get("weight", found.tensors["running_var"])  # statistics may be of a wider dtype

    def weight(start: int, stop: int, _: Array) -> Array:
        import numpy as np

        scale, _ = found.scale_and_shift()
        made = np.zeros((stop - start, share))
        made[np.arange(stop - start), np.arange(start, stop) % share] = scale[start:stop]
        return made.reshape(stop - start, share, *(1,) * dims)

    key, bias_key = _key(new, "weight"), _key(new, "bias")
    shape = (found.size, share, *(1,) * dims)
    bias = by_slabs(bias_key, [model], (found.size,), lambda start, stop, _: found.scale_and_shift()[1][start:stop],
                    found.inputs)  # fmt: skip
    return {key: by_slabs(key, [model], shape, weight, found.inputs), bias_key: bias}
