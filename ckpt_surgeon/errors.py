"""Everything that can go wrong, as one tree.

    CheckpointError                 what the command line reports with exit status 2
    ├── FileError                   one file is the trouble: .path, .problem, .remedy
    │   ├── NotACheckpoint          the bytes are something else (HTML, a git-lfs pointer, empty …)
    │   ├── BrokenFile              a checkpoint that is damaged (truncated, wrong offsets, CRC …)
    │   ├── OutputExists            the output is there already and replacing it was not allowed
    │   └── NoRoom                  a new index is longer than the old one in whose place it should go: .needed, .room
    ├── SelectionError              which dict of tensors is meant is open: .candidates
    ├── EditError                   an edit that would lose or invent something: .problems, all at once
    │   ├── KeyCollision            several keys land on one name: .collisions
    │   └── NothingMatched          a rule or pattern that no key answers to: .patterns
    ├── FrozenChanged               parameters or buffers that were frozen and changed: .keys
    ├── RankFailed                  one of several processes could not go on: .rank, .shard, .problem
    ├── RecipeError                 a recipe file that cannot be read: .path, .problems with line numbers
    └── TargetError                 a target model that cannot be built: .target, .problem

Errors carry fields; their messages are derived from them.  Every message is one line that says what,
where, why and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

NEW_FILE = "write a new file instead: give OUT, not --in-place"
SHOWN = 5  # how many keys an error names before it says how many more there are


class Location(Protocol):
    """What errors ask of a file's path, on this machine or at a URL: ``str()`` and its last part."""

    @property
    def name(self) -> str: ...


def listed(names: Iterable[str], shown: int = SHOWN) -> str:
    """Join names for a message: the first few quoted, then a count of the rest.

    >>> listed(["a", "b", "c"], shown=2)
    "'a', 'b' and 1 more"
    """
    quoted = [repr(name) for name in names]
    if len(quoted) <= shown:
        return ", ".join(quoted)
    return f"{', '.join(quoted[:shown])} and {len(quoted) - shown:,} more"


class CheckpointError(Exception):
    """The root of the tree: catch this to catch everything this package raises on purpose."""


class FileError(CheckpointError):
    """One file is the trouble."""

    def __init__(self, path: str | Location, problem: str, remedy: str = "") -> None:
        self.path: Location = Path(path) if isinstance(path, str) else path
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{path}: {problem}" + (f"; {remedy}" if remedy else ""))


class NotACheckpoint(FileError):
    """The file is not a checkpoint at all."""


class BrokenFile(FileError):
    """The file is a checkpoint, but a damaged one."""


class OutputExists(FileError):
    """The output exists and replacing it was not allowed."""

    def __init__(self, path: str | Location) -> None:
        super().__init__(path, "exists already, nothing was written", "use --force (force=True) to replace it")


class NoRoom(FileError):
    """A new index is longer than the old one in whose place it should go; ``why`` may say what makes it long."""

    def __init__(self, path: str | Location, needed: int, room: int, why: str = "") -> None:
        self.needed = needed
        self.room = room
        problem = f"its new index needs {needed:,} bytes, {needed - room:,} more than the {room:,} that are there"
        super().__init__(path, f"{problem} ({why})" if why else problem, NEW_FILE)


class SelectionError(CheckpointError):
    """Several dicts of tensors could be meant, or the one asked for is not there."""

    def __init__(self, path: str | Location, problem: str, candidates: Sequence[str] = ()) -> None:
        self.path: Location = Path(path) if isinstance(path, str) else path
        self.problem = problem
        self.candidates = tuple(candidates)
        hint = f": choose one of {'; '.join(self.candidates)}" if self.candidates else ""
        super().__init__(f"{path}: {problem}{hint}")


class EditError(CheckpointError):
    """An edit that cannot be done as asked; every problem is named at once."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        shown, more = self.problems[: 2 * SHOWN], len(self.problems) - 2 * SHOWN
        super().__init__("; ".join(shown) + (f"; and {more:,} more like these" if more > 0 else ""))


class KeyCollision(EditError):
    """Two or more keys would land on one name, so a tensor would be lost."""

    def __init__(self, collisions: Mapping[str, Sequence[str]]) -> None:
        self.collisions = {new: tuple(olds) for new, olds in collisions.items()}
        shown = [f"{listed(olds)} all become {new!r}" for new, olds in list(self.collisions.items())[:SHOWN]]
        more = len(self.collisions) - len(shown)
        super().__init__([*shown, *([f"and {more:,} more collisions"] if more else [])])


class NothingMatched(EditError):
    """Patterns or rules that no key answers to; ``hints`` say of each what would match."""

    def __init__(
        self,
        patterns: Sequence[str],
        *,
        what: str = "pattern",
        examples: Iterable[str] = (),
        hints: Mapping[str, str] | None = None,
    ) -> None:
        self.patterns = tuple(patterns)
        self.hints = dict(hints or {})
        keys = list(examples)
        there = f" (the keys are {listed(keys, 3)})" if keys else ""
        told = {pattern: f": {hint}" for pattern, hint in self.hints.items()}
        super().__init__([f"{what} {pattern!r} matches no key{told.get(pattern, there)}" for pattern in self.patterns])


class FrozenChanged(CheckpointError):
    """Parameters or buffers of a model that are frozen and have other values than before."""

    def __init__(self, keys: Sequence[str], why: str = "") -> None:
        self.keys = tuple(keys)
        super().__init__(f"{listed(keys)} changed though frozen" + (f"; {why}" if why else ""))


class RankFailed(CheckpointError):
    """One process of several that write an output together failed; ``told_by`` is the rank that is to print it."""

    def __init__(self, rank: int, shard: str, problem: str, *, told_by: int | None = None) -> None:
        self.rank = rank
        self.shard = shard
        self.problem = problem
        self.told_by = rank if told_by is None else told_by
        super().__init__(f"rank {rank}{f' ({shard})' if shard else ''}: {problem}")


class RecipeError(CheckpointError):
    """A recipe that cannot be read; problems carry their line numbers."""

    def __init__(self, path: str | Location, problems: Sequence[str]) -> None:
        self.path: Location = Path(path) if isinstance(path, str) else path
        self.problems = tuple(problems)
        super().__init__(f"{path}: {'; '.join(self.problems)}")


class TargetError(CheckpointError):
    """A target model that cannot be found or built."""

    def __init__(self, target: str, problem: str) -> None:
        self.target = target
        self.problem = problem
        super().__init__(f"{target}: {problem}")
