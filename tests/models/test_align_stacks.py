"""Alignments that stack what a number tells apart, and take stacks apart, against transformers' own experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command_line import Run
from torch import nn

import ckpt_surgeon
from ckpt_surgeon import align, fit, from_torch
from ckpt_surgeon.models.align_recipe import alignment_recipe


class Experts(nn.Module):
    """Two layers of experts in one tensor each."""

    def __init__(self, count: int = 12) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"experts": nn.ParameterDict(
            {"w": torch.zeros(count, 3, 2), "down_proj": torch.zeros(count, 2, 3)})}) for _ in range(2))  # fmt: skip
        self.head = nn.Linear(3, 2)


def single(count: int = 12) -> dict[str, torch.Tensor]:
    made = {key: value + 1.0 for key, value in nn.Linear(3, 2).state_dict(prefix="head.").items()}
    for layer in range(2):
        for e in range(count):
            made[f"layers.{layer}.experts.{e}.w"] = torch.randn(3, 2)
            made[f"layers.{layer}.experts.{e}.down_proj.weight"] = torch.randn(2, 3)
    return made


def test_experts_are_stacked_where_their_names_say_so() -> None:
    state = single()
    found = align(state, Experts())
    assert found.complete
    assert not found.unused
    assert {one.certainty for one in found.made} == {"certain"}
    recipe = alignment_recipe(found, state)
    assert [(one.name, one.arguments["sources"]) for one in recipe.steps] == [
        ("stack", ["layers.{n}.experts.{e}.w"]),
        ("stack", ["layers.{n}.experts.{e}.down_proj.weight"]),
    ]
    made = recipe.apply(state)
    for layer in range(2):
        wanted = torch.stack([state[f"layers.{layer}.experts.{e}.down_proj.weight"] for e in range(12)])
        assert torch.equal(made[f"layers.{layer}.experts.down_proj"], wanted)


def test_fit_stacks_what_is_certain_and_drops_none_of_it() -> None:
    state = single()
    found = fit(from_torch(state), Experts())
    assert {one.how for one in found.outcomes} == {"as is", "reshaped"}
    assert "stacked; the name without the number, and all numbers" in {one.reason for one in found.outcomes}
    assert torch.equal(ckpt_surgeon.load(found.result)["layers.1.experts.w"][11], state["layers.1.experts.11.w"])


def test_stacks_are_taken_apart_for_a_model_of_single_experts() -> None:
    stacked, apart = Experts().state_dict(), single()
    found = align({key: value + 1 for key, value in stacked.items()}, apart)
    assert found.complete
    made = alignment_recipe(found, stacked).apply(stacked)
    assert sorted(made) == sorted(apart)
    assert made["layers.0.experts.3.down_proj.weight"].shape == (2, 3)


@pytest.mark.parametrize("change", ["gap", "shape", "one more"])
def test_what_does_not_fit_is_no_stack(change: str) -> None:
    state = single()
    if change == "gap":
        del state["layers.0.experts.5.w"]
    elif change == "shape":
        state["layers.0.experts.5.w"] = torch.zeros(4, 2)
    else:
        state["layers.0.experts.12.w"] = torch.zeros(3, 2)
    found = align(state, Experts())
    assert "layers.0.experts.w" in found.missing
    assert "layers.1.experts.w" not in found.missing


def test_a_stack_of_gate_and_up_is_likely_and_what_transformers_makes(tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen3MoeConfig(**sizes, moe_intermediate_size=4, num_key_value_heads=1, num_experts=11, vocab_size=10,
                            head_dim=4)  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(tmp_path / "published")
    [file] = (tmp_path / "published").glob("*.safetensors")
    opened = ckpt_surgeon.open(file)
    assert "model.layers.0.mlp.experts.10.gate_proj.weight" in opened
    found = align(opened, model)
    assert {one.new.rpartition(".")[2]: one.certainty for one in found.made} == {
        "down_proj": "certain",
        "gate_up_proj": "likely",
    }
    certain = found.at_least("certain")
    assert [key for key in certain.missing if "gate_up" in key] == list(certain.missing)
    assert "not taken, since it is likely" in certain.notes[-1]
    made = ckpt_surgeon.load(alignment_recipe(found, opened).apply(opened))
    for key, value in model.state_dict().items():
        assert torch.equal(made[key], value), key


def test_the_command_writes_a_recipe_that_stacks(ckpt: Run, tmp_path: Path) -> None:
    torch.save(single(2), tmp_path / "single.pth")
    torch.save(Experts(2).state_dict(), tmp_path / "stacked.pth")
    ran = ckpt("align", tmp_path / "single.pth", tmp_path / "stacked.pth", "-o", tmp_path / "names.toml")
    assert ran.status == 0, ran.err
    assert "certain      stacked; the name without the number, and all numbers" in ran.out
    text = (tmp_path / "names.toml").read_text()
    assert "#   certain: stacked; the name without the number, and all numbers (4 keys)" in text
    assert "sources = ['layers.{n}.experts.{e}.w']" in text


def test_a_wrapped_checkpoint_is_stacked_too() -> None:
    state = {f"module.{key}": value for key, value in single().items()}
    made = ckpt_surgeon.load(fit(from_torch(state), Experts()).result)
    assert torch.equal(made["layers.1.experts.w"][7], state["module.layers.1.experts.7.w"])
