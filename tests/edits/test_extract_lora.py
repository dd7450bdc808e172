"""extract-lora: a difference as a pair of matrices, read by PEFT and merged again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Run
from safetensors.torch import load_file, save_file

import ckpt_surgeon
from ckpt_surgeon import EditError, NothingMatched

StateDict = dict[str, torch.Tensor]


class Net(torch.nn.Module):
    """Layers that become pairs, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 6)
        self.fc = torch.nn.Linear(6, 8)
        self.same = torch.nn.Linear(8, 8)
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.point = torch.nn.Conv1d(4, 6, 1)
        self.norm = torch.nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.fc(self.embed(x))
        return made


def two(rank: int | None = None, noise: float = 0.0) -> tuple[StateDict, StateDict]:
    """A base and its fine-tuning, whose differences have a rank."""
    torch.manual_seed(0)
    base = dict(Net().state_dict())
    tuned = dict(base)
    for key in ("embed.weight", "fc.weight", "conv.weight", "point.weight"):
        flat = base[key].flatten(1)
        count = rank or min(flat.shape)
        delta = torch.randn(flat.shape[0], count) @ torch.randn(count, flat.shape[1])
        tuned[key] = base[key] + 0.1 * (delta + noise * torch.randn_like(delta)).reshape(base[key].shape)
    return base, tuned


@pytest.mark.parametrize("rank", [None, 2])
def test_base_and_adapter_merged_are_the_fine_tuning(rank: int | None) -> None:
    base, tuned = two(rank)
    adapter = ckpt_surgeon.extract_lora(ckpt_surgeon.from_torch(tuned), base, rank=rank or 99)
    made: Any = ckpt_surgeon.merge_lora(ckpt_surgeon.from_torch(base), adapter)
    for key in base:
        torch.testing.assert_close(made[key].load(), tuned[key], rtol=1e-5, atol=2e-6)
    for key in base.keys() - {"embed.weight", "fc.weight", "conv.weight", "point.weight"}:
        assert torch.equal(made[key].load(), base[key])
    assert not any("same" in key for key in adapter)


def test_the_error_of_a_smaller_rank_is_that_of_the_singular_values_left_out() -> None:
    base, tuned = two()
    made = ckpt_surgeon.merge_lora(base, ckpt_surgeon.extract_lora(ckpt_surgeon.from_torch(tuned), base, rank=3))
    delta = (tuned["fc.weight"] - base["fc.weight"]).double()
    left = torch.linalg.svdvals(delta)[3:].square().sum().sqrt()
    error = (made["fc.weight"].double() - tuned["fc.weight"].double()).norm()
    assert float(error) == pytest.approx(float(left), rel=1e-4)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999, 1.0])
def test_energy_takes_as_many_values_as_have_that_share(energy: float) -> None:
    base, tuned = two(noise=0.3)
    adapter = ckpt_surgeon.extract_lora(tuned, base, energy=energy)
    for key in ("fc.weight", "conv.weight"):
        squares = torch.linalg.svdvals((tuned[key] - base[key]).double().flatten(1)).square()
        rank = adapter[f"base_model.model.{key.removesuffix('weight')}lora_A.weight"].shape[0]
        assert float(squares[:rank].sum()) >= energy * float(squares.sum()) * (1 - 1e-6)
        assert float(squares[: rank - 1].sum()) < energy * float(squares.sum())


def test_conv1d_of_transformers_and_embeddings_lie_the_other_way_round() -> None:
    base, tuned = {"c.weight": torch.zeros(3, 5)}, {"c.weight": torch.randn(3, 5)}
    adapter = ckpt_surgeon.extract_lora(ckpt_surgeon.from_torch(tuned), base, rank=3, fan_in_fan_out=True)
    assert adapter["base_model.model.c.lora_A.weight"].shape == (3, 3)
    assert adapter["base_model.model.c.lora_B.weight"].shape == (5, 3)
    torch.testing.assert_close(ckpt_surgeon.merge_lora(base, adapter)["c.weight"], tuned["c.weight"])


def test_what_changed_and_is_no_matrix_is_named_or_taken_whole() -> None:
    base, tuned = two(2)
    tuned |= {
        "norm.weight": torch.full((8,), 2.0),
        "fc.bias": torch.ones(8),
        "norm.num_batches_tracked": torch.tensor(5),
    }
    tuned["new.weight"] = torch.ones(2, 2)
    source = ckpt_surgeon.from_torch(tuned)
    change = ckpt_surgeon.extract_lora.plan(source, base, rank=2)
    assert any("changed and not in the adapter: 4 tensors ('fc.bias'" in note for note in change.notes)
    adapter = ckpt_surgeon.extract_lora(source, base, rank=2, whole_modules=True)
    assert adapter["base_model.model.norm.weight"] is source["norm.weight"]
    made = ckpt_surgeon.merge_lora(base, adapter)
    assert set(made) == set(tuned)
    for key, value in tuned.items():
        torch.testing.assert_close(made[key], value, rtol=1e-5, atol=2e-6)


def test_peft_loads_and_merges_what_was_extracted(tmp_path: Path, ckpt: Run) -> None:
    peft: Any = pytest.importorskip("peft")
    base, tuned = two(2)
    tuned |= {"norm.weight": torch.full((8,), 2.0), "fc.bias": torch.ones(8)}
    del base["point.weight"], tuned["point.weight"]  # PEFT's Conv1d needs no more here
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    folder = tmp_path / "adapter"
    folder.mkdir()
    out = folder / "adapter_model.safetensors"
    words = ["extract-lora", tmp_path / "tuned.safetensors", tmp_path / "base.safetensors", out, "--whole-modules"]
    ran = ckpt(*words, "--rank", 4)
    assert ran.status == 0, ran.err
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
    net = Net()
    net.load_state_dict(base, strict=False)
    merged = peft.PeftModel.from_pretrained(net, str(folder)).merge_and_unload().state_dict()
    for key, value in tuned.items():
        torch.testing.assert_close(merged[key], value, rtol=1e-5, atol=2e-6)
    ran = ckpt("merge-lora", tmp_path / "base.safetensors", folder, tmp_path / "merged.safetensors")
    assert ran.status == 0, ran.err
    for key, value in load_file(tmp_path / "merged.safetensors").items():
        torch.testing.assert_close(value, tuned[key], rtol=1e-5, atol=2e-6)
    out.unlink()
    ran = ckpt(*words, "--rank", 2)  # other settings are there, and of another adapter as far as anybody knows
    assert ran.status == 2
    assert "adapter_config.json: exists already" in ran.err
    assert not out.exists()


def test_an_adapter_of_nothing_and_one_without_a_rank_are_refused() -> None:
    base, tuned = two()
    with pytest.raises(NothingMatched, match="weight that changed"):
        ckpt_surgeon.extract_lora(base, base, rank=2)
    with pytest.raises(EditError, match="needs a rank"):
        ckpt_surgeon.extract_lora(tuned, base)
