"""Small models of transformers and timm, paired by running: 95 % of the keys or more, equal outputs after a load."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import transformers
from torch import nn

from ckpt_surgeon.models.align import align
from ckpt_surgeon.models.align_recipe import alignment_recipe
from ckpt_surgeon.models.execution import EPS, pairs_by_running

Make = Callable[[], nn.Module]


def hf(model: str, config: str, **sizes: object) -> Make:
    def make() -> nn.Module:
        made = getattr(transformers, model)(getattr(transformers, config)(num_labels=5, **sizes))
        assert isinstance(made, nn.Module)
        return made

    return make


def of_timm(name: str, **sizes: object) -> Make:
    return lambda: timm.create_model(name, num_classes=5, **sizes)


# The size of the pictures, the two models, and the eps at which they are the same.
PAIRS: dict[str, tuple[int, Make, Make, float]] = {
    "SwinV2": (
        64,
        hf(
            "Swinv2ForImageClassification", "Swinv2Config", image_size=64, embed_dim=24, depths=[2, 2],
            num_heads=[2, 4], window_size=8,
        ),
        of_timm(
            "swinv2_tiny_window8_256", depths=(2, 2), embed_dim=24, num_heads=(2, 4), img_size=64, window_size=8
        ),
        EPS,
    ),
    "LeViT": (
        224,
        hf(
            "LevitForImageClassificationWithTeacher", "LevitConfig", hidden_sizes=[16, 24, 32], depths=[1, 1, 1],
            num_attention_heads=[2, 2, 2], key_dim=[8, 8, 8],
        ),
        of_timm("levit_128s", embed_dim=(16, 24, 32), depth=(1, 1, 1), num_heads=(2, 2, 2), key_dim=8),
        EPS,
    ),
    "PVTv2": (
        64,
        hf(
            "PvtV2ForImageClassification", "PvtV2Config", image_size=64, depths=[1, 1, 1, 1],
            hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 2, 3, 4],
        ),
        of_timm("pvt_v2_b0", depths=(1, 1, 1, 1), embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 3, 4)),
        EPS,
    ),
    "MobileViTV2": (
        64,
        hf("MobileViTV2ForImageClassification", "MobileViTV2Config"),
        of_timm("mobilevitv2_100"),
        EPS,
    ),
    "EfficientNet": (
        64,
        hf(
            "EfficientNetForImageClassification", "EfficientNetConfig", width_coefficient=1.0, depth_coefficient=1.0,
            image_size=224, hidden_dim=1280,
        ),
        of_timm("tf_efficientnet_b0"),
        EPS,
    ),
}  # fmt: skip
LARGE = {"MobileViTV2", "EfficientNet"}
NAMES = [pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in PAIRS]


def answer(model: nn.Module, example: torch.Tensor, eps: float) -> torch.Tensor:
    """A model's logits in float64, with the eps at which pairs are found."""
    model = model.double().eval()
    for module in model.modules():
        for name in ("eps", "variance_epsilon"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, eps)
        for name, value in vars(module).items():
            if "cache" in name and isinstance(value, dict):
                value.clear()
    with torch.no_grad():
        made = model(example)
    made = getattr(made, "logits", made)
    assert isinstance(made, torch.Tensor)
    return made


def randomised(model: nn.Module) -> nn.Module:
    torch.manual_seed(7)
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) * 0.1 + 0.5 if "var" in key else torch.randn_like(value) * 0.1)
    return model


@pytest.mark.parametrize("backwards", [False, True], ids=["to timm", "to transformers"])
@pytest.mark.parametrize("name", NAMES)
def test_the_file_that_a_proof_makes_gives_the_other_library_s_model_the_same_outputs(
    name: str, backwards: bool
) -> None:
    size, *makes, eps = PAIRS[name]
    source, target = (make() for make in (makes[::-1] if backwards else makes))
    example = torch.randn(1, 3, size, size, dtype=torch.float64)
    found = align(source, target, source_model=randomised(source), target_model=target, example=example)
    keys = [key for key, value in target.state_dict().items() if value.is_floating_point()]
    proven = [one for one in found.proposals if one.certainty == "proven"]
    assert len(proven) + len(found.made) >= 0.95 * len(keys)
    target.load_state_dict(alignment_recipe(found, source.state_dict()).apply(source.state_dict()), strict=True)
    other = torch.randn(2, 3, size, size, dtype=torch.float64)
    torch.testing.assert_close(answer(target, other, eps), answer(source, other, eps), rtol=1e-5, atol=1e-6)


class Divided(nn.Module):
    """Divides by a mean and a small number, which is a setting or stands in the code."""

    def __init__(self, *, fixed: bool) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 2)
        if not fixed:
            self.eps = 1e-3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.one(x)
        made = self.two(y / (y.abs().mean(-1, keepdim=True) + getattr(self, "eps", 1e-3)))
        assert isinstance(made, torch.Tensor)
        return made


def test_models_that_are_the_same_with_their_own_eps_alone_are_paired_with_it() -> None:
    found = pairs_by_running(Divided(fixed=True), Divided(fixed=False))
    assert (len(found.pairs), found.eps, found.cut) == (4, None, None)
    assert "each with its own eps" in found.reason
