"""Code that a target names may do anything: what comes of it is a result, or one line that says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ckpt_surgeon import TargetError
from ckpt_surgeon.models.targets import resolve

CODE = {
    "a syntax error": ("def f(:\n", "importing it failed: SyntaxError"),
    "exits": ("import sys\nsys.exit(0)\n", "importing it failed: SystemExit"),
    "stops a generator": ("raise GeneratorExit\n", "importing it failed: GeneratorExit"),
    "an error of its own kind": ("class Odd(BaseException): pass\nraise Odd('hi')\n", "importing it failed: Odd: hi"),
    "calls itself": ("def f(): return f()\n", "building it failed: RecursionError"),
    "exits while it builds": ("def f(): raise SystemExit(0)\n", "building it failed: SystemExit"),
    "an error with escapes": ("def f(): raise ValueError('a\\x1b[31mb\\nc')\n", r"ValueError: a\\x1b\[31mb c"),
    "an int": ("f = 7\n", "is an int and cannot be called"),
}


@pytest.mark.parametrize("name", CODE)
def test_code_that_does_not_end_as_it_should_is_one_error(name: str, tmp_path: Path) -> None:
    code, why = CODE[name]
    path = tmp_path / f"hostile_{name.replace(' ', '_')}.py"
    path.write_text(code)
    with pytest.raises(TargetError, match=why) as raised:
        resolve(f"{path}:f")
    assert "\n" not in str(raised.value)
    assert "\x1b" not in str(raised.value)


@pytest.mark.parametrize(
    "spec", ["\u202e.py:f", "\x00.py:f", "\x1b]0;x\x07.py:f", "nope.py:f(", "nope.py:f()()", "torch.nn:Linear(10**9)",
             "torch.nn:" + "a." * 3000 + "b", "torch.nn:Linear(" + "[" * 5000 + ")"],
)  # fmt: skip
def test_a_name_of_any_kind_is_one_line_without_control_characters(spec: str) -> None:
    with pytest.raises(TargetError) as raised:
        resolve(spec)
    assert str(raised.value).isprintable()


def test_code_that_forks_gives_one_result(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "s.pth")
    (tmp_path / "forks.py").write_text("import os, torch\nos.fork()\ndef f(): return torch.nn.Linear(2, 2)\n")
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "ckpt_surgeon", "diff", "s.pth", "forks.py:f"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, env={**os.environ},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("strictly loadable") == 1
