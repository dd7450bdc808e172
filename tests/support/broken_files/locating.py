"""Where the parts of a torch file lie."""

from __future__ import annotations

import io
import pickle
import struct
from collections import OrderedDict

import torch

from broken_files.registry import state


def zip_bytes() -> bytes:
    out = io.BytesIO()
    torch.save(state(), out)
    return out.getvalue()


def entry_at(raw: bytes, name: str) -> int:
    """Where the directory's entry for a record begins."""
    at = raw.index(b"PK\x01\x02")
    while not raw[at + 46 :].startswith(f"archive/{name}".encode()):
        at = raw.index(b"PK\x01\x02", at + 4)
    return at


def header_at(raw: bytes, name: str) -> int:
    """Where a record's local header begins."""
    return raw.index(f"archive/{name}".encode()) - 30


def data_at(raw: bytes, name: str) -> int:
    """Where a record's bytes begin."""
    at = header_at(raw, name)
    sizes: tuple[int, int] = struct.unpack_from("<2H", raw, at + 26)
    return at + 30 + sum(sizes)


def end_at(raw: bytes) -> int:
    return raw.rindex(b"PK\x05\x06")


def legacy_bytes() -> bytes:
    out = io.BytesIO()
    torch.save(state(), out, _use_new_zipfile_serialization=False)
    return out.getvalue()


class _Skipper(pickle.Unpickler):
    """Goes over a pickle of torch's without torch's help."""

    def persistent_load(self, pid: object) -> object:
        return pid

    def find_class(self, module: str, name: str) -> object:
        return OrderedDict if name == "OrderedDict" else _nothing


def _nothing(*_: object) -> None:
    pass


def storages_at(raw: bytes) -> int:
    """Where the storages begin."""
    file = io.BytesIO(raw)
    for _ in range(5):
        _Skipper(file).load()
    return file.tell()
