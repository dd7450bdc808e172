"""Classes that exist while a file is written and while its oracle reads it, and are gone when ``ckpt`` reads it."""

from __future__ import annotations

import linecache
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

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
