"""Files that are damaged or something else, family by family, and what is to be said of each."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import torch
from oddities import TarOf01, TensorKey
from tables import StateDict, ramp, save_legacy, save_safetensors, save_shards, save_zip

from ckpt_surgeon import BrokenFile, CheckpointError, NotACheckpoint, SelectionError

Error = type[CheckpointError]
Change = Callable[[dict[str, Any], Path], object]  # of an index


@dataclass(frozen=True)
class Broken:
    """How a file is made, the error that opening it raises, and words of its message."""

    make: Callable[[Path], Path]
    error: Error
    words: tuple[str, ...]
    on_read: bool = False  # whether the damage lies in the which opening does not read


BROKEN: dict[tuple[str, str], Broken] = {}


def broken(
    family: str, name: str, make: Callable[[Path], Path], *words: str, error: Error = BrokenFile, on_read: bool = False
) -> None:
    assert (family, name) not in BROKEN
    BROKEN[family, name] = Broken(make, error, words, on_read)


def state() -> StateDict:
    return {"a.weight": ramp(40, 30), "a.bias": ramp(40), "b.weight": ramp(7, 11)}


def written(raw: bytes, name: str, folder: Path) -> Path:
    path = folder / name
    path.write_bytes(raw)
    return path


def tar_of(members: dict[str, bytes], name: str, folder: Path) -> Path:
    """A tar of plain files, as torch 0.1 wrote them."""
    path = folder / name
    with tarfile.open(path, "w:", format=tarfile.USTAR_FORMAT) as archive:
        for member, raw in members.items():
            info = tarfile.TarInfo(member)
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    return path


def patched(raw: bytes, at: int, form: str, *values: int) -> bytes:
    """The same bytes with numbers put in their place."""
    new = struct.pack(form, *values)
    return raw[:at] + new + raw[at + len(new) :]


def _cut(raw: bytes, *, at: Callable[[bytes], int]) -> bytes:
    return raw[: at(raw)]


# -- torch zip


def _zip_bytes() -> bytes:
    out = io.BytesIO()
    torch.save(state(), out)
    return out.getvalue()


def _central(raw: bytes, name: str) -> int:
    """Where the directory's entry for a record begins."""
    at = raw.index(b"PK\x01\x02")
    while not raw[at + 46 :].startswith(f"archive/{name}".encode()):
        at = raw.index(b"PK\x01\x02", at + 4)
    return at


def _local(raw: bytes, name: str) -> int:
    """Where a record's local header begins."""
    return raw.index(f"archive/{name}".encode()) - 30


def _data(raw: bytes, name: str) -> int:
    """Where a record's bytes begin."""
    at = _local(raw, name)
    sizes: tuple[int, int] = struct.unpack_from("<2H", raw, at + 26)
    return at + 30 + sum(sizes)


def _end(raw: bytes) -> int:
    return raw.rindex(b"PK\x05\x06")


def _changed_zip(folder: Path, *, change: Callable[[bytes], bytes]) -> Path:
    return written(change(_zip_bytes()), "model.pth", folder)


def _zip_case(name: str, change: Callable[[bytes], bytes], *words: str, on_read: bool = False) -> None:
    broken("zip", name, partial(_changed_zip, change=change), *words, on_read=on_read)


TRUNCATED_ZIP = ("truncated", "--salvage")
ZIP_CUTS: dict[str, tuple[Callable[[bytes], int], tuple[str, ...]]] = {
    "in its magic": (lambda raw: 3, ("truncated", "after 3 bytes")),
    "in the first header": (lambda raw: 20, ("truncated", "after 20 bytes")),
    "in data.pkl": (lambda raw: _data(raw, "data.pkl") + 50, TRUNCATED_ZIP),
    "after data.pkl": (lambda raw: _local(raw, "data/0"), ("truncated", "bytes of at least 6,")),
    "in the first storage": (lambda raw: _data(raw, "data/0") + 100, ("truncated", "bytes of at least 6,")),
    "between storages": (lambda raw: _local(raw, "data/1"), ("truncated", "bytes of at least 6,")),
    "in the last storage": (lambda raw: _data(raw, "data/2") + 300, TRUNCATED_ZIP),
    "before the directory": (lambda raw: raw.index(b"PK\x01\x02"), TRUNCATED_ZIP),
    "in the directory": (lambda raw: raw.index(b"PK\x01\x02") + 60, TRUNCATED_ZIP),
    "in the end record": (lambda raw: _end(raw) + 10, TRUNCATED_ZIP),
    "by one byte": (lambda raw: len(raw) - 1, TRUNCATED_ZIP),
}

for _name, (_at, _words) in ZIP_CUTS.items():
    _zip_case(f"cut {_name}", partial(_cut, at=_at), *_words)

_zip_case("bytes missing in the middle", lambda raw: raw[:1500] + raw[1900:], "damaged zip", "should end at byte")
_zip_case("a byte of data.pkl flipped", lambda raw: _flipped(raw, _data(raw, "data.pkl") + 60), "data.pkl", "CRC")
_zip_case("a byte of a storage flipped", lambda raw: _flipped(raw, _data(raw, "data/1") + 5), "CRC", on_read=True)
_zip_case("directory's first entry overwritten", lambda raw: patched(raw, raw.index(b"PK\1\2"), "<I", 0), "directory")
_zip_case(
    "more entries announced",
    lambda raw: patched(raw, _end(raw) + 8, "<2H", 60, 60),
    "directory breaks off at entry 10 of 60",
)
_zip_case("directory elsewhere", lambda raw: patched(raw, _end(raw) + 16, "<I", 77), "directory breaks off at entry 1")
_zip_case("directory beyond the end", lambda raw: patched(raw, _end(raw) + 12, "<I", 1 << 30), "should end at byte")
_zip_case("record elsewhere", lambda raw: patched(raw, _central(raw, "data/0") + 42, "<I", 5), "not at byte 5")
_zip_case("record beyond the end", lambda raw: patched(raw, _central(raw, "data/0") + 42, "<I", 9999999), "9,999,999")
_zip_case("record longer than the file",
          lambda raw: patched(raw, _central(raw, "data/0") + 20, "<2I", 1 << 30, 1 << 30),
          "'archive/data/0' ends at byte", "truncated")  # fmt: skip
_zip_case("record of two sizes", lambda raw: patched(raw, _central(raw, "data/0") + 20, "<2I", 160, 170), "two sizes")
_zip_case("encrypted record", lambda raw: patched(raw, _central(raw, "data/0") + 8, "<H", 1), "is encrypted", "decrypt")
_zip_case(
    "record packed by bzip2", lambda raw: patched(raw, _central(raw, "data/0") + 10, "<H", 12), "method 12", "repack"
)
_zip_case("one name twice", lambda raw: raw.replace(b"archive/data/1", b"archive/data/0"), "two records", "data/0")
_zip_case("zip64 directory lost", lambda raw: patched(_locator(raw), _end(_locator(raw)) + 8, "<2H", 0xFFFF, 0xFFFF),
          "zip64")  # fmt: skip


def _flipped(raw: bytes, at: int) -> bytes:
    return patched(raw, at, "<B", raw[at] ^ 0x41)


def _locator(raw: bytes) -> bytes:
    return raw[: _end(raw)] + struct.pack("<4sIQI", b"PK\x06\x07", 0, 8, 1) + raw[_end(raw) :]


def _packed_zip(folder: Path, *, change: Callable[[bytes], bytes]) -> Path:
    source, path = save_zip(state(), folder), folder / "packed.pth"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr("archive/" + info.filename.partition("/")[2], old.read(info))
    return written(change(path.read_bytes()), "packed.pth", folder)


def _packed_case(name: str, change: Callable[[bytes], bytes], *words: str, on_read: bool = False) -> None:
    broken("packed zip", name, partial(_packed_zip, change=change), *words, on_read=on_read)


def _sizes(raw: bytes, name: str) -> tuple[int, int]:
    found: tuple[int, int] = struct.unpack_from("<2I", raw, _central(raw, name) + 20)
    return found


_packed_case(
    "data.pkl does not unpack", lambda raw: patched(raw, _data(raw, "data.pkl"), "<Q", (1 << 64) - 1), "unpack"
)
_packed_case("storage does not unpack", lambda raw: patched(raw, _data(raw, "data/0"), "<Q", (1 << 64) - 1), "unpack",
             on_read=True)  # fmt: skip
_packed_case(
    "data.pkl unpacks to less", lambda raw: patched(raw, _central(raw, "data.pkl") + 24, "<I", 900), "of its 900"
)
_packed_case(
    "data.pkl unpacks to more", lambda raw: patched(raw, _central(raw, "data.pkl") + 24, "<I", 90), "its 90 bytes"
)
_packed_case(
    "data.pkl claims a gigabyte",
    lambda raw: patched(raw, _central(raw, "data.pkl") + 24, "<I", 1 << 30),
    "1,073,741,824",
)
_packed_case("cut", lambda raw: raw[: _data(raw, "data/1") + 20], *TRUNCATED_ZIP)


# -- torch zips whose pickle and records disagree; the pickle is made by hand


@dataclass(frozen=True)
class Part:
    """A tensor as the pickle announces it, and the storage that it names."""

    numel: object = 12
    offset: object = 0
    size: object = (3, 4)
    stride: object = (4, 1)
    key: object = "0"
    cls: object = torch.FloatStorage
    tag: str = "storage"

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return (
            torch._utils._rebuild_tensor_v2,
            (_Saved(self), self.offset, self.size, self.stride, False, OrderedDict()),
        )


@dataclass(frozen=True)
class _Saved:
    part: Part


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> object:
        if isinstance(value, _Saved):
            return (value.part.tag, value.part.cls, value.part.key, "cpu", value.part.numel)
        return None


def pickled(value: object, protocol: int = 2) -> bytes:
    out = io.BytesIO()
    _Pickler(out, protocol).dump(value)
    return out.getvalue()


def zip_of(folder: Path, raw: bytes, records: Mapping[str, bytes], name: str = "model.pth") -> Path:
    path = folder / name
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", raw)
        archive.writestr("archive/byteorder", b"little")
        for key, data in records.items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", b"3\n")
    return path


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


def _foreign_zip(folder: Path, *, records: Mapping[str, bytes]) -> Path:
    path = folder / "model.pth"
    with zipfile.ZipFile(path, "w") as archive:
        for name, raw in records.items():
            archive.writestr(name, raw)
    return path


def _other_zip(name: str, records: Mapping[str, bytes], *words: str, error: Error = NotACheckpoint) -> None:
    broken("other zips", name, partial(_foreign_zip, records=records), *words, error=error)


_other_zip("photos", {"a.jpg": b"x", "b.jpg": b"y"}, "is a zip, but no checkpoint", "'a.jpg', 'b.jpg'")
_other_zip("empty", {}, "is a zip", "nothing")
_other_zip("Keras", {"metadata.json": b"{}", "config.json": b"{}", "model.weights.h5": b""}, "Keras archive", "keras")
_other_zip("NumPy", {"a.npy": b"\x93NUMPY", "b.npy": b"\x93NUMPY"}, "NumPy archive (.npz)", "numpy.load")
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
    return _foreign_zip(folder, records={"m/archive_format": b"pt2", **weights})


EXPORTS: dict[str, dict[str, object]] = {
    "unknown dtype": {"dtype": 99},
    "sizes outside": {"sizes": [{"as_int": 3}]},
    "negative size": {"sizes": [{"as_int": -2}]},
    "symbolic size": {"sizes": [{"as_expr": "s0"}]},
    "no sizes": {"sizes": None},
}
for _name, _change in EXPORTS.items():
    broken("other zips", f"torch.export, {_name}", partial(_export, change=_change), "weights config that is damaged")


# -- torch legacy


def _legacy_bytes() -> bytes:
    out = io.BytesIO()
    torch.save(state(), out, _use_new_zipfile_serialization=False)
    return out.getvalue()


def legacy_of(value: object, storages: Mapping[str, bytes], *, protocol: int = 1001, keys: object = None) -> bytes:
    """A legacy file by hand; a storage's bytes begin with their count."""
    raw = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(protocol, 2)
    raw += pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, 2)
    return (
        raw
        + pickled_legacy(value)
        + pickle.dumps(list(storages) if keys is None else keys, 2)
        + b"".join(storages.values())
    )


class _LegacyPickler(pickle.Pickler):
    def persistent_id(self, value: object) -> object:
        if isinstance(value, _Saved):
            return (value.part.tag, value.part.cls, value.part.key, "cpu", value.part.numel, None)
        return None


def pickled_legacy(value: object) -> bytes:
    out = io.BytesIO()
    _LegacyPickler(out, 2).dump(value)
    return out.getvalue()


def _changed_legacy(folder: Path, *, change: Callable[[bytes], bytes]) -> Path:
    return written(change(_legacy_bytes()), "legacy.pth", folder)


class _Skipper(pickle.Unpickler):
    """Goes over a pickle of torch's without torch's help."""

    def persistent_load(self, pid: object) -> object:
        return pid

    def find_class(self, module: str, name: str) -> object:
        return OrderedDict if name == "OrderedDict" else _nothing


def _nothing(*_: object) -> None:
    pass


def _legacy_end(raw: bytes) -> int:
    """Where the storages begin."""
    file = io.BytesIO(raw)
    for _ in range(5):
        _Skipper(file).load()
    return file.tell()


LEGACY_CUTS: dict[str, tuple[Callable[[bytes], int], tuple[str, ...]]] = {
    "after the magic": (lambda raw: 15, ("truncated", "cut off")),
    "in the system's description": (lambda raw: 60, ("truncated", "at byte 53 of the pickle")),
    "in the object": (lambda raw: raw.index(b"a.bias"), ("truncated", "--salvage")),
    "before the keys": (lambda raw: _legacy_end(raw) - 3, ("truncated",)),
    "before the first storage": (_legacy_end, ("truncated", "bytes of the 5,")),
    "in a count": (lambda raw: _legacy_end(raw) + 4, ("truncated", "bytes of the 5,")),
    "in the first storage": (lambda raw: _legacy_end(raw) + 100, ("truncated", "bytes of the 5,")),
    "in the last storage": (lambda raw: len(raw) - 40, ("truncated", "bytes of the 5,")),
    "by one byte": (lambda raw: len(raw) - 1, ("truncated", "bytes of the 5,", "--salvage")),
}
for _name, (_at, _words) in LEGACY_CUTS.items():
    broken("legacy", f"cut {_name}",
           partial(_changed_legacy, change=partial(_cut, at=_at)), *_words)  # fmt: skip


def _legacy(folder: Path, *, raw: bytes) -> Path:
    return written(raw, "legacy.pth", folder)


def counted(count: int, nbytes: int) -> bytes:
    return struct.pack("<q", count) + bytes(nbytes)


for _name, _raw, _words in (
    ("another protocol", legacy_of({}, {}, protocol=1002), ("protocol 1002", "1001")),
    ("another count", legacy_of({"w": Part()}, {"0": counted(11, 48)}), ("11 elements", "announced are 12")),
    ("a key that nothing names", legacy_of({"w": Part()}, {"0": counted(12, 48), "7": b""}), ("lists a storage '7'",)),
    ("a storage that is not listed", legacy_of({"w": Part()}, {}, keys=[]), ("storage '0' is not in the file's list",)),
    ("no list of keys", legacy_of({"w": Part()}, {"0": counted(12, 48)}, keys="0"), ("list of its storages",)),
    ("offset outside", legacy_of({"w": Part(offset=5)}, {"0": counted(12, 48)}), ("68 bytes", "has 48")),
    ("negative count", legacy_of({"w": Part(numel=-1)}, {"0": counted(12, 48)}), ("without a proper size",)),
    ("storage larger than memory", legacy_of({"w": Part(numel=1 << 60)}, {"0": counted(12, 48)}), ("truncated",)),
):
    broken("legacy", _name, partial(_legacy, raw=_raw), *_words)


# -- safetensors


def safetensors_of(header: object, data: bytes = bytes(16)) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def _safetensors(folder: Path, *, raw: bytes) -> Path:
    return written(raw, "model.safetensors", folder)


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
    broken("safetensors", _name, partial(_safetensors, raw=_raw), *_words)
broken(
    "safetensors", "no tensor", partial(_safetensors, raw=safetensors_of({}, b"")), "no tensor", error=NotACheckpoint
)
broken("safetensors", "metadata only", partial(_safetensors, raw=safetensors_of({"__metadata__": {"a": "b"}}, b"")),
       "no tensor", error=NotACheckpoint)  # fmt: skip


def _unnamed(folder: Path, *, raw: bytes) -> Path:
    return written(raw, "model.bin", folder)


broken("safetensors", "length huge, under another name",
       partial(_unnamed, raw=struct.pack("<Q", 1 << 33) + b'{"a": 1}'), "header of 8,589,934,592 bytes")  # fmt: skip


# -- the tar of torch 0.1


def _tar_members() -> dict[str, bytes]:
    tar = TarOf01()
    tar.storages = {1: ("FloatStorage", ramp(12))}
    tar.tensors = {2: (1, "FloatTensor", (3, 4), (4, 1), 0)}
    return tar.members({"w": TensorKey(2)})


def _tar(folder: Path, *, change: Callable[[dict[str, bytes]], Mapping[str, bytes]], cut: int | None = None) -> Path:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:") as archive:
        for name, raw in change(_tar_members()).items():
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    return written(out.getvalue()[:cut], "old.pth", folder)


def _tensor(members: dict[str, bytes], at: int, value: int) -> dict[str, bytes]:
    """The member of tensors with one of its last numbers (from the end) changed."""
    raw = members["tensors"]
    return {**members, "tensors": patched(raw, len(raw) + 8 * at, "<q", value)}


def _without(members: dict[str, bytes], name: str) -> dict[str, bytes]:
    return {one: raw for one, raw in members.items() if one != name}


def _replaced(members: dict[str, bytes], **changed: bytes) -> dict[str, bytes]:
    return {**members, **changed}


for _name, _changed, _words in (
    ("offset outside", lambda members: _tensor(members, -1, 5), ("damaged or truncated", "has 48")),
    ("stride outside", lambda members: _tensor(members, -3, 50), ("damaged or truncated", "has 48")),
    ("negative size", lambda members: _tensor(members, -5, -3), ("negative size",)),
    ("storages missing", lambda members: _without(members, "storages"), ("tar archive, but no checkpoint",)),
    ("tensors missing", lambda members: _without(members, "tensors"), ("tar archive, but no checkpoint",)),
    ("pickle missing", lambda members: _without(members, "pickle"), ("tar archive, but no checkpoint",)),
    ("pickle empty", lambda members: _replaced(members, pickle=b""), ("damaged or truncated",)),
    ("pickle names no tensor", lambda members: _replaced(members, pickle=b"\x80\x02U\x0299Q."), ("99",)),
    ("storages empty", lambda members: _replaced(members, storages=b""), ("damaged or truncated",)),
    ("another kind of tar", lambda _: {"a.txt": b"x", "b.txt": b"y"}, ("no checkpoint", "a.txt", "tar -xf")),
):
    broken("tar", _name, partial(_tar, change=_changed), *_words)
for _length in (300, 600, 1600, 2100, 3700):
    broken("tar", f"cut at {_length}", partial(_tar, change=dict, cut=_length), "tar")


# -- plain pickles


def _pickle(folder: Path, *, raw: bytes) -> Path:
    return written(raw, "arrays.pkl", folder)


_ARRAYS = pickle.dumps({"w": np.arange(2000.0), "b": np.arange(3.0)}, 4)
for _name, _raw, _words in (
    ("cut in the head", _ARRAYS[:30], ("truncated or damaged pickle",)),
    ("cut in an array", _ARRAYS[:4000], ("truncated or damaged pickle", "announces")),
    ("cut by one byte", _ARRAYS[:-1], ("truncated or damaged pickle",)),
    ("cut, protocol 0", pickle.dumps({"w": np.arange(3.0)}, 0)[:-20], ("truncated or damaged pickle",)),
    ("cut, protocol 2", pickle.dumps({"w": np.arange(3.0)}, 2)[:-20], ("truncated or damaged pickle",)),
    ("an array too short", _ARRAYS.replace(struct.pack("<BH", 0x4D, 2000), struct.pack("<BH", 0x4D, 2001)),
     ("bytes do not fit its shape",)),
    ("an array of negative size",
     pickle.dumps({"w": np.arange(3.0)}, 2).replace(b"K\x01K\x03\x85", b"K\x01J\xff\xff\xff\xff\x85"),
     ("bytes do not fit its shape",)),
    ("storage that is no save", b"\x80\x02ctorch.storage\n_load_from_bytes\nC\x04abcd\x85R.", ("damaged",)),
    ("storage cut", pickle.dumps(ramp(5000))[:-9000], ("truncated or damaged pickle",)),
    ("tensor without a storage", b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NK\0)))NtR.", ("without a storage",)),
    ("persistent id", b"\x80\x02U\x01aQ.", ("refers to storages",)),
    ("string without quotes", b"(dp0\nSabc\nI1\ns.", ("without its quotes",)),
    ("line without an end", b"(dp0\nS'abc'", ("line without an end",)),
):  # fmt: skip
    broken("pickle", _name, partial(_pickle, raw=_raw), *_words)


# -- indexes of shards


def _index(folder: Path, *, change: Change, suffix: str = ".safetensors") -> Path:
    path = save_shards(state(), folder, suffix)
    index = json.loads(path.read_text())
    made = change(index, folder)
    path.write_bytes(made if isinstance(made, bytes) else json.dumps(made).encode())
    return path


def _mapped(**changed: object) -> Change:
    """The index with some of its map changed; None takes a key out."""

    def change(index: dict[str, Any], _: Path) -> object:
        merged = {**index["weight_map"], **{key.replace("__", "."): value for key, value in changed.items()}}
        return {**index, "weight_map": {key: value for key, value in merged.items() if value is not None}}

    return change


def _gone(name: str) -> Change:
    def change(index: dict[str, Any], folder: Path) -> object:
        (folder / name).unlink()
        return index

    return change


def _cut_shard(index: dict[str, Any], folder: Path) -> object:
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    return index


def _pointer_shard(index: dict[str, Any], folder: Path) -> object:
    written(LFS, "model-00001-of-00002.safetensors", folder)
    return index


ONE, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEXES: tuple[tuple[str, Change, tuple[str, ...], Error], ...] = (
    ("shard missing", _gone(ONE), (f"'{ONE}' is missing", "fetch the missing"), BrokenFile),
    (
        "key in another shard",
        _mapped(a__bias=SECOND),
        ("'a.bias' is not in shard", f"it is in '{ONE}'"),
        BrokenFile,
    ),
    ("key in no shard", _mapped(c=ONE), ("'c' is not in shard", "no shard has it"), BrokenFile),
    ("key that is not listed", _mapped(a__bias=None), ("has 'a.bias' that the index does not list",), BrokenFile),
    ("shard above", _mapped(c="../x.safetensors"), ("outside its directory", "'../x.safetensors'"), BrokenFile),
    ("shard above, hidden", _mapped(c="a/../../x.safetensors"), ("outside its directory",), BrokenFile),
    ("shard at an absolute path", _mapped(c="/etc/passwd"), ("outside its directory", "'/etc/passwd'"), BrokenFile),
    ("shard without a name", _mapped(c=""), ("outside its directory",), BrokenFile),
    ("shard that is a number", _mapped(c=3), ("outside its directory", "a int"), BrokenFile),
    ("shard that is a folder", _mapped(c="."), ("outside its directory",), BrokenFile),
    ("shard with a name too long", _mapped(c="x" * 5000), ("is missing",), BrokenFile),
    ("shard with a NUL in its name", _mapped(c="x\0y"), ("is missing",), BrokenFile),
    ("shard that is the index", _mapped(c="model.safetensors.index.json"), ("is an index itself",), NotACheckpoint),
    ("shard cut", _cut_shard, (SECOND, "truncated"), BrokenFile),
    ("shard a git-lfs pointer", _pointer_shard, (ONE, "git-lfs pointer", "git lfs pull"), NotACheckpoint),
    ("no weight_map", lambda *_: {"metadata": {}}, ("without a weight_map",), NotACheckpoint),
    ("weight_map a list", lambda *_: {"weight_map": []}, ("without a weight_map",), NotACheckpoint),
    ("no JSON", lambda *_: b'{"weight_map": {', ("is no JSON",), BrokenFile),
    ("no UTF-8", lambda *_: b'{"weight_map": {"\xff": 1}}', ("is no JSON",), BrokenFile),
    ("nested without end", lambda *_: b'{"a":' * 200_000, ("is no JSON",), BrokenFile),
    ("empty map", lambda *_: {"weight_map": {}}, ("no tensor",), NotACheckpoint),
)
for _name, _make, _words, _error in INDEXES:
    broken("index", _name, partial(_index, change=_make), *_words, error=_error)
broken("index", "torch shard missing", partial(_index, change=_gone("pytorch_model-00002-of-00002.bin"), suffix=".bin"),
       "'pytorch_model-00002-of-00002.bin' is missing")  # fmt: skip


# -- something else


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
    "GGUF": (b"GGUF\x03\x00\x00\x00\x23\x01\x00\x00" + bytes(50), ("GGUF file", "llama.cpp")),
    "GGML": (b"lmgg\x20\x7d\x00\x00\x00\x10\x00\x00" + bytes(50), ("GGML file", "llama.cpp")),
    "HDF5": (b"\x89HDF\r\n\x1a\n\x00\x00" + bytes(50), ("HDF5", "h5py")),
    "NumPy": (b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'}", ("NumPy array (.npy)", "numpy.load")),
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
    broken("something else", _name, partial(_unnamed, raw=_raw), *_words, error=NotACheckpoint)
broken(
    "something else", "HTML called safetensors", partial(_safetensors, raw=b"<html>"), "HTML page", error=NotACheckpoint
)
broken("something else", "pointer called safetensors", partial(_safetensors, raw=LFS), "git-lfs", error=NotACheckpoint)


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
    ("of DeepSpeed's", ("zero_to_fp32.py", "latest"), ("DeepSpeed ZeRO", "python zero_to_fp32.py")),
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


# -- what can be saved of a truncated file


@dataclass(frozen=True)
class Salvage:
    """A truncated file, the tensors that are whole in it, and those that are lost."""

    make: Callable[[Path], Path]
    whole: tuple[str, ...]
    lost: tuple[str, ...]


def _cut_to(folder: Path, *, save: Callable[[StateDict, Path], Path], at: Callable[[bytes], int]) -> Path:
    path = save(state(), folder)
    raw = path.read_bytes()
    path.write_bytes(raw[: at(raw)])
    return path


def _save_zip(value: StateDict, folder: Path) -> Path:
    return written(_zip_bytes(), "model.pth", folder)


def _legacy_first(raw: bytes) -> int:
    """The end of whichever storage comes first in a legacy file."""
    start = _legacy_end(raw)
    return start + 8 + 4 * int(struct.unpack_from("<q", raw, start)[0])


ALL = tuple(state())
SALVAGE: dict[str, Salvage] = {
    "zip, after data.pkl": Salvage(partial(_cut_to, save=_save_zip, at=lambda raw: _local(raw, "data/0")), (), ALL),
    "zip, in the second storage": Salvage(
        partial(_cut_to, save=_save_zip, at=lambda raw: _data(raw, "data/1") + 50), ALL[:1], ALL[1:]
    ),
    "zip, in the last storage": Salvage(
        partial(_cut_to, save=_save_zip, at=lambda raw: _data(raw, "data/2") + 50), ALL[:2], ALL[2:]
    ),
    "zip, in the directory": Salvage(
        partial(_cut_to, save=_save_zip, at=lambda raw: raw.index(b"PK\x01\x02") + 60), ALL, ()
    ),
    "zip, by one byte": Salvage(partial(_cut_to, save=_save_zip, at=lambda raw: len(raw) - 1), ALL, ()),
    "legacy, before the storages": Salvage(partial(_cut_to, save=save_legacy, at=_legacy_end), (), ALL),
    "safetensors, before the data": Salvage(
        partial(_cut_to, save=save_safetensors, at=lambda raw: 8 + struct.unpack("<Q", raw[:8])[0]), (), ALL
    ),
    "safetensors, by one byte": Salvage(
        partial(_cut_to, save=save_safetensors, at=lambda raw: len(raw) - 1), ALL[:2], ALL[2:]
    ),
    "shard missing": Salvage(partial(_index, change=_gone(SECOND)), ALL[:2], ALL[2:]),
    "shard cut": Salvage(partial(_index, change=_cut_shard), ALL[:2], ALL[2:]),
    "torch shard missing": Salvage(
        partial(_index, change=_gone("pytorch_model-00001-of-00002.bin"), suffix=".bin"), ALL[2:], ALL[:2]
    ),
}  # fmt: skip
