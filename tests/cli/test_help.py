"""Help: every option says what it does, and every example of a help text can be pasted."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path

import click
import pytest
import torch
from command_line import Run
from safetensors.torch import save_file

from ckpt_surgeon.cli import cli
from ckpt_surgeon.edits.change import EDITS

StateDict = dict[str, torch.Tensor]


def commands() -> list[click.Command]:
    """Every command, those of groups too."""
    context = cli.make_context("ckpt", ["ls"], resilient_parsing=True)

    def inside(command: click.Command) -> Iterator[click.Command]:
        if not isinstance(command, click.Group):
            yield command
            return
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from inside(found)

    return list(inside(cli))


COMMANDS = commands()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: str(command.name))
def test_every_option_of_every_command_has_help(command: click.Command) -> None:
    options = [one for one in command.get_params(click.Context(command)) if isinstance(one, click.Option)]
    assert [option.opts for option in options if not option.help] == []
    assert command.help
    assert "``" not in command.help  # Python's markup
    assert not re.search(r":\w+:", command.help.replace(":resnet18", ""))


@pytest.mark.parametrize("name", EDITS)
def test_a_command_says_of_each_argument_what_the_edit_declares(name: str) -> None:
    command = next(one for one in COMMANDS if one.name == EDITS[name].name)
    said = {option.name: option.help for option in command.params if isinstance(option, click.Option)}
    for argument in EDITS[name].arguments.values():
        if argument.name in said:
            assert str(said[argument.name]).startswith(argument.help.rstrip("."))


# -- examples


def layers(*names: str, count: int = 2) -> StateDict:
    return {f"l.{index}.{name}": torch.ones(4, 4) for index in range(count) for name in names}


def model() -> StateDict:
    return {
        "conv1.weight": torch.ones(2, 3, 1, 1),
        "layer1.bias": torch.ones(2),
        "bn.num_batches_tracked": torch.tensor(1),
        "norm.weight": torch.ones(2),
        "logit_scale": torch.ones(()),
        "fc.weight": torch.ones(3, 4),
        "fc.bias": torch.ones(3),
        "embed.weight": torch.ones(5, 4),
    }


def small() -> StateDict:
    return {"layers.0.gamma": torch.ones(2), "layers.0.attn.q": torch.ones(2)}


def normed(layer: str, norm: str) -> StateDict:
    statistics = {f"{norm}.{name}": torch.ones(2) for name in ("weight", "bias", "running_mean", "running_var")}
    return {f"{layer}.weight": torch.ones(2, 2, 1, 1), **statistics}


def training(prefix: str) -> dict[str, object]:
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    weights = {prefix + key: torch.ones_like(value) for key, value in net.state_dict().items()}
    return {"model": weights, "optimizer": optimizer.state_dict(), "epoch": 3}


def donor() -> StateDict:
    """Another head for the model."""
    return {key: torch.zeros_like(value) for key, value in model().items() if key.startswith("fc.")}


def adapter() -> StateDict:
    """A pair of PEFT's for the model's head."""
    names = {"A": torch.ones(2, 4), "B": torch.ones(3, 2)}
    return {f"base_model.model.fc.lora_{name}.weight": value for name, value in names.items()}


def rank() -> StateDict:
    """What one of two ranks has of a layer."""
    return {"l.query_key_value.weight": torch.ones(3, 2), "l.dense_4h_to_h.weight": torch.ones(2, 2)}


# What the example of a command finds, by the name of the file.
FILES: dict[str, Callable[[], object]] = {
    "parallel.pth": lambda: {"module.fc.weight": torch.ones(2, 2)},
    "compiled.pth": lambda: {"_orig_mod.fc.weight": torch.ones(2, 2)},
    "training.ckpt": lambda: {"state_dict": {"module.fc.weight": torch.ones(2, 2)}, "epoch": 3},
    "last.ckpt": lambda: training("module."),
    "clean.ckpt": lambda: training(""),
    "backbone.pth": small,
    "old.pth": small,
    "before.pth": small,
    "after.pth": small,
    "big.pth": small,
    "downloaded.pth": small,
    "model.pth": model,
    "moco.pth": lambda: {"encoder_q.w": torch.ones(2), "encoder_k.w": torch.ones(2)},
    "vgg.pth": lambda: {"classifier.0.weight": torch.ones(2, 8)},
    "gpt2.pth": lambda: {"h.0.c_attn.weight": torch.ones(2, 6)},
    "vocoder.pth": lambda: torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 2)).state_dict(),
    "llm.pth": lambda: {"embed_tokens.weight": torch.ones(5, 4), "lm_head.weight": torch.ones(5, 4)},
    "rgb.pth": lambda: {"conv1.weight": torch.ones(2, 3, 2, 2)},
    "vit.pth": lambda: {"pos_embed": torch.ones(1, 197, 8)},
    "swin.pth": lambda: {"a.relative_position_bias_table": torch.ones(169, 2)},
    "resnet50.pth": lambda: {"stem.weight": torch.ones(3, 2), "head.weight": torch.ones(4, 3)},
    "donor.pth": donor,
    "stage1.pth": lambda: {"module.stem.weight": torch.ones(2, 2)},
    "stage2.pth": lambda: {"module.body.weight": torch.ones(2, 2)},
    "stage3.pth": lambda: {"module.head.weight": torch.ones(2, 2)},
    "mp_rank_00.pt": rank,
    "mp_rank_01.pt": rank,
    "imagenet.pth": lambda: {"weight": torch.ones(2, 3), "bias": torch.ones(4)},
}
INSTEAD = {  # smaller numbers and models of the same kind
    "4096,512,7,7": "2,2,2,2",
    "torchvision.models:resnet18(num_classes=10)": "torch.nn:Linear(3, 2)",
    "torchvision:resnet18(num_classes=10)": "torch.nn:Linear(3, 2)",
    "torchvision.models:resnet18()": "models.py:Net()",
    "torchvision.models:resnet50": "models.py:Regrouped()",
    "torchvision.models:vit_b_16()": "models.py:Net()",
}
SPECIAL: dict[str, dict[str, Callable[[], object]]] = {
    "rotary": {"llama.pth": lambda: {"l.0.attention.wq.weight": torch.ones(256, 4)}},
    "concat": {"model.pth": lambda: layers("q", "k", "v")},
    "split": {"model.pth": lambda: {f"l.{index}.qkv": torch.ones(6, 2) for index in range(2)}},
    "fold-norm": {
        "resnet.pth": lambda: normed("layer1.0.conv1", "layer1.0.bn1"),
        "vgg.pth": lambda: normed("features.0", "features.1"),
    },
    "norm-to-conv": {"repvgg.pth": lambda: normed("a.conv", "a.identity")},
    "sum": {
        "branches.pth": lambda: {
            f"a.{name}.weight": torch.ones(2, 2, *size)
            for name, size in (("conv_kxk", (3, 3)), ("conv_1x1", (1, 1)), ("identity", (1, 1)))
        }
    },
    "resize-kernel": {"vit.pth": lambda: {"patch_embed.proj.weight": torch.ones(2, 3, 16, 16)}},
    "inflate": {"resnet.pth": lambda: {"layer1.0.conv1.weight": torch.ones(2, 2, 3, 3)}},
    "stack": {"moe.pth": lambda: {f"l.0.experts.{e}.w": torch.ones(2, 2) for e in range(3)}},
    "unstack": {"stacked.pth": lambda: {"l.0.experts.w": torch.ones(3, 2, 2)}},
    "slice": {"model.pth": lambda: {"fc.weight": torch.ones(12, 4), "fc.bias": torch.ones(12)}},
    "graft": {"donor.pth": lambda: {**donor(), "encoder.w": torch.ones(2)}},
    "edit": {
        "donor.pth": lambda: {f"module.{key}": value for key, value in donor().items()},
        "parallel.pth": lambda: {"module.fc.weight": torch.ones(2), "module.conv.weight": torch.ones(2)},
    },
}
MODELS_PY = """
import torch
class Regrouped(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = torch.nn.Linear(2, 3, bias=False), torch.nn.Linear(3, 4, bias=False)
    def forward(self, x):
        return self.head(self.stem(x))
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm2d(3), torch.nn.Linear(3, 3))
        self.fc = torch.nn.Linear(3, 4)
def vit_384():
    model = torch.nn.Module()
    model.pos_embed = torch.nn.Parameter(torch.zeros(1, 577, 8))
    return model
"""
TRAIN_PY = """
import torch
def make_run():
    model = torch.nn.Linear(2, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)
"""
RECIPE = "[[edit]]\ndo = 'rename'\npairs = [['layers', 'blocks']]\n"
MERGE = "inputs = ['base', 'donor']\n[[edit]]\ndo = 'graft'\ndonor = 'donor'\ntake = 'donor::fc.*'\n"
TAKE_SEVERAL = ("ls", "diff", "check", "apply", "edit", "recipe", "strip-prefix", "resume-check")
EDITS_BY_COMMAND = {edit.name: edit.inputs for edit in EDITS.values()}
RULES = "lr = 0.01\n[[group]]\nname = 'head'\nmatch = 'fc.*'\nlr = '10x'\n"


def examples() -> list[str]:
    """Every line of every example."""
    texts = [(command.help or "").partition("Example:")[2] for command in COMMANDS]
    return [line.strip() for text in texts for line in text.splitlines() if line.strip().startswith("ckpt ")]


def make_inputs(words: list[str]) -> None:
    """The checkpoints of one model that stand before OUT, where nothing else is said of them."""
    files = [*takewhile(lambda word: not word.startswith("--"), words)][:-1]
    for name in files:
        if not Path(name).exists():
            save_file(model(), name) if name.endswith(".safetensors") else torch.save(model(), name)


@pytest.mark.parametrize("example", examples())
def test_the_example_of_a_help_text_runs(
    example: str, ckpt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, command, *words = (INSTEAD.get(word, word) for word in shlex.split(example))
    inputs = words if command in TAKE_SEVERAL or EDITS_BY_COMMAND.get(command) else words[:1]
    for name, make in (FILES | SPECIAL.get(command, {})).items():
        if name in inputs:
            torch.save(make(), name)
    for name in ("unet.safetensors", "vae.safetensors"):
        if name in inputs:
            save_file({"conv.weight": torch.ones(2, 2)}, name)
    for name in ("model.safetensors", "old.safetensors", *(["new.safetensors"] if command == "diff" else [])):
        if name in inputs:
            save_file(model(), name)
    if command in ("merge-lora", "diff"):
        base = {"base.safetensors": model(), "sd.safetensors": {"mid.fc.weight": torch.ones(3, 4)}}
        style = {
            "lora_unet_mid_fc.lora_down.weight": torch.ones(2, 4),
            "lora_unet_mid_fc.lora_up.weight": torch.ones(3, 2),
        }
        base |= {"merged.safetensors": model()} if command == "diff" else {}
        for name, tensors in (base | {"adapter.safetensors": adapter(), "style.safetensors": style}).items():
            save_file(tensors, name)
    if command == "extract-lora":
        torch.save(model(), "pretrained.pth")
        torch.save(
            {key: value + 1 if key.startswith(("fc", "norm")) else value for key, value in model().items()}, "tuned.pth"
        )
    if "fp8.safetensors" in inputs:
        codes = {"fc.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "fc.weight_scale_inv": torch.ones(1, 1)}
        save_file(codes, "fp8.safetensors")
    if command == "index":
        Path("shards").mkdir()
        for number, (key, tensor) in enumerate(small().items(), 1):
            save_file({key: tensor}, f"shards/model-{number:05d}-of-00002.safetensors")
    if EDITS_BY_COMMAND.get(command):
        make_inputs(words)
    Path("models.py").write_text(MODELS_PY)
    Path("train.py").write_text(TRAIN_PY)
    Path("rules.toml").write_text(RULES)
    Path("merge.toml").write_text(MERGE)
    if command != "align":
        Path("recipe.toml").write_text(RECIPE.replace("layers", "stem") if "resnet50.pth" in words else RECIPE)
    Path("check.toml").write_text("[keys]\nrequired = '*'\n" if "--rules" in words else "")
    if "--write-rules" in words:
        Path("check.toml").unlink()
    ran = ckpt(command, *words)
    assert "Usage" not in ran.err
    assert ran.status in ((0, 1) if command in ("diff", "align") else (0,)), ran.err
