"""Parameter groups for an optimizer from named rules: every trainable parameter in exactly one group.

A group's learning rate and weight decay are numbers, or multiples of the base ones, written ``"10x"``.  With a
layer-wise decay the learning rate shrinks by a factor per layer from the output back to the input, as for BEiT
(https://arxiv.org/abs/2106.08254): the last layer has the base learning rate, whatever is frozen before it.
torch is imported inside the functions.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..edits.recipe import line_of, with_line
from ..errors import Argument, EditError, FileError, NothingMatched, Phrase, RecipeError, listed
from ..text import Shown
from .selectors import Anatomy, Selector, Selectors, above, anatomy, chosen, each, has_parameters, is_called, spelled

if TYPE_CHECKING:
    import torch

Rate: TypeAlias = float | str  # 0.01, or "10x": ten times the base

REST = "rest"  # the group of what no rule catches
OVERLAPS = ("error", "first", "last", "combine")
_MULTIPLE = re.compile(r"\s*(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+)\s*[x×*]\s*")


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Rule(Shown):
    """One named group: what it catches (see :mod:`.selectors`), its learning rate and weight decay.

    None takes the base value; ``options`` are further entries for the optimizer (``momentum``, ``betas`` …).

    >>> Rule("head", "fc.*", lr="10x").lr
    '10x'
    """

    name: str
    match: Selectors
    lr: Rate | None = None
    weight_decay: Rate | None = None
    options: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, repr=False)
class GroupSummary(Shown):
    """What one group holds: names of parameters (every name of a tied one), elements, learning rate, weight decay."""

    name: str
    keys: tuple[str, ...]
    numel: int
    lr: float
    weight_decay: float | None


class ParamGroups(Shown, list[dict[str, object]]):
    """The list of dicts that a torch optimizer takes, each with its ``name``; ``str()`` of it is a table.

    ``summary`` says what each group holds, ``frozen`` names what was left out.
    """

    def __init__(self, groups: Iterable[dict[str, object]], summary: Iterable[GroupSummary], frozen: Iterable[str]):
        super().__init__(groups)
        self.summary = tuple(summary)
        self.frozen = tuple(frozen)

    def __repr__(self) -> str:
        return f"<ParamGroups: {', '.join(f'{one.name} ({len(one.keys):,})' for one in self.summary)}>"


@dataclass(frozen=True, slots=True, repr=False)
class Rules(Shown):
    """All that :func:`param_groups` is asked, as it is kept in a TOML file.

    >>> rules = Rules.loads('''
    ... lr = 0.01
    ... [[group]]
    ... name = "head"
    ... match = ["fc.*"]
    ... lr = "10x"
    ... ''')
    >>> rules.lr, rules.groups[0].name
    (0.01, 'head')
    """

    groups: tuple[Rule, ...] = ()
    lr: float | None = None
    weight_decay: float | None = None
    layer_decay: float | None = None
    layers: tuple[str, ...] = ()
    on_overlap: str = "error"
    only: tuple[str, ...] = ()

    @classmethod
    def loads(cls, text: str, *, path: str | Path = "rules") -> Rules:
        """Read rules from TOML.  Raises RecipeError with all problems and their line numbers."""
        try:
            parsed = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(path, [with_line(str(error), text)]) from error
        tables = parsed.pop("group", [])
        found = [(0, name, problem) for name, problem in _odd_entries(parsed, _ENTRIES)]
        if not isinstance(tables, list) or not all(isinstance(one, dict) for one in tables):
            found.append((0, "group", "groups are [[group]] tables"))
            tables = []
        for number, one in enumerate(tables, 1):
            lacking = [("", f"needs {name} = …") for name in ("name", "match") if name not in one]
            found += [(number, name, f"group {one.get('name', number)!r}: {problem}")
                      for name, problem in (*_odd_entries(one, _OF_A_GROUP), *lacking)]  # fmt: skip
        if found:
            problems = [
                f"line {line_of(text, number, name, table='group')}: {problem}" for number, name, problem in found
            ]
            raise RecipeError(path, problems)
        plain: dict[str, Any] = {
            name: tuple(each(value)) if _ENTRIES[name] is _TEXTS else value for name, value in parsed.items()
        }
        return cls(tuple(Rule(**one) for one in tables), **plain)

    @classmethod
    def load(cls, path: str | Path) -> Rules:
        """Read rules from a file.  Raises FileError, RecipeError."""
        try:
            text = Path(path).read_text("utf-8")
        except OSError as error:
            raise FileError(path, f"cannot be opened ({error.strerror})", "check the name") from error
        except UnicodeDecodeError as error:
            raise RecipeError(path, ["is not UTF-8 text"]) from error
        return cls.loads(text, path=path)


_TEXT = ("a string", (str,))
_TEXTS = ("a string or a list of strings", (str, list))
_NUMBER = ("a number", (int, float))
_RATE = ("a number or a multiple like '10x'", (int, float, str))
_TABLE = ("a table", (dict,))
_ENTRIES = {"lr": _NUMBER, "weight_decay": _NUMBER, "layer_decay": _NUMBER, "layers": _TEXTS, "on_overlap": _TEXT,
            "only": _TEXTS}  # fmt: skip
_OF_A_GROUP = {"name": _TEXT, "match": _TEXTS, "lr": _RATE, "weight_decay": _RATE, "options": _TABLE}


def _odd_entries(
    table: Mapping[str, object], known: Mapping[str, tuple[str, tuple[type, ...]]]
) -> Iterator[tuple[str, str]]:
    """Pairs of an entry and what is wrong with it."""
    for name, value in table.items():
        if name not in known:
            yield name, f"unknown entry {name!r}; known are {', '.join(known)}"
            continue
        said, kinds = known[name]
        is_mixed = isinstance(value, list) and not all(isinstance(one, str) for one in value)
        if not isinstance(value, kinds) or isinstance(value, bool) or is_mixed:
            yield name, f"{name} should be {said}, not {value!r}"


def param_groups(
    model: torch.nn.Module,
    rules: Rules | Iterable[Rule] | Mapping[str, Selectors] | str | Path = (),
    *,
    lr: float | None = None,
    weight_decay: float | None = None,
    layer_decay: float | None = None,
    layers: Iterable[Selector] = (),
    on_overlap: str | None = None,
    only: Selectors = (),
) -> ParamGroups:
    """Parameter groups for any torch optimizer: every trainable parameter exactly once, frozen ones left out.

    ``rules`` are :class:`Rule` objects, names and what they catch, a :class:`Rules`, or the path of a TOML file; what
    no rule catches is the group "rest".  ``lr`` and ``weight_decay`` are the base values, needed where something is
    a multiple of them; without ``weight_decay`` the optimizer's own default holds.  ``on_overlap`` says what becomes
    of a parameter that several rules catch: an error, the "first" or "last" rule's, or "combine", which multiplies
    their multiples in a group of its own.  ``layer_decay`` (0 to 1) multiplies the learning rate once for each layer
    between a parameter and the output; ``layers`` chooses the layers, input first (default: the blocks of the
    model's outermost lists and Sequentials).  ``only`` are the classes that a module with parameters may have.

    Raises NothingMatched for a rule that catches nothing, and EditError with all other problems: a rule that catches
    only frozen parameters, an overlap, a module of a class that is not in ``only``, a multiple of nothing.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    >>> groups = param_groups(model, [Rule("head", "module:1", lr="10x")], lr=0.01)
    >>> optimizer = torch.optim.SGD(groups, momentum=0.9)
    >>> [(group["name"], group["lr"]) for group in optimizer.param_groups]
    [('rest', 0.01), ('head', 0.1)]
    """
    asked = _asked(rules)
    asked = replace(
        asked,
        lr=asked.lr if lr is None else lr,
        weight_decay=asked.weight_decay if weight_decay is None else weight_decay,
        layer_decay=asked.layer_decay if layer_decay is None else layer_decay,
        on_overlap=on_overlap or asked.on_overlap,
    )
    parts = anatomy(model)
    _check(parts, asked, each(only) or each(asked.only))
    trained = _trained(parts)
    if not trained:
        raise EditError(["no parameter of the model is trainable; see ckpt_surgeon.trainable(model)"])
    caught = _caught(parts, asked, trained)
    depths, deepest = _depths(parts, list(layers) or list(each(asked.layers))) if asked.layer_decay else ({}, 0)
    made: dict[tuple[int, tuple[Rule, ...]], list[str]] = {}
    for key in trained:
        made.setdefault((depths.get(key, 0), caught[key]), []).append(key)
    order: dict[tuple[Rule, ...], int] = {(): 0} | {(rule,): place for place, rule in enumerate(asked.groups, 1)}
    groups, summary = [], []
    for depth, of in sorted(made, key=lambda pair: (pair[0], order.get(pair[1], len(order)))):
        keys = made[depth, of]
        one = _settings(of, asked, deepest - depth)
        name = "+".join(rule.name for rule in of) or REST
        one["name"] = f"{name}, layer {depth}" if asked.layer_decay else name
        parameters = [parts.parameters[key] for key in keys]
        groups.append({"params": parameters, **one})
        names = [name for parameter in parameters for name in parts.names_of(parameter)]
        decay = one.get("weight_decay")
        summary.append(GroupSummary(str(one["name"]), tuple(names), sum(one.numel() for one in parameters),
                                    float(str(one["lr"])), None if decay is None else float(str(decay))))  # fmt: skip
    return ParamGroups(groups, summary, [key for key, one in parts.parameters.items() if not one.requires_grad])


def _asked(rules: Rules | Iterable[Rule] | Mapping[str, Selectors] | str | Path) -> Rules:
    if isinstance(rules, Rules):
        return rules
    if isinstance(rules, (str, Path)):
        return Rules.load(rules)
    if isinstance(rules, Mapping):
        return Rules(tuple(Rule(name, match) for name, match in rules.items()))
    return Rules(tuple(rules))


def _trained(parts: Anatomy) -> list[str]:
    """The trainable parameters by the first of their names."""
    first: dict[int, str] = {}
    for key, one in parts.parameters.items():
        if one.requires_grad:
            first.setdefault(id(one), key)
    return list(first.values())


def _check(parts: Anatomy, asked: Rules, only: Sequence[Selector]) -> None:
    problems = []
    names = [rule.name for rule in asked.groups]
    problems += [f"two rules are called {name!r}" for name in dict.fromkeys(names) if names.count(name) > 1]
    problems += [f"a rule is called {REST!r}, which is the name of what no rule catches"] * (REST in names)
    if asked.on_overlap not in OVERLAPS:
        problems.append(Phrase(Argument("on_overlap", asked.on_overlap), f" is none of {', '.join(OVERLAPS)}"))
    if asked.lr is None:
        problems.append(Phrase("no base learning rate is given: ", Argument("lr")))
    if asked.layer_decay is not None and not 0 < asked.layer_decay <= 1:
        problems.append(Phrase(Argument("layer_decay", asked.layer_decay), " is not between 0 and 1"))
    odd: dict[str, list[str]] = {}
    for path, module in parts.modules.items() if only else ():
        if has_parameters(module, own=True) and not any(_is_of(module, one) for one in only):
            odd.setdefault(type(module).__name__, []).append(path)
    allowed = ", ".join(spelled(one).removeprefix("class:") for one in only)
    problems += [f"{listed(paths, 3)}: class {name} is not expected (only {allowed})" for name, paths in odd.items()]
    if problems:
        raise EditError(problems)


def _is_of(module: torch.nn.Module, cls: Selector) -> bool:
    return (
        isinstance(module, cls) if isinstance(cls, type) else is_called(type(module), str(cls).removeprefix("class:"))
    )


def _caught(parts: Anatomy, asked: Rules, keys: Sequence[str]) -> dict[str, tuple[Rule, ...]]:
    """The rules that each trainable parameter falls under: none, one, or several where they combine."""
    found: dict[str, tuple[Rule, ...]] = dict.fromkeys(keys, ())
    problems: list[str] = []
    unmatched: dict[str, str] = {}
    for rule in asked.groups:
        try:
            names = chosen(parts, rule.match)
        except NothingMatched as error:
            unmatched |= {f"{rule.name}: {pattern}": hint for pattern, hint in error.hints.items()}
            continue
        hits = [key for key in keys if names.intersection(parts.names_of(parts.parameters[key]))]
        if not hits:
            what = "only frozen parameters" if names & parts.parameters.keys() else "no parameter"
            problems.append(f"rule {rule.name!r} catches {what}")
        for key in hits:
            found[key] = (*found[key], rule)
    if unmatched:
        raise NothingMatched(list(unmatched), what="rule", hints=unmatched)
    twice: dict[tuple[Rule, ...], list[str]] = {}
    for key, rules in found.items():
        if len(rules) > 1 and asked.on_overlap == "error":
            twice.setdefault(rules, []).append(key)
        elif len(rules) > 1 and asked.on_overlap != "combine":
            found[key] = rules[:1] if asked.on_overlap == "first" else rules[-1:]
    problems += [f"{listed(keys, 3)}: caught by {' and '.join(repr(rule.name) for rule in rules)}"
                 for rules, keys in twice.items()]  # fmt: skip
    if problems:
        remedy = Phrase("say which rule holds: ", Argument("on_overlap", "first"), ", last or combine")
        raise EditError(problems, remedy=remedy if twice else "")
    return found


def _settings(rules: tuple[Rule, ...], asked: Rules, layers_after: int) -> dict[str, object]:
    """The learning rate, weight decay and options of a group."""
    made: dict[str, object] = {}
    for rule in rules:
        made.update(rule.options)
    lr = _rate("lr", [(rule.name, rule.lr) for rule in rules], asked.lr)
    decay = _rate("weight_decay", [(rule.name, rule.weight_decay) for rule in rules], asked.weight_decay)
    made["lr"] = (lr or 0.0) * (asked.layer_decay or 1.0) ** layers_after
    if decay is not None:
        made["weight_decay"] = decay
    return made


def _rate(what: str, given: Sequence[tuple[str, Rate | None]], base: float | None) -> float | None:
    """One number of what the rules say: at most one absolute value, any number of multiples."""
    absolute = [(name, float(rate)) for name, rate in given if rate is not None and not isinstance(rate, str)]
    if len(absolute) > 1:
        raise EditError([f"rules {listed(name for name, _ in absolute)} both give {what}; only multiples combine"])
    value = absolute[0][1] if absolute else base
    for name, rate in given:
        if isinstance(rate, str):
            match = _MULTIPLE.fullmatch(rate)
            if match is None:
                raise EditError([f"rule {name!r}: {what}={rate!r} is no number and no multiple like '10x'"])
            if value is None:
                raise EditError([f"rule {name!r}: {what}={rate!r} is a multiple, but no base {what} is given"])
            value *= float(match[1])
    return value


# -- layers


def _depths(parts: Anatomy, layers: Sequence[Selector]) -> tuple[dict[str, int], int]:
    """How deep each parameter lies, from 0 at the input, and the depth of the last layer."""
    if layers:
        sets = [chosen(parts, layer) for layer in layers]
        depths = {key: depth for depth, keys in reversed(list(enumerate(sets))) for key in keys}
        if left := [key for key in parts.parameters if key not in depths]:
            raise EditError([f"{listed(left)} are in none of the {len(sets)} layers; layers has to cover the model"])
        return depths, len(sets) - 1
    units = _units(parts)
    if not units:
        raise EditError(["the model has no list or Sequential of blocks; name its layers, input first: layers=[…]"])
    place = {path: depth for depth, path in enumerate(units, 1)}
    inside = {key: place[path] for key in parts.parameters for path in above(key) if path in place}
    ahead = len(inside)
    depths, reached = {}, 0
    for key in parts.parameters:
        reached = inside.get(key, reached)
        ahead -= key in inside
        depths[key] = reached if ahead or key in inside else len(units) + 1
    bottom, top = min(depths.values()), max(depths.values())
    return {key: depth - bottom for key, depth in depths.items()}, top - bottom


def _units(parts: Anatomy) -> list[str]:
    """The paths of the blocks: the children, with parameters, of the outermost lists and Sequentials of several."""
    from torch import nn

    found: list[str] = []
    for path, module in parts.modules.items():
        if any(path.startswith(f"{unit}.") for unit in found) or not isinstance(module, (nn.Sequential, nn.ModuleList)):
            continue
        below = [f"{path}.{name}".removeprefix(".") for name, child in module.named_children() if has_parameters(child)]
        if len(below) > 1:
            found += below
    return found
