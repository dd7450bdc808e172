"""Recipes: an ordered list of edits as a value, and as a TOML file that is reviewed, kept and run again.

    [[edit]]
    do = 'strip-prefix'
    prefix = 'module.'

    [[edit]]
    do = 'rename'
    regex = true
    pairs = [['layers\\.(?P<n>\\d+)\\.(.*)', 'blocks.{n+1}.\\2']]

A step's name and arguments are those of the edit (:data:`ckpt_surgeon.edits.change.EDITS`), dashes for underscores
allowed.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from ..errors import EditError, FileError, NothingMatched, RecipeError, listed
from ..files.paths import AnyPath, FilePath, file_path
from ..tensors.checkpoint import Checkpoint
from ..text import Shown
from .arguments import PAIRS, Argument, problem_of, recipe_name
from .change import EDITS, Change, as_state_dict
from .rename import parse_pairs

# In this order, in which edits are listed.
# isort: off
from . import keys, values, combine, fold, quantised, resize
# isort: on

StateDict = TypeVar("StateDict", bound=Mapping)  # type: ignore[type-arg]

REGISTERED = (keys, values, combine, fold, quantised, resize)  # modules whose edits a recipe can name


@dataclass(frozen=True, slots=True, repr=False)
class Step(Shown):
    """One edit and its arguments.  Build it with :func:`step`, which checks both."""

    name: str
    arguments: Mapping[str, object]

    def plan(self, state_dict: StateDict) -> Change[StateDict]:
        """What this step does to a state_dict."""
        edit = EDITS[self.name]
        given = {name: self.arguments[one.name] for name, one in edit.arguments.items() if one.name in self.arguments}
        return edit.plan(state_dict, **given)

    @property
    def computes(self) -> bool:
        """Whether it makes new numbers of a parameter's own, which no optimizer's state fits."""
        return EDITS[self.name].declaration.computes

    def for_moments(self, fill: str) -> Step:
        """The step as it is done to an optimizer's moments: new elements get "zero", or the "mean" of the others."""
        name = EDITS[self.name].declaration.fills
        if not name:
            return self
        return Step(self.name, {**self.arguments, name: 0.0 if name == "value" else fill})


def step(name: str, /, **arguments: object) -> Step:
    """A checked step.  Raises EditError for an unknown name or argument, or one of another type.

    >>> step("strip_prefix", prefix="module.")
    Step(name='strip_prefix', arguments={'prefix': 'module.'})
    """
    normal = name.replace("-", "_")
    problems = list(_step_problems(normal, {key.replace("-", "_"): value for key, value in arguments.items()}))
    if problems:
        raise EditError([problem for _, problem in problems])
    return _checked(normal, arguments)


def _checked(name: str, arguments: Mapping[str, object]) -> Step:
    """A step of arguments that fit, each as a file holds it."""
    expected = arguments_of(name)
    given = {recipe_name(key.replace("-", "_")): value for key, value in arguments.items()}
    return Step(name, {key: expected[key].plain(value) for key, value in given.items()})


def arguments_of(name: str) -> dict[str, Argument]:
    """The arguments of an edit, by the names that recipes use."""
    return {argument.name: argument for argument in EDITS[name].arguments.values()}


def _step_problems(name: str, arguments: Mapping[str, object]) -> Iterable[tuple[str, str]]:
    """Pairs of the argument (or "") and what is wrong with it."""
    if name not in EDITS:
        known = ", ".join(edit.name for edit in EDITS.values())
        yield "do", f"no edit is called {name.replace('_', '-')!r}; known are {known}"
        return
    expected = arguments_of(name)
    found = list(_argument_problems(name, arguments, expected))
    if not found and "allow_unmatched" in expected:
        arguments = {**arguments, "allow_unmatched": True}
    yield from found or _wrong_whatever_the_keys(_checked(name, arguments))


def _wrong_whatever_the_keys(one: Step) -> Iterable[tuple[str, str]]:
    """What an edit says of its arguments (a regular expression, a dtype) before it has seen a key."""
    try:
        one.plan(Checkpoint({}))
    except NothingMatched:
        return
    except EditError as error:
        yield from (("", problem) for problem in error.problems)


def _argument_problems(
    name: str, arguments: Mapping[str, object], expected: Mapping[str, Argument]
) -> Iterable[tuple[str, str]]:
    edit = EDITS[name].name
    for given, value in arguments.items():
        argument = expected.get(recipe_name(given))
        if argument is None:
            yield given, f"{edit} has no argument {given!r}; it takes {', '.join(expected)}"
            continue
        try:
            argument.plain(value)
        except ValueError as error:
            yield given, problem_of(edit, argument.name, error)
    there = {recipe_name(given) for given in arguments}
    for argument in expected.values():
        if argument.is_required and argument.name not in there:
            yield "", f"{edit} needs the argument {argument.name!r}"


@dataclass(frozen=True, slots=True, repr=False)
class Recipe(Shown):
    """An ordered list of edits.

    >>> recipe = Recipe((step("strip_prefix"), step("rename", pairs=["gamma=weight"])))
    >>> recipe.apply({"module.norm.gamma": 1})
    {'norm.weight': 1}
    >>> Recipe.loads(recipe.dumps()) == recipe
    True
    """

    steps: tuple[Step, ...] = ()

    def plan(self, state_dict: StateDict) -> Change[StateDict]:
        """What the recipe does to a Checkpoint or a state_dict; the origins are keys of ``state_dict``.

        Raises EditError (or one of its kind) that begins with the number of the step that cannot be done.
        """
        state_dict = as_state_dict(state_dict)
        result = state_dict
        origins: Mapping[str, tuple[str, ...]] = {key: (key,) for key in state_dict}
        notes: list[str] = []
        for number, one in enumerate(self.steps, 1):
            try:
                change = one.plan(result)
            except EditError as error:
                if len(self.steps) > 1:
                    error.inside(f"step {number} ({one.name.replace('_', '-')})")
                raise
            result = change.result
            origins = {
                new: tuple(dict.fromkeys(first for old in olds for first in origins[old]))
                for new, olds in change.origins.items()
            }
            notes += change.notes
        return Change(state_dict, result, origins, tuple(notes))

    @property
    def computes(self) -> bool:
        """Whether a step makes new numbers of a parameter's own, which no optimizer's state fits."""
        return any(one.computes for one in self.steps)

    def for_moments(self, fill: str) -> Recipe:
        """The recipe as it is done to an optimizer's moments: see :meth:`Step.for_moments`."""
        return Recipe(tuple(one.for_moments(fill) for one in self.steps))

    def apply(self, state_dict: StateDict) -> StateDict:
        """The edited state_dict."""
        return self.plan(state_dict).result

    @property
    def digest(self) -> str:
        """SHA-256 of the steps, whatever their spelling in a file."""
        steps = [[one.name, _normal(one)] for one in self.steps]
        return hashlib.sha256(json.dumps(steps, sort_keys=True).encode()).hexdigest()

    def invert(self, keys: Iterable[str] | None = None) -> Recipe:
        """The recipe that undoes this one, where every step only renames.

        Without ``keys``, the steps that can be undone whatever the keys are add-prefix and renames of whole keys
        (``^old$``); with the keys that the recipe will be applied to, every renaming.  Raises EditError naming the
        step that cannot be undone, or keys that no rename can name.

        >>> Recipe((step("add_prefix", prefix="model."),)).invert().apply({"model.fc.bias": 1})
        {'fc.bias': 1}
        """
        if keys is None:
            undone = [_undone(number, one) for number, one in enumerate(self.steps, 1)]
            return Recipe(tuple(reversed(undone)))
        state: Mapping[str, str] = {key: key for key in keys}
        for number, one in enumerate(self.steps, 1):
            if EDITS[one.name].declaration.changes_values:
                raise _cannot_undo(number, one, "it changes values")
            change = one.plan(state)
            if change.dropped:
                raise _cannot_undo(number, one, f"it drops keys ({change.dropped[0]!r} …)")
            state = change.result
        pairs = [[f"^{new}$", old] for new, old in state.items() if new != old]
        if odd := [key for new, old in state.items() if new != old for key in (new, old) if not _is_nameable(key)]:
            raise EditError([f"{listed(odd)} cannot be named in a rename"])
        return Recipe((step("rename", pairs=pairs),)) if pairs else Recipe()

    def dumps(self) -> str:
        """The recipe as TOML."""
        return "\n".join(_table(one) for one in self.steps)

    def save(self, path: AnyPath) -> None:
        """Write the recipe to a TOML file."""
        file_path(path).write_text(self.dumps(), "utf-8")

    @classmethod
    def loads(cls, text: str, *, path: str | FilePath = "recipe") -> Recipe:
        """Read a recipe from TOML.  Raises RecipeError with all problems and their line numbers."""
        try:
            parsed = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(path, [with_line(str(error), text)]) from error
        problems = [f"line {line_of(text, 0, name)}: unknown entry {name!r}" for name in parsed if name != "edit"]
        tables = parsed.get("edit", [])
        if not isinstance(tables, list) or not all(isinstance(one, dict) for one in tables):
            raise RecipeError(path, [*problems, f"line {line_of(text, 0, 'edit')}: edits are [[edit]] tables"])
        steps = []
        for number, one in enumerate(tables, 1):
            name = one.get("do")
            arguments = {key.replace("-", "_"): value for key, value in one.items() if key != "do"}
            if not isinstance(name, str):
                problems.append(f"line {line_of(text, number)}: an edit needs do = '…'")
                continue
            found = list(_step_problems(name.replace("-", "_"), arguments))
            problems += [f"line {line_of(text, number, argument)}: {problem}" for argument, problem in found]
            if not found:
                steps.append(step(name, **arguments))
        if problems:
            raise RecipeError(path, problems)
        return cls(tuple(steps))

    @classmethod
    def load(cls, path: AnyPath) -> Recipe:
        """Read a recipe from a file.  Raises FileError, RecipeError."""
        where = file_path(path)
        try:
            text = where.read_text("utf-8")
        except OSError as error:
            raise FileError(where, f"cannot be opened ({error.strerror})", "check the name") from error
        except UnicodeDecodeError as error:
            raise RecipeError(where, ["is not UTF-8 text"]) from error
        return cls.loads(text, path=where)


def _cannot_undo(number: int, one: Step, why: str) -> EditError:
    return EditError([f"step {number} ({one.name.replace('_', '-')}) cannot be undone: {why}"])


def _undone(number: int, one: Step) -> Step:
    if one.name == "add_prefix":
        return step("select", prefix=one.arguments["prefix"])
    if one.name == "rename" and set(_normal(one)) == {"pairs"}:
        pairs = one.arguments["pairs"]
        assert isinstance(pairs, list)
        olds_news = parse_pairs(pairs)
        if all(old[:1] == "^" and old[-1:] == "$" and _is_nameable(old[1:-1], new) for old, new in olds_news):
            return step("rename", pairs=[[f"^{new}$", old[1:-1]] for old, new in olds_news])
    raise _cannot_undo(number, one, "whether it can depends on the keys; give them")


def _is_nameable(*keys: str) -> bool:
    """Whether path patterns can name these keys as they are, without braces and without dots that they strip."""
    return all(key.strip(".") == key != "" and not {"{", "}"} & set(key) for key in keys)


def _normal(one: Step) -> dict[str, object]:
    """The arguments in one spelling, without those that are as they are by default."""
    regex = one.arguments.get("regex") is True

    def spelled(argument: Argument, value: object) -> object:
        plain = argument.plain(value)
        if argument.kind is PAIRS:
            return [list(pair) for pair in parse_pairs(plain, regex=regex)]  # type: ignore[arg-type]
        return argument.kind.normal(plain)

    expected = arguments_of(one.name)
    return {
        name: spelled(expected[name], value)
        for name, value in one.arguments.items()
        if expected[name].is_required
        or spelled(expected[name], value) != spelled(expected[name], expected[name].default)
    }


def _table(one: Step) -> str:
    lines = ["[[edit]]", f"do = {_toml(one.name.replace('_', '-'))}"]
    lines += [f"{name} = {_toml(value)}" for name, value in one.arguments.items()]
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    """A value as TOML; strings literal where they can be, so that regular expressions stay readable."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        if "'" not in value and value.isprintable():
            return f"'{value}'"
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        if len(value) > 1 and any(isinstance(item, list) for item in value):
            return "[\n" + "".join(f"    {_toml(item)},\n" for item in value) + "]"
        return f"[{', '.join(map(_toml, value))}]"
    return repr(value)


def line_of(text: str, number: int, argument: str = "", *, table: str = "edit") -> int:
    """The line of the ``number``-th ``[[edit]]`` (or other) table, or of one of its entries; 0 is what is above them.

    >>> line_of("[[edit]]\\ndo = 'fold'", 1, "do")
    2
    """
    wanted = re.compile(rf"\s*(?:\[+\s*)?['\"]?{re.escape(argument)}['\"]?\s*[=\].]") if argument else None
    seen, header = 0, 1
    for index, line in enumerate(text.splitlines(), 1):
        if re.match(rf"\s*\[\[\s*{table}\s*\]\]", line):
            seen += 1
            header = index if seen == number else header
        elif wanted and seen == number and wanted.match(line.replace("-", "_")):
            return index
    return header


def with_line(message: str, text: str) -> str:
    """tomllib's message with the line number in front, as all others have it.

    >>> with_line("Invalid value (at line 3, column 1)", "")
    'line 3: Invalid value'
    """
    found = re.search(r"\(at (?:line (\d+), column \d+|end of document)\)", message)
    if found is None:
        return message
    return f"line {found[1] or max(len(text.splitlines()), 1)}: {message[: found.start()].strip()}"
