"""git, pre-commit and CI as docs/command_line.md has them: tried with a real git repository and a real shell."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pages import DOCS, FIXTURES

pytestmark = pytest.mark.slow
PAGE = (DOCS / "command_line.md").read_text(encoding="utf-8")


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command with a ``ckpt`` at hand that is this tree's."""
    bin_folder = cwd.parent / "bin"
    bin_folder.mkdir(exist_ok=True)
    script = bin_folder / "ckpt"
    script.write_text(f"#!/bin/sh\nexec '{sys.executable}' -m ckpt_surgeon \"$@\"\n")
    script.chmod(0o755)
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    tree = str(DOCS.parent)
    return subprocess.run(
        words, cwd=cwd, env={**os.environ, "PATH": path, "PYTHONPATH": tree}, capture_output=True, text=True
    )


def steps(pattern: str) -> list[str]:
    return re.findall(pattern, PAGE, re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES, tmp_path / "project"))


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_git_shows_the_keys_that_changed(folder: Path) -> None:
    lines = steps(r"^(echo '\*.*|git config .*)$")
    assert len(lines) == 3
    run("git", "init", "-q", cwd=folder)
    for line in lines:
        assert run("sh", "-c", line, cwd=folder).returncode == 0
    run("git", "add", "-A", cwd=folder)
    state = torch.load(folder / "parallel.pth")
    torch.save({key.removeprefix("module."): value for key, value in state.items()}, folder / "parallel.pth")
    shown = run("git", "--no-pager", "diff", "parallel.pth", cwd=folder).stdout
    assert re.search(r"^-module\.fc\.weight +float32 +\[10, 8\]", shown, re.MULTILINE), shown
    assert re.search(r"^\+fc\.weight +float32 +\[10, 8\]", shown, re.MULTILINE)
    assert "Binary files" not in shown


def test_the_hook_lets_plain_data_pass_and_stops_at_code(folder: Path) -> None:
    (entry,) = steps(r"^ +entry: (.*)$")
    files = ["parallel.pth", "training.ckpt"]
    assert run(*shlex.split(entry), *files, cwd=folder).returncode == 0
    torch.save(torch.nn.Linear(2, 2), folder / "whole.pt")
    ran = run(*shlex.split(entry), "whole.pt", *files, cwd=folder)
    assert ran.returncode == 1
    assert "torch.nn.modules.linear.Linear" in ran.stdout


@pytest.mark.parametrize("line", steps(r"^ +- run: (ckpt .*)$"))
def test_a_step_of_the_workflow_passes(line: str, folder: Path) -> None:
    ran = run("sh", "-c", line, cwd=folder)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("body", re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
def test_an_example_in_yaml_is_valid(body: str) -> None:
    yaml = pytest.importorskip("yaml")
    assert isinstance(yaml.safe_load(body), dict)
