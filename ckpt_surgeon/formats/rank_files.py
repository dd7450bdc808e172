"""A state_dict in one file a rank: ``model_world_size_4_rank_0.pt`` and its kin, as verl, SkyRL and others write them.

Each rank saved its own part, DTensors (FSDP2, tensor parallelism) or ShardedTensors (FSDP), which say where their
elements lie in the whole.  ``optim_world_size_…`` and ``extra_state_world_size_…`` beside them are read the same way.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from ..errors import Argument, BrokenFile, NotACheckpoint, Phrase, listed
from ..files.paths import FilePath, prefetch_heads
from ..tensors.dtypes import DType
from ..tensors.records import OpaqueTensor
from ..tensors.stored import StoredTensor
from ..text import plural
from .boxes import Box, assembled
from .contents import Contents
from .dcp.pieces import Sizes
from .pickle.values import Ordered, Value, spelled
from .sharded import Reader, listed_problems

CONTAINER = "one file a rank"
DEPTH = 40
_NAME = re.compile(r"(?P<kind>\w+?)_world_size_(?P<world>\d+)_rank_(?P<rank>\d+)\.(?:pt|pth|bin|ckpt)")
_KINDS = {"model": 0, "optim": 1, "optimizer": 1, "extra_state": 2}


def holds(names: Iterable[str]) -> bool:
    """Whether a folder with these names is such a checkpoint.

    >>> holds(["model_world_size_2_rank_0.pt", "config.json"]), holds(["rank_0.pt"])
    (True, False)
    """
    return any((found := _NAME.fullmatch(name)) is not None and found["kind"] in _KINDS for name in names)


def read(folder: FilePath, names: Sequence[str], read_file: Reader, *, salvage: bool = False) -> Contents:
    """Read the files of all ranks as one tree: ``model``, and beside it ``optim`` and ``extra_state``.

    Raises BrokenFile where ranks are missing or their parts do not make up a tensor, NotACheckpoint where the files are
    those of several world sizes.
    """
    found: dict[str, dict[int, str]] = {}
    worlds: dict[int, str] = {}
    for name in names:
        if (match := _NAME.fullmatch(name)) is not None and match["kind"] in _KINDS:
            found.setdefault(match["kind"], {})[int(match["rank"])] = name
            worlds[int(match["world"])] = name
    if len(worlds) > 1:
        problem = f"has files of several world sizes ({', '.join(map(str, sorted(worlds)))})"
        raise NotACheckpoint(folder, problem, "move those of one of them away")
    world = next(iter(worlds))
    every: list[Contents] = []
    root: dict[Value, Value] = {}
    notes: list[str] = []
    for kind in sorted(found, key=lambda one: _KINDS[one]):
        files = {rank: name for rank, name in sorted(found[kind].items()) if rank < world}
        missing = [rank for rank in range(world) if rank not in files]
        prefetch_heads([folder / name for name in files.values()])
        parts = {rank: read_file(folder / name, salvage=salvage) for rank, name in files.items()}
        every += parts.values()
        joining = _Joining(missing_files(next(iter(files.values()), ""), missing))
        root[kind] = joining.joined({rank: contents.root for rank, contents in parts.items()}, "")
        if kind != "extra_state" and not joining.is_sharded and (others := joining.differing or joining.unproven):
            problem = f"its ranks have plain tensors that are not the same in each ({listed(others, 3)})"
            raise NotACheckpoint(
                folder, f"{problem}, and nothing says how they fit", "join them with the tool that saved them"
            )
        if joining.problems:
            problem = listed_problems([*joining.missing_first(), *joining.problems], 3)
            raise BrokenFile(folder, problem, Phrase("fetch the missing files, or open one rank's file with ",
                                                     Argument("allow_part", True)))  # fmt: skip
        notes += joining.notes(kind)
    return Contents(
        folder,
        f"{CONTAINER}, {plural(world, 'rank')}",
        root,
        notes=(*notes, *(note for contents in every for note in contents.notes)),
        globals=tuple(dict.fromkeys(name for contents in every for name in contents.globals)),
        globals_inside=lambda: chain.from_iterable(contents.globals_inside() for contents in every),
    )


def missing_files(name: str, ranks: Sequence[int]) -> list[str]:
    """The names of the files of ranks that are not there, by that of one that is."""
    return [re.sub(r"_rank_\d+", f"_rank_{rank}", name) for rank in ranks]


@dataclass(slots=True)
class _Joining:
    """The files of all ranks on their way to one tree; what does not fit is gathered."""

    missing: list[str]
    problems: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    unproven: list[str] = field(default_factory=list)
    is_sharded: bool = False

    def missing_first(self) -> list[str]:
        return [f"missing: {listed(self.missing, 3)}"] if self.missing else []

    def notes(self, kind: str) -> Iterator[str]:
        """What is worth saying of a tree that was joined."""
        if self.missing:
            yield f"{kind}: all of it is there without {listed(self.missing, 3)}"
        if self.differing:
            yield f"{kind}: not the same in all ranks, the first one's is taken: {listed(self.differing, 3)}"

    def joined(self, values: Mapping[int, Value], path: str, depth: int = 0) -> Value:
        """One value of those that the ranks have: dicts and lists entry by entry, sharded tensors put together."""
        first = next(iter(values.values()))
        if depth > DEPTH:
            return first
        boxes = [(rank, box) for rank, value in values.items() if (box := _boxes(value)) is not None]
        if boxes:
            return self._tensor(path, boxes, len(values))
        if isinstance(first, dict):
            made: dict[Value, Value] = Ordered() if isinstance(first, Ordered) else {}
            if isinstance(made, Ordered) and isinstance(first, Ordered):
                made.attributes = first.attributes
            keys = dict.fromkeys(key for value in values.values() if isinstance(value, dict) for key in value)
            for key in keys:
                of = {rank: value[key] for rank, value in values.items() if isinstance(value, dict) and key in value}
                made[key] = self.joined(of, f"{path}.{spelled(key)}" if path else spelled(key), depth + 1)
            return made
        if isinstance(first, list) and all(isinstance(one, list) and len(one) == len(first) for one in values.values()):
            return [
                self.joined({rank: one[at] for rank, one in values.items() if isinstance(one, list)}, f"{path}.{at}",
                            depth + 1)
                for at in range(len(first))
            ]  # fmt: skip
        if isinstance(first, StoredTensor) and (alike := _are_alike(first, values.values())) is not True:
            (self.differing if alike is False else self.unproven).append(path)
        return first

    def _tensor(self, path: str, found: list[tuple[int, _Sharded]], ranks: int) -> Value:
        """A tensor out of the parts of the ranks."""
        first = found[0][1]
        self.is_sharded = True
        if any((one.shape, one.dtype) != (first.shape, first.dtype) for _, one in found):
            self.problems.append(f"{path!r} has other shapes or dtypes in other ranks")
            return None
        if unplaced := [rank for rank, one in found if one.boxes is None]:
            self.problems.append(f"{path!r}: rank {unplaced[0]} does not say where its part lies, or it is no box")
            return None
        boxes = [Box(offsets, tensor, rank) for rank, one in found for offsets, tensor in one.boxes or ()]
        try:
            return assembled(first.shape, first.dtype, boxes)
        except ValueError as error:
            self.problems.append(f"{path!r}: {error}")
            return None


@dataclass(frozen=True, slots=True)
class _Sharded:
    """What one rank has of a tensor: dtype and shape of the whole, its boxes; None where it does not say where."""

    dtype: DType
    shape: Sizes
    boxes: list[tuple[Sizes, StoredTensor]] | None


def _boxes(value: Value) -> _Sharded | None:
    """What a value is of a sharded tensor; None for anything else."""
    if isinstance(value, OpaqueTensor) and value.local is not None:
        boxes = None if value.offsets is None else [(value.offsets, value.local)]
        return _Sharded(value.dtype, value.shape, boxes)
    return None


def _are_alike(first: StoredTensor, values: Iterable[Value]) -> bool | None:
    """Whether all ranks have the same tensor, as far as shapes and checksums tell; None where they do not tell it."""
    known: bool | None = True
    for one in values:
        if not isinstance(one, StoredTensor) or (one.shape, one.dtype) != (first.shape, first.dtype):
            return False
        if one.crc32 is None or first.crc32 is None:
            known = None
        elif one.crc32 != first.crc32:
            return False
    return known
