"""Files written back whole: torch.load gives what it gave before, in types, values, sharing, order and versions."""

from __future__ import annotations

import math
import types
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from fetch_real import DEFAULT_OUT, PACKAGES
from torch import nn
from unusual_files import UNUSUAL, UnusualFile, build

import ckpt_surgeon
from ckpt_surgeon import CheckpointError

FIXTURES = DEFAULT_OUT.parent / "fixtures"
NO_FILE_OF_TORCH = {"pickle", "Python 2", "torch 0.1", "TorchScript", "torch.package", "torch.export"}
ODD = [pytest.param(*names, id="-".join(names)) for names in UNUSUAL]
REAL = [
    pytest.param(DEFAULT_OUT / package.name / file.member, id=f"{package.name}-{'-'.join(file.member.split('/')[-2:])}")
    for package in PACKAGES
    for file in package.files
    if file.member.endswith((".pth", ".pt"))
]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Same:
    """Compares two objects that torch.load made, and notes which tensors and containers are one and the same."""

    def __init__(self) -> None:
        self.pairs: dict[int, int] = {}
        self.kept: dict[int, object] = {}  # by identity, so that no other object gets it meanwhile

    def check(self, one: object, other: object, path: str = "") -> None:
        assert type(one) is type(other), path
        if isinstance(one, (str, int, float, bytes, bool, type(None), type, types.FunctionType)):
            assert one == other or (one != one and other != other), path
            return
        if not isinstance(one, tuple):
            assert self.pairs.setdefault(id(one), id(other)) == id(other), f"{path}: shared elsewhere"
        if id(one) in self.kept:
            return
        self.kept |= {id(one): one, id(other): other}
        self._inside(one, other, path)

    def _inside(self, one: object, other: object, path: str) -> None:
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
            self._tensor(one, other, path)
        elif isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
            assert (one.dtype, one.shape) == (other.dtype, other.shape), path
            assert one.dtype.hasobject or one.tobytes() == other.tobytes(), path
        elif isinstance(one, Mapping) and isinstance(other, Mapping):
            self.check(list(one), list(other), f"{path} keys")
            for key, value in zip(one.values(), other.values(), strict=True):
                self.check(key, value, f"{path}.value")
        elif isinstance(one, (list, tuple, deque)) and isinstance(other, (list, tuple, deque)):
            assert len(one) == len(other), path
            for index, (left, right) in enumerate(zip(one, other, strict=True)):
                self.check(left, right, f"{path}.{index}")
        elif isinstance(one, weakref.ref) and isinstance(other, weakref.ref):
            self.check(one(), other(), path)
        elif isinstance(one, partial) and isinstance(other, partial):
            self.check(one.func, other.func, path)
            self.check((one.args, one.keywords), (other.args, other.keywords), path)
        elif type(one).__eq__ is not object.__eq__:
            assert one == other, path
        self._attributes(one, other, path)

    def _attributes(self, one: object, other: object, path: str) -> None:
        """The attributes of an object, in its dict or in slots; a state_dict has its versions there."""
        if isinstance(one, (torch.Tensor, torch.dtype, types.ModuleType)):
            return
        self.check(getattr(one, "__dict__", None), getattr(other, "__dict__", None), f"{path}.__dict__")
        for name in getattr(type(one), "__slots__", ()):
            self.check(getattr(one, name, None), getattr(other, name, None), f"{path}.{name}")

    def _tensor(self, one: torch.Tensor, other: torch.Tensor, path: str) -> None:
        facts = [(tensor.dtype, tensor.shape, tensor.requires_grad, tensor.layout) for tensor in (one, other)]
        assert facts[0] == facts[1], path
        if one.layout is not torch.strided:
            return
        assert (one.stride(), one.storage_offset()) == (other.stride(), other.storage_offset()), path
        stores = [tensor.untyped_storage() for tensor in (one, other)]
        raw = [torch.empty(0, dtype=torch.uint8).set_(store) for store in stores]
        assert torch.equal(*raw), path
        where = [store.data_ptr() for store in stores]
        assert not where[0] or self.pairs.setdefault(-where[0], where[1]) == where[1], f"{path}: another storage"


def assert_same_file(before: Path, after: Path) -> None:
    one, other = (torch.load(path, weights_only=False, map_location="cpu") for path in (before, after))
    Same().check(one, other)


def written_back(path: Path, out: Path, select: str | None = None) -> None:
    ckpt_surgeon.save(ckpt_surgeon.open_run(path, select=select), out)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], UnusualFile]:
    return cache(lambda family, name: build(family, name, tmp_path_factory.mktemp("odd")))


def is_refused(family: str, name: str) -> bool:
    """Whether an unusual file is no file of torch.save, or one of a model that has no values yet."""
    if name in ("plain pickle", "uninitialized parameters"):
        return True
    return family in NO_FILE_OF_TORCH and name != "legacy torch file"


@pytest.mark.parametrize(("family", "name"), [case for case in ODD if is_refused(*case.values)])  # type: ignore[arg-type]
def test_what_cannot_be_kept_whole_is_refused_by_name(
    family: str, name: str, shelf: Callable[[str, str], UnusualFile], tmp_path: Path
) -> None:
    made = shelf(family, name)
    with pytest.raises(CheckpointError, match=made.path.name):
        written_back(made.path, tmp_path / "out.pth", made.select)
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize(("family", "name"), [case for case in ODD if not is_refused(*case.values)])  # type: ignore[arg-type]
def test_every_unusual_file_comes_back_equal(
    family: str, name: str, shelf: Callable[[str, str], UnusualFile], tmp_path: Path
) -> None:
    made = shelf(family, name)
    written_back(made.path, tmp_path / "out.pth", made.select)
    assert_same_file_or_state(made, tmp_path / "out.pth")


def assert_same_file_or_state(made: UnusualFile, out: Path) -> None:
    """Compare what torch loads; where it cannot load the source (a class is gone, a zip packed anew), what we read."""
    try:
        wanted = torch.load(made.path, weights_only=False)
    except (AttributeError, ImportError, RuntimeError):
        one, other = (ckpt_surgeon.ls(path, all=True).objects for path in (made.path, out))
        assert [(entry.path, entry.kind, entry.value) for entry in one] == [
            (entry.path, entry.kind, entry.value) for entry in other
        ]
        return
    Same().check(wanted, torch.load(out, weights_only=False))


@pytest.mark.real
@pytest.mark.parametrize("path", REAL)
def test_every_real_file_comes_back_equal(path: Path, tmp_path: Path) -> None:
    if not path.is_file():
        pytest.skip(f"{path.name} is not there; fetch it: python fixtures/fetch_real.py")
    written_back(path, tmp_path / "out.pth")
    assert_same_file(path, tmp_path / "out.pth")


@pytest.mark.parametrize(
    ("name", "select"),
    [("ema.pth", "model"), ("legacy.pth", None), ("parallel.pth", None), ("positions.pth", None),
     ("training.ckpt", None), ("weight_norm.pth", None)],
)  # fmt: skip
def test_every_fixture_comes_back_equal(name: str, select: str | None, tmp_path: Path) -> None:
    written_back(FIXTURES / name, tmp_path / "out.pth", select)
    assert_same_file(FIXTURES / name, tmp_path / "out.pth")


def test_a_run_of_before_torch_1_6_is_edited_as_any_other(tmp_path: Path) -> None:
    model = nn.DataParallel(nn.Linear(3, 2))
    optimizer = torch.optim.Adam(model.parameters())
    model.module(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    run = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "best": math.inf}
    torch.save(run, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    ckpt_surgeon.save(ckpt_surgeon.strip_prefix(ckpt_surgeon.open_run(tmp_path / "old.pth")), tmp_path / "new.pth")
    file = torch.load(tmp_path / "new.pth", weights_only=True)
    assert list(file["model"]) == ["weight", "bias"]
    del run["model"], file["model"]
    Same().check(torch.load(tmp_path / "old.pth", weights_only=True)["optimizer"], file["optimizer"])
    assert (file["epoch"], file["best"]) == (3, math.inf)
