"""Whole modules, saved with their class."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from unusual_files.registry import UnusualFile, save, tensors_of, unusual
from unusual_files.vanished import vanishing


def _vanished_net(folder: Path, *, protocol: int, legacy: bool) -> UnusualFile:
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
    return UnusualFile(path, state, objects, suspect=True)


for _protocol in (2, 3, 4, 5):
    unusual("whole module", f"vanished class, zip, protocol {_protocol}")(
        partial(_vanished_net, protocol=_protocol, legacy=False)
    )
for _protocol in (1, 2, 3, 4, 5):
    unusual("whole module", f"vanished class, legacy, protocol {_protocol}")(
        partial(_vanished_net, protocol=_protocol, legacy=True)
    )


@unusual("whole module", "vanished class in DataParallel")
def _parallel(folder: Path) -> UnusualFile:
    with vanishing() as models:
        net = nn.DataParallel(models.Net())
        path = save(net, folder)
        state = tensors_of(net.state_dict())
    return UnusualFile(
        path, state, {".": "torch.nn.parallel.data_parallel.DataParallel", "module": "vanished"}, suspect=True
    )


@unusual("whole module", "extra state")
def _extra_state(folder: Path) -> UnusualFile:
    with vanishing() as models:
        net = models.Stateful()
        path = save({"state_dict": net.state_dict(), "net": None}, folder)
        state = tensors_of(net.state_dict())
    return UnusualFile(path, state, {"state_dict._extra_state.seen": "int 3"})


@unusual("whole module", "beside its optimizer")
def _with_optimizer(folder: Path) -> UnusualFile:
    with vanishing() as models:
        net = models.Block()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.5)
        net.fc(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        path = save({"epoch": 3, "model": net, "optimizer": optimizer, "state": optimizer.state_dict()}, folder)
        state = tensors_of(net.state_dict())
    return UnusualFile(path, state, {"epoch": "int 3", "optimizer": "torch.optim.sgd.SGD"}, suspect=True)


@unusual("whole module", "attribute of an object")
def _in_object(folder: Path) -> UnusualFile:
    with vanishing() as models:
        net = models.Net()
        path = save(models.Trainer(net), folder)
        state = tensors_of(net.state_dict())
    return UnusualFile(
        path, state, {".": "vanished.models.Trainer", "step": "int 5", "model": "vanished"}, suspect=True
    )


@unusual("whole module", "model and EMA, one selected")
def _two_modules(folder: Path) -> UnusualFile:
    with vanishing() as models:
        net, ema = models.Block(), models.Block()
        path = save({"model": net, "ema": ema}, folder)
        state = tensors_of(ema.state_dict())
    return UnusualFile(path, state, {"ema.fc": "torch.nn.modules.linear.Linear"}, suspect=True, select="ema")


@unusual("whole module", "module with hooks and functions")
def _hooked(folder: Path) -> UnusualFile:
    net = nn.Sequential(nn.Linear(2, 2))
    net._forward_hooks[0] = torch.nn.functional.relu
    net.activation = torch.nn.functional.gelu  # type: ignore[assignment]
    objects = {"_forward_hooks.0": "class or function torch.nn.functional.relu"}
    return UnusualFile(save(net, folder), tensors_of(net.state_dict()), objects, suspect=True)


@unusual("whole module", "uninitialized parameters")
def _lazy(folder: Path) -> UnusualFile:
    net = nn.Sequential(nn.LazyLinear(3), nn.Linear(2, 2))
    state = tensors_of(net[1].state_dict(prefix="1."))
    objects = {"0.weight": "torch.nn.parameter.UninitializedParameter"}
    return UnusualFile(save(net, folder), state, objects, suspect=True)


@unusual("whole module", "within itself")
def _cyclic(folder: Path) -> UnusualFile:
    net = nn.Sequential(nn.Linear(2, 2))
    state = tensors_of(net.state_dict())
    net._modules["loop"] = net
    return UnusualFile(save(net, folder), state, suspect=True)


@unusual("whole module", "plain pickle")
def _pickled_module(folder: Path) -> UnusualFile:
    path = folder / "net.pkl"
    with vanishing() as models:
        net = models.Net()
        path.write_bytes(pickle.dumps(net))
        state = tensors_of(pickle.loads(path.read_bytes()).state_dict())
    return UnusualFile(path, state, {".": "vanished.models.Net"}, suspect=True)


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


def _kind(folder: Path, *, name: str) -> UnusualFile:
    torch.manual_seed(0)
    net = KINDS[name]()
    return UnusualFile(save(net, folder), tensors_of(net.state_dict()), suspect=True)


for _name in KINDS:
    unusual("whole module", _name)(partial(_kind, name=_name))
