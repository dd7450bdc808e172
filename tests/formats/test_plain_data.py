"""The verdict "plainly data" is true: a full load of such a file looks up what scan listed, and runs nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file
from tables import TABLE, save_legacy, save_zip
from unusual_files import UNUSUAL, build

import ckpt_surgeon
from ckpt_surgeon import CheckpointError
from ckpt_surgeon.tensors.dtypes import BY_STORAGE

# torch.jit.load makes classes of its own; a tar is unpacked into a folder by torch itself.
NOT_PICKLES = ("TorchScript", "tar", "torch 0.1", "torch.package", "torch.export")

LOAD = """
import json, os, pickle, sys, warnings
import numpy, torch
warnings.simplefilter("ignore")
FORBIDDEN = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.mkdir", "os.remove", "os.rename",
             "os.rmdir", "os.chmod", "os.link", "os.symlink", "os.truncate", "os.putenv", "subprocess", "socket",
             "shutil", "tempfile", "ctypes.dlopen", "signal", "winreg", "webbrowser", "pty", "ftplib", "urllib")
seen, names, armed = [], [], False

def watch(event, args):
    if not armed:
        return
    if event == "pickle.find_class":
        names.append(list(map(str, args)))
    elif event.startswith(FORBIDDEN):
        seen.append(event)
    elif event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        seen.append(f"open {args[0]}")

sys.addaudithook(watch)
found = {}
for path in sys.stdin.read().splitlines():
    seen, names, armed = [], [], True
    try:
        try:
            torch.load(path, weights_only=False, map_location="cpu")
        except Exception:
            with open(path, "rb") as file:
                pickle.load(file)
    except Exception as error:
        pass
    armed = False
    found[path] = (seen, names)
print(json.dumps(found))
"""


def corpus(folder: Path) -> list[Path]:
    """Every unusual file, and torch's containers of common state_dicts."""
    made = []
    for index, (family, name) in enumerate(UNUSUAL):
        if any(word in f"{family} {name}" for word in NOT_PICKLES):
            continue
        inner = folder / str(index)
        inner.mkdir()
        made.append(build(family, name, inner).path)
    for name in ("dense", "tied", "versioned", "parameter", "conjugate", "uint16"):
        for save in (save_zip, save_legacy):
            inner = folder / f"{name} {save.__name__}"
            inner.mkdir()
            made.append(save(TABLE[name](), inner))
    return [path for path in made if path.is_file()]


@pytest.mark.filterwarnings("ignore")
def test_a_full_load_of_plain_data_looks_up_what_scan_lists_and_runs_nothing(tmp_path: Path) -> None:
    listed = {}
    for path in corpus(tmp_path):
        try:
            scanned = ckpt_surgeon.scan(path)
        except CheckpointError:
            continue
        if not scanned.suspects:
            listed[str(path)] = {name.name for name in scanned.names}
    assert len(listed) > 40
    done = subprocess.run(
        [sys.executable, "-c", LOAD], input="\n".join(listed), capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, tuple[list[str], list[list[str]]]] = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == listed.keys()
    for name, (events, names) in found.items():
        assert events == [], name
        looked_up = {".".join(one) for one in names if one[1] not in BY_STORAGE}
        assert {_canonical(one) for one in looked_up} <= {_canonical(one) for one in listed[name]}, name


def _canonical(name: str) -> str:
    """A name as Python 3 spells it."""
    return (
        name.replace("__builtin__.", "builtins.")
        .replace("copy_reg.", "copyreg.")
        .replace("torch.tensor.", "torch._tensor.")
    )


# -- containers that have loaders of their own

LOAD_BY_KIND = LOAD.replace(
    """        try:
            torch.load(path, weights_only=False, map_location="cpu")
        except Exception:
            with open(path, "rb") as file:
                pickle.load(file)
    except Exception as error:
        pass
""",
    """        load(path)
    except Exception as error:
        seen.append(f"{type(error).__name__} {error}")
""",
).replace(
    "found = {}",
    """import safetensors.torch, torch.export
from torch.package import PackageImporter

def load(path):
    if path.endswith(".safetensors"):
        safetensors.torch.load_file(path)
    elif path.endswith(".npz"):
        dict(numpy.load(path))
    elif "package" in path:
        PackageImporter(path).load_pickle("nets", "model.pkl")
    elif path.endswith(".pt2"):
        torch.export.load(path)
    else:
        torch.load(path, weights_only=False)

found = {}
for path in json.loads(sys.argv[1]):
    load(path)  # what a loader imports and sets up by itself
""",
)


def by_kind(folder: Path, number: int) -> list[Path]:
    """A file of each container that is not, or not only, a pickle for torch.load."""
    made = []
    for family, name in UNUSUAL:
        if family in ("torch.package", "torch.export") or (family == "torch 0.1" and "tar" in name):
            inner = folder / f"{family} {name} {number}".replace(".", "")
            inner.mkdir()
            made.append(build(family, name, inner).path)
    safe, archive = folder / f"{number}.safetensors", folder / f"{number}.npz"
    save_file({"fc.bias": torch.ones(2)}, safe)
    numpy.savez(archive, weights=numpy.ones(2))
    return [*made, safe, archive]


@pytest.mark.filterwarnings("ignore")
def test_the_loaders_of_other_containers_run_nothing_that_scan_calls_plain_data(tmp_path: Path) -> None:
    first, second = by_kind(tmp_path, 0), by_kind(tmp_path, 1)
    plain = [path for path in second if not ckpt_surgeon.scan(path).suspects]
    assert len(plain) >= 6
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", LOAD_BY_KIND, json.dumps(list(map(str, first)))],
        input="\n".join(map(str, plain)),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(temporary)},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, tuple[list[str], list[list[str]]]] = json.loads(done.stdout.splitlines()[-1])
    for name, (events, _) in found.items():
        # torch unpacks a tar into a folder of its own and removes it
        unpacked = {event for event in events if str(temporary) in event or event.startswith(_OF_UNPACKING)}
        assert [event for event in events if "tar" not in Path(name).parent.name or event not in unpacked] == [], name
    assert list(temporary.iterdir()) == []


_OF_UNPACKING = ("tempfile.mkdtemp", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "shutil.", "os.utime", "os.chown")


def test_the_hook_sees_what_a_hostile_file_runs(tmp_path: Path) -> None:
    """The control: the same program tells of a file that scan does not call plain data."""
    path, mark = tmp_path / "hostile.pkl", tmp_path / "mark"
    path.write_bytes(b"cos\nsystem\n(S'touch " + bytes(mark) + b"'\ntR.")
    assert ckpt_surgeon.scan(path).suspects
    done = subprocess.run(
        [sys.executable, "-c", LOAD], input=str(path), capture_output=True, text=True, cwd=tmp_path, check=True
    )
    events, _ = json.loads(done.stdout.splitlines()[-1])[str(path)]
    assert "os.system" in events
    assert mark.exists()
