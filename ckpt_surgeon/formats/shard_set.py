"""Shards that no index lists: ``model-00001-of-00003.safetensors`` and its siblings, read as one checkpoint.

Each shard has whole tensors, so a key that two of them have says that they are something else.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import Argument, BrokenFile, Phrase
from ..files.paths import FilePath, prefetch_heads
from ..files.temporary import MOVES, is_name_of, parsed
from ..text import command
from .contents import Contents
from .pickle.values import Ordered, Value, spelled
from .shard_names import ShardSet, is_shard, sets_in
from .sharded import (
    TENSORS,
    Gathered,
    Reader,
    index_name,
    index_over,
    listed_problems,
)

_HOLDING = (*TENSORS, dict, list, tuple)  # what no two shards may have under one key


def set_of(path: FilePath) -> ShardSet | None:
    """The set that a file is a shard of, None where it is none or an index lists it."""
    if not is_shard(path.name) or not path.has_listing:
        return None
    names = path.parent.names()
    for one in sets_in(path.parent, names):
        if path.name in one.names.values():
            listed_by = index_over(path.local) if path.local is not None else None
            return None if listed_by is not None or index_name(one.whole).name in names else one
    return None


def read(shards: ShardSet, read_shard: Reader, *, salvage: bool = False) -> Contents:
    """Read the headers of all shards of a set as one checkpoint; with ``salvage``, some may be missing or cut off.

    Raises BrokenFile for a set that is not complete, with the missing numbers, and for a key that two shards have.
    """
    gathered = gather(shards, read_shard, salvage=salvage)
    root = joined(shards, gathered)
    if shards.missing:
        return gathered.contents(
            shards.first, root, (f"of {shards.count:,} shards, {_numbers(shards.missing)} missing",)
        )
    if shards.suffix == ".gguf":  # has no index, and needs none
        return gathered.contents(shards.first, root, ())
    note = f"no index lists these shards; to write one: {command('index', shards.folder)}"
    return gathered.contents(shards.first, root, (note,))


def gather(shards: ShardSet, read_shard: Reader, *, salvage: bool = False) -> Gathered:
    """What the shards of a set hold, each for itself.  Raises BrokenFile where some are missing or replaced."""
    _refuse_half_replaced(shards)
    if shards.missing and not salvage:
        problem = f"is one of {shards.count:,} shards, of which {_numbers(shards.missing)} missing"
        remedy = Phrase("fetch them, or take what is there with ", Argument("salvage", True))
        raise BrokenFile(shards.first, problem, remedy)
    places = {name: shards.folder / name for _, name in sorted(shards.names.items())}
    prefetch_heads(list(places.values()))
    gathered = Gathered()
    for name, place in places.items():
        gathered.add(name, read_shard(place, salvage=salvage))
    return gathered


def _refuse_half_replaced(shards: ShardSet) -> None:
    """Old and new shards are side by side where a run that replaces them was killed, or is at it."""
    if not shards.folder.has_listing or shards.folder.local is None:
        return
    index = index_name(shards.whole).local
    for name in shards.folder.names():
        parts = parsed(name)
        if parts is not None and parts.suffix == MOVES and index is not None and is_name_of(index, parts.name):
            problem = "is of an output that was just being replaced: shards of two versions lie side by side"
            raise BrokenFile(shards.first, problem, f"the old one comes back with {command('recover', shards.whole)}")


def joined(shards: ShardSet, gathered: Gathered) -> Ordered:
    """The entries of all shards.  Raises BrokenFile for a key that two shards have, naming both."""
    root, homes = Ordered(), dict[Value, str]()
    problems = []
    for name, held in gathered.roots.items():
        for key, value in held.items():
            if key not in homes:
                root[key], homes[key] = value, name
            elif isinstance(value, _HOLDING) or isinstance(root[key], _HOLDING):
                problems.append(f"{spelled(key)!r} is in {homes[key]!r} and in {name!r}")
    if problems:
        remedy = "they are no shards of one checkpoint: move those of another one away"
        raise BrokenFile(shards.first, listed_problems(problems), remedy)
    return root


def _numbers(missing: list[int]) -> str:
    """Numbers as ranges, with their verb: ``number 2 is``, ``numbers 1–3, 7 are``."""
    ranges = list(_ranges(missing))
    shown = ", ".join(ranges[:8]) + (f" and {len(ranges) - 8:,} more ranges" if len(ranges) > 8 else "")
    return f"number {shown} is" if len(missing) == 1 else f"numbers {shown} are"


def _ranges(numbers: list[int]) -> Iterator[str]:
    start = previous = numbers[0]
    for number in [*numbers[1:], -1]:
        if number != previous + 1:
            yield str(start) if start == previous else f"{start}–{previous}"
            start = number
        previous = number
