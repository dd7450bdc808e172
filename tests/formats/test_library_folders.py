"""Folders and zips of libraries around files of torch.save: accelerate's, SpeechBrain's, Stable-Baselines3's.

``fixtures/libraries`` was made by the libraries (fixtures/make_libraries.py).
"""

from __future__ import annotations

import shutil
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from command_line import Run
from tables import assert_same, ramp
from torch.distributed.checkpoint.state_dict_saver import save

import ckpt_surgeon
from ckpt_surgeon.errors import BrokenFile, CheckpointError, NotACheckpoint, SelectionError

MADE = Path(__file__).parents[2] / "fixtures" / "libraries"
STEP = MADE / "speechbrain" / "CKPT+one"

# -- accelerate


def sharded_training(folder: Path, models: int = 1) -> Path:
    for number in range(models):
        with warnings.catch_warnings(action="ignore"):
            save({"model": {"w": ramp(3, 2)}}, checkpoint_id=folder / f"pytorch_model_fsdp_{number}")
            save({"optimizer": {"state": {}}}, checkpoint_id=folder / f"optimizer_{number}")
    torch.save({"last_epoch": 3}, folder / "scheduler.bin")
    (folder / "random_states_0.pkl").write_bytes(b"")
    return folder


def test_the_folder_of_a_sharded_training_is_its_model(ckpt: Run, tmp_path: Path) -> None:
    folder, out = sharded_training(tmp_path / "state"), tmp_path / "out.safetensors"
    assert_same(dict(ckpt_surgeon.load(folder)), {"w": ramp(3, 2)})
    assert ckpt("convert", folder, out).status == 0
    assert "pytorch_model_fsdp_0" in ckpt("ls", folder).out


def test_several_models_are_asked_about(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint, match="has 2 models of accelerate's; name one: 'pytorch_model_fsdp_0'"):
        ckpt_surgeon.open(sharded_training(tmp_path / "state", models=2))


def test_whole_weights_beside_are_what_the_folder_means(tmp_path: Path) -> None:
    folder = sharded_training(tmp_path / "state")
    torch.save({"v": ramp(2)}, folder / "pytorch_model.bin")
    assert list(ckpt_surgeon.open(folder)) == ["v"]


# -- SpeechBrain


@pytest.mark.parametrize("folder", [STEP, STEP.parent])
def test_a_folder_of_speechbrains_has_an_entry_for_each_file(folder: Path, ckpt: Run) -> None:
    opened = ckpt_surgeon.open(folder)
    assert_same(dict(ckpt_surgeon.load(opened)), torch.load(STEP / "model.ckpt"))
    assert opened.value("counter") == "1"
    shown = ckpt("ls", "--training", folder).out
    assert "looks like Adam, 1 group, 2 parameters" in shown
    slots = ckpt_surgeon.load(ckpt_surgeon.open(folder, select="optimizer"))
    assert torch.equal(slots["state.0.exp_avg"], torch.load(STEP / "optimizer.ckpt")["state"][0]["exp_avg"])


def test_several_modules_and_several_checkpoints_are_asked_about(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(STEP, tmp_path / "CKPT+one"))
    torch.save({"w": ramp(2)}, folder / "embedding_model.ckpt")
    with pytest.raises(SelectionError, match="select='embedding_model'"):
        ckpt_surgeon.open(folder)
    shutil.copytree(STEP, tmp_path / "CKPT+two")
    with pytest.raises(NotACheckpoint, match=r"2 checkpoints of SpeechBrain's; name one: 'CKPT\+one', 'CKPT\+two'"):
        ckpt_surgeon.open(tmp_path)


def test_what_is_no_file_of_torch_save_is_named_and_what_is_damaged_is_an_error(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(STEP, tmp_path / "CKPT+one"))
    (folder / "tokenizer.ckpt").write_bytes(b"\xff\xfe" * 4000)
    assert any("no files of torch.save, not read: 'tokenizer.ckpt'" in one for one in ckpt_surgeon.open(folder).notes)
    (folder / "model.ckpt").write_bytes((STEP / "model.ckpt").read_bytes()[:-300])
    with pytest.raises(BrokenFile, match=r"model\.ckpt"):
        ckpt_surgeon.open(folder)


# -- Stable-Baselines3


def test_the_policy_in_a_zip_is_its_state_dict(ckpt: Run, tmp_path: Path) -> None:
    out = tmp_path / "out.pth"
    expected = torch.load(MADE / "ppo_policy.pth")
    assert_same(dict(ckpt_surgeon.load(MADE / "ppo.zip")), expected)
    assert ckpt("convert", MADE / "ppo.zip", out).status == 0
    assert_same(torch.load(out), expected)
    slots = ckpt_surgeon.load(ckpt_surgeon.open(MADE / "ppo.zip", select="policy.optimizer"))
    assert len(slots) == 24


def changed(to: Path, method: int, **members: bytes) -> Path:
    """The zip written anew, some members replaced."""
    with zipfile.ZipFile(MADE / "ppo.zip") as old, zipfile.ZipFile(to, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, members.get(name.replace(".", "_"), old.read(name)))
    return to


def test_a_policy_that_is_compressed_is_to_be_unpacked(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint, match=r"'.*pth' is compressed; unpack it \(unzip\) and give"):
        ckpt_surgeon.open(changed(tmp_path / "a.zip", zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize("raw", [b"", b"PK\x03\x04", b"nothing", b"PK\x03\x04" + bytes(500)])
def test_a_policy_that_is_no_zip_of_torchs_is_refused(raw: bytes, ckpt: Run, tmp_path: Path) -> None:
    path = changed(tmp_path / "a.zip", zipfile.ZIP_STORED, policy_pth=raw)
    with pytest.raises(CheckpointError):
        ckpt_surgeon.open(path)
    ran = ckpt("ls", path)
    assert (ran.status, ran.out, ran.err.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("keep", [100, 5000, 15_000, 23_000])
def test_a_truncated_zip_is_refused(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes((MADE / "ppo.zip").read_bytes()[:keep])
    with pytest.raises(CheckpointError):
        ckpt_surgeon.open(path)
