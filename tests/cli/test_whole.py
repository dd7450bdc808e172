"""--whole on the command line: every command that writes keeps a training checkpoint, and says what it cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import Run
from torch import nn

import ckpt_surgeon

TRAIN = """
import torch
def net(classes=3):
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, classes))
def make_run():
    model = net()
    return model, torch.optim.Adam(model.parameters())
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(TRAIN)
    torch.manual_seed(0)
    model = nn.DataParallel(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)))
    for name, parameters in (("last", model.named_parameters()), ("positions", model.parameters())):
        optimizer = torch.optim.Adam(parameters)
        model.module(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        torch.save(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "note": {"a": {1, 2}}},
            f"{name}.ckpt",
        )
    return tmp_path


WORDS: dict[str, list[str]] = {
    "strip-prefix": [],
    "add-prefix": ["--prefix", "net."],
    "rename": ["module=net"],
    "keep": ["*"],
    "convert": [],
    "transpose": ["module.0.weight"],
    "edit": ["--strip-prefix", "module."],
}


@pytest.mark.parametrize("command", WORDS)
def test_every_command_that_writes_keeps_what_lies_beside_the_weights(command: str, folder: Path, ckpt: Run) -> None:
    ran = ckpt(command, "last.ckpt", "out.ckpt", *WORDS[command], "--whole")
    assert ran.status == 0, ran.err
    before, after = (torch.load(name, weights_only=False) for name in ("last.ckpt", "out.ckpt"))
    assert list(after) == list(before)
    assert (after["epoch"], after["note"]) == (before["epoch"], before["note"])
    group = after["optimizer"]["param_groups"][0]
    assert group["param_names"] == list(after["model"])
    assert group["params"] == before["optimizer"]["param_groups"][0]["params"]
    assert "left out" not in ran.out
    assert "note: same run" in ran.out or command == "transpose"


def test_a_recipe_and_a_recipe_of_align_keep_it_too(folder: Path, ckpt: Run) -> None:
    Path("rules.toml").write_text("[[edit]]\ndo = 'strip-prefix'\n[[edit]]\ndo = 'rename'\npairs = [['0', 'body']]\n")
    assert ckpt("apply", "rules.toml", "last.ckpt", "out.ckpt", "--whole").status == 0
    assert torch.load("out.ckpt", weights_only=False)["optimizer"]["param_groups"][0]["param_names"][0] == "body.weight"
    assert ckpt("align", "last.ckpt", "train.py:net()", "-o", "found.toml").status in (0, 1)
    assert ckpt("apply", "found.toml", "last.ckpt", "aligned.ckpt", "--whole").status == 0
    assert ckpt("resume-check", "last.ckpt", "aligned.ckpt", "train.py:make_run").status == 0


def test_without_the_flag_a_note_says_that_it_would_keep_the_rest(folder: Path, ckpt: Run) -> None:
    ran = ckpt("strip-prefix", "last.ckpt", "out.ckpt")
    assert "epoch, note (--whole keeps them)" in ran.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--without", "optimizer"], "--without goes with --whole"),
        (["--whole", "--max-shard-size", "1MB"], "exclude each other"),
        (["--whole", "--salvage"], "exclude each other"),
        (["--whole", "--without", "nothing"], "matches no key"),
        (["--whole", "--without", "model"], "holds the weights"),
    ],
)
def test_what_does_not_go_together_says_so_and_writes_nothing(
    words: list[str], said: str, folder: Path, ckpt: Run
) -> None:
    ran = ckpt("strip-prefix", "last.ckpt", "out.ckpt", *words)
    assert ran.status == 2
    assert said in ran.err
    assert not Path("out.ckpt").exists()


def test_a_container_of_weights_alone_cannot_keep_a_run(folder: Path, ckpt: Run) -> None:
    ran = ckpt("strip-prefix", "last.ckpt", "out.safetensors", "--whole")
    assert (ran.status, Path("out.safetensors").exists()) == (2, False)
    assert "would be lost" in ran.err


def test_ids_that_order_alone_tells_are_settled_by_a_factory(folder: Path, ckpt: Run) -> None:
    drop = ["drop", "positions.ckpt", "out.ckpt", "module.0.bias", "--whole"]
    assert ckpt(*drop).status == 0  # no other parameter has its shape
    Path("out.ckpt").unlink()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "same.ckpt")
    Path("same.py").write_text(TRAIN.replace("classes=3", "classes=4"))
    drop = ["drop", "same.ckpt", "out.ckpt", "1.*", "--whole"]
    ran = ckpt(*drop)
    assert ran.status == 2
    assert "have the same shape" in ran.err
    assert ckpt(*drop, "--run", "same.py:make_run").status == 0
    assert ckpt(*drop, "--in-model-order", "--force").status == 0
    assert torch.load("out.ckpt")["optimizer"]["param_groups"][0]["params"] == [0, 1]


def test_training_is_listed_for_machines(folder: Path, ckpt: Run) -> None:
    found = json.loads(ckpt("ls", "positions.ckpt", "--training", "--json").out)
    (optimizer,) = found["optimizers"]
    assert optimizer["kind"] == "Adam"
    parameters = optimizer["groups"][0]["parameters"]
    assert [one["key"] for one in parameters] == list(ckpt_surgeon.open("positions.ckpt"))
    assert parameters[0]["slots"] == {"step": [], "exp_avg": [4, 4], "exp_avg_sq": [4, 4]}
    assert parameters[0]["step"] == 1


def test_an_edit_that_is_called_on_a_run_gives_a_run(folder: Path, ckpt: Run) -> None:
    run = ckpt_surgeon.strip_prefix(ckpt_surgeon.open_run("last.ckpt"))
    ckpt_surgeon.save(run, "python.ckpt")
    assert ckpt("strip-prefix", "last.ckpt", "command.ckpt", "--whole").status == 0
    assert Path("python.ckpt").read_bytes() == Path("command.ckpt").read_bytes()


@pytest.mark.parametrize("edit", [lambda run: ckpt_surgeon.cast(run, "bfloat16")], ids=["cast"])
def test_values_are_not_changed_under_state_that_is_kept(
    edit: Callable[[object], object], folder: Path, ckpt: Run
) -> None:
    ran = ckpt("cast", "last.ckpt", "out.ckpt", "--dtype", "bf16", "--whole")
    assert ran.status == 2
    assert "no state fits" in ran.err
    assert ckpt("cast", "last.ckpt", "out.ckpt", "--dtype", "bf16", "--whole", "--reset", "*").status == 0
    assert torch.load("out.ckpt", weights_only=False)["optimizer"]["state"] == {}
    with pytest.raises(ckpt_surgeon.EditError):
        edit(ckpt_surgeon.open_run("last.ckpt"))
