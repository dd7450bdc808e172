"""Evidence of flattened names: kohya's trainers write a module's path with ``_`` for the dots."""

from __future__ import annotations

from collections.abc import Iterable

from ...edits.flat_names import FLAT_PREFIXES, flat, halves
from .state import State

_Name = tuple[str, str]  # a module's path without dots, and what follows it


def flattened(state: State) -> None:
    """Settle keys whose path is another's with ``_`` for the dots, where only one path reads so."""
    for flat_keys, dotted_keys, is_source in ((state.olds, state.news, True), (state.news, state.olds, False)):
        flattened_keys = [key for key in flat_keys if key.partition(".")[0].count("_") > 1]
        if not flattened_keys:
            continue
        dotted = _dotted(dotted_keys)
        found = {key: [other for name in _flat(key) for other in dotted.get(name, ())] for key in flattened_keys}
        counts: dict[str, int] = {}
        for others in found.values():
            for other in others:
                counts[other] = counts.get(other, 0) + 1
        for key, others in found.items():
            if len(others) == 1 and counts[others[0]] == 1:
                old, new = (key, others[0]) if is_source else (others[0], key)
                if state.fits(old, new):
                    state.settle(old, new, "the same path with _ for the dots", "certain")


def _flat(key: str) -> set[_Name]:
    """What a flattened key may stand for: its path without each prefix that it carries."""
    path, _, rest = key.partition(".")
    prefixes = ("", *FLAT_PREFIXES)
    return {(path.removeprefix(prefix), halves(rest)) for prefix in prefixes if path.startswith(prefix)}


def _dotted(keys: Iterable[str]) -> dict[_Name, list[str]]:
    """Dotted keys by each way to cut them into a path of several components and the rest."""
    found: dict[_Name, list[str]] = {}
    for key in keys:
        split = key.split(".")
        for at in range(2, len(split)):
            found.setdefault((flat(".".join(split[:at])), halves(".".join(split[at:]))), []).append(key)
    return found
