"""Each way in which a file says that it is one rank's, and each command that is told to take it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command_line import Run

import ckpt_surgeon
from ckpt_surgeon.errors import FileError

WEIGHTS = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
MODEL = "torch.nn:Linear(3, 2)"


def deepspeed(folder: Path, world: int = 4) -> Path:
    """DeepSpeed over a model-parallel one: its size stands beside the module, its rank in the file's name."""
    path = folder / "mp_rank_02_model_states.pt"
    torch.save({"module": WEIGHTS, "mp_world_size": world, "dp_world_size": 2, "ds_version": "0.14"}, path)
    return path


def classic(folder: Path, ranks: int = 2, *, version: float = 3.0) -> Path:
    """Megatron's own layout: a folder for each rank, and no arguments that say how many there are."""
    for rank in range(ranks):
        path = folder / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
        path.parent.mkdir()
        torch.save({"checkpoint_version": version, "iteration": 3, "model": WEIGHTS}, path)
    return path


def pipelined(folder: Path) -> Path:
    path = folder / "mp_rank_00_001" / "model_optim_rng.pt"
    path.parent.mkdir()
    args = {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 1}
    torch.save({"checkpoint_version": 3.0, "args": args, "model": WEIGHTS}, path)
    return path


ROUTES = {
    deepspeed: "mp_rank_02 of a model-parallel model of 4 parts",
    classic: "mp_rank_01 of a Megatron model of 2 parts",
    pipelined: "mp_rank_00_001 of a pipeline-parallel model of 2 parts",
}


@pytest.mark.parametrize("make", ROUTES, ids=lambda make: make.__name__)
def test_a_rank_is_named_by_what_its_file_or_folder_says(make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = make(tmp_path)
    assert ckpt_surgeon.open(path).part == ROUTES[make]
    assert ROUTES[make] in ckpt_surgeon.ls(path).notes
    with pytest.raises(FileError, match=ROUTES[make]):
        ckpt_surgeon.convert(path, tmp_path / "out.pth")


def test_a_world_of_one_is_whole(tmp_path: Path) -> None:
    assert not ckpt_surgeon.open(deepspeed(tmp_path, world=1)).part
    assert not ckpt_surgeon.open(classic(tmp_path, ranks=1)).part


@pytest.mark.parametrize("command", [
    ["convert", "IN", "OUT"],
    ["fit", "IN", MODEL, "OUT"],
    ["keep", "IN", "OUT", "weight"],
    ["cast", "IN", "OUT", "--dtype", "fp32"],
    ["edit", "IN", "OUT", "--rename", "bias=b"],
], ids=lambda command: str(command[0]))  # fmt: skip
@pytest.mark.parametrize("make", ROUTES, ids=lambda make: make.__name__)
def test_every_command_that_writes_takes_a_part_when_it_is_told_to(  # type: ignore[no-untyped-def]
    make, command: list[str], ckpt: Run, tmp_path: Path
) -> None:
    path, out = make(tmp_path), tmp_path / "out.pth"
    words = [str({"IN": path, "OUT": out}.get(word, word)) for word in command]
    refused = ckpt(*words)
    assert (refused.status, out.exists()) == (2, False)
    assert ROUTES[make] in refused.err
    assert "--allow-part" in refused.err
    assert ckpt(*words, "--allow-part").status == 0
    assert torch.equal(torch.load(out)["weight"], WEIGHTS["weight"])


def test_fit_in_python_takes_a_part_when_it_is_told_to(tmp_path: Path) -> None:
    model, path = torch.nn.Linear(3, 2), classic(tmp_path)
    with pytest.raises(FileError, match="allow_part=True"):
        ckpt_surgeon.fit(path, model)
    assert ckpt_surgeon.fit(path, model, allow_part=True).matched == 1.0
