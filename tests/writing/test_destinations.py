"""Where outputs go: one conductor, any destination; what is replaced stays whole, keeps its attributes, or goes."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ckpt_surgeon
from ckpt_surgeon import BrokenFile, CheckpointError, FileError, OutputExists
from ckpt_surgeon.files import temporary
from ckpt_surgeon.files.local import LocalPath
from ckpt_surgeon.files.paths import FilePath
from ckpt_surgeon.files.sinks import FileSink
from ckpt_surgeon.writing.destinations import Fill
from ckpt_surgeon.writing.leftovers import clear_leftovers
from ckpt_surgeon.writing.plan import Plan, Written, plan
from ckpt_surgeon.writing.write import carry_out, write

STATE = {f"layer{number}.weight": torch.full((8, 8), float(number)) for number in range(4)}


def checkpoint(state: dict[str, torch.Tensor] = STATE) -> ckpt_surgeon.Checkpoint:
    return ckpt_surgeon.from_torch(state)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Fake:
    """A destination that keeps everything in one folder and fails at the call that it is told to fail at."""

    def __init__(self, planned: Plan, folder: Path, fails: str = "", error: BaseException | None = None) -> None:
        self.planned, self.folder, self.fails, self.error = planned, folder, fails, error
        self.calls: list[str] = []

    def call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails and self.error is not None:
            raise self.error

    def write_file(self, number: int, fill: Fill) -> Written:
        self.call(f"write_file {number}")
        with (
            open(self.folder / str(number), "w+b", buffering=0) as file,
            FileSink(file.fileno(), lambda _: None) as sink,
        ):
            return fill(sink)

    def write_settings(self, path: FilePath, raw: bytes) -> None:
        self.call("write_settings")
        (self.folder / path.name).write_bytes(raw)

    def write_index(self, raw: bytes) -> None:
        self.call("write_index")
        (self.folder / "index").write_bytes(raw)

    def commit(self, *, is_last: bool = True) -> tuple[str, ...]:
        self.call("commit")
        return ("committed",)

    def abandon(self) -> None:
        self.calls.append("abandon")

    def failure(self, error: OSError) -> FileError:
        return FileError(self.planned.out, f"failed ({error.strerror})", "try again")


@pytest.fixture
def planned(tmp_path: Path) -> Plan:
    return plan(checkpoint(), tmp_path / "out.safetensors", max_shard_size=300)


ORDER = ["write_file 0", "write_file 1", "write_file 2", "write_file 3", "write_index", "commit"]


def test_files_are_made_before_the_index_and_everything_is_committed_once(planned: Plan, tmp_path: Path) -> None:
    fake = Fake(planned, tmp_path)
    assert carry_out(planned, fake, threads=1) == ("committed",)
    assert fake.calls == ORDER


@pytest.mark.parametrize("fails", ORDER)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), SystemExit(143)])
def test_whatever_fails_is_abandoned_and_nothing_comes_after_it(
    fails: str, error: BaseException, planned: Plan, tmp_path: Path
) -> None:
    fake = Fake(planned, tmp_path, fails, error)
    with pytest.raises(FileError if isinstance(error, OSError) else type(error)):
        carry_out(planned, fake, threads=1)
    assert fake.calls == [*ORDER[: ORDER.index(fails) + 1], "abandon"]


CALLS = ("os.open", "os.fsync", "os.replace", "os.rename", "os.link", "os.mkdir", "os.chmod")


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("out", ["out.pth", "shards", "out.dcp"])
def test_a_system_that_refuses_any_call_leaves_the_old_output_as_it_was(
    name: str, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 300 if out == "shards" else None
    path = tmp_path / (out if out != "shards" else "out.safetensors")
    ckpt_surgeon.save(STATE, path, max_shard_size=size)
    before = {str(inside): inside.read_bytes() for inside in tmp_path.rglob("*") if inside.is_file()}
    new = checkpoint({f"new.{key}": value for key, value in STATE.items()})
    planned = plan(new, path, force=True, max_shard_size=size)
    real, left = getattr(os, name.removeprefix("os.")), [0]

    for allowed in range(40):
        left[0] = allowed

        def refusing(*given: object, **named: object) -> object:
            left[0] -= 1
            if left[0] == -1:
                raise OSError(5, "Input/output error")
            return real(*given, **named)

        with monkeypatch.context() as patch:
            patch.setattr(os, name.removeprefix("os."), refusing)
            try:
                write(planned, threads=1)
            except CheckpointError:
                assert {str(one): one.read_bytes() for one in tmp_path.rglob("*") if one.is_file()} == before
                continue
        assert all(key.startswith("new.") for key in ckpt_surgeon.open(planned.index or path if size else path))
        return
    raise AssertionError("it fails however often it is allowed")


# -- what is replaced


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_a_replaced_file_keeps_its_mode(mode: int, tmp_path: Path) -> None:
    out = tmp_path / "out.pth"
    ckpt_surgeon.save(STATE, out)
    out.chmod(mode)
    ckpt_surgeon.save(STATE, out, force=True)
    assert stat.S_IMODE(out.stat().st_mode) == mode


def test_a_new_file_has_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    ckpt_surgeon.save(STATE, tmp_path / "out.pth")
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "out.pth").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_replaced_folder_and_its_files_keep_their_modes(tmp_path: Path) -> None:
    out = tmp_path / "out.dcp"
    ckpt_surgeon.save(STATE, out)
    out.chmod(0o700)
    (out / ".metadata").chmod(0o600)
    ckpt_surgeon.save(STATE, out, force=True)
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
    assert stat.S_IMODE((out / ".metadata").stat().st_mode) == 0o600


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away")
def test_a_replaced_file_keeps_its_owner(tmp_path: Path) -> None:
    out = tmp_path / "out.pth"
    ckpt_surgeon.save(STATE, out)
    os.chown(out, 1234, 2345)
    ckpt_surgeon.save(STATE, out, force=True)
    assert (out.stat().st_uid, out.stat().st_gid) == (1234, 2345)


def test_a_replaced_file_keeps_its_extended_attributes(tmp_path: Path) -> None:
    out = tmp_path / "out.pth"
    ckpt_surgeon.save(STATE, out)
    try:
        os.setxattr(out, "user.origin", b"here")
    except (OSError, AttributeError):
        pytest.skip("this file system has no extended attributes")
    ckpt_surgeon.save(STATE, out, force=True)
    assert os.getxattr(out, "user.origin") == b"here"


def fifo(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()
    (path / "mine.txt").write_text("mine")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def device(path: Path) -> None:
    path.symlink_to("/dev/null")


@pytest.mark.parametrize("make", [fifo, folder, loop, device])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".dcp"])
def test_what_is_no_file_is_not_replaced(make: Callable[[Path], None], suffix: str, tmp_path: Path) -> None:
    out = tmp_path / f"out{suffix}"
    make(out)
    with pytest.raises(FileError, match=r"not replaced|loop of links|more than a distributed checkpoint"):
        ckpt_surgeon.save(STATE, out, force=True)
    assert names(tmp_path) == [out.name]


@pytest.mark.parametrize("name", ["mine.distcp", "__0_0.distcp", "__7_0.distcp"])
def test_a_folder_that_is_named_like_a_part_is_not_deleted(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out.dcp"
    ckpt_surgeon.save(STATE, out)
    (out / name).unlink(missing_ok=True)
    (out / name).mkdir()
    (out / name / "mine.txt").write_text("mine")
    with pytest.raises(FileError, match=r"more than a distributed checkpoint in it"):
        ckpt_surgeon.save(STATE, out, force=True)
    assert (out / name / "mine.txt").read_text() == "mine"


def test_a_folder_that_is_named_like_an_old_shard_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "out-00007-of-00009.pth").mkdir()
    with pytest.raises(FileError, match="is a folder"):
        ckpt_surgeon.save(STATE, tmp_path / "out.pth", max_shard_size=300, force=True)
    assert names(tmp_path) == ["out-00007-of-00009.pth"]


def test_shards_beside_an_old_single_file_are_refused_and_with_force_it_goes(tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    ckpt_surgeon.save(STATE, out)
    with pytest.raises(OutputExists):
        ckpt_surgeon.save(STATE, out, max_shard_size=300)
    assert names(tmp_path) == [out.name]
    ckpt_surgeon.save(STATE, out, max_shard_size=300, force=True)
    assert out.name not in names(tmp_path)
    assert list(ckpt_surgeon.open(tmp_path)) == list(STATE)


def test_a_name_as_long_as_a_name_may_be_is_written(tmp_path: Path) -> None:
    out = tmp_path / ("é" * 100 + "n" * (250 - 200 - 4) + ".pth")
    ckpt_surgeon.save(STATE, out)
    ckpt_surgeon.save(STATE, out, force=True)
    assert list(torch.load(out)) == list(STATE)
    assert names(tmp_path) == [out.name]


def test_a_name_that_is_too_long_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="too long a name"):
        ckpt_surgeon.save(STATE, tmp_path / ("n" * 300 + ".pth"))
    assert names(tmp_path) == []


# -- inputs that change


def rewritten(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw)
    os.utime(path, ns=(0, 1))


def replaced(path: Path) -> None:
    twin = path.with_name("twin")
    twin.write_bytes(path.read_bytes())
    os.utime(twin, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    os.replace(twin, path)


def grown(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b" ")


@pytest.mark.parametrize("change", [rewritten, replaced, grown])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".dcp"])
def test_an_input_that_changes_between_opening_and_writing_is_an_error_and_no_output(
    change: Callable[[Path], None], suffix: str, tmp_path: Path
) -> None:
    source = tmp_path / "in.safetensors"
    ckpt_surgeon.save(STATE, source)
    opened = ckpt_surgeon.open(source)
    change(source)
    with pytest.raises(BrokenFile, match=r"in\.safetensors: changed while it was read"):
        ckpt_surgeon.save(opened, tmp_path / f"out{suffix}")
    assert names(tmp_path) == [source.name]


# -- what killed runs leave behind

KILLED = """
import os, signal, sys
import ckpt_surgeon
from ckpt_surgeon.writing.plan import Plan
fill = Plan.fill

def killed(planned, number, *given):
    written = fill(planned, number, *given)
    if number == 1 or len(planned.files) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return written

Plan.fill = killed
size = int(sys.argv[3]) or None
ckpt_surgeon.save(ckpt_surgeon.open(sys.argv[1]), sys.argv[2], max_shard_size=size)
"""


@pytest.mark.parametrize(("name", "size"), [("out.pth", 0), ("out.safetensors", 300), ("out.dcp", 0)])
def test_what_a_killed_run_left_is_named_by_the_next_and_removed_by_recover(
    name: str, size: int, tmp_path: Path
) -> None:
    source = tmp_path / "in.pth"
    torch.save(STATE, source)
    (tmp_path / "work").mkdir()
    out = tmp_path / "work" / name
    ran = subprocess.run([sys.executable, "-c", KILLED, str(source), str(out), str(size)], timeout=120)
    assert ran.returncode == -9
    left = names(tmp_path / "work")
    assert left
    assert not any(name.startswith("out") for name in left)
    planned = plan(ckpt_surgeon.open(source), out, max_shard_size=size or None)
    (note,) = write(planned, threads=1)
    assert "left behind by a run that was killed" in note
    assert left[0] in note
    assert f"ckpt recover {out}" in note
    before = {path: path.read_bytes() for path in (tmp_path / "work").glob("out*") if path.is_file()}
    assert sorted(path.name for path in clear_leftovers(out)) == left
    assert all(path.read_bytes() == raw for path, raw in before.items())
    assert not any(one.startswith(".out") for one in names(tmp_path / "work"))


def test_files_of_a_run_that_is_alive_are_neither_named_nor_removed(tmp_path: Path) -> None:
    out = tmp_path / "out.pth"
    made = temporary.temporary(LocalPath(out), temporary.new_token())
    made.write_bytes(b"half")
    hold = temporary.Hold()
    hold.take(made)
    assert clear_leftovers(out) == []
    assert write(plan(checkpoint(), out), threads=1) == ()
    hold.release()
    assert clear_leftovers(out) == [made]


def test_old_files_of_a_run_that_was_killed_while_it_replaced_them_come_back(tmp_path: Path) -> None:
    out = LocalPath(tmp_path / "out-00001-of-00002.pth")
    other = LocalPath(tmp_path / "out-00002-of-00002.pth")
    token = temporary.new_token()
    out.write_bytes(b"new")
    temporary.temporary(out, token, temporary.OLD).write_bytes(b"old")
    temporary.temporary(other, token).write_bytes(b"new")
    clear_leftovers(tmp_path / "out.pth")
    assert names(tmp_path) == [out.name]
    assert out.read_bytes() == b"old"


# -- exit statuses


def ckpt(*words: object, stdout: object = subprocess.PIPE, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ckpt_surgeon", *map(str, words)]
    environment = {**os.environ, **variables}
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=120, env=environment)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize("kind", ["latin-1", "full", "closed"])
def test_an_output_that_is_there_is_exit_status_0_whatever_becomes_of_the_report(kind: str, tmp_path: Path) -> None:
    source, out = tmp_path / "in.pth", tmp_path / "out.pth"
    torch.save(STATE, source)
    if kind == "latin-1":
        ran = ckpt("convert", source, out, PYTHONIOENCODING="latin-1")
        assert "wrote" in ran.stdout
    elif kind == "full":
        with open("/dev/full", "w") as full:
            ran = ckpt("convert", source, out, stdout=full)
        assert "standard output cannot take the report" in ran.stderr
    else:
        reading, writing = os.pipe()
        os.close(reading)
        ran = ckpt("convert", source, out, stdout=writing)
        os.close(writing)
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr
    assert list(torch.load(out)) == list(STATE)


def test_an_interrupt_during_the_imports_is_status_130_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("raise KeyboardInterrupt\n")
    ran = ckpt("ls", "x.pth", PYTHONPATH=f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    assert ran.returncode == 130
    assert ran.stderr == "ckpt: interrupted, nothing was replaced\n"
