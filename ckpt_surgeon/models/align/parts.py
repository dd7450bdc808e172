"""Keys taken apart: the components of a key, its numbers, its leaf, and how alike two keys end."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

DIGITS = re.compile(r"(\d+)")
_KINDS = ("running_mean", "running_var", "bias", "weight")


@lru_cache(maxsize=1 << 16)
def parts(key: str) -> tuple[str, ...]:
    """The components of a key."""
    return tuple(key.split("."))


@lru_cache(maxsize=1 << 16)
def number(part: str) -> int | None:
    """The number that a component is, None where it is a name."""
    return int(part) if part.isascii() and part.isdecimal() else None


def is_name(part: str) -> bool:
    """Whether a component is no number."""
    return number(part) is None


def parent(key: str) -> str:
    """The module that a key belongs to."""
    return key.rpartition(".")[0]


@lru_cache(maxsize=1 << 16)
def kind(key: str) -> str:
    """What a leaf is, where its name says so: kinds never change into each other."""
    leaf = key.rpartition(".")[2]
    return next((one for one in _KINDS if leaf == one or leaf.endswith("_" + one)), "")


def common_end(old: str, new: str) -> int:
    """How many components two keys end alike with."""
    ours, theirs = parts(old), parts(new)
    shorter = min(len(ours), len(theirs))
    return next((at for at in range(shorter) if ours[-1 - at] != theirs[-1 - at]), shorter)


def by_number(keys: Iterable[str]) -> dict[str, None]:
    """Keys module by module, numbered parts by their numbers: files may list ``10`` before ``2``."""
    split = {key: parts(key) for key in keys}
    named = {".".join(found[:depth]) for found in split.values() for depth, part in enumerate(found) if is_name(part)}
    ranks: dict[tuple[str, str], int] = {}
    places: dict[str, list[tuple[int, int]]] = {}
    for key, found in split.items():
        paths = [".".join(found[:depth]) for depth in range(len(found))]
        places[key] = [
            (ranks.setdefault((path, part), len(ranks)), 0)
            if path in named
            else (ranks.setdefault((path, ""), len(ranks)), int(part))
            for path, part in zip(paths, found, strict=True)
        ]
    return dict.fromkeys(sorted(split, key=places.__getitem__))


def by_prefix(keys: Iterable[str], spelled: Mapping[str, str]) -> dict[str, list[str]]:
    """The keys under each path (``blocks.0.``, and "" for all), by their spelled names."""
    found: dict[str, list[str]] = {}
    for key in keys:
        name = spelled[key]
        found.setdefault("", []).append(key)
        at = name.find(".")
        while at >= 0:
            found.setdefault(name[: at + 1], []).append(key)
            at = name.find(".", at + 1)
    return found
