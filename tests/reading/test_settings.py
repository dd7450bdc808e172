"""Settings that hold tensors (modules, scalers, a criterion) are never the model beside one."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tables import assert_same, ramp

import ckpt_surgeon

NAMES = ("hyper_parameters", "hparams", "config", "args", "callbacks")
VALUES: dict[str, Callable[[], object]] = {
    "modules": lambda: {"scaler": torch.nn.BatchNorm1d(4), "transforms": [torch.nn.Linear(2, 2)]},
    "a criterion": lambda: {"criterion": torch.nn.CrossEntropyLoss(weight=ramp(3)), "lr": 0.1},
    "tensors": lambda: {"mean": ramp(3), "std": ramp(3)},
    "a namespace": lambda: argparse.Namespace(class_weights=ramp(3), model=torch.nn.Linear(2, 2)),
    "a callback's weights": lambda: {"EMA{'decay': 0.99}": {"ema_state_dict": torch.nn.Linear(3, 2).state_dict()}},
}


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", NAMES)
def test_settings_with_tensors_are_no_state_dict_beside_one(name: str, value: str, tmp_path: Path) -> None:
    model, path = torch.nn.Linear(3, 2), tmp_path / "last.ckpt"
    torch.save({"epoch": 3, name: VALUES[value](), "state_dict": model.state_dict()}, path)
    opened = ckpt_surgeon.open(path)
    assert opened.selected == "state_dict"
    assert_same(dict(ckpt_surgeon.load(opened)), model.state_dict())
    assert [part.path for part in ckpt_surgeon.ls(path).parts] == ["state_dict"]
    assert name in [left.path for left in opened.left_out]


@pytest.mark.parametrize("name", NAMES)
def test_settings_beside_parts_of_a_model_are_no_part_of_it(name: str, tmp_path: Path) -> None:
    backbone, head = torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)
    path = tmp_path / "parts.pth"
    torch.save({"backbone": backbone.state_dict(), "head": head.state_dict(), name: {"mean": ramp(3)}}, path)
    assert list(ckpt_surgeon.open(path)) == ["backbone.weight", "backbone.bias", "head.weight", "head.bias"]
    torch.save({"backbone": backbone.state_dict(), name: {"mean": ramp(3)}}, path)
    assert_same(dict(ckpt_surgeon.load(path)), backbone.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_settings_with_all_of_the_tensors_is_what_there_is(name: str, tmp_path: Path) -> None:
    model, path = torch.nn.Linear(3, 2), tmp_path / "odd.pth"
    torch.save({name: model.state_dict(), "epoch": 3}, path)
    assert_same(dict(ckpt_surgeon.load(path)), model.state_dict())
