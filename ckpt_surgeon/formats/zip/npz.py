"""NumPy's archive of arrays, ``.npz``: a zip with one ``.npy`` for each key; that of MLX too.

The elements of a stored member are a span of the file, whose checksum follows from the member's; packed ones are
unpacked when they are read.  Members that are no numbers are listed and left aside; arrays of objects are read by the
inert unpickler.  What is written is what ``numpy.savez`` writes, except that elements begin on a 64-byte boundary; a
bfloat16 goes as ``V2``, as ml_dtypes and MLX write it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from functools import partial
from typing import BinaryIO

from ...errors import BrokenFile, EditError, listed
from ...files.paths import FilePath
from ...files.prefetch import reading_ahead
from ...files.sinks import Sink
from ...files.spans import ByteSpan
from ...tensors.dtypes import BY_NAME, DType
from ...tensors.records import ComputedTensor, ExtraState, OpaqueTensor, Tensor, spans_of, unseen_span
from ...tensors.storage import Storage
from ...tensors.stored import StoredTensor
from ...tensors.strides import row_major
from .. import npy
from ..contents import Contents
from ..payloads import names_in_loads
from ..pickle.machine import Load, Unpickled
from ..pickle.values import Global, Value
from . import checksums
from .archive import Archive, Directory, Member

CONTAINER = "NumPy archive (.npz)"
SUFFIXES: tuple[str, ...] = (".npz",)
HOLDS_EXTRA_STATES = False
SUFFIX = ".npy"  # of members
NAME_LIMIT = 0xFFFF  # bytes of a member's name
AGAIN = "fetch the file again"
_BYTES = BY_NAME["uint8"]
_HEAD = 256  # bytes that nearly all headers fit in


# -- reading


def holds(archive: Archive) -> bool:
    """Whether a zip has arrays of numpy's."""
    return any(name.endswith(SUFFIX) for name in archive.members)


def read(archive: Archive, *, salvage: bool = False) -> Contents:
    """Read the headers of all arrays.  Raises BrokenFile naming the member that is damaged."""
    path = archive.path
    arrays = [member for member in archive.members.values() if member.name.endswith(SUFFIX)]
    others = [name for name in archive.members if not name.endswith((SUFFIX, "/"))]
    path.fetch_ahead([(one.start, one.start + min(one.packed, _HEAD)) for one in arrays])
    notes = [f"members that are no arrays, not read: {listed(others, 3)}"] if others else []
    root: dict[Value, Value] = {}
    names: dict[Global, None] = {}
    loads: list[Load] = []
    with path.opened() as file:
        for member in arrays:
            raw, header = _header(path, file, member)
            value, made = _value(archive, member, raw, header)
            root[member.name.removesuffix(SUFFIX)] = value
            notes += [npy.BFLOAT16] if header.code == "V2" and npy.BFLOAT16 not in notes else []
            if made is not None:
                names.update(dict.fromkeys(made.globals))
                loads += made.loads
    return Contents(path, CONTAINER, root, notes=tuple(notes), globals=tuple(names),
                    globals_inside=partial(names_in_loads, path, loads))  # fmt: skip


def _header(path: FilePath, file: BinaryIO, member: Member) -> tuple[bytes, npy.Header]:
    """The header of one array, as bytes and parsed; no more is read or unpacked than a header may have."""
    for most in (_HEAD, npy.HEADER_LIMIT + 16):
        file.seek(member.start)
        raw = file.read(min(member.packed, most))
        try:
            if member.method:
                raw = zlib.decompressobj(-zlib.MAX_WBITS).decompress(raw, most)
            header = npy.parse_header(raw)
            return raw[: header.start], header
        except (ValueError, zlib.error) as error:
            problem = str(error)
    raise BrokenFile(path, f"member {member.name!r} {problem}", AGAIN)


def _value(archive: Archive, member: Member, raw: bytes, header: npy.Header) -> tuple[Value, Unpickled | None]:
    """What one member holds: a tensor, the objects of its pickle, or what stands for elements that are no numbers."""
    if header.code == "O":
        made = npy.objects_in(archive.path, archive.read(member.name), header)
        return made.root, made
    if header.dtype is None or header.nbytes is None:
        return npy.left_aside(header), None
    there = member.size - header.start
    if there < header.nbytes:
        problem = f"member {member.name!r} has {there:,} bytes of elements; its shape {list(header.shape)} of "
        raise BrokenFile(archive.path, f"{problem}{header.dtype} needs {header.nbytes:,}", AGAIN)
    return _tensor(archive, member, raw, header, header.dtype), None


def _tensor(archive: Archive, member: Member, raw: bytes, header: npy.Header, dtype: DType) -> StoredTensor:
    """An array as a span of the file or, where its member is packed, as a part of what that unpacks to."""
    there = member.size - header.start
    stride = npy.strides_of(header)
    if not member.method:
        crc32 = checksums.behind(member.crc32, zlib.crc32(raw), there) if archive.has_checksums else None
        span = ByteSpan(archive.path, member.start + header.start, member.start + member.size)
        storage = Storage(span, there, crc32=crc32, big_endian=header.big)
        return StoredTensor(dtype, header.shape, stride, 0, storage)
    packed = member.storage(archive.path, checked=archive.has_checksums)
    elements = StoredTensor(_BYTES, (there,), (1,), header.start, packed)
    unpacked = ComputedTensor(_BYTES, (there,), (elements,), lambda inputs: inputs[0].blocks())
    return StoredTensor(dtype, header.shape, stride, 0, Storage(None, there, big_endian=header.big, source=unpacked))


# -- writing


def check(tensors: Mapping[str, Tensor]) -> None:
    """Raise EditError naming every tensor that this container cannot hold."""
    problems = []
    for key, tensor in tensors.items():
        if isinstance(tensor, (OpaqueTensor, ExtraState)):
            problems.append(f"{key!r} ({tensor.kind})")
        elif tensor.dtype.name not in npy.CODES_BY_NAME:
            problems.append(f"{key!r} ({tensor.dtype})")
        elif len(f"{key}{SUFFIX}".encode("utf-8", "replace")) > NAME_LIMIT:
            problems.append(f"a key of {len(key):,} characters")
    if problems:
        remedy = "numpy has no such types: cast them (to float32, say), leave them out, or write .safetensors"
        raise EditError(f"a .npz cannot hold {', '.join(problems)}", remedy=remedy)
    if wrong := [key for key in tensors if not _is_text(key)]:
        raise EditError([f"a .npz cannot hold keys that are no text: {listed(wrong)}"])


def _is_text(key: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in key)


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """About how many bytes :func:`write` will write."""
    return sum(tensor.nbytes + 2 * len(key) + 300 for key, tensor in tensors.items())


def write(
    sink: Sink,
    tensors: Mapping[str, Tensor],
    versions: Mapping[str, Mapping[str, Value]] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write each tensor under its key; the container has no place for ``versions`` and ``metadata``, nor for ties.

    A tensor whose elements lie in column-major order goes as it lies, in Fortran's order.
    """
    check(tensors)
    directory = Directory()
    with reading_ahead(spans_of(tensors.values())):
        for key, tensor in tensors.items():
            _write_member(sink, directory, f"{key}{SUFFIX}", tensor)
    sink.literal(directory.finish(sink.position))


def _write_member(sink: Sink, directory: Directory, name: str, tensor: Tensor) -> None:
    fortran = isinstance(tensor, StoredTensor) and not tensor.is_contiguous and _is_column_major(tensor)
    head = npy.header_bytes(tensor.dtype, tensor.shape, fortran=fortran)
    placed = (tensor.in_place or tensor) if fortran and isinstance(tensor, StoredTensor) else tensor
    span, crc32, nbytes = placed.span, placed.crc32, len(head) + tensor.nbytes
    if span is not None and crc32 is not None:
        whole = checksums.joined(zlib.crc32(head), crc32, tensor.nbytes)
        start = max(span.start - len(head), 0)
        sink.literal(directory.local(name, nbytes, whole, sink.position, source_start=start))
        sink.literal(head)
        if unseen_span(placed) is not None:
            sink.copy(span)
        else:
            sink.stream(placed.blocks(), tensor.nbytes)
        return
    sink.literal(directory.local(name, nbytes, 0, sink.position, described=not sink.can_patch))
    sink.literal(head)
    made = sink.stream(placed.blocks(), tensor.nbytes, checksum=True)
    where, checksum = directory.set_crc32(checksums.joined(zlib.crc32(head), made, tensor.nbytes))
    if sink.can_patch:
        sink.patch(where, checksum)
    else:
        sink.literal(directory.descriptor())


def _is_column_major(tensor: StoredTensor) -> bool:
    wanted = row_major(tensor.shape[::-1])[::-1]
    steps = zip(tensor.shape, tensor.stride, wanted, strict=True)
    return all(size == 1 or step == want for size, step, want in steps)
