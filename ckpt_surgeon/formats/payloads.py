"""The names in bytes that a full unpickler would load again: saves and pickles inside of pickles, at any depth.

``torch.storage._load_from_bytes`` takes bytes and runs ``torch.load`` on them, without ``weights_only``.  To know what
a full load of a file would run is to look into these bytes too.
"""

from __future__ import annotations

import io
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ..errors import BrokenFile
from ..files.paths import FilePath
from ..files.spans import ByteSpan
from .pickle.machine import Load, PickleError
from .pickle.torch_objects import encode
from .pickle.unpickler import Unpickler
from .pickle.values import Constructor, Global, Inline, Object, Value, spelled
from .zip.archive import MAGIC, Member, members_of

LEGACY = 0x1950A86A20F9469CFC6C  # the first pickle of torch's legacy container
_PICKLES = 5  # that container has: its number, its version, the writer's system, the object, the storages' keys
LIMIT = 1 << 28  # bytes that are unpacked or fetched of one file for this
DEPTH = 4  # how deep bytes may lie in the arguments of a call

_CONSTRUCTORS: dict[tuple[str, str], Constructor] = {("_codecs", "encode"): encode}


class Names(NamedTuple):
    """The names in some bytes, and the calls in them that would load bytes again."""

    globals: tuple[Global, ...]
    loads: tuple[Load, ...]


def names_in_loads(path: FilePath, loads: Iterable[Load]) -> Iterator[Global]:
    """The names in all bytes that these calls would load, and in those that these would load.

    Bytes that cannot be read here are named as such: a full load may do anything with them.
    """
    left = LIMIT
    seen: dict[tuple[object, ...], Value] = {}
    ahead = deque(loads)
    while ahead:
        load = ahead.popleft()
        packages = list(_bytes_in(load.args, DEPTH))
        if not packages:
            yield Global(load.loader.module, f"{load.loader.name} of bytes that are made as the file is loaded")
        for package in packages:
            identity = (package.start, package.stop) if isinstance(package, Inline) else (id(package),)
            if identity in seen:
                continue
            seen[identity] = package
            left -= len(package)
            try:
                if left < 0:
                    raise ValueError(f"more than {LIMIT:,} bytes")
                raw = _fetched(package)
                found = names_in(path, raw, left)
            except (PickleError, BrokenFile, ValueError):
                yield Global(load.loader.module, f"{load.loader.name} of bytes that cannot be read here")
                continue
            yield from found.globals
            ahead.extend(found.loads)


def names_in(path: FilePath, raw: bytes, limit: int = LIMIT) -> Names:
    """The names that ``torch.load`` or ``pickle.loads`` of these bytes would import.

    Raises PickleError, BrokenFile or ValueError for bytes that cannot be read to their end.
    """
    if not raw.startswith(MAGIC):
        return names_in_pickles(raw)
    found: dict[Global, None] = {}
    loads: list[Load] = []
    for member in members_of(path, io.BytesIO(raw), 0, len(raw)).values():
        if member.name.lower().endswith(".pkl"):
            limit -= member.size
            if limit < 0:
                raise ValueError("packed bytes of more than can be looked through")
            names = names_in_pickles(_unpacked(raw, member))
            found.update(dict.fromkeys(names.globals))
            loads += names.loads
    return Names(tuple(found), tuple(loads))


def names_in_pickles(raw: bytes) -> Names:
    """Those of the first pickle or, where that is torch's number, of the five of its legacy container."""
    machine = Unpickler(raw, constructors=_CONSTRUCTORS, persistent=spelled)
    count = _PICKLES if machine.load() == LEGACY else 1
    for _ in range(count - 1):
        machine.load(machine.position)
    return Names(tuple(machine.globals.values()), tuple(machine.loads))


def _unpacked(raw: bytes, member: Member) -> bytes:
    packed = raw[member.start : member.start + member.packed]
    if not member.method:
        return packed
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        return unpacker.decompress(packed, member.size)
    except zlib.error as error:
        raise ValueError(f"a packed record does not unpack ({error})") from error


def _bytes_in(value: Value, depth: int) -> Iterator[bytes | Inline]:
    """The byte strings among the arguments of a call, also within io.BytesIO and the like."""
    if isinstance(value, (bytes, Inline)):
        yield value
    elif depth and isinstance(value, (tuple, list)):
        for item in value:
            yield from _bytes_in(item, depth - 1)
    elif depth and isinstance(value, Object):
        yield from _bytes_in(value.args, depth - 1)


def _fetched(package: bytes | Inline) -> bytes:
    if isinstance(package, bytes):
        return package
    return bytes(ByteSpan(package.path, package.start, package.stop).fetched())
