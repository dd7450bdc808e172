"""Tensors that belong together stay together: what an edit would part is refused by name, or carried along."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from command_line import Run

import ckpt_surgeon
from ckpt_surgeon import EditError
from ckpt_surgeon.edits.companions import relations, summary

State = dict[str, torch.Tensor]


def float8() -> State:
    return {
        "proj.weight": torch.ones(256, 256).to(torch.float8_e4m3fn),
        "proj.weight_scale_inv": torch.full((2, 2), 2.0),
        "norm.weight": torch.ones(256),
    }


def channels() -> State:
    return {**float8(), "proj.weight_scale_inv": torch.ones(256, 1)}


def bitsandbytes() -> State:
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, state = functional.quantize_4bit(torch.ones(64, 64), quant_type="nf4", compress_statistics=True)
    parts = {f"proj.weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    return {"proj.weight": codes, **parts, "norm.weight": torch.ones(256)}


def gptq() -> State:
    return {
        "proj.qweight": torch.zeros(8, 64, dtype=torch.int32),
        "proj.qzeros": torch.zeros(4, 8, dtype=torch.int32),
        "proj.scales": torch.ones(4, 64, dtype=torch.float16),
        "proj.g_idx": torch.zeros(64, dtype=torch.int32),
        "norm.weight": torch.ones(256),
    }


def lora() -> State:
    return {
        "q.base_layer.weight": torch.ones(8, 8),
        "q.lora_A.default.weight": torch.ones(2, 8),
        "q.lora_B.default.weight": torch.ones(8, 2),
    }


def weight_norm() -> State:
    return dict(torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 4)).state_dict())


def pruned() -> State:
    from torch.nn.utils.prune import random_unstructured

    return dict(random_unstructured(torch.nn.Linear(4, 4), "weight", 0.5).state_dict())


CODES: dict[str, Callable[[], State]] = {"blocks": float8, "channels": channels}


@pytest.mark.parametrize("name", CODES)
def test_casting_codes_without_their_scale_is_refused_and_names_the_pair_and_the_way(name: str) -> None:
    with pytest.raises(EditError, match=r"'proj\.weight'.*'proj\.weight_scale_inv'.*dequantize.*allow_codes"):
        ckpt_surgeon.cast(CODES[name](), "bf16")
    taken = ckpt_surgeon.cast(float8(), "bf16", allow_codes=True)
    assert taken["proj.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("make", [bitsandbytes, gptq, lambda: ckpt_surgeon.keep(float8(), ["*_inv", "norm*"])])
def test_casting_all_else_leaves_scales_and_maps_alone_and_says_so(make: Callable[[], State]) -> None:
    state = make()
    change = ckpt_surgeon.cast.plan(state, "bf16")
    assert change.result["norm.weight"].dtype == torch.bfloat16
    if relations(state):
        assert {key for key in state if change.result[key] is not state[key]} == {"norm.weight"}
        assert any("belong to other tensors" in note for note in change.notes)


EDITS: list[Callable[[Mapping[str, torch.Tensor], str], object]] = [
    lambda state, key: ckpt_surgeon.slice_(state, key, 0, 2),
    lambda state, key: ckpt_surgeon.reshape(state, key, [-1]),
    lambda state, key: ckpt_surgeon.transpose(state, key),
    lambda state, key: ckpt_surgeon.pad(state, key, after=1),
    lambda state, key: ckpt_surgeon.resize_rows(state, key, 2),
    lambda state, key: ckpt_surgeon.split(state, key, ["one", "two"]),
]


@pytest.mark.parametrize("edit", range(len(EDITS)))
@pytest.mark.parametrize(
    ("make", "key"),
    [(gptq, "proj.qweight"), (gptq, "proj.scales"), (lora, "q.lora_B.default.weight"), (pruned, "weight_orig"),
     (weight_norm, "parametrizations.weight.original1")],
)  # fmt: skip
def test_one_of_several_that_belong_together_is_not_given_another_shape(
    make: Callable[[], State], key: str, edit: int
) -> None:
    with pytest.raises(EditError, match="belongs with"):
        EDITS[edit](make(), key)


def test_scaling_codes_is_refused_and_a_recipe_says_in_which_step() -> None:
    with pytest.raises(EditError, match="belongs with"):
        ckpt_surgeon.scale(float8(), "proj.weight_scale_inv", 2.0)
    recipe = ckpt_surgeon.Recipe(
        (ckpt_surgeon.step("add_prefix", prefix="m."), ckpt_surgeon.step("cast", dtype="bf16"))
    )
    with pytest.raises(EditError, match=r"step 2 \(cast\).*'m\.proj\.weight'"):
        recipe.apply(float8())


def test_keys_are_renamed_together_and_a_scale_that_is_left_behind_is_named() -> None:
    assert ckpt_surgeon.add_prefix.plan(float8(), "m.").notes == ()
    notes = ckpt_surgeon.rename.plan(float8(), ["^proj.weight$=proj.kernel"]).notes
    assert any("'proj.weight'" in note and "scales" in note for note in notes)
    assert any("scales" in note for note in ckpt_surgeon.drop.plan(float8(), "*_inv").notes)


def test_a_rename_in_place_names_a_scale_that_is_left_behind(tmp_path: Path) -> None:
    ckpt_surgeon.save(float8(), tmp_path / "f.safetensors")
    step = ckpt_surgeon.step("rename", pairs=["^proj.weight$=proj.w"])
    assert any("scales" in note for note in ckpt_surgeon.plan_in_place(tmp_path / "f.safetensors", step).change.notes)


def test_ls_says_what_belongs_together(tmp_path: Path, ckpt: Run) -> None:
    torch.save(float8() | lora(), tmp_path / "f.pth")
    listed = ckpt("ls", tmp_path / "f.pth").out
    assert "1 weight is float8 codes with block scales" in listed
    assert "1 weight is a LoRA pair" in listed


@pytest.mark.parametrize(
    ("make", "said"),
    [(channels, "float8 codes with a scale for each channel"), (gptq, "GPTQ codes with scales for groups"),
     (weight_norm, "weight norm: gain and direction"), (pruned, "pruned: a weight and its mask"),
     (bitsandbytes, "bitsandbytes nf4 codes with absmax")],
)  # fmt: skip
def test_each_kind_is_found_by_its_names(make: Callable[[], State], said: str) -> None:
    assert summary(make())[0] == f"1 weight is {said}"


def test_plain_networks_have_no_relations() -> None:
    import torchvision

    assert relations(torchvision.models.resnet18().state_dict()) == []


def test_codes_are_not_fitted_or_loaded_where_the_model_has_no_scales(tmp_path: Path) -> None:
    torch.save(ckpt_surgeon.drop(float8(), "norm*"), tmp_path / "f.pth")
    layer = torch.nn.Linear(256, 256, bias=False)
    model = torch.nn.ModuleDict({"proj": layer})
    with pytest.raises(EditError, match=r"'proj\.weight'.*float8 codes.*dequantize"):
        ckpt_surgeon.fit(tmp_path / "f.pth", model)
    with pytest.raises(EditError, match=r"'proj\.weight'.*float8 codes.*dequantize"):
        ckpt_surgeon.load_into(model, tmp_path / "f.pth")
    ckpt_surgeon.load_into(model, ckpt_surgeon.dequantize(ckpt_surgeon.open(tmp_path / "f.pth")))
    assert torch.equal(layer.weight, torch.full((256, 256), 2.0))
    ckpt_surgeon.load_into(model, tmp_path / "f.pth", allow_codes=True)
    assert torch.equal(layer.weight, torch.ones(256, 256))
