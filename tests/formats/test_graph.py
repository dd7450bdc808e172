"""A pickle that is recorded as a graph and written again builds the same: Python's own unpickler is the judge."""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import datetime
import decimal
import enum
import functools
import pathlib
import pickle
import random
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ckpt_surgeon.files.paths import file_path
from ckpt_surgeon.files.sinks import FileSink
from ckpt_surgeon.formats.pickle.graph import recorded
from ckpt_surgeon.formats.pickle.graph_writer import written
from ckpt_surgeon.formats.zip.whole import read_whole, write_whole


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Settings:
    lr: float = 0.1
    steps: list[int] = dataclasses.field(default_factory=list)


class Slotted:
    __slots__ = ("left", "right")


class Listed(list):  # type: ignore[type-arg]
    pass


class Mapped(dict):  # type: ignore[type-arg]
    pass


class Reduced:
    """An object that says itself how it is made, with a state setter of its own."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __reduce__(self) -> tuple[object, ...]:
        return Reduced, (self.value,), {"more": [self.value]}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)


def slotted() -> Slotted:
    made = Slotted()
    made.left, made.right = 1, [2]  # type: ignore[attr-defined]
    return made


def values() -> dict[str, object]:
    shared = [1, 2]
    recursive: list[object] = []
    recursive.append(recursive)
    return {
        "dict": {1: 2, "a": (1, 2, (3,)), (1, "b"): None, 2.5: True},
        "enum": Colour.RED,
        "dataclass": Settings(0.2, [3]),
        "slots": slotted(),
        "namespace": argparse.Namespace(lr=1.0, name=None),
        "simple namespace": types.SimpleNamespace(a=1),
        "defaultdict": collections.defaultdict(list, {"a": [1]}),
        "ordered": collections.OrderedDict([("b", 1), ("a", 2)]),
        "counter": collections.Counter("aab"),
        "deque": collections.deque([1, 2], maxlen=3),
        "array": np.arange(5),
        "array of objects": np.array(["a", None, 3], dtype=object),
        "numpy scalar": np.float64(3.5),
        "frozenset": frozenset([1, 2]),
        "set": {1, 2},
        "recursive": recursive,
        "shared": [shared, shared],
        "partial": functools.partial(int, base=2),
        "datetime": datetime.datetime(2020, 1, 1),
        "path": pathlib.PurePosixPath("/x"),
        "decimal": decimal.Decimal("1.5"),
        "large integers": [2**5000, -(2**63), 2**31, -(2**31), 65536, 255, 256],
        "bytes": b"abc",
        "bytearray": bytearray(b"xyz"),
        "floats": [1.5, float("inf"), -0.0],
        "list subclass": Listed([1, 2]),
        "dict subclass": Mapped(a=1),
        "text": "\ud800é\n",
        "range": range(3),
        "complex": complex(1, 2),
        "random": random.Random(3).getstate(),
        "ellipsis": Ellipsis,
        "reduced": Reduced(3),
        "class": Settings,
    }


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_kind_of_object_is_built_as_before(protocol: int) -> None:
    for name, value in values().items():
        if name == "slots" and protocol < 2:
            continue  # Python cannot pickle it so
        raw = pickle.dumps(value, protocol=protocol)
        again = pickle.loads(written(recorded(raw)))
        assert pickle.dumps(again, protocol=4) == pickle.dumps(pickle.loads(raw), protocol=4), name
        assert type(again) is type(value), name


@pytest.mark.parametrize("protocol", [2, 4])
def test_what_is_shared_stays_shared(protocol: int) -> None:
    inner: dict[str, object] = {"x": [1]}
    root = {"a": inner, "b": [inner, (inner,)], "t": (1, [2])}
    root["again"] = root["t"]
    again = pickle.loads(written(recorded(pickle.dumps(root, protocol=protocol))))
    assert again["a"] is again["b"][0] is again["b"][1][0]
    assert again["t"] is again["again"]


def test_a_tuple_that_holds_itself_is_written() -> None:
    holder: list[object] = []
    looped = (holder, 1)
    holder.append(looped)
    again = pickle.loads(written(recorded(pickle.dumps(looped, protocol=2))))
    assert again[0][0] is again


def test_nesting_deeper_than_the_stack_of_python_is_written() -> None:
    raw = b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b"."
    node, depth = pickle.loads(written(recorded(raw))), 1
    while node:
        (node,) = node
        depth += 1
    assert depth == 5000


def test_buffers_of_python_2_stay_what_they_are() -> None:
    raw = b"\x80\x02}U\x03abcU\x02\xff\xfes."
    again = written(recorded(raw))
    assert pickle.loads(again, encoding="bytes") == {b"abc": b"\xff\xfe"}


def test_names_of_the_registry_of_extensions_are_refused() -> None:
    with pytest.raises(ValueError, match="registry of extensions"):
        recorded(b"\x80\x02\x82\x01.")


# -- whole files


def rewritten(source: Path, out: Path) -> Path:
    whole = read_whole(file_path(source))
    with open(out, "wb") as file, FileSink(file.fileno(), lambda done: None) as sink:
        write_whole(sink, whole, {})
    return out


def assert_equal(one: object, other: object, path: str = "") -> None:
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        assert (one.dtype, one.shape, one.requires_grad) == (other.dtype, other.shape, other.requires_grad), path
        if one.layout == torch.strided:
            assert one.stride() == other.stride(), path
            assert one.untyped_storage().tolist() == other.untyped_storage().tolist(), path
        else:
            assert_equal(one.to_dense(), other.to_dense(), path)
    elif isinstance(one, dict) and isinstance(other, dict):
        assert list(one) == list(other), path
        assert getattr(one, "_metadata", None) == getattr(other, "_metadata", None), path
        for key in one:
            assert_equal(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        assert len(one) == len(other), path
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_equal(left, right, f"{path}.{index}")
    elif isinstance(one, nn.Module) and isinstance(other, nn.Module):
        assert_equal(one.state_dict(), other.state_dict(), path)
    else:
        assert pickle.dumps(one) == pickle.dumps(other), path


def test_a_whole_training_file_comes_back_equal(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    shared = torch.arange(12.0).view(3, 4)
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "args": argparse.Namespace(lr=1, name="run"),
            "rng": torch.get_rng_state(),
            "numpy": np.random.RandomState(0).get_state(),
            "module": copy.deepcopy(model),
            "parameter": nn.Parameter(torch.ones(2)),
            "sparse": torch.eye(3).to_sparse(),
            "float8": torch.ones(3).to(torch.float8_e4m3fn),
            "views": [shared.t(), shared[1], shared],
            "complex": torch.ones(2, dtype=torch.complex64).conj(),
            "empty": torch.empty(0, 3),
        },
        tmp_path / "in.pt",
    )
    out = rewritten(tmp_path / "in.pt", tmp_path / "out.pt")
    before, after = (torch.load(path, weights_only=False) for path in (tmp_path / "in.pt", out))
    assert_equal(before, after)
    views = after["views"]
    assert views[0].data_ptr() == views[2].data_ptr()
    assert views[1].untyped_storage().data_ptr() == views[2].untyped_storage().data_ptr()


def test_what_loads_with_weights_only_still_does(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.named_parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "in.pt")
    out = rewritten(tmp_path / "in.pt", tmp_path / "out.pt")
    assert_equal(torch.load(tmp_path / "in.pt", weights_only=True), torch.load(out, weights_only=True))
