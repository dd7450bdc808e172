"""Truncated files, and what can be saved of them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tables import StateDict, save_legacy, save_safetensors

from broken_files.indexes import SECOND, cut_shard, index_file, without_shard
from broken_files.locating import data_at, header_at, storages_at, zip_bytes
from broken_files.registry import state, written


@dataclass(frozen=True)
class Salvage:
    """A truncated file, the tensors that are whole in it, and those that are lost."""

    make: Callable[[Path], Path]
    whole: tuple[str, ...]
    lost: tuple[str, ...]


def _cut_to(folder: Path, *, save: Callable[[StateDict, Path], Path], at: Callable[[bytes], int]) -> Path:
    path = save(state(), folder)
    raw = path.read_bytes()
    path.write_bytes(raw[: at(raw)])
    return path


def _save_zip(value: StateDict, folder: Path) -> Path:
    return written(zip_bytes(), "model.pth", folder)


def _legacy_first(raw: bytes) -> int:
    """The end of whichever storage comes first in a legacy file."""
    start = storages_at(raw)
    return start + 8 + 4 * int(struct.unpack_from("<q", raw, start)[0])


ALL = tuple(state())
SALVAGE: dict[str, Salvage] = {
    "zip, after data.pkl": Salvage(partial(_cut_to, save=_save_zip, at=lambda raw: header_at(raw, "data/0")), (), ALL),
    "zip, in the second storage": Salvage(
        partial(_cut_to, save=_save_zip, at=lambda raw: data_at(raw, "data/1") + 50), ALL[:1], ALL[1:]
    ),
    "zip, in the last storage": Salvage(
        partial(_cut_to, save=_save_zip, at=lambda raw: data_at(raw, "data/2") + 50), ALL[:2], ALL[2:]
    ),
    "zip, in the directory": Salvage(
        partial(_cut_to, save=_save_zip, at=lambda raw: raw.index(b"PK\x01\x02") + 60), ALL, ()
    ),
    "zip, by one byte": Salvage(partial(_cut_to, save=_save_zip, at=lambda raw: len(raw) - 1), ALL, ()),
    "legacy, before the storages": Salvage(partial(_cut_to, save=save_legacy, at=storages_at), (), ALL),
    "safetensors, before the data": Salvage(
        partial(_cut_to, save=save_safetensors, at=lambda raw: 8 + struct.unpack("<Q", raw[:8])[0]), (), ALL
    ),
    "safetensors, by one byte": Salvage(
        partial(_cut_to, save=save_safetensors, at=lambda raw: len(raw) - 1), ALL[:2], ALL[2:]
    ),
    "shard missing": Salvage(partial(index_file, change=without_shard(SECOND)), ALL[:2], ALL[2:]),
    "shard cut": Salvage(partial(index_file, change=cut_shard), ALL[:2], ALL[2:]),
    "torch shard missing": Salvage(
        partial(index_file, change=without_shard("pytorch_model-00001-of-00002.bin"), suffix=".bin"), ALL[2:], ALL[:2]
    ),
}  # fmt: skip
