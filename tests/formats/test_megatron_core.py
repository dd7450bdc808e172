"""The folder that Megatron-Core saves is one checkpoint: weights, and beside them the state of the training."""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path

import pytest
import torch
from command_line import Run
from tables import StateDict, assert_same, ramp
from torch.distributed.checkpoint.state_dict_saver import save

import ckpt_surgeon
from ckpt_surgeon.errors import NotACheckpoint

PARAMETER = "decoder.layers.self_attention.linear_qkv.weight"
SLOTS = ("exp_avg", "exp_avg_sq", "fp32_param")


def weights() -> StateDict:
    return {PARAMETER: ramp(2, 6, 3), "decoder.final_layernorm.weight": ramp(3), "optimizer_head.weight": ramp(2)}


def megatron_core(folder: Path, *, prefix: str = "optimizer.") -> Path:
    """What a training of two tensor-parallel processes leaves for one iteration, written by one process."""
    state = weights() | {f"{prefix}state.{slot}.{PARAMETER}": ramp(2, 6, 3) for slot in SLOTS}
    state |= {"rng_state": ramp(8), "rng_state/shard_0.0_1.1": ramp(3), "iteration": torch.tensor(3)}
    with warnings.catch_warnings(action="ignore"):
        save(state, checkpoint_id=folder)
    args = argparse.Namespace(tensor_model_parallel_size=2, lr=0.25)
    groups = [{"lr": 0.25, "step": 3, "params": []}]
    common = {"args": args, "checkpoint_version": 3.0, "iteration": 3, "optimizer": {"param_groups": groups}}
    torch.save(common, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    return folder


@pytest.mark.parametrize("prefix", ["optimizer.", "chained_0.optimizer."])
def test_its_weights_are_the_weights_and_the_optimizer_is_beside_them(prefix: str, tmp_path: Path) -> None:
    folder = megatron_core(tmp_path / "iter_0000003", prefix=prefix)
    for named in (folder, folder / ".metadata"):
        opened = ckpt_surgeon.open(named)
        assert_same(dict(ckpt_surgeon.load(opened)), weights(), order=False)
        assert not opened.part
        beside = {left.path: left.tensors for left in opened.left_out}
        assert beside[prefix.removesuffix(".")] == len(SLOTS)
        assert beside["rng_state"] == 2
        assert {"args", "iteration", "checkpoint_version"} <= set(beside)
        assert opened.value("args.lr") == 0.25
    assert opened.container == "Megatron-Core, torch distributed, 1 file"


def test_converting_it_writes_the_weights_alone(ckpt: Run, tmp_path: Path) -> None:
    folder, out = megatron_core(tmp_path / "iter_0000003"), tmp_path / "out.pth"
    assert ckpt("convert", folder, out).status == 0
    assert_same(torch.load(out), weights(), order=False)
    assert "optimizer" in ckpt("ls", folder).out
    names = ckpt("scan", folder).out
    assert "argparse.Namespace" in names


def test_the_options_of_the_groups_are_beside_the_slots(tmp_path: Path) -> None:
    opened = ckpt_surgeon.open(megatron_core(tmp_path / "iter_0000003"))
    assert opened.value("optimizer.param_groups.0.lr") == 0.25
    slot = opened.value(f"optimizer.state.{PARAMETER}.exp_avg")
    assert torch.equal(slot.load(), ramp(2, 6, 3))  # type: ignore[attr-defined]


def test_a_folder_whose_weights_are_not_torchs_is_no_checkpoint_of_its_common_file(tmp_path: Path) -> None:
    folder = megatron_core(tmp_path / "iter_0000003")
    (folder / ".metadata").unlink()
    with pytest.raises(NotACheckpoint, match=r"Megatron-Core checkpoint without \.metadata"):
        ckpt_surgeon.open(folder)


def test_a_folder_of_iterations_is_the_last_one_or_asks_for_one(ckpt: Run, tmp_path: Path) -> None:
    megatron_core(tmp_path / "iter_0000003")
    refused = ckpt("ls", tmp_path)
    assert (refused.status, "name the folder of one iteration" in refused.err) == (2, True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    assert_same(dict(ckpt_surgeon.load(ckpt_surgeon.open(tmp_path))), weights(), order=False)
