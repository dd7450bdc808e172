"""A model that is about to be trained: tables for people and notebooks, JSON for machines."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..key_patterns import FEW, fold, folded
from ..text import as_json, document, html, percent, plural, table

if TYPE_CHECKING:
    from ..training.freezing import ModuleState, Trainable
    from ..training.grouping import ParamGroups
    from ..training.initializing import Initialized

Rows = list[list[object]]
ROOT = "(the model itself)"


# -- trainable

_TRAINABLE = ("module", "modules", "class", "parameters", "state", "running statistics")
_NORMS = {"": "", "eval": "stay (eval)", "train": "move (train)", "open": "move, though frozen"}


def trainable_text(found: Trainable) -> str:
    """What of a model is trained, module by module, folded."""
    return document([table(_TRAINABLE, _trainable_rows(found)), "", _trainable_totals(found)])


def trainable_html(found: Trainable) -> str:
    return html(_TRAINABLE, _trainable_rows(found), _trainable_totals(found))


def _trainable_rows(found: Trainable) -> Rows:
    position = {module.path: index for index, module in enumerate(found.modules)}
    groups: dict[tuple[str, ...], list[ModuleState]] = {}
    for module in found.modules:
        groups.setdefault((module.class_name, module.state, module.norm), []).append(module)
    rows: list[tuple[int, list[object]]] = []
    for (class_name, state, norm), modules in groups.items():
        paths = [module.path for module in modules]
        for one in fold(paths):
            covers = covered_by(one.pattern)
            count = f"{sum(module.trainable + module.frozen for module in modules if covers(module.path)):,}"
            rows.append(
                (position[paths[one.first]], [one.pattern or ROOT, one.count, class_name, count, state, _NORMS[norm]])
            )
    return [row for _, row in sorted(rows, key=lambda row: row[0])]


def covered_by(pattern: str) -> Callable[[str], bool]:
    """Whether a folded pattern covers a key.

    >>> covers = covered_by("layer{1..3,7}.{conv,bn}")
    >>> covers("layer7.bn"), covers("layer5.bn")
    (True, False)
    """

    def alternatives(found: re.Match[str]) -> str:
        words: list[str] = []
        for word in found[1].split(","):
            first, dots, last = word.partition("..")
            numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)] if dots else [word]
            words += map(re.escape, numbers)
        return f"(?:{'|'.join(words)})"

    parts = re.split(r"(\{[^{}]*\})", pattern)
    made = (re.sub(r"\{([^{}]*)\}", alternatives, part) if part[:1] == "{" else re.escape(part).replace(r"\*", r"\d+")
            for part in parts)  # fmt: skip
    fits = re.compile("".join(made)).fullmatch
    return lambda key: fits(key) is not None


def _trainable_totals(found: Trainable) -> str:
    numel, trained = found.numel, found.trainable_numel
    share = percent(trained / numel) if numel else "0 %"
    norms: dict[str, int] = {}
    for module in found.modules:
        if module.norm:
            norms[module.norm] = norms.get(module.norm, 0) + 1
    counts = ", ".join(f"{count:,} {_NORMS[norm]}" for norm, count in norms.items())
    return f"{trained:,} of {plural(numel, 'parameter')} are trained ({share})" + (
        f"; running statistics of {plural(sum(norms.values()), 'layer')}: {counts}" if norms else ""
    )


def trainable_json(found: Trainable) -> str:
    """What ``ckpt freeze-plan --json`` prints."""
    modules = [
        {
            "path": module.path,
            "class": module.class_name,
            "trainable": module.trainable,
            "frozen": module.frozen,
            "norm": module.norm,
        }
        for module in found.modules
    ]
    return as_json("freeze-plan", {"trainable": found.trainable, "frozen": found.frozen, "modules": modules})


# -- groups

_GROUPS = ("group", "lr", "weight decay", "parameters", "keys", "holds")


def groups_text(found: ParamGroups) -> str:
    """What each group holds."""
    return document([table(_GROUPS, _group_rows(found)), "", _group_totals(found)])


def groups_html(found: ParamGroups) -> str:
    return html(_GROUPS, _group_rows(found), _group_totals(found))


def _group_rows(found: ParamGroups) -> Rows:
    rows: Rows = []
    few = len(found.summary) <= FEW // 2
    for group in found.summary:
        decay = "" if group.weight_decay is None else f"{group.weight_decay:g}"
        patterns = folded(group.keys, limit=None)
        if not few and len(patterns) > 1:
            patterns = [(f"{patterns[0][0]} and others", len(group.keys))]
        for index, (pattern, count) in enumerate(patterns):
            first = [group.name, f"{group.lr:.4g}", decay, f"{group.numel:,}"] if not index else [""] * 4
            rows.append([*first, count, pattern])
    return rows


def _group_totals(found: ParamGroups) -> str:
    held = sum(group.numel for group in found.summary)
    left = f"; frozen, in no group: {plural(len(found.frozen), 'key')}" if found.frozen else ""
    return f"{plural(len(found.summary), 'group')}, {plural(held, 'parameter')}, each once{left}"


def groups_json(found: ParamGroups) -> str:
    """What ``ckpt groups --json`` prints."""
    groups = [
        {
            "name": group.name,
            "lr": group.lr,
            "weight_decay": group.weight_decay,
            "parameters": group.numel,
            "keys": group.keys,
        }
        for group in found.summary
    ]
    return as_json("groups", {"groups": groups, "frozen": found.frozen})


# -- initialised

_INITIALIZED = ("key", "keys", "how")


def initialized_text(found: Initialized) -> str:
    """What was initialised, and how."""
    return table(_INITIALIZED, _initialized_rows(found))


def initialized_html(found: Initialized) -> str:
    return html(_INITIALIZED, _initialized_rows(found), plural(len(found.how), "key"))


def _initialized_rows(found: Initialized) -> Rows:
    groups: dict[str, list[str]] = {}
    for key, how in found.how.items():
        groups.setdefault(how, []).append(key)
    return [[pattern, count, how] for how, keys in groups.items() for pattern, count in folded(keys)]
