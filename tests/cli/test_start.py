"""What is imported, and when: a command brings what it uses, the help brings no command."""

from __future__ import annotations

import inspect
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import click
import pytest

import ckpt_surgeon.edits
from ckpt_surgeon import cli
from ckpt_surgeon.edits.change import EDITS
from ckpt_surgeon.edits.table import TABLE, Listed

FIXTURES = Path(__file__).parents[2] / "fixtures"
PROGRAM = """
import sys
from ckpt_surgeon.cli import cli
cli(standalone_mode=False)
print(*sys.modules, file=sys.stderr)
"""


def imported(*words: object) -> set[str]:
    """The modules that a command has imported when it ends."""
    ran = subprocess.run([sys.executable, "-c", PROGRAM, *map(str, words)], capture_output=True, text=True, check=True)
    return set(ran.stderr.split())


def test_the_table_of_edits_says_what_each_edit_says_itself() -> None:
    for found in pkgutil.walk_packages(ckpt_surgeon.edits.__path__, "ckpt_surgeon.edits."):
        import_module(found.name)
    for name, edit in EDITS.items():
        module = inspect.unwrap(edit).__module__.removeprefix("ckpt_surgeon.edits.")
        assert TABLE[name] == Listed(module, edit.group, edit.declaration.short_help)
    assert len(EDITS) == len(TABLE)


def test_the_help_says_of_each_command_what_the_command_says_itself() -> None:
    context = click.Context(cli.cli)
    for commands in cli.cli.grouped().values():
        for name, text in commands.items():
            command = cli.cli.get_command(context, name)
            assert command is not None
            assert command.get_short_help_str(200) == text


@pytest.mark.parametrize("words", [["--help"], ["--version"]])
def test_the_help_imports_no_command_and_no_reader(words: list[str]) -> None:
    program = PROGRAM.replace("cli(standalone_mode=False)", "try: cli(standalone_mode=False)\nexcept SystemExit: pass")
    ran = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True)
    ours = {name for name in ran.stderr.split() if name.startswith("ckpt_surgeon.")}
    assert not {name for name in ours if name.startswith(("ckpt_surgeon.formats", "ckpt_surgeon.reading"))}
    assert not {name for name in ours if name.startswith("ckpt_surgeon.edits.") and name != "ckpt_surgeon.edits.table"}


def test_listing_imports_the_reader_of_its_file_and_no_other() -> None:
    found = imported("ls", FIXTURES / "parallel.safetensors")
    readers = {"zip.torch_zip", "torch_legacy", "torch_tar", "dcp.metadata", "gguf", "engines"}
    assert found.isdisjoint(f"ckpt_surgeon.formats.{name}" for name in readers)
    assert found.isdisjoint({"torch", "numpy", "hashlib", "ckpt_surgeon.edits.recipe", "ckpt_surgeon.writing"})


def test_renaming_imports_its_edit_and_no_other(tmp_path: Path) -> None:
    found = imported("strip-prefix", FIXTURES / "parallel.pth", tmp_path / "out.pth")
    assert "ckpt_surgeon.edits.keys" in found
    assert found.isdisjoint(f"ckpt_surgeon.edits.{name}" for name in ("norms", "averages", "lora", "quantised", "fold"))
    assert "torch" not in found
