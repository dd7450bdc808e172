"""The tar of torch 0.1."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
from collections import OrderedDict
from functools import partial
from pathlib import Path

import torch
from tables import elements, ramp

from unusual_files.registry import UnusualFile, unusual


class TarOf01:
    """Writes the tar of torch 0.1: storages, tensors, and the object with keys in place of tensors."""

    def __init__(self) -> None:
        self.storages: dict[int, tuple[str, torch.Tensor]] = {}
        self.views: list[tuple[int, int, int, int]] = []
        self.tensors: dict[int, tuple[int, str, tuple[int, ...], tuple[int, ...], int]] = {}

    def members(self, value: object) -> dict[str, bytes]:
        out = {"sys_info": pickle.dumps({"protocol_version": 1000, "little_endian": True, "type_sizes": {}}, 2)}
        raw = pickle.dumps(len(self.storages), 2)
        for key, (cls, tensor) in self.storages.items():
            raw += _triple(key, "cpu", cls) + struct.pack("<q", tensor.numel()) + elements(tensor)
        out["storages"] = raw + pickle.dumps(self.views, 2)
        raw = pickle.dumps(len(self.tensors), 2)
        for key, (storage, cls, size, stride, offset) in self.tensors.items():
            raw += _triple(key, storage, cls) + struct.pack("<ii", len(size), 0)
            raw += struct.pack(f"<{2 * len(size) + 1}q", *size, *stride, offset)
        out["tensors"] = raw
        file = io.BytesIO()
        _KeyPickler(file, 2).dump(value)
        out["pickle"] = file.getvalue()
        return out

    def write(self, path: Path, value: object, *, form: int = tarfile.PAX_FORMAT) -> Path:
        with tarfile.open(path, "w:", format=form) as archive:
            for name, raw in self.members(value).items():
                info = tarfile.TarInfo(name)
                info.size = len(raw)
                archive.addfile(info, io.BytesIO(raw))
        return path


class TensorKey(int):
    """Stands for a tensor in the object."""


class _KeyPickler(pickle.Pickler):
    def persistent_id(self, value: object) -> object:
        return str(int(value)) if isinstance(value, TensorKey) else None


def _triple(key: int, second: object, cls: str) -> bytes:
    return pickle.dumps((key, second, getattr(torch, cls)), 2)


def _tar(folder: Path, *, form: int) -> UnusualFile:
    tar = TarOf01()
    tar.storages = {
        101: ("FloatStorage", ramp(12)),
        202: ("LongStorage", torch.arange(4)),
        303: ("HalfStorage", ramp(3).half()),
    }
    tar.views = [(404, 101, 4, 6)]
    tar.tensors = {
        1: (101, "FloatTensor", (3, 4), (4, 1), 0),
        2: (101, "FloatTensor", (4, 3), (1, 4), 0),
        3: (202, "LongTensor", (3,), (1,), 1),
        4: (404, "FloatTensor", (2, 2), (2, 1), 1),
        5: (303, "HalfTensor", (3,), (1,), 0),
    }  # fmt: skip
    value = OrderedDict([("a.weight", TensorKey(1)), ("a.weight_t", TensorKey(2)), ("steps", TensorKey(3)),
                         ("view", TensorKey(4)), ("half", TensorKey(5))])  # fmt: skip
    path = tar.write(folder / "old.pth", value, form=form)
    state = torch.load(path, weights_only=False)
    return UnusualFile(path, state, ties=False)  # torch gives views of storages storages of their own


unusual("torch 0.1", "tar")(partial(_tar, form=tarfile.PAX_FORMAT))
unusual("torch 0.1", "tar of GNU's kind")(partial(_tar, form=tarfile.GNU_FORMAT))
