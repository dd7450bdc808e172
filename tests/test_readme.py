"""The README shows what really happens: its commands and Python blocks are run in order, in a copy of fixtures/.

``python tests/test_readme.py`` writes what they print today into the README.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from command_line import Run

from ckpt_surgeon.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"

BLOCK = re.compile(r"^```(console|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
STATUS = re.compile(r"  # exit status (\d+)$")
PRINTED = re.compile(r"^( *print\(.*?\))(  # .*)?$", re.MULTILINE)


Command = Callable[[str], tuple[int, str]]  # a line as one would type it: its exit status and all that it prints


def shell(line: str) -> tuple[int, str]:
    """Run a line as a process, with the commands of this Python at hand."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["sh", "-c", line],
        env={**os.environ, "PATH": path, "COLUMNS": "100", "PYTHONWARNINGS": "error"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    return done.returncode, done.stdout


def console(body: str, run: Command) -> str:
    """A console block as it should read: every ``$`` line with its exit status, where not 0, and its output."""
    shown: list[str] = []
    for line in body.splitlines():
        if line.startswith("$ "):
            command = STATUS.sub("", line)
            status, said = run(command[2:])
            assert "Traceback (most recent call last)" not in said, f"{command}\n{said}"
            shown.append(f"{command}  # exit status {status}\n{said}" if status else f"{command}\n{said}")
    gap = "\n" if any(text.count("\n") > 3 for text in shown) else ""
    return gap.join(shown)


def python(body: str) -> str:
    """A Python block as it should read: behind every ``print`` what it prints."""
    out = io.StringIO()
    with redirect_stdout(out):
        exec(body, {"__name__": "__main__"})
    printed = iter(out.getvalue().splitlines())
    return PRINTED.sub(lambda found: f"{found[1]}  # {next(printed)}", body)


def played(text: str, run: Command) -> str:
    """The README after everything in it was run, in order, in the folder that is the current one."""
    return BLOCK.sub(
        lambda found: f"```{found[1]}\n{console(found[2], run) if found[1] == 'console' else python(found[2])}```", text
    )


@pytest.mark.slow
def test_the_readme_shows_what_happens(ckpt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands run in this process: others of the suite start them as processes."""
    monkeypatch.chdir(shutil.copytree(ROOT / "fixtures", tmp_path / "try"))
    monkeypatch.setenv("COLUMNS", "100")

    def run(line: str) -> tuple[int, str]:
        if not line.startswith("ckpt "):
            return shell(line)
        ran = ckpt(*shlex.split(line)[1:])
        return ran.status, ran.out + ran.err

    text = README.read_text(encoding="utf-8")
    assert played(text, run) == text, "to write what happens into the README: python tests/test_readme.py"


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
        os.chdir(shutil.copytree(ROOT / "fixtures", Path(scratch) / "try"))
        README.write_text(played(README.read_text("utf-8"), shell), encoding="utf-8")
