"""Whatever a command is given, its trouble is one that is expected: a line that says what is wrong, status 2."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from broken_files import BROKEN, SALVAGE
from command_line import Ran, Run
from differential import Maker
from safetensors.torch import save_file
from unusual_files import UNUSUAL, build

import ckpt_surgeon
from ckpt_surgeon import CheckpointError

MODULE = r"""
import torch
class N(torch.nn.Module):
    def __init__(self, a=1):
        super().__init__()
        self.fc = torch.nn.Linear(2, 2)
class Weird(Exception):
    def __str__(self): raise RuntimeError
def ends(): raise SystemExit(3)
def deep(): raise RecursionError
def number(): return 3
def two_lines(): raise ValueError("a\nb")
def weird(): raise Weird
"""


def assert_expected(ran: Ran, words: object) -> None:
    assert "unexpected trouble" not in ran.err, (words, ran.err)
    assert "Traceback" not in ran.err, (words, ran.err)
    assert ran.status in (0, 1, 2), (words, ran)
    if ran.status == 2 and not ran.err.startswith("Usage:"):
        assert ran.err.count("\n") == 1, (words, ran.err)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a checkpoint, a model, and names of all kinds that are neither."""
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.weight": torch.ones(2, 2), "fc.bias": torch.ones(2), "module.x": torch.ones(3)}, "m.pth")
    save_file({"fc.weight": torch.ones(2, 2)}, "s.safetensors")
    for name in ("dir", "x.dcp"):
        os.mkdir(name)
    os.mkfifo("fifo")
    os.symlink("loop", "loop")
    os.symlink("gone", "dangling")
    for name, raw in {
        "empty": b"",
        "text.txt": b"hello\n",
        "mod.py": MODULE.encode(),
        "syntax.py": b"def (:\n",
        "ends.py": b"import sys; sys.exit(5)\n",
        "bytes.py": b"\xff\x00\x01",
        "r.toml": b"[[edit]]\ndo='drop'\npatterns='fc.*'\n",
        "latin.toml": b"\xff\xfe",
        "check.toml": b"[tensors]\nfinite = '*'\n",
        "deep.toml": b"a=" + b"[" * 5000,
        "number.toml": b"a=" + b"9" * 5000,
        "names.txt": b"a\nb\n",
        "latin.txt": b"\xff\n\xfe",
    }.items():
        (tmp_path / name).write_bytes(raw)
    return tmp_path


INPUTS = ["m.pth", "dir", "loop", "dangling", "empty", "text.txt", "x.dcp", "nope", "", "-", "/dev/null", "/dev/full",
          "a" * 300 + ".pth", "\udcff.pth", "/proc/self/mem", "/", "bad\nname", "m.pth/x", ".", ".."]  # fmt: skip
OF_AN_INPUT = (
    "ls {}",
    "ls {} --training",
    "scan {}",
    "hash {}",
    "diff m.pth {}",
    "check {} --rules check.toml",
    "check m.pth --rules {}",
    "check {} --write-rules c.toml -f",
    "diff {} mod.py:N",
    "recover {}",
    "convert {} o.pth -f",
    "recipe check {}",
    "apply {} m.pth o.pth -f",
    "fit m.pth {} o.pth -f",
    "align m.pth {}",
    "set {} o.pth a=1",
    "strip-prefix {} --in-place",
    "groups mod.py:N --rules {}",
    "map-classes m.pth o.pth fc.* --old {} --new {} -f",
    "resume-check {} m.pth mod.py:N",
    "keep {} o.pth * --whole -f",
    "apply r.toml {} o.pth -f",
)
OUTPUTS = [
    "o",
    "dir",
    "fifo",
    "loop",
    "dangling",
    "/dev/full",
    "/dev/null",
    "b" * 250 + ".pth",
    "b" * 300 + ".pth",
    "",
    "nodir/o.pth",
    "m.pth/x.pth",
    "\udcff.pth",
    "\udcff.safetensors",
    "/proc/x.pth",
    "o.pth/",
    "x.dcp",
    "/o\0.pth",
    "s.safetensors/..",
    ".pth",
    "..",
]
OF_AN_OUTPUT = ("convert m.pth {}", "convert m.pth {} -f", "convert m.pth {} -n", "keep m.pth {} fc* --whole -f",
                "convert m.pth {} --max-shard-size 20 -f", "align m.pth mod.py:N -o {}", "recipe invert r.toml -o {}",
                "set m.pth {} a=1", "fit m.pth mod.py:N {} -f", "check m.pth --write-rules {}")  # fmt: skip
TARGETS = [
    "mod.py",
    "mod.py:",
    "mod.py:Nope",
    "mod.py:ends",
    "mod.py:ends()",
    "mod.py:deep",
    "mod.py:number",
    "mod.py:two_lines",
    "mod.py:weird",
    "mod.py:N(",
    "mod.py:N(1)",
    "hf:",
    "hf:nope",
    "hf:mod.py",
    "hf:.",
    "hf:.(1)",
    "hf:.#X(",
    "timm:no",
    "timm:resnet18(1)",
    "torchvision:a.b(c=",
    "mod.py:N(a=__import__('os'))",
    "mod.py:N(a=9**9**9)",
    f"mod.py:N({'[' * 3000}{']' * 3000})",
    "syntax.py:N",
    "ends.py:N",
    "bytes.py:N",
    "torchvision.models:resnet18(num_classes=-1)",
    "torch:Tensor",
    "os:system",
    "os:system('true')",
    "builtins:exit(3)",
    "a.b.c:d",
    ":",
    "::",
    "x:y:z",
    "mod.py:N().fc",
    "mod.py:N.__init__",
]
OF_A_TARGET = (
    "diff m.pth {}",
    "fit m.pth {} o.pth -n",
    "freeze-plan {}",
    "align m.pth {}",
    "resume-check m.pth m.pth {}",
)
ARGUMENTS = [
    "rename m.pth o.pth (", "rename m.pth o.pth = -f", "rename m.pth o.pth a=b=c", "rename m.pth o.pth --regex (=x",
    "keep m.pth o.pth [ -f", "slice m.pth o.pth fc.* --dim 99999999999999999999",
    "slice m.pth o.pth fc.* --dim 0 --start -9 --stop 99999999999999999999 -f", "cast m.pth o.pth --dtype nope",
    "reshape m.pth o.pth fc.weight --shape -1,-1", f"reshape m.pth o.pth fc.weight --shape {'9' * 50}",
    f"pad m.pth o.pth fc.* --dim 0 --to 1{'0' * 18} -f", f"pad m.pth o.pth fc.* --dim 0 --to 1{'0' * 30} -f",
    "scale m.pth o.pth fc.* --factor 1e999 -f", f"convert m.pth o.pth --max-shard-size {'9' * 40}GB -f",
    f"convert m.pth o.pth --threads {'9' * 30} -f", "ls m.pth [", "ls m.pth --select ...", "set m.pth o.pth =",
    "set m.pth o.pth a", "set m.pth o.pth fc.weight=1", f"set m.pth o.pth x.y=[{'[' * 3000}",
    f"set m.pth o.pth x={'9' * 5000}", "resize-grid m.pth o.pth fc.weight --grid 1x1:9999999999x9999999999",
    "resize-rows m.pth o.pth fc.* --rows 99999999999999", "edit m.pth o.pth --rename (",
    f"rotary m.pth o.pth fc.* --to pairs --head-dim {'8' * 30}", "rotary m.pth o.pth fc.* --to pairs",
    "quantize m.pth o.pth --dtype q8_0 --only nope*", "convert m.pth o.gguf", "convert m.pth . --with-files",
    "transpose m.pth o.pth fc.* --dims 5,5", "apply latin.toml m.pth o.pth", "apply deep.toml m.pth o.pth",
    "apply number.toml m.pth o.pth", "groups mod.py:N --rules deep.toml", "groups mod.py:N --rules number.toml",
    "map-classes m.pth o.pth fc.* --old latin.txt --new names.txt", "stack m.pth o.pth --sources {n --into {",
]  # fmt: skip


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("forms", "values"), [(OF_AN_INPUT, INPUTS), (OF_AN_OUTPUT, OUTPUTS), (OF_A_TARGET, TARGETS), (ARGUMENTS, ["{}"])],
    ids=["inputs", "outputs", "targets", "arguments"],
)  # fmt: skip
def test_no_argument_makes_unexpected_trouble(forms: list[str], values: list[str], ckpt: Run) -> None:
    for value in values:
        for form in forms:
            words = [value if word == "{}" else word for word in form.split(" ")]
            assert_expected(ckpt(*words), words)


@pytest.mark.usefixtures("folder")
def test_an_error_of_the_system_is_told_with_its_path(ckpt: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "there.tmp")

    monkeypatch.setattr("ckpt_surgeon.writing.write.write", full)
    ran = ckpt("convert", "m.pth", "o.pth")
    assert (ran.status, ran.err) == (2, "ckpt: there.tmp: No space left on device\n")


# -- files

OF_A_FILE = (
    ["ls"],
    ["ls", "--json", "--all"],
    ["ls", "--check"],
    ["ls", "--training"],
    ["scan"],
    ["hash"],
    ["diff", "{}"],
    ["convert", "out.pth", "-f"],
    ["keep", "out.pth", "*", "-f", "--whole"],
)


def assert_no_command_is_surprised(path: Path, ckpt: Run) -> None:
    for name, *words in OF_A_FILE:
        assert_expected(ckpt(name, path, *(path if word == "{}" else word for word in words)), (name, path.name, words))
    with suppress(CheckpointError):
        ckpt_surgeon.open_run(path)


def _unusual(family: str, name: str, folder: Path) -> Path:
    return build(family, name, folder).path


Make = Callable[[Path], Path]
FILES: dict[str, Make] = {
    **{" ".join(("broken", *name)): one.make for name, one in BROKEN.items()},
    **{f"salvage {name}": one.make for name, one in SALVAGE.items()},
    **{" ".join(("unusual", *name)): partial(_unusual, *name) for name in UNUSUAL},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_no_hostile_file_makes_unexpected_trouble(
    name: str, ckpt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path)
    assert_no_command_is_surprised(FILES[name](tmp_path / "in"), ckpt)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_no_file_made_of_structures_makes_unexpected_trouble(
    kind: str, ckpt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed in (*range(40), 128):
        path = tmp_path / ("in.safetensors" if kind == "safetensors" else "in.pth")
        path.write_bytes(getattr(Maker(seed), kind)())
        assert_no_command_is_surprised(path, ckpt)


def test_the_line_of_unexpected_trouble_would_be_noticed() -> None:
    """The words that the tests above look for are those that the command line uses."""
    source = Path(ckpt_surgeon.__file__).parent / "cli" / "__init__.py"
    assert re.search("unexpected trouble", source.read_text("utf-8"))
