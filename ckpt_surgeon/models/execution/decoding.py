"""Says key by key what a pairing of elements is: the same tensor, a part, several joined, another layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from math import prod
from typing import TYPE_CHECKING

from ...text import Shown
from .elements import Numbered

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, repr=False)
class RunPair(Shown):
    """A key of the target and what it is made of: keys of the source, and what is done to them.

    They are joined along ``dim``, interleaved in so many ``groups``; ``part`` (start, stop) of that is taken, counted
    in indices that are sorted by group too.  What comes out is viewed in the shape ``split`` (where it is not
    empty), its dimensions are put in the order ``dims``, and that is given the target's shape.

    ``reached`` and ``rows``: the input looked up so many of a table's rows; the others are taken in the same order.
    """

    new: str
    olds: tuple[str, ...]
    dim: int = 0
    groups: int = 1
    part: tuple[int, int] | None = None
    split: tuple[int, ...] = ()
    dims: tuple[int, ...] = ()
    reached: int = 0
    rows: int = 0

    @property
    def how(self) -> str:
        """What is done, in a word: "same", "concat", "part", "permute"; more than one joined by "and"."""
        words = ["concat"] * (len(self.olds) > 1) + ["part"] * (self.part is not None) + ["permute"] * bool(self.dims)
        return " and ".join(words) or "same"

    @property
    def is_whole(self) -> bool:
        """Whether every row of a table was reached."""
        return self.reached == self.rows

    def value(self, source: Mapping[str, torch.Tensor], shape: Iterable[int]) -> torch.Tensor:
        """The target's tensor, made of the source's.

        >>> import torch
        >>> pair = RunPair("k", ("qkv",), part=(2, 4))
        >>> pair.value({"qkv": torch.arange(6)}, (2,))
        tensor([2, 3])
        """
        import torch

        whole = [source[old] for old in self.olds]
        if len(whole) > 1:
            parts = [one.unflatten(self.dim, (self.groups, -1)) for one in whole]
            made = torch.cat(parts, self.dim + 1).flatten(self.dim, self.dim + 1)
        else:
            made = whole[0]
        if self.part is not None:
            start, stop = (at // self.groups for at in self.part)
            grouped = made.unflatten(self.dim, (self.groups, -1))
            made = grouped.narrow(self.dim + 1, start, stop - start).flatten(self.dim, self.dim + 1)
        if self.dims:
            made = made.reshape(self.split or made.shape).permute(self.dims)
        return made.reshape(tuple(shape))


def decoded(source: Numbered, target: Numbered, origin: torch.Tensor, key: str) -> RunPair | None:
    """What one key of the target is made of; None where not all of it is known, or it is no such thing."""
    import torch

    begin, end = target.span(key)
    elements = origin[begin:end]
    if not len(elements):
        return None
    shape = target.shapes[key]
    reached = rows = 0
    if bool((elements < 0).any()):
        found = _completed(source, elements, shape)
        if found is None:
            return None
        elements, reached, rows = found
    first = source.key_of(int(elements[0]))
    if torch.equal(elements, torch.arange(*source.span(first))):
        return RunPair(key, (_best_name(source, first, key),), reached=reached, rows=rows)
    offsets = torch.tensor(source.offsets)
    numbers = torch.searchsorted(offsets, elements, right=True) - 1
    olds = [source.keys[number] for number in dict.fromkeys(torch.unique_consecutive(numbers).tolist())]
    named = tuple(_best_name(source, old, key) for old in olds)
    tensors = [torch.arange(*source.span(old)).view(source.shapes[old]) for old in olds]
    made = next(_ways(tensors, elements.view(shape)), None)
    return None if made is None else replace(made, new=key, olds=named, reached=reached, rows=rows)


def _completed(
    source: Numbered, elements: torch.Tensor, shape: tuple[int, ...]
) -> tuple[torch.Tensor, int, int] | None:
    """A table with the rows that no input reached: those at the same distance in the source's table.

    None where the rows that were reached are not in one table and at one distance, or the source has too few.
    """
    import torch

    width = shape[-1] if len(shape) > 1 else 1
    rows = elements.view(-1, width)
    known = (rows >= 0).all(1)
    if not bool(known.any()) or bool((rows[~known] >= 0).any()) or bool((rows[~known] == -1).any()):
        return None
    places = known.nonzero().flatten()
    old = source.key_of(int(rows[places[0], 0]))
    if (source.shapes[old][-1] if len(source.shapes[old]) > 1 else 1) != width:
        return None
    begin, end = source.span(old)
    shift = int(rows[places[0], 0]) - begin - int(places[0]) * width
    made = (torch.arange(len(elements)) + begin + shift).view(-1, width)
    if (
        shift % width
        or not torch.equal(made[known], rows[known])
        or int(made[0, 0]) < begin
        or int(made[-1, -1]) >= end
    ):
        return None
    return made.flatten(), int(known.sum()), len(rows)


def _ways(tensors: Sequence[torch.Tensor], wanted: torch.Tensor) -> Iterator[RunPair]:
    """What makes these elements of tensors: joined and cut along either dimension, or permuted."""
    is_flat = all(one.dim() == 2 for one in tensors) and wanted.dim() == 2
    for dim in (0, 1) if is_flat else (0,):
        for turned in (False, True) if is_flat else (False,):
            made = _along([one.transpose(0, dim) for one in tensors], wanted.t() if turned else wanted)
            if made is not None:
                swapped = (dim == 1) != turned
                yield replace(made, dim=dim, dims=(1, 0) if swapped else made.dims)
    if len(tensors) == 1:
        yield from _permuted(tensors[0], wanted)


def _along(tensors: Sequence[torch.Tensor], wanted: torch.Tensor) -> RunPair | None:
    """Tensors that are joined, or cut, along their first dimension, perhaps in groups; None where it is not so."""
    import torch

    if not wanted.dim() or any(one.shape[1:].numel() != tensors[0].shape[1:].numel() for one in tensors):
        return None
    joined = torch.cat([one.reshape(one.shape[0], -1) for one in tensors])
    if wanted.numel() % joined.shape[1]:
        return None
    rows = _rows(joined, wanted.reshape(-1, joined.shape[1]))
    if rows is None:
        return None
    if len(tensors) > 1:
        groups = _groups_of([len(one) for one in tensors], rows)
        return RunPair("", (), groups=groups) if groups else None
    found = _part_of(len(joined), rows)
    if found is not None:
        return found
    return _blocks(len(joined), rows, tensors[0].shape[1:])


def _rows(joined: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor | None:
    """Which rows of a matrix others are."""
    import torch

    firsts = joined[:, 0]
    order = firsts.argsort()
    at = torch.searchsorted(firsts[order], wanted[:, 0].contiguous()).clamp(max=len(firsts) - 1)
    rows = order[at]
    return rows if torch.equal(joined[rows], wanted) else None


def _groups_of(sizes: Sequence[int], rows: torch.Tensor) -> int:
    """In how many groups the rows of tensors of these sizes are joined; 0 where they are not."""
    import torch

    starts = [sum(sizes[:at]) for at in range(len(sizes))]
    if sum(sizes) != len(rows):
        return 0
    for groups in _divisors(min(sizes)):
        if any(size % groups for size in sizes):
            continue
        parts = [(torch.arange(size) + start).view(groups, -1) for start, size in zip(starts, sizes, strict=True)]
        if torch.equal(torch.cat(parts, 1).flatten(), rows):
            return groups
    return 0


def _part_of(count: int, rows: torch.Tensor) -> RunPair | None:
    """A range of rows, or the same range of every group of them."""
    import torch

    size = len(rows)
    if size >= count:
        return RunPair("", ()) if torch.equal(rows, torch.arange(count)) else None
    for groups in _divisors(size):
        if count % groups:
            continue
        start = int(rows[0])
        each = (torch.arange(groups) * (count // groups)).view(-1, 1) + start + torch.arange(size // groups)
        if start < count // groups and torch.equal(each.flatten(), rows):
            return RunPair("", (), groups=groups, part=(start * groups, start * groups + size))
    return None


def _blocks(count: int, rows: torch.Tensor, rest: Sequence[int]) -> RunPair | None:
    """Rows that are counted by three numbers, of which the last two change places (rotary embeddings, head by head)."""
    import torch

    if len(rows) != count:
        return None
    every = torch.arange(count)
    for heads in _divisors(count):
        for inner in _divisors(count // heads):
            sizes = (heads, inner, count // heads // inner)
            for order in ((0, 2, 1), (1, 0, 2)):
                if torch.equal(every.view(sizes).permute(order).flatten(), rows):
                    split = (*sizes, *rest)
                    return RunPair("", (), split=split, dims=(*order, *range(3, len(split))))
    return None


def _permuted(whole: torch.Tensor, wanted: torch.Tensor) -> Iterator[RunPair]:
    """A tensor whose dimensions stand in another order."""
    if whole.dim() > 5 or whole.numel() != wanted.numel():
        return
    for dims in permutations(range(whole.dim())):
        if bool((whole.permute(dims).reshape(-1) == wanted.reshape(-1)).all()):
            yield RunPair("", (), dims=dims)


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]


def permuted_shape(shape: Sequence[int], pair: RunPair) -> tuple[int, ...]:
    """The shape of what is permuted, before it gets the target's shape."""
    sizes = pair.split or tuple(shape)
    assert prod(sizes) == prod(shape)
    return tuple(sizes[dim] for dim in pair.dims)


def _best_name(source: Numbered, old: str, new: str) -> str:
    """Of the names of one tied tensor, that of the target's key."""
    return new if source.ties.get(new) == old else old
