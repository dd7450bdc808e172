"""Zip archives as torch writes them: an index of places, and a writer that lets the kernel move the bytes.

Python's ``zipfile`` neither tells where a member's bytes lie nor writes a member from another file's bytes, and
takes a second for 100,000 members.  The format is PKWARE's APPNOTE 6.3.3, of which torch uses a little: stored
members, zip64, a padding field (id ``FB``) that puts each record on a 64-byte boundary.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from ...errors import Argument, BrokenFile, Phrase
from ...files.fetched import ensure_all_fetched
from ...files.paths import FilePath
from ...files.spans import ByteSpan
from ...tensors.storage import Storage

MAGIC = b"PK\x03\x04"
ALIGNMENT = 64  # bytes, as torch.save aligns
PAGE = 4096
PAGE_WORTH = 1 << 16  # records from this size on are placed so that their pages agree with the source's

READ_LIMIT = 1 << 30  # bytes that may be read of one file into memory whole (its pickles, some JSON, source code)
DEFLATE_RATIO = 1032  # the most that deflate can pack

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_DESCRIPTOR = struct.Struct("<4s3I")
_DESCRIPTOR64 = struct.Struct("<4sI2Q")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_STORED, _DEFLATED = 0, 8


TRUNCATED = Phrase(
    "fetch it again and compare its size with the original's (", Argument("salvage", True), " takes what is whole)"
)


def matches(head: bytes) -> bool:
    """Whether a file that begins so is a zip."""
    return head.startswith((MAGIC, b"PK\x05\x06")) or (1 < len(head) < len(MAGIC) and MAGIC.startswith(head))


class Truncated(BrokenFile):
    """A zip without its directory, of which :func:`scan_archive` may still find records."""


class Member(NamedTuple):
    """One record: ``start`` is where its bytes begin in the file."""

    name: str
    method: int
    crc32: int
    packed: int  # bytes in the file
    size: int  # bytes once unpacked
    header: int
    start: int

    def storage(self, path: FilePath, device: str = "cpu", big_endian: bool = False, checked: bool = True) -> Storage:
        """The record as a storage that tensors can lie in."""
        span = ByteSpan(path, self.start, self.start + self.packed)
        crc32 = self.crc32 if checked else None
        return Storage(span, self.size, device, crc32, self.method == _DEFLATED, big_endian)


class Archive:
    """The index of a zip file: ``members`` by name, in the order of the directory."""

    def __init__(self, path: FilePath, members: dict[str, Member]) -> None:
        self.path = path
        self.members = members
        self.replaced: dict[str, bytes] = {}  # records as they are planned to be
        self._left = READ_LIMIT
        # torch can be told to write no checksums (set_crc32_options(False)); they are all zero then
        self.has_checksums = any(member.crc32 for member in members.values())
        self._by_folded_name: dict[bytes, Member] | None = None

    def find(self, name: str) -> Member | None:
        """A record by its name, in capitals or not: torch's zip reader (miniz) takes both for one."""
        if name in self.members:
            return self.members[name]
        if self._by_folded_name is None:
            self._by_folded_name = {_folded(other): member for other, member in self.members.items()}
        return self._by_folded_name.get(_folded(name))

    @property
    def folder(self) -> str:
        """The folder of the first record, with its slash: torch reads what lies in it.  "" where it lies in none."""
        first = next(iter(self.members), "")
        return first.partition("/")[0] + "/" if "/" in first else ""

    def read(self, name: str) -> bytes:
        """The bytes of one small member, checked.  Raises BrokenFile when its CRC does not match."""
        if name in self.replaced:
            return self.replaced[name]
        member = self.members[name]
        self._left -= member.size
        if self._left < 0:
            raise BrokenFile(
                self.path,
                f"record {name!r} claims {member.size:,} bytes; of such records a file may have {READ_LIMIT:,}",
                "fetch the file again",
            )
        raw = b"".join(member.storage(self.path, checked=False).blocks())
        if self.has_checksums and zlib.crc32(raw) != member.crc32:
            raise BrokenFile(self.path, f"record {name!r} is damaged (its CRC does not match)", "fetch the file again")
        return raw


def _folded(name: str) -> bytes:
    """A name with its ASCII letters small, as miniz compares names."""
    return name.encode("utf-8", "surrogateescape").lower()


def read_archive(path: FilePath, place: ByteSpan | None = None, *, folds_names: bool = True) -> Archive:
    """Read the directory of a zip: a whole file, or one that lies at ``place`` in it.

    With ``folds_names`` it is one of torch's: see :func:`check_names`.  Raises BrokenFile when it is truncated or its
    offsets point outside.
    """
    base, size = (place.start, len(place)) if place is not None else (0, path.size)
    with path.opened() as file:
        return Archive(path, members_of(path, file, base, size, folds_names=folds_names))


def members_of(path: FilePath, file: BinaryIO, base: int, size: int, *, folds_names: bool = True) -> dict[str, Member]:
    """The records of a zip that lies in an open file from byte ``base`` on, in the order of its directory."""
    count, where, length = _find_directory(path, file, base, size)
    file.seek(base + where)
    directory = file.read(length)
    members = {}
    for member in _members(path, file, directory, count, base, size):
        if member.name in members:
            raise BrokenFile(path, f"has two records called {member.name!r}")
        members[member.name] = member
    if folds_names:
        check_names(path, members)
    return members


def check_names(path: FilePath, members: dict[str, Member]) -> None:
    """Raise BrokenFile for names that are equal but for capitals: which of their records torch reads is chance."""
    if len(set(map(str.lower, members))) == len(members):
        return
    seen: dict[bytes, str] = {}
    for name in members:
        other = seen.setdefault(_folded(name), name)
        if other != name:
            problem = f"has records {other!r} and {name!r}, which are one name for torch's zip reader"
            raise BrokenFile(path, problem, "do not use it: it can be read in two ways")


def _find_directory(path: FilePath, file: BinaryIO, base: int, size: int) -> tuple[int, int, int]:
    """Entries, offset and length of the central directory."""
    most = _END.size + _FULL16 + _LOCATOR.size  # where a comment is as long as it may be
    for reach in (min(path.reach, most), most):
        tail_start = max(size - reach, 0)
        path.fetch_ahead([(base + tail_start, base + size)])  # the directory is there, too, or begins there
        file.seek(base + tail_start)
        tail = file.read(size - tail_start)
        at = tail.rfind(b"PK\x05\x06", 0, max(len(tail) - _END.size + 4, 0))
        if at >= _LOCATOR.size:
            break
    if at < 0:
        raise Truncated(path, f"is a truncated zip: it ends after {size:,} bytes without its directory", TRUNCATED)
    _, disk, directory_disk, here, count, length, where, _ = _END.unpack_from(tail, at)
    wide = _find_wide_directory(path, file, base, size, tail[max(at - _LOCATOR.size, 0) : at])
    if wide is not None:
        disk, directory_disk, here, count, length, where = wide
    elif (count == _FULL16 or _FULL32 in (length, where)) and tail.startswith(b"PK\x06\x07", at - _LOCATOR.size):
        raise BrokenFile(path, "is a damaged zip: its zip64 directory is not where it should be")
    if here != count or (disk, directory_disk) not in ((0, 0), (0, 1), (1, 0), (1, 1)):
        raise BrokenFile(
            path, f"is one part of a zip in several: it has {here:,} of {count:,} records", "join the parts"
        )
    if where + length > tail_start + at:
        problem = f"is a damaged zip: its directory should end at byte {where + length:,} of {size:,}"
        raise Truncated(path, problem, TRUNCATED)
    return count, where, length


def _find_wide_directory(
    path: FilePath, file: BinaryIO, base: int, size: int, locator: bytes
) -> tuple[int, int, int, int, int, int] | None:
    """The two disks, the entries on this one and in all, length and offset, from the zip64 record; None without one.

    It counts whenever a locator leads to it, also where the 32-bit record would do: so does miniz.
    """
    if len(locator) < _LOCATOR.size or not locator.startswith(b"PK\x06\x07"):
        return None
    _, _, end64, _ = _LOCATOR.unpack(locator)
    if end64 > size - _END64.size:
        problem = f"is a damaged zip: its zip64 directory should end at byte {end64 + _END64.size:,} of {size:,}"
        raise Truncated(path, problem, TRUNCATED)
    file.seek(base + end64)
    raw = file.read(_END64.size)
    if len(raw) < _END64.size or not raw.startswith(b"PK\x06\x06"):
        return None
    _, rest, _, _, disk, directory_disk, here, count, length, where = _END64.unpack(raw)
    if rest < _END64.size - 12:
        raise BrokenFile(path, "is a damaged zip: its zip64 directory claims to be shorter than it is")
    return disk, directory_disk, here, count, length, where


def _members(
    path: FilePath, file: BinaryIO, directory: bytes, count: int, base: int, file_size: int
) -> Iterator[Member]:
    entries: Iterator[Member] = (
        entry._replace(header=base + entry.header) for entry in _entries(path, directory, count)
    )
    if path.remote is not None:  # all local headers at a time
        entries = iter(listed := list(entries))
        headers = ((entry.header, entry.header + _LOCAL.size) for entry in listed)
        path.fetch_ahead([(start, stop) for start, stop in headers if stop <= base + file_size])
    for entry in entries:
        start = _start(path, file, entry.name, entry.header)
        if start + entry.packed > base + file_size:
            end = start + entry.packed
            raise BrokenFile(path, f"is truncated: record {entry.name!r} ends at byte {end:,} of {file_size:,}")
        yield entry._replace(start=start)


def _entries(path: FilePath, directory: bytes, count: int) -> Iterator[Member]:
    """What the directory tells of the members: all but where their bytes start."""
    at = 0
    for index in range(count):
        if directory[at : at + 4] != b"PK\x01\x02" or at + _CENTRAL.size > len(directory):
            raise BrokenFile(path, f"is a damaged zip: its directory breaks off at entry {index + 1:,} of {count:,}")
        (_, _, _, flags, method, _, _, crc32, packed, size, name_length, extra_length, comment_length, disk, _,
         attributes, header) = _CENTRAL.unpack_from(directory, at)  # fmt: skip
        at += _CENTRAL.size
        name = str(directory[at : at + name_length], "utf-8", "surrogateescape")
        at += name_length
        if _FULL32 in (packed, size, header):
            try:
                packed, size, header = _wide(directory[at : at + extra_length], packed, size, header)
            except struct.error:
                raise BrokenFile(path, f"is a damaged zip: record {name!r} has no proper zip64 sizes") from None
        at += extra_length + comment_length
        if flags & _SCRAMBLED:
            raise BrokenFile(path, f"record {name!r} is encrypted", "decrypt the archive first")
        if disk not in (0, 1):
            raise BrokenFile(path, f"record {name!r} lies in another part of a zip in several", "join the parts")
        if size and (name.endswith("/") or attributes & _IS_FOLDER):
            raise BrokenFile(path, f"record {name!r} is a folder and has {size:,} bytes", "do not use it")
        if method not in (_STORED, _DEFLATED):
            raise BrokenFile(path, f"record {name!r} is packed by method {method}", "repack it with deflate or stored")
        if method == _STORED and packed != size:
            raise BrokenFile(path, f"record {name!r} is stored but claims two sizes ({packed:,} and {size:,} bytes)")
        if size > packed * DEFLATE_RATIO:
            raise BrokenFile(path, f"record {name!r} claims {size:,} bytes unpacked, more than {packed:,} can hold")
        yield Member(name, method, crc32, packed, size, header, 0)


def _wide(extra: bytes, packed: int, size: int, header: int) -> tuple[int, int, int]:
    """Take the 64-bit values out of the first zip64 field (id 1): size, packed, header, those that are needed.

    Raises struct.error when they are not there.
    """
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if at + 4 + length > len(extra):
            break
        if kind == 1:
            values = iter([value for (value,) in struct.iter_unpack("<Q", extra[at + 4 : at + 4 + length // 8 * 8])])
            try:
                size = next(values) if size == _FULL32 else size
                packed = next(values) if packed == _FULL32 else packed
                header = next(values) if header == _FULL32 else header
            except StopIteration:
                break
            return packed, size, header
        at += 4 + length
    raise struct.error("no zip64 field")


def _start(path: FilePath, file: BinaryIO, name: str, header: int) -> int:
    """Where a member's bytes begin; only its local header knows."""
    file.seek(header)
    raw = file.read(_LOCAL.size)
    if len(raw) < _LOCAL.size or not raw.startswith(MAGIC):
        raise BrokenFile(path, f"is a damaged zip: record {name!r} is not at byte {header:,}")
    return header + _LOCAL.size + raw[26] + (raw[27] << 8) + raw[28] + (raw[29] << 8)


def checksum_places(path: FilePath, member: Member) -> list[int]:
    """Where in a file the CRC of a stored record is written: its local header, its data descriptor, the directory."""
    crc32 = struct.pack("<I", member.crc32)
    end = member.start + member.packed
    with path.opened() as file:

        def at(position: int) -> bytes:
            file.seek(position)
            return file.read(4)

        places = [member.header + 14, _entry(file, path, member.name) + 16]
        if at(member.header + 6)[0] & _DESCRIBED:
            places.append(end + 4 if at(end) == b"PK\x07\x08" else end)
        return [place for place in places if at(place) == crc32]


def _entry(file: BinaryIO, path: FilePath, name: str) -> int:
    """Where in a file the directory's entry of a record begins."""
    _, where, length = _find_directory(path, file, 0, path.size)
    file.seek(where)
    directory = file.read(length)
    wanted = name.encode("utf-8", "surrogateescape")
    at = 0
    while at < length:
        name_length, extra_length, comment_length = struct.unpack_from("<3H", directory, at + 28)
        at += _CENTRAL.size
        if directory[at : at + name_length] == wanted:
            return where + at - _CENTRAL.size
        at += name_length + extra_length + comment_length
    raise BrokenFile(path, f"has changed: record {name!r} is gone")


def scan_archive(path: FilePath) -> Archive:
    """Find the whole records of a zip without its directory, one after another from the beginning.

    A record whose local header does not tell its size (torch's) ends at the data descriptor that does.
    """
    members: dict[str, Member] = {}
    with path.mapped() as data:
        ensure_all_fetched(data)
        at = 0
        while data[at : at + 4] == MAGIC and at + _LOCAL.size <= len(data):
            _, _, flags, method, _, _, crc32, packed, size, name_length, extra_length = _LOCAL.unpack_from(data, at)
            name = str(data[at + _LOCAL.size : at + _LOCAL.size + name_length], "utf-8", "surrogateescape")
            start = at + _LOCAL.size + name_length + extra_length
            if flags & _DESCRIBED and not packed:
                described = _descriptor(data, start)
                if described is None:
                    break
                crc32, packed, size, after = described
            else:
                extra = data[at + _LOCAL.size + name_length : start]
                try:
                    packed, size, _ = _wide(extra, packed, size, 0) if packed == _FULL32 else (packed, size, 0)
                except struct.error:
                    break
                after = start + packed
            if after > len(data) or method not in (_STORED, _DEFLATED):
                break
            members[name] = Member(name, method, crc32, packed, size, at, start)
            at = after
    return Archive(path, members)


def _descriptor(data: mmap.mmap, start: int) -> tuple[int, int, int, int] | None:
    """CRC, packed and unpacked size of the record at ``start`` and the position after its data descriptor."""
    at = data.find(b"PK\x07\x08", start)
    while at >= 0:
        for form in (_DESCRIPTOR, _DESCRIPTOR64):
            if at + form.size <= len(data):
                _, crc32, packed, size = form.unpack_from(data, at)
                if packed == at - start and data[at + form.size : at + form.size + 2] in (b"PK", b""):
                    return crc32, packed, size, at + form.size
        at = data.find(b"PK\x07\x08", at + 1)
    return None


class Directory:
    """Builds a zip's index while its records are written one after another.

    ``local`` gives the header to write before a record's bytes, ``finish`` what comes after the last record.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[bytes, int, int, int, int]] = []  # name, size, checksum, position, flags

    def local(
        self,
        name: str,
        size: int,
        crc32: int,
        position: int,
        *,
        source_start: int | None = None,
        described: bool = False,
    ) -> bytes:
        """The local header for a record at ``position``, padded so that its bytes begin on a 64-byte boundary,
        or, for a large record copied from ``source_start``, at the same place in a page as there, if that is one.

        A ``described`` record's checksum is not known yet: a :meth:`descriptor` behind its bytes will tell it.
        """
        encoded = name.encode("utf-8")
        wide = struct.pack("<2H2Q", 1, 16, size, size) if size >= _FULL32 else b""
        bare = position + _LOCAL.size + len(encoded) + len(wide) + 4
        in_page = source_start is not None and source_start % ALIGNMENT == 0 and size >= PAGE_WORTH
        padding = ((source_start or 0) - bare) % PAGE if in_page else -bare % ALIGNMENT
        extra = wide + struct.pack("<2s H", b"FB", padding) + b"Z" * padding
        self._entries.append((encoded, size, crc32, position, _UTF8 | _DESCRIBED if described else _UTF8))
        narrow = 0 if described and not wide else min(size, _FULL32)
        fixed = _LOCAL.pack(
            MAGIC, 45 if wide else 20, self._entries[-1][-1], _STORED, 0, _DAY_ZERO, crc32, narrow, narrow,
            len(encoded), len(extra),
        )  # fmt: skip
        return fixed + encoded + extra

    def descriptor(self) -> bytes:
        """What follows the bytes of a described record: its checksum and sizes."""
        _, size, crc32, _, _ = self._entries[-1]
        form = _DESCRIPTOR64 if size >= _FULL32 else _DESCRIPTOR
        return form.pack(b"PK\x07\x08", crc32, size, size)

    def set_crc32(self, crc32: int) -> tuple[int, bytes]:
        """Put the checksum of the last record right; returns the position and the bytes to write there."""
        encoded, size, _, position, flags = self._entries[-1]
        self._entries[-1] = (encoded, size, crc32, position, flags)
        return position + 14, struct.pack("<I", crc32)

    def finish(self, position: int) -> bytes:
        """The central directory and the end records, to be written at ``position``."""
        central = b"".join(self._central(*entry) for entry in self._entries)
        count = len(self._entries)
        tail = b""
        if count >= _FULL16 or len(central) >= _FULL32 or position >= _FULL32:
            end64 = position + len(central)
            size_of_rest = _END64.size - 12
            tail = _END64.pack(b"PK\x06\x06", size_of_rest, 45, 45, 0, 0, count, count, len(central), position)
            tail += _LOCATOR.pack(b"PK\x06\x07", 0, end64, 1)
        narrow = min(count, _FULL16)
        end = _END.pack(b"PK\x05\x06", 0, 0, narrow, narrow, min(len(central), _FULL32), min(position, _FULL32), 0)
        return central + tail + end

    @staticmethod
    def _central(encoded: bytes, size: int, crc32: int, position: int, flags: int) -> bytes:
        wide = b""
        if size >= _FULL32:
            wide += struct.pack("<2Q", size, size)
        if position >= _FULL32:
            wide += struct.pack("<Q", position)
        extra = struct.pack("<2H", 1, len(wide)) + wide if wide else b""
        narrow = min(size, _FULL32)
        version = 45 if wide else 20
        fixed = _CENTRAL.pack(
            b"PK\x01\x02", version, version, flags, _STORED, 0, _DAY_ZERO, crc32, narrow, narrow,
            len(encoded), len(extra), 0, 0, 0, 0, min(position, _FULL32),
        )  # fmt: skip
        return fixed + encoded + extra


_SCRAMBLED = 0x2061  # flags: encrypted, a patch, strongly encrypted, its header masked; miniz reads none of these
_IS_FOLDER = 0x10  # MS-DOS's attribute
_UTF8 = 0x0800  # flag: names are UTF-8
_DESCRIBED = 0x0008  # flag: a descriptor behind the bytes tells checksum and sizes
_DAY_ZERO = 0x21  # 1980-01-01, the first day that a zip can say: outputs do not depend on the clock
