"""--provenance: every hash that it notes is computed again here, from the files alone."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Run
from safetensors import safe_open

from ckpt_surgeon import Recipe


def sha256(path: Path | str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def tensors_hash(state: dict[str, torch.Tensor]) -> str:
    """The hash that ckpt hash documents, by torch alone."""
    whole = hashlib.sha256()
    for key, value in sorted(state.items()):
        dtype = str(value.dtype).removeprefix("torch.")
        raw = value.contiguous().view(torch.uint8) if value.ndim else value.reshape(1).view(torch.uint8)
        found = hashlib.sha256(f"{dtype} {list(value.shape)}\n".encode() + raw.numpy().tobytes()).hexdigest()
        whole.update(f"{key}\0{found}\n".encode())
    return whole.hexdigest()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save({f"module.{name}": torch.rand(4, 3) for name in "abcd"}, "in.pth")
    return tmp_path


CASES = [
    (["cast", "in.pth", "out.safetensors", "--dtype", "bf16"], "out.safetensors", ["."]),
    (["convert", "in.pth", "out.pth"], "out.pth", ["."]),
    (["edit", "in.pth", "out.safetensors", "--strip-prefix", "module.", "--max-shard-size", "100"], "out.safetensors", [
        f"out-0000{n}-of-00002.safetensors" for n in (1, 2)] + ["out.safetensors.index.json"]),
]  # fmt: skip


@pytest.mark.parametrize(("words", "out", "names"), CASES, ids=lambda value: value[0] if type(value) is list else None)
def test_every_hash_of_the_statement_is_that_of_a_file(
    words: list[str], out: str, names: list[str], folder: Path, ckpt: Run
) -> None:
    ran = ckpt(*words, "--provenance")
    assert ran.status == 0, ran.err
    statement: dict[str, Any] = json.loads(Path(f"{out}.intoto.json").read_text())
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://model_signing/signature/v1.0"
    [subject], predicate = statement["subject"], statement["predicate"]
    resources = predicate["resources"]
    assert [one["name"] for one in resources] == names
    assert [one["digest"] for one in resources] == [sha256(out if name == "." else name) for name in names]
    joined = b"".join(bytes.fromhex(one["digest"]) for one in resources)
    assert subject == {"name": out, "digest": {"sha256": hashlib.sha256(joined).hexdigest()}}
    own = predicate["ckpt_surgeon"]
    assert own["sources"] == [{"name": "in.pth", "sha256": sha256("in.pth")}]
    assert Recipe.loads(own["recipe"]).digest == own["recipe_sha256"]
    state: dict[str, torch.Tensor] = {}
    for path in folder.glob("out*.safetensors"):
        with safe_open(str(path), "pt") as file:
            state |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            header = file.metadata()
        assert header["ckpt_surgeon.result"] == f"sha256:{own['result']}"
        assert header["ckpt_surgeon.recipe"] == f"sha256:{own['recipe_sha256']}"
        assert header["ckpt_surgeon.recipe_toml"] == own["recipe"]
        assert json.loads(header["ckpt_surgeon.sources"]) == own["sources"]
    assert own["result"] == tensors_hash(state or torch.load(out))


def test_a_statement_is_replaced_only_by_force_and_not_written_where_it_cannot_be(folder: Path, ckpt: Run) -> None:
    Path("out.pth.intoto.json").write_text("mine")
    ran = ckpt("convert", "in.pth", "out.pth", "--provenance")
    assert (ran.status, Path("out.pth").exists()) == (2, False)
    assert "exists already" in ran.err
    assert ckpt("convert", "in.pth", "out.pth", "--provenance", "--force").status == 0
    assert Path("out.pth.intoto.json").read_text() != "mine"
    refused = ckpt("convert", "in.pth", "whole.pth", "--provenance", "--whole")
    assert (refused.status, "--provenance" in refused.err) == (2, True)
    assert ckpt("strip-prefix", "in.pth", "--in-place", "--provenance").status == 2
