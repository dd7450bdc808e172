"""The word in front of what went wrong is red on a terminal, and plain elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import Run

from ckpt_surgeon.cli import terminal
from ckpt_surgeon.text import fit_width

RED = "\x1b[31m"


@pytest.fixture(autouse=True)
def plain_afterwards() -> Iterator[None]:
    yield
    fit_width(None)
    terminal.adapt("auto")


@pytest.mark.parametrize(
    ("words", "word"), [(["ls", "gone.pth"], "ckpt:"), (["ls", "gone.pth", "--depth", "1"], "Error:")]
)
def test_the_word_before_an_error_is_red_where_there_is_colour(
    words: list[str], word: str, ckpt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "\x1b" not in ckpt(*words).err
    coloured = ckpt(words[0], "--color", "always", *words[1:]).err
    assert f"{RED}{word}\x1b[0m " in coloured
    assert coloured.count("\x1b") == 2


@pytest.mark.parametrize("command", ["check", "invert"])
def test_the_commands_on_recipes_take_colour(command: str, ckpt: Run, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[[edit]]\ndo = 'add_prefix'\nprefix = 'net.'\n")
    ran = ckpt("recipe", command, recipe, "--color", "never")
    assert (ran.status, ran.err) == (0, "")
