"""A folder as an output: transformers' from_pretrained is the oracle."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from command_line import Run
from safetensors import safe_open

import ckpt_surgeon
from ckpt_surgeon.errors import EditError, FileError, NotACheckpoint, OutputExists
from ckpt_surgeon.files import moves

SIZES = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as save_pretrained writes it, with what else such folders have."""
    folder = tmp_path_factory.mktemp("hub") / "llama"
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "training_args.bin").write_bytes(b"weights, or worse")
    (folder / ".gitattributes").write_text("")
    (folder / "onnx").mkdir()
    return folder


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """What from_pretrained takes, which must be all that the model asks for."""
    model, info = transformers.LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    state: dict[str, torch.Tensor] = model.state_dict()
    return state


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("size", [None, 1000])
def test_a_folder_with_files_is_what_from_pretrained_loads(hub: Path, tmp_path: Path, size: int | None) -> None:
    plan = ckpt_surgeon.convert(hub, f"{tmp_path}/copy/", max_shard_size=size, with_files=True)
    names = set(os.listdir(tmp_path / "copy"))
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= names
    assert names.isdisjoint({"training_args.bin", ".gitattributes", "onnx"})
    assert ("model.safetensors.index.json" in names) == (size is not None)
    assert_equal(loaded(tmp_path / "copy"), loaded(hub))
    with safe_open(str(plan.shards[0].path), "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert len(ckpt_surgeon.open(tmp_path / "copy")) == len(ckpt_surgeon.open(hub))


def test_what_stays_behind_is_named(hub: Path, tmp_path: Path, ckpt: Run) -> None:
    ran = ckpt("convert", hub, f"{tmp_path}/copy/")
    assert "'config.json', 'generation_config.json', 'tokenizer.json'; copied by --with-files" in ran.out
    assert os.listdir(tmp_path / "copy") == ["model.safetensors"]
    ran = ckpt("cast", hub, tmp_path / "copy", "--dtype", "bf16", "--force", "--with-files")
    assert "left behind" not in ran.out
    assert "config.json says float32, and the weights are bfloat16" in ran.out


def test_a_new_folder_needs_a_slash_and_an_existing_one_does_not(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint, match="copy/ is a folder"):
        ckpt_surgeon.convert(hub, tmp_path / "copy")
    (tmp_path / "copy").mkdir()
    ckpt_surgeon.convert(hub, tmp_path / "copy")
    assert os.listdir(tmp_path / "copy") == ["model.safetensors"]


def test_nothing_in_a_folder_is_replaced_unasked(hub: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.json").write_text("mine")
    with pytest.raises(OutputExists, match=r"config\.json"):
        ckpt_surgeon.convert(hub, copy, with_files=True)
    assert os.listdir(copy) == ["config.json"]
    ckpt_surgeon.convert(hub, copy)
    with pytest.raises(OutputExists, match=r"model\.safetensors"):
        ckpt_surgeon.convert(hub, copy)
    assert (copy / "config.json").read_text() == "mine"
    ckpt_surgeon.convert(hub, copy, with_files=True, force=True)
    assert json.loads((copy / "config.json").read_text())["model_type"] == "llama"


def test_one_file_takes_the_place_of_shards_and_their_index(hub: Path, tmp_path: Path) -> None:
    ckpt_surgeon.convert(hub, f"{tmp_path}/copy/", max_shard_size=1000, with_files=True)
    ckpt_surgeon.convert(hub, f"{tmp_path}/copy/", force=True)
    assert sorted(os.listdir(tmp_path / "copy")) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert_equal(loaded(tmp_path / "copy"), loaded(hub))


def test_a_folder_may_be_its_own_output(hub: Path, tmp_path: Path) -> None:
    ckpt_surgeon.convert(hub, f"{tmp_path}/copy/", with_files=True)
    ckpt_surgeon.convert(tmp_path / "copy", tmp_path / "copy", max_shard_size=1000, force=True)
    assert_equal(loaded(tmp_path / "copy"), loaded(hub))


@pytest.mark.parametrize("size", [None, 1000])
def test_a_failure_leaves_no_folder_behind(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int | None
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(moves, "put_all", full)
    with pytest.raises(FileError, match="no space is left"):
        ckpt_surgeon.convert(hub, f"{tmp_path}/copy/", max_shard_size=size, with_files=True)
    assert os.listdir(tmp_path) == []


def test_links_of_the_hubs_cache_are_copied_as_files(hub: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).symlink_to(hub / name)
    ckpt_surgeon.convert(snapshot, f"{tmp_path}/copy/", with_files=True)
    assert not (tmp_path / "copy" / "config.json").is_symlink()
    assert (tmp_path / "copy" / "config.json").read_bytes() == (hub / "config.json").read_bytes()


def test_other_folders_and_outputs_are_refused(hub: Path, tmp_path: Path) -> None:
    ckpt_surgeon.convert(hub, tmp_path / "there.dcp")
    (tmp_path / "there.dcp").rename(tmp_path / "there")
    with pytest.raises(FileError, match="is a distributed checkpoint"):
        ckpt_surgeon.convert(hub, tmp_path / "there")
    with pytest.raises(EditError, match=r"is no folder: with_files=True copies files into one"):
        ckpt_surgeon.convert(hub, tmp_path / "one.safetensors", with_files=True)
    torch.save({"w": torch.ones(2)}, tmp_path / "alone.pth")
    with pytest.raises(EditError, match=r"alone\.pth has no config\.json beside it"):
        ckpt_surgeon.convert(tmp_path / "alone.pth", f"{tmp_path}/copy/", with_files=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="is a file, and the slash behind it names a folder"):
        ckpt_surgeon.convert(hub, f"{tmp_path}/file/")
    with pytest.raises(FileError, match="does not exist; make it"):
        ckpt_surgeon.convert(hub, f"{tmp_path}/no/copy/")


def test_other_weights_in_the_folder_are_named(hub: Path, tmp_path: Path, ckpt: Run) -> None:
    (tmp_path / "copy").mkdir()
    torch.save({}, tmp_path / "copy" / "pytorch_model.bin")
    ran = ckpt("convert", hub, tmp_path / "copy")
    assert f"other weights are still in {tmp_path}/copy, and not changed: 'pytorch_model.bin'" in ran.out


def test_a_dry_run_lists_the_copies_and_makes_nothing(hub: Path, tmp_path: Path, ckpt: Run) -> None:
    ran = ckpt("convert", hub, f"{tmp_path}/copy/", "--with-files", "--dry-run")
    assert f"would write {tmp_path}/copy/config.json: a copy of {hub}/config.json" in ran.out
    assert os.listdir(tmp_path) == []
    assert ckpt("convert", hub, f"{tmp_path}/x.ckpt", "--whole", "--with-files").status == 2
