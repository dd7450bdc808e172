"""Models of transformers, timm and torchvision by name: what the libraries themselves build is the oracle."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
import transformers
from click.shell_completion import ShellComplete
from command_line import Run

from ckpt_surgeon.cli import cli
from ckpt_surgeon.errors import TargetError
from ckpt_surgeon.models.targets import build, is_model, resolve

SIZES = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as save_pretrained writes it."""
    folder = tmp_path_factory.mktemp("hub") / "llama"
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).to(torch.bfloat16)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object) -> None:
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket.socket, "connect", refused)


def problem(target: str) -> str:
    with pytest.raises(TargetError) as caught:
        resolve(target)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{target}: ")


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def described(target: str) -> dict[str, tuple[int, ...]]:
    return {key: entry.shape for key, entry in resolve(target).items()}


def with_config(folder: Path, **changes: object) -> Path:
    """A folder with a config.json alone."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(changes))
    return folder


# -- what is built


def test_a_folder_of_transformers_is_the_model_that_from_pretrained_loads(llama: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    assert described(f"hf:{llama}") == shapes(model)
    assert {entry.dtype.name for entry in resolve(f"hf:{llama}").values()} == {"bfloat16"}
    assert described(f"hf:{llama}/config.json") == shapes(model)


def test_a_folder_needs_no_weights_and_the_model_costs_no_memory(tmp_path: Path) -> None:
    wide = {**SIZES, "hidden_size": 1 << 16, "intermediate_size": 1 << 18}
    folder = with_config(tmp_path / "wide", model_type="llama", architectures=["LlamaForCausalLM"], **wide)
    built = build(f"hf:{folder}")
    assert isinstance(built, transformers.LlamaForCausalLM)
    assert {one.device.type for one in built.state_dict().values()} == {"meta"}


def test_another_class_is_named_behind_a_hash_and_arguments_change_the_config(llama: Path) -> None:
    config = transformers.LlamaConfig(**SIZES, num_labels=7)
    labelled = transformers.LlamaForSequenceClassification(config)
    assert described(f"hf:{llama}#LlamaForSequenceClassification(num_labels=7)") == shapes(labelled)
    assert described(f"hf:{llama}#AutoModelForSequenceClassification(num_labels=7)") == shapes(labelled)
    assert len(described(f"hf:{llama}(num_hidden_layers=3)")) > len(described(f"hf:{llama}"))


def test_a_folder_of_the_hubs_cache_is_its_latest_snapshot(tmp_path: Path) -> None:
    cached = tmp_path / "models--org--llama"
    for name, layers in (("aaa", 1), ("bbb", 2)):
        config = {**SIZES, "num_hidden_layers": layers}
        with_config(cached / "snapshots" / name, model_type="llama", architectures=["LlamaModel"], **config)
    assert problem(f"hf:{cached}").startswith("has 2 snapshots; name one: hf:")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("bbb")
    assert "layers.1.mlp.up_proj.weight" in described(f"hf:{cached}")


def test_names_of_timm_and_torchvision_are_what_these_build() -> None:
    assert described("timm:resnet18(num_classes=7)") == shapes(timm.create_model("resnet18", num_classes=7))
    assert described("timm:resnet18.a1_in1k") == shapes(timm.create_model("resnet18"))
    assert described("torchvision:resnet18(num_classes=7)") == shapes(torchvision.models.resnet18(num_classes=7))
    detector = "torchvision:fasterrcnn_mobilenet_v3_large_320_fpn(num_classes=3)"
    unfetched = torchvision.models.get_model(
        "fasterrcnn_mobilenet_v3_large_320_fpn", weights=None, weights_backbone=None, num_classes=3
    )
    assert described(detector) == shapes(unfetched)


def test_what_else_a_library_has_at_its_top_is_spelled_as_ever() -> None:
    assert described("timm:create_model('resnet18')") == described("timm:resnet18")
    assert described("torchvision:models.resnet18") == described("torchvision:resnet18")


def test_a_url_of_the_hub_is_no_model_and_nor_is_a_file_of_such_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not is_model("hf://gpt2/model.safetensors")
    assert is_model("hf:gpt2")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf:gpt2").write_text("")
    assert not is_model("hf:gpt2")


# -- what is refused


def test_nothing_is_fetched_and_the_way_to_fetch_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    message = problem("hf:bert-base-uncased")
    assert message.endswith("run: hf download bert-base-uncased config.json --local-dir bert-base-uncased")
    (tmp_path / "cache" / "models--org--bert").mkdir(parents=True)
    assert problem("hf:org/bert").endswith(f"it is in the hub's cache: hf:{tmp_path}/cache/models--org--bert")
    with_config(tmp_path / "bert-base")
    assert problem("hf:bert-bose").endswith("did you mean 'bert-base'?")
    assert problem("timm:resnet18(pretrained=True)").startswith("pretrained=True asks for weights, and nothing is")
    assert problem("torchvision:resnet18(weights='DEFAULT')").startswith("weights='DEFAULT' asks for weights")


def test_a_name_that_is_not_there_is_answered_with_those_that_are(llama: Path) -> None:
    assert "did you mean 'resnet18'" in problem("timm:resnet81")
    assert "did you mean 'resnet18'" in problem("torchvision:resnet81")
    assert "did you mean 'a1_in1k'" in problem("timm:resnet18.a1_in2k")
    assert problem("timm:zzzzzz").startswith("timm has no model 'zzzzzz'; it has 1,")
    assert "did you mean 'LlamaForCausalLM'" in problem(f"hf:{llama}#LlamaForCausal")
    assert "LlamaConfig of transformers is no model" in problem(f"hf:{llama}#LlamaConfig")
    assert problem(f"hf:{llama}(num_hiden_layers=2)").endswith("did you mean 'num_hidden_layers'?")
    assert problem(f"hf:{llama}(3)").startswith("arguments change the config by name")
    assert problem("hf:").startswith("names no folder; write hf:FOLDER")


def test_a_library_that_is_not_installed_is_named_with_the_command_that_brings_it(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, target in (("transformers", f"hf:{llama}"), ("timm", "timm:resnet18"), ("torchvision", "torchvision:x")):
        monkeypatch.setitem(sys.modules, name, None)
        assert problem(target) == f"needs {name}, which is not installed; pip install {name}"


def test_code_in_a_folder_is_not_run(tmp_path: Path) -> None:
    table = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
    folder = with_config(tmp_path / "own", model_type="own", architectures=["Own"], auto_map=table)
    (folder / "modeling_own.py").write_text("raise SystemExit('this was run')\n")
    message = problem(f"hf:{folder}")
    assert "names code of its own (auto_map), which is not run; read that code" in message
    assert "AutoModelForCausalLM.from_config(" in message
    with_config(folder, model_type="llama", architectures=["Own"], auto_map=table)
    assert "which is not run" in problem(f"hf:{folder}")
    with_config(folder, model_type="llama", architectures=["LlamaModel"], auto_map=table, **SIZES)
    assert "norm.weight" in described(f"hf:{folder}")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"model_type": "llama"},
            "names no architecture; write #CLASS behind the folder, a class of transformers: #LlamaFor",
        ),
        ({"model_type": "lama"}, "has no model_type 'lama'; did you mean 'llama'"),
        ({"model_type": 3}, "has no model_type 3; pip install -U"),
        ({"hidden_size": 3}, "has no model_type: it does not say which model it is of"),
        ({"architecture": "resnet50", "num_classes": 9}, "is of timm's resnet50; write timm:resnet50(num_classes=9)"),
        ({"_class_name": "UNet2DModel"}, "is of diffusers' UNet2DModel; write a file model.py: from diffusers"),
        ({"model_type": "llama", "architectures": ["FlaxLlama"]}, "has no class 'FlaxLlama'"),
        ({"model_type": "llama", "architectures": ["LlamaModel"], "hidden_size": "x"}, "failed: "),
    ],
)
def test_a_config_that_does_not_say_the_model_is_refused(tmp_path: Path, config: object, said: str) -> None:
    folder = tmp_path / "FOLDER"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    assert said in problem(f"hf:{folder}").replace(str(folder), "FOLDER")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000, "\0", " " * (17 << 20)])
def test_a_config_that_is_no_object_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert "config.json" in problem(f"hf:{tmp_path}")


def test_other_folders_are_told_from_models(tmp_path: Path) -> None:
    assert problem(f"hf:{tmp_path}").startswith(f"{tmp_path} has no config.json; name the folder that has it")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "is the folder of an adapter" in problem(f"hf:{tmp_path}")
    pipeline = tmp_path / "pipeline"
    with_config(pipeline / "unet")
    (pipeline / "model_index.json").write_text("{}")
    assert problem(f"hf:{pipeline}").endswith("name the folder of one: 'unet'")
    assert "is a file; name the folder" in problem(f"hf:{pipeline}/model_index.json")


# -- where a target works


def test_diff_align_fit_and_freeze_plan_take_such_targets(llama: Path, tmp_path: Path, ckpt: Run) -> None:
    assert ckpt("diff", llama, f"hf:{llama}").status == 0
    assert ckpt("diff", llama, f"hf:{llama}#LlamaModel").status == 1
    assert ckpt("align", llama, f"hf:{llama}#LlamaModel").status == 0
    out = tmp_path / "inner.pth"
    ran = ckpt("fit", llama, f"hf:{llama}#LlamaModel", out)
    assert ran.status == 0, ran.err
    transformers.AutoModel.from_pretrained(llama).load_state_dict(torch.load(out), strict=True)
    head = SIZES["vocab_size"] * SIZES["hidden_size"]
    assert f"{head} of" in ckpt("freeze-plan", f"hf:{llama}", "--except", "lm_head.*").out


def test_proof_by_running_takes_such_targets(llama: Path, tmp_path: Path, ckpt: Run) -> None:
    ran = ckpt("align", llama, f"hf:{llama}", "--source", f"hf:{llama}", "--json")
    assert ran.status == 0, ran.err


def test_targets_are_completed(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(llama.parent)
    offered: Callable[[str], list[str]] = lambda incomplete: [  # noqa: E731
        item.value
        for item in ShellComplete(cli, {}, "ckpt", "_CKPT_COMPLETE").get_completions(["diff", "x.pth"], incomplete)
    ]
    assert offered("tim") == ["timm:", "tim"]
    assert "timm:resnet18" in offered("timm:resnet1")
    assert "torchvision:resnet18" in offered("torchvision:resnet1")
    assert offered("hf:ll") == ["hf:llama"]
    assert offered("hf:no/") == []
    assert offered("other:x") == []
