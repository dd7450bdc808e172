"""A file that changes in place is wholly old or wholly new, whatever stops the change and whatever stops recovering."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from command_line import Run
from hypothesis import given
from hypothesis import strategies as st
from tables import ramp, save_safetensors, save_zip

import ckpt_surgeon
from ckpt_surgeon import FileError, plan_in_place, recover, rename_in_place, step
from ckpt_surgeon.files import journal
from ckpt_surgeon.files.journal import Patch

STRIP = step("strip_prefix")
STATE = {"module.fc.weight": ramp(3, 4), "module.fc.bias": ramp(3)}
SAVED = {"zip": save_zip, "safetensors": save_safetensors}


class Stop(BaseException):
    """What ends a change in the middle."""


@pytest.fixture(params=SAVED)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return SAVED[request.param](STATE, tmp_path)


def renamed(path: Path) -> bytes:
    """The bytes of a file once it is renamed; the file itself stays as it is."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copy(path, folder))
        rename_in_place(copy, STRIP)
        return copy.read_bytes()


def stopped(path: Path, monkeypatch: pytest.MonkeyPatch, *, writes: int) -> None:
    """Begin a rename in place and stop it after so many writes; the first of them is the journal's."""
    left = iter(range(writes))
    real = os.pwrite

    def write(descriptor: int, raw: bytes, offset: int) -> int:
        if next(left, None) is None:
            real(descriptor, raw[: len(raw) // 2], offset)
            raise Stop
        return real(descriptor, raw, offset)

    monkeypatch.setattr(os, "pwrite", write)
    with pytest.raises(Stop):
        rename_in_place(path, STRIP)
    monkeypatch.setattr(os, "pwrite", real)
    assert journal.journal_path(path).exists()


def left_beside(path: Path) -> list[str]:
    return sorted(name for name in os.listdir(path.parent) if name != path.name)


# -- killed at every call


DRIVER = """
import os, shutil, sys, traceback
from pathlib import Path
import ckpt_surgeon

DEAD = 77
CALLS = ("open", "pwrite", "fsync", "replace", "unlink", "close")
STRIP = ckpt_surgeon.step("strip_prefix")
scratch = Path(sys.argv[1])
source = scratch / sys.argv[2]


def die(after, half):
    left = [after]
    for name in CALLS:
        def call(*args, real=getattr(os, name), name=name):
            if left[0] == 0:
                if half and name == "pwrite":
                    real(args[0], args[1][: len(args[1]) // 2], args[2])
                os._exit(DEAD)
            left[0] -= 1
            return real(*args) if name != "open" else real(*args[:2], *args[2:])
        setattr(os, name, call)


def dies(action, after, half):
    child = os.fork()
    if child == 0:
        try:
            die(after, half)
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, DEAD), status
    return status == DEAD


def fresh(folder, like):
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(like, folder)
    return folder / source.name


def settled(path):
    checkpoint = ckpt_surgeon.open(path)
    raw = path.read_bytes()
    assert raw in (old, new), "neither old nor new"
    assert list(checkpoint) == (olds if raw == old else news)
    assert os.listdir(path.parent) == [path.name], os.listdir(path.parent)
    return "old" if raw == old else "new"


first = scratch / "first"
first.mkdir()
shutil.copy(source, first)
old, olds = source.read_bytes(), list(ckpt_surgeon.open(source))
ckpt_surgeon.rename_in_place(source, STRIP)
new, news = source.read_bytes(), list(ckpt_surgeon.open(source))
assert old != new

counts = {"old": 0, "new": 0}
again = 0
for half in (False, True):
    for after in range(1000):
        path = fresh(scratch / "at", first)
        died = dies(lambda: ckpt_surgeon.rename_in_place(path, STRIP), after, half)
        stopped = scratch / "stopped"
        fresh(stopped, path.parent)
        counts[settled(path)] += 1
        if not died:
            assert path.read_bytes() == new
            break
        for half_again in (False, True):
            for later in range(1000):
                path = fresh(scratch / "again", stopped)
                died_again = dies(lambda: ckpt_surgeon.open(path), later, half_again)
                settled(path)
                again += 1
                if not died_again:
                    break
print(after, counts["old"], counts["new"], again)
"""


@pytest.mark.parametrize("name", SAVED)
def test_a_file_is_whole_after_a_kill_at_any_call_and_at_any_call_of_its_recovery(name: str, tmp_path: Path) -> None:
    source = SAVED[name](STATE, tmp_path)
    done = subprocess.run([sys.executable, "-c", DRIVER, tmp_path, source.name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calls, old, new, again = map(int, done.stdout.split())
    assert calls >= 12
    assert min(old, new) >= 4
    assert again > 8 * calls


# -- what lies on the disk after a crash


@given(data=st.data())
def test_any_mixture_of_old_and_new_bytes_becomes_the_new_file_or_the_old(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = save_zip(STATE, Path(folder))
        old, patches = path.read_bytes(), plan_in_place(path, STRIP).patches
        new = renamed(path)
        journal._write_journal(journal.journal_path(path), journal._Journal(len(old), patches))
        mixed = bytearray(old)
        places = [patch.offset + index for patch in patches for index in range(len(patch.new))]
        for place in data.draw(st.lists(st.sampled_from(places), max_size=len(places))):
            mixed[place] = new[place]
        path.write_bytes(mixed)
        back = data.draw(st.booleans())
        outcome = recover(path, roll_back=back)
        assert outcome == ("rolled back" if back or mixed == old else "finished")
        assert path.read_bytes() == (old if outcome == "rolled back" else new)
        assert left_beside(path) == []


def test_the_next_command_finishes_and_says_so(path: Path, ckpt: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = path.read_bytes(), renamed(path)
    for writes in range(1, 1 + len(plan_in_place(path, STRIP).patches)):
        path.write_bytes(old)
        stopped(path, monkeypatch, writes=writes)
        assert path.read_bytes() not in (old, new)
        ran = ckpt("ls", path)
        assert ran.status == 0
        assert "a rename in place was interrupted, and was finished now" in ran.out
        assert "module." not in ran.out
        assert (path.read_bytes(), left_beside(path)) == (new, [])


def test_a_rename_that_is_tried_again_says_that_it_is_done(
    path: Path, ckpt: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = renamed(path)
    stopped(path, monkeypatch, writes=1)
    ran = ckpt("strip-prefix", "--in-place", path)
    assert ran.status == 2
    assert "matches no key" in ran.err
    assert "a rename in place was interrupted, and was finished now" in ran.err
    assert path.read_bytes() == new


@pytest.mark.parametrize(("words", "said"), [([], "is finished"), (["--roll-back"], "as it was before")])
def test_recover_finishes_or_takes_back(
    words: list[str], said: str, path: Path, ckpt: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = path.read_bytes(), renamed(path)
    stopped(path, monkeypatch, writes=1)
    ran = ckpt("recover", path, *words)
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.startswith(f"{path}: ")
    assert said in ran.out
    assert path.read_bytes() == (old if words else new)
    assert ckpt("recover", path).out == f"{path}: nothing to recover\n"
    assert ckpt("recover", f"{path}.not").err == f"ckpt: {path}.not: does not exist; check the name\n"


def test_a_folder_s_file_is_recovered_too(path: Path, ckpt: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(path, monkeypatch, writes=1)
    assert "is finished" in ckpt("recover", path.parent).out
    assert ckpt("recover", path.parent / "no such file").status == 2


def test_a_link_is_renamed_and_recovered_where_it_leads(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "links" / f"link{path.suffix}"
    link.parent.mkdir()
    link.symlink_to(path)
    new = renamed(path)
    stopped(link, monkeypatch, writes=1)
    assert journal.journal_path(link).parent == path.parent
    assert sorted(ckpt_surgeon.open(link)) == ["fc.bias", "fc.weight"]
    assert (link.is_symlink(), path.read_bytes()) == (True, new)


# -- journals that are damaged, or another file's


def resealed(raw: bytes) -> bytes:
    return raw + hashlib.sha256(raw).digest()


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "cut off": lambda raw: raw[: len(raw) // 2],
    "without its checksum": lambda raw: raw[:-1],
    "one bit": lambda raw: raw[:100] + bytes((raw[100] ^ 1,)) + raw[101:],
    "no JSON": lambda raw: resealed(b"ckpt-journal 1\nnothing\n"),
    "no patches": lambda raw: resealed(b'ckpt-journal 1\n{"size": 9}\n'),
    "patches outside": lambda raw: resealed(b'ckpt-journal 1\n{"size": 9, "patches": [[-1, 1]]}\nab'),
    "too few bytes": lambda raw: resealed(b'ckpt-journal 1\n{"size": 9, "patches": [[0, 2]]}\nab'),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_journal_that_is_not_whole_was_never_acted_on_and_goes(
    name: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, patches = path.read_bytes(), plan_in_place(path, STRIP).patches
    journal._write_journal(journal.journal_path(path), journal._Journal(len(old), patches))
    place = journal.journal_path(path)
    place.write_bytes(BROKEN[name](place.read_bytes()))
    assert sorted(ckpt_surgeon.open(path)) == sorted(STATE)
    assert path.read_bytes() == old
    assert left_beside(path) == []


def test_a_whole_journal_of_another_version_is_left_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(path, monkeypatch, writes=1)
    half, place = path.read_bytes(), journal.journal_path(path)
    place.write_bytes(resealed(place.read_bytes()[:-32].replace(b"journal 1", b"journal 9", 1)))
    with pytest.raises(FileError, match=r"ckpt-journal beside it is of another version of ckpt; recover it with that"):
        ckpt_surgeon.open(path)
    assert (path.read_bytes(), place.exists()) == (half, True)


def test_what_a_kill_leaves_of_a_journal_goes(path: Path) -> None:
    old = path.read_bytes()
    place = journal.journal_path(path)
    place.with_name(place.name + ".tmp").write_bytes(b"ckpt-jour")
    assert sorted(ckpt_surgeon.open(path)) == sorted(STATE)
    assert (path.read_bytes(), left_beside(path)) == (old, [])


@pytest.mark.parametrize("how", ["another size", "other bytes", "one other byte"])
def test_a_file_that_is_not_the_journal_s_is_left_alone(
    how: str, path: Path, ckpt: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = renamed(path)
    stopped(path, monkeypatch, writes=1)
    patch = journaled(path)
    other = bytearray(new)
    if how == "another size":
        other += b"more"
    else:
        at, count = patch.offset, len(patch.new) if how == "other bytes" else 1
        other[at : at + count] = bytes((byte ^ 0x80) for byte in other[at : at + count])
    path.write_bytes(other)
    for words in (["ls", path], ["recover", path], ["recover", path, "--roll-back"]):
        ran = ckpt(*words)
        assert ran.status == 2
        assert f"{path}: has changed since .{path.name}.ckpt-journal was written" in ran.err
        assert f"if the file is as you want it, remove {journal.journal_path(path)}" in ran.err
    assert path.read_bytes() == other
    journal.journal_path(path).unlink()


def journaled(path: Path) -> Patch:
    """The first patch of the journal beside a file."""
    found = journal._read_journal(path, journal.journal_path(path))
    assert found is not None
    return found.patches[0]


def test_a_file_saved_anew_over_one_that_was_interrupted_keeps_its_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_zip(STATE, tmp_path)
    stopped(path, monkeypatch, writes=1)
    torch.save({key: tensor + 1 for key, tensor in STATE.items()}, path)
    saved = path.read_bytes()
    assert list(ckpt_surgeon.open(path)) == list(STATE)
    assert path.read_bytes() == saved


def test_a_file_that_ckpt_replaces_has_no_journal_any_more(
    path: Path, tmp_path: Path, ckpt: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = save_zip({"other.a": ramp(7)}, tmp_path / "..")
    stopped(path, monkeypatch, writes=1)
    assert ckpt("convert", other, path, "--force").status == 0
    assert left_beside(path) == []
    assert list(ckpt_surgeon.open(path)) == ["other.a"]
    other.unlink()


# -- others


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "rb")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Another process is at the file."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield
        process.communicate("")


def test_two_processes_do_not_change_one_file_at_once(path: Path, ckpt: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = path.read_bytes(), renamed(path)
    busy = f"ckpt: {path}: another process is renaming its keys in place right now; try again\n"
    with held(path):
        assert ckpt("strip-prefix", "--in-place", path).err == busy
        assert (path.read_bytes(), left_beside(path)) == (old, [])
        place = journal.journal_path(path)
        place.with_name(place.name + ".tmp").write_bytes(b"being written")
        assert ckpt("ls", path).status == 0, "the file is untouched so far"
        assert len(left_beside(path)) == 1
    stopped(path, monkeypatch, writes=1)
    half = path.read_bytes()
    with held(path):
        assert ckpt("ls", path).err == busy
        assert ckpt("recover", path).err == busy
        assert path.read_bytes() == half
    assert ckpt("ls", path).status == 0
    assert path.read_bytes() == new


def test_a_plan_is_not_carried_out_on_a_file_that_has_changed(path: Path) -> None:
    planned = plan_in_place(path, STRIP)
    rename_in_place(path, STRIP)
    new = path.read_bytes()
    with pytest.raises(FileError, match="has changed since it was read, nothing was written; try again"):
        journal.apply(path, planned.patches)
    assert (path.read_bytes(), left_beside(path)) == (new, [])


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's powers, where the tests have them."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user may enter."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_a_folder_that_may_not_be_written_is_told(public: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_zip(STATE, public)
    path.chmod(0o666)
    old, new = path.read_bytes(), renamed(path)
    public.chmod(0o555)
    with as_nobody(), pytest.raises(FileError, match=r"its folder may not be written \(Permission denied\)"):
        rename_in_place(path, STRIP)
    assert path.read_bytes() == old
    public.chmod(0o755)
    stopped(path, monkeypatch, writes=1)
    public.chmod(0o555)
    with as_nobody(), pytest.raises(FileError, match="its folder may not be written to finish a rename in place"):
        ckpt_surgeon.open(path)
    assert path.read_bytes() == new
    public.chmod(0o755)
    assert list(ckpt_surgeon.open(path)) == ["fc.weight", "fc.bias"]
    assert left_beside(path) == []


def test_a_file_that_may_not_be_written_is_told(public: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_zip(STATE, public)
    public.chmod(0o777)
    path.chmod(0o444)
    with (
        as_nobody(),
        pytest.raises(FileError, match=r"may not be written \(Permission denied\); change the permissions"),
    ):
        rename_in_place(path, STRIP)
    path.chmod(0o644)
    stopped(path, monkeypatch, writes=1)
    half = path.read_bytes()
    path.chmod(0o444)
    with as_nobody(), pytest.raises(FileError, match="may not be written to finish a rename in place that was interr"):
        ckpt_surgeon.open(path)
    assert path.read_bytes() == half
    assert len(left_beside(path)) == 1


def test_a_full_disk_leaves_the_file_as_it_is(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = path.read_bytes()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(FileError, match=r"could not be written \(No space left on device\); nothing was changed"):
            rename_in_place(path, STRIP)
    assert (path.read_bytes(), left_beside(path)) == (old, [])


def test_a_name_too_long_for_a_journal_is_told(tmp_path: Path) -> None:
    path = save_zip(STATE, tmp_path).rename(tmp_path / f"{'n' * 240}.pth")
    old = path.read_bytes()
    assert list(ckpt_surgeon.open(path)) == list(STATE)
    with pytest.raises(FileError, match="File name too long"):
        rename_in_place(path, STRIP)
    assert path.read_bytes() == old


@pytest.mark.parametrize("head", [b"", b"ckpt-journal 2\n"])
def test_a_sparse_journal_costs_neither_memory_nor_time(head: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"w": torch.ones(3)}, path)
    journal.journal_path(path).write_bytes(head)
    os.truncate(journal.journal_path(path), 3 << 30)
    tracemalloc.start()
    assert list(ckpt_surgeon.open(path)) == ["w"]
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 32 << 20
    assert os.listdir(tmp_path) == ["model.pth"]
