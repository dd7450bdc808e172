"""merge-lora makes large weights some rows at a time, with the bits of the whole product."""

from __future__ import annotations

import pytest
import torch

import ckpt_surgeon
from ckpt_surgeon.edits.lora import merging
from ckpt_surgeon.tensors.torch_bridge import raw_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_made_in_several_blocks_have_the_bits_of_the_whole_product(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    weight, down, up = torch.randn(1100, 256).to(dtype), torch.randn(16, 256), torch.randn(1100, 16)
    adapter = {"fc.lora_A.weight": down, "fc.lora_B.weight": up}
    sizes: list[int] = []

    def counted(values: torch.Tensor) -> memoryview:
        sizes.append(values.shape[0])
        return raw_bytes(values)

    monkeypatch.setattr(merging, "ELEMENTS", 256 * 256)
    monkeypatch.setattr(merging, "raw_bytes", counted)
    made = ckpt_surgeon.merge_lora({"fc.weight": weight}, adapter, scale=[0.3])["fc.weight"]
    assert torch.equal(made, (weight.float() + (up @ down) * 0.3).to(dtype))
    assert sizes == [256, 256, 256, 256, 76]
