"""Edits of values: cast, reshape, transpose, slice, pad, concat, split, scale, fold.

They compute nothing when they are called: a Checkpoint gets tensors that know how their bytes will be made, and
whatever is only another view of stored elements stays stored.  On a state_dict of torch tensors the same plan is
carried out at once.  Numbers are made by tensors/arithmetic.py.

Keys are named by globs, or, where several keys belong together (concat, split), by templates: ``{n}`` stands for an
integer and ``*`` for anything, alike in all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Concatenate, ParamSpec, TypeVar

from ..errors import Argument, EditError, KeyCollision, NothingMatched, Phrase
from ..files.spans import Block
from ..tensors import arithmetic, casts
from ..tensors.checkpoint import Checkpoint, versions_of
from ..tensors.dtypes import DType
from ..tensors.dtypes import parse as parse_dtype
from ..tensors.records import ComputedTensor, ExtraState, Finding, OpaqueTensor, Tensor, findings
from ..tensors.views import axis_of, concatenated, filled, interleaved, parts_of, reshaped, restrided, sliced, viewed
from .arguments import DTypeLike, Patterns
from .change import AllowUnmatched, Change, Edit, Inline, edit, listed_patterns, matching, rebuilt, rename_versions
from .companions import checked, left_alone

StateDict = TypeVar("StateDict", bound=Mapping)  # type: ignore[type-arg]
Arguments = ParamSpec("Arguments")

# Statistics that float16 cannot hold safely (a variance above 65504 becomes inf): left alone unless asked for.
STATISTICS = ("running_mean", "running_var")


def value_edit(
    short_help: str, *examples: str, inline: Iterable[Inline] = (), computes: bool = False, fills: str = ""
) -> Callable[[Callable[Concatenate[Checkpoint, Arguments], Change[Checkpoint]]], Edit[Arguments]]:
    """An edit of values, written for a Checkpoint; a state_dict of torch tensors goes there and back.

    It is declared as by :func:`~ckpt_surgeon.edits.change.edit`.
    """

    def made(function: Callable[Concatenate[Checkpoint, Arguments], Change[Checkpoint]]) -> Edit[Arguments]:
        def plan(state_dict: StateDict, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Change[StateDict]:
            if isinstance(state_dict, Checkpoint):
                return function(state_dict, *args, **kwargs)  # type: ignore[return-value]
            from ..tensors.torch_bridge import from_torch

            records = from_torch(state_dict)
            change = function(records, *args, **kwargs)
            checked(records, change.result, change.origins, change.settled)  # records tell a transposed view
            return _carried_out(state_dict, records, change)

        plan.__name__, plan.__doc__, plan.__module__ = function.__name__, function.__doc__, function.__module__
        plan.__wrapped__ = function  # type: ignore[attr-defined]
        found: Edit[Arguments] = edit(
            short_help, *examples, changes_values=True, inline=inline, computes=computes, fills=fills
        )(plan)
        return found

    return made


def _carried_out(state_dict: StateDict, records: Checkpoint, change: Change[Checkpoint]) -> Change[StateDict]:
    """The change of a state_dict of torch tensors: untouched tensors are the very same objects."""
    from ..tensors.torch_bridge import to_torch

    kept = {id(record): key for key, record in records.items()}
    fresh = {key: tensor for key, tensor in change.result.items() if id(tensor) not in kept}
    made = to_torch(Checkpoint(fresh)) if fresh else {}
    if problems := [finding.problem for finding in findings(fresh.values()) if finding.problem]:
        raise EditError(problems)
    tensors = {
        key: made[key].to(state_dict[change.origins[key][0]].device) if key in made else state_dict[kept[id(tensor)]]
        for key, tensor in change.result.items()
    }
    notes = [finding.note for finding in findings(fresh.values()) if finding.note]
    result = rebuilt(state_dict, tensors, change.result.versions)
    return Change(state_dict, result, change.origins, (*change.notes, *notes), change.settled)


# -- one tensor at a time


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


# -- several tensors that belong together


@value_edit(
    "Join tensors (q, k, v into qkv).",
    "model.pth fused.pth --sources 'l.{n}.q,l.{n}.k,l.{n}.v' --into 'l.{n}.qkv'",
    inline=[Inline("{sources}={into}")],
)
def concat(
    state_dict: Checkpoint,
    sources: Annotated[Sequence[str], "Templates of the keys that are joined, in this order."],
    into: Annotated[str, "The template of the new key."],
    *,
    dim: Annotated[int, "The dimension."] = 0,
    groups: Annotated[int, "Interleave in so many groups (attention heads)."] = 1,
) -> Change[Checkpoint]:
    """Join tensors along one dimension, for every set of keys that the templates name.

    With ``groups`` the result interleaves: first the first of ``groups`` equal parts of every source, then the
    second (per attention head, say); 1 puts the sources one after the other.  Raises NothingMatched, EditError,
    KeyCollision.

    >>> import torch
    >>> state = {"l.0.q": torch.zeros(2), "l.0.k": torch.ones(2)}
    >>> concat(state, ["l.{n}.q", "l.{n}.k"], "l.{n}.qk")
    {'l.0.qk': tensor([0., 0., 1., 1.])}
    """
    problems: list[str] = []
    sets: list[tuple[tuple[str, ...], dict[str, Tensor]]] = []
    for bound, first in _bound(state_dict, sources[0] if sources else ""):
        keys = [first, *(_substituted(template, bound) for template in sources[1:])]
        absent = [key for key in keys if key not in state_dict]
        if absent:
            problems += [f"{key!r}, wanted beside {first!r}, is not there" for key in absent]
            continue
        try:
            joined = interleaved([state_dict[key] for key in keys], keys, dim, groups)
            sets.append((tuple(keys), {_substituted(into, bound): joined}))
        except EditError as error:
            problems += error.problems
    if problems:
        raise EditError(problems)
    return regrouped(state_dict, sets)


@value_edit(
    "Take tensors apart (qkv into q, k, v).",
    "model.pth parts.pth --source 'l.{n}.qkv' --into 'l.{n}.q,l.{n}.k,l.{n}.v'",
    inline=[Inline("{source}={into}")],
)
def split(
    state_dict: Checkpoint,
    source: Annotated[str, "The template of the keys that are taken apart."],
    into: Annotated[Sequence[str], "Templates of the new keys, in this order."],
    *,
    dim: Annotated[int, "The dimension."] = 0,
    sizes: Annotated[Sequence[int], "The sizes of the parts, as 64,64,128; equal without it."] = (),
    groups: Annotated[int, "The parts are interleaved in so many groups (attention heads)."] = 1,
) -> Change[Checkpoint]:
    """Take tensors apart along one dimension, for every key that the template ``source`` names.

    ``sizes`` are the parts' (equal without it); ``groups`` as in :func:`concat`, which this undoes.  Raises
    NothingMatched, EditError, KeyCollision.

    >>> import torch
    >>> split({"l.0.qkv": torch.arange(6)}, "l.{n}.qkv", ["l.{n}.q", "l.{n}.k", "l.{n}.v"], groups=2)["l.0.k"]
    tensor([1, 4])
    """
    problems: list[str] = []
    sets: list[tuple[tuple[str, ...], dict[str, Tensor]]] = []
    for bound, key in _bound(state_dict, source):
        try:
            parts = parts_of(key, state_dict[key], dim, len(into), sizes, groups)
            names = [_substituted(template, bound) for template in into]
            if len(set(names)) < len(names):
                raise EditError([f"{key!r} would be split into parts of one name: {', '.join(names)}"])
            sets.append(((key,), dict(zip(names, parts, strict=True))))
        except EditError as error:
            problems += error.problems
    if problems:
        raise EditError(problems)
    return regrouped(state_dict, sets)


@value_edit(
    "Fold weight norm, spectral norm, masks.",
    "vocoder.pth plain.pth",
    inline=[Inline("", help="Fold weight norm, spectral norm, masks.")],
    computes=True,
)
def fold(
    state_dict: Checkpoint,
    patterns: Annotated[Patterns, "Globs on keys."] = "*",
    *,
    allow_unmatched: AllowUnmatched = False,
) -> Change[Checkpoint]:
    """Fold reparametrised weights into plain ones: weight norm, spectral norm and pruning masks.

    Both spellings are known: ``weight_g``/``weight_v``, ``weight_orig``/``weight_u``, ``weight_orig``/
    ``weight_mask``, and torch's ``parametrizations.weight.original…``.  ``patterns`` are globs on the plain keys
    (``*.conv.weight``).  Computed by torch's own formulas.  Raises NothingMatched when there is nothing to fold.

    >>> import torch
    >>> layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 2))
    >>> torch.equal(fold(layer.state_dict())["weight"], layer.weight.detach())
    True
    """
    from .fold import reparametrised

    found = list(reparametrised(state_dict))
    chosen = matching([one.key for one in found], patterns, allow_unmatched=True)
    if not chosen and not allow_unmatched:
        raise NothingMatched(listed_patterns(patterns), what="reparametrised weight", examples=state_dict)
    problems: list[str] = []
    sets: list[tuple[tuple[str, ...], dict[str, Tensor]]] = []
    for one in found:
        try:
            if one.key in chosen:
                sets.append((one.keys, {one.key: one.plain()}))
        except EditError as error:
            problems += error.problems
    if problems:
        raise EditError(problems)
    return settled(regrouped(state_dict, sets), sets)


# -- what they are made of


def each(
    state_dict: Checkpoint,
    keys: Iterable[str],
    convert: Callable[[str, Tensor], Tensor],
) -> Change[Checkpoint]:
    """Convert the tensors of some keys; tied ones once, so that they stay tied.  All problems at once."""
    chosen = set(keys)
    made: dict[object, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    problems: list[str] = []
    for key, tensor in state_dict.items():
        if key not in chosen or isinstance(tensor, ExtraState):  # which a glob may take in, and has no elements
            tensors[key] = tensor
            continue
        try:
            if isinstance(tensor, OpaqueTensor):
                raise EditError([f"{key!r} is a {tensor.kind} tensor, its values cannot be edited"])
            if tensor.tie not in made:
                made[tensor.tie] = convert(key, tensor)
            tensors[key] = made[tensor.tie]
        except EditError as error:
            problems += error.problems
    if problems:
        raise EditError(problems)
    parted = {tie for tie, tensor in made.items() if tensor.tie != tie}
    untied = [key for key, tensor in state_dict.items() if key not in chosen and tensor.tie in parted]
    said = [f"{len(untied):,} keys are no longer tied to one that was edited: {', '.join(untied[:3])}"] * bool(untied)
    origins = {key: (key,) for key in tensors}
    result = state_dict.with_tensors(tensors, state_dict.versions)
    return Change(state_dict, result, origins, tuple(said))


def settled(
    change: Change[Checkpoint], sets: Sequence[tuple[tuple[str, ...], Mapping[str, Tensor]]]
) -> Change[Checkpoint]:
    """A change whose edit has seen to all of these sets of keys."""
    return replace(change, settled=frozenset(key for keys, _ in sets for key in keys))


def regrouped(
    state_dict: Checkpoint, sets: Sequence[tuple[tuple[str, ...], Mapping[str, Tensor]]]
) -> Change[Checkpoint]:
    """Replace sets of keys by new keys, in the place of the first of each set; ties among them are kept."""
    gone = {key: index for index, (keys, _) in enumerate(sets) for key in keys}
    done: set[int] = set()
    tensors: dict[str, Tensor] = {}
    origins: dict[str, tuple[str, ...]] = {}
    collisions: dict[str, list[str]] = {}
    shared: dict[object, list[Tensor]] = {}

    def put(new: str, tensor: Tensor, olds: tuple[str, ...]) -> None:
        if new in tensors:
            collisions.setdefault(new, list(origins[new])).extend(olds)
        tensors[new], origins[new] = tensor, olds

    for key, tensor in state_dict.items():
        index = gone.get(key)
        if index is None:
            put(key, tensor, (key,))
        elif index not in done:
            done.add(index)
            keys, made = sets[index]
            tie = tuple(state_dict[old].tie for old in keys)
            values = shared.setdefault(tie, list(made.values()))
            for new, value in zip(made, values, strict=True):
                put(new, value, keys)
    if collisions:
        raise KeyCollision(collisions)
    versions = versions_of(state_dict)
    first = {olds[0]: new for new, olds in origins.items()}
    moved = None if versions is None else rename_versions(versions, first)
    return Change(state_dict, state_dict.with_tensors(tensors, moved), origins)


def _bound(keys: Iterable[str], template: str) -> list[tuple[re.Match[str], str]]:
    """The keys that a template names, each with what its placeholders stand for."""
    names: set[str] = set()
    parts = []
    for part in re.split(r"(\{[A-Za-z]\w*\}|\*)", template):
        if part == "*":
            parts.append("(.*)")
        elif part.startswith("{"):
            name = part[1:-1]
            parts.append(f"(?P={name})" if name in names else rf"(?P<{name}>\d+)")
            names.add(name)
        else:
            parts.append(re.escape(part))
    pattern = re.compile("".join(parts))
    keys = list(keys)
    found = [(match, key) for key in keys if (match := pattern.fullmatch(key))]
    if not found:
        raise NothingMatched([template], what="template", examples=keys)
    return found


def _substituted(template: str, bound: re.Match[str]) -> str:
    """A template with what another one's placeholders stood for."""
    named = {bound.start(name) for name in bound.re.groupindex}
    stars = iter([text for index, text in enumerate(bound.groups(), 1) if bound.start(index) not in named])
    problem = EditError([f"{template!r} has placeholders that the first template does not have"])

    def fill(part: re.Match[str]) -> str:
        name = part[0][1:-1]
        if part[0] == "*":
            text = next(stars, None)
            if text is None:
                raise problem
            return text
        if name not in bound.re.groupindex:
            raise problem
        return bound[name]

    return re.sub(r"\{[A-Za-z]\w*\}|\*", fill, template)
