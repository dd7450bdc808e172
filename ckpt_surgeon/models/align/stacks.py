"""Evidence of stacks: keys that a number tells apart on one side, and the name without it on the other (experts)."""

from __future__ import annotations

from collections.abc import Mapping

from ...edits.keys import without_wrappers
from ...tensors.records import Shaped
from .parts import number, parts
from .results import Made
from .state import State

# One tensor of several projections in turn, by the leaf of its name; their order in it is transformers' 5.
FUSED = {"gate_up_proj": ("gate_proj", "up_proj")}

Stack = tuple[str, str]  # the path before the number, the path behind it


def stacks(state: State) -> tuple[Made, ...]:
    """Settle stacks: ``experts.w`` [E, a, b] is E keys ``experts.0.w`` [a, b], or the other way round.

    The name without its number (and without ``.weight``) has to be the same, the numbers have to be all of 0 to
    E - 1, and the shapes have to be equal.  A stack of several projections, known by its name, is likely: names do
    not tell how they lie in it.
    """
    made: list[Made] = []
    for numbered, whole, is_stacked in ((state.olds, state.news, True), (state.news, state.olds, False)):
        many, one = (state.source, state.target) if is_stacked else (state.target, state.source)
        by_name = {without_wrappers(key): key for key in whole}
        found = _numbered(numbered)
        for stack, keys in found.items():
            name = _named(stack, by_name)
            if name and len(keys) > 1 and _fits(one[name], [many[keys[at]] for at in sorted(keys)], keys):
                ordered = tuple(keys[at] for at in sorted(keys))
                made += _stacked(name, ordered) if is_stacked else _unstacked(name, ordered)
        if is_stacked:
            made += _fused(state, found, by_name)
    for new in made:
        state.news.pop(new.new, None)
        for old in new.olds:
            state.olds.pop(old, None)
    return tuple(made)


def _numbered(keys: Mapping[str, None]) -> dict[Stack, dict[int, str]]:
    """The open keys by each of their numbers: what stands around it, and the key of each number."""
    found: dict[Stack, dict[int, str]] = {}
    for key in keys:
        split = parts(without_wrappers(key))
        for at, part in enumerate(split[:-1]):
            if (value := number(part)) is not None and at:
                found.setdefault((".".join(split[:at]), ".".join(split[at + 1 :])), {})[value] = key
    return found


def _named(stack: Stack, by_name: Mapping[str, str]) -> str:
    """The key of a stack's name, "" where there is none."""
    before, behind = stack
    names = [f"{before}.{behind}", f"{before}.{behind.removesuffix('.weight')}"]
    return next((by_name[name] for name in names if name in by_name), "")


def _fits(stack: Shaped, tensors: list[Shaped], numbers: Mapping[int, str], times: int = 1) -> bool:
    shape = tuple(stack.shape)
    if sorted(numbers) != list(range(len(numbers))) or len(shape) < 1 + (times > 1):
        return False
    wanted = shape[1:] if times == 1 else (shape[1] // times, *shape[2:])
    length = shape[1] % times if times > 1 else 0
    return shape[0] == len(numbers) and not length and all(tuple(one.shape) == wanted for one in tensors)


def _stacked(new: str, olds: tuple[str, ...]) -> list[Made]:
    return [Made(new, olds, (0, 1), "the name without the number, and all numbers", stacked=1, certainty="certain")]


def _unstacked(old: str, news: tuple[str, ...]) -> list[Made]:
    why = "the name without the number, and all numbers"
    return [Made(new, (old,), (at, len(news)), why, stacked=1, certainty="certain") for at, new in enumerate(news)]


def _fused(state: State, found: Mapping[Stack, dict[int, str]], by_name: Mapping[str, str]) -> list[Made]:
    """Stacks whose every index holds several projections, one after the other."""
    made = []
    for name, new in by_name.items():
        path, _, leaf = name.rpartition(".")
        projections = FUSED.get(leaf, ())
        ends = [[f"{part}.weight", part] for part in projections]
        columns = [next((found[path, end] for end in names if (path, end) in found), {}) for names in ends]
        if not projections or not all(columns) or len({tuple(sorted(column)) for column in columns}) != 1:
            continue
        tensors: list[Shaped] = [state.source[key] for column in columns for key in column.values()]
        if _fits(state.target[new], tensors, columns[0], len(columns)):
            olds = tuple(column[at] for at in sorted(columns[0]) for column in columns)
            why = f"stacks of {' and '.join(projections)}, by its name"
            made.append(Made(new, olds, (0, 1), why, stacked=len(columns), certainty="likely"))
    return made
