"""Run the pages of documentation: every console and Python block of a page, in order, in one folder.

- ``console``: each ``$`` line is run; behind it stands its exit status, where not 0, and below it what it prints.
  Where the page has an empty line before a command, it keeps one.
- ``python``: run, with names that all blocks of the page share.  ``print(…)  # text``: the text is the line that is
  printed.
- ``text``: what the Python block before it prints.
- ``toml``: a recipe of docs/recipes that begins with the same line, or whose file the block names.

Blocks of other languages (``sh``, ``yaml`` …) are not run.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from command_line import Ran, Run

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
FIXTURES = ROOT / "fixtures"
README = ROOT / "README.md"
PAGES = (README, *sorted(DOCS.glob("*.md")))
RECIPES = sorted((DOCS / "recipes").glob("*.toml"))

BLOCK = re.compile(r"^```(console|python|toml|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
STATUS = re.compile(r"  # exit status (\d+)$")
PRINTED = re.compile(r"^( *print\(.*\))  # .*$", re.MULTILINE)

Command = Callable[[str], tuple[int, str]]  # a line as one would type it: its exit status and all that it prints


def shell(line: str) -> tuple[int, str]:
    """Run a line as a process, with the commands of this Python at hand."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["sh", "-c", line],
        env={**os.environ, "PATH": path, "COLUMNS": "100", "PYTHONWARNINGS": "error"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    return done.returncode, done.stdout


def in_process(ckpt: Run) -> Command:
    """Run a plain ``ckpt`` line in this process, by the fixture or :func:`here`, and any other line in a shell."""

    def run(line: str) -> tuple[int, str]:
        if not line.startswith("ckpt ") or re.search(r" [|>] | && ", line):
            return shell(line)
        ran = ckpt(*shlex.split(line)[1:])
        return ran.status, ran.out + ran.err

    return run


def here(*words: object) -> Ran:
    """Run a command in this process, outside of pytest; what it prints on both streams is in ``out``."""
    from ckpt_surgeon import cli

    printed = io.StringIO()
    sys.argv = ["ckpt", *map(str, words)]
    with redirect_stdout(printed), redirect_stderr(printed):
        try:
            cli.main()
        except SystemExit as ended:
            return Ran(ended.code if isinstance(ended.code, int) else 0, printed.getvalue(), "")
    return Ran(0, printed.getvalue(), "")


def kitchen(folder: Path) -> Path:
    """Fill a new folder with what a page finds: the small files of fixtures/ and the recipes."""
    shutil.copytree(FIXTURES, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in RECIPES:
        shutil.copy(path, folder)
    return folder


def console(body: str, run: Command) -> str:
    """A console block as it should read."""
    shown: list[str] = []
    for line in body.splitlines():
        if line.startswith("$ "):
            command = STATUS.sub("", line)
            status, printed = run(command[2:])
            assert "Traceback (most recent call last)" not in printed, f"{command}\n{printed}"
            note = f"  # exit status {status}" if status else ""
            shown.append("".join(f"{text}\n" for text in [command + note, *printed.splitlines()]))
    return ("\n" if "\n\n$ " in body else "").join(shown)


def recipe(body: str) -> str:
    """A toml block as it should read: the recipe that it names, or that begins like it; any other stays."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in RECIPES}
    alike = [text for text in texts.values() if text.splitlines()[0] == body.splitlines()[0]]
    return texts.get(body.strip()) or next(iter(alike), body)


def played(text: str, run: Command, names: dict[str, object]) -> str:
    """The page after everything on it was run, in the folder that is the current one.  ``names`` are Python's."""
    printed: str | None = None

    def python(body: str) -> str:
        nonlocal printed
        out = io.StringIO()
        with redirect_stdout(out):
            exec(body, names)
        printed = "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())
        lines = iter(printed.splitlines())
        return PRINTED.sub(lambda found: f"{found[1]}  # {next(lines)}", body)

    def play(found: re.Match[str]) -> str:
        language, body = found[1], found[2]
        make: Mapping[str, Callable[[], str]] = {
            "console": lambda: console(body, run),
            "toml": lambda: recipe(body),
            "python": lambda: python(body),
            "text": lambda: body if printed is None else printed,
        }
        return f"```{language}\n{make[language]()}```"

    names.setdefault("__name__", "__main__")
    return BLOCK.sub(play, text)


def blocks(language: str, text: str) -> Iterator[str]:
    """The bodies of a page's blocks in one language."""
    return (body for found, body in BLOCK.findall(text) if found == language)
