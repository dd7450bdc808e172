"""diff says of tensors that are more than plain elements what torch's own strict load does with them."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import ckpt_surgeon

VALUES = {
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8),
    "sparse": lambda: torch.ones(2, 3).to_sparse(),
    "compressed rows": lambda: torch.ones(2, 3).to_sparse_csr(),
    "plain": lambda: torch.ones(2, 3),
}


class Holder(torch.nn.Module):
    """One buffer, of whatever kind."""

    weight: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)


def torch_takes(model: torch.nn.Module, path: Path) -> bool:
    try:
        model.load_state_dict(torch.load(path, weights_only=False), strict=True)
    except RuntimeError:
        return False
    return True


def _diffed(saved: str, own: str, path: Path) -> tuple[ckpt_surgeon.Diff, bool]:
    """What diff says of a file and a model, and whether torch loads it."""
    with warnings.catch_warnings(action="ignore"):
        torch.save({"weight": VALUES[saved]()}, path)
        model = Holder(VALUES[own]())
        return ckpt_surgeon.diff(path, model), torch_takes(model, path)


@pytest.mark.parametrize("saved", VALUES)
def test_diff_agrees_with_torch_on_what_is_copied_into_a_plain_tensor(saved: str, tmp_path: Path) -> None:
    found, loads = _diffed(saved, "plain", tmp_path / "state.pth")
    assert found.loadable is loads is (saved == "plain")
    assert bool(found.opaque) is not loads
    assert any("'weight'" in note for note in found.notes) is not loads


@pytest.mark.parametrize("kind", VALUES)
def test_a_tensor_of_the_models_own_kind_is_copied(kind: str, tmp_path: Path) -> None:
    found, loads = _diffed(kind, kind, tmp_path / "state.pth")
    assert found.loadable is loads is True
