"""The hint of ls is a command that can be pasted, takes the wrapper's names off, and loses nothing."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from command_line import Run


def linear(prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}fc.weight": torch.ones(2, 2), f"{prefix}fc.bias": torch.ones(2)}


def hinted(ckpt: Run, *words: object) -> list[str]:
    """The words of the command that the hint of ls suggests."""
    found = re.search(r"to take it off: ckpt (.*?)(?: \(or in the file itself.*)?$", ckpt("ls", *words).out, re.M)
    return shlex.split(found[1]) if found else []


@pytest.mark.parametrize(
    ("prefix", "who"),
    [
        ("module.", "DataParallel"),
        ("_orig_mod.", "torch.compile"),
        ("module._orig_mod.", "torch.compile"),
        ("_fsdp_wrapped_module.", "FSDP"),
        ("base_model.model.", "PEFT"),
    ],
)
def test_a_wrapper_is_named_and_the_hint_takes_it_off(prefix: str, who: str, ckpt: Run, tmp_path: Path) -> None:
    torch.save(linear(prefix), tmp_path / "model.pth")
    assert f"({who})" in ckpt("ls", tmp_path / "model.pth").out
    assert ckpt(*hinted(ckpt, tmp_path / "model.pth")).status == 0
    assert set(torch.load(tmp_path / "clean.pth")) == {"fc.weight", "fc.bias"}


def test_a_wrapper_inside_keys_is_found_too(ckpt: Run, tmp_path: Path) -> None:
    torch.save({"layers.0._fsdp_wrapped_module.weight": torch.ones(2), "norm": torch.ones(2)}, tmp_path / "model.pth")
    assert ckpt(*hinted(ckpt, tmp_path / "model.pth")).status == 0
    assert set(torch.load(tmp_path / "clean.pth")) == {"layers.0.weight", "norm"}


def test_a_state_dict_that_was_selected_is_selected_in_the_hint_too(ckpt: Run, tmp_path: Path) -> None:
    torch.save({"model": linear(""), "ema": {k: v * 2 for k, v in linear("module.").items()}}, tmp_path / "two.pth")
    words = hinted(ckpt, tmp_path / "two.pth", "--select", "ema")
    assert words[-3:] == ["--select", "ema", "--whole"]
    assert ckpt(*words).status == 0
    made = torch.load(tmp_path / "clean.pth")
    assert set(made["ema"]) == {"fc.weight", "fc.bias"}
    assert set(made["model"]) == {"fc.weight", "fc.bias"}


def test_the_hint_on_a_training_file_keeps_the_optimizer(ckpt: Run, tmp_path: Path) -> None:
    optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1).state_dict()
    torch.save({"state_dict": linear("module."), "optimizer": optimizer, "epoch": 3}, tmp_path / "last.ckpt")
    said = ckpt("ls", tmp_path / "last.ckpt").out
    assert "--in-place" in said
    assert ckpt(*hinted(ckpt, tmp_path / "last.ckpt")).status == 0
    made = torch.load(tmp_path / "clean.ckpt")
    assert set(made) == {"state_dict", "optimizer", "epoch"}
    assert set(made["state_dict"]) == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize(
    "keys", [("fc.weight",), ("net.module.weight", "fc.weight"), ("base_model.model.fc.lora_A.weight",)]
)
def test_what_no_wrapper_put_there_has_no_hint(keys: tuple[str, ...], ckpt: Run, tmp_path: Path) -> None:
    torch.save({key: torch.ones(2, 2) for key in keys}, tmp_path / "model.pth")
    assert hinted(ckpt, tmp_path / "model.pth") == []
