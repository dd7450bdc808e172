"""Runs in distributed checkpoints: torch's own saver writes, torch's own loader resumes, bit for bit."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command_line import Run as CommandLine
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.nn.functional import mse_loss

import ckpt_surgeon
from ckpt_surgeon import EditError
from ckpt_surgeon.runs.describe import training_of
from ckpt_surgeon.runs.optimizer_keys import with_optimizer_keys
from ckpt_surgeon.runs.resume_check import resume_check
from ckpt_surgeon.runs.run import Run
from ckpt_surgeon.runs.values import with_values

LAYOUTS = ("nested", "flat")
layouts = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.DEBUG)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


class Net(nn.Module):
    """``name`` is that of its body."""

    def __init__(self, name: str = "body", classes: int = 2) -> None:
        super().__init__()
        self.name = name
        setattr(self, name, nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)))
        self.fc = nn.Linear(6, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(getattr(self, self.name)(x))  # type: ignore[no-any-return]


def made(name: str = "body", classes: int = 2) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Net(name, classes)
    matrices = [one for one in model.parameters() if one.dim() > 1]
    vectors = [one for one in model.parameters() if one.dim() == 1]
    groups: list[dict[str, object]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=0.01)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        x, y = torch.randn(8, 4, generator=generator), torch.randn(8, 2, generator=generator)
        loss = mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def beside() -> dict[str, object]:
    """What people keep beside: numbers, text, tuples, lists with tensors, dicts in dicts, bytes."""
    return {
        "train_state": {"step": torch.tensor(5), "ratio": 0.5},
        "args": {"lr": 0.1, "names": ("a", "b"), "nothing": None, "raw": b"abc"},
        "history": [torch.ones(2), {"loss": torch.zeros(3)}],
    }


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, layout: str) -> dict[str, object]:
    """A run as people save it: nested, or as torchtitan does, with weights at the root and keys joined by dots."""
    options = StateDictOptions(flatten_optimizer_state_dict=layout == "flat")
    weights, state = get_state_dict(model, optimizer, options=options)
    return {**weights, "optim": state} if layout == "flat" else {"model": weights, "optim": state}


def saved(folder: Path, layout: str) -> tuple[Path, list[float]]:
    """A run after five steps in a distributed checkpoint, and the losses of its next five."""
    model, optimizer = made()
    train(model, optimizer, 1)
    path = folder / layout
    save({**state_of(model, optimizer, layout), **beside()}, checkpoint_id=path, no_dist=True)
    return path, train(model, optimizer, 2)


def resumed(path: Path, layout: str, name: str = "body") -> list[float]:
    model, optimizer = made(name)
    state = state_of(model, optimizer, layout)
    load(state, checkpoint_id=path, no_dist=True)
    weights = {key: value for key, value in state.items() if key != "optim"} if layout == "flat" else state["model"]
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state["optim"])  # type: ignore[arg-type]
    return train(model, optimizer, 2)


def opened(path: Path) -> Run:
    run = ckpt_surgeon.open_run(path)
    assert isinstance(run, Run)
    return run


@layouts
def test_torch_goes_on_bit_for_bit_after_keys_were_renamed(layout: str, tmp_path: Path) -> None:
    path, losses = saved(tmp_path, layout)
    run = ckpt_surgeon.rename(opened(path), ["body=trunk"])
    assert run.proof == "same run"
    ckpt_surgeon.save(run, tmp_path / "out.dcp")
    assert resumed(tmp_path / "out.dcp", layout, "trunk") == losses


@layouts
def test_what_lies_beside_comes_back_equal(layout: str, tmp_path: Path) -> None:
    path, _ = saved(tmp_path, layout)
    ckpt_surgeon.save(ckpt_surgeon.rename(opened(path), ["body=trunk"]), tmp_path / "out.dcp")
    found = {
        "train_state": {"step": torch.tensor(0), "ratio": 0.0},
        "args": {"lr": 0.0, "names": (), "nothing": 1, "raw": b""},
        "history": [torch.zeros(2), {"loss": torch.ones(3)}],
    }
    load(found, checkpoint_id=tmp_path / "out.dcp", no_dist=True)
    wanted = beside()
    assert found["args"] == wanted["args"]
    assert found["train_state"] == wanted["train_state"]
    assert torch.equal(found["history"][0], torch.ones(2))  # type: ignore[index]
    assert torch.equal(found["history"][1]["loss"], torch.zeros(3))  # type: ignore[index]
    metadata = FileSystemReader(path).read_metadata()
    again = FileSystemReader(tmp_path / "out.dcp").read_metadata()
    assert [tuple(str(step).replace("body", "trunk") for step in one) for one in metadata.planner_data.values()] == [
        tuple(map(str, one)) for one in again.planner_data.values()
    ]


@layouts
def test_one_process_goes_on_from_a_distributed_checkpoint(layout: str, tmp_path: Path) -> None:
    path, losses = saved(tmp_path, layout)
    ckpt_surgeon.save(with_optimizer_keys(opened(path), "positions"), tmp_path / "run.pth")
    file = torch.load(tmp_path / "run.pth", weights_only=True)
    model, optimizer = made()
    weights = file["model"] if layout == "nested" else {key: file[key] for key in model.state_dict()}
    model.load_state_dict(weights)
    optimizer.load_state_dict(file["optim"])
    assert train(model, optimizer, 2) == losses
    assert file["args"] == beside()["args"]


@layouts
def test_a_run_of_one_process_goes_on_from_a_distributed_checkpoint(layout: str, tmp_path: Path) -> None:
    model, optimizer = made()
    train(model, optimizer, 1)
    weights = model.state_dict() if layout == "flat" else {"model": model.state_dict()}
    path = tmp_path / "run.pth"
    torch.save({**weights, "optim": optimizer.state_dict()}, path)
    losses = train(model, optimizer, 2)
    matrices = [key for key, one in model.named_parameters() if one.dim() > 1]
    vectors = [key for key, one in model.named_parameters() if one.dim() == 1]
    run = ckpt_surgeon.open_run(path, stated=[*matrices, *vectors])
    assert isinstance(run, Run)
    run = with_optimizer_keys(run, "flat" if layout == "flat" else "names")
    ckpt_surgeon.save(run, tmp_path / "run.dcp")
    assert resumed(tmp_path / "run.dcp", layout) == losses


@layouts
def test_a_head_that_grew_trains_on_where_it_was(layout: str, tmp_path: Path) -> None:
    path, _ = saved(tmp_path, layout)
    run = ckpt_surgeon.pad(opened(path), "fc.*", after=3)
    assert run.proof == "kept part"
    ckpt_surgeon.save(run, tmp_path / "out.dcp")
    found = resume_check(path, tmp_path / "out.dcp", lambda: made(classes=5))
    assert found.holds, found
    assert found.kept_part == ("fc.weight", "fc.bias")
    assert len(found.equal) == 6


@layouts
def test_a_dropped_parameter_takes_its_state_and_options_along(layout: str, tmp_path: Path) -> None:
    path, _ = saved(tmp_path, layout)
    ckpt_surgeon.save(ckpt_surgeon.drop(opened(path), "fc.*"), tmp_path / "out.dcp")
    keys = FileSystemReader(tmp_path / "out.dcp").read_metadata().state_dict_metadata
    assert not [key for key in keys if "fc." in key]
    assert [key for key in keys if "body.0.weight" in key]


@layouts
def test_the_listing_tells_the_parameter_behind_each_name(layout: str, tmp_path: Path) -> None:
    path, _ = saved(tmp_path, layout)
    optimizer = training_of(path).optimizers[0]
    assert (optimizer.kind, optimizer.how, len(optimizer.groups)) == ("Adam", "its ids are names", 2)
    assert [one.key for group in optimizer.groups for one in group.parameters if one.step == 5] == [
        *("body.0.weight", "body.2.weight", "fc.weight"),
        *("body.0.bias", "body.1.weight", "body.1.bias", "body.2.bias", "fc.bias"),
    ]


@layouts
def test_a_learning_rate_is_set_in_every_group(layout: str, tmp_path: Path) -> None:
    path, _ = saved(tmp_path, layout)
    run = with_values(opened(path), ["optim.param_groups.*.lr=0.5", "args.lr=1"])
    ckpt_surgeon.save(run, tmp_path / "out.dcp")
    model, optimizer = made()
    state = {**state_of(model, optimizer, layout), "args": {"lr": 0.0}}
    load(state, checkpoint_id=tmp_path / "out.dcp", no_dist=True)
    set_state_dict(model, optimizer, model_state_dict={}, optim_state_dict=state["optim"],  # type: ignore[arg-type]
                   options=StateDictOptions(strict=False))  # fmt: skip
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
    assert state["args"] == {"lr": 1.0}


def test_slots_of_a_parameter_without_options_are_refused(tmp_path: Path) -> None:
    state = {"state.fc.weight.exp_avg": torch.ones(2), "param_groups.fc.bias.lr": 0.1}
    save({"fc.weight": torch.ones(2), "optim": state}, checkpoint_id=tmp_path / "odd", no_dist=True)
    with pytest.raises(EditError, match=r"state\.fc\.weight\.exp_avg belongs to no parameter"):
        ckpt_surgeon.open_run(tmp_path / "odd")


def test_entries_beside_weights_at_the_root_of_a_file_stay(tmp_path: Path) -> None:
    model, optimizer = nn.Linear(2, 2), None
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    wrapped = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"name": "x", **wrapped, "optimizer": optimizer.state_dict(), "epoch": 3}, tmp_path / "run.pth")
    ckpt_surgeon.save(ckpt_surgeon.strip_prefix(opened(tmp_path / "run.pth")), tmp_path / "out.pth")
    file = torch.load(tmp_path / "out.pth", weights_only=True)
    assert list(file) == ["name", "weight", "bias", "optimizer", "epoch"]
    assert file["epoch"] == 3
    with pytest.raises(EditError, match="'epoch' lies beside the weights"):
        ckpt_surgeon.save(ckpt_surgeon.rename(opened(tmp_path / "run.pth"), ["module.bias=epoch"]), tmp_path / "no.pth")


def test_the_command_line_goes_from_folder_to_file_and_back(tmp_path: Path, ckpt: CommandLine) -> None:
    path, losses = saved(tmp_path, "nested")
    file, back = tmp_path / "run.pth", tmp_path / "back.dcp"
    assert ckpt("convert", path, file, "--whole", "--optimizer-keys", "positions").status == 0
    assert "Adam, 2 groups, 8 parameters" in ckpt("ls", file, "--training").out
    words = ("--whole", "--optimizer-keys", "names", "--in-model-order")
    assert ckpt("convert", file, back, *words).status == 0
    assert resumed(back, "nested") == losses
    refused = ckpt("convert", path, tmp_path / "run.safetensors", "--whole")
    assert refused.status == 2
    assert "end OUT in .pth or .pt or .bin or .ckpt or .dcp" in refused.err
