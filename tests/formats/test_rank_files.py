"""A state_dict in one file a rank is one checkpoint: its tensors are put together by their placements."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import rank_files_worker
import torch
from command_line import Run
from rank_files_worker import EVEN, WORLD
from tables import assert_same, rewritten

import ckpt_surgeon
from ckpt_surgeon.errors import BrokenFile, NotACheckpoint

KINDS = ["rows", "columns", "grid", "crossed", "twice", "replicas", "part_of_mesh", "sharded", "fsdp"]
NAME = f"model_world_size_{WORLD}_rank_{{}}.pt"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four processes have saved."""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, str(rank_files_worker.__file__), str(folder)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_is_what_full_tensor_gives(kind: str, saved: Path, ckpt: Run, tmp_path: Path) -> None:
    expected, out = torch.load(saved / f"{kind}.pt"), tmp_path / "out.safetensors"
    opened = ckpt_surgeon.open(saved / kind)
    assert not opened.part
    assert_same(dict(ckpt_surgeon.load(opened)), expected)
    assert ckpt("convert", saved / kind, out).status == 0
    assert_same(ckpt_surgeon.load(out), expected, order=False)


def test_slots_of_the_optimizer_are_put_together_too(saved: Path, ckpt: Run, tmp_path: Path) -> None:
    slots, out = torch.load(saved / "fsdp_slots.pt"), tmp_path / "run.pth"
    shown = ckpt("ls", "--training", saved / "fsdp").out
    assert "AdamW" in shown or "Adam" in shown
    assert ckpt("convert", "--whole", saved / "fsdp", out).status == 0
    run = torch.load(out)
    assert_same(run["model"], torch.load(saved / "fsdp.pt"))
    for number, kept in slots.items():
        assert_same(run["optim"]["state"][number], kept)
    assert run["extra_state"]["lr"] == 0.5


def test_what_differs_between_ranks_is_named(saved: Path) -> None:
    notes = ckpt_surgeon.open(saved / "fsdp").notes
    assert any("extra_state: not the same in all ranks, the first one's is taken: 'rng'" in note for note in notes)


def test_one_file_says_that_its_folder_joins_the_ranks(saved: Path, ckpt: Run, tmp_path: Path) -> None:
    ran = ckpt("convert", saved / "rows" / NAME.format(1), tmp_path / "out.pth")
    assert (ran.status, ran.err.count("\n")) == (2, 1)
    assert f"open the folder, {saved / 'rows'}, which joins the files of all ranks" in ran.err


def copied(kind: str, saved: Path, to: Path) -> Path:
    return Path(shutil.copytree(saved / kind, to / kind))


def test_a_missing_rank_is_named(saved: Path, ckpt: Run, tmp_path: Path) -> None:
    folder = copied("grid", saved, tmp_path)
    (folder / NAME.format(2)).unlink()
    ran = ckpt("ls", folder)
    assert (ran.status, ran.err.count("\n")) == (2, 1)
    assert f"missing: '{NAME.format(2)}'; 'weight': its pieces leave gaps" in ran.err


def test_a_missing_replica_is_no_loss(saved: Path, tmp_path: Path) -> None:
    folder = copied("replicas", saved, tmp_path)
    (folder / NAME.format(3)).unlink()
    opened = ckpt_surgeon.open(folder)
    assert any(f"all of it is there without '{NAME.format(3)}'" in note for note in opened.notes)
    assert_same(dict(ckpt_surgeon.load(opened)), torch.load(saved / "replicas.pt"))


def test_replicas_that_differ_are_refused(saved: Path, tmp_path: Path) -> None:
    folder = copied("replicas", saved, tmp_path)
    source, part = saved / "replicas" / NAME.format(3), EVEN[4:].numpy().tobytes()
    with zipfile.ZipFile(source) as file:
        record = next(name.partition("/")[2] for name in file.namelist() if file.read(name) == part)
    rewritten(source, folder / NAME.format(3), records={record: part[::-1]})
    with pytest.raises(BrokenFile, match="'even': ranks 1 and 3 have other values of the same elements"):
        ckpt_surgeon.open(folder)


def test_sums_that_no_rank_has_are_refused(saved: Path) -> None:
    with pytest.raises(BrokenFile, match="'weight': rank 0 does not say where its part lies, or it is no box"):
        ckpt_surgeon.open(saved / "partial")


def test_files_of_several_world_sizes_are_refused(saved: Path, tmp_path: Path) -> None:
    folder = copied("rows", saved, tmp_path)
    shutil.copy(folder / NAME.format(0), folder / "model_world_size_2_rank_0.pt")
    with pytest.raises(NotACheckpoint, match=r"several world sizes \(2, 4\)"):
        ckpt_surgeon.open(folder)


def test_a_truncated_file_is_named(saved: Path, tmp_path: Path) -> None:
    folder = copied("rows", saved, tmp_path)
    path = folder / NAME.format(1)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(BrokenFile, match=path.name):
        ckpt_surgeon.open(folder)


def test_parts_of_other_shapes_are_refused(saved: Path, tmp_path: Path) -> None:
    folder = copied("rows", saved, tmp_path)
    shutil.copy(saved / "fsdp" / NAME.format(1), folder / NAME.format(1))
    shutil.copy(saved / "columns" / NAME.format(2), folder / NAME.format(2))
    with pytest.raises(BrokenFile, match="'weight': its pieces"):
        ckpt_surgeon.open(folder)


def test_plain_tensors_that_differ_between_ranks_are_never_taken_for_the_whole(tmp_path: Path) -> None:
    for rank in range(2):
        torch.save({"weight": torch.full((2, 3), float(rank))}, tmp_path / f"model_world_size_2_rank_{rank}.pt")
    with pytest.raises(NotACheckpoint, match=r"not the same in each \('weight'\), and nothing says how they fit"):
        ckpt_surgeon.open(tmp_path)


def test_plain_tensors_that_all_ranks_have_alike_are_the_whole(tmp_path: Path) -> None:
    for rank in range(2):
        torch.save({"weight": torch.ones(2, 3)}, tmp_path / f"model_world_size_2_rank_{rank}.pt")
    assert_same(dict(ckpt_surgeon.load(tmp_path)), {"weight": torch.ones(2, 3)})
