"""Damaged tars of torch 0.1 and damaged plain pickles."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from tables import ramp
from unusual_files import TarOf01, TensorKey

from broken_files.registry import broken, patched, written


def _tar_members() -> dict[str, bytes]:
    tar = TarOf01()
    tar.storages = {1: ("FloatStorage", ramp(12))}
    tar.tensors = {2: (1, "FloatTensor", (3, 4), (4, 1), 0)}
    return tar.members({"w": TensorKey(2)})


def _tar(folder: Path, *, change: Callable[[dict[str, bytes]], Mapping[str, bytes]], cut: int | None = None) -> Path:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:") as archive:
        for name, raw in change(_tar_members()).items():
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    return written(out.getvalue()[:cut], "old.pth", folder)


def _tensor(members: dict[str, bytes], at: int, value: int) -> dict[str, bytes]:
    """The member of tensors with one of its last numbers (from the end) changed."""
    raw = members["tensors"]
    return {**members, "tensors": patched(raw, len(raw) + 8 * at, "<q", value)}


def _without(members: dict[str, bytes], name: str) -> dict[str, bytes]:
    return {one: raw for one, raw in members.items() if one != name}


def _replaced(members: dict[str, bytes], **changed: bytes) -> dict[str, bytes]:
    return {**members, **changed}


for _name, _changed, _words in (
    ("offset outside", lambda members: _tensor(members, -1, 5), ("damaged or truncated", "has 48")),
    ("stride outside", lambda members: _tensor(members, -3, 50), ("damaged or truncated", "has 48")),
    ("negative size", lambda members: _tensor(members, -5, -3), ("negative size",)),
    ("storages missing", lambda members: _without(members, "storages"), ("tar archive, but no checkpoint",)),
    ("tensors missing", lambda members: _without(members, "tensors"), ("tar archive, but no checkpoint",)),
    ("pickle missing", lambda members: _without(members, "pickle"), ("tar archive, but no checkpoint",)),
    ("pickle empty", lambda members: _replaced(members, pickle=b""), ("damaged or truncated",)),
    ("pickle names no tensor", lambda members: _replaced(members, pickle=b"\x80\x02U\x0299Q."), ("99",)),
    ("storages empty", lambda members: _replaced(members, storages=b""), ("damaged or truncated",)),
    ("another kind of tar", lambda _: {"a.txt": b"x", "b.txt": b"y"}, ("no checkpoint", "a.txt", "tar -xf")),
):
    broken("tar", _name, partial(_tar, change=_changed), *_words)
for _length in (300, 600, 1600, 2100, 3700):
    broken("tar", f"cut at {_length}", partial(_tar, change=dict, cut=_length), "tar")


# -- plain pickles


def _pickle(folder: Path, *, raw: bytes) -> Path:
    return written(raw, "arrays.pkl", folder)


_ARRAYS = pickle.dumps({"w": np.arange(2000.0), "b": np.arange(3.0)}, 4)
for _name, _raw, _words in (
    ("cut in the head", _ARRAYS[:30], ("truncated or damaged pickle",)),
    ("cut in an array", _ARRAYS[:4000], ("truncated or damaged pickle", "announces")),
    ("cut by one byte", _ARRAYS[:-1], ("truncated or damaged pickle",)),
    ("cut, protocol 0", pickle.dumps({"w": np.arange(3.0)}, 0)[:-20], ("truncated or damaged pickle",)),
    ("cut, protocol 2", pickle.dumps({"w": np.arange(3.0)}, 2)[:-20], ("truncated or damaged pickle",)),
    ("an array too short", _ARRAYS.replace(struct.pack("<BH", 0x4D, 2000), struct.pack("<BH", 0x4D, 2001)),
     ("bytes do not fit its shape",)),
    ("an array of negative size",
     pickle.dumps({"w": np.arange(3.0)}, 2).replace(b"K\x01K\x03\x85", b"K\x01J\xff\xff\xff\xff\x85"),
     ("bytes do not fit its shape",)),
    ("storage that is no save", b"\x80\x02ctorch.storage\n_load_from_bytes\nC\x04abcd\x85R.", ("damaged",)),
    ("storage cut", pickle.dumps(ramp(5000))[:-9000], ("truncated or damaged pickle",)),
    ("tensor without a storage", b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NK\0)))NtR.", ("without a storage",)),
    ("persistent id", b"\x80\x02U\x01aQ.", ("refers to storages",)),
    ("string without quotes", b"(dp0\nSabc\nI1\ns.", ("without its quotes",)),
    ("line without an end", b"(dp0\nS'abc'", ("line without an end",)),
):  # fmt: skip
    broken("pickle", _name, partial(_pickle, raw=_raw), *_words)
