"""Optimizers whose state is not of the parameter's shape: kept by renames, given up and said where it cannot follow."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import nn

import ckpt_surgeon
from ckpt_surgeon.runs.describe import training_of
from ckpt_surgeon.runs.run import Run

Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def muon(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch 2.9 and later have Muon")
    return torch.optim.Muon(parameters, lr=0.01)


def lbfgs(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters, lr=0.1, max_iter=2, history_size=3)


def of_transformers(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    found = pytest.importorskip("transformers.optimization").Adafactor(parameters, relative_step=False, lr=0.01)
    assert isinstance(found, torch.optim.Optimizer)
    return found


def eight_bit(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    found = pytest.importorskip("bitsandbytes").optim.Adam8bit(parameters, lr=0.01, min_8bit_size=1)
    assert isinstance(found, torch.optim.Optimizer)
    return found


class Shampoo(torch.optim.Optimizer):
    """State as Shampoo's implementations have it: a preconditioner for each dimension, and its inverse root."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.01, "momentum": 0.9, "update_freq": 1, "eps": 1e-4})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state, grad = self.state[parameter], parameter.grad
                state["step"] = state.get("step", 0) + 1
                update = grad
                for dim, size in enumerate(grad.shape):
                    name = f"precond_{dim}"
                    matrix = update.transpose(0, dim).reshape(size, -1)
                    state[name] = state.get(name, 1e-2 * torch.eye(size)) + matrix @ matrix.t()
                    state[f"inv_{name}"] = root = torch.linalg.inv(state[name])
                    update = (root @ matrix).reshape(update.transpose(0, dim).shape).transpose(0, dim)
                parameter.data.sub_(group["lr"] * update)


# what makes the optimizer, and the kind that it is taken for
OTHERS: dict[str, tuple[Make, str]] = {
    "Muon": (muon, "Muon"),
    "LBFGS": (lbfgs, "LBFGS"),
    "Adafactor": (torch.optim.Adafactor, "Adafactor"),
    "Adafactor of transformers": (of_transformers, "Adafactor (transformers)"),
    "8-bit Adam of bitsandbytes": (eight_bit, "bitsandbytes"),
    "Shampoo": (Shampoo, ""),
}
others = pytest.mark.parametrize("name", OTHERS)


class Net(nn.Module):
    """Matrices alone, of four shapes, since Muon takes no others."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 6, bias=False))
        self.fc = nn.Linear(6, classes, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(x))  # type: ignore[no-any-return]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, steps: int = 3) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        x = torch.randn(8, 4, generator=generator)

        def closure(x: torch.Tensor = x) -> float:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            losses.append(loss.item())
            return loss  # type: ignore[no-any-return]

        if not isinstance(optimizer, torch.optim.LBFGS):
            closure()
            optimizer.step()
        else:
            optimizer.step(closure)
    return losses


def saved(folder: Path, make: Make) -> tuple[Path, list[float]]:
    model = Net()
    optimizer = make(model.parameters())
    train(model, optimizer, 1)
    wrapped = {f"module.{key}": value for key, value in model.state_dict().items()}
    path = folder / "last.ckpt"
    torch.save({"model": wrapped, "optimizer": optimizer.state_dict()}, path)
    return path, train(model, optimizer, 2)


def opened(path: Path) -> Run:
    run = ckpt_surgeon.open_run(path, in_model_order=True)
    assert isinstance(run, Run)
    return run


def resumed(path: Path, make: Make, classes: int = 5) -> tuple[nn.Module, torch.optim.Optimizer]:
    file = torch.load(path, weights_only=False)
    model = Net(classes)
    model.load_state_dict(file["model"])
    optimizer = make(model.parameters())
    optimizer.load_state_dict(file["optimizer"])
    return model, optimizer


@others
def test_a_rename_keeps_the_run_bit_for_bit(name: str, tmp_path: Path) -> None:
    make, kind = OTHERS[name]
    path, losses = saved(tmp_path, make)
    assert training_of(path, in_model_order=True).optimizers[0].kind == kind
    run = ckpt_surgeon.strip_prefix(opened(path))
    assert run.proof == "same run"
    ckpt_surgeon.save(run, tmp_path / "clean.ckpt")
    assert train(*resumed(tmp_path / "clean.ckpt", make), 2) == losses


@others
def test_a_parameter_that_grew_starts_afresh_and_that_is_said(name: str, tmp_path: Path) -> None:
    make, _ = OTHERS[name]
    path, _ = saved(tmp_path, make)
    run = ckpt_surgeon.pad(ckpt_surgeon.strip_prefix(opened(path)), "fc.weight", after=2)
    assert run.proof == "kept part"
    assert any("afresh" in note or "fresh optimizer state" in note for note in run.notes)
    ckpt_surgeon.save(run, tmp_path / "grown.ckpt")
    before, after = (
        torch.load(one, weights_only=False)["optimizer"]["state"] for one in (path, tmp_path / "grown.ckpt")
    )
    if name == "LBFGS":
        assert after == {}
    else:
        assert sorted(before) == [0, 1, 2]
        assert sorted(after) == [0, 1]
        assert all(map(same, [before[0], before[1]], [after[0], after[1]]))
    train(*resumed(tmp_path / "grown.ckpt", make, classes=7), 2)


@others
def test_a_dropped_parameter_leaves_the_others_as_they_were(name: str, tmp_path: Path) -> None:
    make, _ = OTHERS[name]
    path, _ = saved(tmp_path, make)
    run = ckpt_surgeon.drop(ckpt_surgeon.strip_prefix(opened(path)), "fc.weight")
    ckpt_surgeon.save(run, tmp_path / "short.ckpt")
    before, after = (torch.load(one, weights_only=False)["optimizer"] for one in (path, tmp_path / "short.ckpt"))
    assert after["param_groups"][0]["params"] == [0, 1]
    if name == "LBFGS":
        assert after["state"] == {}
    else:
        assert sorted(after["state"]) == [0, 1]
        assert all(same(before["state"][id_], after["state"][id_]) for id_ in (0, 1))


def same(one: object, other: object) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one == other
