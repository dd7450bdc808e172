"""DTensors: a plain tensor where the file has all of it, else one rank's part that is never taken for the whole."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import dtensor_worker
import pytest
import torch
import torch.distributed.tensor
from command_line import Run
from dtensor_worker import BIAS, WEIGHT

import ckpt_surgeon
from ckpt_surgeon.errors import FileError

WHOLE = ("replicated_0", "replicated_1", "parameters_1", "along_one_1",
         *(f"one_{name}" for name in ("replicated", "parameters", "along_one", "rows", "columns", "sums")))  # fmt: skip
PARTS = {
    "rows_0": "rank 0 of a mesh of 2, .*'weight' has [3, 3] of [5, 3], Shard(dim=0)",
    "rows_1": "rank 1 of a mesh of 2, .*'weight' has [2, 3] of [5, 3], Shard(dim=0)",
    "columns_1": "rank 1 of a mesh of 1 x 2, .*'weight' has [5, 1] of [5, 3], Replicate(), Shard(dim=1)",
    "sums_1": "rank 1 of a mesh of 2, .*'weight' has [5, 3] of [5, 3], Partial(reduce_op=sum)",
}


@pytest.fixture(scope="module")
def saved_dtensors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes, and one, have saved."""
    folder = tmp_path_factory.mktemp("dtensors")
    done = subprocess.run(
        [sys.executable, str(dtensor_worker.__file__), str(folder)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return folder


def layer() -> torch.nn.Linear:
    return torch.nn.Linear(3, 5)


def local_weight(path: Path) -> torch.Tensor:
    """The elements that torch itself finds in a file."""
    found = torch.load(path, weights_only=False)["weight"]
    assert isinstance(found, torch.distributed.tensor.DTensor)
    return found.to_local()


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_dtensor_that_is_all_there_is_a_plain_tensor_and_loads_strictly(
    name: str, suffix: str, saved_dtensors: Path, tmp_path: Path
) -> None:
    path, out = saved_dtensors / f"{name}.pt", tmp_path / f"out{suffix}"
    assert not ckpt_surgeon.open(path).part
    ckpt_surgeon.convert(path, out)
    model = layer()
    model.load_state_dict(ckpt_surgeon.load(out), strict=True)
    assert torch.equal(model.weight, WEIGHT)
    assert torch.equal(model.bias, BIAS)
    if suffix == ".pth":
        assert type(torch.load(out)["weight"]) is torch.Tensor
    other = layer()
    assert ckpt_surgeon.load_into(other, path).matched == 1.0
    assert torch.equal(other.weight, WEIGHT)


@pytest.mark.parametrize("name", PARTS)
def test_a_sharded_dtensor_is_one_ranks_part_and_refused_as_a_whole(
    name: str, saved_dtensors: Path, ckpt: Run, tmp_path: Path
) -> None:
    path, out = saved_dtensors / f"{name}.pt", tmp_path / "out.pth"
    pattern = ".*".join(map(re.escape, PARTS[name].split(".*")))
    assert re.search(pattern, "\n".join(ckpt_surgeon.ls(path).notes))
    assert ckpt_surgeon.open(path)["weight"].shape == (5, 3)
    with pytest.raises(FileError, match=pattern):
        ckpt_surgeon.convert(path, out)
    with pytest.raises(FileError, match=pattern):
        ckpt_surgeon.load_into(layer(), path)
    with pytest.raises(ckpt_surgeon.EditError, match="allow_part=True"):
        ckpt_surgeon.load(path)
    for words in (["convert", path, out], ["convert", "--whole", path, out], ["rename", path, out, "bias=b"]):
        refused = ckpt(*words)
        assert (refused.status, out.exists()) == (2, False)
        assert re.search(pattern, refused.err)
        assert "--allow-part" in refused.err


@pytest.mark.parametrize("name", PARTS)
def test_a_part_that_is_allowed_has_the_elements_of_its_rank(
    name: str, saved_dtensors: Path, ckpt: Run, tmp_path: Path
) -> None:
    path, out, kept = saved_dtensors / f"{name}.pt", tmp_path / "out.safetensors", tmp_path / "kept.pt"
    assert ckpt("convert", path, out, "--allow-part").status == 0
    assert torch.equal(ckpt_surgeon.load(out)["weight"], local_weight(path))
    opened = ckpt_surgeon.open(path, allow_part=True)
    assert torch.equal(ckpt_surgeon.load(opened)["weight"], local_weight(path))
    assert ckpt("rename", path, kept, "weight=w", "--whole", "--allow-part").status == 0
    found = torch.load(kept, weights_only=False)["w"]
    assert isinstance(found, torch.distributed.tensor.DTensor)
    assert torch.equal(found.to_local(), local_weight(path))


@pytest.mark.parametrize("name", ["replicated_1", "rows_1"])
def test_a_file_of_dtensors_is_renamed_in_place(name: str, saved_dtensors: Path, ckpt: Run, tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    path.write_bytes((saved_dtensors / f"{name}.pt").read_bytes())
    before = local_weight(path)
    assert ckpt("rename", path, "weight=w", "--in-place").status == 0
    found = torch.load(path, weights_only=False)
    assert list(found) == ["w", "bias"]
    assert torch.equal(found["w"].to_local(), before)
    assert found["w"].placements == torch.load(saved_dtensors / f"{name}.pt", weights_only=False)["weight"].placements
