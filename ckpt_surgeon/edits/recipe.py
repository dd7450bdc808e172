"""Recipes: an ordered list of edits as a value, and as a TOML file that is reviewed, kept and run again.

    [[edit]]
    do = 'strip-prefix'
    prefix = 'module.'

    [[edit]]
    do = 'rename'
    regex = true
    pairs = [['layers\\.(?P<n>\\d+)\\.(.*)', 'blocks.{n+1}.\\2']]

A step's name and arguments are those of the edit (:data:`ckpt_surgeon.edits.change.EDITS`), dashes for underscores
allowed.  A recipe for several checkpoints names them, and its steps say which one they edit by ``NAME::`` before a
key, a prefix or a pattern:

    inputs = ['base', 'donor']

    [[edit]]
    do = 'strip-prefix'
    prefix = 'donor::module.'

    [[edit]]
    do = 'graft'
    donor = 'donor'
    take = 'fc.*'
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar, cast

from ..errors import EditError, NothingMatched, RecipeError, listed
from ..files import small
from ..files.paths import AnyPath, FilePath, file_path
from ..tensors.checkpoint import Checkpoint
from ..text import Shown
from .arguments import INPUTS, KINDS, PAIRS, PATTERNS, Argument, problem_of, recipe_name
from .change import EDITS, Change, as_state_dict, relabelled
from .inputs import mapped, parted, qualified
from .rename import parse_pairs

StateDict = TypeVar("StateDict", bound=Mapping)  # type: ignore[type-arg]


def _renamed_inputs(value: object, names: Mapping[str, str]) -> object:
    """Keys and patterns with other names for inputs."""
    if isinstance(value, str):
        name, rest = parted(value, names)
        return qualified(names[name], rest) if name else value
    return [_renamed_inputs(one, names) for one in value] if isinstance(value, list) else value


def _input(step: Step, name: str, inputs: Mapping[str, Mapping[str, object]]) -> Mapping[str, object]:
    if name not in inputs:
        there = f"there are {listed(list(inputs))}" if inputs else "there is no other checkpoint"
        raise EditError([f"{step.name.replace('_', '-')} names the input {name!r}; {there}"])
    return inputs[name]


NO_INPUTS: Mapping[str, Mapping[str, object]] = MappingProxyType({})
NAMING = (PATTERNS, PAIRS, KINDS[str], KINDS[Sequence[str]])  # kinds of arguments that may name keys


@dataclass(frozen=True, slots=True, repr=False)
class Step(Shown):
    """One edit and its arguments.  Build it with :func:`step`, which checks both."""

    name: str
    arguments: Mapping[str, object]

    def plan(self, state_dict: StateDict, inputs: Mapping[str, Mapping[str, object]] = NO_INPUTS) -> Change[StateDict]:
        """What this step does to a state_dict; ``inputs`` are other checkpoints, by the names that arguments give."""
        edit = EDITS[self.name]
        given = {name: self.arguments[one.name] for name, one in edit.arguments.items() if one.name in self.arguments}
        others: list[Mapping[str, object]] = []
        names: dict[str, str] = {}  # of inputs, by those that the edit has for them
        left = [name for name in inputs if name not in self.arguments.values()]
        for name, argument in edit.inputs.items():
            asked = given.pop(name, None)
            if argument.kind is INPUTS:
                chosen = left if asked is None else cast("list[str]", asked)
                others = [_input(self, one, inputs) for one in chosen]
                names |= {str(number): one for number, one in enumerate(chosen, 2)}
            elif asked is not None or argument.is_required:
                one = str(asked) if asked is not None else left.pop(0) if left else argument.name
                given[name], names[name] = _input(self, one, inputs), one
        theirs = {one: label for label, one in names.items()}
        for name in given.keys() - edit.inputs.keys():
            if edit.arguments[name].kind in NAMING:
                given[name] = _renamed_inputs(given[name], theirs)
        return relabelled(edit.plan(state_dict, *others, **given), names)

    def addressed(self, names: Collection[str], first: Collection[str] = ()) -> tuple[str, Step]:
        """The input whose keys the step names ("" is the first), and the step in that input's own words.

        ``first`` is what the first input is called, if it has a name.  Raises EditError for keys of two inputs.
        """
        if not names or EDITS[self.name].inputs:  # an edit of several inputs makes the first one
            return "", self
        expected = arguments_of(self.name)
        seen: set[str] = set()

        def own(value: object) -> object:
            if isinstance(value, str):
                name, rest = parted(value, [*names, *first])
                seen.update([name] if name else [])
                return rest
            return [own(one) for one in value] if isinstance(value, list) else value

        arguments = {
            name: own(value) if expected[name].kind in NAMING else value for name, value in self.arguments.items()
        }
        if len(seen) > 1:
            raise EditError(
                [f"{' and '.join(sorted(seen))} are two inputs"], remedy="a step edits one; join them first"
            )
        found = next(iter(seen), "")
        return "" if found in first else found, Step(self.name, arguments)

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
        known = ", ".join(name.replace("_", "-") for name in EDITS)
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
        named = [
            one.arguments[argument.name]
            for argument in EDITS[one.name].inputs.values()
            if argument.name in one.arguments
        ]
        names = [name for given in named for name in (given if isinstance(given, list) else [given])]
        one.plan(Checkpoint({}), dict.fromkeys(map(str, names or ["2", "3", "4"]), Checkpoint({})))
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
        if argument.is_required and not argument.is_input and argument.name not in there:
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
    inputs: tuple[str, ...] = ()  # names of the checkpoints that it takes, the first one that is edited

    def plan(self, state_dict: StateDict, *others: Mapping[str, object]) -> Change[StateDict]:
        """What the recipe does to a Checkpoint or a state_dict; the origins are keys of ``state_dict``.

        ``others`` are the further checkpoints that the recipe names, in that order; where it names none they are
        "2", "3" …  Raises EditError (or one of its kind) that begins with the number of the step that cannot be done.
        """
        names = self._names(len(others))
        states: dict[str, Mapping[str, object]] = {"": as_state_dict(state_dict)}
        states.update(zip(names, map(as_state_dict, others), strict=True))
        before = mapped(states[""], {name: states[name] for name in names}) if names else states[""]
        origins: dict[str, Mapping[str, tuple[str, ...]]] = {
            name: {key: (qualified(name, key) if name else key,) for key in state} for name, state in states.items()
        }
        notes: list[str] = []
        for number, one in enumerate(self.steps, 1):
            try:
                name, own = one.addressed(names, self.inputs[:1])
                change = own.plan(states[name], {other: states[other] for other in names if other != name})
            except EditError as error:
                if len(self.steps) > 1:
                    error.inside(f"step {number} ({one.name.replace('_', '-')})")
                raise
            states[name] = change.result
            origins[name] = {
                new: tuple(dict.fromkeys(first for old in olds for first in _traced(old, name, origins, change.inputs)))
                for new, olds in change.origins.items()
            }
            notes += change.notes
        result = cast(StateDict, states[""])
        return Change(cast(StateDict, before), result, origins[""], tuple(notes), inputs=tuple(names))

    def _names(self, count: int) -> list[str]:
        """The names of so many other checkpoints.  Raises EditError where the recipe names more or fewer."""
        if self.inputs and count != len(self.inputs) - 1:
            raise EditError(
                [f"the recipe takes {len(self.inputs)} checkpoints ({', '.join(self.inputs)}), given were {count + 1}"]
            )
        return list(self.inputs[1:]) or [str(number) for number in range(2, count + 2)]

    @property
    def computes(self) -> bool:
        """Whether a step makes new numbers of a parameter's own, which no optimizer's state fits."""
        return any(one.computes for one in self.steps)

    def for_moments(self, fill: str) -> Recipe:
        """The recipe as it is done to an optimizer's moments: see :meth:`Step.for_moments`."""
        return Recipe(tuple(one.for_moments(fill) for one in self.steps), self.inputs)

    def apply(self, state_dict: StateDict, *others: Mapping[str, object]) -> StateDict:
        """The edited state_dict."""
        return self.plan(state_dict, *others).result

    @property
    def digest(self) -> str:
        """SHA-256 of the steps, whatever their spelling in a file."""
        steps: list[object] = [[one.name, _normal(one)] for one in self.steps]
        named = [{"inputs": self.inputs}] if self.inputs else []
        return hashlib.sha256(json.dumps([*named, *steps], sort_keys=True).encode()).hexdigest()

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
        named = f"inputs = {toml_value(list(self.inputs))}\n\n" if self.inputs else ""
        return named + "\n".join(_table(one) for one in self.steps)

    def save(self, path: AnyPath) -> None:
        """Write the recipe to a TOML file, whole or not at all.  Raises FileError."""
        small.write_text(file_path(path), self.dumps())

    @classmethod
    def loads(cls, text: str, *, path: str | FilePath = "recipe") -> Recipe:
        """Read a recipe from TOML.  Raises RecipeError with all problems and their line numbers."""
        parsed = parsed_toml(text, path)
        problems = [
            f"line {line_of(text, 0, name)}: unknown entry {name!r}"
            for name in parsed
            if name not in ("edit", "inputs")
        ]
        inputs = parsed.get("inputs", [])
        problems += [f"line {line_of(text, 0, 'inputs')}: {problem}" for problem in _naming_problems(inputs)]
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
        return cls(tuple(steps), tuple(inputs))

    @classmethod
    def load(cls, path: AnyPath) -> Recipe:
        """Read a recipe from a file.  Raises FileError, RecipeError."""
        where = file_path(path)
        return cls.loads(small.read_text(where), path=where)


def _naming_problems(inputs: object) -> Iterable[str]:
    """What is wrong with the names of inputs."""
    if not isinstance(inputs, list) or not all(isinstance(name, str) and name.isidentifier() for name in inputs):
        yield "inputs is a list of names, each of letters, digits and underscores"
    elif len(set(inputs)) < len(inputs):
        yield "two inputs have one name"


def _traced(
    old: str, edited: str, origins: Mapping[str, Mapping[str, tuple[str, ...]]], names: Collection[str]
) -> tuple[str, ...]:
    """The keys of the inputs that an old key of a step was made of."""
    name, key = parted(old, names)
    return origins[name or edited][key]


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
    lines = ["[[edit]]", f"do = {toml_value(one.name.replace('_', '-'))}"]
    lines += [f"{name} = {toml_value(value)}" for name, value in one.arguments.items()]
    return "\n".join(lines) + "\n"


def toml_value(value: object) -> str:
    """A value as TOML; strings literal where they can be, so that regular expressions stay readable.

    >>> print(toml_value(["layers.*", 3, True]))
    ['layers.*', 3, true]
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        if "'" not in value and value.isprintable():
            return f"'{value}'"
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        if len(value) > 1 and any(isinstance(item, list) for item in value):
            return "[\n" + "".join(f"    {toml_value(item)},\n" for item in value) + "]"
        return f"[{', '.join(map(toml_value, value))}]"
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


def parsed_toml(text: str, path: str | FilePath) -> dict[str, Any]:
    """The tables of a TOML text.  Raises RecipeError.

    >>> parsed_toml("a = [1]", "recipe")
    {'a': [1]}
    """
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise RecipeError(path, ["has brackets that are nested too deeply"]) from error
    except ValueError as error:  # a TOMLDecodeError, or a number of more digits than Python reads
        raise RecipeError(path, [with_line(str(error).partition("; use sys")[0], text)]) from error


def with_line(message: str, text: str) -> str:
    """tomllib's message with the line number in front, as all others have it.

    >>> with_line("Invalid value (at line 3, column 1)", "")
    'line 3: Invalid value'
    """
    found = re.search(r"\(at (?:line (\d+), column \d+|end of document)\)", message)
    if found is None:
        return message
    return f"line {found[1] or max(len(text.splitlines()), 1)}: {message[: found.start()].strip()}"
