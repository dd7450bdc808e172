"""Zips that other tools and other machines made."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from tables import noise, ramp, rewritten, save_big_endian, save_legacy, save_zip

from unusual_files.registry import UnusualFile, unusual, weights


def _zip(folder: Path, change: Callable[[zipfile.ZipFile, zipfile.ZipFile], None]) -> UnusualFile:
    source, path = save_zip(weights(), folder), folder / "other.pth"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        change(old, new)
    return UnusualFile(path, torch.load(source))


@unusual("zip", "members packed")
def _packed(folder: Path) -> UnusualFile:
    state = {**weights(), "large": ramp(1000, 300), "t": ramp(30, 40).t()}
    path = rewritten(save_zip(state, folder), folder / "packed.pth", method=zipfile.ZIP_DEFLATED)
    return UnusualFile(path, state)


@unusual("zip", "other members and a comment")
def _extra_members(folder: Path) -> UnusualFile:
    def change(old: zipfile.ZipFile, new: zipfile.ZipFile) -> None:
        for info in old.infolist():
            new.writestr(info, old.read(info))
        new.writestr("archive/notes.txt", "hello")
        new.writestr("__MACOSX/._data.pkl", b"\0\5\x16\7")
        new.writestr("empty/", b"")
        new.comment = b"made by hand, PK or not"

    return _zip(folder, change)


@unusual("zip", "folder of another name")
def _renamed_folder(folder: Path) -> UnusualFile:
    def change(old: zipfile.ZipFile, new: zipfile.ZipFile) -> None:
        for info in old.infolist():
            new.writestr("größe v1.0/" + info.filename.partition("/")[2], old.read(info))

    return _zip(folder, change)


@unusual("zip", "no folder")
def _no_folder(folder: Path) -> UnusualFile:
    def change(old: zipfile.ZipFile, new: zipfile.ZipFile) -> None:
        for info in old.infolist():
            new.writestr(info.filename.partition("/")[2], old.read(info))

    return _zip(folder, change)


@unusual("zip", "a second archive inside")
def _second_inside(folder: Path) -> UnusualFile:
    def change(old: zipfile.ZipFile, new: zipfile.ZipFile) -> None:
        for info in old.infolist():
            new.writestr(info, old.read(info))
        new.writestr("a/data.pkl", pickle.dumps({"decoy": 1}, 2))

    return _zip(folder, change)


@unusual("zip", "members in another order")
def _reversed(folder: Path) -> UnusualFile:
    def change(old: zipfile.ZipFile, new: zipfile.ZipFile) -> None:
        for info in reversed(old.infolist()):
            new.writestr(info, old.read(info))

    return _zip(folder, change)


@unusual("zip", "members without sizes before them")
def _streamed(folder: Path) -> UnusualFile:
    class Stream(io.RawIOBase):
        """Cannot seek, so that zipfile writes data descriptors."""

        def __init__(self) -> None:
            self.raw = bytearray()

        def writable(self) -> bool:
            return True

        def write(self, raw: object) -> int:
            self.raw += bytes(raw)  # type: ignore[call-overload]
            return len(bytes(raw))  # type: ignore[call-overload]

    source, path, stream = save_zip(weights(), folder), folder / "streamed.pth", Stream()
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(stream, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    path.write_bytes(stream.raw)
    return UnusualFile(path, torch.load(source))


@unusual("big-endian", "zip")
def _big_zip(folder: Path) -> UnusualFile:
    state = {
        "a": ramp(3, 4),
        "half": ramp(5).half(),
        "c": noise("complex64", 3),
        "i": torch.arange(4),
        "b": noise("uint8", 3),
    }
    path = save_big_endian(state, folder)
    return UnusualFile(path, torch.load(path))


@unusual("big-endian", "zip, members packed")
def _big_packed(folder: Path) -> UnusualFile:
    path = rewritten(save_big_endian(weights(), folder), folder / "packed.pth", method=zipfile.ZIP_DEFLATED)
    return UnusualFile(path, weights())


@unusual("big-endian", "legacy")
def _big_legacy(folder: Path) -> UnusualFile:
    path = save_legacy(weights(), folder)
    raw = path.read_bytes()
    flag = raw.index(b"\x88", raw.index(b"little_endian"))
    path.write_bytes(raw[:flag] + b"\x89" + raw[flag + 1 :])
    return UnusualFile(path, torch.load(path))
