"""Servers that are slow: what trickles is given up after a time, what comes at some pace is not, Ctrl-C ends it."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import lying_server as lies
import pytest
import torch
from command_line import Run
from fsspec.implementations.memory import MemoryFileSystem
from lying_server import lying

import ckpt_surgeon
from ckpt_surgeon import CheckpointError, FileError
from ckpt_surgeon.files import patience, remote


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSES", ())
    monkeypatch.setenv(patience.VARIABLE, "0.4")


@pytest.fixture(scope="module")
def raw() -> bytes:
    made = io.BytesIO()
    torch.save({"weight": torch.arange(20_000.0).reshape(100, 200)}, made)
    return made.getvalue()


@pytest.mark.parametrize("words", [["ls"], ["hash"], ["convert", "out.pth"]], ids=" ".join)
def test_a_server_that_trickles_is_given_up(
    words: list[str], raw: bytes, ckpt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = time.monotonic()
    with lying(raw, lies.a_byte_now_and_then) as site:
        ran = ckpt(words[0], site.url, *words[1:])
    assert (ran.status, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert "its server does not answer in time; try again later, or set CKPT_TIMEOUT to more seconds" in ran.err
    assert os.listdir(tmp_path) == []
    assert time.monotonic() - before < 10


def test_a_server_that_trickles_is_waited_for_as_long_as_it_keeps_a_pace(
    raw: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "LEAST", 2)
    monkeypatch.setattr(remote, "WHOLE", 0)
    with lying(raw, lies.a_byte_now_and_then) as site:
        assert remote.RemotePath(site.url).fetch(0, 30) == raw[:30]  # which takes 1.5 seconds


@pytest.mark.parametrize("said", ["soon", "0", "-1", "nan", "inf"])
def test_a_time_that_is_none_is_refused(said: str, ckpt: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(patience.VARIABLE, said)
    ran = ckpt("ls", "http://127.0.0.1:9/model.pth")
    assert ran.status == 2
    assert f"CKPT_TIMEOUT={said!r} is no number of seconds; set it to 60 or more" in ran.err


@pytest.mark.parametrize("name", ["info", "cat_file", "ls"])
def test_a_file_system_that_never_answers_is_given_up(
    name: str, raw: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = f"memory://{tmp_path.name}"
    fsspec.filesystem("memory").pipe_file(f"{folder}/model.pth", raw)
    ends = threading.Event()
    monkeypatch.setattr(MemoryFileSystem, name, lambda *_, **__: ends.wait(30))
    monkeypatch.setattr(remote, "LISTING", 1)
    before = time.monotonic()
    with pytest.raises(FileError, match="does not answer in time"):
        ckpt_surgeon.open(folder if name == "ls" else f"{folder}/model.pth")
    ends.set()
    assert time.monotonic() - before < 10


def test_an_output_that_is_never_taken_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = threading.Event()
    monkeypatch.setattr(MemoryFileSystem, "put_file", lambda *_, **__: ends.wait(30))
    with pytest.raises(FileError, match="cannot be written: its server does not answer in time"):
        ckpt_surgeon.save({"bias": torch.ones(2)}, f"memory://{tmp_path.name}/model.pth")
    ends.set()


@pytest.mark.parametrize("rows", [10, 2000])  # the file is fetched while it is opened, or read ahead by threads
def test_ctrl_c_ends_a_command_that_waits_for_a_server(rows: int, tmp_path: Path) -> None:
    made = io.BytesIO()
    torch.save({"weight": torch.ones(rows, 200)}, made)
    waits = threading.Event()

    def trickle(answer: lies.Answer, raw: bytes, start: int, stop: int) -> None:
        if stop - start > rows * 700:
            answer.drip = 0.05
            waits.set()

    with lying(made.getvalue(), trickle) as site:
        words = [sys.executable, "-m", "ckpt_surgeon", "convert", site.url, "out.pth"]
        environment = {**os.environ, patience.VARIABLE: "60"}
        running = subprocess.Popen(words, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
        assert waits.wait(30)
        time.sleep(0.3)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=10)
    assert (running.returncode, said.strip()) == (130, "ckpt: interrupted, nothing was replaced")
    assert os.listdir(tmp_path) == []


def test_threads_do_what_they_are_given_and_no_more_at_a_time() -> None:
    threads = patience.Threads("few", 3)
    at_once, most = [0], [0]
    lock = threading.Lock()

    def work(number: int) -> int:
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        time.sleep(0.005)
        with lock:
            at_once[0] -= 1
        return number * 2

    assert list(threads.map(work, range(30))) == [number * 2 for number in range(30)]
    assert most[0] == 3
    assert list(threads.map(work, range(5))) == [0, 2, 4, 6, 8]  # threads that wait are taken again


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_process_that_is_forked_has_threads_of_its_own() -> None:
    assert patience.within(5, lambda: 1) == 1
    child = os.fork()
    if not child:
        os._exit(patience.within(5, lambda: 7))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_thread_raises_where_its_result_is_asked_for() -> None:
    def fails() -> None:
        raise CheckpointError("no")

    with pytest.raises(CheckpointError, match="no"):
        patience.within(5, fails)
