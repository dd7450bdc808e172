"""Batch norms folded into their layers, and branches summed, against torch's and timm's own fusing functions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from command_line import Run
from tables import StateDict, ramp
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval, fuse_linear_bn_eval

import ckpt_surgeon
from ckpt_surgeon import EditError, NothingMatched, Recipe, fold_norm, norm_to_conv, step, sum_

EPS = 1e-3


def trained(module: nn.Module, seed: int = 0, *, double: bool = True) -> nn.Module:
    """A module in eval mode whose values, statistics too, are those of nobody's initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name.endswith("running_var"):
                value.copy_(torch.rand(value.shape, generator=generator) + 0.3)
            elif value.is_floating_point():
                value.copy_(
                    torch.randn(value.shape, generator=generator) * (value[0].numel() if value.dim() else 1) ** -0.5
                )
    return (module.double() if double else module).eval()


def close(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], tolerance: float = 1e-12) -> None:
    assert sorted(found) == sorted(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value.detach(), rtol=tolerance, atol=tolerance)


def fused(module: nn.Module, layer: str, tensors: nn.Module) -> StateDict:
    return {f"{layer}.{key}": value for key, value in tensors.state_dict().items()}


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 4, 3), nn.Conv2d(6, 4, 3, groups=2, bias=False), nn.Conv2d(4, 4, 3, groups=4), nn.Conv1d(3, 4, 1),
        nn.Conv3d(2, 4, 2, bias=False),
    ],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("affine", [True, False])
def test_a_convolution_and_its_norm_become_what_torch_fuses(tmp_path: Path, layer: nn.Conv2d, affine: bool) -> None:
    norm = nn.BatchNorm2d(4, eps=EPS, affine=affine)
    model = trained(nn.Sequential(layer, norm))
    state = {f"block.conv.{key}": value for key, value in layer.state_dict().items()}
    state |= {f"block.bn.{key}": value for key, value in norm.state_dict().items()}
    wanted = fused(model, "block.conv", fuse_conv_bn_eval(layer, norm))
    close(fold_norm(state, EPS), wanted)
    torch.save(state, tmp_path / "model.pth")
    made = fold_norm(ckpt_surgeon.open(tmp_path / "model.pth"), EPS)
    ckpt_surgeon.save(made, tmp_path / "out.pth")
    close(torch.load(tmp_path / "out.pth"), wanted)


def test_a_transposed_convolution_and_its_norm_become_what_torch_fuses() -> None:
    layer, norm = nn.ConvTranspose2d(6, 4, 3), nn.BatchNorm2d(4, eps=EPS)
    model = trained(nn.Sequential(layer, norm))
    made = fold_norm(model.state_dict(), EPS, layers=["{n}"], norms=["{n+1}"], transposed=True)
    close(made, fused(model, "0", fuse_conv_bn_eval(layer, norm, transpose=True)))


def test_a_grouped_transposed_convolution_gives_the_same_outputs() -> None:
    model = trained(nn.Sequential(nn.ConvTranspose2d(6, 4, 3, groups=2, bias=False), nn.BatchNorm2d(4, eps=EPS)))
    made = fold_norm(model.state_dict(), EPS, layers=["{n}"], norms=["{n+1}"], transposed=True)
    plain = nn.ConvTranspose2d(6, 4, 3, groups=2).double()
    plain.load_state_dict({key.removeprefix("0."): value for key, value in made.items()})
    x = torch.randn(2, 6, 5, 5).double()
    torch.testing.assert_close(plain(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_linear_layer_and_its_norm_become_what_torch_fuses() -> None:
    layer, norm = nn.Linear(5, 4), nn.BatchNorm1d(4, eps=EPS)
    model = trained(nn.Sequential(layer, norm))
    made = fold_norm(model.state_dict(), EPS, layers=["0"], norms=["1"])
    close(made, fused(model, "0", fuse_linear_bn_eval(layer, norm)))


@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 4), nn.Linear(6, 4, bias=False), nn.Conv2d(6, 4, 1, groups=2)], ids=repr
)
def test_a_norm_before_a_layer_gives_the_same_outputs(layer: nn.Module) -> None:
    is_linear = isinstance(layer, nn.Linear)
    norm = nn.BatchNorm1d(6, eps=EPS) if is_linear else nn.BatchNorm2d(6, eps=EPS)
    model = trained(nn.Sequential(norm, layer))
    made = fold_norm(model.state_dict(), EPS, layers=["1"], norms=["0"], norm_first=True)
    plain = (nn.Linear(6, 4) if is_linear else nn.Conv2d(6, 4, 1, groups=2)).double()
    plain.load_state_dict({key.removeprefix("1."): value for key, value in made.items()})
    x = torch.randn(3, 6).double() if is_linear else torch.randn(3, 6, 5, 5).double()
    torch.testing.assert_close(plain(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_residual_network_of_torchvision_gives_the_same_outputs_without_its_norms() -> None:
    torchvision = pytest.importorskip("torchvision")
    model = trained(torchvision.models.resnet18(num_classes=3))
    made = fold_norm(model.state_dict(), 1e-5)
    assert [key for key in made if "running_var" in key] == [
        f"layer{n}.0.downsample.1.running_var" for n in (2, 3, 4)
    ]  # neighbours in a Sequential, which nobody named
    made = fold_norm(made, 1e-5, layers=["*.downsample.{n}"], norms=["*.downsample.{n+1}"])
    plain = torchvision.models.resnet18(num_classes=3).double().eval()
    for module in list(plain.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d):
                child.register_parameter("bias", nn.Parameter(torch.zeros(child.out_channels).double()))
            elif isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    plain.load_state_dict(made)
    x = torch.randn(1, 3, 64, 64).double()
    with torch.no_grad():
        torch.testing.assert_close(plain(x), model(x), rtol=1e-10, atol=1e-10)


def test_short_floats_are_computed_in_float64_and_rounded_once() -> None:
    layer, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=EPS)
    model = trained(nn.Sequential(layer, norm), double=False).bfloat16()
    made = fold_norm(model.state_dict(), EPS, layers=["0"], norms=["1"])
    wanted = fuse_conv_bn_eval(layer.double(), norm.double())
    assert torch.equal(made["0.weight"], wanted.weight.detach().bfloat16())
    assert torch.equal(made["0.bias"], wanted.bias.detach().bfloat16())  # type: ignore[union-attr]
    norm.running_var.fill_(1e-30)  # type: ignore[union-attr]
    norm.weight.data.fill_(6e4)
    with pytest.raises(EditError, match="became inf in float16"):
        fold_norm(model.half().state_dict(), 1e-12, layers=["0"], norms=["1"])


# -- which norm belongs to which layer


class Preactivated(nn.Module):
    """A block whose norms come first, under the usual names."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)
        self.bn2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)


def test_norms_before_their_layers_are_not_folded_by_name(tmp_path: Path) -> None:
    state = Preactivated().state_dict()
    with pytest.raises(NothingMatched, match="say which, by layers and norms"):
        fold_norm(state, EPS)
    state["other.conv.weight"], state["other.bn.running_mean"] = ramp(2, 1, 1, 1), ramp(2)
    state["other.bn.running_var"] = ramp(2)
    change = fold_norm.plan(state, EPS)
    assert change.notes == (
        "1 batch norm folded, with eps 0.001",
        "'bn1', 'bn2': stand before their layers in the file, so they are not folded",
        "2 batch norms stay: 'bn1', 'bn2'",
    )
    safetensors.torch.save_file(dict(sorted(Preactivated().state_dict().items())), tmp_path / "sorted.safetensors")
    with pytest.raises(EditError, match="alphabetical order, so whether a norm comes first is open"):
        fold_norm(ckpt_surgeon.open(tmp_path / "sorted.safetensors"), EPS)


def test_what_is_no_batch_norm_or_does_not_fit_is_refused() -> None:
    state = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(5)).state_dict()
    with pytest.raises(EditError, match="'1': no running statistics, so no batch norm"):
        fold_norm(state, EPS, layers=["0"], norms=["1"])
    with pytest.raises(EditError, match=r"'3' has 5 channels, '2\.weight' of shape \[4, 3, 3, 3\] does not go with it"):
        fold_norm(state, EPS, layers=["2"], norms=["3"])
    with pytest.raises(EditError, match="a norm before a larger kernel"):
        fold_norm(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)).state_dict(), EPS, layers=["1"], norms=["0"],
                  norm_first=True)  # fmt: skip
    with pytest.raises(EditError, match="eps 0 is no small positive number"):
        fold_norm(state, 0, layers=["2"], norms=["3"])
    with pytest.raises(EditError, match="1 templates of layers and 0 of norms"):
        fold_norm(state, EPS, layers=["2"])
    with pytest.raises(NothingMatched):
        fold_norm(state, EPS)
    assert fold_norm(state, EPS, allow_unmatched=True) == state
    two = nn.ModuleDict({"a": nn.Conv2d(3, 4, 1), "b": nn.Conv2d(3, 4, 1), "bn": nn.BatchNorm2d(4)}).state_dict()
    with pytest.raises(EditError, match="'bn': more than one layer has this norm"):
        fold_norm(two, EPS, layers=["a", "b"], norms=["bn", "bn"])


# -- sums of branches


def test_smaller_kernels_stand_in_the_middle_of_larger_ones() -> None:
    branches = [nn.Conv2d(4, 6, size, padding=pad, bias=False).double()
                for size, pad in [((3, 3), (1, 1)), ((1, 3), (0, 1)), ((3, 1), (1, 0)), ((1, 1), (0, 0))]]  # fmt: skip
    state = {f"b.{n}.weight": branch.weight.detach() for n, branch in enumerate(branches)}
    made = sum_(state, ["b.{n}.weight"], "weight")
    x = torch.randn(2, 4, 7, 7).double()
    torch.testing.assert_close(
        nn.functional.conv2d(x, made["weight"], padding=1), torch.stack([branch(x) for branch in branches]).sum(0)
    )


def test_what_cannot_be_added_is_named() -> None:
    state = {"a.1": ramp(2, 2, 3, 3), "a.2": ramp(2, 2, 2, 2), "a.3": ramp(2, 1, 3, 3), "a.4": ramp(2, 2, 3, 3).half(),
             "a.5": ramp(3)}  # fmt: skip
    with pytest.raises(EditError) as raised:
        sum_(state, ["a.{n}"], "a")
    assert "'a.5' (float32 [3]) cannot be added to 'a.1' (float32 [2, 2, 3, 3])" in str(raised.value)
    with pytest.raises(EditError) as raised:
        sum_({"a.1": ramp(2, 2, 3, 3), "a.2": ramp(2, 2, 2, 2)}, ["a.{n}"], "a")
    assert raised.value.problems == ("'a.2' (float32 [2, 2, 2, 2]) cannot be added to 'a.1' (float32 [2, 2, 3, 3])",)
    with pytest.raises(EditError):
        sum_({"a": torch.arange(3), "b": torch.arange(3)}, ["a", "b"], "c")
    assert sum_({"a": torch.tensor(1.5), "b": torch.tensor(2.0)}, ["a", "b"], "c") == {"c": torch.tensor(3.5)}


REPVGG = Recipe(
    (
        step("fold_norm", eps=1e-5),
        step("norm_to_conv", norms="*.identity", into="*.identity", eps=1e-5),
        step("sum", sources=["*.conv_kxk.conv.*", "*.conv_1x1.conv.*"], optional=["*.identity.*"],
             into="*.reparam_conv.*"),
    )
)  # fmt: skip


@pytest.fixture(scope="module")
def repvgg() -> nn.Module:
    timm = pytest.importorskip("timm")
    return trained(timm.create_model("repvgg_a0", num_classes=5))


def test_the_branches_of_repvgg_become_its_plain_form(repvgg: nn.Module, tmp_path: Path) -> None:
    from timm.utils import reparameterize_model

    torch.save(repvgg.state_dict(), tmp_path / "branches.pth")
    ckpt_surgeon.save(REPVGG.apply(ckpt_surgeon.open(tmp_path / "branches.pth")), tmp_path / "plain.pth")
    made = torch.load(tmp_path / "plain.pth")
    plain = reparameterize_model(repvgg)
    close(made, plain.state_dict())
    plain.load_state_dict(made, strict=True)
    x = torch.randn(1, 3, 64, 64).double()
    with torch.no_grad():
        torch.testing.assert_close(plain(x), repvgg(x), rtol=1e-9, atol=1e-9)


def test_the_branches_of_grouped_blocks_and_of_mobileone_become_their_plain_form() -> None:
    pytest.importorskip("timm")
    from timm.models.byobnet import MobileOneBlock, RepVggBlock

    block = trained(RepVggBlock(8, 8, group_size=4))
    recipe = Recipe((step("fold_norm", eps=1e-5), step("norm_to_conv", norms="identity", into="identity", eps=1e-5,
                                                       groups=2),
                     step("sum", sources=["conv_kxk.conv.*", "conv_1x1.conv.*"], optional=["identity.*"],
                          into="reparam_conv.*")))  # fmt: skip
    made = recipe.apply(block.state_dict())
    block.reparameterize()  # type: ignore[operator]
    close(made, block.state_dict())
    one = trained(MobileOneBlock(8, 8, num_conv_branches=3, group_size=1))
    state = one.state_dict()
    one.reparameterize()  # type: ignore[operator]
    recipe = Recipe((step("fold_norm", eps=1e-5), step("norm_to_conv", norms="identity", into="identity", eps=1e-5,
                                                       groups=8),
                     step("sum", sources=["conv_kxk.{k}.conv.*", "conv_scale.conv.*"], optional=["identity.*"],
                          into="reparam_conv.*")))  # fmt: skip
    close(recipe.apply(state), {key: value for key, value in one.state_dict().items() if "id_tensor" not in key})


def test_repvit_s_layers_become_those_that_timm_fuses() -> None:
    pytest.importorskip("timm")
    from timm.models.repvit import ConvNorm, NormLinear

    first, last = (trained(one, double=False) for one in (ConvNorm(6, 4, 3), NormLinear(6, 4)))
    made = fold_norm(first.state_dict(), 1e-5, layers=["c"], norms=["bn"])
    close(made, fused(first, "c", first.fuse()), 1e-6)  # type: ignore[operator]
    made = fold_norm(last.state_dict(), 1e-5, layers=["l"], norms=["bn"], norm_first=True)
    close(made, fused(last, "l", last.fuse()), 1e-6)  # type: ignore[operator]


def test_an_identity_s_convolution_is_the_norm() -> None:
    norm = trained(nn.BatchNorm3d(4, eps=EPS))
    made = norm_to_conv({f"id.{key}": value for key, value in norm.state_dict().items()}, "id", "conv", EPS, dims=3)
    x = torch.randn(2, 4, 3, 3, 3).double()
    torch.testing.assert_close(nn.functional.conv3d(x, made["conv.weight"], made["conv.bias"]), norm(x))
    with pytest.raises(EditError, match="has 4 channels, not a multiple of 3 groups"):
        norm_to_conv({f"id.{key}": value for key, value in norm.state_dict().items()}, "id", "id", EPS, groups=3)


def test_the_commands_fold_and_sum(ckpt: Run, tmp_path: Path) -> None:
    state = {f"a.conv.{key}": value for key, value in nn.Conv2d(3, 4, 3, bias=False).state_dict().items()}
    state |= {f"a.bn.{key}": value for key, value in nn.BatchNorm2d(4).state_dict().items()}
    path, out = tmp_path / "model.pth", tmp_path / "out.pth"
    torch.save(state, path)
    ran = ckpt("fold-norm", path, out)
    assert ran.status == 2
    assert "--eps" in ran.err  # no file holds it, so nobody assumes one
    ran = ckpt("fold-norm", path, out, "--eps", "1e-5")
    assert ran.status == 0, ran.err
    assert "1 batch norm folded, with eps 1e-05" in ran.out + ran.err
    assert list(torch.load(out)) == ["a.conv.weight", "a.conv.bias"]
    ran = ckpt("edit", path, out, "-f", "--fold-norm", "1e-5", "--sum", "a.conv.weight,a.conv.weight=b.weight")
    assert ran.status == 0, ran.err
    assert list(torch.load(out)) == ["b.weight", "a.conv.bias"]


def test_an_optimizer_of_folded_layers_has_to_be_given_up_by_name(ckpt: Run, tmp_path: Path) -> None:
    net = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3, bias=False), "bn": nn.BatchNorm2d(4), "fc": nn.Linear(4, 2)})
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    x = net["fc"](net["bn"](net["conv"](torch.randn(2, 3, 3, 3))).flatten(1))
    x.sum().backward()
    optimizer.step()
    path, out = tmp_path / "run.pth", tmp_path / "out.pth"
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, path)
    ran = ckpt("fold-norm", path, out, "--eps", "1e-5", "--whole")
    assert ran.status == 2
    assert "no state fits the new ones" in ran.err
    ran = ckpt("fold-norm", path, out, "--eps", "1e-5", "--whole", "--reset", "conv.*")
    assert ran.status == 0, ran.err
    made = torch.load(out)
    assert list(made["model"]) == ["conv.weight", "conv.bias", "fc.weight", "fc.bias"]
    moments = [state["exp_avg"].shape for state in made["optimizer"]["state"].values()]
    assert moments == [(2, 4), (2,)]  # those of the head alone
