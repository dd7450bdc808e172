"""What several test files need: places to work in, and the command line, in this process or in its own."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from command_line import Ran as Ran
from command_line import Run as Run
from hypothesis import settings
from slow import is_slow

from ckpt_surgeon import cli

# A machine may be slow: no example has a deadline.  In CI the examples are the same at every run.
settings.register_profile("patient", deadline=None)
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable" if os.environ.get("CI") else "patient")

# A shell that starts the suite in the background has it ignore Ctrl-C, and so would every process that it starts.
with suppress(ValueError):  # in a thread beside the main one
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)

# Workers side by side share the processors: each, and every process that it starts, computes with one thread.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what ``make quick`` leaves out."""
    for item in items:
        if is_slow(item):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Leave what the imports made (hundreds of thousands of objects) out of every later garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def ckpt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Run a command in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def run(*words: object) -> Ran:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["ckpt", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        code = ended.value.code
        return Ran(code if isinstance(code, int) else 0, captured.out, captured.err)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def ckpt_process(tmp_path: Path) -> Run:
    """Run a command as its own process, as a shell would."""

    def run(*words: object) -> Ran:
        done = subprocess.run(
            [sys.executable, "-m", "ckpt_surgeon", *map(str, words)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONWARNINGS": "error"},
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    """Set the umask for one test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)
