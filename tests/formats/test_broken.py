"""Each broken file is told from the others in one line with a remedy, exit status 2, no traceback and no output."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from broken_files import ALL, BROKEN, SALVAGE, Part, counted, legacy_of, state
from command_line import Run
from tables import assert_same

import ckpt_surgeon
from ckpt_surgeon import CheckpointError

CASES = [pytest.param(*names, id="-".join(names)) for names in BROKEN]


# What the command line calls by its flags is in Python an argument or a call.
IN_PYTHON = {
    "--salvage": "salvage=True",
    "--select model": "select='model'",
    "--select ema": "select='ema'",
    "ckpt ls --all": "ckpt_surgeon.ls(…, all=True)",
}


@pytest.mark.parametrize(("family", "name"), CASES)
def test_its_error_says_what_is_wrong(family: str, name: str, tmp_path: Path) -> None:
    one = BROKEN[family, name]
    path = one.make(tmp_path)
    if one.on_read:
        opened = ckpt_surgeon.open(path)
    with pytest.raises(CheckpointError) as caught:
        ckpt_surgeon.hash(opened) if one.on_read else ckpt_surgeon.open(path)
    assert isinstance(caught.value, one.error)
    for word in one.words:
        assert IN_PYTHON.get(word, word) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["ls", "convert"])
@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_command_says_it_in_one_line_and_leaves_nothing(
    family: str, name: str, command: str, ckpt: Run, tmp_path: Path
) -> None:
    one = BROKEN[family, name]
    path = one.make(tmp_path)
    if name in ("two state_dicts", "hundred state_dicts") and command == "ls":
        pytest.skip("ls shows them all")
    before = set(os.listdir(tmp_path))
    ran = ckpt(command, path, *(["--check"] if command == "ls" else [tmp_path / "out.pth"]))
    assert (ran.status, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert ran.err.startswith("ckpt: ")
    assert ran.err[:-1].isprintable()
    for word in one.words:
        assert word in ran.err
    assert set(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("name", SALVAGE)
def test_what_is_whole_in_a_truncated_file_comes_out_bit_for_bit(name: str, ckpt: Run, tmp_path: Path) -> None:
    one = SALVAGE[name]
    path = one.make(tmp_path)
    with pytest.raises(CheckpointError):
        ckpt_surgeon.open(path)
    opened = ckpt_surgeon.open(path, salvage=True)
    assert_same(ckpt_surgeon.load(opened), {key: state()[key] for key in one.whole}, order=False)
    (note,) = opened.notes if one.lost else ("",)
    assert f"{len(one.lost):,} of {len(ALL):,} tensors" in note or not one.lost
    for key in one.lost:
        assert repr(key) in note
    listed = ckpt("ls", path, "--salvage")
    assert listed.status == 0
    assert note in listed.out
    out = tmp_path / "saved.pth"
    ran = ckpt("convert", path, out, "--salvage")
    if not one.whole:
        assert (ran.status, ran.err.count("\n")) == (2, 1)
        return
    assert (ran.status, ran.err) == (0, "")
    assert note in ran.out
    assert_same(ckpt_surgeon.load(out), {key: state()[key] for key in one.whole}, order=False)


def test_legacy_storages_are_salvaged_up_to_the_cut(tmp_path: Path) -> None:
    raw = legacy_of({"a": Part(), "b": Part(key="1")}, {"0": counted(12, 48), "1": counted(12, 48)})
    path = tmp_path / "legacy.pth"
    for cut, whole in ((0, ["a", "b"]), (1, ["a"]), (50, ["a"]), (57, [])):
        path.write_bytes(raw[: len(raw) - cut])
        assert list(ckpt_surgeon.open(path, salvage=True)) == whole
