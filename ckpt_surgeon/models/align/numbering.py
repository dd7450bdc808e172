"""Evidence of numbers: numbered parts that the target counts from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

from .parts import is_name, number, parts
from .state import State

_Part = frozenset[tuple[str, tuple[int, ...]]]  # what a numbered part holds: the rest of each key, and its shape
_Families = dict[str, dict[int, _Part]]


def renumbered(state: State) -> None:
    """Settle numbered parts (``blocks.0`` to ``blocks.11``) that the target counts from elsewhere.

    Certain where the parts hold several named modules: numbers alone, of parts without names in them, are likely.
    """
    ours, theirs = _families(state.spelling, state.source), _families(state.wanted_spelling, state.target)
    under: dict[str, list[str]] = {}
    for key in state.olds:
        split = parts(state.spelling[key])
        for depth, part in enumerate(split[:-1]):
            if number(part) is not None:
                under.setdefault(".".join(split[: depth + 1]) + ".", []).append(key)
    counterparts = _counterparts(state, ours, theirs)
    for path, other in counterparts.items():
        numbers, wanted = sorted(ours[path]), sorted(theirs[other])
        if wanted == numbers or len({new - old for old, new in zip(numbers, wanted, strict=True)}) != 1:
            continue
        reason = f"{path}{numbers[0]} to {numbers[-1]} are {other}{wanted[0]} to {wanted[-1]}"
        certainty = "certain" if _is_named(ours[path]) else "likely"
        for old, new in zip(numbers, wanted, strict=True):
            before = f"{path}{old}."
            for key in under.get(before, ()):
                renamed = state.by_spelling.get(f"{other}{new}.{state.spelling[key].removeprefix(before)}")
                if key in state.olds and renamed in state.news:
                    state.settle(key, renamed, reason, certainty)


def _is_named(family: Mapping[int, _Part]) -> bool:
    """Whether numbered parts hold at least two modules with names."""
    found = {rest.rpartition(".")[0] for held in family.values() for rest, _ in held}
    return sum(any(is_name(part) for part in parts(path)) for path in found if path) >= 2


def _counterparts(state: State, ours: _Families, theirs: _Families) -> dict[str, str]:
    """The path of the target whose numbered parts hold the same in the same order, where there is only one."""
    sources, targets = _by_content(ours), _by_content(theirs)
    found = {}
    for held, paths in sources.items():
        others = targets.get(held, [])
        for path in paths:
            if len(ours[path]) < 2:
                continue
            if path in others and state.counted.alike(f"{path}0", f"{path}0"):
                found[path] = path
            elif len(others) == len(paths) == 1:
                found[path] = others[0]
    return found


def _by_content(families: _Families) -> dict[tuple[_Part, ...], list[str]]:
    found: dict[tuple[_Part, ...], list[str]] = {}
    for path, held in families.items():
        found.setdefault(tuple(held[one] for one in sorted(held)), []).append(path)
    return found


def _families(names: Mapping[str, str], tensors: Mapping[str, object]) -> _Families:
    """The numbered parts of a model: path in front of the number, number, and what the part holds."""
    found: dict[str, dict[int, list[tuple[str, tuple[int, ...]]]]] = {}
    for key, name in names.items():
        split = parts(name)
        shape = tuple(getattr(tensors[key], "shape", ()))
        for depth, part in enumerate(split[:-1]):
            value = number(part)
            if value is not None:
                path, rest = ".".join(split[:depth]), ".".join(split[depth + 1 :])
                found.setdefault(f"{path}." if path else "", {}).setdefault(value, []).append((rest, shape))
    return {path: {one: frozenset(held) for one, held in numbers.items()} for path, numbers in found.items()}
