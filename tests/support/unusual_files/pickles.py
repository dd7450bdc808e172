"""Plain pickles of arrays and tensors."""

from __future__ import annotations

import argparse
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tables import StateDict, ramp
from torch import nn

from unusual_files.registry import UnusualFile, tensors_of, unusual, weights

Numbers = Mapping[str, "np.ndarray[tuple[int, ...], np.dtype[np.generic]]"]


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


def _pickled_arrays(folder: Path, *, protocol: int) -> UnusualFile:
    path = folder / "arrays.pkl"
    path.write_bytes(pickle.dumps({**_arrays(), "epoch": 3}, protocol))
    loaded = pickle.loads(path.read_bytes())
    del loaded["epoch"]
    return UnusualFile(path, from_numpy(loaded), {"epoch": "int 3"}, strides=False)


def _pickled_tensors(folder: Path, *, protocol: int) -> UnusualFile:
    path = folder / "tensors.pkl"
    state = OrderedDict(**weights(), large=ramp(2000), t=ramp(3, 4).t(), parameter=nn.Parameter(ramp(2)))
    path.write_bytes(pickle.dumps({"model": state, "args": argparse.Namespace(lr=0.5)}, protocol))
    loaded = pickle.loads(path.read_bytes())["model"]
    return UnusualFile(path, tensors_of(loaded), {"args": "argparse.Namespace", "args.lr": "float 0.5"})


for _protocol in range(6):
    unusual("pickle", f"arrays, protocol {_protocol}")(partial(_pickled_arrays, protocol=_protocol))
    unusual("pickle", f"tensors, protocol {_protocol}")(partial(_pickled_tensors, protocol=_protocol))


@unusual("pickle", "arrays of a big-endian machine")
def _big_arrays(folder: Path) -> UnusualFile:
    arrays = {key: array.astype(array.dtype.newbyteorder(">")) for key, array in _arrays().items()}
    path = folder / "big.pkl"
    path.write_bytes(pickle.dumps(arrays))
    return UnusualFile(path, from_numpy(pickle.loads(path.read_bytes())), strides=False)


@unusual("pickle", "a list of arrays")
def _array_list(folder: Path) -> UnusualFile:
    path = folder / "list.pkl"
    path.write_bytes(pickle.dumps([np.arange(3.0), np.arange(4.0)]))
    return UnusualFile(path, {"0": torch.arange(3.0).double(), "1": torch.arange(4.0).double()})


@unusual("pickle", "a tuple of arrays in a dict")
def _array_tuple(folder: Path) -> UnusualFile:
    path = folder / "tuple.pkl"
    path.write_bytes(pickle.dumps({"params": (np.arange(3.0), np.arange(4.0))}))
    return UnusualFile(path, {"0": torch.arange(3.0).double(), "1": torch.arange(4.0).double()}, select="params")


@unusual("pickle", "one array")
def _one_array(folder: Path) -> UnusualFile:
    path = folder / "one.pkl"
    path.write_bytes(pickle.dumps(np.arange(6.0).reshape(2, 3), 0))
    return UnusualFile(path, {"tensor": torch.arange(6.0).double().reshape(2, 3)})


@unusual("pickle", "one tensor")
def _one_tensor(folder: Path) -> UnusualFile:
    path = folder / "one.pkl"
    path.write_bytes(pickle.dumps(ramp(2, 3)))
    return UnusualFile(path, {"tensor": ramp(2, 3)})


@unusual("pickle", "nested, as detectron2's")
def _nested_arrays(folder: Path) -> UnusualFile:
    path = folder / "nested.pkl"
    arrays = {"backbone.conv1.weight": np.ones((2, 3), "f4"), "roi_heads.fc.bias": np.zeros(2, "f4")}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
    return UnusualFile(path, from_numpy(arrays), {"__author__": "str 'Detectron2 Model Zoo'"})
