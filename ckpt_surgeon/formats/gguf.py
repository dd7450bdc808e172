"""The GGUF container of llama.cpp: typed metadata, names with shapes and types, then the elements.

The layout is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.  Plain
elements are spans; codes are float32 for whoever reads them (:mod:`ckpt_surgeon.tensors.ggml`) and stay codes where a
GGUF file is written of another.  Dimensions lie in the file with the innermost first, and are turned round here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from math import prod
from typing import BinaryIO, NamedTuple

from ..errors import BrokenFile, EditError, NotACheckpoint
from ..files.paths import FilePath
from ..files.prefetch import reading_ahead
from ..files.sinks import Sink
from ..files.spans import ByteSpan
from ..tensors import ggml
from ..tensors.ggml import Coded, Coding
from ..tensors.records import ExtraState, OpaqueTensor, Tensor, spans_of, unseen_span
from ..tensors.storage import Storage
from ..tensors.stored import ELEMENTS, StoredTensor
from ..tensors.strides import row_major
from .contents import Contents
from .pickle.torch_objects import LOST
from .pickle.values import Value

CONTAINER = "GGUF"
SUFFIXES: tuple[str, ...] = (".gguf",)
HOLDS_EXTRA_STATES = False
MAGIC = b"GGUF"
VERSIONS = (2, 3)
ARCHITECTURE = "general.architecture"
ALIGNMENT = "general.alignment"
FILE_TYPE = "general.file_type"
CODES_VERSION = ("general.quantization_version", 2)  # of files with codes
DEFAULT_ALIGNMENT = 32
LARGEST_ALIGNMENT = 1 << 20
DIMENSIONS = 4  # ggml's limit
LONGEST_NAME = 63  # bytes of a tensor's name that ggml takes
LONGEST_KEY = 1 << 16  # bytes of a name in the metadata, and of a tensor's in files of other tools
LONGEST_TEXT = 1 << 20  # bytes of a text that is read; of longer ones the length is said
SHOWN = 3  # items of an array that its text names
DEPTH = 4  # arrays in arrays
AGAIN = "fetch it again and compare its size with the original's"
_PARTS = ("split.no", "split.count", "split.tensors.count")  # what only the files of a split model have
_HEAD = struct.Struct("<4sIQQ")
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _UINT32 = 8, 9, 4
_FILE_TYPES = {"float32": 0, "float16": 1, "q8_0": 7, "bfloat16": 32}


class Typed(str):
    """The text of a value of the metadata, and the bytes that hold it with its type."""

    __slots__ = ("span",)

    span: ByteSpan

    @classmethod
    def at(cls, text: str, span: ByteSpan) -> Typed:
        made = cls(text)
        made.span = span
        return made


# -- reading


def matches(head: bytes) -> bool:
    """Whether the first bytes are those of a GGUF file."""
    return head.startswith(MAGIC)


def read(path: FilePath, *, salvage: bool = False) -> Contents:
    """Read the metadata and the places of all tensors; with ``salvage``, elements may be cut off.

    Raises BrokenFile naming what is wrong, NotACheckpoint for a version that is not read.
    """
    with path.opened() as file:
        header = _Header(path, file, path.size)
        tensors = header.count("tensors", 24)
        values = header.count("entries of metadata", 13)
        metadata = dict(_entries(header, values))
        infos = [_info(header) for _ in range(tensors)]
    alignment = _alignment(path, metadata)
    start = -(-header.at // alignment) * alignment
    _check_layout(path, infos, start, alignment, path.size, salvage=salvage)
    root: dict[Value, Value] = {info.name: _tensor(path, info, start, path.size) for info in infos}
    return Contents(path, CONTAINER, root, metadata, _notes(infos, metadata))


class _Header:
    """What is read of a file from its beginning on, each time checked against its size."""

    def __init__(self, path: FilePath, file: BinaryIO, size: int) -> None:
        self.path, self.size, self.at = path, size, 0
        self._file = file
        _, version = struct.unpack("<4sI", self.take(8, "its version"))
        if version & 0xFFFF == 0 and version:
            what = "is a big-endian GGUF file"
            raise NotACheckpoint(path, what, "convert it with gguf's gguf-convert-endian PATH little")
        if version not in VERSIONS:
            known = " and ".join(map(str, VERSIONS))
            what = f"is a GGUF file of version {version:,}; known are {known}"
            raise NotACheckpoint(path, what, "convert it with llama.cpp's tools of today")
        self._counts = list(struct.unpack("<QQ", self.take(16, "its counts")))

    def count(self, what: str, least: int) -> int:
        """A number of things, each of at least some bytes, which have to fit into the file."""
        number: int = self._counts.pop(0)
        return self.fitting(number, least, what)

    def fitting(self, number: int, each: int, what: str) -> int:
        if number * each > self.size - self.at:
            there = f"{self.size - self.at:,} bytes are left at byte {self.at:,}"
            raise BrokenFile(self.path, f"announces {number:,} {what}, and {there}", AGAIN)
        return number

    def take(self, nbytes: int, what: str) -> bytes:
        """The next bytes.  Raises BrokenFile where the file ends before."""
        raw = self._file.read(nbytes) if nbytes <= self.size - self.at else b""
        if len(raw) < nbytes:
            where = f"{what} should end at byte {self.at + nbytes:,} of {self.size:,}"
            raise BrokenFile(self.path, f"is truncated: {where}", AGAIN)
        self.at += nbytes
        return raw

    def skip(self, nbytes: int, what: str) -> None:
        if nbytes > self.size - self.at:
            where = f"{what} should end at byte {self.at + nbytes:,} of {self.size:,}"
            raise BrokenFile(self.path, f"is truncated: {where}", AGAIN)
        self._file.seek(nbytes, 1)
        self.at += nbytes

    def number(self, code: str, what: str) -> int:
        """The next number; ``code`` is struct's, of an integer."""
        found: int = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]
        return found

    def name(self, what: str) -> str:
        """The next text, which is a name.  Raises BrokenFile for one that is none."""
        length = self.number("Q", f"the length of {what}")
        if length > LONGEST_KEY:
            raise BrokenFile(self.path, f"has {what} of {length:,} bytes, the limit is {LONGEST_KEY:,}", AGAIN)
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise BrokenFile(self.path, f"has {what} at byte {self.at - length:,} that is no UTF-8", AGAIN) from error

    def text(self, what: str) -> str:
        """The next text, in words where it is very long."""
        length = self.number("Q", f"the length of {what}")
        if length <= LONGEST_TEXT:
            return self.take(length, what).decode("utf-8", "replace")
        self.skip(length, what)
        return f"[a text of {length:,} bytes]"


def _entries(header: _Header, count: int) -> Iterator[tuple[str, Typed]]:
    """The metadata.  Raises BrokenFile for a name that comes twice."""
    seen: set[str] = set()
    for number in range(1, count + 1):
        key = header.name(f"the name of entry {number:,} of the metadata")
        if key in seen:
            raise BrokenFile(header.path, f"has the metadata {key!r} twice")
        seen.add(key)
        start = header.at
        kind = header.number("I", f"the type of {key!r}")
        text = _value(header, kind, key, DEPTH)
        yield key, Typed.at(text, ByteSpan(header.path, start, header.at))


def _value(header: _Header, kind: int, key: str, depth: int) -> str:
    """The text of a value of the metadata; of an array, how many items it has and the first of them."""
    what = f"the value of {key!r}"
    if kind == _STRING:
        return header.text(what)
    if kind in _SCALARS:
        raw = header.take(struct.calcsize(f"<{_SCALARS[kind]}"), what)
        (value,) = struct.unpack(f"<{_SCALARS[kind]}", raw)
        return _float32(value) if kind == 6 else str(value).lower() if kind == 7 else str(value)
    if kind != _ARRAY or not depth:
        problem = f"has the metadata {key!r} of type {kind:,}" if kind != _ARRAY else f"has arrays in arrays in {key!r}"
        raise BrokenFile(header.path, f"{problem}, which GGUF does not know")
    inner = header.number("I", f"the type of the items of {key!r}")
    count = header.number("Q", f"the length of {key!r}")
    plain = struct.calcsize(f"<{_SCALARS[inner]}") if inner in _SCALARS else 0
    header.fitting(count, plain or (8 if inner == _STRING else 12), f"items of {key!r}")
    first = [_value(header, inner, key, depth - 1) for _ in range(min(count, SHOWN))]
    if plain:
        header.skip((count - len(first)) * plain, what)
    else:
        for _ in range(count - len(first)):
            _skip(header, inner, key, depth - 1)
    names = ", ".join(repr(one[:20]) if inner == _STRING else one for one in first)
    return f"[{names}]" if count <= SHOWN else f"[{count:,} items: {names}, …]"


def _float32(value: float) -> str:
    """The shortest text of a float32.

    >>> _float32(9.999999974752427e-07)
    '1e-06'
    """
    for digits in range(1, 10):
        text = f"{value:.{digits}g}"
        with suppress(OverflowError):  # the largest ones, rounded up
            if struct.pack("<f", float(text)) == struct.pack("<f", value):
                return str(float(text))
    return "nan"


def _skip(header: _Header, kind: int, key: str, depth: int) -> None:
    if kind == _STRING:
        header.skip(header.number("Q", f"the length of an item of {key!r}"), f"an item of {key!r}")
    else:
        _value(header, kind, key, depth)


class _Info(NamedTuple):
    """What a file says of one tensor: ``offset`` counts from the beginning of the elements."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    nbytes: int


def _info(header: _Header) -> _Info:
    name = header.name("the name of a tensor")
    what = f"tensor {name!r}"
    dimensions = header.number("I", f"the dimensions of {what}")
    if dimensions > DIMENSIONS:
        raise BrokenFile(header.path, f"{what} has {dimensions:,} dimensions, the limit is {DIMENSIONS}")
    shape = tuple(header.number("Q", f"the shape of {what}") for _ in range(dimensions))[::-1]
    kind = header.number("I", f"the type of {what}")
    offset = header.number("Q", f"the offset of {what}")
    if kind not in ggml.PLAIN and kind not in ggml.CODINGS:
        raise BrokenFile(header.path, f"{what} has type {kind:,}, which is not known", "look for a newer ckpt_surgeon")
    if max(shape, default=0) > ELEMENTS or prod(shape) > ELEMENTS:
        raise BrokenFile(header.path, f"{what} has more elements than can be counted")
    if (coding := ggml.CODINGS.get(kind)) is None:
        return _Info(name, shape, kind, offset, prod(shape) * ggml.PLAIN[kind].itemsize)
    if not shape or shape[-1] % coding.numbers:
        rows = f"rows of {shape[-1]:,}" if shape else "no rows"
        raise BrokenFile(header.path, f"{what} has {rows}, and {coding.name} has blocks of {coding.numbers}")
    return _Info(name, shape, kind, offset, coding.bytes_of(prod(shape)))


def _alignment(path: FilePath, metadata: Mapping[str, Typed]) -> int:
    text = metadata.get(ALIGNMENT, str(DEFAULT_ALIGNMENT))
    value = int(text) if text.isdecimal() and len(text) < 10 else 0
    if not 0 < value <= LARGEST_ALIGNMENT or value & (value - 1):
        raise BrokenFile(path, f"has the alignment {text[:20]!r}, which is no power of two up to {LARGEST_ALIGNMENT:,}")
    return value


def _check_layout(path: FilePath, infos: list[_Info], start: int, alignment: int, size: int, *, salvage: bool) -> None:
    """Raise BrokenFile for names that come twice, and for elements that overlap or lie where nothing is."""
    seen: set[str] = set()
    for info in infos:
        if info.name in seen:
            raise BrokenFile(path, f"has the tensor {info.name!r} twice")
        seen.add(info.name)
    end, before = 0, ""
    for info in sorted(infos, key=lambda info: (info.offset, info.nbytes)):
        if info.offset % alignment:
            raise BrokenFile(path, f"tensor {info.name!r} begins at data byte {info.offset:,}, not at a multiple of "
                             f"{alignment:,}")  # fmt: skip
        if info.offset < end:
            raise BrokenFile(path, f"tensors {before!r} and {info.name!r} overlap")
        end, before = info.offset + info.nbytes, info.name
        if start + end > size and not salvage:
            where = f"tensor {info.name!r} should end at byte {start + end:,} of {size:,}"
            raise BrokenFile(path, f"is truncated: {where}", AGAIN)


def _tensor(path: FilePath, info: _Info, start: int, size: int) -> StoredTensor | OpaqueTensor:
    begin = start + info.offset
    span = ByteSpan(path, begin, begin + info.nbytes)
    coding = ggml.CODINGS.get(info.kind)
    dtype = ggml.FLOAT if coding is not None else ggml.PLAIN[info.kind]
    if span.stop > size:
        return OpaqueTensor(LOST, dtype, info.shape)
    if coding is None:
        return StoredTensor(dtype, info.shape, row_major(info.shape), 0, Storage(span, info.nbytes))
    if not coding.is_decoded:
        return OpaqueTensor(coding.name, dtype, info.shape)
    return ggml.stored_codes(coding, info.shape, span)


def _notes(infos: list[_Info], metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Which codes a file has, and that a part of a split model is one."""
    counts: dict[str, int] = {}
    for info in infos:
        if (coding := ggml.CODINGS.get(info.kind)) is not None:
            counts[coding.name] = counts.get(coding.name, 0) + 1
    kinds = ", ".join(f"{number:,} of {name}" for name, number in sorted(counts.items()))
    notes = [f"tensors of codes, read as float32: {kinds}"] * bool(counts)
    count, number = metadata.get("split.count", "1"), metadata.get("split.no", "0")
    if count not in ("0", "1") and count.isdecimal() and number.isdecimal():
        notes.append(f"part {int(number) + 1:,} of {int(count):,} of a split model")
    return tuple(notes)


# -- writing


def check(tensors: Mapping[str, Tensor]) -> None:
    """Raise EditError naming every tensor that GGUF cannot hold."""
    problems = []
    for key, tensor in tensors.items():
        if isinstance(tensor, (OpaqueTensor, ExtraState)):
            problems.append(f"{key!r} ({tensor.kind})")
        elif tensor.dtype.name not in ggml.NUMBERS:
            problems.append(f"{key!r} ({tensor.dtype})")
        elif len(tensor.shape) > DIMENSIONS:
            problems.append(f"{key!r} ({len(tensor.shape)} dimensions)")
        elif not key or len(key.encode("utf-8", "surrogatepass")) > LONGEST_NAME:
            problems.append(f"{key[:20]!r}… (a name of more than {LONGEST_NAME} bytes)")
    if problems:
        shown = ", ".join(problems[:5]) + (f" and {len(problems) - 5:,} more" if problems[5:] else "")
        raise EditError([f"GGUF cannot hold {shown}"], remedy="rename, cast or leave them out by pattern")


def check_metadata(metadata: Mapping[str, str]) -> None:
    """Raise EditError for a checkpoint that does not come from a GGUF file: it has no metadata that llama.cpp needs."""
    if not isinstance(metadata.get(ARCHITECTURE), Typed):
        problem = f"GGUF needs metadata ({ARCHITECTURE}, the tokenizer …), and the input has none of a GGUF file"
        remedy = "graft it into a GGUF file of the same model, or make one by llama.cpp's convert_hf_to_gguf.py first"
        raise EditError([problem], remedy=remedy)


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """About how many bytes :func:`write` will write: the metadata is not counted."""
    return _HEAD.size + sum(_stored_bytes(one) + len(key) + 96 for key, one in tensors.items())


def write(
    sink: Sink,
    tensors: Mapping[str, Tensor],
    versions: Mapping[str, Mapping[str, Value]] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write version 3, with the metadata of the GGUF file that the tensors come from; codes stay codes.

    The format has no place for ``versions``.  Raises EditError for metadata of another container.
    """
    check(tensors)
    texts = dict(metadata or {})
    check_metadata(texts)
    alignment = int(texts.get(ALIGNMENT, DEFAULT_ALIGNMENT))
    for name in _PARTS:
        texts.pop(name, None)
    numbers = _added(tensors, texts)
    sink.literal(_HEAD.pack(MAGIC, VERSIONS[-1], len(tensors), len(texts) + len(numbers)))
    for key, text in texts.items():
        sink.literal(_packed(key))
        if isinstance(text, Typed):
            sink.copy(text.span)
        else:
            sink.literal(struct.pack("<I", _STRING) + _packed(text))
    for key, number in numbers.items():
        sink.literal(_packed(key) + struct.pack("<II", _UINT32, number))
    offset = 0
    for key, tensor in tensors.items():
        sink.literal(_packed(key) + _described(tensor, offset))
        offset += -(-_stored_bytes(tensor) // alignment) * alignment
    sink.literal(bytes(-sink.position % alignment))
    with reading_ahead(spans_of(tensors.values())):
        for tensor in tensors.values():
            _write_elements(sink, tensor)
            sink.literal(bytes(-_stored_bytes(tensor) % alignment))


def _write_elements(sink: Sink, tensor: Tensor) -> None:
    codes = ggml.coded(tensor)
    span = codes.codes_at if codes is not None else unseen_span(tensor)
    if span is not None:
        sink.copy(span)
    elif codes is not None:
        sink.stream(codes.codes(), _stored_bytes(tensor))
    else:
        sink.stream(tensor.blocks(), tensor.nbytes)


def _described(tensor: Tensor, offset: int) -> bytes:
    """A tensor's dimensions, type and offset."""
    codes = ggml.coded(tensor)
    kind = codes.coding.number if codes is not None else ggml.NUMBERS[tensor.dtype.name]
    shape = tensor.shape[::-1]
    return struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def _stored_bytes(tensor: Tensor) -> int:
    codes = ggml.coded(tensor)
    return codes.coding.bytes_of(tensor.numel) if codes is not None else tensor.nbytes


def _packed(text: str) -> bytes:
    raw = text.encode("utf-8", "replace")
    return struct.pack("<Q", len(raw)) + raw


def _added(tensors: Mapping[str, Tensor], texts: dict[str, str]) -> dict[str, int]:
    """The metadata that says which types the tensors have; what it takes the place of is taken out of ``texts``."""
    file_type = _file_type(tensors, texts.pop(FILE_TYPE, ""))
    numbers = {} if file_type is None else {FILE_TYPE: file_type}
    has_codes = any(_coding(tensor) is not None for tensor in tensors.values())
    if has_codes and CODES_VERSION[0] not in texts:
        numbers[CODES_VERSION[0]] = CODES_VERSION[1]
    return numbers


def _file_type(tensors: Mapping[str, Tensor], before: str) -> int | None:
    """What llama.cpp calls the type of most elements (of tensors with several dimensions); what it was for others."""
    counts: dict[str, int] = {}
    for tensor in tensors.values():
        if len(tensor.shape) > 1:
            coding = _coding(tensor)
            name = coding.name if coding is not None else tensor.dtype.name
            counts[name] = counts.get(name, 0) + tensor.numel
    most = max(counts, key=lambda name: counts[name], default="")
    if most in _FILE_TYPES:
        return _FILE_TYPES[most]
    return int(before) if before.isdecimal() and len(before) < 10 else None


def _coding(tensor: Tensor) -> Coding | None:
    codes: Coded | None = ggml.coded(tensor)
    return codes.coding if codes is not None else None
