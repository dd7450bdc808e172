"""merge-lora against PEFT's merge_and_unload, and by the formulas of kohya, LyCORIS and diffusers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Run
from safetensors.torch import load_file, save_file
from torch.nn import functional

import ckpt_surgeon
from ckpt_surgeon import EditError, NothingMatched
from ckpt_surgeon.edits.lora.places import placed

peft: Any = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

StateDict = dict[str, torch.Tensor]


class Net(torch.nn.Module):
    """A layer of every kind that adapters are made for."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 6)
        self.fc = torch.nn.Linear(6, 8)
        self.norm = torch.nn.LayerNorm(8)
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(8, 8), torch.nn.Linear(8, 8, bias=False)])
        self.conv1 = torch.nn.Conv1d(3, 4, 3)
        self.conv2 = torch.nn.Conv2d(3, 4, 3)
        self.conv3 = torch.nn.Conv3d(3, 4, 2)
        self.point = torch.nn.Conv2d(4, 6, 1)
        self.head = torch.nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.head(self.norm(self.fc(self.embed(x))))
        return made


ALL = ["embed", "fc", "blocks.0", "blocks.1", "conv1", "conv2", "conv3", "point"]


def drawn(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """A module whose parameters are all random, adapters' too."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return module


def by_peft(
    folder: Path, config: Any, base: torch.nn.Module | None = None, dtype: torch.dtype = torch.float32
) -> tuple[StateDict, StateDict]:
    """The base's state_dict and what PEFT merges; the adapter is saved in the folder."""
    module = (drawn(Net()) if base is None else base).to(dtype)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    model = peft.get_peft_model(module, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(str(folder))
    return before, dict(model.merge_and_unload().state_dict())


def lora(**settings: object) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ALL, **settings})


KINDS: dict[str, Callable[[], Any]] = {
    "LoRA": lora,
    "rsLoRA": lambda: lora(use_rslora=True),
    "patterns of rank and alpha": lambda: lora(rank_pattern={"fc": 2, r"blocks\.[01]": 3}, alpha_pattern={"^conv2": 5}),
    "DoRA": lambda: lora(use_dora=True),
    "biases of all layers": lambda: lora(bias="all", modules_to_save=["head"]),
    "biases of its own layers": lambda: lora(bias="lora_only"),
    "biases of B": lambda: lora(lora_bias=True, target_modules=["fc", "blocks.0", "conv2"]),
    "rows of an embedding": lambda: lora(target_modules=["fc"], trainable_token_indices={"embed": [1, 3]}),
    "LoHa": lambda: peft.LoHaConfig(r=4, alpha=6, target_modules=["fc", "conv2", "point", "conv1"]),
    "LoHa with cores": lambda: peft.LoHaConfig(r=2, alpha=6, target_modules=["fc", "conv2"], use_effective_conv2d=True),
    "LoKr": lambda: peft.LoKrConfig(r=8, alpha=6, target_modules=["fc", "conv2", "point", "conv1"]),
    "LoKr in factors": lambda: peft.LoKrConfig(r=1, alpha=6, target_modules=["fc", "blocks.0"], decompose_both=True),
    "LoKr with a core": lambda: peft.LoKrConfig(
        r=1, alpha=3, target_modules=["conv2"], use_effective_conv2d=True, decompose_factor=2
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_peft_is_merged_to_the_bit(kind: str, tmp_path: Path) -> None:
    base, wanted = by_peft(tmp_path, KINDS[kind]())
    made = ckpt_surgeon.merge_lora(base, tmp_path)
    assert list(made) == list(base)
    different = [key for key in wanted if not torch.equal(made[key], wanted[key])]
    assert different == []
    assert any(not torch.equal(made[key], base[key]) for key in base)


def test_conv1d_of_transformers_is_merged_to_the_bit_square_weights_too(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 13, "n_positions": 16}
    model = drawn(GPT2LMHeadModel(GPT2Config(**sizes)))
    config = lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, use_dora=True)
    base, wanted = by_peft(tmp_path, config, model)
    made = ckpt_surgeon.merge_lora(base, tmp_path)
    assert all(torch.equal(made[key], wanted[key]) for key in wanted)
    change = ckpt_surgeon.merge_lora.plan(ckpt_surgeon.from_torch(base), tmp_path)
    assert any("2 layers" in note or "layers added" in note for note in change.notes)


def test_attention_of_torch_is_merged_to_the_bit(tmp_path: Path) -> None:
    """PEFT adds the part of the output projection twice, in its forward pass too; what was trained so is merged so."""
    model = torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2))
    base, wanted = by_peft(tmp_path, lora(target_modules=["0"]), drawn(model))
    made = ckpt_surgeon.merge_lora(base, tmp_path)
    assert all(torch.equal(made[key], wanted[key]) for key in wanted)
    plain, attention = (torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2)) for _ in range(2))
    plain.load_state_dict(base)
    attention.load_state_dict(made)
    adapted = peft.PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    x = torch.randn(3, 2, 8)
    torch.testing.assert_close(attention.eval()[0](x, x, x)[0], adapted.base_model.model[0](x, x, x)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_short_base_is_rounded_once_as_by_peft_with_float32_adapters(dtype: torch.dtype, tmp_path: Path) -> None:
    base, wanted = by_peft(tmp_path, lora(target_modules=["fc", "blocks.0", "embed"], use_dora=True), dtype=dtype)
    made = ckpt_surgeon.merge_lora(base, tmp_path)
    assert all(torch.equal(made[key], wanted[key]) for key in wanted)


def test_where_peft_rounds_the_delta_first_the_difference_is_that_rounding(tmp_path: Path) -> None:
    """peft, told not to keep adapters in float32, rounds s · B A to bfloat16 and then the sum: two roundings."""
    base, _ = by_peft(tmp_path, lora(target_modules=["fc"]), dtype=torch.bfloat16)
    net = Net().to(torch.bfloat16)
    net.load_state_dict(base)
    model = peft.PeftModel.from_pretrained(net, str(tmp_path), autocast_adapter_dtype=False)
    wanted = model.merge_and_unload().state_dict()["fc.weight"].double()
    made = ckpt_surgeon.merge_lora(base, tmp_path)["fc.weight"].double()
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    down, up = (adapter[f"base_model.model.fc.lora_{half}.weight"].bfloat16().double() for half in "AB")
    delta = up @ down * 1.5
    exact = base["fc.weight"].double() + delta
    ulp = torch.exp2(torch.floor(torch.log2(exact.abs())) - 7)
    half_of_delta = torch.exp2(torch.floor(torch.log2(delta.abs())) - 8)
    assert ((wanted - exact).abs() <= ulp / 2 + 1.01 * half_of_delta).all()
    stored = up.float() @ down.float() * 1.5  # ours on the same numbers as in the file
    assert stored.shape == made.shape


def test_several_adapters_are_added_one_after_the_other_each_with_its_scale(tmp_path: Path) -> None:
    base, _ = by_peft(tmp_path / "one", lora())
    _, _ = by_peft(tmp_path / "two", lora(r=2, lora_alpha=8, target_modules=["fc", "conv2"]))
    net = Net()
    net.load_state_dict(base)
    model = peft.PeftModel.from_pretrained(net, str(tmp_path / "one"), adapter_name="one")
    model.load_adapter(str(tmp_path / "two"), adapter_name="two")
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_scale("one", 0.5)
            module.set_scale("two", 2.0)
    wanted = model.merge_and_unload(adapter_names=["one", "two"]).state_dict()
    made = ckpt_surgeon.merge_lora(base, tmp_path / "one", tmp_path / "two", scale=[0.5, 2])
    assert all(torch.equal(made[key], wanted[key]) for key in wanted)


# -- kohya, LyCORIS, diffusers: by their formulas


def unet() -> StateDict:
    torch.manual_seed(0)
    return {
        "mid_block.attentions.0.proj_in.weight": torch.randn(6, 4),
        "mid_block.attentions.0.attn1.to_q.weight": torch.randn(6, 4),
        "mid_block.attentions.0.attn1.to_out.0.weight": torch.randn(4, 6),
        "down_blocks.0.conv.weight": torch.randn(6, 4, 3, 3),
        "down_blocks.0.conv.bias": torch.randn(6),
        "down_blocks.0.point.weight": torch.randn(6, 4, 1, 1),
        "norm.weight": torch.randn(4),
    }


def merged(adapter: StateDict, base: StateDict | None = None, **options: Any) -> StateDict:
    made: StateDict = ckpt_surgeon.merge_lora(unet() if base is None else base, adapter, **options)
    return made


def changed(made: StateDict, base: StateDict) -> set[str]:
    return {key for key in base if not torch.equal(made[key], base[key])}


@pytest.mark.parametrize("prefix", ["", "unet.", "model.diffusion_model."])
def test_kohyas_names_are_matched_through_the_keys_of_the_base(prefix: str) -> None:
    base = {prefix + key: value for key, value in unet().items()}
    down, up = torch.randn(2, 4), torch.randn(6, 2)
    wide, narrow = torch.randn(2, 4, 3, 3), torch.randn(6, 2, 1, 1)
    adapter = {
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": down,
        "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": up,
        "lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(1.0),
        "lora_unet_down_blocks_0_conv.lora_down.weight": wide,
        "lora_unet_down_blocks_0_conv.lora_up.weight": narrow,
    }
    made = merged(adapter, base)
    proj, conv = f"{prefix}mid_block.attentions.0.proj_in.weight", f"{prefix}down_blocks.0.conv.weight"
    assert changed(made, base) == {proj, conv}
    torch.testing.assert_close(made[proj], base[proj] + up @ down * 0.5)
    delta = functional.conv2d(wide.permute(1, 0, 2, 3), narrow).permute(1, 0, 2, 3)
    torch.testing.assert_close(made[conv], base[conv] + delta)  # without an alpha it is the rank


def test_a_pipelines_parts_are_told_apart_by_kohyas_prefixes() -> None:
    layer = "text_model.encoder.layers.0.mlp.fc1"
    base = {f"{part}.{layer}.weight": torch.zeros(3, 4) for part in ("text_encoder", "text_encoder_2")}
    flat = "text_model_encoder_layers_0_mlp_fc1"
    adapter: StateDict = {}
    for number in (1, 2):
        adapter[f"lora_te{number}_{flat}.lora_down.weight"] = torch.ones(1, 4)
        adapter[f"lora_te{number}_{flat}.lora_up.weight"] = torch.full((3, 1), float(number))
    made = merged(adapter, base)
    assert made[f"text_encoder.{layer}.weight"][0, 0] == 1
    assert made[f"text_encoder_2.{layer}.weight"][0, 0] == 2


def test_a_flattened_name_that_two_paths_have_is_refused() -> None:
    base = {"a.b_c.weight": torch.zeros(2, 2), "a_b.c.weight": torch.zeros(2, 2)}
    adapter = {"lora_unet_a_b_c.lora_down.weight": torch.ones(1, 2), "lora_unet_a_b_c.lora_up.weight": torch.ones(2, 1)}
    with pytest.raises(EditError, match=r"'lora_unet_a_b_c' may be 'a.b_c', 'a_b.c'"):
        merged(adapter, base)


def lycoris(kind: str) -> tuple[StateDict, torch.Tensor]:
    """The tensors of one convolution's adapter, and what they add, by the paper's formula in float64."""
    torch.manual_seed(2)
    t: Callable[..., torch.Tensor] = torch.randn
    if kind == "lora_mid":
        parts = {"lora_down.weight": t(2, 4, 1, 1), "lora_mid.weight": t(2, 2, 3, 3), "lora_up.weight": t(6, 2, 1, 1)}
        up, mid, down = (parts[f"lora_{name}.weight"].double() for name in ("up", "mid", "down"))
        return parts, torch.einsum("pi,ijkl,jq->pqkl", up[..., 0, 0], mid, down[..., 0, 0])
    if kind == "LoHa":
        parts = {"hada_w1_a": t(6, 2), "hada_w1_b": t(2, 36), "hada_w2_a": t(6, 2), "hada_w2_b": t(2, 36)}
        one, two = (parts[f"hada_w{n}_a"].double() @ parts[f"hada_w{n}_b"].double() for n in (1, 2))
        return parts, (one * two).reshape(6, 4, 3, 3)
    if kind == "LoHa with cores":
        parts = {f"hada_w{n}_{side}": t(2, size) for n in (1, 2) for side, size in (("a", 6), ("b", 4))}
        parts |= {f"hada_t{n}": t(2, 2, 3, 3) for n in (1, 2)}
        one, two = (torch.einsum("ijkl,jr,ip->prkl", *(parts[name].double() for name in
                                 (f"hada_t{n}", f"hada_w{n}_b", f"hada_w{n}_a"))) for n in (1, 2))  # fmt: skip
        return parts, one * two
    if kind == "LoKr":
        parts = {"lokr_w1": t(3, 2), "lokr_w2_a": t(2, 2), "lokr_w2_b": t(2, 18)}
        two = (parts["lokr_w2_a"].double() @ parts["lokr_w2_b"].double()).reshape(2, 18)
        return parts, torch.kron(parts["lokr_w1"].double(), two).reshape(6, 4, 3, 3)
    parts = {"diff": t(6, 4, 3, 3)}
    return parts, parts["diff"].double()


@pytest.mark.parametrize("alpha", [None, 1.0])
@pytest.mark.parametrize("kind", ["lora_mid", "LoHa", "LoHa with cores", "LoKr", "diff"])
def test_a_kind_of_lycoris_is_merged_by_its_formula(kind: str, alpha: float | None) -> None:
    parts, delta = lycoris(kind)
    layer = "lora_unet_down_blocks_0_conv."
    adapter = {layer + name: value for name, value in parts.items()}
    factor = 1.0
    if alpha and kind != "diff":  # a difference has no alpha
        adapter[layer + "alpha"] = torch.tensor(alpha)
        factor = alpha / 2
    made = merged(adapter)["down_blocks.0.conv.weight"].double()
    wanted = unet()["down_blocks.0.conv.weight"].double() + delta * factor
    torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_doras_magnitudes_in_lycoris_files_are_of_outputs_or_of_inputs(axis: int, strength: float) -> None:
    base = unet()
    key, layer = "mid_block.attentions.0.proj_in.weight", "lora_unet_mid_block_attentions_0_proj_in"
    down, up = torch.randn(2, 4), torch.randn(6, 2)
    scale = torch.rand(6, 1) if axis == 0 else torch.rand(1, 4)
    adapter = {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up, f"{layer}.dora_scale": scale}
    weight = base[key] + up @ down * strength
    factor = scale / (weight.norm(dim=1 - axis, keepdim=True) + torch.finfo(torch.float32).eps)
    wanted = weight * (strength * (factor - 1) + 1)
    torch.testing.assert_close(merged(adapter, base, scale=[strength])[key], wanted)


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("unet.{path}.lora.down.weight", "unet.{path}.lora.up.weight"),
        ("unet.{path}.lora_A.weight", "unet.{path}.lora_B.weight"),
        ("unet.{parent}.processor.{name}_lora.down.weight", "unet.{parent}.processor.{name}_lora.up.weight"),
    ],
)
@pytest.mark.parametrize("whole", [False, True])
def test_diffusers_three_spellings_say_the_same(down: str, up: str, whole: bool) -> None:
    base = {("unet." if whole else "") + key: value for key, value in unet().items()}
    parent = "mid_block.attentions.0.attn1"
    adapter: StateDict = {}
    for name, path, outs, ins in (("to_q", "to_q", 6, 4), ("to_out", "to_out.0", 4, 6)):
        names = {"path": f"{parent}.{path}", "parent": parent, "name": name}
        adapter |= {down.format(**names): torch.ones(2, ins), up.format(**names): torch.ones(outs, 2)}
    made = merged(adapter, base)
    keys = {("unet." if whole else "") + f"{parent}.{path}.weight" for path in ("to_q", "to_out.0")}
    assert changed(made, base) == keys
    assert all(torch.equal(made[key], base[key] + 2) for key in keys)


# -- what has no place, what is not said


def pair(name: str = "fc", outs: int = 2, ins: int = 3, prefix: str = "") -> StateDict:
    return {f"{prefix}{name}.lora_A.weight": torch.ones(1, ins), f"{prefix}{name}.lora_B.weight": torch.ones(outs, 1)}


@pytest.mark.parametrize(
    ("adapter", "problem"),
    [
        (pair("other"), "'other' is no layer of the base"),
        (pair(outs=5), r"'fc' adds \[5, 3\], and the base's weight is \[2, 3\]"),
        ({"fc.lora_A.weight": torch.ones(1, 3)}, "'fc' has fc.lora_A.weight without its up"),
        ({**pair(), "fc.lora_mid.weight": torch.ones(7, 1)}, "do not make a product"),
        ({**pair(), "extra.weight": torch.ones(1)}, "'extra.weight' is no key of the base"),
        ({**pair(), "fc.lora_magnitude_vector": torch.ones(4)}, "4 magnitudes for a weight of"),
        ({"w": torch.ones(1)}, "is no adapter that is known"),
        (pair(prefix="base_model.model."), "no alpha is stated"),
        ({"fc.lora_A.one.weight": torch.ones(1, 3), "fc.lora_B.two.weight": torch.ones(2, 1)}, "2 adapters"),
        ({**pair(), "fc.lora_B.bias": torch.ones(2)}, "the base has none like it"),
    ],
)
def test_what_has_no_place_or_is_not_whole_is_named(adapter: StateDict, problem: str) -> None:
    with pytest.raises(EditError, match=problem):
        merged(adapter, {"fc.weight": torch.zeros(2, 3)})


@pytest.mark.parametrize(
    ("paths", "base", "found"),
    [
        (["model.layers.0.fc"], ["layers.0.fc"], {"model.layers.0.fc": "layers.0.fc"}),  # saved without its head
        (["layers.0.fc"], ["model.layers.0.fc"], {"layers.0.fc": "model.layers.0.fc"}),
        (["unet.fc"], ["fc", "text.fc"], {"unet.fc": "fc"}),
        (["encoder.fc"], ["decoder.fc"], {}),
        (["fc"], ["a.fc", "b.fc"], {}),
        (["a.fc", "a.gone"], ["x.a.fc"], {"a.fc": "x.a.fc"}),
    ],
)
def test_dotted_paths_lose_or_get_one_prefix_and_no_other_is_guessed(
    paths: list[str], base: list[str], found: dict[str, str]
) -> None:
    places = placed(paths, [f"{module}.weight" for module in base])
    assert places.modules == found
    assert bool(places.problems) == (len(found) < len(paths))


def test_other_kinds_of_peft_and_altered_bases_are_refused_with_the_way_on(tmp_path: Path) -> None:
    save_file(pair(prefix="base_model.model."), tmp_path / "adapter_model.safetensors")
    base = {"fc.weight": torch.zeros(2, 3)}
    for text, problem in (
        ('{"peft_type": "VERA"}', "PEFT's kind VERA.*merge_and_unload"),
        ('{"peft_type": "LORA", "init_lora_weights": "pissa"}', "began with pissa.*path_initial_model"),
        ('{"peft_type": "LORA", "use_qalora": true}', "uses 'use_qalora'"),
        ("nothing", "is no JSON"),
    ):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(EditError, match=problem):
            ckpt_surgeon.merge_lora(base, tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 3}')
    assert ckpt_surgeon.merge_lora(base, tmp_path)["fc.weight"][0, 0] == 3


def test_a_quantised_base_is_refused() -> None:
    base = {"fc.weight": torch.ones(2, 3).to(torch.float8_e4m3fn), "fc.weight_scale": torch.ones(2, 1)}
    with pytest.raises(EditError, match="dequantize first"):
        merged(pair(), base, alpha=1)


def test_a_tie_survives_one_change_and_ends_at_two() -> None:
    weight = torch.zeros(2, 3)
    base = {"embed.weight": weight, "head.weight": weight}
    change = ckpt_surgeon.merge_lora.plan(ckpt_surgeon.from_torch(base), pair("head"))
    assert change.result["embed.weight"] is change.result["head.weight"]
    assert any("'embed.weight' stays tied to 'head.weight'" in note for note in change.notes)
    both = ckpt_surgeon.merge_lora.plan(ckpt_surgeon.from_torch(base), pair("head") | pair("embed"))
    assert both.result["embed.weight"] is not both.result["head.weight"]
    assert any("are no longer tied" in note for note in both.notes)


def test_a_part_of_an_adapter_is_taken_and_the_rest_is_said() -> None:
    base = {"fc.weight": torch.zeros(2, 3)}
    adapter = pair() | pair("other")
    assert merged(adapter, base, take="fc.*")["fc.weight"][0, 0] == 1
    change = ckpt_surgeon.merge_lora.plan(ckpt_surgeon.from_torch(base), adapter, take="2::fc.*")
    assert "2 keys left out" in change.notes[0]
    with pytest.raises(NothingMatched):
        merged(adapter, base, take="none.*")


def test_an_adapter_in_a_folder_is_merged_by_the_command_and_nothing_is_read_before(tmp_path: Path, ckpt: Run) -> None:
    base, wanted = by_peft(tmp_path / "adapter", lora())
    save_file(base, tmp_path / "base.safetensors")
    torch.save({}, tmp_path / "adapter" / "training_args.bin")  # what Trainer leaves beside it
    ran = ckpt("merge-lora", tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out.safetensors")
    assert ran.status == 0, ran.err
    made = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(made[key], wanted[key]) for key in wanted)
    assert "8 layers added" in ran.out
    ran = ckpt("convert", tmp_path / "adapter", tmp_path / "moved.safetensors")  # the settings travel with the tensors
    assert torch.equal(ckpt_surgeon.merge_lora(base, tmp_path / "moved.safetensors")["fc.weight"], wanted["fc.weight"])


# -- what is kept of it


def small_adapter(relative: float) -> tuple[StateDict, StateDict, torch.Tensor]:
    """A bfloat16 base, an adapter whose part is so large beside it, and that part."""
    torch.manual_seed(5)
    weight = torch.randn(256, 256).bfloat16()
    down, up = torch.randn(8, 256), torch.randn(256, 8)
    up *= relative * weight.float().norm() / (up @ down).norm()
    return {"fc.weight": weight}, {"fc.lora_A.weight": down, "fc.lora_B.weight": up}, up @ down


@pytest.mark.parametrize(("relative", "cosine"), [(1e-3, 0.64), (3e-4, 0.37)])
def test_a_bfloat16_base_keeps_little_of_a_small_adapter_and_the_output_says_so(
    relative: float, cosine: float, tmp_path: Path, ckpt: Run
) -> None:
    base, adapter, delta = small_adapter(relative)
    save_file(base, tmp_path / "base.safetensors")
    save_file(adapter, tmp_path / "adapter.safetensors")
    command = ["merge-lora", tmp_path / "base.safetensors", tmp_path / "adapter.safetensors"]
    ran = ckpt(*command, tmp_path / "out.safetensors")
    assert ran.status == 0, ran.err
    kept = load_file(tmp_path / "out.safetensors")["fc.weight"].double() - base["fc.weight"].double()
    found = float(functional.cosine_similarity(kept.flatten(), delta.double().flatten(), dim=0))
    assert found == pytest.approx(cosine, abs=0.03)
    assert f"keeps cos {found:.4f}" in ran.out + ran.err
    assert "warning" in ran.out + ran.err
    ran = ckpt(*command, tmp_path / "wide.safetensors", "--dtype", "fp32")
    assert "keeps cos 1.0000" in ran.out + ran.err
    assert "warning" not in ran.out + ran.err
    assert load_file(tmp_path / "wide.safetensors")["fc.weight"].dtype == torch.float32


def test_stochastic_rounding_keeps_the_mean_of_a_change_and_is_the_same_for_one_seed() -> None:
    base, adapter, delta = small_adapter(3e-4)
    near = merged(adapter, base)["fc.weight"].double() - base["fc.weight"].double()
    runs = [merged(adapter, base, rounding="stochastic", seed=seed)["fc.weight"].double() - base["fc.weight"].double()
            for seed in range(8)]  # fmt: skip
    again = merged(adapter, base, rounding="stochastic", seed=0)["fc.weight"].double() - base["fc.weight"].double()
    assert torch.equal(again, runs[0])
    along = [float((one * delta).sum() / (delta * delta).sum()) for one in (near, sum(runs) / len(runs))]
    assert abs(along[1] - 1) < 0.1 < abs(along[0] - 1)


def test_what_somebody_else_merged_is_measured(tmp_path: Path, ckpt: Run) -> None:
    base, adapter, delta = small_adapter(1e-3)
    base |= {"norm.weight": torch.ones(4)}
    theirs = {"fc.weight": (base["fc.weight"].float() + delta).bfloat16(), "norm.weight": torch.zeros(4)}
    files = [tmp_path / name for name in ("base.safetensors", "merged.safetensors", "adapter.safetensors")]
    for state, file in zip((base, theirs, adapter), files, strict=True):
        save_file(state, file)
    ran = ckpt("diff", files[0], files[1], "--values", "--adapter", files[2])
    assert ran.status == 1
    kept = (theirs["fc.weight"].double() - base["fc.weight"].double()).flatten()
    cosine = float(functional.cosine_similarity(kept, delta.double().flatten(), dim=0))
    error = float((kept - delta.double().flatten()).norm() / delta.double().norm())
    assert f"of what the adapters add, 1 tensor: cos {cosine:.4f}, error {error:.2%}" in ran.out
    assert "warning: 1 tensor below cos 0.99" in ran.out
    assert "changed without the adapters: 'norm.weight'" in ran.out
    found = ckpt_surgeon.compare(base, theirs, adapters=[adapter], scale=[2.0]).survived["fc.weight"]
    assert found.lost > error  # at another scale, it is not that adapter
    none = ckpt_surgeon.compare(base, base, adapters=[adapter]).survived["fc.weight"]
    assert (none.cosine, none.lost) == (0, 1)
    ran = ckpt("diff", files[0], files[1], "--adapter", files[2])
    assert "--adapter goes with --values" in ran.err
