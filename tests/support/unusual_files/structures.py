"""Structures, keys, and storages that are larger than their tensors."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from tables import StateDict, ramp
from torch import nn

from unusual_files.registry import UnusualFile, save, unusual, weights
from unusual_files.vanished import vanishing


def _structure(folder: Path, *, value: object, state: StateDict, select: str | None = None) -> UnusualFile:
    return UnusualFile(save(value, folder), state, select=select)


_LOOP: dict[str, object] = {"weight": ramp(2)}
_LOOP["self"] = _LOOP
_SHARED = weights()
_DEEP: dict[str, object] = dict(weights())
for _ in range(20):
    _DEEP = {"m": _DEEP, "n": 1}

STRUCTURES: dict[str, tuple[object, StateDict, str | None]] = {
    "a list of state_dicts": ([weights(), {"b": ramp(2)}], {"b": ramp(2)}, "1"),
    "a tuple of state_dicts": ((weights(), {"b": ramp(2)}), weights(), "0"),
    "a state_dict and numbers in a tuple": ((weights(), 3, "x"), weights(), None),
    "a list of tensors": ([ramp(2), ramp(3)], {"0": ramp(2), "1": ramp(3)}, None),
    "one tensor": (ramp(2, 3).t(), {"tensor": ramp(2, 3).t()}, None),
    "one parameter": (nn.Parameter(ramp(2)), {"tensor": ramp(2)}, None),
    "integer keys": ({0: ramp(2), 7: ramp(3), -1: ramp(1)}, {"0": ramp(2), "7": ramp(3), "-1": ramp(1)}, None),
    "keys of many kinds": (
        {1.5: ramp(1), True: ramp(2), None: ramp(3), b"raw": ramp(4), (1, "a"): ramp(5), 1 << 70: ramp(6)},
        {"1.5": ramp(1), "True": ramp(2), "None": ramp(3), "raw": ramp(4), "(1, 'a')": ramp(5), str(1 << 70): ramp(6)},
        None,
    ),
    "a name with dots": ({"net.v1": weights(), "net": {"x": ramp(1)}}, weights(), "net.v1"),
    "a name and its beginning": ({"a": {"c": ramp(1)}, "a.b": {"d": ramp(2)}}, {"d": ramp(2)}, "a.b"),
    "a tensor by its path": ({"model": weights()}, {"tensor": ramp(3)}, "model.fc.bias"),
    "a dict within itself": (_LOOP, {"weight": ramp(2)}, None),
    "one dict under two names": ({"backbone": _SHARED, "copy": _SHARED}, {
        f"{name}.{key}": tensor for name in ("backbone", "copy") for key, tensor in _SHARED.items()
    }, None),
    "dicts twenty deep": (_DEEP, weights(), None),
}  # fmt: skip

for _name, (_value, _state, _select) in STRUCTURES.items():
    unusual("structure", _name)(partial(_structure, value=_value, state=_state, select=_select))


@unusual("structure", "subclass of dict that is not there")
def _dict_subclass(folder: Path) -> UnusualFile:
    with vanishing() as models:
        inner = models.Dotted(weights())
        path = save(models.Dotted(backbone=inner, head=models.Dotted(b=ramp(1)), epoch=3), folder)
    state = {"backbone.fc.weight": ramp(3, 4), "backbone.fc.bias": ramp(3), "head.b": ramp(1)}
    return UnusualFile(path, state, {".": "vanished.models.Dotted", "epoch": "int 3"}, suspect=True)


@unusual("structure", "namedtuple of state_dicts")
def _named_pair(folder: Path) -> UnusualFile:
    with vanishing() as models:
        path = save(models.Pair(weights(), {"b": ramp(2)}), folder)
    return UnusualFile(path, {"b": ramp(2)}, {".": "vanished.models.Pair dict, dict"}, suspect=True, select="1")


KEYS = {
    "dots": ["a.b.c", "..", ".", "a..b", ""],
    "quotes": ["it's", 'say "hi"', "`x`", "\\"],
    "spaces": [" ", "two words", "tab\t", "line\nbreak", "\r\n", "\v\f", "\x00"],
    "escapes": ["\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x7f", "\x80\x9b"],
    "Unicode": ["größe", "重み", "🦊", "e\u0301", "\u202eright to left", "\u200b", "\ufeff", "\u2028"],
    "surrogates": ["\ud800", "a\udcffb"],
    "options": ["--force", "-", "*", "[a]", "{0}", "%s", "$HOME", "~"],
    "long": ["x" * 300, "x" * 70_000],
}


def _keys(folder: Path, *, keys: list[str]) -> UnusualFile:
    state = {key: ramp(index + 1) for index, key in enumerate(keys)}
    path = save(state, folder)
    return UnusualFile(path, torch.load(path))


for _name, _listed in KEYS.items():
    unusual("keys", _name)(partial(_keys, keys=_listed))


# -- storages that are larger than their tensors


@unusual("slack", "a row of a large table")
def _slack(folder: Path) -> UnusualFile:
    table = ramp(1000, 100)
    return UnusualFile(
        save({"row": table[3:4], "column": table[:2, 5]}, folder), {"row": table[3:4], "column": table[:2, 5]}
    )


@unusual("slack", "legacy")
def _slack_legacy(folder: Path) -> UnusualFile:
    table = ramp(1000, 100)
    return UnusualFile(save({"row": table[3]}, folder, legacy=True), {"row": table[3]})
