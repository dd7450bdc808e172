"""Files made by structure: zips by their records and headers, pickles by their opcodes, down to single fields."""

from __future__ import annotations

import pickle as op
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from payloads import call, named, text

PROTO2 = b"\x80\x02"


@dataclass(frozen=True)
class Record:
    """A record of a zip, as its local header and the directory announce it; None stands for what is true."""

    name: str
    raw: bytes
    deflated: bool = False
    flags: int = 0
    crc32: int | None = None
    disk: int = 0
    attributes: int = 0
    extra: bytes = b""  # in the directory
    size: int | None = None  # in the directory
    packed: int | None = None
    local_name: str | None = None
    in_directory: bool = True


def zip_bytes_of(records: Iterable[Record], *, order: Iterable[int] | None = None, wide: bool = False) -> bytes:
    """A zip of these records; ``order`` is that of its directory, ``wide`` adds a zip64 record as torch does."""
    out = bytearray()
    entries = []
    for record in records:
        position = len(out)
        packed = _deflated(record.raw) if record.deflated else record.raw
        crc32 = zlib.crc32(record.raw) if record.crc32 is None else record.crc32
        method = 8 if record.deflated else 0
        local = (record.name if record.local_name is None else record.local_name).encode("utf-8", "surrogateescape")
        out += struct.pack("<4s5H3I2H", b"PK\3\4", 20, record.flags, method, 0, 0x21, crc32, len(packed),
                           len(record.raw), len(local), 0)  # fmt: skip
        out += local + packed
        if record.in_directory:
            name = record.name.encode("utf-8", "surrogateescape")
            size = len(record.raw) if record.size is None else record.size
            in_file = len(packed) if record.packed is None else record.packed
            entries.append(struct.pack(
                "<4s6H3I5H2I", b"PK\1\2", 20, 20, record.flags, method, 0, 0x21, crc32, in_file, size, len(name),
                len(record.extra), 0, record.disk, 0, record.attributes, position) + name + record.extra)  # fmt: skip
    return bytes(out) + directory_of([entries[index] for index in order or range(len(entries))], len(out), wide=wide)


def directory_of(entries: list[bytes], position: int, *, wide: bool = False) -> bytes:
    """A directory that stands at ``position``, and the records at the end."""
    central = b"".join(entries)
    tail = b""
    if wide:
        tail += struct.pack(
            "<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, len(entries), len(entries), len(central), position
        )
        tail += struct.pack("<4sIQI", b"PK\6\7", 0, position + len(central), 1)
    tail += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, len(entries), len(entries), len(central), position, 0)
    return central + tail


def _deflated(raw: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(raw) + packer.flush()


def checkpoint_records(pickle: bytes, storages: Mapping[str, bytes], root: str = "archive") -> list[Record]:
    """The records that torch.save writes."""
    return [
        Record(f"{root}/data.pkl", pickle),
        Record(f"{root}/byteorder", b"little"),
        *(Record(f"{root}/data/{key}", raw) for key, raw in storages.items()),
        Record(f"{root}/version", b"3\n"),
    ]


# -- pickles


def integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value) if -(1 << 31) <= value < 1 << 31 else _long(value)


def _long(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes((len(raw),)) + raw


def sizes(values: Iterable[int]) -> bytes:
    return op.MARK + b"".join(map(integer, values)) + op.TUPLE


def storage(numel: int = 4, *, key: bytes | None = None, cls: bytes | None = None, device: str = "cpu") -> bytes:
    """A persistent id of a storage."""
    cls = named("torch", "FloatStorage") if cls is None else cls
    key = text("0") if key is None else key
    return op.MARK + text("storage") + cls + key + text(device) + integer(numel) + op.TUPLE + op.BINPERSID


HOOKS = call("collections", "OrderedDict")


def tensor(saved: bytes, shape: Iterable[int] = (4,), stride: Iterable[int] = (1,), offset: int = 0, *more: bytes,
           function: str = "_rebuild_tensor_v2") -> bytes:  # fmt: skip
    """A call that rebuilds a tensor."""
    args = (saved, integer(offset), sizes(shape), sizes(stride), op.NEWFALSE, HOOKS, *more)
    return call("torch._utils", function, *args)


def dict_of(pairs: Mapping[str, bytes]) -> bytes:
    return op.EMPTY_DICT + op.MARK + b"".join(text(key) + value for key, value in pairs.items()) + op.SETITEMS


def program(body: bytes, protocol: int = 2) -> bytes:
    return op.PROTO + bytes((protocol,)) + body + op.STOP


def save(raw: bytes, folder: Path, name: str = "model.pt") -> Path:
    path = folder / name
    path.write_bytes(raw)
    return path
