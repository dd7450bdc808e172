"""Everything that can go wrong, as one tree.

    CheckpointError                 what the command line reports with exit status 2
    ├── FileError                   one file is the cause: .path, .problem
    │   ├── NotACheckpoint          the bytes are something else (HTML, a git-lfs pointer, empty …)
    │   ├── BrokenFile              a checkpoint that is damaged (truncated, wrong offsets, CRC …)
    │   ├── OutputExists            the output is there already and replacing it was not allowed
    │   └── NoRoom                  a new index is longer than the old one in whose place it should go: .needed, .room
    ├── SelectionError              which dict of tensors is meant is open: .path, .problem, .candidates
    ├── EditError                   an edit that would lose or invent something: .problems, all at once
    │   ├── KeyCollision            several keys land on one name: .collisions
    │   └── NothingMatched          a rule or pattern that no key answers to: .patterns, .hints
    ├── FrozenChanged               parameters or buffers that were frozen and changed: .keys
    ├── RankFailed                  one of several processes could not go on: .rank, .shard, .problem
    ├── RecipeError                 a recipe file that cannot be read: .path, .problems with line numbers
    └── TargetError                 a target model that cannot be built: .target, .problem

Errors carry fields, and their messages are derived from them.  Every message is one line that says what, where, why
and what to do:

    CONTEXT: SUBJECT: PROBLEM; PROBLEM; REMEDY

Every error has a ``remedy`` (what to do, never cut off) and a ``context`` (where in a longer job, outermost first:
``step 2 (drop)``).  A problem or a remedy that names an argument is a :class:`Phrase`: it reads ``force=True`` in
Python, and whoever shows it elsewhere spells its parts in another way (:meth:`CheckpointError.message`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .safe_text import url_without_secrets, visible, without_secrets

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


def text_of(error: BaseException, longest: int = 500) -> str:
    """An exception's class and message in one line; code that raises it may have any message, or none.

    >>> text_of(ValueError("two\\n  lines"))
    'ValueError: two lines'
    """
    try:
        words = " ".join(str(error).split())
    except Exception:  # whose own code fails
        words = ""
    words = words if len(words) <= longest else f"{words[:longest]} …"
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


# -- phrases: text in which arguments and functions keep their type


@dataclass(frozen=True, slots=True)
class Argument:
    """An argument of a public function, with or without a value; a flag on the command line.

    >>> print(Argument("on_collision"), Argument("on_collision", "first"))
    on_collision on_collision='first'
    """

    name: str
    value: object = None

    def __str__(self) -> str:
        return self.name if self.value is None else f"{self.name}={self.value!r}"


@dataclass(frozen=True, slots=True)
class Call:
    """A public function and some of its arguments; a command with flags on the command line.

    >>> print(Call("ls", Argument("all", True)))
    ckpt_surgeon.ls(…, all=True)
    """

    function: str
    arguments: tuple[Argument, ...]

    def __init__(self, function: str, *arguments: Argument) -> None:
        object.__setattr__(self, "function", function)
        object.__setattr__(self, "arguments", arguments)

    def __str__(self) -> str:
        return f"ckpt_surgeon.{self.function}({', '.join(['…', *map(str, self.arguments)])})"


@dataclass(frozen=True, slots=True)
class Either:
    """Words that differ between Python and the command line."""

    python: str
    command_line: str

    def __str__(self) -> str:
        return self.python


Part = Argument | Call | Either


class Phrase(str):
    """Text that names arguments or functions, in Python's spelling; ``parts`` are what it is made of.

    >>> remedy = Phrase("use ", Argument("force", True), " to replace it")
    >>> remedy
    'use force=True to replace it'
    >>> remedy.spelled(lambda part: "--force")
    'use --force to replace it'
    """

    __slots__ = ("parts",)
    parts: tuple[str | Part, ...]

    def __new__(cls, *parts: str | Part) -> Phrase:
        flat = tuple(piece for part in parts for piece in (part.parts if isinstance(part, Phrase) else (part,)))
        made = super().__new__(cls, "".join(map(str, flat)))
        made.parts = flat
        return made

    def __getnewargs__(self) -> tuple[str | Part, ...]:  # type: ignore[override]
        return self.parts

    def spelled(self, spell: Callable[[Part], str]) -> str:
        """The text with every argument and function as ``spell`` writes it."""
        return "".join(part if isinstance(part, str) else spell(part) for part in self.parts)


def joined(phrases: Iterable[str], separator: str = "; ") -> Phrase:
    """Phrases and texts as one phrase.

    >>> joined(["drop it", Phrase("give ", Argument("fill", "zero"))])
    "drop it; give fill='zero'"
    """
    pieces = [piece for phrase in phrases for piece in (separator, phrase)]
    return Phrase(*pieces[1:])


NEW_FILE = Phrase("write a new file instead: ", Either("save(…, OUT)", "give OUT, not --in-place"))
SEE_ALL = Phrase("see what it holds: ", Call("ls", Argument("all", True)))


# -- the tree


class CheckpointError(Exception):
    """The root of the tree: catch this to catch everything that this package raises on purpose."""

    most = 2 * SHOWN  # how many problems a message says
    more = "more like these"  # what the others are called
    then = "; "  # what stands before the remedy

    def __init__(self, *problems: str, remedy: str = "") -> None:
        self.problems: tuple[str, ...] = problems
        self.remedy = remedy
        self.context: tuple[str, ...] = ()

    @property
    def subject(self) -> str:
        """What the problems are about, where one thing is: a path, a target."""
        return ""

    def inside(self, context: str) -> None:
        """Note what was being done, around what is noted already."""
        self.context = (context, *self.context)

    def message(self, spell: Callable[[Part], str] = str) -> str:
        """The error as one line; ``spell`` writes the arguments and functions that it names."""

        def written(text: str) -> str:
            return text.spelled(spell) if isinstance(text, Phrase) else text

        hidden = len(self.problems) - self.most
        texts = [written(problem) for problem in self.problems[: self.most]]
        texts += [f"and {hidden:,} {self.more}"] * (hidden > 0)
        message = "; ".join(texts) + (self.then + written(self.remedy) if self.remedy else "")
        subject = url_without_secrets(self.subject)
        line = ": ".join([*self.context, *([subject] if subject else []), message])
        return visible(without_secrets(line))

    def __str__(self) -> str:
        return self.message()

    def __reduce__(self) -> tuple[Callable[..., CheckpointError], tuple[object, ...]]:
        return _restored, (type(self), self.__dict__)


def _restored(kind: type[CheckpointError], fields: Mapping[str, object]) -> CheckpointError:
    """An error from another process."""
    error = kind.__new__(kind)
    error.__dict__.update(fields)
    return error


class FileError(CheckpointError):
    """One file is the cause."""

    def __init__(self, path: str | Location, problem: str, remedy: str = "") -> None:
        super().__init__(problem, remedy=remedy)
        self.path: Location = Path(path) if isinstance(path, str) else path
        self._spelled = str(path)

    @property
    def problem(self) -> str:
        """What is wrong with it."""
        return self.problems[0]

    @property
    def subject(self) -> str:
        """The path as it was given."""
        return self._spelled


class NotACheckpoint(FileError):
    """The file is not a checkpoint at all."""


class BrokenFile(FileError):
    """The file is a checkpoint, but a damaged one."""

    def __init__(self, path: str | Location, problem: str, remedy: str = "fetch it again") -> None:
        super().__init__(path, problem, remedy)


class OutputExists(FileError):
    """The output exists and replacing it was not allowed."""

    def __init__(self, path: str | Location, remedy: str = "") -> None:
        ways: str | Phrase = remedy or Phrase("use ", Argument("force", True), " to replace it")
        super().__init__(path, "exists already, nothing was written", ways)


class NoRoom(FileError):
    """A new index is longer than the old one in whose place it should go; ``why`` may say what makes it long."""

    def __init__(self, path: str | Location, needed: int, room: int, why: str = "") -> None:
        problem = f"its new index needs {needed:,} bytes, {needed - room:,} more than the {room:,} that are there"
        super().__init__(path, f"{problem} ({why})" if why else problem, NEW_FILE)
        self.needed = needed
        self.room = room


class SelectionError(CheckpointError):
    """Several dicts of tensors could be meant, or the one asked for is not there.

    ``candidates`` are those that can be chosen, as a message offers them; without them, ``remedy`` says what to do.
    """

    then = ": "

    def __init__(self, path: str | Location, problem: str, candidates: Sequence[str] = (), *, remedy: str = "") -> None:
        super().__init__(problem, remedy=remedy)
        self.path: Location = Path(path) if isinstance(path, str) else path
        self.candidates = tuple(candidates)
        if self.candidates:
            self.remedy = Phrase("choose one of ", joined(self.candidates))
        self._spelled = str(path)

    @property
    def problem(self) -> str:
        """What is open."""
        return self.problems[0]

    @property
    def subject(self) -> str:
        """The path as it was given."""
        return self._spelled


class EditError(CheckpointError):
    """An edit that cannot be done as asked; every problem is named at once."""

    def __init__(self, problems: str | Sequence[str], *, remedy: str = "") -> None:
        super().__init__(*([problems] if isinstance(problems, str) else problems), remedy=remedy)


class KeyCollision(EditError):
    """Two or more keys would land on one name, so a tensor would be lost."""

    most = SHOWN
    more = "more collisions"

    def __init__(self, collisions: Mapping[str, Sequence[str]], *, remedy: str = "") -> None:
        self.collisions = {new: tuple(olds) for new, olds in collisions.items()}
        super().__init__([f"{listed(olds)} all become {new!r}" for new, olds in self.collisions.items()], remedy=remedy)


class NothingMatched(EditError):
    """Patterns or rules that no key answers to; ``hints`` say of each what would match."""

    def __init__(
        self,
        patterns: Sequence[str],
        *,
        what: str = "pattern",
        examples: Iterable[str] = (),
        hints: Mapping[str, str] | None = None,
        remedy: str = "",
    ) -> None:
        self.patterns = tuple(patterns)
        self.hints = dict(hints or {})
        keys = list(examples)
        there = f" (the keys are {listed(keys, 3)})" if keys else ""
        hinted = {pattern: f": {hint}" for pattern, hint in self.hints.items()}
        super().__init__(
            [f"{what} {pattern!r} matches no key{hinted.get(pattern, there)}" for pattern in self.patterns],
            remedy=remedy,
        )


class FrozenChanged(CheckpointError):
    """Parameters or buffers of a model that are frozen and have other values than before."""

    def __init__(self, keys: Sequence[str], why: str = "", *, remedy: str = "") -> None:
        self.keys = tuple(keys)
        super().__init__(f"{listed(keys)} changed though frozen" + (f"; {why}" if why else ""), remedy=remedy)


class RankFailed(CheckpointError):
    """One process of several that write an output together failed; ``told_by`` is the rank that is to print it."""

    def __init__(self, rank: int, shard: str, problem: str, *, told_by: int | None = None, remedy: str = "") -> None:
        super().__init__(problem, remedy=remedy)
        self.rank = rank
        self.shard = shard
        self.told_by = rank if told_by is None else told_by

    @property
    def problem(self) -> str:
        """Why it could not go on."""
        return self.problems[0]

    @property
    def subject(self) -> str:
        """The process, and what it was writing."""
        return f"rank {self.rank}{f' ({self.shard})' if self.shard else ''}"


class RecipeError(CheckpointError):
    """A recipe that cannot be read; problems carry their line numbers, and none is left out."""

    def __init__(self, path: str | Location, problems: Sequence[str], *, remedy: str = "") -> None:
        super().__init__(*problems, remedy=remedy)
        self.path: Location = Path(path) if isinstance(path, str) else path
        self.most = len(self.problems)
        self._spelled = str(path)

    @property
    def subject(self) -> str:
        """The path as it was given."""
        return self._spelled


class TargetError(CheckpointError):
    """A target model that cannot be found or built."""

    def __init__(self, target: str, problem: str, *, remedy: str = "") -> None:
        super().__init__(problem, remedy=remedy)
        self.target = target

    @property
    def problem(self) -> str:
        """What is wrong with it."""
        return self.problems[0]

    @property
    def subject(self) -> str:
        """The target as it was given."""
        return self.target
