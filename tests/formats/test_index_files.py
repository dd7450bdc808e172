"""Index files that name what no index may name are refused, as huggingface_hub refuses them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from huggingface_hub import load_torch_model
from safetensors.torch import save_file

import ckpt_surgeon
from ckpt_surgeon.errors import BrokenFile

SAFE, BIN = "model.safetensors.index.json", "pytorch_model.bin.index.json"
REFUSED = [
    (SAFE, "model.bin"), (SAFE, "model.safetensors.bin"), (SAFE, "model.SAFETENSORS"), (SAFE, "model"),
    (BIN, "model.safetensors"), (SAFE, "/tmp/model.safetensors"), (SAFE, "../model.safetensors"),
    (SAFE, "sub/../../model.safetensors"), (SAFE, "..\\model.safetensors"), (SAFE, "sub\\..\\model.safetensors"),
    (SAFE, "\\model.safetensors"), (SAFE, "C:model.safetensors"), (SAFE, "C:\\model.safetensors"),
    (SAFE, "C:/model.safetensors"), (SAFE, "\\\\server\\share\\model.safetensors"),
    (SAFE, "//server/share/m.safetensors"), (BIN, "a:b.bin"), (SAFE, ""), (SAFE, "."), (SAFE, ".."),
    (SAFE, 3), (SAFE, None), (SAFE, ["model.safetensors"]),
    (SAFE, {"file": "model.safetensors"}), (SAFE, True),
]  # fmt: skip

# What the hub leaves to the file system of the day.
OURS_ALONE = [
    (SAFE, "sub\\model.safetensors"), (SAFE, "s3://bucket/model.safetensors"), (SAFE, "https://host/model.safetensors"),
    (SAFE, "file:///tmp/model.safetensors"), (SAFE, "zip::model.safetensors"), (SAFE, "model\0.safetensors"),
    (SAFE, "model\n.safetensors"), (SAFE, "model\u202e.safetensors"), (SAFE, "model\ud800.safetensors"),
]  # fmt: skip


def _index(folder: Path, name: str, shard: object) -> Path:
    for there in ("model.safetensors", "sub/model.safetensors", "model.bin"):
        (folder / there).parent.mkdir(exist_ok=True)
        if there.endswith(".bin"):
            torch.save({"w": torch.ones(2)}, folder / there)
        else:
            save_file({"w": torch.ones(2)}, folder / there)
    path = folder / name
    path.write_text(json.dumps({"metadata": {}, "weight_map": {"w": shard}}))
    return path


@pytest.mark.parametrize(("name", "shard"), REFUSED)
def test_shards_that_the_hub_refuses_are_refused(name: str, shard: object, tmp_path: Path) -> None:
    path = _index(tmp_path, name, shard)
    pattern = name.replace(".index.json", "").replace(".", "{suffix}.", 1)
    with pytest.raises((ValueError, OSError, TypeError)):
        load_torch_model(torch.nn.Module(), tmp_path, filename_pattern=pattern, safe=False, strict=False)
    with pytest.raises(BrokenFile, match="names"):
        ckpt_surgeon.open(path)


@pytest.mark.parametrize(("name", "shard"), OURS_ALONE)
def test_shards_with_names_that_no_hub_writes_are_refused(name: str, shard: str, tmp_path: Path) -> None:
    with pytest.raises(BrokenFile, match="names shards outside"):
        ckpt_surgeon.open(_index(tmp_path, name, shard))


@pytest.mark.parametrize("kind", ["folder", "loop", "nothing", "fifo"])
def test_a_shard_that_is_no_file_is_missing(kind: str, tmp_path: Path) -> None:
    path, shard = _index(tmp_path, SAFE, "other.safetensors"), tmp_path / "other.safetensors"
    if kind == "folder":
        shard.mkdir()
    elif kind == "loop":
        shard.symlink_to(shard.name)
    elif kind == "fifo":
        os.mkfifo(shard)
    with pytest.raises(BrokenFile, match="is missing"):
        ckpt_surgeon.open(path)


def test_shards_below_the_folder_and_links_out_of_it_are_read_as_the_hubs_cache_has_them(tmp_path: Path) -> None:
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for shard in ("model.safetensors", "sub/model.safetensors"):
        assert list(ckpt_surgeon.open(_index(folder, SAFE, shard))) == ["w"]
    save_file({"w": torch.ones(3)}, tmp_path / "blob")
    (folder / "model-00001-of-00001.safetensors").symlink_to("../blob")
    assert ckpt_surgeon.open(_index(folder, SAFE, "model-00001-of-00001.safetensors"))["w"].shape == (3,)


@pytest.mark.parametrize("header", ['  \n\t{"__metadata__":null,', '{"__metadata__":{},', "\r\n {"])
def test_white_space_and_empty_metadata_in_a_header_are_read_as_safetensors_reads_them(
    header: str, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    text = (header + '"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}').encode()
    path = tmp_path / "spaced.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + torch.ones(2).numpy().tobytes())
    assert torch.equal(load_file(path)["w"], torch.ones(2))
    assert torch.equal(ckpt_surgeon.load(path)["w"], torch.ones(2))
