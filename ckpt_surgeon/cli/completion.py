"""Completion of values in a shell: keys of the file, dtypes, paths of state_dicts.

Click completes commands, options, choices and names of files by itself, where bash, zsh or fish asks for it
(``_CKPT_COMPLETE``).  What is said here of a parameter is asked only then, so it costs a command nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import click
from click.shell_completion import CompletionItem

from ..files.paths import FilePath, file_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..reading.candidates import Candidate

FILES = ("in_path", "path", "paths", "checkpoint", "before", "inputs")  # parameters with a file whose keys are asked
KEYS = ("patterns", "only", "except", "sources", "source", "layers", "norms", "frozen", "what", "allow_missing")
PREFIXES = ("prefix", "strip")  # options whose value is the beginning of a key
AT_MOST = 2000  # keys that a shell is given: more than anyone reads, few enough to be fast

Find = Callable[[FilePath, str | None], Iterable[str]]


class Completed(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """The type of a parameter, with values that a file, or a table, offers to a shell."""

    def __init__(
        self,
        wrapped: click.ParamType,  # type: ignore[type-arg,unused-ignore]
        offered: Callable[[click.Context], Iterable[str]],
    ) -> None:
        self.name = wrapped.name
        self.wrapped = wrapped
        self.offered = offered

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:
        return self.wrapped.convert(value, param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        begun, comma, last = incomplete.rpartition(",") if param.metavar == "KEY,KEY" else ("", "", incomplete)
        try:
            values = [value for value in self.offered(ctx) if value.startswith(last)]
        except Exception:  # a shell that completes has no place for an error
            return []
        return [CompletionItem(begun + comma + value) for value in values[:AT_MOST]]


class CompletedTarget(Completed):
    """The type of a TARGET: a file, or a model of a library by its short spelling."""

    def __init__(self, wrapped: click.ParamType) -> None:  # type: ignore[type-arg,unused-ignore]
        super().__init__(wrapped, lambda ctx: ())

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        library, colon, begun = incomplete.partition(":")
        try:
            values = _models(library, begun) if colon else [one for one in _SHORT if one.startswith(incomplete)]
        except Exception:
            return []
        files = [] if colon else [CompletionItem(incomplete, type="file")]
        return [*map(CompletionItem, values[:AT_MOST]), *files]


_SHORT = ("hf:", "timm:", "torchvision:")


def _models(library: str, begun: str) -> list[str]:
    """Short spellings of models that go on from here: names that a library has, or folders with a config.json."""
    from ..models.hf_folder import folders
    from ..models.short_spellings import names_of

    if library == "hf":
        return [f"hf:{path}" for path in folders(begun)]
    if f"{library}:" not in _SHORT:
        return []
    return [f"{library}:{name}" for name in names_of(library) if name.startswith(begun)]


def complete_values(command: click.Command) -> click.Command:
    """Let the parameters of a command complete their values, each by what its name says that it takes."""
    for param in command.params:
        if param.name == "target" and isinstance(param, click.Argument):
            param.type = CompletedTarget(param.type)
            continue
        find = _find(param.name or "")
        if find is not None and not isinstance(param.type, Completed):
            param.type = Completed(param.type, find)
    return command


def parsable(command: click.Command, words: list[str]) -> list[str]:
    """The words of a command without an option at their end whose value is asked for: click parses no further there."""
    waiting = {name for one in command.params if isinstance(one, click.Option) and not one.is_flag for name in one.opts}
    return words[:-1] if words and words[-1] in waiting else words


def _find(name: str) -> Callable[[click.Context], Iterable[str]] | None:
    """What offers values for a parameter of this name."""
    if name == "dtype":
        return lambda ctx: _dtypes()
    table: dict[tuple[str, ...], Find] = {
        KEYS: _keys,
        PREFIXES: _prefixes,
        ("select", "target_select"): lambda path, select: _paths(path),
        ("pairs", "values"): lambda path, select: (f"{key}=" for key in _keys(path, select)),
    }
    for names, find in table.items():
        if name in names:
            return lambda ctx, find=find: find(_file(ctx), ctx.params.get("select"))  # type: ignore[misc]
    return None


def _file(ctx: click.Context) -> FilePath:
    """The first file that the words before name."""
    for name in FILES:
        found = ctx.params.get(name)
        if isinstance(found, (tuple, list)):
            found = found[0] if found else None
        if found is not None:
            return file_path(str(found))
    raise LookupError("no file yet")


def _dtypes() -> list[str]:
    from ..tensors.dtypes import ALIASES, BY_NAME

    return sorted({*ALIASES, *BY_NAME})


def _keys(path: FilePath, select: str | None) -> list[str]:
    """The keys of a file's state_dict; of several state_dicts those of each."""
    return [key for one in _candidates(path) if not select or one.path == select for key in one.tensors]


def _prefixes(path: FilePath, select: str | None) -> list[str]:
    """The beginnings of keys, up to each dot."""
    parts = [key.split(".") for key in _keys(path, select)]
    found = {".".join(part[:count]) + ".": None for part in parts for count in range(1, len(part))}
    return list(found)


def _paths(path: FilePath) -> list[str]:
    """The paths of the state_dicts in a file, as ``--select`` takes them."""
    return [one.path for one in _candidates(path) if one.path]


def _candidates(path: FilePath) -> list[Candidate]:
    """The state_dicts in a file, of which only the index is read; an interrupted renaming is left as it is."""
    from ..formats.registry import read_named
    from ..reading.candidates import candidates

    return candidates(read_named(path))
