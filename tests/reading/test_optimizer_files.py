"""Files that hold the state of an optimizer and no weights open, and are never written as a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import Run
from tables import StateDict, assert_same

import ckpt_surgeon
from ckpt_surgeon.errors import FileError


def optimizer_state() -> dict[str, object]:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def slots(state: dict[str, object], prefix: str = "") -> StateDict:
    """The tensors of an optimizer's state by dotted path."""
    by_id = state["state"]
    assert isinstance(by_id, dict)
    return {f"{prefix}state.{id_}.{name}": value for id_, kept in by_id.items() for name, value in kept.items()}


def layouts() -> dict[str, tuple[object, str, StateDict]]:
    """What is saved, where the state is found in it, and the tensors there."""
    state = optimizer_state()
    flat = [torch.arange(4.0)]
    zero = {"fp32_flat_groups": flat, "optimizer_state_dict": state, "zero_stage": 3}
    other = optimizer_state()
    both = slots(other, "generator.optimizer.") | slots(state, "optimizer.")
    return {
        "optimizer.pt": (state, "", slots(state)),
        "wrapped.pt": ({"epoch": 3, "optimizer": state}, "optimizer", slots(state)),
        "zero_pp_rank_0_mp_rank_00_optim_states.pt": (
            {"optimizer_state_dict": zero, "ds_version": "0.14"},
            "optimizer_state_dict",
            {"fp32_flat_groups.0": flat[0], **slots(state, "optimizer_state_dict.")},
        ),
        "two.pt": ({"generator": {"optimizer": other}, "optimizer": state}, "", both),
    }


NAMES = list(layouts())


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_an_optimizers_state_opens_with_its_tensors_by_path(name: str, ckpt: Run, tmp_path: Path) -> None:
    saved, where, wanted = layouts()[name]
    path = tmp_path / name
    torch.save(saved, path)
    opened = ckpt_surgeon.open(path)
    assert opened.selected == where
    assert_same(dict(ckpt_surgeon.load(opened)), wanted)
    listed = ckpt("ls", path)
    assert listed.status == 0
    assert "no weights" in ckpt("ls", path, "--training").out
    assert "training state alone, the state of an optimizer" in listed.out
    assert all(key in listed.out for key in wanted)


@pytest.mark.parametrize("name", NAMES)
def test_an_optimizers_state_is_refused_as_weights_and_taken_where_it_is_named(
    name: str, ckpt: Run, tmp_path: Path
) -> None:
    saved, where, wanted = layouts()[name]
    path, out = tmp_path / name, tmp_path / "out.safetensors"
    torch.save(saved, path)
    refused = ckpt("convert", path, out)
    assert (refused.status, out.exists()) == (2, False)
    assert "has no weights: it is training state alone" in refused.err
    assert f"--select {where or '.'} takes these tensors as they are" in refused.err
    assert ckpt("convert", path, out, "--allow-part").status == 2
    with pytest.raises(FileError, match="has no weights"):
        ckpt_surgeon.load_into(torch.nn.Linear(3, 2), path)
    assert ckpt("convert", path, out, "--select", where or ".").status == 0
    assert_same(dict(ckpt_surgeon.load(out)), wanted)


def test_the_groups_of_an_optimizers_file_are_listed_and_set(ckpt: Run, tmp_path: Path) -> None:
    path, out = tmp_path / "optimizer.pt", tmp_path / "out.pt"
    torch.save(optimizer_state(), path)
    (found,) = ckpt_surgeon.training_of(path).optimizers
    assert [parameter.id for parameter in found.groups[0].parameters] == [0, 1]
    assert json.loads(ckpt("ls", path, "--training", "--json").out)["weights"] is None
    assert ckpt("set", path, out, "param_groups.*.lr=0.5").status == 0
    assert torch.load(out)["param_groups"][0]["lr"] == 0.5
