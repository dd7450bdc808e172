"""Valid files that few people meet: each with the state_dict that torch, numpy or the module itself gives."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tables import StateDict, ramp


@dataclass(frozen=True)
class UnusualFile:
    """A file, what it holds by the oracle, and what ``ls --all`` and ``scan`` should say of it."""

    path: Path
    state: Mapping[str, torch.Tensor]
    objects: Mapping[str, str] = field(default_factory=dict)  # path in the file -> class and value
    suspect: bool = False  # whether it names what is not plainly data
    select: str | None = None
    strides: bool = True
    ties: bool = True


Build = Callable[[Path], UnusualFile]
UNUSUAL: dict[tuple[str, str], Build] = {}


def unusual(family: str, name: str) -> Callable[[Build], Build]:
    def register(make: Build) -> Build:
        assert (family, name) not in UNUSUAL
        UNUSUAL[family, name] = make
        return make

    return register


def build(family: str, name: str, folder: Path) -> UnusualFile:
    """Make one file and ask its oracle."""
    with warnings.catch_warnings(action="ignore"):  # of torch and numpy, that such files are things of the past
        return UNUSUAL[family, name](folder)


def tensors_of(state: Mapping[str, object]) -> StateDict:
    """The tensors of a state_dict, which may hold extra state too."""
    return {key: value.detach() for key, value in state.items() if isinstance(value, torch.Tensor)}


def save(value: object, folder: Path, *, protocol: int = 2, legacy: bool = False) -> Path:
    path = folder / "odd.pth"
    torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    return path


def weights() -> StateDict:
    return {"fc.weight": ramp(3, 4), "fc.bias": ramp(3)}
