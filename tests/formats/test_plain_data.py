"""The verdict "plainly data" is true: a full load of such a file looks up what scan listed, and runs nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
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
