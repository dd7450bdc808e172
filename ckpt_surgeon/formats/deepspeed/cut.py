"""Where parameters lie in the flat vectors of ZeRO's ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import TypeAlias

from ...errors import BrokenFile
from ...files.paths import FilePath
from ...tensors.stored import StoredTensor
from ...text import plural
from ..flat import Flat, flat, joined
from ..pickle.values import Value
from .model import AGAIN, Model, Shapes

Places: TypeAlias = dict[str, list[tuple[int, int, int]]]  # of each name: vector, first element, last element + 1


@dataclass(frozen=True, slots=True)
class Cut:
    """Where the parameters lie in flat vectors: of each its group, shape, and stretches of vectors.

    ``vectors`` gives the vectors out of the lists of all ranks, as ``flats[rank][group]`` are.
    """

    folder: FilePath
    shapes: Shapes
    groups: Mapping[str, int]
    places: Places
    vectors: Callable[[Sequence[Sequence[Value]]], list[Flat | None]]

    def tensors(self, flats: Sequence[Sequence[Value]], what: str) -> dict[str, StoredTensor]:
        """Each parameter out of these vectors; those of a group that has none are left out.  Raises BrokenFile."""
        try:
            vectors = self.vectors(flats)
        except ValueError as error:
            raise BrokenFile(self.folder, f"its {what} are not what its ranks share: {error}", AGAIN) from None
        made: dict[str, StoredTensor] = {}
        for name, places in self.places.items():
            found = [vectors[at] for at, _, _ in places] if places else [next(filter(None, vectors), None)]
            dtypes = {vector.dtype.name: vector.dtype for vector in found if vector is not None}
            if None in found or len(dtypes) != 1:
                continue
            parts = [part for at, start, stop in places for part in _stretch(vectors[at], start, stop)]
            if sum(part.numel for part in parts) != prod(self.shapes[name]):
                problem = f"its {what} do not sum up: {name!r} of {list(self.shapes[name])} reaches outside of them"
                raise BrokenFile(self.folder, problem, AGAIN)
            made[name] = joined(parts, next(iter(dtypes.values())), self.shapes[name])
        return made


def _stretch(vector: Flat | None, start: int, stop: int) -> Iterator[StoredTensor]:
    if vector is not None and start < stop <= vector.numel:
        yield from vector.taken(start, stop)


def stage_1_2(folder: FilePath, model: Model, weights: Sequence[Sequence[Value]]) -> Cut:
    """Vector g is group g, of all ranks; its end is aligned to two elements a rank."""

    def vectors(flats: Sequence[Sequence[Value]]) -> list[Flat | None]:
        return [_flat([one[group] for one in flats]) for group in range(len(model.groups))]

    if any(len(one) != len(model.groups) for one in weights):
        problem = f"has param_shapes of {plural(len(model.groups), 'group')} and weights of {len(weights[0])}"
        raise BrokenFile(folder, problem, AGAIN)
    places: Places = {}
    for number, shapes in enumerate(model.groups):
        at = 0
        for name, shape in shapes.items():
            places[name] = [(number, at, at + prod(shape))] if prod(shape) else []
            at += prod(shape)
        _check_sum(folder, number, weights, at)
    return Cut(folder, model.shapes, model.group_of, places, vectors)


def _check_sum(folder: FilePath, number: int, weights: Sequence[Sequence[Value]], needed: int) -> None:
    """Raise BrokenFile where the parts of a group have fewer elements than its parameters, or more than padding."""
    there = sum(part.numel for one in weights if isinstance(part := one[number], StoredTensor))
    unit = 2 * len(weights)
    if there < needed or ceil(there / unit) != ceil(needed / unit):
        problem = f"its parts do not sum up: group {number} has {there:,} elements and its parameters need {needed:,}"
        raise BrokenFile(folder, problem, AGAIN)


def stage_3(folder: FilePath, model: Model, weights: Sequence[Sequence[Value]]) -> Cut:
    """Vector R is what rank R has of all groups, in their order."""
    sizes = [part.numel if isinstance(part, StoredTensor) else 0 for part in weights[0]]

    def vectors(flats: Sequence[Sequence[Value]]) -> list[Flat | None]:
        for one in flats:
            if [part.numel if isinstance(part, StoredTensor) else 0 for part in one] != sizes:
                raise ValueError(f"its ranks have {plural(len(sizes), 'group')} of other sizes")
        return [_flat(one) for one in flats]

    ranks, at = len(weights), 0
    places: Places = {}
    for name, shape in model.shapes.items():
        share = ceil(prod(shape) / ranks)
        cuts = [(rank, at, at + max(min(share, prod(shape) - rank * share), 0)) for rank in range(ranks)]
        places[name] = [place for place in cuts if place[1] < place[2]]
        at += share
    if at != sum(sizes):
        problem = f"its parts do not sum up: a rank has {sum(sizes):,} elements and its parameters need {at:,}"
        raise BrokenFile(folder, problem, AGAIN)
    return Cut(folder, model.shapes, model.group_of, places, vectors)


def _flat(parts: Sequence[Value]) -> Flat | None:
    return flat(parts) if any(part is not None for part in parts) else None
