"""Says key by key what a pairing of elements is: the same tensor, a part, several joined, another layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING

from ...text import Shown
from .elements import Numbered

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, repr=False)
class RunPair(Shown):
    """A key of the target and what it is made of: keys of the source, joined in order along the first dimension.

    ``how`` is "same", "reshape" (the elements in the same order), "transpose" (with ``dims``), "part" (number
    ``part[0]`` of ``part[1]`` equal ones along the first dimension), "concat", or "rows" (``rows`` of the first
    dimension of what is joined, as where heads are interleaved).
    """

    new: str
    olds: tuple[str, ...]
    how: str
    dims: tuple[int, ...] = ()
    part: tuple[int, int] = (0, 1)
    rows: tuple[int, ...] = ()

    def value(self, source: Mapping[str, torch.Tensor], shape: Iterable[int]) -> torch.Tensor:
        """The target's tensor, made of the source's.

        >>> import torch
        >>> pair = RunPair("k", ("qkv",), "part", part=(1, 3))
        >>> pair.value({"qkv": torch.arange(6)}, (2,))
        tensor([2, 3])
        """
        import torch

        whole = [source[old] for old in self.olds]
        joined = torch.cat(whole) if len(whole) > 1 else whole[0]
        if self.how == "part":
            joined = joined.chunk(self.part[1])[self.part[0]]
        elif self.how == "transpose":
            joined = joined.permute(self.dims)
        elif self.how == "rows":
            joined = joined[torch.tensor(self.rows)]
        return joined.reshape(tuple(shape))


def decoded(source: Numbered, target: Numbered, origin: torch.Tensor, key: str) -> RunPair | None:
    """What one key of the target is made of; None where not all of it is known, or it is no such thing."""
    import torch

    begin, end = target.span(key)
    elements = origin[begin:end]
    if not len(elements) or bool((elements < 0).any()):
        return None
    shape = target.shapes[key]
    first = source.key_of(int(elements[0]))
    if torch.equal(elements, torch.arange(*source.span(first))):
        how = "same" if source.shapes[first] == shape else "reshape"
        return RunPair(key, (_best_name(source, first, key),), how)
    offsets = torch.tensor(source.offsets)
    numbers = torch.searchsorted(offsets, elements, right=True) - 1
    olds = [source.keys[number] for number in dict.fromkeys(torch.unique_consecutive(numbers).tolist())]
    named = tuple(_best_name(source, old, key) for old in olds)
    spans = [torch.arange(*source.span(old)) for old in olds]
    joined = torch.cat(spans)
    if torch.equal(joined, elements):
        return RunPair(key, named, "concat")
    if len(olds) == 1:
        found = _part(spans[0], elements) or _layout(spans[0].view(source.shapes[olds[0]]), elements)
        if found is not None:
            how, dims, part = found
            return RunPair(key, named, how, dims, part)
    rows = _rows([span.view(source.shapes[old]) for span, old in zip(spans, olds, strict=True)], elements, shape)
    return RunPair(key, named, "rows", rows=rows) if rows else None


Found = tuple[str, tuple[int, ...], tuple[int, int]]


def _part(whole: torch.Tensor, elements: torch.Tensor) -> Found | None:
    count, size = len(whole), len(elements)
    start = int(elements[0] - whole[0])
    if count % size or start % size or not bool((elements == elements[0] + (whole[:size] - whole[0])).all()):
        return None
    return "part", (), (start // size, count // size)


def _layout(whole: torch.Tensor, elements: torch.Tensor) -> Found | None:
    """A transpose, where one gives these elements."""
    if whole.dim() > 5 or whole.numel() != len(elements):
        return None
    for dims in permutations(range(whole.dim())):
        if bool((whole.permute(dims).reshape(-1) == elements).all()):
            return "transpose", dims, (0, 1)
    return None


def _rows(parts: list[torch.Tensor], elements: torch.Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    import torch

    if any(part.shape[1:] != parts[0].shape[1:] for part in parts) or not shape:
        return ()
    joined = torch.cat(parts).flatten(1) if parts[0].dim() > 1 else torch.cat(parts).view(-1, 1)
    if len(elements) % joined.shape[1]:
        return ()
    wanted = elements.view(-1, joined.shape[1])
    firsts = {int(first): number for number, first in enumerate(joined[:, 0])}
    rows = tuple(firsts.get(int(first), -1) for first in wanted[:, 0])
    if -1 in rows or len(wanted) != shape[0] or not torch.equal(joined[list(rows)], wanted):
        return ()
    return rows


def _best_name(source: Numbered, old: str, new: str) -> str:
    """Of the names of one tied tensor, that of the target's key."""
    return new if source.ties.get(new) == old else old
