"""Layouts of frameworks: mmengine by its own Runner, others by files that are made as their sources make them."""

from __future__ import annotations

import logging
import warnings
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import ckpt_surgeon
from ckpt_surgeon.runs.describe import training_of
from ckpt_surgeon.runs.resume_check import resume_check
from ckpt_surgeon.runs.run import Run
from ckpt_surgeon.runs.values import with_values


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def opened(path: Path, *, select: str | None = None, stated: Sequence[str] = ()) -> Run:
    run = ckpt_surgeon.open_run(path, select=select, stated=stated)
    assert isinstance(run, Run)
    return run


class Net(nn.Module):
    """A tied head and a body, whose name is given."""

    def __init__(self, name: str = "body", rows: int = 9) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.name = name
        self.wte = nn.Embedding(rows, 4)
        setattr(self, name, nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 4)))
        self.lm_head = nn.Linear(4, rows, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.lm_head(getattr(self, self.name)(self.wte(tokens)))  # type: ignore[no-any-return]


def decay_first(model: nn.Module) -> torch.optim.Optimizer:
    """The groups of nanoGPT: matrices with weight decay first."""
    matrices = [one for one in model.parameters() if one.dim() >= 2]
    vectors = [one for one in model.parameters() if one.dim() < 2]
    groups: list[dict[str, object]] = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.01)


def each_alone(model: nn.Module) -> torch.optim.Optimizer:
    """The groups of detectron2: one for each parameter."""
    groups: list[dict[str, object]] = [
        {"params": [one], "lr": 0.01 * (2 if one.dim() < 2 else 1)} for one in model.parameters()
    ]
    return torch.optim.SGD(groups, lr=0.01, momentum=0.9)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        tokens = torch.randint(0, 9, (3, 5), generator=generator)
        loss = model(tokens)[..., :9].square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def names_in_order(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    names = {id(one): name for name, one in model.named_parameters()}
    return [names[id(one)] for group in optimizer.param_groups for one in group["params"]]


# -- nanoGPT, detectron2, fairseq


def nanogpt(folder: Path) -> tuple[Path, list[float]]:
    """train.py of nanoGPT, with the prefix that a compiled model has."""
    model = Net()
    optimizer = decay_first(model)
    train(model, optimizer, 1)
    weights = OrderedDict((f"_orig_mod.{key}", value) for key, value in model.state_dict().items())
    path = folder / "ckpt.pt"
    torch.save(
        {"model": weights, "optimizer": optimizer.state_dict(), "model_args": {"n_layer": 1}, "iter_num": 5,
         "best_val_loss": torch.tensor(0.5), "config": {"dataset": "x"}},
        path,
    )  # fmt: skip
    return path, train(model, optimizer, 2)


def test_nanogpt_goes_on_once_the_prefix_of_a_compiled_model_is_off(tmp_path: Path) -> None:
    path, losses = nanogpt(tmp_path)
    ckpt_surgeon.save(ckpt_surgeon.strip_prefix(opened(path), "_orig_mod."), tmp_path / "out.pt")
    file = torch.load(tmp_path / "out.pt", weights_only=True)
    model = Net()
    optimizer = decay_first(model)
    model.load_state_dict(file["model"])
    optimizer.load_state_dict(file["optimizer"])
    assert train(model, optimizer, 2) == losses
    assert (file["iter_num"], file["best_val_loss"], file["config"]) == (5, torch.tensor(0.5), {"dataset": "x"})
    assert file["model"]["wte.weight"].data_ptr() == file["model"]["lm_head.weight"].data_ptr()


def test_nanogpt_takes_a_larger_vocabulary(tmp_path: Path) -> None:
    path, _ = nanogpt(tmp_path)
    model = Net()
    run = ckpt_surgeon.strip_prefix(opened(path, stated=names_in_order(decay_first(model), model)), "_orig_mod.")
    run = ckpt_surgeon.resize_rows(run, ["wte.weight", "lm_head.weight"], rows=12, fill="mean")
    ckpt_surgeon.save(run, tmp_path / "out.pt")

    def make_run() -> tuple[nn.Module, torch.optim.Optimizer]:
        grown = Net(rows=12)
        return grown, decay_first(grown)

    names = tuple(names_in_order(decay_first(model), model))
    before = opened(path, stated=names)
    ckpt_surgeon.save(ckpt_surgeon.strip_prefix(before, "_orig_mod."), tmp_path / "named.pt")
    found = resume_check(tmp_path / "named.pt", tmp_path / "out.pt", make_run)
    assert found.holds, found
    assert found.kept_part == ("wte.weight",)
    assert len(found.equal) == 6


def test_detectron2_goes_on_from_one_group_for_each_parameter(tmp_path: Path) -> None:
    model = Net()
    optimizer = each_alone(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    train(model, optimizer, 1)
    path = tmp_path / "model_0000004.pth"
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
         "iteration": 4},
        path,
    )  # fmt: skip
    losses = train(model, optimizer, 2)
    run = opened(path, stated=names_in_order(optimizer, model))
    ckpt_surgeon.save(ckpt_surgeon.rename(run, ["body=trunk"]), tmp_path / "out.pth")
    file = torch.load(tmp_path / "out.pth", weights_only=True)
    again = Net("trunk")
    fresh = each_alone(again)
    again.load_state_dict(file["model"])
    fresh.load_state_dict(file["optimizer"])
    assert train(again, fresh, 2) == losses

    shorter = ckpt_surgeon.drop(run, "body.2.*")
    ckpt_surgeon.save(shorter, tmp_path / "short.pth")
    file = torch.load(tmp_path / "short.pth", weights_only=True)
    assert len(file["optimizer"]["param_groups"]) == len(file["scheduler"]["base_lrs"]) == 5
    assert file["iteration"] == 4


def fairseq(model: nn.Module, state: object) -> dict[str, object]:
    """fairseq/trainer.py, state_dict."""
    return {
        "args": Namespace(arch="x"),
        "cfg": None,
        "model": model.state_dict(),
        "criterion": None,
        "optimizer_history": [
            {"criterion_name": "C", "optimizer_name": "FairseqAdam", "lr_scheduler_state": {}, "num_updates": 5}
        ],
        "task_state": {},
        "extra_state": {"train_iterator": {"epoch": 2, "iterations_in_epoch": 3}, "val_loss": 1.0},
        "last_optimizer_state": state,
    }  # fmt: skip


def test_fairseq_goes_on_and_keeps_its_history(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, optimizer, 1)
    torch.save(fairseq(model, optimizer.state_dict()), tmp_path / "checkpoint_last.pt")
    losses = train(model, optimizer, 2)
    run = ckpt_surgeon.rename(opened(tmp_path / "checkpoint_last.pt"), ["body=trunk"])
    ckpt_surgeon.save(run, tmp_path / "out.pt")
    file = torch.load(tmp_path / "out.pt", weights_only=False)
    again = Net("trunk")
    fresh = torch.optim.Adam(again.parameters(), lr=0.01)
    again.load_state_dict(file["model"])
    fresh.load_state_dict(file["last_optimizer_state"])
    assert train(again, fresh, 2) == losses
    assert file["args"] == Namespace(arch="x")
    assert file["optimizer_history"][-1]["num_updates"] == 5
    assert file["extra_state"]["train_iterator"]["iterations_in_epoch"] == 3


def test_fairseq_in_half_precision_has_one_vector_that_follows(tmp_path: Path) -> None:
    model = Net()
    keys = [name for name, _ in model.named_parameters()]
    flat = nn.Parameter(torch.cat([one.detach().reshape(-1) for one in model.parameters()]))
    optimizer = torch.optim.Adam([flat], lr=0.01)
    flat.grad = torch.arange(float(flat.numel()))
    optimizer.step()
    path = tmp_path / "checkpoint_last.pt"
    torch.save(fairseq(model, optimizer.state_dict()), path)
    assert training_of(path).optimizers[0].how.startswith("one flat vector of all parameters")
    run = ckpt_surgeon.rename(opened(path), ["body=trunk"])
    ckpt_surgeon.save(run, tmp_path / "renamed.pt")
    renamed = torch.load(tmp_path / "renamed.pt", weights_only=False)["last_optimizer_state"]
    assert torch.equal(renamed["state"][0]["exp_avg"], optimizer.state[flat]["exp_avg"])

    ckpt_surgeon.save(ckpt_surgeon.pad(ckpt_surgeon.drop(run, "trunk.1.*"), "trunk.0.bias", after=2), tmp_path / "x.pt")
    state = torch.load(tmp_path / "x.pt", weights_only=False)["last_optimizer_state"]
    assert state["param_groups"][0]["params"] == [0]
    moments = dict(zip(keys, optimizer.state[flat]["exp_avg"].split([one.numel() for one in model.parameters()])))  # noqa: B905
    wanted = [
        torch.cat([value, torch.zeros(2)]) if key == "body.0.bias" else value
        for key, value in moments.items()
        if not key.startswith("body.1.")
    ]
    assert torch.equal(state["state"][0]["exp_avg"], torch.cat(wanted))
    assert state["state"][0]["step"] == 1


# -- ultralytics


def test_ultralytics_is_kept_and_said_never_to_be_exact(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    train(model, optimizer, 1)
    state = optimizer.state_dict()
    for kept in state["state"].values():  # convert_optimizer_state_dict_to_fp16
        for name, value in kept.items():
            if name != "step" and isinstance(value, torch.Tensor) and value.dtype is torch.float32:
                kept[name] = value.half()
    path = tmp_path / "last.pt"
    torch.save(
        {"epoch": 4, "best_fitness": 0.5, "model": None, "ema": model.half(), "updates": 9, "optimizer": state,
         "train_args": {"imgsz": 640}, "train_metrics": {}, "train_results": {}, "date": "x", "version": "8"},
        path,
    )  # fmt: skip
    assert any("never was exact" in note for note in training_of(path).notes)
    run = with_values(opened(path), ["epoch=0", "train_args.imgsz=320"])
    assert any("never was exact" in note for note in run.notes)
    ckpt_surgeon.save(run, tmp_path / "out.pt")
    before, after = (torch.load(one, weights_only=False) for one in (path, tmp_path / "out.pt"))
    assert (after["epoch"], after["train_args"], after["updates"]) == (0, {"imgsz": 320}, 9)
    assert type(after["ema"]) is Net
    assert all(map(torch.equal, after["ema"].state_dict().values(), before["ema"].state_dict().values()))
    for id_, kept in before["optimizer"]["state"].items():
        momentum = after["optimizer"]["state"][id_]["momentum_buffer"]
        assert momentum.dtype is torch.float16
        assert torch.equal(momentum, kept["momentum_buffer"])


# -- mmengine


@pytest.fixture
def full_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """mmengine 0.10 loads its own classes with torch's former default."""
    monkeypatch.setattr(torch, "load", partial(torch.load, weights_only=False))


def mm_runner(folder: Path, name: str, resumed: Path | None = None) -> object:
    model = pytest.importorskip("mmengine.model", reason="not in the tests' extra: it brings OpenCV")
    runner = pytest.importorskip("mmengine.runner")

    class Model(model.BaseModel):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            setattr(self, name, nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)))

        def forward(self, x: torch.Tensor, y: torch.Tensor, mode: str = "loss") -> dict[str, torch.Tensor]:
            return {"loss": mse_loss(getattr(self, name)(x), y)}

    generator = torch.Generator().manual_seed(3)
    rows = [(torch.randn(4, generator=generator), torch.randn(2, generator=generator)) for _ in range(16)]
    return runner.Runner(
        Model(), work_dir=str(folder), experiment_name=folder.name, log_level="ERROR", default_scope="mmengine",
        train_dataloader={"dataset": rows, "batch_size": 4, "num_workers": 0, "sampler": {"type": "DefaultSampler"},
                          "collate_fn": {"type": "default_collate"}},
        train_cfg={"by_epoch": True, "max_epochs": 2}, optim_wrapper={"optimizer": {"type": "AdamW", "lr": 0.01}},
        param_scheduler={"type": "StepLR", "step_size": 1, "gamma": 0.5, "by_epoch": True},
        custom_hooks=[{"type": "EMAHook", "momentum": 0.1}], randomness={"seed": 1},
        load_from=str(resumed) if resumed else None, resume=resumed is not None,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("full_loads")
def test_mmengine_resumes_weights_and_their_average_after_keys_were_renamed(tmp_path: Path) -> None:
    mm_runner(tmp_path / "a", "net").train()  # type: ignore[attr-defined]
    source = tmp_path / "a" / "epoch_1.pth"
    run = opened(source, select="state_dict")
    assert [".".join(twin.path) for twin in run.twins] == ["ema_state_dict"]
    assert any("EMAHook swaps the two" in note for note in run.notes)
    assert any("EMAHook swaps the two" in note for note in training_of(source, select="state_dict").notes)
    ckpt_surgeon.save(ckpt_surgeon.rename(run, ["net=trunk"]), tmp_path / "renamed.pth")
    mm_runner(tmp_path / "b", "trunk", tmp_path / "renamed.pth").train()  # type: ignore[attr-defined]
    wanted, found = (torch.load(tmp_path / folder / "epoch_2.pth") for folder in ("a", "b"))
    assert (
        (wanted["meta"]["epoch"], wanted["meta"]["iter"]) == (found["meta"]["epoch"], found["meta"]["iter"]) == (2, 8)
    )
    for part in ("state_dict", "ema_state_dict"):
        assert all(map(torch.equal, found[part].values(), wanted[part].values()))
    for one, other in zip(found["optimizer"]["state"].values(), wanted["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(one[slot], other[slot]) for slot in ("step", "exp_avg", "exp_avg_sq"))
