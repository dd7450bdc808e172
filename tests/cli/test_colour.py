"""Colour and width: what lines mean is shown on a terminal alone, and tables fit it; in a pipe nothing changes."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command_line import Run

from ckpt_surgeon.cli import terminal
from ckpt_surgeon.text import Lines, cut_in_the_middle, document, fit_width, long_table, styled, table

LONG = "encoder.layers.11.attention.self.query.with.a.very.long.name.indeed.for.a.key.of.a.model.weight"
RED, GREEN, CYAN = "\x1b[31m", "\x1b[32m", "\x1b[36m"


@pytest.fixture(autouse=True)
def plain_afterwards() -> Iterator[None]:
    yield
    fit_width(None)
    terminal.adapt("auto")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.save({LONG: torch.ones(2), "fc.bias": torch.tensor([1.0, float("nan")])}, "a.pth")
    torch.save({"fc.bias": torch.ones(2).half(), "head.bias": torch.ones(2)}, "b.pth")
    return tmp_path


def on_terminal(*words: str, columns: int = 60, **environment: str) -> str:
    """What a command prints on a terminal of so many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS")}
    command = [sys.executable, "-m", "ckpt_surgeon", *words]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env={**clean, "TERM": "xterm", **environment}) as ran:
        os.close(theirs)
        read = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            read += part
        ran.wait()
    os.close(ours)
    return read.decode().replace("\r\n", "\n")


def test_on_a_terminal_there_is_colour_and_every_line_fits(files: Path) -> None:
    out = on_terminal("diff", "a.pth", "b.pth")
    assert re.search(rf"{re.escape(RED)}missing \(in b.pth only\): 1 key\x1b\[0m", out)
    assert f"{GREEN}unused (in a.pth only): 1 key" in out
    assert f"{CYAN}other dtype, converted on load: 1 key" in out
    assert f"{RED}NOT strictly loadable" in out
    plain = re.sub(r"\x1b\[\d*m", "", out)
    assert "\x1b" not in plain
    assert max(map(len, plain.splitlines())) <= 60
    assert re.search(r"encoder\.l[\w.]*…[\w.]*\.weight", plain)


def test_no_color_and_columns_are_heeded(files: Path) -> None:
    out = on_terminal("ls", "a.pth", columns=200, NO_COLOR="1", COLUMNS="50")
    assert "\x1b" not in out
    assert max(len(line) for line in out.splitlines() if "float32" in line) <= 50


def test_in_a_pipe_nothing_is_coloured_or_cut(files: Path, ckpt: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    ran = ckpt("diff", "a.pth", "b.pth")
    assert "\x1b" not in ran.out
    assert LONG in ran.out


def test_colour_is_forced_or_forbidden_by_the_option(files: Path, ckpt: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    forced = ckpt("diff", "a.pth", "b.pth", "--color", "always").out
    assert f"{RED}NOT strictly loadable\x1b[0m" in forced
    assert re.sub(r"\x1b\[\d*m", "", forced) == ckpt("diff", "a.pth", "b.pth", "--color", "never").out
    assert "\x1b" not in ckpt("diff", "a.pth", "b.pth").out  # one command's choice is not the next one's
    assert "is not one of 'auto', 'always', 'never'" in ckpt("ls", "a.pth", "--color", "red").err


def test_what_is_not_finite_and_what_is_dropped_is_red_and_other_dtypes_have_their_own(files: Path, ckpt: Run) -> None:
    assert f"{RED}fc.bias" in ckpt("ls", "a.pth", "--stats", "--color", "always").out
    dropped = ckpt("drop", "a.pth", "out.pth", "fc.*", "-n", "--color", "always").out
    assert f"{RED}fc.bias" in dropped
    assert f"{RED}{LONG}" not in dropped
    assert f"{CYAN}fc.bias" in ckpt("cast", "a.pth", "out.pth", "--dtype", "bf16", "-n", "--color", "always").out


def test_json_never_has_colour(files: Path, ckpt: Run) -> None:
    assert "\x1b" not in ckpt("diff", "a.pth", "b.pth", "--json", "--color", "always").out


def test_a_hostile_key_does_not_reach_the_terminal_in_colour_either(files: Path, ckpt: Run) -> None:
    torch.save({"evil\x1b[5m\nfc": torch.ones(2)}, "evil.pth")
    out = ckpt("diff", "evil.pth", "b.pth", "--color", "always").out
    assert "\x1b[5m" not in out
    assert r"evil\x1b[5m\nfc" in out


# -- lines, documents, tables


def test_a_document_keeps_the_styles_of_its_lines_where_they_come_to_stand() -> None:
    rows = table(["key"], [["x"], ["y"]], styles=["", "bad"])
    found = document(["title", "", rows.indented(), styled("end", "good")])
    lines = found.split("\n")
    assert {lines[number].strip(): style for number, style in found.styles.items()} == {
        "key": "heading",
        "y": "bad",
        "end": "good",
    }
    assert document([found, "more"]).styles == found.styles
    assert rows.indented(skip=1).styles == {1: "bad"}


@pytest.mark.parametrize("make", [table, long_table])
@pytest.mark.parametrize("width", [20, 40, 80])
def test_a_table_is_as_wide_as_the_page_where_its_columns_can_be(make: object, width: int) -> None:
    rows = [[LONG, "float32", 123], ["fc.bias", "float32", 4]]
    whole = make(["key", "dtype", "bytes"], rows)  # type: ignore[operator]
    fit_width(width)
    cut = make(["key", "dtype", "bytes"], rows)  # type: ignore[operator]
    assert LONG in whole
    assert max(map(len, cut.split("\n"))) <= max(width, 12 + 9 + 7 + 4)
    assert "123" in cut
    assert "fc.bias" in cut


def test_a_text_is_cut_in_the_middle_to_its_width_exactly() -> None:
    for width in range(3, len(LONG) + 2):
        cut = cut_in_the_middle(LONG, width)
        assert len(cut) == min(width, len(LONG))
        assert LONG.startswith(cut.partition("…")[0])
        assert LONG.endswith(cut.rpartition("…")[2])


def test_lines_without_styles_stay_plain() -> None:
    assert Lines("a\nb").styles == {}
    assert Lines(Lines("a", {0: "bad"})).styles == {0: "bad"}
