"""Every foreseen trouble is one line on stderr that says what, where and what to do; exit status 2; no output."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from command_line import Ran, Run
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import TABLE, ramp, rewritten, save_legacy, save_safetensors, save_shards, save_zip

import ckpt_surgeon
from ckpt_surgeon import CheckpointError
from ckpt_surgeon.files import local

STATE = {"module.fc.weight": ramp(30, 40), "module.fc.bias": ramp(30)}
COMMANDS = ("ls", "strip-prefix", "convert", "diff")


def assert_trouble(ran: Ran, *words: str) -> None:
    """One line, and it has the words that tell what is wrong."""
    assert ran.status == 2
    assert ran.out == ""
    assert ran.err.startswith("ckpt: ")
    assert ran.err.endswith("\n")
    assert ran.err.count("\n") == 1
    for word in words:
        assert word in ran.err


def tried(ckpt: Run, command: str, path: Path, out: Path) -> Ran:
    """Run a command on a file; whatever it says, it leaves no output."""
    before = set(os.listdir(out.parent))
    ran: Ran = ckpt(command, path, *{"ls": [], "diff": [path]}.get(command, [out]))
    assert set(os.listdir(out.parent)) == before
    return ran


# -- files that are no checkpoints


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4212345678\n"
OTHERS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", ("is empty",)),
    "zeros": (bytes(5000), ("zeros",)),
    "text": (b"lr: 0.1\nepochs: 3\n", ("is a text file", "lr: 0.1")),
    "HTML": (b"<!DOCTYPE html>\n<html><head><title>Sign in</title>", ("is an HTML page", "login")),
    "HTML after blanks": (b"\xef\xbb\xbf \n<html>", ("is an HTML page",)),
    "XML": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", ("is an XML page",)),
    "git-lfs pointer": (LFS, ("git-lfs pointer", "4,212,345,678 bytes", "git lfs pull")),
    "JSON": (b'{"architectures": ["BertModel"]}', ("JSON",)),
    "GGUF": (b"GGUF\x01\x00\x00\x00" + bytes(100), ("GGUF", "llama.cpp")),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(100), ("HDF5", "h5py")),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(100), ("gzip", "gunzip")),
    "NumPy": (b"\x93NUMPY\x01\x00" + bytes(100), ("NumPy",)),
    "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(100), ("PNG",)),
    "PDF": (b"%PDF-1.7\n" + bytes(100), ("PDF",)),
    "random": (bytes(range(200, 256)) * 20, ("no checkpoint",)),
    "one byte": (b"\x80", ()),
    "control characters": (b"text with \x1b[31m colour\n\x07", ()),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_that_is_something_else_is_named(kind: str, command: str, ckpt: Run, tmp_path: Path) -> None:
    content, words = OTHERS[kind]
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    ran = tried(ckpt, command, path, tmp_path / "out.pth")
    assert_trouble(ran, str(path), *words)
    assert "\x1b" not in ran.err


def test_a_zip_that_is_no_checkpoint_says_what_it_holds(ckpt: Run, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert_trouble(ckpt("ls", path), "is a zip", "'readme.txt'")
    with zipfile.ZipFile(path, "w"):
        pass
    assert_trouble(ckpt("ls", path), "nothing")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_file_is_missing(command: str, ckpt: Run, tmp_path: Path) -> None:
    ran = tried(ckpt, command, tmp_path / "gone.pth", tmp_path / "out.pth")
    assert_trouble(ran, "gone.pth: does not exist")


def test_a_missing_file_is_told_with_files_of_a_like_name(ckpt: Run, tmp_path: Path) -> None:
    save_zip(STATE, tmp_path)
    assert_trouble(ckpt("ls", tmp_path / "model.pt"), "there is model.pth")
    assert_trouble(ckpt("ls", tmp_path / "nowhere" / "model.pt"), "check the name")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_may_not_be_read_is_told(
    command: str, ckpt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_zip(STATE, tmp_path)

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(local, "open", refused, raising=False)
    assert_trouble(tried(ckpt, command, path, tmp_path / "out.pth"), str(path), "may not be read", "chmod")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permissions_may_not_be_read(ckpt: Run, tmp_path: Path) -> None:
    path = save_zip(STATE, tmp_path)
    path.chmod(0)
    assert_trouble(ckpt("ls", path), str(path), "may not be read")


def test_a_directory_that_may_not_be_written_is_told(
    ckpt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_zip(STATE, tmp_path)
    real = os.open

    def refused(name: object, flags: int, *rest: int) -> int:
        if flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, "Permission denied", str(name))
        return real(str(name), flags, *rest)

    monkeypatch.setattr(os, "open", refused)
    assert_trouble(ckpt("convert", path, tmp_path / "out.pth"), "may not be written (Permission denied)")


# -- directories


def test_a_directory_without_a_checkpoint_is_told(ckpt: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for command in COMMANDS:
        ran = ckpt(command, tmp_path, *{"ls": [], "diff": [tmp_path]}.get(command, [tmp_path / "out.pth"]))
        assert_trouble(ran, str(tmp_path), "is a directory without a checkpoint")


def test_a_directory_with_several_checkpoints_asks_for_one(ckpt: Run, tmp_path: Path) -> None:
    save_zip(STATE, tmp_path)
    save_legacy(STATE, tmp_path)
    assert_trouble(ckpt("ls", tmp_path), "'legacy.pth', 'model.pth'", "name one")


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("{", ("no JSON",)),
        ("{}", ("weight_map",)),
        ("[]", ()),
        ('{"weight_map": {"a": "gone.safetensors"}}', ("'gone.safetensors' is missing",)),
        ('{"weight_map": {"a": "../a.safetensors"}}', ("outside its directory",)),
        ('{"weight_map": {"a": 3}}', ("outside its directory",)),
        ('{"weight_map": {}}', ()),
    ],
)
def test_an_index_that_is_wrong_is_told(index: str, words: tuple[str, ...], ckpt: Run, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(index)
    assert_trouble(ckpt("ls", path), str(path), *words)


def test_a_shard_that_is_missing_or_broken_is_named(ckpt: Run, tmp_path: Path) -> None:
    index = save_shards(STATE, tmp_path, ".safetensors")
    second = tmp_path / "model-00002-of-00002.safetensors"
    os.truncate(second, 100)
    assert_trouble(ckpt("ls", index), str(second), "truncated")
    second.unlink()
    assert_trouble(ckpt("ls", index), "shard 'model-00002-of-00002.safetensors' is missing")


# -- truncated and damaged checkpoints


CONTAINERS: dict[str, Callable[[dict[str, torch.Tensor], Path], Path]] = {
    "zip": save_zip,
    "legacy": save_legacy,
    "safetensors": save_safetensors,
}


@pytest.mark.parametrize("kept", [0.001, 0.01, 0.1, 0.3, 0.5, 0.9, 0.99, 0.999, -1])
@pytest.mark.parametrize("container", CONTAINERS)
def test_a_truncated_file_is_told(container: str, kept: float, ckpt: Run, tmp_path: Path) -> None:
    path = CONTAINERS[container](STATE, tmp_path)
    size = path.stat().st_size
    os.truncate(path, size - 1 if kept < 0 else int(size * kept))
    for command in COMMANDS:
        ran = tried(ckpt, command, path, tmp_path / "out.pth")
        assert_trouble(ran, str(path))
        if kept >= 0.1:
            assert "truncated" in ran.err
            assert f"{path.stat().st_size:,}" in ran.err or "byte" in ran.err


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_file_cut_anywhere_is_never_a_traceback(container: str, tmp_path: Path) -> None:
    path = CONTAINERS[container]({"a": ramp(3), "b": ramp(2, 2).t()}, tmp_path)
    raw = path.read_bytes()
    for stop in range(len(raw)):
        path.write_bytes(raw[:stop])
        with pytest.raises(CheckpointError) as caught:
            ckpt_surgeon.open(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("container", CONTAINERS)
@given(data=st.data())
@settings(max_examples=300)
def test_a_file_with_wrong_bytes_is_never_a_traceback(
    container: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    path = CONTAINERS[container]({"a": ramp(3), "b": ramp(2, 2).t()}, folder)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    with suppress(CheckpointError):
        ckpt_surgeon.ls(path, check=True)


@given(pickled=st.binary(max_size=300), start=st.sampled_from([b"", b"\x80\x02", b"\x80\x04"]))
@settings(max_examples=300)
def test_a_pickle_of_random_bytes_is_never_a_traceback(
    pickled: bytes, start: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("random")
    path = rewritten(save_zip({}, folder), folder / "random.pth", records={"data.pkl": start + pickled})
    with suppress(CheckpointError):
        ckpt_surgeon.ls(path)


HEADERS: dict[str, tuple[object, str]] = {
    "an unknown dtype": ({"a": {"dtype": "F3", "shape": [1], "data_offsets": [0, 4]}}, "'F3'"),
    "a wrong size": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "has 4 bytes"),
    "a negative shape": ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "shape"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, "no 'data_offsets'"),
    "a gap": (
        {
            "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
            "b": {"dtype": "U8", "shape": [1], "data_offsets": [3, 4]},
        },
        "gap of 2 bytes",
    ),
    "an overlap": (
        {
            "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
            "b": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]},
        },
        "overlap",
    ),
    "bytes left over": ({"a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}, "1 bytes after"),
    "a list": ([1, 2], "no JSON object"),
    "metadata that is no text": ({"__metadata__": {"step": 3}}, "__metadata__"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_safetensors_header_that_breaks_a_rule_is_told(case: str, ckpt: Run, tmp_path: Path) -> None:
    content, word = HEADERS[case]
    header = json.dumps(content).encode()
    path = tmp_path / "model.safetensors"
    header = b"{" + header[1:] if isinstance(content, dict) else b"{" + header
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert_trouble(ckpt("ls", path), str(path), word if isinstance(content, dict) else "no JSON")


def test_a_key_that_stands_twice_in_a_header_is_told(ckpt: Run, tmp_path: Path) -> None:
    entry = '{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'
    header = f'{{"a":{entry},"a":{entry}}}'.encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert_trouble(ckpt("ls", path), "the key 'a' twice")


def test_a_storage_that_is_missing_from_a_zip_is_told(ckpt: Run, tmp_path: Path) -> None:
    source, path = save_zip(STATE, tmp_path), tmp_path / "less.pth"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            if not info.filename.endswith("data/1"):
                new.writestr(info.filename, old.read(info))
    assert_trouble(ckpt("ls", path), "data/1")


# -- outputs


@pytest.mark.parametrize("name", ["out.onnx", "out", "out.pth.gz", "out.h5", "out.txt"])
@pytest.mark.parametrize("command", ["strip-prefix", "convert"])
def test_an_output_of_an_unknown_kind_is_refused(command: str, name: str, ckpt: Run, tmp_path: Path) -> None:
    ran = tried(ckpt, command, save_zip(STATE, tmp_path), tmp_path / name)
    assert_trouble(ran, str(tmp_path / name), ".pth", ".safetensors")


@pytest.mark.parametrize("name", ["OUT.PTH", "out.Safetensors", "out.ckpt", "out.pt", "out.bin"])
def test_the_case_of_an_extension_does_not_matter(name: str, ckpt: Run, tmp_path: Path) -> None:
    assert ckpt("convert", save_zip(STATE, tmp_path), tmp_path / name).status == 0
    assert list(ckpt_surgeon.open(tmp_path / name)) == list(STATE)


@pytest.mark.parametrize("command", ["strip-prefix", "convert"])
def test_an_output_in_a_directory_that_is_missing_is_refused(command: str, ckpt: Run, tmp_path: Path) -> None:
    ran = ckpt(command, save_zip(STATE, tmp_path), tmp_path / "new" / "out.pth")
    assert_trouble(ran, f"{tmp_path / 'new'} does not exist", "mkdir -p")
    assert os.listdir(tmp_path) == ["model.pth"]


@pytest.mark.parametrize("command", ["strip-prefix", "convert"])
def test_an_existing_output_is_refused(command: str, ckpt: Run, tmp_path: Path) -> None:
    out = tmp_path / "out.pth"
    out.write_bytes(b"mine")
    ran = tried(ckpt, command, save_zip(STATE, tmp_path), out)
    assert_trouble(ran, str(out), "exists already", "--force")
    assert out.read_bytes() == b"mine"


def test_an_output_that_is_a_directory_is_refused(ckpt: Run, tmp_path: Path) -> None:
    out = tmp_path / "out.pth"
    out.mkdir()
    source = save_zip(STATE, tmp_path)
    assert_trouble(ckpt("convert", source, out), str(out))
    assert_trouble(ckpt("convert", source, out, "--force"), str(out))
    assert sorted(os.listdir(tmp_path)) == ["model.pth", "out.pth"]
    assert os.listdir(out) == []


def test_a_dtype_that_safetensors_cannot_hold_is_refused_with_the_way_out(ckpt: Run, tmp_path: Path) -> None:
    path = save_zip({**STATE, "odd": torch.zeros(2, dtype=torch.complex128)}, tmp_path)
    ran = tried(ckpt, "convert", path, tmp_path / "out.safetensors")
    assert_trouble(ran, "'odd' (complex128)", ".pth")


# -- arguments


def test_a_prefix_that_no_key_carries_is_told_with_keys_that_are_there(ckpt: Run, tmp_path: Path) -> None:
    path, out = save_zip(STATE, tmp_path), tmp_path / "out.pth"
    assert_trouble(ckpt("strip-prefix", path, out, "--prefix", "model."), "prefix 'model.'", "'module.fc.weight'")
    assert ckpt("strip-prefix", path, out).status == 0
    clean = tmp_path / "again.pth"
    assert_trouble(ckpt("strip-prefix", out, clean), "prefix 'module.'")
    assert_trouble(ckpt("strip-prefix", out, clean, "--wrappers"), "wrapper", "_orig_mod")
    assert not clean.exists()


def test_a_pattern_without_a_match_is_told_with_keys_that_are_there(ckpt: Run, tmp_path: Path) -> None:
    ran = ckpt("ls", save_zip(STATE, tmp_path), "*.bias", "conv*", "*.gamma")
    assert_trouble(ran, "'conv*'", "'*.gamma'", "'module.fc.weight'")
    assert "'*.bias'" not in ran.err


def test_an_ambiguous_selection_is_told_with_the_selections(ckpt: Run, tmp_path: Path) -> None:
    path = save_zip({"model": dict(STATE), "ema": dict(STATE)}, tmp_path)
    for command in ("strip-prefix", "convert", "diff"):
        ran = tried(ckpt, command, path, tmp_path / "out.pth")
        assert_trouble(ran, "--select model (2 tensors, 4,920 bytes)", "--select ema (2 tensors, 4,920 bytes)")


def test_a_file_without_tensors_is_told(ckpt: Run, tmp_path: Path) -> None:
    path = save_zip({"epoch": 3, "name": "run"}, tmp_path)
    for command in COMMANDS:
        assert_trouble(tried(ckpt, command, path, tmp_path / "out.pth"), str(path), "no tensor")


@pytest.mark.parametrize("size", ["5XB", "0", "-1", "many"])
def test_a_size_that_is_none_is_refused(size: str, ckpt: Run, tmp_path: Path) -> None:
    ran = ckpt("convert", save_zip(STATE, tmp_path), tmp_path / "out.pth", "--max-shard-size", size)
    assert ran.status == 2
    assert "Traceback" not in ran.err
    assert os.listdir(tmp_path) == ["model.pth"]


def test_names_that_would_change_a_terminal_are_escaped(ckpt: Run, tmp_path: Path) -> None:
    state = {"a\x1b[31m\n.weight": ramp(2), "b\r.weight": ramp(2), "fc.bias": ramp(1)}
    path = save_zip(state, tmp_path)
    for words in (["ls", path], ["ls", path, "x*"], ["strip-prefix", path, tmp_path / "out.pth"]):
        ran = ckpt(*words)
        assert "\x1b" not in ran.out + ran.err
        assert "\r" not in ran.out + ran.err
        assert ran.status == 0 or ran.err.count("\n") == 1


def test_a_state_dict_may_hold_many_bad_keys_and_the_line_stays_short(ckpt: Run, tmp_path: Path) -> None:
    state = {f"{prefix}layer{index}": ramp(1) for index in range(500) for prefix in ("", "module.")}
    ran = tried(ckpt, "strip-prefix", save_zip(state, tmp_path), tmp_path / "out.pth")
    assert_trouble(ran, "'layer0', 'module.layer0' all become 'layer0'", "and 495 more collisions")
    assert len(ran.err) < 1000


# -- as a process of its own


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "is empty"), (LFS, "4,212,345,678 bytes"), (b"<html>", "is an HTML page"), (None, "does not exist")],
)
def test_a_process_ends_with_status_2_and_one_line(
    content: bytes | None, words: str, ckpt_process: Run, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "model.pth").write_bytes(content)
    ran = ckpt_process("strip-prefix", "model.pth", "out.pth")
    assert_trouble(ran, "ckpt: model.pth: ", words)
    assert not (tmp_path / "out.pth").exists()


def test_a_process_ends_with_status_0_when_all_is_well(ckpt_process: Run, tmp_path: Path) -> None:
    save_zip(STATE, tmp_path)
    for words in (["ls", "model.pth"], ["strip-prefix", "model.pth", "out.safetensors"], ["ls", "out.safetensors"]):
        ran = ckpt_process(*words)
        assert (ran.status, ran.err) == (0, "")
        assert ran.out


def test_a_reader_that_goes_away_is_no_trouble(tmp_path: Path) -> None:
    path = save_zip({f"layer{index}.weight": ramp(1) for index in range(100)}, tmp_path)
    reader, writer = os.pipe()
    os.close(reader)
    ran = subprocess.run([sys.executable, "-m", "ckpt_surgeon", "ls", str(path)], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert ran.stderr == b""
    assert ran.returncode != 2


def test_every_table_of_tensors_can_be_listed(ckpt: Run, tmp_path: Path) -> None:
    for name, make in TABLE.items():
        path = save_zip(make(), tmp_path)
        ran = ckpt("ls", path)
        assert (ran.status, ran.err) == (0, ""), name
        listed = json.loads(ckpt("ls", path, "--json").out)
        assert [(one["name"], f"torch.{one['dtype']}", one["shape"]) for one in listed["tensors"]] == [
            (key, str(tensor.dtype), list(tensor.shape)) for key, tensor in make().items()
        ]
