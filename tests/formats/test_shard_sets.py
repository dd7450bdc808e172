"""Shards without an index are one checkpoint where they are complete, and ckpt index writes the index of the hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from command_line import Run
from huggingface_hub import save_torch_state_dict, split_torch_state_dict_into_shards
from tables import StateDict, assert_same, ramp

import ckpt_surgeon
from ckpt_surgeon.errors import BrokenFile, FileError, NotACheckpoint, OutputExists

STEMS = {"model": ".safetensors", "diffusion_pytorch_model": ".safetensors", "pytorch_model": ".bin", "mine": ".pth"}


def weights() -> StateDict:
    return {f"layers.{index}.weight": ramp(4, index + 1) for index in range(3)} | {"bias": ramp(5)}


def shards(folder: Path, parts: list[StateDict], stem: str = "model", suffix: str = ".safetensors") -> list[Path]:
    """Shards of these tensors, without an index."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{stem}-{number:05d}-of-{len(parts):05d}{suffix}" for number in range(1, len(parts) + 1)]
    for path, part in zip(paths, parts, strict=True):
        safetensors.torch.save_file(part, path) if suffix == ".safetensors" else torch.save(part, path)
    return paths


def split(state: StateDict, count: int) -> list[StateDict]:
    keys = list(state)
    return [{key: state[key] for key in keys[number::count]} for number in range(count)]


@pytest.mark.parametrize(("stem", "suffix"), STEMS.items())
def test_a_complete_set_is_one_checkpoint_by_its_folder_or_any_one_of_its_files(
    stem: str, suffix: str, tmp_path: Path
) -> None:
    paths = shards(tmp_path / "set", split(weights(), 3), stem, suffix)
    for named in (tmp_path / "set", *paths):
        assert_same(dict(ckpt_surgeon.load(named)), weights(), order=False)
    assert any("ckpt index" in note for note in ckpt_surgeon.ls(paths[1]).notes)


def test_files_of_a_training_beside_a_set_do_not_hide_it(tmp_path: Path) -> None:
    shards(tmp_path, split(weights(), 2))
    torch.save({"lr": 0.1}, tmp_path / "training_args.bin")
    torch.save(torch.optim.SGD([torch.nn.Parameter(ramp(2))]).state_dict(), tmp_path / "optimizer.pt")
    assert_same(dict(ckpt_surgeon.load(tmp_path)), weights(), order=False)


def test_a_set_in_both_containers_is_read_as_safetensors(tmp_path: Path) -> None:
    shards(tmp_path, split(weights(), 2))
    shards(tmp_path, split(weights(), 3), "pytorch_model", ".bin")
    assert ckpt_surgeon.open(tmp_path).container == "safetensors, 2 shards"
    assert ckpt_surgeon.open(tmp_path / "pytorch_model-00002-of-00003.bin").container == "torch zip, 3 shards"


@pytest.mark.parametrize(
    ("gone", "said"), [((2,), "number 2 is missing"), ((1, 2, 3, 6), "numbers 1–3, 6 are missing")]
)
def test_a_set_that_is_not_complete_is_refused_with_the_missing_numbers(
    gone: tuple[int, ...], said: str, ckpt: Run, tmp_path: Path
) -> None:
    state = {f"w{index}": ramp(2) for index in range(6)}
    folder = tmp_path / "set"
    paths = shards(folder, split(state, 6))
    for number in gone:
        paths[number - 1].unlink()
    for named in (folder, paths[4]):
        with pytest.raises(BrokenFile, match=f"is one of 6 shards, of which {said}"):
            ckpt_surgeon.open(named)
    with pytest.raises(BrokenFile, match=said):
        ckpt_surgeon.write_index(folder)
    refused = ckpt("convert", folder, tmp_path / "out.pth")
    assert "--salvage" in refused.err
    assert ckpt("convert", folder, tmp_path / "out.pth", "--salvage").status == 0
    kept = {key: tensor for index, (key, tensor) in enumerate(state.items()) if index + 1 not in gone}
    assert_same(torch.load(tmp_path / "out.pth"), kept)


def test_a_key_that_two_shards_have_is_an_error_that_names_both(tmp_path: Path) -> None:
    """As in the parts of a tensor-parallel model, where each file has all keys."""
    paths = shards(tmp_path / "set", [weights(), weights()], "model", ".pth")
    for act in (ckpt_surgeon.open, ckpt_surgeon.write_index):
        with pytest.raises(BrokenFile) as refused:
            act(tmp_path / "set")
        assert "'layers.0.weight' is in 'model-00001-of-00002.pth' and in 'model-00002-of-00002.pth'" in str(
            refused.value
        )
    assert not list((tmp_path / "set").glob("*.json"))
    assert all(path.exists() for path in paths)


@pytest.mark.parametrize("names", [("consolidated.00.pth", "consolidated.01.pth"), ("a-1-of-2.pth", "a-2-of-2.pth")])
def test_other_numbered_files_are_no_set(names: tuple[str, str], tmp_path: Path) -> None:
    for name, part in zip(names, split(weights(), 2), strict=True):
        torch.save(part, tmp_path / name)
    with pytest.raises(NotACheckpoint, match="2 checkpoints"):
        ckpt_surgeon.open(tmp_path)
    assert len(ckpt_surgeon.open(tmp_path / names[0])) == 2
    with pytest.raises(FileError, match="has no shards"):
        ckpt_surgeon.write_index(tmp_path)


def test_a_shard_that_an_index_lists_is_read_by_itself(tmp_path: Path) -> None:
    paths = shards(tmp_path, split(weights(), 2))
    ckpt_surgeon.write_index(tmp_path)
    assert list(ckpt_surgeon.open(paths[0])) == list(split(weights(), 2)[0])
    assert_same(dict(ckpt_surgeon.load(tmp_path)), weights(), order=False)


def test_keys_of_a_set_are_not_renamed_in_place(ckpt: Run, tmp_path: Path) -> None:
    paths = shards(tmp_path / "set", split(weights(), 2))
    before = [path.read_bytes() for path in paths]
    for named in (tmp_path / "set", paths[0]):
        refused = ckpt("rename", named, "bias=b", "--in-place")
        assert refused.status == 2
        assert "is one of 2 shards, which cannot change in one step" in refused.err
    assert [path.read_bytes() for path in paths] == before


# -- the index


@pytest.mark.parametrize("is_safe", [True, False])
def test_the_index_is_the_one_that_the_hub_writes(is_safe: bool, tmp_path: Path) -> None:
    state = weights()
    save_torch_state_dict(state, tmp_path, max_shard_size=60, safe_serialization=is_safe)
    (index,) = tmp_path.glob("*.index.json")
    wanted = json.loads(index.read_text())
    index.unlink()
    made = ckpt_surgeon.write_index(tmp_path)
    assert made == index
    found = json.loads(made.read_text())
    assert found["weight_map"] == wanted["weight_map"]
    plan = split_torch_state_dict_into_shards(state, max_shard_size=60)
    assert found["metadata"]["total_size"] == plan.metadata["total_size"] == sum(map(nbytes, state.values()))


def nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def test_an_index_is_replaced_with_force_alone_and_a_stale_one_is_mended(ckpt: Run, tmp_path: Path) -> None:
    shards(tmp_path, split(weights(), 2))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"gone": "model-00001-of-00002.safetensors"}}))
    stale = ckpt("ls", tmp_path)
    assert (stale.status, f"ckpt index {tmp_path} --force" in stale.err) == (2, True)
    refused = ckpt("index", tmp_path)
    assert (refused.status, "--force" in refused.err, "gone" in index.read_text()) == (2, True, True)
    with pytest.raises(OutputExists):
        ckpt_surgeon.write_index(tmp_path)
    assert "4 tensors in 2 shards" in ckpt("index", tmp_path, "--force").out
    assert_same(dict(ckpt_surgeon.load(tmp_path)), weights(), order=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]


def test_several_sets_in_a_folder_are_told_apart_by_naming_a_shard(tmp_path: Path) -> None:
    shards(tmp_path, split(weights(), 2), "raw")
    shards(tmp_path, split(weights(), 2), "ema")
    with pytest.raises(FileError, match="has 2 sets of shards; name a shard of one"):
        ckpt_surgeon.write_index(tmp_path)
    with pytest.raises(NotACheckpoint, match="4 checkpoints"):
        ckpt_surgeon.open(tmp_path)
    assert ckpt_surgeon.write_index(tmp_path / "ema-00002-of-00002.safetensors").name == "ema.safetensors.index.json"
    assert_same(dict(ckpt_surgeon.load(tmp_path / "raw-00001-of-00002.safetensors")), weights(), order=False)


def test_module_versions_of_torch_shards_are_kept(tmp_path: Path) -> None:
    state = torch.nn.BatchNorm1d(3).state_dict()
    first = torch.nn.Sequential(torch.nn.BatchNorm1d(3)).state_dict()
    second = {f"1.{key}": value for key, value in state.items()}
    shards(tmp_path, [first, second], "pytorch_model", ".bin")
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3))
    model.load_state_dict(ckpt_surgeon.load(tmp_path), strict=True)
    versions = ckpt_surgeon.open(tmp_path).versions
    assert versions is not None
    assert versions["0"] == {"version": 2}


def test_shards_beside_one_whole_file_are_named_and_not_read(tmp_path: Path) -> None:
    shards(tmp_path, split(weights(), 2))
    safetensors.torch.save_file({"other": ramp(2)}, tmp_path / "model.safetensors")
    listing = ckpt_surgeon.ls(tmp_path)
    assert list(listing.tensors) == ["other"]
    assert any("not read: 'model-00001-of-00002.safetensors'" in note for note in listing.notes)


def test_a_training_folder_whose_shards_have_no_index_is_edited_whole(ckpt: Run, tmp_path: Path) -> None:
    folder, out = tmp_path / "run", tmp_path / "out"
    shards(folder, split({f"module.{key}": tensor for key, tensor in weights().items()}, 2))
    model = [torch.nn.Parameter(tensor) for tensor in weights().values()]
    torch.save(torch.optim.SGD(model, lr=0.1).state_dict(), folder / "optimizer.pt")
    ran = ckpt("strip-prefix", folder, out, "--whole")
    assert ran.status == 0, ran.err
    assert_same(dict(ckpt_surgeon.load(out)), weights(), order=False)
    assert torch.load(out / "optimizer.pt")["param_groups"][0]["lr"] == 0.1
