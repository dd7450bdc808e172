"""Folders that Trainer and accelerate write: their own loaders are the judge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import ckpt_surgeon
from ckpt_surgeon import OutputExists
from ckpt_surgeon.runs.folder import is_run_folder, open_run_folder, save_run_folder


def folder(tmp_path: Path, *, suffix: str = ".pt") -> tuple[Path, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.named_parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    made = tmp_path / "checkpoint-5"
    made.mkdir()
    ckpt_surgeon.save(model.state_dict(), made / "model.safetensors")
    torch.save(optimizer.state_dict(), made / f"optimizer{suffix}")
    torch.save({"last_epoch": 1}, made / f"scheduler{suffix}")
    (made / "trainer_state.json").write_text(json.dumps({"global_step": 5}))
    return made, model


@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_weights_and_optimizer_are_edited_together(suffix: str, tmp_path: Path) -> None:
    source, _ = folder(tmp_path, suffix=suffix)
    assert is_run_folder(source)
    run, _ = open_run_folder(source).edited(lambda tensors: ckpt_surgeon.drop.plan(tensors, "1.*"))
    save_run_folder(run, tmp_path / "out")
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {path.name for path in source.iterdir()}
    assert list(ckpt_surgeon.open(out / "model.safetensors")) == ["0.weight", "0.bias"]
    state = torch.load(out / f"optimizer{suffix}")
    assert state["param_groups"][0]["param_names"] == ["0.weight", "0.bias"]
    assert set(state["state"]) == {0, 1}
    assert (out / "trainer_state.json").read_text() == (source / "trainer_state.json").read_text()
    torch.optim.AdamW(nn.Sequential(nn.Linear(3, 4)).named_parameters()).load_state_dict(state)


def test_what_nothing_reaches_into_comes_back_equal(tmp_path: Path) -> None:
    source, _ = folder(tmp_path)
    run, _ = open_run_folder(source).edited(lambda tensors: ckpt_surgeon.keep.plan(tensors, "*"))
    save_run_folder(run, tmp_path / "out")
    before, after = (torch.load(one / "optimizer.pt") for one in (source, tmp_path / "out"))
    assert before["param_groups"] == after["param_groups"]
    for one, slots in before["state"].items():
        assert all(torch.equal(value, after["state"][one][name]) for name, value in slots.items())


def test_a_folder_that_is_there_is_not_replaced_unasked(tmp_path: Path) -> None:
    source, _ = folder(tmp_path)
    run = open_run_folder(source)
    with pytest.raises(OutputExists):
        save_run_folder(run, source)
    save_run_folder(run, source, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5"]
