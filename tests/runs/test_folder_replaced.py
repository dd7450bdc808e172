"""A folder that a run is written over loses nothing that is not of that run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command_line import Run
from file_calls import tree
from safetensors.torch import save_file


@pytest.fixture
def run(tmp_path: Path) -> Path:
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    folder = tmp_path / "run"
    (folder / "logs").mkdir(parents=True)
    (folder / "logs" / "events.txt").write_text("one")
    save_file({f"module.{key}": value for key, value in model.state_dict().items()}, folder / "model.safetensors")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return folder


@pytest.mark.parametrize("name", ["mine.txt", "sub/mine.txt", "logs/mine.txt"])
def test_a_folder_with_files_of_its_own_is_not_replaced(name: str, run: Path, tmp_path: Path, ckpt: Run) -> None:
    out = tmp_path / "mine"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    before = tree(tmp_path)
    ran = ckpt("strip-prefix", run, out, "--whole", "--force")
    assert ran.status == 2
    assert "is a folder with more in it than this run" in ran.err
    assert tree(tmp_path) == before


def test_a_folder_of_the_same_run_is_replaced_and_nothing_stays_beside_it(run: Path, tmp_path: Path, ckpt: Run) -> None:
    out = tmp_path / "out"
    assert ckpt("strip-prefix", run, out, "--whole").status == 0
    new = tree(out)
    assert "logs/events.txt" in new
    (out / "logs" / "events.txt").write_text("other")
    out.chmod(0o700)
    assert ckpt("strip-prefix", run, out, "--whole", "--force").status == 0
    assert tree(out) == new
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_a_run_is_written_over_itself(run: Path, tmp_path: Path, ckpt: Run) -> None:
    assert ckpt("strip-prefix", run, run, "--whole", "--force").status == 0
    assert sorted(tree(run)) == ["logs", "logs/events.txt", "model.safetensors", "optimizer.pt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
