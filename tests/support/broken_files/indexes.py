"""Indexes of shards that disagree with their shards."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from tables import save_shards

from broken_files.other import LFS
from broken_files.registry import Change, Error, broken, state, written
from ckpt_surgeon import BrokenFile, NotACheckpoint


def index_file(folder: Path, *, change: Change, suffix: str = ".safetensors") -> Path:
    path = save_shards(state(), folder, suffix)
    index = json.loads(path.read_text())
    made = change(index, folder)
    path.write_bytes(made if isinstance(made, bytes) else json.dumps(made).encode())
    return path


def _mapped(**changed: object) -> Change:
    """The index with some of its map changed; None takes a key out."""

    def change(index: dict[str, Any], _: Path) -> object:
        merged = {**index["weight_map"], **{key.replace("__", "."): value for key, value in changed.items()}}
        return {**index, "weight_map": {key: value for key, value in merged.items() if value is not None}}

    return change


def without_shard(name: str) -> Change:
    def change(index: dict[str, Any], folder: Path) -> object:
        (folder / name).unlink()
        return index

    return change


def cut_shard(index: dict[str, Any], folder: Path) -> object:
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    return index


def _pointer_shard(index: dict[str, Any], folder: Path) -> object:
    written(LFS, "model-00001-of-00002.safetensors", folder)
    return index


ONE, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEXES: tuple[tuple[str, Change, tuple[str, ...], Error], ...] = (
    ("shard missing", without_shard(ONE), (f"'{ONE}' is missing", "fetch the missing"), BrokenFile),
    (
        "key in another shard",
        _mapped(a__bias=SECOND),
        ("'a.bias' is not in shard", f"it is in '{ONE}'"),
        BrokenFile,
    ),
    ("key in no shard", _mapped(c=ONE), ("'c' is not in shard", "no shard has it"), BrokenFile),
    ("key that is not listed", _mapped(a__bias=None), ("has 'a.bias' that the index does not list",), BrokenFile),
    ("shard above", _mapped(c="../x.safetensors"), ("outside its directory", "'../x.safetensors'"), BrokenFile),
    ("shard above, hidden", _mapped(c="a/../../x.safetensors"), ("outside its directory",), BrokenFile),
    ("shard at an absolute path", _mapped(c="/etc/passwd"), ("outside its directory", "'/etc/passwd'"), BrokenFile),
    ("shard without a name", _mapped(c=""), ("outside its directory",), BrokenFile),
    ("shard that is a number", _mapped(c=3), ("outside its directory", "a int"), BrokenFile),
    ("shard that is a folder", _mapped(c="."), ("outside its directory",), BrokenFile),
    ("shard with a name too long", _mapped(c="x" * 5000 + ".safetensors"), ("is missing",), BrokenFile),
    ("shard with a NUL in its name", _mapped(c="x\0y.safetensors"), ("\\x00",), BrokenFile),
    ("shard that is the index", _mapped(c="model.safetensors.index.json"), ("names others as its shards",), BrokenFile),
    ("shard cut", cut_shard, (SECOND, "truncated"), BrokenFile),
    ("shard a git-lfs pointer", _pointer_shard, (ONE, "git-lfs pointer", "git lfs pull"), NotACheckpoint),
    ("no weight_map", lambda *_: {"metadata": {}}, ("without a weight_map",), NotACheckpoint),
    ("weight_map a list", lambda *_: {"weight_map": []}, ("without a weight_map",), NotACheckpoint),
    ("no JSON", lambda *_: b'{"weight_map": {', ("is no JSON",), BrokenFile),
    ("no UTF-8", lambda *_: b'{"weight_map": {"\xff": 1}}', ("is no JSON",), BrokenFile),
    ("nested without end", lambda *_: b'{"a":' * 200_000, ("is no JSON",), BrokenFile),
    ("empty map", lambda *_: {"weight_map": {}}, ("no tensor",), NotACheckpoint),
)
for _name, _make, _words, _error in INDEXES:
    broken("index", _name, partial(index_file, change=_make), *_words, error=_error)
TORCH_SECOND = "pytorch_model-00002-of-00002.bin"
broken("index", "torch shard missing", partial(index_file, change=without_shard(TORCH_SECOND), suffix=".bin"),
       f"'{TORCH_SECOND}' is missing")  # fmt: skip
