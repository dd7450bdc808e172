"""Training goes on from an edited checkpoint: torch's own optimizers are the judge, bit for bit."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import ckpt_surgeon
from ckpt_surgeon import CheckpointError, EditError
from ckpt_surgeon.edits.change import Change
from ckpt_surgeon.runs.in_place import plan_run_in_place
from ckpt_surgeon.runs.opening import open_run_file as open_run
from ckpt_surgeon.runs.optimizer_keys import with_optimizer_keys
from ckpt_surgeon.runs.resume_check import resume_check
from ckpt_surgeon.runs.run import Run
from ckpt_surgeon.runs.saving import save_whole as save_run
from ckpt_surgeon.runs.values import with_values
from ckpt_surgeon.tensors.checkpoint import Checkpoint
from ckpt_surgeon.writing.in_place import carry_out

Optimizer = Callable[[Iterable[object]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": partial(torch.optim.AdamW, amsgrad=True),
    "Adam": torch.optim.Adam,
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "RMSprop": partial(torch.optim.RMSprop, centered=True, momentum=0.5),
    "Adagrad": torch.optim.Adagrad,
    "Rprop": torch.optim.Rprop,
    "Adadelta": torch.optim.Adadelta,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "Adamax": torch.optim.Adamax,
    "ASGD": torch.optim.ASGD,
}
WHOLE_MATRIX: dict[str, Callable[..., torch.optim.Optimizer]] = {}
if hasattr(torch.optim, "Adafactor"):
    WHOLE_MATRIX["Adafactor"] = torch.optim.Adafactor
named = pytest.mark.parametrize("named", [False, True], ids=["by position", "with names"])


class Net(nn.Module):
    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 6))
        self.fc = nn.Linear(6, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(x))  # type: ignore[no-any-return]


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, steps: int = 5) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        x, y = torch.randn(8, 4, generator=generator), torch.randint(0, 3, (8,), generator=generator)
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def saved(folder: Path, make: Callable[..., torch.optim.Optimizer], *, named: bool = False) -> tuple[Path, list[float]]:
    """A run under DataParallel after five steps, in a file, and the losses of its next five."""
    torch.manual_seed(0)
    model = nn.DataParallel(Net())
    optimizer = make(model.named_parameters() if named else model.parameters())
    trained(model.module, optimizer, 1)
    path = folder / "last.ckpt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}, path)
    return path, trained(model.module, optimizer, 2)


def edited(run: Run, edit: Callable[[Checkpoint], Change[Checkpoint]], **how: object) -> Run:
    return run.edited(edit, **how)[0]  # type: ignore[arg-type]


def written(run: Run, out: Path) -> Path:
    save_run(run, out)
    return out


def resumed(path: Path, make: Callable[..., torch.optim.Optimizer], *, named: bool, classes: int = 5) -> list[float]:
    file = torch.load(path, weights_only=True)
    model = Net(classes)
    optimizer = make(model.named_parameters() if named else model.parameters())
    model.load_state_dict(file["model"])
    optimizer.load_state_dict(file["optimizer"])
    return trained(model, optimizer, 2)


@named
@pytest.mark.parametrize("name", [*OPTIMIZERS, *WHOLE_MATRIX])
def test_training_goes_on_bit_for_bit_once_the_prefix_is_off(name: str, named: bool, tmp_path: Path) -> None:
    make = {**OPTIMIZERS, **WHOLE_MATRIX}[name]
    path, losses = saved(tmp_path, make, named=named)
    run = edited(open_run(path), ckpt_surgeon.strip_prefix.plan)
    assert run.proof == "same run"
    out = written(run, tmp_path / "clean.ckpt")
    assert resumed(out, make, named=named) == losses
    file = torch.load(out)
    assert file["epoch"] == 3
    if named:
        assert file["optimizer"]["param_groups"][0]["param_names"] == [name for name, _ in Net().named_parameters()]


@pytest.mark.parametrize("name", [*OPTIMIZERS, *WHOLE_MATRIX])
def test_a_head_that_grew_trains_on_where_it_was(name: str, tmp_path: Path) -> None:
    make = {**OPTIMIZERS, **WHOLE_MATRIX}[name]
    path, _ = saved(tmp_path, make, named=True)
    run = edited(open_run(path), ckpt_surgeon.strip_prefix.plan)
    run = edited(run, lambda tensors: ckpt_surgeon.pad.plan(tensors, "fc.*", after=2))
    assert run.proof == "kept part"
    out = written(run, tmp_path / "grown.ckpt")

    def make_run() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = Net(7)
        return model, make(model.named_parameters())

    found = resume_check(path, out, make_run)
    assert found.holds, found
    heads = ("fc.weight", "fc.bias")
    assert (found.fresh if name in WHOLE_MATRIX else found.kept_part) == heads
    assert not found.different
    assert len(found.equal) == 6


def test_a_dropped_head_takes_its_ids_along(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, torch.optim.Adam, named=True)
    run = edited(open_run(path), ckpt_surgeon.strip_prefix.plan)
    run = edited(run, lambda tensors: ckpt_surgeon.drop.plan(tensors, "fc.*"))
    file = torch.load(written(run, tmp_path / "out.ckpt"))
    (group,) = file["optimizer"]["param_groups"]
    assert "fc.weight" not in group["param_names"]
    assert len(group["params"]) == len(group["param_names"]) == 6
    assert set(file["optimizer"]["state"]) == set(group["params"])
    assert any("optimizer state goes with them" in note for note in run.notes)
    body = nn.ModuleDict({"body": Net().body})
    optimizer = torch.optim.Adam(body.named_parameters())
    optimizer.load_state_dict(file["optimizer"])


def test_ids_that_only_order_tells_are_not_guessed_among_equal_shapes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    path = tmp_path / "last.ckpt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    drop = partial(ckpt_surgeon.drop.plan, patterns="1.*")
    with pytest.raises(EditError, match="same shape"):
        open_run(path).edited(drop)
    stated = edited(open_run(path, in_model_order=True), drop)
    file = torch.load(written(stated, tmp_path / "out.ckpt"))
    assert file["optimizer"]["param_groups"][0]["params"] == [0, 1]
    again = edited(open_run(path, stated=[name for name, _ in model.named_parameters()]), drop)
    assert again.optimizers[0].ids == (0, 1)


def test_values_that_are_computed_need_their_state_given_up(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, torch.optim.Adam, named=True)
    scale = partial(ckpt_surgeon.scale.plan, patterns="module.fc.*", factor=2.0)
    with pytest.raises(EditError, match="their values change"):
        open_run(path).edited(scale, computes=True)
    run = edited(open_run(path), scale, computes=True, reset=["module.fc.*"])
    assert run.proof == "no proof"
    file = torch.load(written(run, tmp_path / "out.ckpt"))
    assert len(file["optimizer"]["state"]) == 6
    without = open_run(path).left_out(["optimizer"])
    file = torch.load(written(edited(without, scale, computes=True), tmp_path / "slim.ckpt"))
    assert list(file) == ["model", "epoch"]


def test_gaps_and_parameters_without_state_are_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net()
    model.body[0].weight.requires_grad_(False)
    rest = [parameter for name, parameter in model.named_parameters() if "fc" not in name]
    groups: list[dict[str, object]] = [{"params": rest}, {"params": list(model.fc.parameters()), "lr": 1.0}]
    optimizer = torch.optim.Adam(groups)
    trained(model, optimizer, 1)
    path = tmp_path / "last.ckpt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    before = torch.load(path)["optimizer"]
    assert 0 not in before["state"]
    run = edited(open_run(path), partial(ckpt_surgeon.add_prefix.plan, prefix="net."))
    after = torch.load(written(run, tmp_path / "out.ckpt"))["optimizer"]
    assert after["param_groups"] == before["param_groups"]
    assert after["state"].keys() == before["state"].keys()


def test_twins_with_the_same_keys_get_the_same_edit(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    ema = {key: value + 1 for key, value in state.items()}
    torch.save({"state_dict": state, "state_dict_ema": ema, "epoch": 1}, tmp_path / "last.pt")
    run = edited(open_run(tmp_path / "last.pt", select="state_dict"), ckpt_surgeon.strip_prefix.plan)
    file = torch.load(written(run, tmp_path / "out.pt"))
    assert list(file["state_dict"]) == list(file["state_dict_ema"]) == ["weight", "bias"]
    assert torch.equal(file["state_dict_ema"]["bias"], ema["module.bias"])


def test_what_is_no_file_of_torch_says_so(tmp_path: Path) -> None:
    ckpt_surgeon.save({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError):
        open_run(tmp_path / "a.safetensors")


@named
def test_names_follow_in_place(named: bool, tmp_path: Path) -> None:
    path, losses = saved(tmp_path, torch.optim.AdamW, named=named)
    size = path.stat().st_size
    planned = plan_run_in_place(path, ckpt_surgeon.step("strip_prefix"))
    carry_out(planned)
    assert path.stat().st_size == size
    assert resumed(path, torch.optim.AdamW, named=named) == losses
    group = torch.load(path)["optimizer"]["param_groups"][0]
    assert group.get("param_names", []) == ([name for name, _ in Net().named_parameters()] if named else [])
    assert torch.load(path)["epoch"] == 3


def test_only_names_change_in_place(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, torch.optim.AdamW, named=True)
    before = path.read_bytes()
    for step in (ckpt_surgeon.step("drop", patterns=["*fc*"]), ckpt_surgeon.step("pad", patterns=["*fc*"], after=1)):
        with pytest.raises(CheckpointError, match="in place"):
            plan_run_in_place(path, step)
    assert path.read_bytes() == before


def test_groups_that_are_emptied_go_with_their_learning_rates(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net()
    names = [name for name, _ in model.named_parameters()]
    groups: list[dict[str, object]] = [
        {"params": [(name, one) for name, one in model.named_parameters() if "fc" in name], "lr": 1.0},
        {"params": [(name, one) for name, one in model.named_parameters() if "fc" not in name]},
    ]
    optimizer = torch.optim.Adam(groups)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    trained(model, optimizer, 1)
    path = tmp_path / "last.ckpt"
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    torch.save(state, path)
    run = edited(open_run(path), partial(ckpt_surgeon.drop.plan, patterns="fc.*"))
    file = torch.load(written(run, tmp_path / "out.ckpt"))
    (group,) = file["optimizer"]["param_groups"]
    assert group["param_names"] == [name for name in names if "fc" not in name]
    assert len(file["scheduler"]["base_lrs"]) == len(file["scheduler"]["_last_lr"]) == 1
    assert file["scheduler"]["last_epoch"] == state["scheduler"]["last_epoch"]


def test_decay_groups_are_told_by_their_sizes(tmp_path: Path) -> None:
    for first in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
        parameters = list(model.parameters())
        parted = [[one for one in parameters if one.dim() >= 2], [one for one in parameters if one.dim() < 2]]
        optimizer = torch.optim.Adam([{"params": one} for one in (parted if first else reversed(parted))])
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
        path = tmp_path / f"{first}.ckpt"
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
        run = open_run(path)
        names = run.names(run.optimizers[0])
        assert names is not None
        wanted = ["0.weight", "1.weight", "0.bias", "1.bias"]
        assert list(names.keys.values()) == (wanted if first else wanted[2:] + wanted[:2])
        assert not names.doubtful


def test_keys_of_an_optimizer_become_names_and_positions_again(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, torch.optim.Adam)
    run = edited(open_run(path, in_model_order=True), ckpt_surgeon.strip_prefix.plan)
    by_name = written(with_optimizer_keys(run, "names"), tmp_path / "names.ckpt")
    file = torch.load(by_name)["optimizer"]
    assert file["param_groups"][0]["params"] == [name for name, _ in Net().named_parameters()]
    again = written(with_optimizer_keys(open_run(by_name), "positions"), tmp_path / "positions.ckpt")
    before, after = torch.load(path)["optimizer"], torch.load(again)["optimizer"]
    assert before["param_groups"] == after["param_groups"]
    assert all(torch.equal(before["state"][one]["exp_avg"], after["state"][one]["exp_avg"]) for one in before["state"])


def test_averages_behind_a_prefix_of_their_own_follow(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    average = torch.optim.swa_utils.AveragedModel(model)
    torch.save({"state_dict": model.state_dict(), "ema_state_dict": average.state_dict()}, tmp_path / "last.pt")
    run = open_run(tmp_path / "last.pt", select="state_dict")
    run = edited(run, partial(ckpt_surgeon.add_prefix.plan, prefix="net."))
    file = torch.load(written(run, tmp_path / "out.pt"))
    assert list(file["ema_state_dict"]) == ["module.net.weight", "module.net.bias", "n_averaged"]


# -- values


def test_values_are_set_by_path_in_the_type_that_was_there(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, torch.optim.Adam)
    run = with_values(open_run(path), ["epoch=0", "optimizer.param_groups.*.lr=1e-4"])
    file = torch.load(written(run, tmp_path / "out.ckpt"))
    assert file["epoch"] == 0
    assert file["optimizer"]["param_groups"][0]["lr"] == 1e-4
    for wrong, said in (("epoch=0.5", "int 3"), ("epoch=none", "None"), ("optimizer.param_groups.0.lr=fast", "float")):
        with pytest.raises(EditError, match=said):
            with_values(open_run(path), [wrong])
    with pytest.raises(CheckpointError, match="matches no key"):
        with_values(open_run(path), ["epochs=0"])


def test_attributes_and_steps_are_values_too(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "args": Namespace(lr=0.1, name="a")}
    torch.save(state, tmp_path / "last.pt")
    run = with_values(open_run(tmp_path / "last.pt"), {"args.lr": 0.5, "optimizer.state.0.step": 7, "args.name": "b"})
    file = torch.load(written(run, tmp_path / "out.pt"), weights_only=False)
    assert (file["args"].lr, file["args"].name) == (0.5, "b")
    assert file["optimizer"]["state"][0]["step"].item() == 7
    assert file["optimizer"]["state"][1]["step"].item() == 1


def test_a_file_of_before_torch_1_6_is_opened_whole(tmp_path: Path) -> None:
    torch.save({"model": nn.Linear(2, 2).state_dict()}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert list(open_run(tmp_path / "a.pt").weights) == ["weight", "bias"]
