"""Damaged torch zips, stored and packed."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tables import save_zip

from broken_files.locating import data_at, end_at, entry_at, header_at, zip_bytes
from broken_files.registry import broken, cut_at, patched, state, written


def _wide_end_at(raw: bytes) -> int:
    """Where the zip64 record begins that torch writes, and reads in place of the 32-bit one."""
    found: int = struct.unpack_from("<Q", raw, end_at(raw) - 12)[0]
    return found


def _changed_zip(folder: Path, *, change: Callable[[bytes], bytes]) -> Path:
    return written(change(zip_bytes()), "model.pth", folder)


def _zip_case(name: str, change: Callable[[bytes], bytes], *words: str, on_read: bool = False) -> None:
    broken("zip", name, partial(_changed_zip, change=change), *words, on_read=on_read)


TRUNCATED_ZIP = ("truncated", "--salvage")
ZIP_CUTS: dict[str, tuple[Callable[[bytes], int], tuple[str, ...]]] = {
    "in its magic": (lambda raw: 3, ("truncated", "after 3 bytes")),
    "in the first header": (lambda raw: 20, ("truncated", "after 20 bytes")),
    "in data.pkl": (lambda raw: data_at(raw, "data.pkl") + 50, TRUNCATED_ZIP),
    "after data.pkl": (lambda raw: header_at(raw, "data/0"), ("truncated", "bytes of at least 6,")),
    "in the first storage": (lambda raw: data_at(raw, "data/0") + 100, ("truncated", "bytes of at least 6,")),
    "between storages": (lambda raw: header_at(raw, "data/1"), ("truncated", "bytes of at least 6,")),
    "in the last storage": (lambda raw: data_at(raw, "data/2") + 300, TRUNCATED_ZIP),
    "before the directory": (lambda raw: raw.index(b"PK\x01\x02"), TRUNCATED_ZIP),
    "in the directory": (lambda raw: raw.index(b"PK\x01\x02") + 60, TRUNCATED_ZIP),
    "in the end record": (lambda raw: end_at(raw) + 10, TRUNCATED_ZIP),
    "by one byte": (lambda raw: len(raw) - 1, TRUNCATED_ZIP),
}

for _name, (_at, _words) in ZIP_CUTS.items():
    _zip_case(f"cut {_name}", partial(cut_at, at=_at), *_words)

_zip_case("bytes missing in the middle", lambda raw: raw[:1500] + raw[1900:], "damaged zip", "should end at byte")
_zip_case("a byte of data.pkl flipped", lambda raw: _flipped(raw, data_at(raw, "data.pkl") + 60), "data.pkl", "CRC")
_zip_case("a byte of a storage flipped", lambda raw: _flipped(raw, data_at(raw, "data/1") + 5), "CRC", on_read=True)
_zip_case("directory's first entry overwritten", lambda raw: patched(raw, raw.index(b"PK\1\2"), "<I", 0), "directory")
_zip_case(
    "more entries announced",
    lambda raw: patched(raw, _wide_end_at(raw) + 24, "<2Q", 60, 60),
    "directory breaks off at entry 10 of 60",
)
_zip_case(
    "directory elsewhere", lambda raw: patched(raw, _wide_end_at(raw) + 48, "<Q", 77), "directory breaks off at entry 1"
)
_zip_case(
    "directory beyond the end", lambda raw: patched(raw, _wide_end_at(raw) + 40, "<Q", 1 << 30), "should end at byte"
)
_zip_case("record elsewhere", lambda raw: patched(raw, entry_at(raw, "data/0") + 42, "<I", 5), "not at byte 5")
_zip_case("record beyond the end", lambda raw: patched(raw, entry_at(raw, "data/0") + 42, "<I", 9999999), "9,999,999")
_zip_case("record longer than the file",
          lambda raw: patched(raw, entry_at(raw, "data/0") + 20, "<2I", 1 << 30, 1 << 30),
          "'archive/data/0' ends at byte", "truncated")  # fmt: skip
_zip_case("record of two sizes", lambda raw: patched(raw, entry_at(raw, "data/0") + 20, "<2I", 160, 170), "two sizes")
_zip_case("encrypted record", lambda raw: patched(raw, entry_at(raw, "data/0") + 8, "<H", 1), "is encrypted", "decrypt")
_zip_case(
    "record packed by bzip2",
    lambda raw: patched(raw, entry_at(raw, "data/0") + 10, "<H", 12),
    "method 12",
    "repack",
)
_zip_case("one name twice", lambda raw: raw.replace(b"archive/data/1", b"archive/data/0"), "two records", "data/0")
_zip_case("zip64 directory lost", lambda raw: patched(_locator(raw), end_at(_locator(raw)) + 8, "<2H", 0xFFFF, 0xFFFF),
          "zip64")  # fmt: skip


def _flipped(raw: bytes, at: int) -> bytes:
    return patched(raw, at, "<B", raw[at] ^ 0x41)


def _locator(raw: bytes) -> bytes:
    return raw[: end_at(raw)] + struct.pack("<4sIQI", b"PK\x06\x07", 0, 8, 1) + raw[end_at(raw) :]


def _packed_zip(folder: Path, *, change: Callable[[bytes], bytes]) -> Path:
    source, path = save_zip(state(), folder), folder / "packed.pth"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr("archive/" + info.filename.partition("/")[2], old.read(info))
    return written(change(path.read_bytes()), "packed.pth", folder)


def _packed_case(name: str, change: Callable[[bytes], bytes], *words: str, on_read: bool = False) -> None:
    broken("packed zip", name, partial(_packed_zip, change=change), *words, on_read=on_read)


def _sizes(raw: bytes, name: str) -> tuple[int, int]:
    found: tuple[int, int] = struct.unpack_from("<2I", raw, entry_at(raw, name) + 20)
    return found


_packed_case(
    "data.pkl does not unpack", lambda raw: patched(raw, data_at(raw, "data.pkl"), "<Q", (1 << 64) - 1), "unpack"
)
_packed_case("storage does not unpack", lambda raw: patched(raw, data_at(raw, "data/0"), "<Q", (1 << 64) - 1), "unpack",
             on_read=True)  # fmt: skip
_packed_case(
    "data.pkl unpacks to less", lambda raw: patched(raw, entry_at(raw, "data.pkl") + 24, "<I", 900), "of its 900"
)
_packed_case(
    "data.pkl unpacks to more", lambda raw: patched(raw, entry_at(raw, "data.pkl") + 24, "<I", 90), "its 90 bytes"
)
_packed_case(
    "data.pkl claims a gigabyte",
    lambda raw: patched(raw, entry_at(raw, "data.pkl") + 24, "<I", 1 << 30),
    "1,073,741,824",
)
_packed_case("cut", lambda raw: raw[: data_at(raw, "data/1") + 20], *TRUNCATED_ZIP)
