"""Files that have one rank's part of a model are named for it, and never written as a whole by chance."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import Run

import ckpt_surgeon
from ckpt_surgeon.errors import FileError


def _zero_three(folder: Path) -> Path:
    path = folder / "zero_pp_rank_1_mp_rank_00_model_states.pt"
    shapes = [OrderedDict(weight=torch.Size([2, 3]), bias=torch.Size([2]))]
    module = {"weight": torch.empty(0, dtype=torch.half), "bias": torch.empty(0, dtype=torch.half)}
    torch.save({"module": module, "param_shapes": shapes, "ds_version": "0.14"}, path)
    return path


def _megatron(folder: Path, *, size: int = 2) -> Path:
    path = folder / "mp_rank_01" / "model_optim_rng.pt"
    path.parent.mkdir()
    args = argparse.Namespace(tensor_model_parallel_size=size, pipeline_model_parallel_size=1)
    torch.save({"model": {"weight": torch.ones(2, 3), "bias": torch.ones(2)}, "args": args}, path)
    return path


def _fsdp(folder: Path) -> Path:
    path = folder / "model_world_size_2_rank_1.pt"
    torch.save({"weight": torch.ones(2, 3), "bias": torch.ones(2)}, path)
    return path


PARTS = [(_zero_three, "rank 1 of DeepSpeed ZeRO-3"), (_megatron, "mp_rank_01 of a tensor-parallel model of 2 parts"),
         (_fsdp, "rank 1 of 2 of a sharded state_dict")]  # fmt: skip


@pytest.mark.parametrize(("make", "name"), PARTS)
def test_a_part_is_named_with_its_rank_and_refused_as_a_whole(make, name: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path, out = make(tmp_path), tmp_path / "out.pth"
    assert any(name in note for note in ckpt_surgeon.ls(path).notes)
    with pytest.raises(FileError, match=f"{name}.*allow_part=True"):
        ckpt_surgeon.convert(path, out)
    with pytest.raises(FileError, match=name):
        ckpt_surgeon.save(ckpt_surgeon.rename(ckpt_surgeon.open(path), {"bias": "b"}), out)
    model = torch.nn.Linear(3, 2)
    before = model.weight.detach().clone()
    with pytest.raises(FileError, match=name):
        ckpt_surgeon.load_into(model, path)
    assert not out.exists()
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize(("make", "name"), PARTS[1:])
def test_a_part_that_is_allowed_is_written_as_torch_reads_it(make, name: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path, out = make(tmp_path), tmp_path / "out.pth"
    ckpt_surgeon.convert(ckpt_surgeon.open(path, allow_part=True), out)
    assert torch.equal(torch.load(out)["weight"], torch.ones(2, 3))


def test_one_rank_alone_is_a_whole_model(tmp_path: Path) -> None:
    assert not ckpt_surgeon.open(_megatron(tmp_path, size=1)).part


def test_modules_in_hyper_parameters_are_never_the_model_beside_a_state_dict(tmp_path: Path) -> None:
    model, path = torch.nn.Linear(3, 2), tmp_path / "last.ckpt"
    settings = {"criterion": torch.nn.BatchNorm1d(4)}
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": settings, "hparams": settings}, path)
    opened = ckpt_surgeon.open(path)
    assert opened.selected == "state_dict"
    assert list(opened) == ["weight", "bias"]


def test_every_command_that_refuses_a_part_takes_it_with_the_option_that_it_names(ckpt: Run, tmp_path: Path) -> None:
    path, out = _megatron(tmp_path), tmp_path / "out.pth"
    for command in (["convert"], ["convert", "--whole"]):
        refused = ckpt(*command, path, out)
        assert (refused.status, out.exists()) == (2, False)
        assert "--allow-part" in refused.err
        assert ckpt(*command, path, out, "--allow-part").status == 0
        written = torch.load(out, weights_only=False)
        assert torch.equal(written.get("model", written)["weight"], torch.ones(2, 3))
        out.unlink()


@pytest.mark.parametrize(("make", "name"), PARTS[1:])
def test_every_function_that_refuses_a_part_takes_it_with_the_argument_that_it_names(
    make: Callable[[Path], Path], name: str, tmp_path: Path
) -> None:
    path, out = make(tmp_path), tmp_path / "out.pth"
    ckpt_surgeon.convert(path, out, allow_part=True)
    assert torch.equal(torch.load(out)["weight"], torch.ones(2, 3))
    ckpt_surgeon.save(ckpt_surgeon.open(path), out, allow_part=True, force=True)
    assert torch.equal(torch.load(out)["weight"], torch.ones(2, 3))
    model = torch.nn.Linear(3, 2)
    assert ckpt_surgeon.fit(path, model, allow_part=True).loaded == ("weight", "bias")
    ckpt_surgeon.load_into(model, ckpt_surgeon.open(path), allow_part=True)
    assert torch.equal(model.weight, torch.ones(2, 3))
    run = ckpt_surgeon.open_run(path)
    with pytest.raises(FileError, match=name):
        ckpt_surgeon.save(run, tmp_path / "run.pth")
    ckpt_surgeon.save(run, tmp_path / "run.pth", allow_part=True)
    assert (tmp_path / "run.pth").exists()
