"""Valid files that are odd, family by family: each with the state_dict that torch, numpy or the module itself gives.

Classes that the files name are made in modules that exist while the file is written and while the oracle reads it,
and are gone when ``ckpt`` does.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import functools
import io
import linecache
import pathlib
import pickle
import random
import struct
import sys
import tarfile
import types
import uuid
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import torch
from tables import StateDict, elements, noise, pickle_of, ramp, rewritten, save_big_endian, save_legacy, save_zip
from torch import nn

Numbers = Mapping[str, "np.ndarray[tuple[int, ...], np.dtype[np.generic]]"]


@dataclass(frozen=True)
class Odd:
    """A file, what it holds by the oracle, and what ``ls --all`` and ``scan`` should say of it."""

    path: Path
    state: Mapping[str, torch.Tensor]
    objects: Mapping[str, str] = field(default_factory=dict)  # path in the file -> class and value
    suspect: bool = False  # whether it names what is not plainly data
    select: str | None = None
    strides: bool = True
    ties: bool = True


Build = Callable[[Path], Odd]
ODDITIES: dict[tuple[str, str], Build] = {}


def odd(family: str, name: str) -> Callable[[Build], Build]:
    def register(make: Build) -> Build:
        assert (family, name) not in ODDITIES
        ODDITIES[family, name] = make
        return make

    return register


def build(family: str, name: str, folder: Path) -> Odd:
    """Make one file and ask its oracle."""
    with warnings.catch_warnings(action="ignore"):  # of torch and numpy, that such files are things of the past
        return ODDITIES[family, name](folder)


# -- classes that are not there when the file is read


VANISHED = """
import collections, dataclasses, enum
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.arange(2.0))
        self.register_parameter("nothing", None)
        self.register_buffer("kept", torch.ones(3))
        self.register_buffer("passing", torch.ones(2), persistent=False)
        self.register_buffer("no_buffer", None)
        self.conv = nn.Conv1d(2, 2, 1)
        self.norm = nn.BatchNorm1d(2)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.named = nn.ModuleDict({"b": nn.Linear(1, 1), "a": nn.Linear(1, 1, bias=False)})
        self.head = nn.Linear(2, 2)
        self.head.weight = self.blocks[0].fc.weight
        self.again = self.conv
        self.register_module("no_module", None)
        self.width = 7
        self.config = Config()

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.list = nn.ParameterList([nn.Parameter(torch.full((1,), float(i))) for i in range(12)])
        self.dict = nn.ParameterDict({"z": nn.Parameter(torch.ones(1)), "a": nn.Parameter(torch.ones(2))})

class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2)
    def get_extra_state(self):
        return {"seen": 3}
    def set_extra_state(self, state):
        pass

@dataclasses.dataclass
class Config:
    rate: float = 0.5
    name: str = "small"

@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    depth: int = 3

class Mode(enum.Enum):
    TRAIN = "train"

class Flags(enum.IntFlag):
    FAST = 2

class Dotted(dict):
    __getattr__ = dict.__getitem__

class Meter:
    def __init__(self):
        self.val, self.count = 1.5, 3

class Trainer:
    def __init__(self, model):
        self.model, self.step = model, 5

Pair = collections.namedtuple("Pair", "a b")
"""


@contextmanager
def vanishing(name: str = "vanished.models", source: str = VANISHED) -> Iterator[types.ModuleType]:
    """A module of this name for as long as the block runs."""
    names = [name[:end] for end, char in enumerate(name + ".") if char == "."]
    made = [types.ModuleType(one) for one in names]
    sys.modules.update(zip(names, made, strict=True))
    try:
        made[-1].__file__ = f"<{name}>"
        linecache.cache[f"<{name}>"] = (len(source), None, source.splitlines(keepends=True), f"<{name}>")
        exec(compile(source, f"<{name}>", "exec"), made[-1].__dict__)
        yield made[-1]
    finally:
        for one in names:
            del sys.modules[one]


def tensors_of(state: Mapping[str, object]) -> StateDict:
    """The tensors of a state_dict, which may hold extra state too."""
    return {key: value.detach() for key, value in state.items() if isinstance(value, torch.Tensor)}


def save(value: object, folder: Path, *, protocol: int = 2, legacy: bool = False) -> Path:
    path = folder / "odd.pth"
    torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    return path


# -- whole modules


def _vanished_net(folder: Path, *, protocol: int, legacy: bool) -> Odd:
    with vanishing() as models:
        torch.manual_seed(0)
        net: nn.Module = models.Net()
        path = save(net, folder, protocol=protocol, legacy=legacy)
        state = tensors_of(torch.load(path, weights_only=False).state_dict())
    objects = {
        ".": "vanished.models.Net width=7",
        "conv": "torch.nn.modules.conv.Conv1d",
        "blocks.1.fc": "torch.nn.modules.linear.Linear in_features=2, out_features=2",
        "config": "vanished.models.Config",
        "config.name": "str 'small'",
    }
    return Odd(path, state, objects, suspect=True)


for _protocol in (2, 3, 4, 5):
    odd("whole module", f"vanished class, zip, protocol {_protocol}")(
        partial(_vanished_net, protocol=_protocol, legacy=False)
    )
for _protocol in (1, 2, 3, 4, 5):
    odd("whole module", f"vanished class, legacy, protocol {_protocol}")(
        partial(_vanished_net, protocol=_protocol, legacy=True)
    )


@odd("whole module", "vanished class in DataParallel")
def _parallel(folder: Path) -> Odd:
    with vanishing() as models:
        net = nn.DataParallel(models.Net())
        path = save(net, folder)
        state = tensors_of(net.state_dict())
    return Odd(path, state, {".": "torch.nn.parallel.data_parallel.DataParallel", "module": "vanished"}, suspect=True)


@odd("whole module", "extra state")
def _extra_state(folder: Path) -> Odd:
    with vanishing() as models:
        net = models.Stateful()
        path = save({"state_dict": net.state_dict(), "net": None}, folder)
        state = tensors_of(net.state_dict())
    return Odd(path, state, {"state_dict._extra_state.seen": "int 3"})


@odd("whole module", "beside its optimizer")
def _with_optimizer(folder: Path) -> Odd:
    with vanishing() as models:
        net = models.Block()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.5)
        net.fc(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        path = save({"epoch": 3, "model": net, "optimizer": optimizer, "state": optimizer.state_dict()}, folder)
        state = tensors_of(net.state_dict())
    return Odd(path, state, {"epoch": "int 3", "optimizer": "torch.optim.sgd.SGD"}, suspect=True)


@odd("whole module", "attribute of an object")
def _in_object(folder: Path) -> Odd:
    with vanishing() as models:
        net = models.Net()
        path = save(models.Trainer(net), folder)
        state = tensors_of(net.state_dict())
    return Odd(path, state, {".": "vanished.models.Trainer", "step": "int 5", "model": "vanished"}, suspect=True)


@odd("whole module", "model and EMA, one selected")
def _two_modules(folder: Path) -> Odd:
    with vanishing() as models:
        net, ema = models.Block(), models.Block()
        path = save({"model": net, "ema": ema}, folder)
        state = tensors_of(ema.state_dict())
    return Odd(path, state, {"ema.fc": "torch.nn.modules.linear.Linear"}, suspect=True, select="ema")


@odd("whole module", "module with hooks and functions")
def _hooked(folder: Path) -> Odd:
    net = nn.Sequential(nn.Linear(2, 2))
    net._forward_hooks[0] = torch.nn.functional.relu
    net.activation = torch.nn.functional.gelu  # type: ignore[assignment]
    objects = {"_forward_hooks.0": "class or function torch.nn.functional.relu"}
    return Odd(save(net, folder), tensors_of(net.state_dict()), objects, suspect=True)


@odd("whole module", "uninitialized parameters")
def _lazy(folder: Path) -> Odd:
    net = nn.Sequential(nn.LazyLinear(3), nn.Linear(2, 2))
    state = tensors_of(net[1].state_dict(prefix="1."))
    objects = {"0.weight": "torch.nn.parameter.UninitializedParameter"}
    return Odd(save(net, folder), state, objects, suspect=True)


@odd("whole module", "within itself")
def _cyclic(folder: Path) -> Odd:
    net = nn.Sequential(nn.Linear(2, 2))
    state = tensors_of(net.state_dict())
    net._modules["loop"] = net
    return Odd(save(net, folder), state, suspect=True)


@odd("whole module", "plain pickle")
def _pickled_module(folder: Path) -> Odd:
    path = folder / "net.pkl"
    with vanishing() as models:
        net = models.Net()
        path.write_bytes(pickle.dumps(net))
        state = tensors_of(pickle.loads(path.read_bytes()).state_dict())
    return Odd(path, state, {".": "vanished.models.Net"}, suspect=True)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: nn.LSTM(2, 3, 2, bidirectional=True),
    "GRU": lambda: nn.GRU(2, 3),
    "attention": lambda: nn.MultiheadAttention(4, 2),
    "transformer": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8), 2, enable_nested_tensor=False),
    "embedding": lambda: nn.Embedding(5, 2, padding_idx=0),
    "old weight norm": lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(2, 3))),
    "old spectral norm": lambda: nn.utils.spectral_norm(nn.Conv2d(1, 2, 3)),
    "norm without weights": lambda: nn.BatchNorm2d(3, affine=False),
    "norm without anything": lambda: nn.Sequential(nn.InstanceNorm2d(3), nn.Linear(1, 1)),
    "half precision": lambda: nn.Linear(2, 2).half(),
    "channels last": lambda: nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last),
}


def _kind(folder: Path, *, name: str) -> Odd:
    torch.manual_seed(0)
    net = KINDS[name]()
    return Odd(save(net, folder), tensors_of(net.state_dict()), suspect=True)


for _name in KINDS:
    odd("whole module", _name)(partial(_kind, name=_name))


# -- training checkpoints


def _weights() -> StateDict:
    return {"fc.weight": ramp(3, 4), "fc.bias": ramp(3)}


def _beside(folder: Path, value: object, *, protocol: int = 2) -> Odd:
    return Odd(save({"state_dict": _weights(), "other": value}, folder, protocol=protocol), _weights())


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
    "counter": Beside(lambda _: collections.Counter("aab"), {"other": "collections.Counter", "other.0.a": "int 2"}),
    "deque": Beside(lambda _: collections.deque([1, 2], 3), {"other": "collections.deque", "other.1": "int 2"}),
    "decimal": Beside(lambda _: decimal.Decimal("1.5"), {"other": "decimal.Decimal str '1.5'"}),
    "uuid": Beside(lambda _: uuid.UUID(int=5), {"other": "uuid.UUID", "other.int": "int 5"}),
    "set": Beside(lambda _: {7}, {"other": "set 1 (int 7)"}),
    "frozenset": Beside(lambda _: frozenset(["a"]), {"other": "set 1 (str 'a')"}),
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


def _training(folder: Path, *, name: str, protocol: int) -> Odd:
    one = BESIDE[name]
    with vanishing() as models:
        value = {"epoch": 3, "state_dict": _weights(), "other": one.make(models)}
        path = save(value, folder, protocol=protocol)
    objects = one.objects if protocol == 2 else {"epoch": "int 3"}  # later protocols call some things otherwise
    return Odd(path, _weights(), {"epoch": "int 3", **objects}, suspect=one.suspect)


for _name in BESIDE:
    odd("training checkpoint", _name)(partial(_training, name=_name, protocol=2))
for _name in ("Namespace", "dataclass", "numpy scalar", "numpy array", "random states", "set", "frozenset", "bytes"):
    for _protocol in (4, 5):
        odd("training checkpoint", f"{_name}, protocol {_protocol}")(partial(_training, name=_name, protocol=_protocol))


def _old_numpy(folder: Path, *, name: str) -> Odd:
    """A file as numpy before 2.0 made it reach it: its modules had other names."""
    new = _training(folder, name=name, protocol=2)
    renamed = pickle_of(new.path).replace(b"cnumpy._core.", b"cnumpy.core.")
    path = rewritten(new.path, folder / "old.pth", records={"data.pkl": renamed})
    torch.load(path, weights_only=False)  # the oracle agrees that this is how it was
    return Odd(path, new.state, new.objects)


for _name in ("numpy scalar", "numpy array", "numpy array of objects", "random states"):
    odd("training checkpoint", f"{_name} of old numpy")(partial(_old_numpy, name=_name))

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


@odd("training checkpoint", "Lightning's")
def _lightning(folder: Path) -> Odd:
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
    return Odd(path, tensors_of(value["state_dict"]), objects, suspect=True)


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


@odd("training checkpoint", "omegaconf's, whose nodes know their parents")
def _omegaconf(folder: Path) -> Odd:
    with vanishing("omegaconf.dictconfig", OMEGACONF) as omegaconf:
        path = save({"model": _weights(), "cfg": omegaconf.DictConfig({"lr": 0.5})}, folder)
    objects = {
        "cfg": "omegaconf.dictconfig.DictConfig",
        "cfg._content.lr": "omegaconf.dictconfig.AnyNode",
        "cfg._content.lr._val": "float 0.5",
    }
    return Odd(path, _weights(), objects, suspect=True)


# -- TorchScript, torch.package, torch.export


class Scriptable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(ramp(2))
        self.register_parameter("nothing", None)
        self.conv = nn.Conv1d(1, 2, 1)
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("passing", ramp(2) + 1, persistent=False)
        self.register_buffer("kept", ramp(3))
        self.seq = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2, bias=False))
        self.embed, self.head = nn.Linear(2, 2), nn.Linear(2, 2)
        self.head.weight = self.embed.weight
        self.width = 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.embed(self.seq(self.norm(self.conv(x)).mean(-1)))) * self.scale
        return found


def _scripted(folder: Path, *, traced: bool, deflated: bool = False) -> Odd:
    path = folder / "scripted.pt"
    net = Scriptable().eval()
    (torch.jit.trace(net, torch.ones(1, 1, 4)) if traced else torch.jit.script(net)).save(path)
    state = tensors_of(torch.jit.load(path).state_dict())
    if deflated:
        path = rewritten(path, folder / "deflated.pt", method=zipfile.ZIP_DEFLATED)
    return Odd(path, state, suspect=True)


odd("TorchScript", "script")(partial(_scripted, traced=False))
odd("TorchScript", "trace")(partial(_scripted, traced=True))
odd("TorchScript", "script, members packed")(partial(_scripted, traced=False, deflated=True))


@odd("TorchScript", "for phones")
def _lite(folder: Path) -> Odd:
    path = folder / "lite.ptl"
    scripted = torch.jit.script(Scriptable().eval())
    scripted._save_for_lite_interpreter(str(path))
    return Odd(path, tensors_of(scripted.state_dict()), suspect=True)


SILERO = Path(__file__).parents[2] / "real/silero-vad/silero_vad/data/silero_vad.jit"


def _package(folder: Path, *, deflated: bool) -> Odd:
    from torch.package.package_exporter import PackageExporter
    from torch.package.package_importer import PackageImporter

    path = folder / "package.pt"
    with PackageExporter(path) as exporter:
        exporter.extern("torch.**")
        exporter.save_pickle("nets", "model.pkl", {"state_dict": Scriptable().state_dict(), "epoch": 3})
        exporter.save_text("notes", "read.me", "text")
    state = PackageImporter(path).load_pickle("nets", "model.pkl")["state_dict"]
    if deflated:
        path = rewritten(path, folder / "deflated.pt", method=zipfile.ZIP_DEFLATED)
    return Odd(path, state, {"nets.model.epoch": "int 3"})


odd("torch.package", "state_dict")(partial(_package, deflated=False))
odd("torch.package", "members packed")(partial(_package, deflated=True))


class Exportable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.register_buffer("kept", ramp(2))
        self.register_buffer("passing", ramp(2), persistent=False)
        self.head = nn.Linear(2, 2)
        self.head.weight = self.fc.weight
        self.brief = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.fc(x) + self.get_buffer("kept")) * self.brief
        return found


@odd("torch.export", "pt2")
def _exported(folder: Path) -> Odd:
    path = folder / "model.pt2"
    torch.export.save(torch.export.export(Exportable(), (torch.ones(1, 2),)), path)
    state = torch.export.load(path).state_dict
    return Odd(path, tensors_of(state))


# -- torch 0.1


class TarOf01:
    """Writes the tar of torch 0.1: storages, tensors, and the object with keys in place of tensors."""

    def __init__(self) -> None:
        self.storages: dict[int, tuple[str, torch.Tensor]] = {}
        self.views: list[tuple[int, int, int, int]] = []
        self.tensors: dict[int, tuple[int, str, tuple[int, ...], tuple[int, ...], int]] = {}

    def members(self, value: object) -> dict[str, bytes]:
        out = {"sys_info": pickle.dumps({"protocol_version": 1000, "little_endian": True, "type_sizes": {}}, 2)}
        raw = pickle.dumps(len(self.storages), 2)
        for key, (cls, tensor) in self.storages.items():
            raw += _triple(key, "cpu", cls) + struct.pack("<q", tensor.numel()) + elements(tensor)
        out["storages"] = raw + pickle.dumps(self.views, 2)
        raw = pickle.dumps(len(self.tensors), 2)
        for key, (storage, cls, size, stride, offset) in self.tensors.items():
            raw += _triple(key, storage, cls) + struct.pack("<ii", len(size), 0)
            raw += struct.pack(f"<{2 * len(size) + 1}q", *size, *stride, offset)
        out["tensors"] = raw
        file = io.BytesIO()
        _KeyPickler(file, 2).dump(value)
        out["pickle"] = file.getvalue()
        return out

    def write(self, path: Path, value: object, *, form: int = tarfile.PAX_FORMAT) -> Path:
        with tarfile.open(path, "w:", format=form) as archive:
            for name, raw in self.members(value).items():
                info = tarfile.TarInfo(name)
                info.size = len(raw)
                archive.addfile(info, io.BytesIO(raw))
        return path


class TensorKey(int):
    """Stands for a tensor in the object."""


class _KeyPickler(pickle.Pickler):
    def persistent_id(self, value: object) -> object:
        return str(int(value)) if isinstance(value, TensorKey) else None


def _triple(key: int, second: object, cls: str) -> bytes:
    return pickle.dumps((key, second, getattr(torch, cls)), 2)


def _tar(folder: Path, *, form: int) -> Odd:
    tar = TarOf01()
    tar.storages = {
        101: ("FloatStorage", ramp(12)),
        202: ("LongStorage", torch.arange(4)),
        303: ("HalfStorage", ramp(3).half()),
    }
    tar.views = [(404, 101, 4, 6)]
    tar.tensors = {
        1: (101, "FloatTensor", (3, 4), (4, 1), 0),
        2: (101, "FloatTensor", (4, 3), (1, 4), 0),
        3: (202, "LongTensor", (3,), (1,), 1),
        4: (404, "FloatTensor", (2, 2), (2, 1), 1),
        5: (303, "HalfTensor", (3,), (1,), 0),
    }  # fmt: skip
    value = OrderedDict([("a.weight", TensorKey(1)), ("a.weight_t", TensorKey(2)), ("steps", TensorKey(3)),
                         ("view", TensorKey(4)), ("half", TensorKey(5))])  # fmt: skip
    path = tar.write(folder / "old.pth", value, form=form)
    state = torch.load(path, weights_only=False)
    return Odd(path, state, ties=False)  # torch gives views of storages storages of their own


odd("torch 0.1", "tar")(partial(_tar, form=tarfile.PAX_FORMAT))
odd("torch 0.1", "tar of GNU's kind")(partial(_tar, form=tarfile.GNU_FORMAT))


# -- plain pickles


def _arrays() -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
    return {
        "conv.weight": np.arange(12, dtype="f4").reshape(3, 4),
        "fortran": np.asfortranarray(np.arange(6, dtype="f8").reshape(2, 3)),
        "large": np.arange(3000, dtype="i4").reshape(3, 1000),
        "half": np.arange(3, dtype="f2"),
        "mask": np.array([True, False]),
        "bytes": np.arange(5, dtype="u1"),
        "complex": np.array([1 + 2j]),
        "scalar": np.array(3.5),
        "empty": np.zeros((0, 2), dtype="f4"),
    }


def from_numpy(arrays: Numbers) -> StateDict:
    """What torch makes of numpy arrays, in this machine's byte order."""
    return {
        key: torch.from_numpy(np.array(array.astype(array.dtype.newbyteorder("="))).reshape(array.shape))
        for key, array in arrays.items()
    }


def _pickled_arrays(folder: Path, *, protocol: int) -> Odd:
    path = folder / "arrays.pkl"
    path.write_bytes(pickle.dumps({**_arrays(), "epoch": 3}, protocol))
    loaded = pickle.loads(path.read_bytes())
    del loaded["epoch"]
    return Odd(path, from_numpy(loaded), {"epoch": "int 3"}, strides=False)


def _pickled_tensors(folder: Path, *, protocol: int) -> Odd:
    path = folder / "tensors.pkl"
    state = OrderedDict(**_weights(), large=ramp(2000), t=ramp(3, 4).t(), parameter=nn.Parameter(ramp(2)))
    path.write_bytes(pickle.dumps({"model": state, "args": argparse.Namespace(lr=0.5)}, protocol))
    loaded = pickle.loads(path.read_bytes())["model"]
    return Odd(path, tensors_of(loaded), {"args": "argparse.Namespace", "args.lr": "float 0.5"})


for _protocol in range(6):
    odd("pickle", f"arrays, protocol {_protocol}")(partial(_pickled_arrays, protocol=_protocol))
    odd("pickle", f"tensors, protocol {_protocol}")(partial(_pickled_tensors, protocol=_protocol))


@odd("pickle", "arrays of a big-endian machine")
def _big_arrays(folder: Path) -> Odd:
    arrays = {key: array.astype(array.dtype.newbyteorder(">")) for key, array in _arrays().items()}
    path = folder / "big.pkl"
    path.write_bytes(pickle.dumps(arrays))
    return Odd(path, from_numpy(pickle.loads(path.read_bytes())), strides=False)


@odd("pickle", "a list of arrays")
def _array_list(folder: Path) -> Odd:
    path = folder / "list.pkl"
    path.write_bytes(pickle.dumps([np.arange(3.0), np.arange(4.0)]))
    return Odd(path, {"0": torch.arange(3.0).double(), "1": torch.arange(4.0).double()})


@odd("pickle", "a tuple of arrays in a dict")
def _array_tuple(folder: Path) -> Odd:
    path = folder / "tuple.pkl"
    path.write_bytes(pickle.dumps({"params": (np.arange(3.0), np.arange(4.0))}))
    return Odd(path, {"0": torch.arange(3.0).double(), "1": torch.arange(4.0).double()}, select="params")


@odd("pickle", "one array")
def _one_array(folder: Path) -> Odd:
    path = folder / "one.pkl"
    path.write_bytes(pickle.dumps(np.arange(6.0).reshape(2, 3), 0))
    return Odd(path, {"tensor": torch.arange(6.0).double().reshape(2, 3)})


@odd("pickle", "one tensor")
def _one_tensor(folder: Path) -> Odd:
    path = folder / "one.pkl"
    path.write_bytes(pickle.dumps(ramp(2, 3)))
    return Odd(path, {"tensor": ramp(2, 3)})


@odd("pickle", "nested, as detectron2's")
def _nested_arrays(folder: Path) -> Odd:
    path = folder / "nested.pkl"
    arrays = {"backbone.conv1.weight": np.ones((2, 3), "f4"), "roi_heads.fc.bias": np.zeros(2, "f4")}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
    return Odd(path, from_numpy(arrays), {"__author__": "str 'Detectron2 Model Zoo'"})


# -- what Python 2 wrote; its own opcodes, by hand


def python2_array(data: bytes, shape: tuple[int, ...], code: str, protocol: int) -> bytes:
    """numpy.ndarray as Python 2 pickled it: the elements are a str."""
    word = _python2_word_0 if protocol == 0 else _python2_word
    head = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\nt" + word(b"b") + b"tR"
    dtype = b"cnumpy\ndtype\n(" + word(code.encode()) + b"I0\nI1\ntR(I3\n" + word(b"<") + b"NNNI-1\nI-1\nI0\ntb"
    sizes = b"".join(f"I{size}\n".encode() for size in shape)
    return head + b"(I1\n(" + sizes + b"t" + dtype + b"I00\n" + word(data) + b"tb"


def _python2_word(raw: bytes) -> bytes:
    return (b"U" + bytes((len(raw),)) if len(raw) < 256 else b"T" + struct.pack("<i", len(raw))) + raw


def _python2_word_0(raw: bytes) -> bytes:
    return b"S" + repr(raw)[1:].encode() + b"\n"


def _python2(folder: Path, *, protocol: int) -> Odd:
    arrays = {
        b"conv1_w": np.arange(6, dtype="f4").reshape(2, 3),
        b"ascii": np.frombuffer(b"ABCDEFGH", dtype="f4"),
        b"large": np.arange(2000, dtype="f8"),
        "größe".encode(): np.arange(2, dtype="i8"),
    }
    word = _python2_word_0 if protocol == 0 else _python2_word
    raw = (b"\x80\x02" if protocol == 2 else b"") + b"(dp0\n" + word(b"epoch") + b"I3\ns"
    for name, array in arrays.items():
        raw += word(name) + python2_array(array.tobytes(), array.shape, array.dtype.str[1:], protocol) + b"s"
    path = folder / "python2.pkl"
    path.write_bytes(raw + b".")
    oracle = pickle.loads(path.read_bytes(), encoding="latin1")
    del oracle["epoch"]
    state = {key.encode("latin1").decode(): torch.from_numpy(np.array(array)) for key, array in oracle.items()}
    return Odd(path, state, {"epoch": "int 3"})


for _protocol in (0, 1, 2):
    odd("Python 2", f"arrays, protocol {_protocol}")(partial(_python2, protocol=_protocol))


@odd("Python 2", "old-style class")
def _old_style(folder: Path) -> Odd:
    array = python2_array(np.ones(2, "f4").tobytes(), (2,), "f4", 0)
    path = folder / "instance.pkl"
    path.write_bytes(b"(iold.models\nNet\n(dS'rate'\nF0.5\nsS'w'\n(dS'fc'\n" + array + b"ssb.")
    return Odd(path, {"fc": torch.ones(2)}, {".": "old.models.Net", "rate": "float 0.5"}, suspect=True)


@odd("Python 2", "legacy torch file")
def _python2_torch(folder: Path) -> Odd:
    """torch 0.4 under Python 2: words are byte strings."""
    word = _python2_word
    raw = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    raw += b"\x80\x02}(" + word(b"little_endian") + b"\x88" + word(b"protocol_version") + b"M\xe9\x03u."
    saved = b"(" + word(b"storage") + b"ctorch\nFloatStorage\n" + word(b"94") + word(b"cpu") + b"K\x06NtQ"
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + saved
        + b"K\x00K\x02K\x03\x86K\x03K\x01\x86\x89ccollections\nOrderedDict\n]\x85RtR"
    )
    raw += b"\x80\x02ccollections\nOrderedDict\n](](" + word(b"fc.weight") + tensor + b"ee\x85R."
    raw += b"\x80\x02](" + word(b"94") + b"e." + struct.pack("<q", 6) + ramp(6).numpy().tobytes()
    path = folder / "python2.pth"
    path.write_bytes(raw)
    state = torch.load(path, weights_only=False, encoding="latin1")
    return Odd(path, state)


# -- zips that other tools made


def _zip(folder: Path, change: Callable[[zipfile.ZipFile, zipfile.ZipFile], None]) -> Odd:
    source, path = save_zip(_weights(), folder), folder / "other.pth"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        change(old, new)
    return Odd(path, torch.load(source))


@odd("zip", "members packed")
def _packed(folder: Path) -> Odd:
    state = {**_weights(), "large": ramp(1000, 300), "t": ramp(30, 40).t()}
    path = rewritten(save_zip(state, folder), folder / "packed.pth", method=zipfile.ZIP_DEFLATED)
    return Odd(path, state)


@odd("zip", "other members and a comment")
def _extra_members(folder: Path) -> Odd:
    def change(old: zipfile.ZipFile, new: zipfile.ZipFile) -> None:
        for info in old.infolist():
            new.writestr(info, old.read(info))
        new.writestr("archive/notes.txt", "hello")
        new.writestr("__MACOSX/._data.pkl", b"\0\5\x16\7")
        new.writestr("empty/", b"")
        new.comment = b"made by hand, PK or not"

    return _zip(folder, change)


@odd("zip", "folder of another name")
def _renamed_folder(folder: Path) -> Odd:
    def change(old: zipfile.ZipFile, new: zipfile.ZipFile) -> None:
        for info in old.infolist():
            new.writestr("größe v1.0/" + info.filename.partition("/")[2], old.read(info))

    return _zip(folder, change)


@odd("zip", "no folder")
def _no_folder(folder: Path) -> Odd:
    def change(old: zipfile.ZipFile, new: zipfile.ZipFile) -> None:
        for info in old.infolist():
            new.writestr(info.filename.partition("/")[2], old.read(info))

    return _zip(folder, change)


@odd("zip", "a second archive inside")
def _second_inside(folder: Path) -> Odd:
    def change(old: zipfile.ZipFile, new: zipfile.ZipFile) -> None:
        for info in old.infolist():
            new.writestr(info, old.read(info))
        new.writestr("a/data.pkl", pickle.dumps({"decoy": 1}, 2))

    return _zip(folder, change)


@odd("zip", "members in another order")
def _reversed(folder: Path) -> Odd:
    def change(old: zipfile.ZipFile, new: zipfile.ZipFile) -> None:
        for info in reversed(old.infolist()):
            new.writestr(info, old.read(info))

    return _zip(folder, change)


@odd("zip", "members without sizes before them")
def _streamed(folder: Path) -> Odd:
    class Stream(io.RawIOBase):
        """Cannot seek, so that zipfile writes data descriptors."""

        def __init__(self) -> None:
            self.raw = bytearray()

        def writable(self) -> bool:
            return True

        def write(self, raw: object) -> int:
            self.raw += bytes(raw)  # type: ignore[call-overload]
            return len(bytes(raw))  # type: ignore[call-overload]

    source, path, stream = save_zip(_weights(), folder), folder / "streamed.pth", Stream()
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(stream, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    path.write_bytes(stream.raw)
    return Odd(path, torch.load(source))


@odd("big-endian", "zip")
def _big_zip(folder: Path) -> Odd:
    state = {
        "a": ramp(3, 4),
        "half": ramp(5).half(),
        "c": noise("complex64", 3),
        "i": torch.arange(4),
        "b": noise("uint8", 3),
    }
    path = save_big_endian(state, folder)
    return Odd(path, torch.load(path))


@odd("big-endian", "zip, members packed")
def _big_packed(folder: Path) -> Odd:
    path = rewritten(save_big_endian(_weights(), folder), folder / "packed.pth", method=zipfile.ZIP_DEFLATED)
    return Odd(path, _weights())


@odd("big-endian", "legacy")
def _big_legacy(folder: Path) -> Odd:
    path = save_legacy(_weights(), folder)
    raw = path.read_bytes()
    flag = raw.index(b"\x88", raw.index(b"little_endian"))
    path.write_bytes(raw[:flag] + b"\x89" + raw[flag + 1 :])
    return Odd(path, torch.load(path))


# -- structures and keys


def _structure(folder: Path, *, value: object, state: StateDict, select: str | None = None) -> Odd:
    return Odd(save(value, folder), state, select=select)


_LOOP: dict[str, object] = {"weight": ramp(2)}
_LOOP["self"] = _LOOP
_SHARED = _weights()
_DEEP: dict[str, object] = dict(_weights())
for _ in range(20):
    _DEEP = {"m": _DEEP, "n": 1}

STRUCTURES: dict[str, tuple[object, StateDict, str | None]] = {
    "a list of state_dicts": ([_weights(), {"b": ramp(2)}], {"b": ramp(2)}, "1"),
    "a tuple of state_dicts": ((_weights(), {"b": ramp(2)}), _weights(), "0"),
    "a state_dict and numbers in a tuple": ((_weights(), 3, "x"), _weights(), None),
    "a list of tensors": ([ramp(2), ramp(3)], {"0": ramp(2), "1": ramp(3)}, None),
    "one tensor": (ramp(2, 3).t(), {"tensor": ramp(2, 3).t()}, None),
    "one parameter": (nn.Parameter(ramp(2)), {"tensor": ramp(2)}, None),
    "integer keys": ({0: ramp(2), 7: ramp(3), -1: ramp(1)}, {"0": ramp(2), "7": ramp(3), "-1": ramp(1)}, None),
    "keys of many kinds": (
        {1.5: ramp(1), True: ramp(2), None: ramp(3), b"raw": ramp(4), (1, "a"): ramp(5), 1 << 70: ramp(6)},
        {"1.5": ramp(1), "True": ramp(2), "None": ramp(3), "raw": ramp(4), "(1, 'a')": ramp(5), str(1 << 70): ramp(6)},
        None,
    ),
    "a name with dots": ({"net.v1": _weights(), "net": {"x": ramp(1)}}, _weights(), "net.v1"),
    "a name and its beginning": ({"a": {"c": ramp(1)}, "a.b": {"d": ramp(2)}}, {"d": ramp(2)}, "a.b"),
    "a tensor by its path": ({"model": _weights()}, {"tensor": ramp(3)}, "model.fc.bias"),
    "a dict within itself": (_LOOP, {"weight": ramp(2)}, None),
    "one dict under two names": ({"backbone": _SHARED, "copy": _SHARED}, {
        f"{name}.{key}": tensor for name in ("backbone", "copy") for key, tensor in _SHARED.items()
    }, None),
    "dicts twenty deep": (_DEEP, _weights(), None),
}  # fmt: skip

for _name, (_value, _state, _select) in STRUCTURES.items():
    odd("structure", _name)(partial(_structure, value=_value, state=_state, select=_select))


@odd("structure", "subclass of dict that is not there")
def _dict_subclass(folder: Path) -> Odd:
    with vanishing() as models:
        inner = models.Dotted(_weights())
        path = save(models.Dotted(backbone=inner, head=models.Dotted(b=ramp(1)), epoch=3), folder)
    state = {"backbone.fc.weight": ramp(3, 4), "backbone.fc.bias": ramp(3), "head.b": ramp(1)}
    return Odd(path, state, {".": "vanished.models.Dotted", "epoch": "int 3"}, suspect=True)


@odd("structure", "namedtuple of state_dicts")
def _named_pair(folder: Path) -> Odd:
    with vanishing() as models:
        path = save(models.Pair(_weights(), {"b": ramp(2)}), folder)
    return Odd(path, {"b": ramp(2)}, {".": "vanished.models.Pair dict, dict"}, suspect=True, select="1")


KEYS = {
    "dots": ["a.b.c", "..", ".", "a..b", ""],
    "quotes": ["it's", 'say "hi"', "`x`", "\\"],
    "spaces": [" ", "two words", "tab\t", "line\nbreak", "\r\n", "\v\f", "\x00"],
    "escapes": ["\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x7f", "\x80\x9b"],
    "Unicode": ["größe", "重み", "🦊", "e\u0301", "\u202eright to left", "\u200b", "\ufeff", "\u2028"],
    "surrogates": ["\ud800", "a\udcffb"],
    "options": ["--force", "-", "*", "[a]", "{0}", "%s", "$HOME", "~"],
    "long": ["x" * 300, "x" * 70_000],
}


def _keys(folder: Path, *, keys: list[str]) -> Odd:
    state = {key: ramp(index + 1) for index, key in enumerate(keys)}
    path = save(state, folder)
    return Odd(path, torch.load(path))


for _name, _listed in KEYS.items():
    odd("keys", _name)(partial(_keys, keys=_listed))


# -- storages that are larger than their tensors


@odd("slack", "a row of a large table")
def _slack(folder: Path) -> Odd:
    table = ramp(1000, 100)
    return Odd(save({"row": table[3:4], "column": table[:2, 5]}, folder), {"row": table[3:4], "column": table[:2, 5]})


@odd("slack", "legacy")
def _slack_legacy(folder: Path) -> Odd:
    table = ramp(1000, 100)
    return Odd(save({"row": table[3]}, folder, legacy=True), {"row": table[3]})


# -- tensors that are more than their elements: named, not loaded


@dataclass(frozen=True)
class Special:
    """A tensor that no plain container can hold, and what it is called."""

    make: Callable[[], torch.Tensor]
    kind: str


class Wrapped(torch.Tensor):
    """A tensor whose data only its class reaches."""

    data_inside: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapped:
        made: Wrapped = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.data_inside = inner
        return made

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return torch._tensor._rebuild_from_type_v2, (_wrap, Wrapped, (self.data_inside,), {})

    @classmethod
    def __torch_dispatch__(cls, *_: object) -> object:
        raise NotImplementedError


def _wrap(inner: torch.Tensor) -> Wrapped:
    return Wrapped(inner)


def _nested_tensor() -> torch.Tensor:
    return torch.nested.nested_tensor([ramp(2), ramp(3)])


def _sparse(layout: str) -> torch.Tensor:
    eye = torch.eye(4)
    made: torch.Tensor = eye.to_sparse_bsr((2, 2)) if layout == "bsr" else getattr(eye, f"to_sparse_{layout}")()
    return made


def _quantized(*, per_channel: bool) -> torch.Tensor:
    if per_channel:
        return torch.quantize_per_channel(ramp(2, 2), torch.ones(2), torch.zeros(2), 0, torch.qint8)
    return torch.quantize_per_tensor(ramp(3), 0.5, 0, torch.quint8)


SPECIAL: dict[str, Special] = {
    "sparse COO": Special(lambda: torch.eye(3).to_sparse(), "sparse_coo"),
    "sparse CSR": Special(lambda: _sparse("csr"), "sparse_csr"),
    "sparse CSC": Special(lambda: _sparse("csc"), "sparse_csc"),
    "sparse BSR": Special(lambda: _sparse("bsr"), "sparse_bsr"),
    "quantized per tensor": Special(lambda: _quantized(per_channel=False), "quantized"),
    "quantized per channel": Special(lambda: _quantized(per_channel=True), "quantized"),
    "meta": Special(lambda: torch.empty(2, 3, device="meta", dtype=torch.bfloat16), "meta"),
    "nested": Special(_nested_tensor, "nested"),
    "subclass": Special(lambda: Wrapped(ramp(2, 3)), "subclass oddities.Wrapped"),
}


# -- containers that hold nothing of interest


EMPTY: dict[str, object] = {
    "numbers": {"epoch": 3, "lr": 0.5},
    "empty dict": {},
    "empty list": [],
    "nothing": None,
    "a string": "weights",
    "a namespace": argparse.Namespace(lr=0.5),
    "optimizer state": {"optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"params": [0]}]}},
}
