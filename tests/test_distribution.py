"""What is released: a wheel and an sdist that say what they are, hold what they should, and install into nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from pages import FIXTURES, ROOT

import ckpt_surgeon

pytestmark = pytest.mark.slow
pytest.importorskip("setuptools", minversion="77")

VERSION = ckpt_surgeon.__version__
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2])"


def build(kind: str, source: Path, out: Path) -> Path:
    """Build a wheel or an sdist by the backend that pyproject.toml names, as pip and build do."""
    out.mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, "-c", BUILD, kind, out], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Deprecat" not in done.stderr
    (made,) = out.iterdir()
    return made


def clean_copy(folder: Path) -> Path:
    """The files that git has, or, where there is no git, those of the sdist's list."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git repository")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release")
    return build("sdist", clean_copy(folder / "source"), folder / "sdist")


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """The wheel that is made of the sdist alone, as an index's users would make it."""
    folder = sdist.parents[1]
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    return build("wheel", folder / "unpacked" / f"ckpt_surgeon-{VERSION}", folder / "wheel")


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return Parser().parsestr(archive.read(f"ckpt_surgeon-{VERSION}.dist-info/METADATA").decode())


def test_the_wheel_holds_the_package_its_marker_of_types_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    source = {str(path.relative_to(ROOT)) for path in (ROOT / "ckpt_surgeon").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == source
    assert "ckpt_surgeon/py.typed" in names
    assert {name.partition("/")[0] for name in names} == {"ckpt_surgeon", f"ckpt_surgeon-{VERSION}.dist-info"}
    assert any(name.endswith("/LICENSE") for name in names)
    assert wheel.name == f"ckpt_surgeon-{VERSION}-py3-none-any.whl"


def test_the_wheel_says_what_the_project_says(wheel: Path) -> None:
    said = metadata(wheel)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert said["Version"] == VERSION
    assert said["License-Expression"] == "MIT"
    assert said["Requires-Python"] == project["requires-python"]
    assert said.get_all("Classifier") == project["classifiers"]
    required = {line.partition(";")[0].strip() for line in said.get_all("Requires-Dist", []) if "extra" not in line}
    assert required == {line.replace(" ", "") for line in project["dependencies"]}
    assert "# ckpt_surgeon" in str(said.get_payload())


def test_the_version_stands_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert "version" not in project
    assert f"## {VERSION}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_the_sdist_has_what_a_packager_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "pyproject.toml", "docs/README.md"} <= names
    assert {"tests/conftest.py", "tests/support/pages.py", "fixtures/parallel.pth"} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith("real")]


def test_the_wheel_installs_into_an_empty_environment_and_its_command_runs(wheel: Path, tmp_path: Path) -> None:
    """Torch and click are lent by this environment: an index is not asked."""
    pytest.importorskip("pip")
    environment = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(install, capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    paths = [subprocess.run([one, "-c", where], capture_output=True, text=True, check=True).stdout.strip()
             for one in (python, sys.executable)]  # fmt: skip
    (Path(paths[0]) / "lent.pth").write_text(paths[1] + "\n")
    trials: tuple[tuple[list[str | Path], str], ...] = (
        ([python.with_name("ckpt"), "--version"], VERSION),
        ([python.with_name("ckpt"), "ls", FIXTURES / "parallel.pth"], "20 tensors"),
        ([python, "-c", "import ckpt_surgeon; print(ckpt_surgeon.__file__)"], paths[0]),
    )
    for words, expected in trials:
        ran = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=clean)
        assert expected in ran.stdout, ran.stdout + ran.stderr
