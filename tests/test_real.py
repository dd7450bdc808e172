"""Real checkpoints of other people's packages: read as torch reads them, converted bit for bit, refused with reason.

``fixtures/fetch_real.py`` brings the files; ``make test`` and the gate call it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import fetch_real
import pytest
import torch
from fetch_real import PACKAGES, Package, RealFile
from safetensors import safe_open
from safetensors.torch import load_file

import ckpt_surgeon
import ckpt_surgeon.models.targets

pytestmark = pytest.mark.real

REAL = fetch_real.DEFAULT_OUT
ONNX = "silero_vad/data/silero_vad_half.onnx"
MASKS = "deepCR-0.3.1/learned_models/mask"
READABLE = [
    pytest.param(package, file, id=f"{package.name}-{Path(file.member).parent.name}-{Path(file.member).name}")
    for package in PACKAGES
    for file in package.files
    if file.member != ONNX
]
PICKLED = [case for case in READABLE if not str(case.id).endswith((".safetensors", ".jit"))]


def real(package: str | Package, file: str | RealFile) -> Path:
    """The path of a fetched file; skips the test where there is none."""
    name = package if isinstance(package, str) else package.name
    path = REAL / name / (file if isinstance(file, str) else file.member)
    if not path.is_file():
        pytest.skip(f"{path.relative_to(REAL.parent)} is not there; fetch it: python fixtures/fetch_real.py")
    return path


def reference(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a file as torch, or safetensors, reads them, keys in the order of the file."""
    if path.suffix == ".safetensors":
        loaded = load_file(path)
        return {key: loaded[key] for key in ckpt_surgeon.open(path)}
    if path.suffix == ".jit":
        with warnings.catch_warnings(action="ignore"):  # torch would rather export models than script them
            return dict(torch.jit.load(path, map_location="cpu").state_dict())
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(loaded, torch.Tensor):
        return {"tensor": loaded}
    if isinstance(loaded, list):
        return {str(place): tensor for place, tensor in enumerate(loaded)}
    return dict(loaded.get("state_dict", loaded))


def assert_same(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    """The same keys, dtypes, shapes and bits."""
    assert sorted(ours) == sorted(theirs)
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype, key
        assert ours[key].shape == tensor.shape, key
        assert raw(ours[key]) == raw(tensor), key


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor's elements, row by row."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def ckpt(*words: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line."""
    command = [sys.executable, "-m", "ckpt_surgeon", *map(str, words)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8")


@pytest.mark.parametrize(("package", "file"), READABLE)
def test_it_is_the_file_of_the_table(package: Package, file: RealFile) -> None:
    assert file.is_at(real(package, file))


@pytest.mark.parametrize(("package", "file"), READABLE)
def test_it_loads_as_torch_loads_it(package: Package, file: RealFile) -> None:
    path = real(package, file)
    ours, theirs = ckpt_surgeon.load(path), reference(path)
    assert list(ours) == list(theirs)
    assert_same(ours, theirs)
    assert {key: tensor.stride() for key, tensor in ours.items()} == {
        key: tensor.stride() for key, tensor in theirs.items()
    }


@pytest.mark.parametrize(("package", "file"), READABLE)
def test_it_becomes_safetensors_bit_for_bit(package: Package, file: RealFile, tmp_path: Path) -> None:
    path = real(package, file)
    theirs = reference(path)
    out = tmp_path / "model.safetensors"
    ckpt_surgeon.convert(path, out)
    made = load_file(out)
    assert_same(made, theirs)
    assert all(tensor.is_contiguous() for tensor in made.values())
    assert list(ckpt_surgeon.open(out)) == list(theirs)
    with safe_open(out, framework="pt") as opened:
        assert opened.metadata()["format"] == "pt"


@pytest.mark.parametrize(("package", "file"), READABLE)
def test_it_becomes_a_torch_file_that_loads_alike_anywhere(package: Package, file: RealFile, tmp_path: Path) -> None:
    path = real(package, file)
    theirs = reference(path)
    out = tmp_path / "model.pth"
    ckpt_surgeon.convert(path, out)
    made = torch.load(out)  # no map_location: all is on the cpu, whatever device it was saved from
    assert list(made) == list(theirs)
    assert_same(made, theirs)


@pytest.mark.parametrize(("package", "file"), PICKLED)
def test_the_saved_devices_are_those_that_torch_meets(package: Package, file: RealFile) -> None:
    path = real(package, file)
    met: set[str] = set()

    def meet(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        met.add(location)
        return storage

    torch.load(path, map_location=meet, weights_only=True)  # type: ignore[arg-type]
    listing = ckpt_surgeon.ls(path)
    assert set(listing.devices) == met
    assert ("cuda" in file.note) == any(device.startswith("cuda") for device in listing.devices)


def test_losses_beside_the_weights_are_not_taken_for_weights() -> None:
    listing = ckpt_surgeon.ls(real("scu-captcha", "scu_captcha/model.pt"))
    assert [(part.path, part.tensors) for part in listing.parts] == [("state_dict", 8)]
    assert [(left.path, left.tensors) for left in listing.beside] == [("record", 7192)]


def test_an_onnx_model_is_refused_as_one(tmp_path: Path) -> None:
    path = real("silero-vad", ONNX)
    with pytest.raises(ckpt_surgeon.NotACheckpoint, match="ONNX"):
        ckpt_surgeon.open(path)
    done = ckpt("ls", path, folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "ONNX" in done.stderr


class TestMainJob:
    """Look, compare, strip the prefix, compare again, load: with the class that the checkpoint belongs to."""

    TARGET = "deepCR.unet:UNet2(1, 1, 32)"

    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        if find_spec("deepCR") is None:
            pytest.skip("deepCR is not installed; pip install 'ckpt_surgeon[real]'")

    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> Path:
        return Path(shutil.copy(real("deepcr", f"{MASKS}/WFC3-UVIS.pth"), tmp_path))

    def test_from_parallel_to_strictly_loaded(self, checkpoint: Path, tmp_path: Path) -> None:
        listed = ckpt("ls", checkpoint.name, folder=tmp_path)
        assert listed.returncode == 0
        assert "22 tensors" in listed.stdout

        before = ckpt("diff", checkpoint.name, self.TARGET, folder=tmp_path)
        assert before.returncode == 1
        assert "stripping 'module.' makes all 22 match" in before.stdout
        assert "ckpt strip-prefix WFC3-UVIS.pth clean.pth" in before.stdout

        assert ckpt("strip-prefix", checkpoint.name, "clean.pth", folder=tmp_path).returncode == 0

        after = ckpt("diff", "clean.pth", self.TARGET, folder=tmp_path)
        assert after.returncode == 0
        assert "22 of 22 keys, 100 % of the parameters" in after.stdout

        with warnings.catch_warnings(action="ignore"):  # deepCR uses what torch has deprecated
            model = ckpt_surgeon.models.targets.build(self.TARGET)
        assert isinstance(model, torch.nn.Module)
        loaded = model.load_state_dict(torch.load(tmp_path / "clean.pth"), strict=True, assign=True)
        assert not loaded.missing_keys
        assert not loaded.unexpected_keys
        assert model(torch.zeros(1, 1, 16, 16)).shape == (1, 1, 16, 16)

    def test_the_diff_as_json(self, checkpoint: Path, tmp_path: Path) -> None:
        done = ckpt("diff", checkpoint.name, self.TARGET, "--json", folder=tmp_path)
        assert done.returncode == 1
        found = json.loads(done.stdout)
        assert (len(found["matched"]), len(found["missing"]), len(found["unused"])) == (0, 22, 22)
        assert found["mismatched"] == []

    def test_counters_saved_as_floats_are_said_and_load(self, tmp_path: Path) -> None:
        target = "deepCR.unet_batchnorm:UNet2SigmoidBatchNorm(1, 1, 32)"
        stripped = ckpt("strip-prefix", real("deepcr", f"{MASKS}/ACS-WFC.pth"), "clean.pth", folder=tmp_path)
        assert stripped.returncode == 0
        done = ckpt("diff", "clean.pth", target, "--json", folder=tmp_path)
        assert done.returncode == 0
        odd = {
            (one["name"].rpartition(".")[2], one["dtype"], one["expected"]) for one in json.loads(done.stdout)["dtypes"]
        }
        assert odd == {("num_batches_tracked", "float32", "int64")}
