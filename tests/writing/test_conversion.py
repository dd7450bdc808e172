"""The recipe that turns timm's Vision Transformer into transformers': by the library, by both containers, and back."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from command_line import Run
from pages import RECIPES
from tables import assert_same, save_safetensors

import ckpt_surgeon
from ckpt_surgeon import Recipe


@pytest.fixture
def kitchen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the recipes, to work in."""
    for path in RECIPES:
        shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def state_of_timm() -> dict[str, torch.Tensor]:
    import timm

    sizes = {"img_size": 32, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
    model: torch.nn.Module = timm.create_model("vit_tiny_patch16_224", **sizes)
    return dict(model.state_dict())


def test_the_library_and_both_containers_give_the_same(kitchen: Path, ckpt: Run) -> None:
    state = state_of_timm()
    rules = Recipe.load("vit_timm_to_transformers.toml")
    wanted = rules.apply(state)
    assert ckpt("apply", "vit_timm_to_transformers.toml", save_safetensors(state, kitchen), "out.pth").status == 0
    assert_same(torch.load("out.pth"), wanted, order=False)
    ckpt_surgeon.save(rules.apply(ckpt_surgeon.from_torch(state)), "out.safetensors")
    assert_same(safetensors.torch.load_file("out.safetensors"), wanted, order=False)


def test_the_conversion_can_be_taken_back(kitchen: Path) -> None:
    state = state_of_timm()
    rules = Recipe.load("vit_timm_to_transformers.toml")
    split, renames = Recipe(rules.steps[:1]), Recipe(rules.steps[1:])
    apart = split.apply(state)
    back = renames.invert(apart).apply(rules.apply(state))
    parts = [f"blocks.{{n}}.attn.{part}_proj.*" for part in "qkv"]
    assert_same(ckpt_surgeon.concat(back, parts, "blocks.{n}.attn.qkv.*"), state)


def test_a_model_of_another_kind_is_refused_and_every_rule_without_a_key_is_named(kitchen: Path, ckpt: Run) -> None:
    state = state_of_timm()
    del state["cls_token"], state["norm.weight"], state["norm.bias"]
    ran = ckpt("apply", "vit_timm_to_transformers.toml", save_safetensors(state, kitchen), "out.pth")
    assert ran.status == 2
    assert "'^cls_token$' matches no key" in ran.err
    assert "'^norm' matches no key" in ran.err
    assert not Path("out.pth").exists()
