"""Kernels of another size, in space, in time and over channels, against timm's and torch's own functions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command_line import Run
from torch import nn
from torch.nn.functional import conv2d, conv3d, interpolate

import ckpt_surgeon
from ckpt_surgeon import (
    EditError,
    NothingMatched,
    Recipe,
    fit,
    from_torch,
    inflate,
    resize_channels,
    resize_grid,
    resize_kernel,
    step,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("after", [(32, 32), (8, 8), (14, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_patch_embedding_is_resized_as_timm_does_it(after: tuple[int, int], dtype: torch.dtype) -> None:
    from timm.layers.patch_embed import resample_patch_embed

    weight = random(3, 2, 16, 16).to(dtype)
    made = resize_kernel({"w": weight}, "w", f"{after[0]}x{after[1]}")["w"]
    assert made.dtype == dtype
    torch.testing.assert_close(made, resample_patch_embed(weight, list(after)))
    opened = resize_kernel(from_torch({"w": weight}), "w", f"{after[0]}x{after[1]}")
    assert torch.equal(opened["w"].load(), made)


def test_larger_patches_give_what_the_same_patches_gave_when_they_were_small() -> None:
    weight, picture = random(4, 3, 8, 8), random(2, 3, 8, 8)
    larger = interpolate(picture, (16, 16), mode="bicubic", align_corners=False, antialias=True)
    made = resize_kernel({"w": weight}, "w", "16x16")["w"]
    torch.testing.assert_close(conv2d(larger, made), conv2d(picture, weight), rtol=1e-4, atol=1e-4)


def test_a_kernel_can_be_resized_as_a_picture() -> None:
    weight = random(4, 3, 16, 16)
    wanted = interpolate(weight, (32, 32), mode="bicubic", align_corners=False, antialias=True)
    torch.testing.assert_close(resize_kernel({"w": weight}, "w", "32x32", mode="bicubic")["w"], wanted)
    assert resize_kernel({"w": weight}, "w", "16x16")["w"] is weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_an_inflated_kernel_is_repeated_and_divided_or_stands_in_the_middle(dtype: torch.dtype) -> None:
    weight = random(4, 3, 2, 2).to(dtype)
    assert torch.equal(inflate({"w": weight}, "w", 3)["w"], weight.unsqueeze(2).repeat(1, 1, 3, 1, 1) / 3)
    middle = inflate({"w": weight}, "w", 3, mode="centre")["w"]
    assert torch.equal(middle[:, :, 1], weight)
    assert not middle[:, :, ::2].any()


def test_a_still_picture_gives_what_it_gave() -> None:
    weight, picture = random(4, 3, 3, 3), random(1, 3, 6, 6)
    still = picture.unsqueeze(2).repeat(1, 1, 5, 1, 1)
    for mode in ("repeat", "centre"):
        made = inflate({"w": weight}, "w", 5, mode=mode)["w"]
        torch.testing.assert_close(conv3d(still, made)[:, :, 0], conv2d(picture, weight), rtol=1e-4, atol=1e-4)


def test_a_new_channel_is_the_mean_of_the_others_which_stay() -> None:
    weight = random(5, 3, 3, 3)
    made = resize_channels({"w": weight}, "w", 5, mode="copy-mean")["w"]
    assert torch.equal(made[:, :3], weight)
    mean = weight.double().mean(1).float()
    assert torch.equal(made[:, 3], mean)
    assert torch.equal(made[:, 4], mean)
    assert torch.equal(resize_channels({"w": weight}, "w", 3, mode="copy-mean")["w"], weight)
    with pytest.raises(EditError, match="copy-mean only adds some"):
        resize_channels({"w": weight}, "w", 1, mode="copy-mean")


@pytest.mark.parametrize("size", ["32", "0x3", "3x", "x", "16x16:32x32"])
def test_a_size_is_stated_in_one_form(size: str) -> None:
    with pytest.raises(EditError, match="write it like 32x32"):
        resize_kernel({"w": random(1, 1, 2, 2)}, "w", size)


def test_what_is_no_convolution_is_refused() -> None:
    state = {"fc": random(2, 2), "count": torch.ones(1, 1, 2, 2, dtype=torch.int64)}
    for one in (step("resize_kernel", patterns="*", size="2x2"), step("inflate", patterns="*", frames=3)):
        with pytest.raises(EditError) as raised:
            one.plan(state)
        assert len(raised.value.problems) == 2
    with pytest.raises(EditError, match="-1 frames"):
        inflate(state, "*", -1)
    for name, size in (
        ("resize_kernel", {"size": "auto"}),
        ("inflate", {"frames": 0}),
        ("resize_grid", {"grid": "auto"}),
    ):
        with pytest.raises(EditError, match="read from a model by fit alone"):
            step(name, patterns="fc", **size).plan(state)
        with pytest.raises(NothingMatched):
            step(name, patterns="other", **size).plan(state)


@pytest.mark.parametrize("after", [6, 3])
def test_position_embeddings_are_resampled_as_timm_does_it(after: int) -> None:
    from timm.layers import resample_abs_pos_embed

    old = random(1, 18, 8)
    made = resize_grid({"p": old}, "p", f"4x4:{after}x{after}", prefix_tokens=2, antialias="always")["p"]
    wanted = resample_abs_pos_embed(old, [after, after], num_prefix_tokens=2)
    torch.testing.assert_close(made, wanted)


# -- in fit, where the model has the sizes


class Patches(nn.Module):
    def __init__(self, patch: int, tokens: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, 4, patch, patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, 4))


def test_fit_reads_grids_and_sizes_from_the_model_and_the_keys() -> None:
    from timm.layers import resample_abs_pos_embed
    from timm.layers.patch_embed import resample_patch_embed

    state = {"proj.weight": random(4, 3, 8, 8), "proj.bias": random(4), "pos_embed": random(1, 17, 4)}
    adapt = Recipe(
        (
            step("resize_grid", patterns="*embed", grid="auto", antialias="always"),
            step("resize_kernel", patterns="proj.weight", size="auto"),
        )
    )
    made = ckpt_surgeon.load(fit(from_torch(state), Patches(16, 37), adapt=adapt).result)
    torch.testing.assert_close(made["pos_embed"], resample_abs_pos_embed(state["pos_embed"], [6, 6]))
    torch.testing.assert_close(made["proj.weight"], resample_patch_embed(state["proj.weight"], [16, 16]))


@pytest.mark.parametrize(("before", "after"), [(17, 40), (21, 37), (12, 48)])
def test_grids_that_are_not_told_are_refused(before: int, after: int) -> None:
    state = {**Patches(2, 25).state_dict(), "pos_embed": random(1, before, 4)}
    adapt = Recipe((step("resize_grid", patterns="pos_embed", grid="auto"),))
    with pytest.raises(EditError, match="are no square grids"):
        fit(from_torch(state), Patches(2, after), adapt=adapt)


def test_two_lengths_leave_two_squares_for_one_number_of_tokens_alone() -> None:
    squares = {side * side for side in range(1, 40)}
    for before in range(1, 60):
        for after in range(before + 1, 1000):
            assert sum(before - tokens in squares and after - tokens in squares for tokens in range(10)) < 2


class Video(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, (5, 3, 3))


def test_fit_inflates_to_the_frames_of_the_model() -> None:
    old = nn.Conv2d(3, 4, 3)
    state = {f"conv.{key}": value for key, value in old.state_dict().items()}
    adapt = Recipe((step("inflate", patterns="conv.weight", frames=0),))
    made = ckpt_surgeon.load(fit(from_torch(state), Video(), adapt=adapt).result)
    assert torch.equal(made["conv.weight"], old.weight.detach().unsqueeze(2).repeat(1, 1, 5, 1, 1) / 5)


MODELS = """
import torch
from torch import nn
class Trained(nn.Module):
    def __init__(self, eps=1e-3):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=eps)
    def forward(self, x):
        return self.bn(self.conv(x))
class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.BatchNorm2d(2), nn.BatchNorm2d(2, eps=1e-3)
class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
class Vit(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Conv2d(3, 4, 4, 4)
        self.pos_embed = nn.Parameter(torch.zeros(1, 37, 4))
class Video(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv3d(4, 4, (3, 3, 3))
"""


def test_the_command_folds_norms_before_it_aligns(ckpt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(MODELS)
    conv, norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=1e-3)
    norm(random(8, 4, 5, 5))
    state = {f"conv.{key}": value for key, value in conv.state_dict().items()}
    torch.save(state | {f"bn.{key}": value for key, value in norm.state_dict().items()}, "in.pth")
    (tmp_path / "names.toml").write_text("[[edit]]\ndo = 'rename'\npairs = [['conv', 'stem']]\n")
    for how in ("1e-3", "nets.py:Trained()"):
        ran = ckpt("fit", "in.pth", "nets.py:Plain()", "out.pth", "-f", "--fold-norm", how, "--recipe", "names.toml")
        assert ran.status == 0, ran.err
        assert "adapted" in ran.out
        made = torch.load("out.pth")
        x = random(2, 3, 6, 6)
        torch.testing.assert_close(
            conv2d(x, made["stem.weight"], made["stem.bias"]), norm.eval()(conv(x)), rtol=1e-4, atol=1e-4
        )
    ran = ckpt("fit", "in.pth", "nets.py:Plain()", "out.pth", "-f", "--fold-norm", "nets.py:Two()")
    assert (ran.status, "have eps 1e-05 and 0.001" in ran.err) == (2, True)
    ran = ckpt("fit", "in.pth", "nets.py:Plain()", "out.pth", "-f", "--fold-norm", "much")
    assert (ran.status, "--fold-norm takes an eps" in ran.err) == (2, True)


def test_the_command_reads_sizes_from_the_model(ckpt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(MODELS)
    torch.save({"proj.weight": random(4, 3, 2, 2), "proj.bias": random(4), "pos_embed": random(1, 17, 4)}, "vit.pth")
    ran = ckpt("fit", "vit.pth", "nets.py:Vit()", "out.pth", "--grid", "pos_embed", "auto", "--kernel", "proj.weight",
               "auto", "--antialias", "always")  # fmt: skip
    assert ran.status == 0, ran.err
    assert torch.load("out.pth")["pos_embed"].shape == (1, 37, 4)
    torch.save({"stem.weight": random(4, 4, 3, 3), "stem.bias": random(4)}, "flat.pth")
    ran = ckpt("fit", "flat.pth", "nets.py:Video()", "video.pth", "--inflate", "stem.weight", "0", "--inflate-mode",
               "centre")  # fmt: skip
    assert ran.status == 0, ran.err
    assert not torch.load("video.pth")["stem.weight"][:, :, 0].any()
    ran = ckpt("edit", "vit.pth", "edited.pth", "--resize-kernel", "proj.weight=4x4 mode=bicubic", "--inflate",
               "proj.weight=2")  # fmt: skip
    assert ran.status == 0, ran.err
    assert torch.load("edited.pth")["proj.weight"].shape == (4, 3, 2, 4, 4)
