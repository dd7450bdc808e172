"""Containers put together by hand, whose parts need not agree."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

import torch

from broken_files.registry import written


@dataclass(frozen=True)
class Part:
    """A tensor as the pickle announces it, and the storage that it names."""

    numel: object = 12
    offset: object = 0
    size: object = (3, 4)
    stride: object = (4, 1)
    key: object = "0"
    cls: object = torch.FloatStorage
    tag: str = "storage"

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return (
            torch._utils._rebuild_tensor_v2,
            (Saved(self), self.offset, self.size, self.stride, False, OrderedDict()),
        )


@dataclass(frozen=True)
class Saved:
    part: Part


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> object:
        if isinstance(value, Saved):
            return (value.part.tag, value.part.cls, value.part.key, "cpu", value.part.numel)
        return None


def pickled(value: object, protocol: int = 2) -> bytes:
    out = io.BytesIO()
    _Pickler(out, protocol).dump(value)
    return out.getvalue()


def zip_of(folder: Path, raw: bytes, records: Mapping[str, bytes], name: str = "model.pth") -> Path:
    path = folder / name
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", raw)
        archive.writestr("archive/byteorder", b"little")
        for key, data in records.items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", b"3\n")
    return path


def foreign_zip(folder: Path, *, records: Mapping[str, bytes]) -> Path:
    path = folder / "model.pth"
    with zipfile.ZipFile(path, "w") as archive:
        for name, raw in records.items():
            archive.writestr(name, raw)
    return path


def legacy_of(value: object, storages: Mapping[str, bytes], *, protocol: int = 1001, keys: object = None) -> bytes:
    """A legacy file by hand; a storage's bytes begin with their count."""
    raw = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(protocol, 2)
    raw += pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, 2)
    return (
        raw
        + pickled_legacy(value)
        + pickle.dumps(list(storages) if keys is None else keys, 2)
        + b"".join(storages.values())
    )


class _LegacyPickler(pickle.Pickler):
    def persistent_id(self, value: object) -> object:
        if isinstance(value, Saved):
            return (value.part.tag, value.part.cls, value.part.key, "cpu", value.part.numel, None)
        return None


def pickled_legacy(value: object) -> bytes:
    out = io.BytesIO()
    _LegacyPickler(out, 2).dump(value)
    return out.getvalue()


def counted(count: int, nbytes: int) -> bytes:
    return struct.pack("<q", count) + bytes(nbytes)


def safetensors_of(header: object, data: bytes = bytes(16)) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def safetensors_file(folder: Path, *, raw: bytes) -> Path:
    return written(raw, "model.safetensors", folder)


def unnamed_file(folder: Path, *, raw: bytes) -> Path:
    return written(raw, "model.bin", folder)


def tar_of(members: dict[str, bytes], name: str, folder: Path) -> Path:
    """A tar of plain files, as torch 0.1 wrote them."""
    path = folder / name
    with tarfile.open(path, "w:", format=tarfile.USTAR_FORMAT) as archive:
        for member, raw in members.items():
            info = tarfile.TarInfo(member)
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    return path
