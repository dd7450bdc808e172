"""Type checkers see the package's types in the environment that an editable install makes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = """
import ckpt_surgeon

reveal_type(ckpt_surgeon.open("model.pth"))
reveal_type(ckpt_surgeon.hash("model.pth").whole)
ckpt_surgeon.no_such_name
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The Python of an environment with nothing but an editable install of a copy of this project."""
    pytest.importorskip("setuptools", minversion="77")
    project, wheels = tmp_path / "project", tmp_path / "wheels"
    shutil.copytree(ROOT / "ckpt_surgeon", project / "ckpt_surgeon", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    wheels.mkdir()
    build = f"from setuptools import build_meta; build_meta.build_editable({str(wheels)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=project, check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    python = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    where = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    for wheel in wheels.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(where.stdout.strip())
    return python


def test_mypy_sees_the_types_of_an_editable_install(installed: Path, tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--python-executable", installed, "--follow-imports=silent", "script.py"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert 'Revealed type is "ckpt_surgeon.tensors.checkpoint.Checkpoint"' in found.stdout, found.stdout + found.stderr
    assert 'Revealed type is "str"' in found.stdout.replace("builtins.", ""), found.stdout
    assert 'has no attribute "no_such_name"' in found.stdout, found.stdout
    assert len(found.stdout.splitlines()) == 4, found.stdout
