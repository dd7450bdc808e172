"""Edits of several tensors that belong together: concat and split, stack and unstack, sum.

Their keys are named by templates: see :mod:`.templates`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from ..errors import Argument, EditError, Phrase
from ..tensors.checkpoint import Checkpoint
from ..tensors.records import ExtraState, OpaqueTensor, Tensor
from ..tensors.slabs import by_slabs
from ..tensors.views import interleaved, parts_of, stacked, unstacked
from .change import Change, Inline
from .templates import KeySet, bound, filled, key_sets, placeholders
from .value_edit import regrouped, value_edit

if TYPE_CHECKING:
    from ..tensors.conversion import Array

Sources = Annotated[Sequence[str], "Templates of the keys that are joined, in this order."]
Into = Annotated[str, "The template of the new key."]
Source = Annotated[str, "The template of the keys that are taken apart."]


@value_edit(
    "Join tensors (q, k, v into qkv).",
    "model.pth fused.pth --sources 'l.{n}.q,l.{n}.k,l.{n}.v' --into 'l.{n}.qkv'",
    inline=[Inline("{sources}={into}")],
)
def concat(
    state_dict: Checkpoint,
    sources: Sources,
    into: Into,
    *,
    dim: Annotated[int, "The dimension."] = 0,
    groups: Annotated[int, "Interleave in so many groups (attention heads)."] = 1,
) -> Change[Checkpoint]:
    """Join tensors along one dimension, for every set of keys that the templates name.

    A placeholder of ``sources`` that ``into`` does not have means all of them, in the order of their numbers
    (``l.{n}.experts.{e}.w`` into ``l.{n}.experts.w``); a gap is an error.  With ``groups`` the result interleaves:
    first the first of ``groups`` equal parts of every source, then the second (per attention head, say); 1 puts the
    sources one after the other.  Raises NothingMatched, EditError, KeyCollision.

    >>> import torch
    >>> state = {"l.0.q": torch.zeros(2), "l.0.k": torch.ones(2)}
    >>> concat(state, ["l.{n}.q", "l.{n}.k"], "l.{n}.qk")
    {'l.0.qk': tensor([0., 0., 1., 1.])}
    """
    return joined(state_dict, sources, into, lambda found, keys: interleaved(found, keys, dim, groups))


@value_edit(
    "Take tensors apart (qkv into q, k, v).",
    "model.pth parts.pth --source 'l.{n}.qkv' --into 'l.{n}.q,l.{n}.k,l.{n}.v'",
    inline=[Inline("{source}={into}")],
)
def split(
    state_dict: Checkpoint,
    source: Source,
    into: Annotated[Sequence[str], "Templates of the new keys, in this order."],
    *,
    dim: Annotated[int, "The dimension."] = 0,
    sizes: Annotated[Sequence[int], "The sizes of the parts, as 64,64,128; equal without it."] = (),
    groups: Annotated[int, "The parts are interleaved in so many groups (attention heads)."] = 1,
    parts: Annotated[int, "How many parts there are, where the new keys number them."] = 0,
) -> Change[Checkpoint]:
    """Take tensors apart along one dimension, for every key that the template ``source`` names.

    ``sizes`` are the parts' (equal without it); ``groups`` as in :func:`concat`, which this undoes.  A placeholder of
    ``into`` that ``source`` does not have numbers the parts from 0: as many as ``parts`` or ``sizes`` say.  Raises
    NothingMatched, EditError, KeyCollision.

    >>> import torch
    >>> split({"l.0.qkv": torch.arange(6)}, "l.{n}.qkv", ["l.{n}.q", "l.{n}.k", "l.{n}.v"], groups=2)["l.0.k"]
    tensor([1, 4])
    >>> list(split({"experts.w": torch.zeros(4, 2)}, "experts.w", ["experts.{e}.w"], parts=2))
    ['experts.0.w', 'experts.1.w']
    """

    def taken(key: str, tensor: Tensor, numbered: bool) -> list[Tensor]:
        count = len(into)
        if numbered:
            if not (parts or sizes):
                raise EditError(Phrase(f"into how many parts {key!r} is split is open: give ", Argument("parts")))
            count = parts * len(into) or len(sizes)
        elif parts and parts != count:
            raise EditError([f"{parts} parts of {key!r}, but {count} new keys"])
        return parts_of(key, tensor, dim, count, sizes, groups)

    return parted(state_dict, source, into, taken)


@value_edit(
    "Stack tensors (experts) along a new dimension.",
    "moe.pth stacked.pth --sources 'l.{n}.experts.{e}.w' --into 'l.{n}.experts.w'",
    inline=[Inline("{sources}={into}")],
)
def stack(
    state_dict: Checkpoint,
    sources: Annotated[Sequence[str], "Templates of the keys that are stacked, in this order."],
    into: Into,
    *,
    dim: Annotated[int, "Where the new dimension stands in the result."] = 0,
) -> Change[Checkpoint]:
    """Stack tensors of one shape along a new dimension, for every set of keys that the templates name (torch.stack).

    A placeholder of ``sources`` that ``into`` does not have means all of them, in the order of their numbers:
    ``l.{n}.experts.{e}.w`` of shape [a, b] becomes ``l.{n}.experts.w`` of shape [E, a, b].  A gap is an error, and so
    is another shape or dtype.  Raises NothingMatched, EditError, KeyCollision.

    >>> import torch
    >>> state = {f"experts.{e}.w": torch.full((2,), float(e)) for e in (1, 0)}
    >>> stack(state, ["experts.{e}.w"], "experts.w")["experts.w"]
    tensor([[0., 0.],
            [1., 1.]])
    """
    return joined(state_dict, sources, into, lambda found, keys: stacked(found, keys, dim))


@value_edit(
    "Take a stack of tensors apart.",
    "stacked.pth moe.pth --source 'l.{n}.experts.w' --into 'l.{n}.experts.{e}.w'",
    inline=[Inline("{source}={into}")],
)
def unstack(
    state_dict: Checkpoint,
    source: Source,
    into: Annotated[Sequence[str], "The template of the new keys with a number of its own, or the new keys in order."],
    *,
    dim: Annotated[int, "The dimension that goes."] = 0,
) -> Change[Checkpoint]:
    """Take stacks apart along one dimension, which goes, for every key that the template ``source`` names.

    Undoes :func:`stack` (torch.unbind).  A placeholder of ``into`` that ``source`` does not have numbers the parts from
    0; without one, there is a new key for each index.  Nothing is computed.  Raises NothingMatched, EditError,
    KeyCollision.

    >>> import torch
    >>> unstack({"experts.w": torch.tensor([[0.0, 0.0], [1.0, 1.0]])}, "experts.w", ["experts.{e}.w"])["experts.1.w"]
    tensor([1., 1.])
    """

    def taken(key: str, tensor: Tensor, numbered: bool) -> list[Tensor]:
        found = unstacked(key, tensor, dim)
        if not numbered and len(found) != len(into):
            raise EditError([f"{key!r} has {len(found):,} indices in dimension {dim}, but {len(into)} new keys"])
        return found

    return parted(state_dict, source, into, taken)


@value_edit(
    "Sum tensors (RepVGG's branches).",
    "branches.pth plain.pth --sources '*.conv_kxk.*,*.conv_1x1.*' --optional '*.identity.*' --into '*.reparam_conv.*'",
    inline=[Inline("{sources}={into}")],
    computes=True,
)
def sum_(
    state_dict: Checkpoint,
    sources: Annotated[Sequence[str], "Templates of the keys that are summed."],
    into: Into,
    *,
    optional: Annotated[Sequence[str], "Templates of keys that are added where they are there."] = (),
) -> Change[Checkpoint]:
    """Sum tensors, for every set of keys that the templates name; smaller kernels stand in the middle of larger ones.

    A placeholder of ``sources`` that ``into`` does not have means all of them.  Shapes have to be equal; those of
    convolutions, [out, in, k ...], may differ in odd k: a 1x1 kernel is padded with zeros to 3x3, which is the same
    for convolutions whose padding keeps the size (Ding et al. 2021, RepVGG, section 3.3).  Computed in float64.
    Raises NothingMatched, EditError, KeyCollision.

    >>> import torch
    >>> state = {"a.k3": torch.zeros(1, 1, 3, 3), "a.k1": torch.ones(1, 1, 1, 1)}
    >>> sum_(state, ["a.k3", "a.k1"], "a.k")["a.k"]
    tensor([[[[0., 0., 0.],
              [0., 1., 0.],
              [0., 0., 0.]]]])
    """
    return joined(state_dict, sources, into, _summed, optional)


def _summed(tensors: list[Tensor], keys: tuple[str, ...]) -> Tensor:
    first = tensors[0]
    dims = len(first.shape)
    shape = tuple(max(tensor.shape[at] for tensor in tensors) for at in range(dims)) if all(
        len(tensor.shape) == dims for tensor in tensors) else ()  # fmt: skip
    problems = []
    for key, tensor in zip(keys, tensors, strict=True):
        gaps = [whole - size for whole, size in zip(shape, tensor.shape, strict=False)]
        fits = len(gaps) == dims and not any(gaps[:2]) and not any(gap % 2 for gap in gaps)
        if tensor.dtype != first.dtype or not tensor.dtype.is_floating or not fits:
            problems.append(f"{key!r} ({tensor.dtype} {list(tensor.shape)}) cannot be added to {keys[0]!r} "
                            f"({first.dtype} {list(first.shape)})")  # fmt: skip
    if problems:
        raise EditError(problems)

    def added(start: int, stop: int, *slabs: Array) -> Array:
        import numpy as np

        made = np.zeros(shape and (stop - start, *shape[1:]))
        for slab in slabs:
            where = [slice((whole - size) // 2, (whole + size) // 2) for whole, size in zip(made.shape, slab.shape,
                                                                                           strict=True)]  # fmt: skip
            made[tuple(where)] += slab
        return made

    return by_slabs(keys[0], tensors, shape, added)


# -- what they are made of


def joined(
    state_dict: Checkpoint,
    sources: Sequence[str],
    into: str,
    join: Callable[[list[Tensor], tuple[str, ...]], Tensor],
    optional: Sequence[str] = (),
) -> Change[Checkpoint]:
    """The change that makes one tensor of every set of keys.  Raises EditError with all problems at once."""
    found, problems = key_sets(state_dict, sources, into, optional)
    sets: list[tuple[tuple[str, ...], dict[str, Tensor]]] = []
    for one in found:
        try:
            _check_plain(state_dict, one)
            sets.append((one.keys, {one.new: join([state_dict[key] for key in one.keys], one.keys)}))
        except EditError as error:
            problems += error.problems
    if problems:
        raise EditError(problems)
    change = regrouped(state_dict, sets)
    return replace(change, notes=(*change.notes, *_late_beginnings(state_dict, sources, into)))


def _late_beginnings(state_dict: Checkpoint, sources: Sequence[str], into: str) -> Iterator[str]:
    """Notes on numbers that begin neither with 0 nor with 1: keys may be missing (one rank's experts, say)."""
    shared = placeholders(into)
    for template in sources:
        for name in (name for name in placeholders(template) if name not in shared):
            least = min(one.numbers([name])[0] for one in bound(state_dict, template))
            if least > 1:
                yield f"{template}: the least {{{name}}} is {least}; those before it are not in this checkpoint"


def _check_plain(state_dict: Checkpoint, found: KeySet) -> None:
    plain = [key for key in found.keys if not isinstance(state_dict[key], (OpaqueTensor, ExtraState))]
    if len(plain) < len(found.keys):
        others = [key for key in found.keys if key not in plain]
        raise EditError([f"{key!r} is no plain tensor and joins no other" for key in others])


def parted(
    state_dict: Checkpoint,
    source: str,
    into: Sequence[str],
    take: Callable[[str, Tensor, bool], list[Tensor]],
) -> Change[Checkpoint]:
    """The change that takes every key of a template apart; ``take`` is told whether the new keys are numbered.

    Raises EditError with all problems at once.
    """
    held = placeholders(source)
    own = [[name for name in placeholders(template) if name not in held] for template in into]
    number = own[0][0] if own and all(names == own[0] and len(names) == 1 for names in own) else ""
    problems: list[str] = []
    sets: list[tuple[tuple[str, ...], dict[str, Tensor]]] = []
    for one in bound(state_dict, source):
        try:
            found = take(one.key, state_dict[one.key], bool(number))
            counts = range(len(found) // len(into) if number else 1)
            names = [filled(template, dict(one.names) | ({number: str(at)} if number else {}), one.stars)
                     for template in into for at in counts]  # fmt: skip
            if len(names) != len(found):
                raise EditError([f"{one.key!r} gives {len(found)} parts, which {len(into)} templates do not share"])
            if len(set(names)) < len(names):
                raise EditError([f"{one.key!r} would be split into parts of one name: {', '.join(names)}"])
            sets.append(((one.key,), dict(zip(names, found, strict=True))))
        except EditError as error:
            problems += error.problems
    if problems:
        raise EditError(problems)
    return regrouped(state_dict, sets)
