"""The small files in fixtures/ are what their script makes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import fetch_real
import make_fixtures
import pytest
import torch
from model import SmallNet
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

FIXTURES = Path(make_fixtures.__file__).parent
NAMES = ["ema.pth", "legacy.pth", "parallel.pth", "parallel.safetensors", "positions.pth", "training.ckpt"]
NAMES += ["weight_norm.pth", *(f"sharded/{name}" for name in make_fixtures.SHARDS)]


@pytest.fixture(scope="module")
def remade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remade")
    make_fixtures.make(folder)
    return folder


def content(path: Path) -> object:
    """Everything a fixture holds, except the optimizer's options, whose list grows with torch."""
    if path.suffix == ".safetensors":
        return load_file(path)
    loaded = torch.load(path, weights_only=False)
    loaded.get("optimizer", {}).pop("param_groups", None)
    return loaded


def assert_same(one: object, other: object) -> None:
    """Tensors alike in dtype and every bit, dicts in the order of their keys, all else equal."""
    if isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor)
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, Mapping):
        assert isinstance(other, Mapping)
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    else:
        assert one == other


def test_remaking_gives_the_same_distributed_checkpoint(remade: Path, tmp_path: Path) -> None:
    for name, folder in (("ours.pth", FIXTURES), ("theirs.pth", remade)):
        dcp_to_torch_save(folder / "distributed", tmp_path / name)
    assert_same(content(tmp_path / "theirs.pth"), content(tmp_path / "ours.pth"))


@pytest.mark.parametrize("name", NAMES)
def test_remaking_gives_the_same_tensors(name: str, remade: Path) -> None:
    assert_same(content(remade / name), content(FIXTURES / name))


def test_remaking_gives_the_same_index(remade: Path) -> None:
    index = Path("sharded/model.safetensors.index.json")
    assert (remade / index).read_text() == (FIXTURES / index).read_text()


def test_every_binary_has_a_maker(remade: Path) -> None:
    there = {str(path.relative_to(FIXTURES)) for path in FIXTURES.rglob("*") if path.is_file()}
    made = {str(path.relative_to(remade)) for path in remade.rglob("*") if path.is_file()}
    texts = {name for name in there if name.endswith((".py", ".pyc", ".toml"))}
    others = {name for name in there if (FIXTURES / f"make_{name.partition('/')[0]}.py").is_file()}
    assert there - texts - others == made
    assert {name.partition("/")[0] for name in others} == {"deepspeed", "libraries", "megatron"}


def test_the_files_are_small(remade: Path) -> None:
    assert sum(path.stat().st_size for path in remade.rglob("*") if path.is_file()) < 300_000


def test_the_clean_weights_fit_the_network(remade: Path) -> None:
    state_dict = {
        key: tensor for name in make_fixtures.SHARDS for key, tensor in load_file(remade / "sharded" / name).items()
    }
    model = SmallNet(num_classes=10)
    model.load_state_dict(state_dict, strict=True)
    assert model.eval()(torch.zeros(2, 3, 8, 8)).shape == (2, 10)


def test_the_table_of_real_files_is_sound() -> None:
    files = [(package, file) for package in fetch_real.PACKAGES for file in package.files]
    places = [package.place(Path("real"), file) for package, file in files]
    assert len(set(places)) == len(files)
    assert all(len(file.sha256) == 64 and file.nbytes > 0 for _, file in files)
