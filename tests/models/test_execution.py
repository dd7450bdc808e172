"""Pairs found by running two models: transformers, timm and torchvision are judged by their own outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
import transformers
from command_line import Run
from torch import nn

from ckpt_surgeon.errors import TargetError
from ckpt_surgeon.models.align import align
from ckpt_surgeon.models.align_recipe import alignment_recipe, commented
from ckpt_surgeon.models.execution import EPS, RunPairs, pairs_by_running

Make = Callable[[], nn.Module]


def of_transformers(model: str, config: str, **sizes: object) -> Make:
    def make() -> nn.Module:
        made = getattr(transformers, model)(getattr(transformers, config)(num_labels=5, **sizes))
        assert isinstance(made, nn.Module)
        return made

    return make


def of_timm(name: str, **sizes: object) -> Make:
    return lambda: timm.create_model(name, num_classes=5, **sizes)


VIT = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 3}
HF_VIT = {
    "image_size": 32, "hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3,
}  # fmt: skip
SWIN = {"depths": (2, 2), "embed_dim": 24, "num_heads": (2, 4), "img_size": 56}
HF_BEIT = HF_VIT | {
    "use_relative_position_bias": True, "layer_scale_init_value": 0.1, "use_mask_token": False,
    "use_absolute_position_embeddings": False,
}  # fmt: skip
timm_vit = of_timm("vit_tiny_patch16_224", **VIT)
hf_vit = of_transformers("ViTForImageClassification", "ViTConfig", **HF_VIT)
timm_swin = of_timm("swin_tiny_patch4_window7_224", **SWIN)
timm_convnext = of_timm("convnext_tiny", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32))


def hf_resnet() -> nn.Module:
    sizes = {"depths": [1, 1, 2, 1], "hidden_sizes": [8, 16, 24, 32], "embedding_size": 8, "layer_type": "basic"}
    return of_transformers("ResNetForImageClassification", "ResNetConfig", **sizes)()


def timm_resnet() -> nn.Module:
    from timm.models.resnet import BasicBlock, ResNet

    made = ResNet(BasicBlock, (1, 1, 2, 1), num_classes=5, channels=(8, 16, 24, 32), stem_width=8)
    made.conv1, made.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
    made.layer1[0].conv1 = nn.Conv2d(8, 8, 3, 1, 1, bias=False)
    made.layer1[0].downsample = None
    assert isinstance(made, nn.Module)
    return made


def tv_convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    stages = (CNBlockConfig(8, 16, 1), CNBlockConfig(16, 24, 1), CNBlockConfig(24, 32, 2), CNBlockConfig(32, None, 1))
    made = ConvNeXt(list(stages), num_classes=5)
    assert isinstance(made, nn.Module)
    return made


PAIRS: dict[str, tuple[Make, Make]] = {
    "ViT of timm and transformers": (timm_vit, hf_vit),
    "ViT of torchvision and timm": (
        lambda: torchvision.models.VisionTransformer(32, 16, 2, 3, 24, 96, num_classes=5),
        timm_vit,
    ),
    "DeiT of timm and transformers": (
        of_timm("deit_tiny_distilled_patch16_224", **VIT),
        of_transformers("DeiTForImageClassificationWithTeacher", "DeiTConfig", **HF_VIT),
    ),
    "BEiT of timm and transformers": (
        of_timm("beit_base_patch16_224", **VIT),
        of_transformers("BeitForImageClassification", "BeitConfig", **HF_BEIT),
    ),
    "Swin of timm and transformers": (
        timm_swin,
        of_transformers(
            "SwinForImageClassification", "SwinConfig", image_size=56, embed_dim=24, depths=[2, 2], num_heads=[2, 4]
        ),
    ),
    "Swin of torchvision and timm": (
        lambda: torchvision.models.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [7, 7], num_classes=5),
        timm_swin,
    ),
    "ConvNeXt of timm and transformers": (
        timm_convnext,
        of_transformers(
            "ConvNextForImageClassification", "ConvNextConfig", depths=[1, 1, 2, 1], hidden_sizes=[8, 16, 24, 32]
        ),
    ),
    "ConvNeXt of torchvision and timm": (tv_convnext, timm_convnext),
    "ResNet of transformers and timm": (hf_resnet, timm_resnet),
}  # fmt: skip
LARGER: dict[str, tuple[Make, Make]] = {
    "RegNet of torchvision and timm": (
        lambda: torchvision.models.regnet_y_400mf(num_classes=5),
        of_timm("regnety_004"),
    ),
    "MobileNetV2 of torchvision and timm": (
        lambda: torchvision.models.mobilenet_v2(num_classes=5),
        of_timm("mobilenetv2_100"),
    ),
    "MobileNetV3 of torchvision and timm": (
        lambda: torchvision.models.mobilenet_v3_small(num_classes=5),
        of_timm("mobilenetv3_small_100"),
    ),
}  # fmt: skip


def output(model: nn.Module, example: torch.Tensor) -> torch.Tensor:
    """A model's answer in float64, with the eps at which pairs are found."""
    model = model.double().eval()
    for module in model.modules():
        for name in ("eps", "variance_epsilon"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, EPS)
    with torch.no_grad():
        made = model(example)
    made = getattr(made, "logits", made)
    made = made[0] if isinstance(made, tuple) else made
    assert isinstance(made, torch.Tensor)
    return made


def randomised(model: nn.Module) -> nn.Module:
    torch.manual_seed(7)
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) * 0.1 + 0.5 if "var" in key else torch.randn_like(value) * 0.1)
    return model


def judged(source: nn.Module, target: nn.Module, found: RunPairs) -> None:
    """The target filled as the pairs say answers as the source does, in our test's own forward passes."""
    source, target = randomised(source.double()), target.double()
    ours, theirs = source.state_dict(), target.state_dict()
    for pair in found.pairs:
        theirs[pair.new].copy_(pair.value(ours, theirs[pair.new].shape))
    example = torch.randn(found.example, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(output(target, example), output(source, example), rtol=1e-5, atol=1e-6)


def assert_all_paired(source: nn.Module, target: nn.Module) -> RunPairs:
    found = pairs_by_running(source, target)
    wanted = {key for key, value in target.state_dict().items() if value.is_floating_point()}
    assert {pair.new for pair in found.pairs} == wanted
    assert not found.unproven
    assert found.difference is not None
    assert found.difference < 1e-8
    judged(source, target, found)
    return found


@pytest.mark.parametrize("backwards", [False, True], ids=["there", "back"])
@pytest.mark.parametrize("name", PAIRS)
def test_every_parameter_of_two_libraries_models_is_paired(name: str, backwards: bool) -> None:
    makes = PAIRS[name][::-1] if backwards else PAIRS[name]
    assert_all_paired(makes[0](), makes[1]())


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGER)
def test_every_parameter_of_convolutional_models_is_paired(name: str) -> None:
    source, target = LARGER[name]
    assert_all_paired(source(), target())


class Twisted(nn.Module):
    """Two equal layers in parallel, of which one is subtracted: only what comes out tells them apart."""

    def __init__(self, *, swapped: bool) -> None:
        super().__init__()
        self.a, self.b, self.end = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.unused = nn.Linear(4, 4)
        self.swapped = swapped

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.swapped:
            second, first = self.b(x), self.a(x)
            return self.end(second - 2 * first)  # type: ignore[no-any-return]
        first, second = self.b(x), self.a(x)
        return self.end(first.relu() - second)  # type: ignore[no-any-return]


class Crossed(Twisted):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.a(x), self.b(x)
        return self.end(second - 2 * first)  # type: ignore[no-any-return]


def test_of_two_equal_layers_each_goes_where_the_output_stays_the_same() -> None:
    found = pairs_by_running(Twisted(swapped=True), Crossed(swapped=True))
    names = {pair.new: pair.olds[0] for pair in found.pairs}
    assert names == {f"{name}.{leaf}": f"{name}.{leaf}" for name in ("a", "b", "end") for leaf in ("weight", "bias")}


def test_a_parameter_that_has_no_part_in_the_output_is_not_proven() -> None:
    found = pairs_by_running(Twisted(swapped=True), Twisted(swapped=True))
    assert set(found.unproven) == {"unused.weight", "unused.bias"}


def test_models_that_compute_something_else_are_not_paired_at_all() -> None:
    found = pairs_by_running(Twisted(swapped=True), Twisted(swapped=False))
    assert not found.pairs
    assert all("differ" in why or "no influence" in why or "nothing" in why for why in found.unproven.values())


def test_a_model_without_values_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(TargetError, match="meta device"):
        pairs_by_running(model, nn.Linear(2, 2))


# In an alignment, and in the recipe


@pytest.mark.parametrize("backwards", [False, True], ids=["there", "back"])
def test_the_recipe_of_a_proof_makes_the_file_that_the_target_takes(backwards: bool) -> None:
    makes = (hf_vit, timm_vit) if backwards else (timm_vit, hf_vit)
    source, target = randomised(makes[0]()), makes[1]()
    found = align(source.state_dict(), target, source_model=source, target_model=target)
    assert found.complete
    assert {one.certainty for one in found.proposals} == {"proven"}
    recipe = alignment_recipe(found, source.state_dict())
    assert "proven" in commented(recipe, found)
    assert "1e-08" in commented(recipe, found)
    target.load_state_dict(recipe.apply(source.state_dict()), strict=True)
    example = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(output(target, example), output(source, example), rtol=1e-5, atol=1e-6)


def test_align_runs_the_model_that_source_names(tmp_path: Path, ckpt: Run) -> None:
    file, recipe = tmp_path / "net.pth", tmp_path / "recipe.toml"
    (tmp_path / "nets.py").write_text(NETS)
    torch.save({f"0.{leaf}": torch.zeros(shape) for leaf, shape in (("weight", (3, 3)), ("bias", (3,)))}, file)
    nets = tmp_path / "nets.py"
    ran = ckpt("align", file, f"{nets}:target", "--source", f"{nets}:source", "-o", recipe, "--min-certainty", "proven")
    assert (ran.status, ran.err) == (0, "")
    assert "proven" in ran.out
    assert "same output" in recipe.read_text()
    wrong = ckpt("align", file, f"{nets}:target", "--source", "torch.nn:Linear(7, 7)")
    assert wrong.status == 2
    assert "none of the checkpoint's keys" in wrong.err
    assert ckpt("align", file, file, "--source", f"{nets}:source").status == 2


NETS = """
from collections import OrderedDict
from torch import nn

def source():
    return nn.Sequential(nn.Linear(3, 3), nn.ReLU())

def target():
    return nn.Sequential(OrderedDict(body=nn.Linear(3, 3), act=nn.ReLU()))
"""
