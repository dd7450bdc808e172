"""Torch zips whose pickle and records disagree, and zips of other tools."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from broken_files.by_hand import Part, foreign_zip, pickled, zip_of
from broken_files.registry import Error, broken
from ckpt_surgeon import BrokenFile, NotACheckpoint


def _announced(folder: Path, *, part: Part, record: bytes = bytes(48)) -> Path:
    return zip_of(folder, pickled({"good": Part(), "bad": part}), {"0": bytes(48), "1": record})


def _part_case(name: str, part: Part, *words: str, record: bytes = bytes(48)) -> None:
    broken("zip's pickle", name, partial(_announced, part=part, record=record), *words)


_part_case("record missing", Part(key="9"), "storage '9' is missing", "data/9")
_part_case("record too short", Part(key="1", numel=12), "should have 48 bytes", "has 40", record=bytes(40))
_part_case("record too long", Part(key="1", numel=12), "should have 48 bytes", "has 56", record=bytes(56))
_part_case("offset outside", Part(offset=1), "52 bytes", "a storage that has 48")
_part_case("stride outside", Part(stride=(5, 1)), "56 bytes", "a storage that has 48")
_part_case("size outside", Part(size=(4, 4)), "64 bytes", "a storage that has 48")
_part_case("negative offset", Part(offset=-1), "negative offset -1")
_part_case("negative size", Part(size=(-3, 4)), "negative size")
_part_case("negative stride", Part(stride=(-4, 1)), "negative size or stride")
_part_case("sizes and strides of two lengths", Part(stride=(1,)), "2 sizes but 1 strides")
_part_case("size of text", Part(size=("3", "4")), "no tuple of at most 64 integers")
_part_case("offset of text", Part(offset="0"), "offset that is no integer")
_part_case("a hundred dimensions", Part(size=(1,) * 100, stride=(1,) * 100), "at most 64 integers")
_part_case(
    "elements beyond counting", Part(size=(1 << 40, 1 << 40), stride=(0, 0)), "more elements than can be counted"
)
_part_case("storage of a negative size", Part(key="1", numel=-12), "without a proper size")
_part_case("storage of a size of text", Part(key="1", numel="12"), "without a proper size")
_part_case("storage of an unknown class", Part(key="1", cls=OrderedDict), "no storage class")
_part_case("storage of another tag", Part(tag="weights"), "a tensor without a storage")


def _raw_pickle(folder: Path, *, raw: bytes) -> Path:
    return zip_of(folder, raw, {})


def _opcode_case(name: str, raw: bytes, *words: str) -> None:
    broken("zip's pickle", name, partial(_raw_pickle, raw=raw), "data.pkl is damaged", *words)


_opcode_case("empty", b"", "cut off at byte 0")
_opcode_case("cut", pickled({"a": 1, "b": 2})[:-4], "cut off")
_opcode_case("unknown opcode", b"\x80\x02}\xff.", "0xff", "at byte 3")
_opcode_case("unknown protocol", b"\x80\x06}.", "protocol 6")
_opcode_case("text longer than the file", b"X\xff\xff\xff\xff.", "announces 4,294,967,295 bytes where 1")
_opcode_case("bytes longer than the file", b"\x8e" + b"\xff" * 8 + b".", "announces 18,446,744,073,709,551,615 bytes")
_opcode_case("text that is no UTF-8", b"X\x02\x00\x00\x00\xff\xfe.", "decode")
_opcode_case("stack runs empty", b"}sR..........", "runs empty")
_opcode_case("memo entry never made", b"h\x07.", "memo entry 7")
_opcode_case("frame beyond the end", b"\x80\x04\x95\xff\xff\x00\x00\x00\x00\x00\x00N.", "65,535")
_opcode_case("items set on a number", b"K\x01K\x02K\x03s.", "items are set on a int")
_opcode_case("call without arguments", b"cos\nsystem\nK\x01R.", "arguments are no tuple")
_opcode_case("persistent id of text", b"Pstorage\n.", "persistent id")
_opcode_case("number of text", b"Ithree\n.", "invalid literal")
_opcode_case("no end", b"}", "cut off")


# -- zips of other tools


def _other_zip(name: str, records: Mapping[str, bytes], *words: str, error: Error = NotACheckpoint) -> None:
    broken("other zips", name, partial(foreign_zip, records=records), *words, error=error)


_other_zip("photos", {"a.jpg": b"x", "b.jpg": b"y"}, "is a zip, but no checkpoint", "'a.jpg', 'b.jpg'")
_other_zip("empty", {}, "is a zip", "nothing")
_other_zip("Keras", {"metadata.json": b"{}", "config.json": b"{}", "model.weights.h5": b""}, "Keras archive", "keras")
_other_zip("NumPy", {"a.npy": b"\x93NUMPY"}, "member 'a.npy' is truncated in its header", error=BrokenFile)
_other_zip("storages without a pickle", {"archive/data/0": bytes(8), "archive/version": b"3\n"}, "it has no data.pkl")
_other_zip("a checkpoint zipped again", {"model.pth": b"PK\x03\x04"}, "is a zip, but no checkpoint", "unpack it")
_other_zip("old torch.export", {"serialized_state_dict.pt": b"PK", "version": b"5"}, "serialized_state_dict.pt")
_other_zip("torch.export without weights", {"m/archive_format": b"pt2", "m/models/model.json": b"{}"},
           "torch.export", "without plain weights", error=BrokenFile)  # fmt: skip
_other_zip("torch.export, config no JSON", {"m/archive_format": b"pt2", "m/data/weights/m_weights_config.json": b"{"},
           "weights config that is damaged", error=BrokenFile)  # fmt: skip
_other_zip("torch.export, config a list", {"m/archive_format": b"pt2", "m/data/weights/m_weights_config.json": b"[]"},
           "weights config that is damaged", error=BrokenFile)  # fmt: skip
_other_zip(
    "torch.package without pickles", {"p/.data/extern_modules": b"", "p/a.py": b""}, "code only", error=BrokenFile
)


def _export(folder: Path, *, change: Mapping[str, object]) -> Path:
    meta = {
        "dtype": 7, "sizes": [{"as_int": 2}], "strides": [{"as_int": 1}], "storage_offset": {"as_int": 0},
        "device": {"type": "cpu"},
    }  # fmt: skip
    entry = {"path_name": "weight_0", "use_pickle": False, "tensor_meta": {**meta, **change}}
    config = json.dumps({"config": {"w": entry}}).encode()
    weights = {"m/data/weights/m_weights_config.json": config, "m/data/weights/weight_0": bytes(8)}
    return foreign_zip(folder, records={"m/archive_format": b"pt2", **weights})


EXPORTS: dict[str, dict[str, object]] = {
    "unknown dtype": {"dtype": 99},
    "sizes outside": {"sizes": [{"as_int": 3}]},
    "negative size": {"sizes": [{"as_int": -2}]},
    "symbolic size": {"sizes": [{"as_expr": "s0"}]},
    "no sizes": {"sizes": None},
}
for _name, _change in EXPORTS.items():
    broken("other zips", f"torch.export, {_name}", partial(_export, change=_change), "weights config that is damaged")
