"""A command prints its report when its work is done, and says which arguments it takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from ckpt_surgeon.cli import cli
from ckpt_surgeon.errors import OutputExists

LINEAR = "torch.nn:Linear(2, 3)"


@pytest.fixture
def linear(tmp_path: Path) -> Path:
    torch.save(torch.nn.Linear(2, 3).state_dict(), tmp_path / "linear.pth")
    return tmp_path / "linear.pth"


@pytest.mark.parametrize("json", [[], ["--json"]])
def test_fit_prints_no_table_when_its_output_exists_already(linear: Path, json: list[str]) -> None:
    out = linear.with_name("out.pth")
    out.touch()
    done = CliRunner().invoke(cli, ["fit", str(linear), LINEAR, str(out), *json])
    assert isinstance(done.exception, OutputExists)
    assert done.output == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_fit_writes_though_standard_output_is_full(linear: Path) -> None:
    out = linear.with_name("out.pth")
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "ckpt_surgeon", "fit", str(linear), LINEAR, str(out)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    assert "ckpt: done; standard output cannot take the report" in done.stderr
    assert set(torch.load(out)) == {"weight", "bias"}


def test_ls_lists_nothing_where_one_of_several_files_is_no_checkpoint(linear: Path) -> None:
    other = linear.with_name("other.pth")
    other.touch()
    done = CliRunner().invoke(cli, ["ls", str(linear), str(other)])
    assert done.exit_code != 0
    assert done.output == ""
    assert f"{other}: is empty" in str(done.exception)
