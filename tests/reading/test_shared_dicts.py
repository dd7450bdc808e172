"""Dicts that a file holds once and names often: each name counts, up to a multiple of what is there."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

import ckpt_surgeon
from ckpt_surgeon import SelectionError


def doubled(levels: int) -> dict[str, object]:
    """A dict that holds the one below twice, so many times over."""
    made: dict[str, object] = {"w": torch.ones(2), "v": torch.zeros(1)}
    for _ in range(levels):
        made = {"a": made, "b": made}
    return made


def test_dicts_that_are_shared_are_read_under_all_their_names(tmp_path: Path) -> None:
    torch.save(doubled(6), tmp_path / "shared.pth")
    found = ckpt_surgeon.load(tmp_path / "shared.pth")
    assert len(found) == 2 * 2**6
    assert torch.equal(found["a.b.a.b.a.b.w"], torch.ones(2))


@pytest.mark.parametrize("levels", [12, 20, 30])
def test_dicts_that_are_shared_almost_without_end_are_refused_at_once(levels: int, tmp_path: Path) -> None:
    torch.save(doubled(levels), tmp_path / "shared.pth")
    assert (tmp_path / "shared.pth").stat().st_size < 4000
    before = time.process_time()
    with pytest.raises(SelectionError, match="almost without end"):
        ckpt_surgeon.open(tmp_path / "shared.pth")
    assert time.process_time() - before < 2
