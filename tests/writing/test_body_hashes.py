"""Hashes of the bytes behind a safetensors header are kept where they are true, and left out with a note where not."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from command_line import Run
from safetensors import safe_open
from safetensors.torch import save_file


def body_hash(path: Path | str) -> str:
    raw = Path(path).read_bytes()
    return hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()


def stated(path: str) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tensors = {"m.b": torch.ones(3, dtype=torch.float16), "m.a": torch.arange(4), "m.w": torch.rand(2, 3)}
    save_file(tensors, "in.safetensors")
    found = body_hash("in.safetensors")
    more = {"modelspec.title": "T", "modelspec.hash_sha256": f"0x{found}", "sshs_model_hash": found}
    save_file(tensors, "in.safetensors", {**more, "sshs_legacy_hash": "01234567"})
    assert body_hash("in.safetensors") == found
    return tmp_path


@pytest.mark.parametrize(
    "words", [["convert"], ["strip-prefix", "--prefix", "m."], ["rename", "m=net.longer"]], ids=str
)
def test_a_hash_is_kept_where_the_bytes_stay(words: list[str], folder: Path, ckpt: Run) -> None:
    name, *options = words
    ran = ckpt(name, "in.safetensors", "out.safetensors", *options)
    assert ran.status == 0, ran.err
    found = stated("out.safetensors")
    assert found["modelspec.hash_sha256"] == f"0x{body_hash('out.safetensors')}"
    assert found["sshs_model_hash"] == body_hash("out.safetensors")
    assert ("sshs_legacy_hash" in found) == (name == "convert")


@pytest.mark.parametrize("words", [["cast", "--dtype", "bf16"], ["drop", "m.b"], ["drop", "m.a"], ["transpose", "m.w"],
                                   ["convert", "--max-shard-size", "20"]], ids=str)  # fmt: skip
def test_a_hash_that_becomes_false_is_left_out_and_a_note_says_so(words: list[str], folder: Path, ckpt: Run) -> None:
    name, *options = words
    ran = ckpt(name, "in.safetensors", "out.safetensors", *options)
    assert ran.status == 0, ran.err
    assert "modelspec.hash_sha256" in ran.out
    for path in folder.glob("out*.safetensors"):
        found = stated(str(path))
        assert "modelspec.title" in found
        assert not [key for key in found if "hash" in key]


def test_renamed_in_place_the_hash_stays_true(folder: Path, ckpt: Run) -> None:
    assert ckpt("strip-prefix", "in.safetensors", "--prefix", "m.", "--in-place").status == 0
    assert stated("in.safetensors")["modelspec.hash_sha256"] == f"0x{body_hash('in.safetensors')}"
