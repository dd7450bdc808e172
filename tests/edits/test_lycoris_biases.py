"""Biases and norms in LyCORIS' files, and diffusers' settings in a file's metadata: merged by their formulas."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ckpt_surgeon

BASE = {
    "block.proj.weight": torch.arange(6.0).reshape(2, 3),
    "block.proj.bias": torch.ones(2),
    "block.norm.weight": torch.full((3,), 2.0),
    "block.norm.bias": torch.zeros(3),
}


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_differences_of_norms_and_biases_are_added_times_the_scale(scale: float) -> None:
    """LyCORIS: W + strength · diff, b + strength · diff_b (modules/full.py); w_norm and b_norm alike (norms.py)."""
    torch.manual_seed(0)
    parts = {"diff": torch.randn(2, 3), "diff_b": torch.randn(2), "w_norm": torch.randn(3), "b_norm": torch.randn(3)}
    places = {"diff": "proj.weight", "diff_b": "proj.bias", "w_norm": "norm.weight", "b_norm": "norm.bias"}
    adapter = {f"lora_unet_block_{places[name].split('.')[0]}.{name}": value for name, value in parts.items()}
    made = ckpt_surgeon.merge_lora(BASE, adapter, scale=[scale])
    for name, place in places.items():
        torch.testing.assert_close(made[f"block.{place}"], BASE[f"block.{place}"] + scale * parts[name])


def test_a_difference_of_a_bias_stands_beside_a_low_rank_pair() -> None:
    down, up, bias = torch.ones(1, 3), torch.ones(2, 1), torch.tensor([0.5, -0.5])
    layer = "lora_unet_block_proj"
    adapter = {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up, f"{layer}.diff_b": bias}
    made = ckpt_surgeon.merge_lora(BASE, adapter)
    assert torch.equal(made["block.proj.weight"], BASE["block.proj.weight"] + 1)
    assert torch.equal(made["block.proj.bias"], BASE["block.proj.bias"] + bias)


def test_the_settings_that_diffusers_writes_into_metadata_say_alpha(tmp_path: Path) -> None:
    """``lora_adapter_metadata``: each part's LoraConfig as JSON, its names behind the part's (loaders/lora_base.py)."""
    adapter = {"unet.block.proj.lora_A.weight": torch.ones(2, 3), "unet.block.proj.lora_B.weight": torch.ones(2, 2)}
    stated = {"unet.r": 2, "unet.lora_alpha": 6, "unet.target_modules": ["proj"], "unet.use_rslora": False}
    save_file(adapter, tmp_path / "lora.safetensors", metadata={"lora_adapter_metadata": json.dumps(stated)})
    made = ckpt_surgeon.merge_lora(BASE, tmp_path / "lora.safetensors")
    assert torch.equal(made["block.proj.weight"], BASE["block.proj.weight"] + 2 * 6 / 2)
