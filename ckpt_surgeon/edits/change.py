"""What an edit is: a planning function made callable, and the change that it plans."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import translate
from functools import cached_property, update_wrapper
from itertools import takewhile
from typing import (
    Annotated,
    Concatenate,
    Generic,
    Literal,
    ParamSpec,
    Protocol,
    TypeVar,
    cast,
    runtime_checkable,
)

from .. import hooks
from ..errors import Argument, EditError, KeyCollision, NothingMatched, Phrase
from ..key_patterns import pattern_instead
from ..tensors.checkpoint import Checkpoint, Versions, versions_of
from ..text import Shown
from . import arguments as declarations
from .arguments import Patterns as Patterns
from .companions import checked
from .inputs import parted, qualified
from .table import COMBINE, KEYS, VALUES, Edits

StateDict = TypeVar("StateDict", bound=Mapping)  # type: ignore[type-arg]
Arguments = ParamSpec("Arguments")

# Arguments that several edits have.
AllowUnmatched = Annotated[bool, "A pattern or prefix that no key answers to is no error."]
OnCollision = Annotated[Literal["error", "first", "last"], "Which key stays when two become one; error refuses."]


@dataclass(frozen=True, slots=True, repr=False)
class Change(Shown, Generic[StateDict]):
    """What an edit does: the result, the old keys behind each new one, and what is worth saying.

    ``origins`` maps each new key to the old keys that it is made of.  Keys of other checkpoints than the first are in
    ``before`` and ``origins`` as ``NAME::KEY``; ``inputs`` are their names.
    """

    before: StateDict
    result: StateDict
    origins: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()
    settled: frozenset[str] = frozenset()  # old keys whose companions the edit itself has seen to
    inputs: tuple[str, ...] = ()

    @property
    def dropped(self) -> tuple[str, ...]:
        """Old keys of the first checkpoint that are in no new one."""
        used = {old for olds in self.origins.values() for old in olds}
        return tuple(old for old in self.before if old not in used and self.is_own(old))

    def is_own(self, key: str) -> bool:
        """Whether an old key is of the first checkpoint."""
        return not parted(key, self.inputs)[0]

    def of_first(self, first: StateDict) -> Change[StateDict]:
        """The same change as one of the first checkpoint: what comes from others comes from nowhere."""
        if not self.inputs:
            return self
        origins = {new: tuple(filter(self.is_own, olds)) for new, olds in self.origins.items()}
        return replace(self, before=first, origins=origins, inputs=())

    @property
    def edited(self) -> int:
        """How many tensors are not the ones that they were made of."""
        return sum(len(olds) != 1 or self.result[new] is not self.before[olds[0]] for new, olds in self.origins.items())

    @property
    def renamed(self) -> int:
        """How many keys of the first checkpoint have another name."""
        return sum(len(olds) == 1 and olds != (new,) and self.is_own(olds[0]) for new, olds in self.origins.items())

    @property
    def taken(self) -> int:
        """How many keys are tensors of other checkpoints as they are."""
        return sum(
            len(olds) == 1 and not self.is_own(olds[0]) and self.result[new] is self.before[olds[0]]
            for new, olds in self.origins.items()
        )


def relabelled(change: Change[StateDict], names: Mapping[str, str]) -> Change[StateDict]:
    """The same change with other names for other checkpoints, ``names`` old to new."""
    if all(old == new for old, new in names.items()):
        return change

    def new_key(key: str) -> str:
        name, rest = parted(key, names)
        return qualified(names[name], rest) if name else key

    before = {new_key(key): tensor for key, tensor in change.before.items()}
    return replace(
        change,
        before=rebuilt(change.before, before, None),
        origins={new: tuple(map(new_key, olds)) for new, olds in change.origins.items()},
        inputs=tuple(names.get(name, name) for name in change.inputs),
    )


def as_state_dict(source: StateDict) -> StateDict:
    """What an edit is given, where that is a state_dict; else what it names: a path is opened, a model asked."""
    return source if isinstance(source, Mapping) else cast(StateDict, hooks.answer("state_dict of")(source))


@dataclass(frozen=True, slots=True)
class Inline:
    """How ``ckpt edit`` takes an edit and its main arguments as one option.

    ``form`` is the option's value with the arguments in braces (``{patterns}={shape}``), "" for a flag; the other
    arguments follow it as ``NAME=VALUE``.  ``option`` is the option's name where that is not the edit's, ``fixed`` are
    arguments that it sets.
    """

    form: str
    option: str = ""
    fixed: tuple[tuple[str, object], ...] = ()
    help: str = ""


@dataclass(frozen=True, slots=True)
class Declaration:
    """What an edit says of itself beside its arguments: a recipe, ``ckpt NAME`` and ``ckpt edit`` are made from it."""

    short_help: str  # what `ckpt --help` says
    examples: tuple[str, ...]  # what a new user can paste, after `ckpt NAME `
    only_renames: bool = False  # every tensor stays, so that it can be done in place
    changes_values: bool = False
    inline: tuple[Inline, ...] = ()
    computes: bool = False  # makes new numbers of a parameter's own, which no optimizer's state fits
    fills: str = ""  # the argument that says what new elements get; an optimizer's moments get others


@runtime_checkable
class Editable(Protocol):
    """More than a state_dict that an edit can be called on: a whole training checkpoint, whose optimizers follow."""

    def edited_by(self, edit: Edit[...], args: tuple[object, ...], kwargs: Mapping[str, object]) -> object: ...


Editee = TypeVar("Editee", bound=Mapping | Editable)  # type: ignore[type-arg]


class Edit(Generic[Arguments]):
    """A function that edits a state_dict; ``plan`` takes the same arguments and returns the :class:`Change`.

    ``declaration`` and ``arguments`` are what it says of itself.  What it does to tensors that belong together is
    checked in ``plan``: see :mod:`.companions`.
    """

    def __init__(
        self, function: Callable[Concatenate[StateDict, Arguments], Change[StateDict]], declaration: Declaration
    ) -> None:
        self._function = function
        self.declaration = declaration
        self.__name__ = function.__name__
        update_wrapper(cast(Callable[..., object], self), function)

    def __call__(self, state_dict: Editee, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Editee:
        if isinstance(state_dict, Editable):
            return cast(Editee, state_dict.edited_by(self, args, kwargs))
        return cast(Editee, self.plan(state_dict, *args, **kwargs).result)

    def __get__(self, instance: object, owner: type | None = None) -> Edit[Arguments]:
        return self  # an edit is a routine, and help() shows it as one

    def plan(self, state_dict: StateDict, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Change[StateDict]:
        """What the edit would do, with the same arguments.  Raises EditError for an argument of another type."""
        function = cast(Callable[..., Change[StateDict]], self._function)
        try:
            plain = self._plain(args, kwargs)
            others = plain.pop(self._others, ())
            change = function(as_state_dict(state_dict), *cast(Iterable[StateDict], others), **plain)
        except NothingMatched as error:
            if not error.remedy and "allow_unmatched" in self.arguments:
                error.remedy = Phrase(Argument("allow_unmatched", True), " lets it pass")
            raise
        parted = checked(change.before, change.result, change.origins, change.settled)
        return replace(change, notes=(*change.notes, *parted)) if parted else change

    @property
    def name(self) -> str:
        """Its name in recipes and on the command line, with dashes."""
        return self.__name__.removesuffix("_").replace("_", "-")

    @property
    def group(self) -> str:
        """The group of ``ckpt --help`` that it stands in, which follows from what it declares."""
        if self.inputs:
            return COMBINE
        return VALUES if self.declaration.changes_values else KEYS

    @cached_property
    def arguments(self) -> Mapping[str, declarations.Argument]:
        """What it takes beside the state_dict, by the names of Python's parameters."""
        return declarations.declared(inspect.unwrap(self._function))

    @cached_property
    def inputs(self) -> Mapping[str, declarations.Argument]:
        """Those of its arguments that stand for other checkpoints."""
        return {name: argument for name, argument in self.arguments.items() if argument.is_input}

    @cached_property
    def _others(self) -> str:
        """The name of the argument that takes any number of other checkpoints, or ""."""
        return next((name for name, argument in self.inputs.items() if argument.kind is declarations.INPUTS), "")

    @cached_property
    def __signature__(self) -> inspect.Signature:
        """What calling it takes and returns."""
        first, *others = inspect.signature(inspect.unwrap(self._function)).parameters.values()
        state_dict = first.replace(kind=inspect.Parameter.POSITIONAL_ONLY, annotation=StateDict)
        typed = [other.replace(annotation=self.arguments[other.name].hint) for other in others]
        return inspect.Signature([state_dict, *typed], return_annotation=StateDict)

    def _plain(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> dict[str, object]:
        """The arguments by name, each in the one type that the edit is written for."""
        bound = self.__signature__.bind({}, *args, **kwargs).arguments
        given = list(bound.items())[1:]
        problems: list[str] = []
        plain: dict[str, object] = {}
        for name, value in given:
            argument = self.arguments[name]
            if value is argument.default:
                continue
            try:
                if argument.kind is declarations.INPUTS:
                    plain[name] = tuple(map(as_state_dict, cast("Iterable[Mapping[str, object]]", value)))
                elif argument.kind is declarations.INPUT:
                    plain[name] = as_state_dict(cast("Mapping[str, object]", value))
                else:
                    plain[name] = argument.plain(value)
            except ValueError as error:
                problems.append(declarations.problem_of(self.name, argument.name, error))
        if problems:
            raise EditError(problems)
        return plain


EDITS: Edits[Edit[...]] = Edits()  # every edit by its name, as recipes and the command line find them


def edit(
    short_help: str,
    *examples: str,
    only_renames: bool = False,
    changes_values: bool = False,
    inline: Iterable[Inline] = (),
    computes: bool = False,
    fills: str = "",
) -> Callable[[Callable[Concatenate[StateDict, Arguments], Change[StateDict]]], Edit[Arguments]]:
    """Make a planning function an :class:`Edit` and give it a place in :data:`EDITS`.

    Its parameters after the state_dict declare its arguments: ``name: Annotated[TYPE, "Help."] = DEFAULT``, with the
    types of :mod:`ckpt_surgeon.edits.arguments`.  ``examples`` are command lines, after ``ckpt NAME``.
    """

    def made(function: Callable[Concatenate[StateDict, Arguments], Change[StateDict]]) -> Edit[Arguments]:
        declaration = Declaration(short_help, examples, only_renames, changes_values, tuple(inline), computes, fills)
        found: Edit[Arguments] = Edit(function, declaration)
        EDITS[function.__name__.removesuffix("_")] = found
        return found

    return made


# -- what edits are made of


def listed_patterns(patterns: Patterns) -> list[str]:
    """One pattern or several, as a list."""
    return [patterns] if isinstance(patterns, str) else list(patterns)


def matching(keys: Iterable[str], patterns: Patterns, *, allow_unmatched: bool = False) -> set[str]:
    """The keys that match one of the globs.  Raises NothingMatched for each glob without a key.

    >>> sorted(matching(["fc.weight", "fc.bias", "conv.bias"], ["fc.*", "*.bias"]))
    ['conv.bias', 'fc.bias', 'fc.weight']
    """
    keys = list(keys)
    found: set[str] = set()
    unmatched = []
    for pattern in listed_patterns(patterns):
        fits = re.compile(translate(pattern)).match
        hits = [key for key in keys if fits(key)]
        found.update(hits)
        if not hits:
            unmatched.append(pattern)
    if unmatched and not allow_unmatched:
        hints = {pattern: hint for pattern in unmatched if (hint := pattern_instead(pattern, keys))}
        raise NothingMatched(unmatched, examples=keys, hints=hints)
    return found


def rekeyed(
    state_dict: StateDict,
    new_names: Mapping[str, str],
    *,
    on_collision: str = "error",
    notes: Iterable[str] = (),
) -> Change[StateDict]:
    """The change that gives each old key its new name and leaves out those without one.

    Raises KeyCollision naming all keys that would become one, unless ``on_collision`` says which stays.
    """
    if on_collision not in ("error", "first", "last"):
        raise EditError(Phrase(Argument("on_collision"), f" is error, first or last, not {on_collision!r}"))
    origins: dict[str, list[str]] = {}
    for old, new in new_names.items():
        origins.setdefault(new, []).append(old)
    collisions = {new: olds for new, olds in origins.items() if len(olds) > 1}
    if collisions and on_collision == "error":
        remedy = Phrase("choose with ", Argument("on_collision", "first"), " or last")
        raise KeyCollision(collisions, remedy=remedy)
    kept = {new: olds[0 if on_collision == "first" else -1] for new, olds in origins.items()}
    said = [*notes, *([f"{len(collisions):,} collisions: the {on_collision} key stays"] if collisions else [])]
    tensors = {new: state_dict[old] for new, old in kept.items()}
    versions = versions_of(state_dict)
    moved = None if versions is None else rename_versions(versions, {old: new for new, old in kept.items()})
    result = rebuilt(state_dict, tensors, moved)
    return Change(state_dict, result, {new: (old,) for new, old in kept.items()}, tuple(said))


def rebuilt(like: StateDict, tensors: Mapping[str, object], versions: Versions | None) -> StateDict:
    """A mapping of the same kind as ``like`` with these tensors and versions."""
    if isinstance(like, Checkpoint):
        return like.with_tensors(tensors, versions)  # type: ignore[arg-type,return-value]
    made = type(like)(tensors)  # type: ignore[call-arg]
    if versions is not None and hasattr(like, "_metadata"):
        made._metadata = type(like._metadata)(versions)  # type: ignore[attr-defined]
    return made


def rename_versions(versions: Versions, renamed: Mapping[str, str]) -> Versions:
    """Rename module paths as their keys were renamed.

    ``m`` becomes ``n`` when keys ``m.x`` became ``n.x``; a module without keys of its own follows its nearest
    parent that has a new name, and goes where none has.  Where a wrapper's path and the wrapped module's become
    one, the wrapped module's version stays.  The root stays where no key tells otherwise.
    """
    moved: dict[str, str] = {}
    for old, new in renamed.items():
        for path, target in _moved_paths(old, new):
            if moved.setdefault(path, target) == path != target:
                moved[path] = target
    kept: dict[str, Mapping[str, object]] = {}
    for path, version in versions.items():
        new_path = _new_path(path, moved)
        if new_path is not None:
            kept[new_path] = version
    if "" in versions and "" not in moved and "" not in kept:
        return {"": versions[""], **kept}
    return kept


def _moved_paths(old: str, new: str) -> Iterator[tuple[str, str]]:
    """Pairs of module paths that a renamed key tells: as long as the components behind them are the same.

    What both names begin with stays where it is.  The leaf itself may be renamed (gamma to weight): it names no
    module.
    """
    olds, news = old.split(".")[:-1], new.split(".")[:-1]
    shared = list(takewhile(lambda parts: parts[0] == parts[1], zip(olds, news, strict=False)))
    if old != new and shared:
        for depth in range(len(shared) + 1):
            yield ".".join(olds[:depth]), ".".join(olds[:depth])
    yield ".".join(olds), ".".join(news)
    while olds and news and olds[-1] == news[-1]:
        olds.pop()
        news.pop()
        yield ".".join(olds), ".".join(news)


def _new_path(path: str, moved: Mapping[str, str]) -> str | None:
    if path in moved:
        return moved[path]
    parent, rest = path, ""
    while parent:
        parent, _, last = parent.rpartition(".")
        rest = f".{last}{rest}"
        if parent in moved:
            target = moved[parent] + rest
            return target.removeprefix(".")
    return None
