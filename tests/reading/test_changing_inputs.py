"""Damage and change are told before values reach anybody: checksums are compared, files that change are errors."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt_surgeon
from ckpt_surgeon import BrokenFile
from ckpt_surgeon.tensors.storage import Storage


def saved(path: Path) -> Path:
    torch.save({"weight": torch.ones(64, 64), "bias": torch.ones(64)}, path)
    return path


def damaged(path: Path) -> Path:
    """A file with one wrong bit in its largest record, which torch reads without a word."""
    saved(path)
    with zipfile.ZipFile(path) as archive:
        info = max(archive.infolist(), key=lambda info: info.file_size)
    with open(path, "r+b") as file:
        file.seek(info.header_offset + info.file_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))
    return path


def test_damage_reaches_no_model(tmp_path: Path) -> None:
    path = damaged(tmp_path / "model.pth")
    model = torch.nn.Linear(64, 64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(BrokenFile, match="CRC"):
        ckpt_surgeon.load_into(model, path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.device("meta"):
        mapped = torch.nn.Linear(64, 64)
    with pytest.raises(BrokenFile, match="CRC"):
        ckpt_surgeon.load_into(mapped, path, check=True)
    assert not torch.equal(torch.load(path)["weight"], torch.ones(64, 64))  # torch loads it


def test_mapped_memory_is_compared_when_that_is_asked_for(tmp_path: Path) -> None:
    path = damaged(tmp_path / "model.pth")
    with pytest.raises(BrokenFile, match="CRC"):
        ckpt_surgeon.load(path, check=True)
    assert ckpt_surgeon.load(saved(tmp_path / "sound.pth"), check=True)["weight"].sum() == 64 * 64


def _rewritten(path: Path) -> None:
    with open(path, "r+b") as file:
        head = file.read(1)
        file.seek(0)
        file.write(head)
    os.utime(path, ns=(1, 1))


def _longer(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"x")


def _another(path: Path) -> None:
    os.replace(saved(path.with_name("other.pth")), path)


@pytest.mark.parametrize("change", [_rewritten, _longer, _another])
@pytest.mark.parametrize("assign", [False, True])
def test_a_file_that_changes_while_it_is_copied_into_a_model_is_told_with_what_became_of_the_model(
    assign: bool, change: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "model.pth")
    model = torch.nn.Linear(64, 64)
    original = torch.nn.Module.load_state_dict

    def changing(self: torch.nn.Module, *args: Any, **kwargs: Any) -> object:
        change(path)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "load_state_dict", changing)
    with pytest.raises(BrokenFile, match=r"changed while it was read .*the model's tensors were overwritten.*load it"):
        ckpt_surgeon.load_into(model, path, assign=assign)
    assert torch.equal(model.weight, torch.ones(64, 64))


def test_a_file_that_changes_while_it_is_checked_leaves_the_model_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "model.pth")
    model = torch.nn.Linear(64, 64)
    before = model.weight.clone()
    original = Storage.blocks

    def blocks(self: Storage) -> Iterator[bytes]:
        _longer(path)
        return original(self)

    monkeypatch.setattr(Storage, "blocks", blocks)
    with pytest.raises(BrokenFile, match=r"changed while it was read \([^;]*\); do it again$"):
        ckpt_surgeon.load_into(model, path)
    assert torch.equal(model.weight, before)


READERS: dict[str, Callable[[Path], object]] = {
    "hash": ckpt_surgeon.hash,
    "compare": lambda path: ckpt_surgeon.compare(path, {"weight": torch.zeros(64, 64), "bias": torch.ones(64)}),
    "check": lambda path: ckpt_surgeon.ls(path, check=True),
    "stats": lambda path: ckpt_surgeon.ls(path, stats=True),
    "load": lambda path: ckpt_surgeon.load(path, check=True),
    "load_into": lambda path: ckpt_surgeon.load_into(torch.nn.Linear(64, 64), path),
}


@pytest.mark.parametrize("change", [_rewritten, _longer, _another])
@pytest.mark.parametrize("name", READERS)
def test_a_file_that_changes_while_it_is_read_is_an_error(
    name: str, change: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "model.pth")
    original = Storage.blocks

    def blocks(self: Storage) -> Iterator[bytes]:
        yield from original(self)
        if self.span is not None:
            change(path)

    monkeypatch.setattr(Storage, "blocks", blocks)
    with pytest.raises(BrokenFile, match=re.compile("changed while it was read")):
        READERS[name](path)
