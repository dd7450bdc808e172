"""Shells complete commands, options, files and values: keys of the file, dtypes, paths of state_dicts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.shell_completion import ShellComplete

from ckpt_surgeon.cli import cli
from ckpt_surgeon.files.journal import journal_path

KEYS = ["module.fc.weight", "module.fc.bias"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    state = {key: torch.ones(2) for key in KEYS}
    torch.save(state, tmp_path / "model.pth")
    torch.save({"model": state, "ema": {"fc.scale": torch.ones(2)}, "epoch": 3}, tmp_path / "last.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def offered(words: str, incomplete: str = "") -> list[str]:
    """What click offers a shell behind these words."""
    asked = ShellComplete(cli, {}, "ckpt", "_CKPT_COMPLETE")
    return [item.value for item in asked.get_completions(words.split(), incomplete)]


@pytest.mark.parametrize("words", ["ls model.pth", "drop model.pth out.pth", "cast model.pth out.pth --except"])
def test_patterns_are_completed_by_the_keys_of_the_file(words: str, folder: Path) -> None:
    assert set(KEYS) <= set(offered(words))
    assert offered(words, "module.fc.b") == ["module.fc.bias"]


def test_of_several_state_dicts_the_selected_one_has_the_keys(folder: Path) -> None:
    assert offered("drop last.pth out.pth --select ema", "") == ["fc.scale"]
    assert len(offered("drop last.pth out.pth", "")) == 3


def test_select_is_completed_by_the_paths_of_state_dicts(folder: Path) -> None:
    assert offered("convert last.pth out.pth --select") == ["model", "ema"]
    assert offered("convert last.pth out.pth --select", "e") == ["ema"]


def test_dtypes_are_completed() -> None:
    assert offered("cast model.pth out.pth --dtype", "bf") == ["bf16", "bfloat16"]
    assert "float8_e4m3fn" in offered("cast model.pth out.pth --dtype", "float8")


def test_prefixes_new_names_and_lists_are_completed(folder: Path) -> None:
    assert offered("strip-prefix model.pth out.pth --prefix") == ["module.", "module.fc."]
    assert offered("rename model.pth out.pth", "module.fc.w") == ["module.fc.weight="]
    assert offered("concat model.pth out.pth --sources", "module.fc.weight,module.fc.b") == [
        "module.fc.weight,module.fc.bias"
    ]


def test_commands_options_and_choices_are_completed() -> None:
    assert offered("", "strip") == ["strip-prefix"]
    assert "--max-shard-size" in offered("convert", "--max")
    assert offered("rename model.pth out.pth --on-collision") == ["error", "first", "last"]


def test_a_file_that_is_missing_or_broken_offers_nothing(folder: Path) -> None:
    (folder / "page.pth").write_text("<html>")
    assert offered("drop no.pth out.pth") == []
    assert offered("drop page.pth out.pth") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell_is_printed(shell: str) -> None:
    ran = run_ckpt({"_CKPT_COMPLETE": f"{shell}_source"})
    assert "_CKPT_COMPLETE" in ran
    if found := shutil.which(shell):
        version = subprocess.run([found, "-n"], input=ran, text=True, capture_output=True)
        assert version.returncode == 0, version.stderr


def test_bash_is_answered_without_torch(folder: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; sys.argv = ['ckpt']; from ckpt_surgeon.__main__ import run; run()"
    words = {"COMP_WORDS": "ckpt drop model.pth out.pth mod", "COMP_CWORD": "4"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **words, "_CKPT_COMPLETE": "bash_complete"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == [f"plain,{key}" for key in KEYS], done.stderr


def test_completion_leaves_an_interrupted_renaming_alone(folder: Path) -> None:
    journal = journal_path(folder / "model.pth")
    journal.write_bytes(b"not whole")
    offered("drop model.pth out.pth")
    assert journal.read_bytes() == b"not whole"


def run_ckpt(environment: dict[str, str]) -> str:
    code = "import sys; sys.argv = ['ckpt']; from ckpt_surgeon.__main__ import run; run()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )
    return done.stdout
