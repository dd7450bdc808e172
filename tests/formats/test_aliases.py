"""Alias notes of safetensors files are followed where they are notes, and written as safetensors and the hub do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from command_line import Run
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file, save_model

import ckpt_surgeon
from ckpt_surgeon.errors import CheckpointError


@pytest.fixture(scope="module")
def gpt2() -> transformers.GPT2LMHeadModel:
    """GPT-2 with one layer: 17 keys, of which two are one tensor."""
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, n_positions=4, vocab_size=16)
    )
    assert len(model.state_dict()) == 17
    return model


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def _equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_file_that_safetensors_writes_of_a_tied_model_has_all_its_keys(
    gpt2: transformers.GPT2LMHeadModel, tmp_path: Path
) -> None:
    path, out = tmp_path / "model.safetensors", tmp_path / "out.pth"
    save_model(gpt2, str(path))
    assert _metadata(path) == {"transformer.wte.weight": "lm_head.weight"}
    opened = ckpt_surgeon.open(path)
    assert not opened.metadata
    assert opened["transformer.wte.weight"].tie == opened["lm_head.weight"].tie
    for made in (out, tmp_path / "out.safetensors"):
        ckpt_surgeon.convert(path, made)
    state = torch.load(out)
    assert state["transformer.wte.weight"].data_ptr() == state["lm_head.weight"].data_ptr()
    assert _equal(state, gpt2.state_dict())
    assert _equal(load_file(tmp_path / "out.safetensors"), gpt2.state_dict())
    gpt2.load_state_dict(state)
    assert ckpt_surgeon.diff(path, gpt2).loadable


@pytest.mark.parametrize("limit", [10**9, 600])
def test_the_files_that_the_hub_writes_of_a_tied_model_have_all_its_keys(
    limit: int, gpt2: transformers.GPT2LMHeadModel, tmp_path: Path
) -> None:
    save_torch_state_dict(gpt2.state_dict(), tmp_path, max_shard_size=limit)
    assert (tmp_path / "model.safetensors.index.json").exists() == (limit < 10**9)
    assert _equal(ckpt_surgeon.load(tmp_path), gpt2.state_dict())
    ckpt_surgeon.convert(tmp_path, tmp_path / "out.pth")
    assert _equal(torch.load(tmp_path / "out.pth"), gpt2.state_dict())


def test_ties_are_written_as_safetensors_writes_them(
    gpt2: transformers.GPT2LMHeadModel, ckpt: Run, tmp_path: Path
) -> None:
    source, ours, theirs = tmp_path / "tied.pth", tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    torch.save(gpt2.state_dict(), source)
    save_model(gpt2, str(theirs))
    assert ckpt("convert", source, ours, "--ties", "alias").status == 0
    assert _equal(load_file(ours), load_file(theirs))
    assert _metadata(ours) == {"format": "pt", **_metadata(theirs)}
    assert not any(load_model(gpt2, str(ours)))
    assert _equal(ckpt_surgeon.load(ours), gpt2.state_dict())
    ckpt_surgeon.convert(ours, tmp_path / "again.safetensors", ties="alias")
    assert (tmp_path / "again.safetensors").read_bytes() == ours.read_bytes()


def test_ties_of_shards_are_written_as_the_hub_writes_them(gpt2: transformers.GPT2LMHeadModel, tmp_path: Path) -> None:
    hub, out = tmp_path / "hub", tmp_path / "model.safetensors"
    hub.mkdir()
    save_torch_state_dict(gpt2.state_dict(), hub, max_shard_size=600)
    ckpt_surgeon.save(gpt2, out, max_shard_size=600, ties="alias")
    ours, theirs = (json.loads((at / "model.safetensors.index.json").read_text()) for at in (tmp_path, hub))
    assert ours["metadata"] == theirs["metadata"]
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    assert _equal(ckpt_surgeon.load(tmp_path / "model.safetensors.index.json"), gpt2.state_dict())


def test_ties_that_an_edit_keeps_are_written_as_notes_too(
    gpt2: transformers.GPT2LMHeadModel, ckpt: Run, tmp_path: Path
) -> None:
    source, out = tmp_path / "tied.safetensors", tmp_path / "out.safetensors"
    save_model(gpt2, str(source))
    assert ckpt("cast", source, out, "--dtype", "bf16", "--ties", "alias").status == 0
    assert _metadata(out)["transformer.wte.weight"] == "lm_head.weight"
    assert ckpt_surgeon.load(out)["transformer.wte.weight"].dtype == torch.bfloat16
    save_model(torch.nn.ModuleDict({"gpt": gpt2}), str(source))
    assert ckpt("strip-prefix", source, "--prefix", "gpt.", "--in-place").status == 0
    assert _metadata(source) == {"transformer.wte.weight": "lm_head.weight"}
    assert _equal(ckpt_surgeon.load(source), gpt2.state_dict())


TWO = {"fc.weight": torch.ones(2), "bias": torch.zeros(3), "pt": torch.ones(1)}
HOSTILE: list[dict[str, str]] = [
    {"a.weight": "b.weight", "b.weight": "a.weight"},
    {"a.weight": "a.weight"},
    {"a.weight": "b.weight", "b.weight": "c.weight"},
    {"a.weight": "gone.weight"},
    {"fc.weight": "bias"},
    {"fc.weight": "fc.weight"},
    {"bias": "fc.weight"},
    {"format": "pt"},
    {"": "bias"},
    {"author": "bias"},
    {"description": "fc.weight"},
    {"note": "tied to fc.weight"},
    {"a.weight": ""},
    {"a.weight": "['fc.weight']"},
]


@pytest.mark.parametrize("metadata", HOSTILE)
def test_text_that_is_no_alias_adds_no_key_and_stays_what_it_is(metadata: dict[str, str], tmp_path: Path) -> None:
    path, out = tmp_path / "hostile.safetensors", tmp_path / "out.safetensors"
    save_file(TWO, path, metadata=metadata)
    opened = ckpt_surgeon.open(path)
    assert set(opened) == set(TWO)
    assert opened.metadata == metadata
    ckpt_surgeon.convert(path, out)
    assert _metadata(out) == {"format": "pt", **metadata}
    assert _equal(load_file(out), TWO)


def test_a_chain_of_notes_is_followed_for_the_one_whose_name_is_there(tmp_path: Path) -> None:
    save_file(TWO, tmp_path / "a.safetensors", metadata={"b.weight": "a.weight", "a.weight": "fc.weight"})
    opened = ckpt_surgeon.open(tmp_path / "a.safetensors")
    assert set(opened) == {*TWO, "a.weight"}
    assert opened.metadata == {"b.weight": "a.weight"}
    with pytest.raises(
        CheckpointError, match="another name of a tensor: 'b"
    ):  # which would be read as a note once it is written
        ckpt_surgeon.save(TWO, tmp_path / "b.safetensors", metadata={"b.weight": "fc.weight"})


def test_text_that_may_name_a_tensor_is_named(tmp_path: Path) -> None:
    save_file(TWO, tmp_path / "a.safetensors", metadata={"author": "bias"})
    assert any("author = bias" in note for note in ckpt_surgeon.ls(tmp_path / "a.safetensors").notes)


def test_metadata_that_becomes_a_note_by_an_edit_is_not_written(tmp_path: Path) -> None:
    path, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({**TWO, "old.weight": torch.ones(5)}, path, metadata={"old.weight": "fc.weight"})
    ckpt_surgeon.save(ckpt_surgeon.drop(ckpt_surgeon.open(path), "old.weight"), out)
    assert _metadata(out) == {"format": "pt"}
    assert set(ckpt_surgeon.open(out)) == set(TWO)


def test_tensors_that_only_overlap_are_written_each_for_itself(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    state = {
        "a.weight": base,
        "b.weight": base[:3],
        "c.weight": base.view(2, 3),
        "d.weight": base,
        "e.weight": base[:0],
    }
    ckpt_surgeon.save(state, tmp_path / "a.safetensors", ties="alias")
    assert _metadata(tmp_path / "a.safetensors") == {"format": "pt", "d.weight": "a.weight"}
    assert _equal(ckpt_surgeon.load(tmp_path / "a.safetensors"), state)


def test_alias_notes_are_refused_where_no_container_has_them(ckpt: Run, tmp_path: Path) -> None:
    torch.save(TWO, tmp_path / "a.pth")
    refused = ckpt("convert", tmp_path / "a.pth", tmp_path / "b.pth", "--ties", "alias")
    assert refused.status == 2
    assert "--ties" in refused.err
    assert ckpt("convert", tmp_path / "a.pth", tmp_path / "b.pth", "--ties", "alias", "--whole").status == 2
    with pytest.raises(CheckpointError, match="copy, alias"):
        ckpt_surgeon.convert(tmp_path / "a.pth", tmp_path / "b.safetensors", ties="link")
