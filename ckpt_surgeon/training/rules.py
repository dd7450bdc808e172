"""Rules for parameter groups: what each group catches, its learning rate and weight decay; read from TOML.

A learning rate or weight decay is a number, or a multiple of the base one, written ``"10x"``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from ..edits.recipe import line_of, parsed_toml
from ..errors import RecipeError
from ..files import small
from ..files.local import LocalPath
from ..text import Shown
from .selectors import Selectors, each

Rate: TypeAlias = float | str  # 0.01, or "10x": ten times the base


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
        parsed = parsed_toml(text, LocalPath(path))
        tables = parsed.pop("group", [])
        found = [(0, name, problem) for name, problem in _problems_of(parsed, _ENTRIES)]
        if not isinstance(tables, list) or not all(isinstance(group, dict) for group in tables):
            found.append((0, "group", "groups are [[group]] tables"))
            tables = []
        for number, group in enumerate(tables, 1):
            lacking = [("", f"needs {name} = …") for name in ("name", "match") if name not in group]
            found += [(number, name, f"group {group.get('name', number)!r}: {problem}")
                      for name, problem in (*_problems_of(group, _OF_A_GROUP), *lacking)]  # fmt: skip
        if found:
            problems = [
                f"line {line_of(text, number, name, table='group')}: {problem}" for number, name, problem in found
            ]
            raise RecipeError(path, problems)
        plain: dict[str, Any] = {
            name: tuple(each(value)) if _ENTRIES[name] is _TEXTS else value for name, value in parsed.items()
        }
        return cls(tuple(Rule(**group) for group in tables), **plain)

    @classmethod
    def load(cls, path: str | Path) -> Rules:
        """Read rules from a file.  Raises FileError, RecipeError."""
        return cls.loads(small.read_text(LocalPath(path)), path=path)


_TEXT = ("a string", (str,))
_TEXTS = ("a string or a list of strings", (str, list))
_NUMBER = ("a number", (int, float))
_RATE = ("a number or a multiple like '10x'", (int, float, str))
_TABLE = ("a table", (dict,))
_ENTRIES = {"lr": _NUMBER, "weight_decay": _NUMBER, "layer_decay": _NUMBER, "layers": _TEXTS, "on_overlap": _TEXT,
            "only": _TEXTS}  # fmt: skip
_OF_A_GROUP = {"name": _TEXT, "match": _TEXTS, "lr": _RATE, "weight_decay": _RATE, "options": _TABLE}


def _problems_of(
    table: Mapping[str, object], known: Mapping[str, tuple[str, tuple[type, ...]]]
) -> Iterator[tuple[str, str]]:
    """Pairs of an entry and what is wrong with it."""
    for name, value in table.items():
        if name not in known:
            yield name, f"unknown entry {name!r}; known are {', '.join(known)}"
            continue
        expected, kinds = known[name]
        is_mixed = isinstance(value, list) and not all(isinstance(item, str) for item in value)
        if not isinstance(value, kinds) or isinstance(value, bool) or is_mixed:
            yield name, f"{name} should be {expected}, not {value!r}"
