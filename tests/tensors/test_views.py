"""Tensors joined: whatever the dimension and the size of the blocks they come in, and never whole in memory."""

from __future__ import annotations

import tracemalloc

import pytest
import torch

from ckpt_surgeon import from_torch
from ckpt_surgeon.tensors.views import concatenated


def test_tensors_are_joined_along_inner_dimensions_a_slab_at_a_time() -> None:
    generator = torch.Generator().manual_seed(0)
    ours = [torch.randn(2048, width, generator=generator) for width in (1000, 300, 1)]
    tensors = list(from_torch({str(index): tensor for index, tensor in enumerate(ours)}).values())
    tracemalloc.start()
    made, wanted = 0, memoryview(torch.cat(ours, 1).numpy().tobytes())
    base = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    for block in concatenated(tensors, 1).blocks():
        assert block == wanted[made : made + len(block)]
        made += len(block)
    peak = tracemalloc.get_traced_memory()[1] - base
    tracemalloc.stop()
    assert made == len(wanted)
    assert peak < 8 << 20


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_empty_tensors_are_joined_too(axis: int) -> None:
    ours = [torch.zeros(2, 0, 3), torch.zeros(2, 0, 3)]
    tensors = list(from_torch({str(index): tensor for index, tensor in enumerate(ours)}).values())
    joined = concatenated(tensors, axis)
    assert b"".join(joined.blocks()) == b""
    assert joined.shape == torch.cat(ours, axis).shape
