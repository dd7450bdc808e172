"""Damaged safetensors files."""

from __future__ import annotations

import struct
from functools import partial

from broken_files.by_hand import entry, safetensors_file, safetensors_of, unnamed_file
from broken_files.registry import broken
from ckpt_surgeon import NotACheckpoint

_TWO = {"a": entry(), "b": entry(offsets=(8, 16))}
for _name, _raw, _words in (
    ("length cut", b"\x10\x00\x00", ("truncated", "3 bytes of the 8")),
    ("only the length", struct.pack("<Q", 100), ("truncated", "byte 108 of 8")),
    ("header cut", safetensors_of(_TWO)[:60], ("truncated", "its header should end at byte", "of 60")),
    ("data cut", safetensors_of(_TWO)[:-1], ("truncated", "--salvage")),
    ("no data", safetensors_of(_TWO, b""), ("truncated", "tensor 'a'")),
    ("length zero", struct.pack("<Q", 0) + b"{}", ("header of 0 bytes",)),
    ("length huge", struct.pack("<Q", 1 << 40) + b"{}", ("header of 1,099,511,627,776 bytes", "limit")),
    ("length of a negative number", struct.pack("<q", -1) + b"{}", ("header of 18,446,744,073,709,551,615 bytes",)),
    ("length beyond the limit", struct.pack("<Q", 100_000_001) + b"{}", ("100,000,001", "limit is 100,000,000")),
    ("header no JSON", safetensors_of(b'{"a": }'), ("no JSON",)),
    ("header with rubbish behind", safetensors_of(b"{} x"), ("no JSON",)),
    ("header no UTF-8", safetensors_of(b'{"\xff": 1}'), ("no JSON",)),
    ("header a list", safetensors_of(b"[1, 2]"), ("where JSON has a brace",)),
    ("header a number", safetensors_of(b"1234567"), ("where JSON has a brace",)),
    ("header nested without end", safetensors_of(b'{"a":' + b"[" * 100_000), ("no JSON",)),
    ("a key twice", safetensors_of(b'{"a": {"dtype": "F32"}, "a": {"dtype": "F32"}}'), ("'a' twice",)),
    ("a field twice", safetensors_of(b'{"a": {"dtype": "F32", "dtype": "F16"}}'), ("'dtype' twice",)),
    ("tensor no object", safetensors_of({"a": 5}), ("'a' is no object",)),
    ("no dtype", safetensors_of({"a": {"shape": [2], "data_offsets": [0, 8]}}), ("'a' has no 'dtype'",)),
    ("no shape", safetensors_of({"a": {"dtype": "F32", "data_offsets": [0, 8]}}), ("'a' has no 'shape'",)),
    ("no offsets", safetensors_of({"a": {"dtype": "F32", "shape": [2]}}), ("'a' has no 'data_offsets'",)),
    ("dtype unknown", safetensors_of({"a": entry("F7")}), ("dtype 'F7'", "not known")),
    ("dtype of torch's spelling", safetensors_of({"a": entry("float32")}), ("dtype 'float32'",)),
    ("dtype a number", safetensors_of({"a": entry(32)}), ("dtype 32",)),
    ("dtype a list", safetensors_of({"a": entry(["F32"])}), ("dtype ['F32']",)),
    ("shape negative", safetensors_of({"a": entry(shape=[-2])}), ("shape", "non-negative integers")),
    ("shape of floats", safetensors_of({"a": entry(shape=[2.0])}), ("shape", "non-negative integers")),
    ("shape of bools", safetensors_of({"a": entry(shape=[True, 2])}), ("shape", "non-negative integers")),
    ("shape a number", safetensors_of({"a": entry(shape=2)}), ("shape", "no list")),
    ("shape null", safetensors_of({"a": entry(shape=None)}), ("shape", "no list")),
    (
        "shape that overflows",
        safetensors_of({"a": entry(shape=[1 << 62, 1 << 62])}),
        ("more elements than can be counted",),
    ),
    (
        "shape that wraps to zero",
        safetensors_of({"a": entry(shape=[1 << 32, 1 << 32], offsets=[0, 0])}),
        ("can be counted",),
    ),
    ("shape of a hundred sizes", safetensors_of({"a": entry(shape=[1] * 100)}), ("can be counted",)),
    ("shape of huge numbers", safetensors_of({"a": entry(shape=[10**4000] * 50)}), ("can be counted",)),
    (
        "shape of numbers without end",
        safetensors_of(b'{"a":{"dtype":"F32","shape":[' + b"9" * 9999 + b"]}}"),
        ("no JSON",),
    ),
    ("one offset", safetensors_of({"a": entry(offsets=[0])}), ("1 data_offsets instead of 2",)),
    ("three offsets", safetensors_of({"a": entry(offsets=[0, 8, 16])}), ("3 data_offsets",)),
    ("offsets negative", safetensors_of({"a": entry(offsets=[-8, 0])}), ("data_offsets", "non-negative")),
    ("offsets of floats", safetensors_of({"a": entry(offsets=[0.0, 8.0])}), ("data_offsets",)),
    ("end before begin", safetensors_of({"a": entry(offsets=[8, 0])}), ("ends at data byte 0, before it begins at 8",)),
    ("too few bytes", safetensors_of({"a": entry(shape=[3])}), ("has 8 bytes", "needs 12")),
    ("too many bytes", safetensors_of({"a": entry(shape=[1])}), ("has 8 bytes", "needs 4")),
    (
        "overlap",
        safetensors_of({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)),
        ("'a' and tensor 'b' overlap",),
    ),
    ("the same bytes twice", safetensors_of({"a": entry(), "b": entry()}, bytes(8)), ("'a' and tensor 'b' overlap",)),
    ("gap", safetensors_of({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)), ("gap of 4 bytes",)),
    ("gap before the first", safetensors_of({"a": entry(offsets=[8, 16])}), ("the header and tensor 'a'", "gap of 8")),
    ("bytes behind the last", safetensors_of({"a": entry()}), ("8 bytes after its last tensor",)),
    ("bytes and no tensor", safetensors_of({}), ("16 bytes after its last tensor",)),
    (
        "offsets beyond the end",
        safetensors_of({"a": entry(offsets=[1 << 40, (1 << 40) + 8])}),
        ("1,099,511,627,784 of 16",),
    ),
    ("metadata no object", safetensors_of({"__metadata__": [1], **_TWO}), ("__metadata__", "string to string")),
    (
        "metadata of numbers",
        safetensors_of({"__metadata__": {"step": 3}, **_TWO}),
        ("__metadata__", "string to string"),
    ),
):
    broken("safetensors", _name, partial(safetensors_file, raw=_raw), *_words)
broken(
    "safetensors",
    "no tensor",
    partial(safetensors_file, raw=safetensors_of({}, b"")),
    "no tensor",
    error=NotACheckpoint,
)
broken("safetensors", "metadata only", partial(safetensors_file, raw=safetensors_of({"__metadata__": {"a": "b"}}, b"")),
       "no tensor", error=NotACheckpoint)  # fmt: skip


broken("safetensors", "length huge, under another name",
       partial(unnamed_file, raw=struct.pack("<Q", 1 << 33) + b'{"a": 1}'),
       "header of 8,589,934,592 bytes")  # fmt: skip
