"""Parameter groups for an optimizer from named rules: every trainable parameter in exactly one group.

A group's learning rate and weight decay are numbers, or multiples of the base ones, written ``"10x"``.  With a
layer-wise decay the learning rate shrinks by a factor per layer from the output back to the input, as for BEiT
(https://arxiv.org/abs/2106.08254): the last layer has the base learning rate, whatever is frozen before it.
torch is imported inside the functions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import Argument, EditError, NothingMatched, Phrase, listed
from ..text import Shown
from .layers import depths_of
from .rules import Rate, Rule, Rules
from .selectors import Anatomy, Selector, Selectors, anatomy, chosen, each, has_parameters, is_called, spelled

if TYPE_CHECKING:
    import torch

REST = "rest"  # the group of what no rule catches
OVERLAPS = ("error", "first", "last", "combine")
_MULTIPLE = re.compile(r"\s*(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+)\s*[x×*]\s*")


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
    depths, deepest = depths_of(parts, list(layers) or list(each(asked.layers))) if asked.layer_decay else ({}, 0)
    made: dict[tuple[int, tuple[Rule, ...]], list[str]] = {}
    for key in trained:
        made.setdefault((depths.get(key, 0), caught[key]), []).append(key)
    order: dict[tuple[Rule, ...], int] = {(): 0} | {(rule,): position for position, rule in enumerate(asked.groups, 1)}
    groups, summary = [], []
    for depth, of in sorted(made, key=lambda pair: (pair[0], order.get(pair[1], len(order)))):
        keys = made[depth, of]
        settings = _settings(of, asked, deepest - depth)
        name = "+".join(rule.name for rule in of) or REST
        settings["name"] = f"{name}, layer {depth}" if asked.layer_decay else name
        parameters = [parts.parameters[key] for key in keys]
        groups.append({"params": parameters, **settings})
        names = [name for parameter in parameters for name in parts.names_of(parameter)]
        decay = settings.get("weight_decay")
        numel = sum(parameter.numel() for parameter in parameters)
        rate, decayed = float(str(settings["lr"])), None if decay is None else float(str(decay))
        summary.append(GroupSummary(str(settings["name"]), tuple(names), numel, rate, decayed))
    return ParamGroups(
        groups, summary, [key for key, parameter in parts.parameters.items() if not parameter.requires_grad]
    )


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
    for key, parameter in parts.parameters.items():
        if parameter.requires_grad:
            first.setdefault(id(parameter), key)
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
    unexpected: dict[str, list[str]] = {}
    for path, module in parts.modules.items() if only else ():
        if has_parameters(module, own=True) and not any(_is_of(module, selector) for selector in only):
            unexpected.setdefault(type(module).__name__, []).append(path)
    allowed = ", ".join(spelled(selector).removeprefix("class:") for selector in only)
    problems += [
        f"{listed(paths, 3)}: class {name} is not expected (only {allowed})" for name, paths in unexpected.items()
    ]
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
