"""Files of other kinds, directories, and files that hold more, or less, than one state_dict."""

from __future__ import annotations

import gzip
from functools import partial
from pathlib import Path

from tables import ramp, save_zip

from broken_files.by_hand import safetensors_file, unnamed_file
from broken_files.registry import Error, broken, state
from ckpt_surgeon import NotACheckpoint, SelectionError

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 346123456\n"
OTHERS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "git-lfs pointer": (LFS, ("git-lfs pointer", "346,123,456 bytes", "git lfs pull")),
    "HTML": (b"<!doctype html><title>Sign in</title>", ("HTML page", "login or quota")),
    "HTML without a doctype": (b"\n\n<html lang=en>", ("HTML page",)),
    "XML": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', ("XML page", "error page")),
    "text": (b"Not found\n", ("text file", "'Not found'")),
    "a list of words": (b"cat\ndog\nperson\nqueen\n", ("text file", "cat")),
    "YAML": (b"lr: 0.1\nmodel: resnet\n", ("text file",)),
    "JSON": (b'{"architectures": ["Bert"]}', ("JSON file", "weight_map")),
    "empty": (b"", ("is empty",)),
    "zeros": (bytes(100_000), ("zeros",)),
    "random bytes": (bytes(range(130, 256)) * 9, ("no checkpoint that is known here",)),
    "gzip": (gzip.compress(b"x" * 1000, mtime=0), ("gzip", "gunzip")),
    "bzip2": (b"BZh91AY&SY" + bytes(50), ("bzip2",)),
    "xz": (b"\xfd7zXZ\x00\x00" + bytes(50), ("xz archive", "unxz")),
    "zstd": (b"\x28\xb5\x2f\xfd\x04" + bytes(50), ("zstd", "unzstd")),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(50), ("7z",)),
    "RAR": (b"Rar!\x1a\x07\x01\x00" + bytes(50), ("RAR",)),
    "GGUF": (b"GGUF\x01\x00\x00\x00\x23\x01\x00\x00" + bytes(50), ("GGUF file", "llama.cpp")),
    "GGML": (b"lmgg\x20\x7d\x00\x00\x00\x10\x00\x00" + bytes(50), ("GGML file", "llama.cpp")),
    "HDF5": (b"\x89HDF\r\n\x1a\n\x00\x00" + bytes(50), ("HDF5", "h5py")),
    "Flax": (b"\x81\xa6params\x82\xa6Conv_0\x82" + bytes(50), ("msgpack", "flax")),
    "Flax, larger": (b"\x84\xa4step\xcd\x01\x00\xa6params" + bytes(50), ("msgpack", "flax")),
    "ONNX": (b"\x08\x08\x12\x07pytorch\x1a\x052.0.0:\xb0\x01" + bytes(50), ("ONNX", "onnx.load")),
    "TFLite": (b"\x1c\x00\x00\x00TFL3\x00\x00\x12\x00" + bytes(50), ("TensorFlow Lite",)),
    "TensorFlow graph": (b"\n\x28\n\x05input\x12\x0bPlaceholder*\x0c\n\x05dtype\x12\x03" + bytes(50), ("TensorFlow",)),
    "PDF": (b"%PDF-1.7\n", ("PDF",)),
    "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(50), ("PNG",)),
    "JPEG": (b"\xff\xd8\xff\xe0" + bytes(50), ("JPEG",)),
    "program": (b"\x7fELF\x02\x01" + bytes(50), ("program",)),
    "one byte": (b"\x80", ("no checkpoint",)),
    "control characters": (b"\x1b[31mred\x07\x00", ("no checkpoint",)),
}  # fmt: skip
for _name, (_raw, _words) in OTHERS.items():
    broken("something else", _name, partial(unnamed_file, raw=_raw), *_words, error=NotACheckpoint)
broken(
    "something else",
    "HTML called safetensors",
    partial(safetensors_file, raw=b"<html>"),
    "HTML page",
    error=NotACheckpoint,
)
broken(
    "something else", "pointer called safetensors", partial(safetensors_file, raw=LFS), "git-lfs", error=NotACheckpoint
)


# -- directories


def _folder(folder: Path, *, names: tuple[str, ...]) -> Path:
    inner = folder / "model"
    inner.mkdir()
    for name in names:
        (inner / name).write_bytes(b"")
    return inner


for _name, _names, _words in (
    ("empty", (), ("directory without a checkpoint",)),
    ("of other files", ("config.json", "vocab.txt"), ("directory without a checkpoint",)),
    ("of several", ("a.pth", "b.pth"), ("directory with 2 checkpoints", "'a.pth', 'b.pth'", "name one")),
    ("of DeepSpeed's", ("zero_to_fp32.py", "latest"), ("DeepSpeed ZeRO", "name the folder of one step")),
):
    broken("directory", _name, partial(_folder, names=_names), *_words, error=NotACheckpoint)


# -- files that hold more, or less, than one state_dict


def _saved(folder: Path, *, value: object) -> Path:
    return save_zip(value, folder)


_deep: dict[str, object] = {"w": ramp(2)}
for _ in range(60):
    _deep = {"x": _deep, "y": ramp(1, 2)}
SELECTIONS: tuple[tuple[str, object, tuple[str, ...], Error], ...] = (
    ("no tensor", {"epoch": 3}, ("no tensor", "ckpt ls --all"), NotACheckpoint),
    ("nothing", None, ("no tensor (None)",), NotACheckpoint),
    (
        "two state_dicts",
        {"model": state(), "ema": state()},
        ("2 state_dicts", "--select model", "--select ema"),
        SelectionError,
    ),
    (
        "hundred state_dicts",
        [{"w": ramp(1)} for _ in range(100)],
        ("100 state_dicts", "80 more"),
        SelectionError,
    ),
    ("one key as a number and as text", {1: ramp(2), "1": ramp(3)}, ("two tensors are called '1'",), SelectionError),
    ("dicts sixty deep", _deep, ("without end",), SelectionError),
)
for _name, _value, _words, _error in SELECTIONS:
    broken("selection", _name, partial(_saved, value=_value), *_words, error=_error)
