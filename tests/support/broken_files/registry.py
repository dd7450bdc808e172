"""Files that are damaged or something else, and what is to be said of each."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tables import StateDict, ramp

from ckpt_surgeon import BrokenFile, CheckpointError

Error = type[CheckpointError]
Change = Callable[[dict[str, Any], Path], object]  # of an index


@dataclass(frozen=True)
class Broken:
    """How a file is made, the error that opening it raises, and words of its message."""

    make: Callable[[Path], Path]
    error: Error
    words: tuple[str, ...]
    on_read: bool = False  # whether the damage lies in what opening does not read


BROKEN: dict[tuple[str, str], Broken] = {}


def broken(
    family: str, name: str, make: Callable[[Path], Path], *words: str, error: Error = BrokenFile, on_read: bool = False
) -> None:
    assert (family, name) not in BROKEN
    BROKEN[family, name] = Broken(make, error, words, on_read)


def state() -> StateDict:
    return {"a.weight": ramp(40, 30), "a.bias": ramp(40), "b.weight": ramp(7, 11)}


def written(raw: bytes, name: str, folder: Path) -> Path:
    path = folder / name
    path.write_bytes(raw)
    return path


def patched(raw: bytes, at: int, form: str, *values: int) -> bytes:
    """The bytes with numbers written over those at one place."""
    new = struct.pack(form, *values)
    return raw[:at] + new + raw[at + len(new) :]


def cut_at(raw: bytes, *, at: Callable[[bytes], int]) -> bytes:
    return raw[: at(raw)]
