"""Damaged torch legacy files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from broken_files.by_hand import Part, counted, legacy_of
from broken_files.locating import legacy_bytes, storages_at
from broken_files.registry import broken, cut_at, written


def _changed_legacy(folder: Path, *, change: Callable[[bytes], bytes]) -> Path:
    return written(change(legacy_bytes()), "legacy.pth", folder)


LEGACY_CUTS: dict[str, tuple[Callable[[bytes], int], tuple[str, ...]]] = {
    "after the magic": (lambda raw: 15, ("truncated", "cut off")),
    "in the system's description": (lambda raw: 60, ("truncated", "at byte 53 of the pickle")),
    "in the object": (lambda raw: raw.index(b"a.bias"), ("truncated", "--salvage")),
    "before the keys": (lambda raw: storages_at(raw) - 3, ("truncated",)),
    "before the first storage": (storages_at, ("truncated", "bytes of the 5,")),
    "in a count": (lambda raw: storages_at(raw) + 4, ("truncated", "bytes of the 5,")),
    "in the first storage": (lambda raw: storages_at(raw) + 100, ("truncated", "bytes of the 5,")),
    "in the last storage": (lambda raw: len(raw) - 40, ("truncated", "bytes of the 5,")),
    "by one byte": (lambda raw: len(raw) - 1, ("truncated", "bytes of the 5,", "--salvage")),
}
for _name, (_at, _words) in LEGACY_CUTS.items():
    broken("legacy", f"cut {_name}",
           partial(_changed_legacy, change=partial(cut_at, at=_at)), *_words)  # fmt: skip


def _legacy(folder: Path, *, raw: bytes) -> Path:
    return written(raw, "legacy.pth", folder)


for _name, _raw, _words in (
    ("another protocol", legacy_of({}, {}, protocol=1002), ("protocol 1002", "1001")),
    ("another count", legacy_of({"w": Part()}, {"0": counted(11, 48)}), ("11 elements", "announced are 12")),
    ("a key that nothing names", legacy_of({"w": Part()}, {"0": counted(12, 48), "7": b""}), ("lists a storage '7'",)),
    ("a storage that is not listed", legacy_of({"w": Part()}, {}, keys=[]), ("storage '0' is not in the file's list",)),
    ("no list of keys", legacy_of({"w": Part()}, {"0": counted(12, 48)}, keys="0"), ("list of its storages",)),
    ("offset outside", legacy_of({"w": Part(offset=5)}, {"0": counted(12, 48)}), ("68 bytes", "has 48")),
    ("negative count", legacy_of({"w": Part(numel=-1)}, {"0": counted(12, 48)}), ("without a proper size",)),
    ("storage larger than memory", legacy_of({"w": Part(numel=1 << 60)}, {"0": counted(12, 48)}), ("truncated",)),
):
    broken("legacy", _name, partial(_legacy, raw=_raw), *_words)
