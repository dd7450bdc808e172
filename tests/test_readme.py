"""The README shows what really happens: its commands and Python blocks are run in order, in a copy of fixtures/.

``python tests/test_readme.py`` writes what they print today into the README.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ckpt_surgeon.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"

BLOCK = re.compile(r"^```(console|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
STATUS = re.compile(r"  # exit status (\d+)$")
PRINTED = re.compile(r"^( *print\(.*?\))(  # .*)?$", re.MULTILINE)


def run(words: list[str], folder: Path) -> tuple[int, str]:
    """Exit status and all output of a command, with the commands of this Python at hand."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        words,
        cwd=folder,
        env={**os.environ, "PATH": path, "COLUMNS": "100", "PYTHONWARNINGS": "error"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    return done.returncode, done.stdout


def console(body: str, folder: Path) -> str:
    """A console block as it should read: every ``$`` line with its exit status, where not 0, and its output."""
    shown: list[str] = []
    for line in body.splitlines():
        if line.startswith("$ "):
            command = STATUS.sub("", line)
            status, said = run(["sh", "-c", command[2:]], folder)
            assert "Traceback (most recent call last)" not in said, f"{command}\n{said}"
            shown.append(f"{command}  # exit status {status}\n{said}" if status else f"{command}\n{said}")
    gap = "\n" if any(text.count("\n") > 3 for text in shown) else ""
    return gap.join(shown)


def python(body: str, folder: Path) -> str:
    """A Python block as it should read: behind every ``print`` what it prints."""
    status, said = run([sys.executable, "-c", body], folder)
    assert status == 0, f"{body}\n{said}"
    printed = iter(said.splitlines())
    return PRINTED.sub(lambda found: f"{found[1]}  # {next(printed)}", body)


def played(text: str, folder: Path) -> str:
    """The README after everything in it was run."""
    runners = {"console": console, "python": python}
    return BLOCK.sub(lambda found: f"```{found[1]}\n{runners[found[1]](found[2], folder)}```", text)


def test_the_readme_shows_what_happens(tmp_path: Path) -> None:
    folder = tmp_path / "try"
    shutil.copytree(ROOT / "fixtures", folder)
    text = README.read_text(encoding="utf-8")
    assert played(text, folder) == text, "to write what happens into the README: python tests/test_readme.py"


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_is_in_the_readme_with_an_example(name: str) -> None:
    examples = "".join(body for language, body in BLOCK.findall(README.read_text("utf-8")) if language == "console")
    assert f"$ ckpt {name} " in examples


@pytest.mark.parametrize("target", ["demo", "test", "quick", "check", "bench"])
def test_the_make_targets_of_the_readme_exist(target: str) -> None:
    assert f"make {target}" in README.read_text("utf-8")
    assert f"\n{target}:" in (ROOT / "Makefile").read_text("utf-8")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(ROOT / "fixtures", Path(scratch) / "try")
        README.write_text(played(README.read_text("utf-8"), Path(scratch) / "try"), encoding="utf-8")
