"""Training checkpoints: what people save beside the weights."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import functools
import pathlib
import random
import types
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tables import pickle_of, ramp, rewritten
from torch import nn

from unusual_files.registry import UnusualFile, save, tensors_of, unusual, weights
from unusual_files.vanished import vanishing


@dataclass(frozen=True)
class Beside:
    """Something beside the weights, and how it is listed."""

    make: Callable[[types.ModuleType], object]
    objects: Mapping[str, str]
    suspect: bool = False


def optimizer_state() -> object:
    parameter = nn.Parameter(ramp(3))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    return optimizer.state_dict()


BESIDE: dict[str, Beside] = {
    "Namespace": Beside(
        lambda _: argparse.Namespace(rate=0.5, inner=argparse.Namespace(name="small")),
        {"other": "argparse.Namespace", "other.rate": "float 0.5", "other.inner.name": "str 'small'"},
    ),
    "path": Beside(lambda _: pathlib.PurePosixPath("/data/run"), {"other": "pathlib.PurePosixPath str '/'"}),
    "datetime": Beside(lambda _: datetime.datetime(2020, 1, 2), {"other": "datetime.datetime bytes"}),
    "timedelta": Beside(lambda _: datetime.timedelta(3), {"other": "datetime.timedelta int 3, int 0, int 0"}),
    "enum": Beside(lambda m: m.Mode.TRAIN, {"other": "vanished.models.Mode str 'train'"}, True),
    "flags": Beside(lambda m: m.Flags.FAST, {"other": "vanished.models.Flags int 2"}, True),
    "dataclass": Beside(
        lambda m: m.Config(), {"other": "vanished.models.Config", "other.rate": "float 0.5"}, True
    ),
    "frozen dataclass with slots": Beside(
        lambda m: m.Frozen(), {"other": "vanished.models.Frozen", "other.state.0": "int 3"}, True
    ),
    "subclass of dict": Beside(
        lambda m: m.Dotted(a=1, b=m.Dotted(c="x")),
        {"other": "vanished.models.Dotted", "other.a": "int 1", "other.b.c": "str 'x'"},
        True,
    ),
    "namedtuple": Beside(lambda m: m.Pair(1, 2.5), {"other": "vanished.models.Pair int 1, float 2.5"}, True),
    "meter": Beside(lambda m: m.Meter(), {"other": "vanished.models.Meter", "other.count": "int 3"}, True),
    "partial": Beside(
        lambda _: functools.partial(nn.functional.relu, inplace=True),
        {"other": "functools.partial", "other.0": "", "other.state.2.inplace": "bool True"},
        True,
    ),
    "function": Beside(
        lambda _: nn.functional.relu, {"other": "class or function torch.nn.functional.relu"}, True
    ),
    "numpy scalar": Beside(lambda _: np.float64(0.5), {"other": "numpy.float64 0.5"}),
    "numpy integer": Beside(lambda _: np.int64(-3), {"other": "numpy.int64 -3"}),
    "numpy bool": Beside(lambda _: np.bool_(True), {"other": "numpy.bool True"}),
    "numpy complex": Beside(lambda _: np.complex64(1 + 2j), {"other": "numpy.complex64 (1+2j)"}),
    "numpy string": Beside(lambda _: np.str_("größe"), {"other": "numpy.str_ größe"}),
    "numpy array": Beside(lambda _: np.arange(6.0).reshape(2, 3), {"other": "numpy.ndarray float64 [2, 3]"}),
    "numpy array of objects": Beside(
        lambda _: np.array([1, "a", None], dtype=object), {"other": "numpy.ndarray", "other.1": "str 'a'"}
    ),
    "numpy records": Beside(lambda _: np.zeros(2, dtype=[("a", "i4")]), {"other": "numpy.ndarray"}),
    "scheduler": Beside(
        lambda _: torch.optim.lr_scheduler.StepLR(torch.optim.SGD([nn.Parameter(ramp(1))], lr=0.5), 3).state_dict(),
        {"other.step_size": "int 3"},
    ),
    "optimizer": Beside(lambda _: optimizer_state(), {"other.param_groups.0.lr": "float 0.001"}),
    "gradient scaler": Beside(
        lambda _: torch.amp.GradScaler("cpu").state_dict(), {"other.growth_interval": "int 2000"}
    ),
    "random states": Beside(
        lambda _: {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": np.random.get_state()},
        {"other.python.0": "int 3", "other.python.1": "tuple 625 (int"},
    ),
    "defaultdict": Beside(lambda _: collections.defaultdict(int, {"a": 1}), {"other.a": "int 1"}),
    "counter": Beside(lambda _: collections.Counter("aab"), {"other.a": "int 2", "other.b": "int 1"}),
    "deque": Beside(lambda _: collections.deque([1, 2], 3), {"other": "collections.deque", "other.1": "int 2"}),
    "decimal": Beside(lambda _: decimal.Decimal("1.5"), {"other": "decimal.Decimal str '1.5'"}),
    "uuid": Beside(lambda _: uuid.UUID(int=5), {"other": "uuid.UUID", "other.int": "int 5"}),
    "set": Beside(lambda _: {7}, {"other": "set 1 (int 7)"}),
    "frozenset": Beside(lambda _: frozenset(["a"]), {"other": "frozenset 1 (str 'a')"}),
    "complex": Beside(lambda _: 1 + 2j, {"other": "__builtin__.complex float 1, float 2"}),
    "bytes": Beside(lambda _: b"abc", {"other": "bytes b'abc'"}),
    "bytearray": Beside(lambda _: bytearray(b"abc"), {"other": "__builtin__.bytearray bytes b'abc'"}),
    "large number": Beside(lambda _: 1 << 5000, {"other": "int of 5,001 bits"}),
    "infinity": Beside(lambda _: float("inf"), {"other": "float inf"}),
    "none": Beside(lambda _: None, {"other": "None None"}),
    "dtype": Beside(lambda _: torch.float16, {"other": "class or function torch.float16"}),
    "device": Beside(lambda _: torch.device("cuda", 1), {"other": "torch.device str 'cuda', int 1"}),
    "size": Beside(lambda _: torch.Size([2, 3]), {"other.1": "int 3"}),
    "long text": Beside(lambda _: "x" * 500, {"other": "str 'xxxxxx"}),
    "class names": Beside(
        lambda _: [f"class {i}" for i in range(1000)], {"other": "list 1,000 (str 'class 0', str 'class 1'"}
    ),
    "names with control characters": Beside(lambda _: {"\x1b[31m": "\x1b[0m"}, {"other.\x1b[31m": "str '\\x1b[0m'"}),
}  # fmt: skip


def _training(folder: Path, *, name: str, protocol: int) -> UnusualFile:
    one = BESIDE[name]
    with vanishing() as models:
        value = {"epoch": 3, "state_dict": weights(), "other": one.make(models)}
        path = save(value, folder, protocol=protocol)
    objects = one.objects if protocol == 2 else {"epoch": "int 3"}  # later protocols call some things otherwise
    return UnusualFile(path, weights(), {"epoch": "int 3", **objects}, suspect=one.suspect)


for _name in BESIDE:
    unusual("training checkpoint", _name)(partial(_training, name=_name, protocol=2))
for _name in ("Namespace", "dataclass", "numpy scalar", "numpy array", "random states", "set", "frozenset", "bytes"):
    for _protocol in (4, 5):
        unusual("training checkpoint", f"{_name}, protocol {_protocol}")(
            partial(_training, name=_name, protocol=_protocol)
        )


def _old_numpy(folder: Path, *, name: str) -> UnusualFile:
    """A file as numpy before 2.0 made it reach it: its modules had other names."""
    new = _training(folder, name=name, protocol=2)
    renamed = pickle_of(new.path).replace(b"cnumpy._core.", b"cnumpy.core.")
    path = rewritten(new.path, folder / "old.pth", records={"data.pkl": renamed})
    torch.load(path, weights_only=False)  # the oracle agrees that this is how it was
    return UnusualFile(path, new.state, new.objects)


for _name in ("numpy scalar", "numpy array", "numpy array of objects", "random states"):
    unusual("training checkpoint", f"{_name} of old numpy")(partial(_old_numpy, name=_name))

LIGHTNING = """
import enum
class AttributeDict(dict):
    pass
class ModelCheckpoint:
    pass
class TrainerFn(str, enum.Enum):
    FITTING = "fit"
class Metric:
    def __init__(self):
        self._update_count, self._computed = 4, None
"""


@unusual("training checkpoint", "Lightning's")
def _lightning(folder: Path) -> UnusualFile:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with vanishing("lightning.pytorch.utilities", LIGHTNING) as lightning:
        hyper = lightning.AttributeDict(lr=0.5, arch="resnet")
        value = {
            "epoch": 1,
            "global_step": 20,
            "pytorch-lightning_version": "2.2.0",
            "state_dict": OrderedDict((f"model.{key}", tensor) for key, tensor in net.state_dict().items()),
            "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 2}}}},
            "callbacks": {"ModelCheckpoint{'monitor': 'val'}": {"best": torch.tensor(0.5), "dirpath": "/a"}},
            "optimizer_states": [optimizer_state()],
            "lr_schedulers": [{"last_epoch": 1}],
            "MixedPrecision": torch.amp.GradScaler("cpu").state_dict(),
            "hparams_name": "kwargs",
            "hyper_parameters": hyper,
            "stage": lightning.TrainerFn.FITTING,
            "metric": lightning.Metric(),
        }  # fmt: skip
        path = save(value, folder)
    objects = {
        "hyper_parameters": "lightning.pytorch.utilities.AttributeDict",
        "hyper_parameters.arch": "str 'resnet'",
        "callbacks.ModelCheckpoint{'monitor': 'val'}.dirpath": "str '/a'",
        "stage": "lightning.pytorch.utilities.TrainerFn str 'fit'",
        "metric._update_count": "int 4",
    }
    return UnusualFile(path, tensors_of(value["state_dict"]), objects, suspect=True)


OMEGACONF = """
class DictConfig:
    def __init__(self, content):
        self.__dict__["_metadata"] = ContainerMetadata()
        self.__dict__["_parent"] = None
        self.__dict__["_content"] = {key: AnyNode(self, value) for key, value in content.items()}
    def __getstate__(self):
        return self.__dict__
class AnyNode:
    def __init__(self, parent, value):
        self._parent, self._val = parent, value
class ContainerMetadata:
    pass
"""


@unusual("training checkpoint", "omegaconf's, whose nodes know their parents")
def _omegaconf(folder: Path) -> UnusualFile:
    with vanishing("omegaconf.dictconfig", OMEGACONF) as omegaconf:
        path = save({"model": weights(), "cfg": omegaconf.DictConfig({"lr": 0.5})}, folder)
    objects = {
        "cfg": "omegaconf.dictconfig.DictConfig",
        "cfg._content.lr": "omegaconf.dictconfig.AnyNode",
        "cfg._content.lr._val": "float 0.5",
    }
    return UnusualFile(path, weights(), objects, suspect=True)
