"""Work that reads much shows a bar on a terminal, and nowhere else; its bytes add up to those that were read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from command_line import Run

import ckpt_surgeon
from ckpt_surgeon.cli import options

NBYTES = 4 * (300 * 40 + 300)
READING = [
    (["hash", "a.pth"], "hashing"),
    (["ls", "a.pth", "--stats"], "reading"),
    (["ls", "a.pth", "--check"], "reading"),
    (["diff", "a.pth", "b.pth", "--values"], "comparing"),
]


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = {"fc.weight": torch.ones(300, 40), "fc.bias": torch.ones(300)}
    torch.save(state, "a.pth")
    torch.save({**state, "fc.bias": torch.zeros(300)}, "b.pth")


@pytest.mark.parametrize(("words", "doing"), READING)
def test_on_a_terminal_large_files_have_a_bar(
    words: list[str], doing: str, ckpt: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ckpt(*words)
    assert doing not in plain.err
    monkeypatch.setattr(options, "PROGRESS_FROM", 1)
    assert ckpt(*words).err == plain.err  # which is no terminal
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda stream: stream is sys.stderr)
    shown = ckpt(*words)
    assert f"{doing}:" in shown.err
    assert shown.out == plain.out


def test_small_files_have_none(ckpt: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda stream: stream is sys.stderr)
    assert ckpt("hash", "a.pth").err == ""


def test_what_is_told_adds_up_to_the_bytes_that_were_read() -> None:
    told: list[int] = []
    ckpt_surgeon.hash("a.pth", progress=told.append)
    assert sum(told) == NBYTES
    ckpt_surgeon.compare("a.pth", "b.pth", progress=told.append)
    assert sum(told) == 2 * NBYTES
    ckpt_surgeon.ls("a.pth", stats=True, check=True, progress=told.append)
    assert sum(told) == 4 * NBYTES
