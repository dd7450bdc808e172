"""Evidence of values: the same bytes under another name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from math import prod

from ...tensors.records import ComputedTensor, Shaped
from ...tensors.stored import StoredTensor
from .state import State

MOST = 4 << 30  # bytes of open tensors that are read to compare them; beyond, names and order have to do

_Kind = tuple[str, tuple[int, ...]]


def same_values(state: State) -> None:
    """Settle the open keys whose tensors are the same bit for bit, where no other open one has these values.

    Reads the tensors of a dtype and shape that is open on both sides.  Tensors of one value (fresh biases, norms)
    say nothing.
    """
    ours, theirs = _by_kind(state.source, state.olds), _by_kind(state.target, state.news)
    kinds = [kind for kind in ours if kind in theirs]
    nbytes = sum(
        _nbytes(side, keys[kind]) for kind in kinds for side, keys in ((state.source, ours), (state.target, theirs))
    )
    if nbytes > MOST:
        state.notes.append(f"values were not compared: the open keys hold {nbytes:,} bytes")
        return
    for kind in kinds:
        mine, other = _by_digest(state.source, ours[kind]), _by_digest(state.target, theirs[kind])
        for digest, olds in mine.items():
            news = other.get(digest, [])
            if len(olds) == len(news) == 1:
                state.settle(olds[0], news[0], "the same values", "certain")


def _by_kind(tensors: Mapping[str, Shaped], keys: Iterable[str]) -> dict[_Kind, list[str]]:
    """The keys whose values can be read, by dtype and shape."""
    found: dict[_Kind, list[str]] = {}
    for key in keys:
        tensor = tensors[key]
        if isinstance(tensor, StoredTensor | ComputedTensor) and prod(tensor.shape) > 1:
            found.setdefault((tensor.dtype.name, tuple(tensor.shape)), []).append(key)
    return found


def _nbytes(tensors: Mapping[str, Shaped], keys: Iterable[str]) -> int:
    found = (tensors[key] for key in keys)
    return sum(tensor.nbytes for tensor in found if isinstance(tensor, StoredTensor | ComputedTensor))


def _by_digest(tensors: Mapping[str, Shaped], keys: Iterable[str]) -> dict[bytes, list[str]]:
    """Keys by the SHA-256 of their values, without those that hold one value all over."""
    found: dict[bytes, list[str]] = {}
    for key in keys:
        tensor = tensors[key]
        if not isinstance(tensor, StoredTensor | ComputedTensor):
            continue
        digest, first, constant = hashlib.sha256(), b"", True
        for block in tensor.blocks():
            data = bytes(block)
            first = first or data[: max(1, tensor.nbytes // prod(tensor.shape))]
            constant = constant and data == first * (len(data) // len(first))
            digest.update(data)
        if not constant:
            found.setdefault(digest.digest(), []).append(key)
    return found
