"""Tensors that are more than their elements, and files without any tensor."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch
from tables import ramp

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
    "subclass": Special(lambda: Wrapped(ramp(2, 3)), "subclass unusual_files.special.Wrapped"),
}


# -- containers that hold nothing of interest


EMPTY: dict[str, object] = {
    "numbers": {"epoch": 3, "lr": 0.5},
    "empty dict": {},
    "empty list": [],
    "nothing": None,
    "a string": "weights",
    "a namespace": argparse.Namespace(lr=0.5),
}
