"""Bytes that nobody meant: whatever is done to a small valid file, only a CheckpointError comes out of a reader.

CKPT_FUZZ_SECONDS=600 runs for longer than the minute that is usual.
"""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import time
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ckpt_surgeon
from ckpt_surgeon import CheckpointError

SECONDS = float(os.environ.get("CKPT_FUZZ_SECONDS", "70"))


def _state() -> dict[str, torch.Tensor]:
    return {"fc.weight": torch.arange(6.0).reshape(2, 3), "fc.bias": torch.zeros(2), "steps": torch.tensor(3)}


def _saved(value: object, *, zipped: bool = True) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, _use_new_zipfile_serialization=zipped)
    return out.getvalue()


def _deflated() -> bytes:
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(_saved(_state()))) as given_zip,
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as made,
    ):
        for name in given_zip.namelist():
            made.writestr(name, given_zip.read(name))
    return out.getvalue()


def _tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:") as archive:
        for name, value in (("storages", 0), ("tensors", 0), ("pickle", {"a": 1})):
            raw = pickle.dumps(value, 2) + (pickle.dumps([], 2) if name == "storages" else b"")
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    return out.getvalue()


def _index() -> bytes:
    return b'{"metadata": {"total_size": 4}, "weight_map": {"a": "m-00001-of-00001.safetensors"}}'


SEEDS: dict[str, Callable[[], bytes]] = {
    "zip": lambda: _saved(_state()),
    "whole module": lambda: _saved(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))),
    "deflated zip": _deflated,
    "legacy": lambda: _saved(_state(), zipped=False),
    "safetensors": lambda: safetensors.torch.save(_state(), {"format": "pt"}),
    "pickle of arrays": lambda: pickle.dumps({"a": np.arange(6.0), "b": np.ones((2, 2), "f4")}, 4),
    "pickle of tensors": lambda: pickle.dumps(_state(), 2),
    "text pickle": lambda: pickle.dumps({"a": np.arange(3.0), "b": [1, 2.5, "x"]}, 0),
    "tar": _tar,
    "index": _index,
}

seed = cache(lambda name: SEEDS[name]())

EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "repeat", "overwrite"]),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=12),
    ),
    max_size=6,
)


def damaged(raw: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    """The bytes after some edits, each at a place between the beginning (0) and the end (1)."""
    made = bytearray(raw)
    for kind, place, extra in edits:
        at = int(place * len(made))
        if kind == "flip" and made:
            made[at] ^= extra[0] or 1
        elif kind == "cut":
            del made[at : at + extra[0] if extra[0] < 200 else None]
        elif kind == "insert":
            made[at:at] = extra
        elif kind == "repeat":
            made[at:at] = made[at : at + extra[0]]
        else:
            made[at : at + len(extra)] = extra
    return bytes(made)


def read_all(path: Path) -> None:
    """Everything that a reader does for a file: open, list, read the bytes, name the globals."""
    for attempt in (
        lambda: ckpt_surgeon.ls(path, check=True, all=True),
        lambda: ckpt_surgeon.ls(path, salvage=True),
        lambda: ckpt_surgeon.hash(path),
        lambda: ckpt_surgeon.scan(path),
    ):
        try:
            attempt()
        except CheckpointError as error:
            assert "\n" not in str(error)  # noqa: PT017 (any of the attempts may raise)


@pytest.mark.parametrize("name", SEEDS)
def test_a_damaged_file_is_an_error_and_never_a_crash(name: str, tmp_path: Path) -> None:
    path = tmp_path / "damaged.bin"
    path.write_bytes(seed(name))
    read_all(path)
    stop = time.monotonic() + SECONDS / len(SEEDS)

    @settings(max_examples=1_000_000 if SECONDS > 70 else 3000, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(EDITS)
    def damage(edits: list[tuple[str, float, bytes]]) -> None:
        if time.monotonic() < stop:
            path.write_bytes(damaged(seed(name), edits))
            read_all(path)

    damage()


@settings(max_examples=400, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(
        [
            b"",
            b"PK\x03\x04",
            b"\x80\x02",
            b"\x80\x04\x95",
            b"(dp0\n",
            b"\x10\0\0\0\0\0\0\0{",
            b'{"weight_map": {',
            b"ctorch\n",
        ]
    ),
    st.binary(max_size=300),
)
def test_any_bytes_behind_any_beginning_are_an_error_and_never_a_crash(
    tmp_path_factory: pytest.TempPathFactory, beginning: bytes, rest: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "anything.bin"
    path.write_bytes(beginning + rest)
    read_all(path)
