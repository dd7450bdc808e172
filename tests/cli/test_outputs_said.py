"""What a command says of sizes is true, and what it would refuse it refuses before it works."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import Run

from ckpt_surgeon.cli import fitting


def test_a_pickle_that_holds_its_arrays_itself_has_the_size_of_its_file(ckpt: Run, tmp_path: Path) -> None:
    """As Detectron's and caffe2's model zoos have them."""
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"blobs": {"conv1_w": np.ones((30, 40), "float32")}}))
    ran = ckpt("convert", path, tmp_path / "model.safetensors")
    assert ran.status == 0, ran.err
    assert path.stat().st_size > 4800
    assert re.search(r", (4\.9|5\.0) kB → ", ran.out), ran.out


def test_fit_refuses_an_output_that_exists_before_it_fits(
    ckpt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(torch.nn.Linear(2, 3).state_dict(), tmp_path / "in.pth")
    (tmp_path / "out.pth").write_bytes(b"mine")
    words = ("fit", tmp_path / "in.pth", "torch.nn:Linear(2, 3)", tmp_path / "out.pth")
    with monkeypatch.context() as patched:
        patched.setattr(fitting, "fit_checkpoint", lambda *_, **__: pytest.fail("it has been fitted"))
        ran = ckpt(*words)
    assert (ran.status, ran.out) == (2, "")
    assert "out.pth: exists already, nothing was written; use --force to replace it" in ran.err
    assert (tmp_path / "out.pth").read_bytes() == b"mine"
    assert ckpt(*words, "--dry-run").status == 0
    assert ckpt(*words, "--force").status == 0
