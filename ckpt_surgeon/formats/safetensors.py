"""The safetensors container: eight bytes of length, a JSON header, then the elements.

The rules are those of https://github.com/huggingface/safetensors#format; each way to break one has its own
message.  The package of that name reads values; here only places are read, and bytes are not copied through
memory, so it serves as the oracle of the tests instead.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import NamedTuple

from ..errors import BrokenFile, EditError, NoRoom
from ..files.journal import Patch
from ..files.paths import FilePath
from ..files.prefetch import reading_ahead
from ..files.sinks import Sink
from ..files.spans import ByteSpan
from ..tensors.dtypes import BY_CODE, DType
from ..tensors.records import ExtraState, OpaqueTensor, Tensor, sequence_of, spans_of, unseen_span
from ..tensors.storage import Storage
from ..tensors.stored import DIMENSIONS, ELEMENTS, StoredTensor
from ..tensors.strides import row_major
from .aliases import follow
from .contents import Contents, Reindexed
from .pickle.torch_objects import LOST
from .pickle.values import Value
from .zip.archive import PAGE, PAGE_WORTH, TRUNCATED

CONTAINER = "safetensors"
SUFFIXES: tuple[str, ...] = (".safetensors",)
METADATA = "__metadata__"
SHARDING = "DCP_SHARDING_INFO"  # where torch.distributed.checkpoint says which pieces of tensors a file has
SHOWN = 100  # characters of an odd value that a message repeats
HEADER_LIMIT = 100_000_000  # bytes, the format's own limit
AGAIN = "fetch it again and compare its size with the original's"

_LENGTH = struct.Struct("<Q")
_SPACE = b" \t\r\n"  # JSON's
_SIX_BITS = {code: DType(name, 1) for code, name in (("F6_E2M3", "float6_e2m3"), ("F6_E3M2", "float6_e3m2"))}
_PACKED = "F4"
_SIZES = {code: dtype.itemsize for code, dtype in BY_CODE.items() if code != _PACKED}
_INTEGERS = {int}
_strides = lru_cache(1 << 10)(row_major)
_OF_PIECES = (SHARDING, "DCP_VERSION")
_ELSEWHERE = re.compile(r"\[[^\]]*[1-9]")  # an offset that is not zero
_SHARE = "what one process wrote, pieces of tensors among it: give the folder for whole ones"


# -- reading


def matches(head: bytes) -> bool:
    """Whether the first bytes can be a header's length and its opening brace."""
    if len(head) <= 8 or not 2 <= _LENGTH.unpack_from(head)[0] <= HEADER_LIMIT:
        return False
    return head[8:].lstrip(_SPACE)[:1] == b"{"  # the package that defines the format reads white space in front too


def broken(path: FilePath, head: bytes) -> BrokenFile | None:
    """The error for a file that :func:`matches` does not know and that its name or its brace says is safetensors."""
    if path.suffix not in SUFFIXES and (head[8:9] != b"{" or head[5:8] != bytes(3)):
        return None
    if len(head) < 8:
        return BrokenFile(path, f"is truncated: it has {len(head)} bytes of the 8 that tell its header's length", AGAIN)
    (length,) = _LENGTH.unpack_from(head)
    if length > HEADER_LIMIT:
        return BrokenFile(path, f"announces a header of {length:,} bytes; the limit is {HEADER_LIMIT:,}", AGAIN)
    if length < 2:
        return BrokenFile(path, f"announces a header of {length} bytes, too few for any", AGAIN)
    if len(head) == 8:
        return BrokenFile(path, f"is truncated: its header should end at byte {8 + length:,} of 8", AGAIN)
    return BrokenFile(path, f"its header begins with {head[8:9]!r} where JSON has a brace", AGAIN)


def has_pieces(path: FilePath) -> bool:
    """Whether a file was written by torch.distributed.checkpoint, and may have pieces of tensors."""
    with path.opened() as file:
        head = file.read(9)
        return matches(head) and f'"{SHARDING}"'.encode() in file.read(_LENGTH.unpack_from(head)[0])


def read(path: FilePath, *, salvage: bool = False) -> Contents:
    """Read and verify a header; with ``salvage``, elements may be cut off.

    Raises BrokenFile naming the rule of the format that is broken.
    """
    contents = read_pieces(path, salvage=salvage)
    texts = dict(contents.metadata)
    where, _ = (texts.pop(key, "") for key in _OF_PIECES)
    is_share = where and (path.name.startswith("shard-") or _ELSEWHERE.search(where))
    return follow(replace(contents, metadata=texts, notes=(_SHARE,) if is_share else ()))


def read_pieces(path: FilePath, *, salvage: bool = False) -> Contents:
    """The same, with what the metadata says of pieces."""
    return _contents(path, _header_bytes(path), salvage=salvage)


def _header_bytes(path: FilePath) -> bytes:
    size = path.size
    with path.opened() as file:
        (length,) = _LENGTH.unpack(file.read(8))
        if 8 + length > size:
            raise BrokenFile(path, f"is truncated: its header should end at byte {8 + length:,} of {size:,}", AGAIN)
        return file.read(length)


def _contents(path: FilePath, raw: bytes, *, salvage: bool = False) -> Contents:
    """What a header says of the file that it is, or will be, in."""
    size, length = path.size, len(raw)
    header = _parsed(path, raw)
    metadata = header.pop(METADATA, None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BrokenFile(path, "its __metadata__ is not a map from string to string")
    entries = [_plain_entry(key, value) or _entry(path, key, value) for key, value in header.items()]
    end = max((entry.stop for entry in entries), default=0)
    _check_layout(path, entries, max(end, size - 8 - length) if salvage else size - 8 - length)
    tensors = {entry.key: _tensor(path, entry, 8 + length, size) for entry in entries}
    return Contents(path, CONTAINER, tensors, {str(key): value for key, value in metadata.items()})


def _parsed(path: FilePath, raw: bytes) -> dict[str, Value]:
    def no_twins(pairs: list[tuple[str, Value]]) -> dict[str, Value]:
        made = dict(pairs)
        if len(made) < len(pairs):
            seen: set[str] = set()
            twins = sorted({key for key, _ in pairs if key in seen or seen.add(key)})  # type: ignore[func-returns-value]
            raise BrokenFile(path, f"its header has the key {twins[0]!r} twice")
        return made

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=no_twins)
    except (ValueError, RecursionError) as error:
        raise BrokenFile(path, f"its header is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise BrokenFile(path, "its header is no JSON object")
    return header


class _Entry(NamedTuple):
    key: str
    code: str
    shape: tuple[int, ...]
    start: int
    stop: int


def _plain_entry(key: str, value: Value) -> _Entry | None:
    """An entry in which everything is as it should be, as in nearly all files; else None."""
    if not isinstance(value, dict):
        return None
    code, offsets, shape = value.get("dtype"), value.get("data_offsets"), value.get("shape")
    if type(code) is not str or type(offsets) is not list or type(shape) is not list or len(offsets) != 2:
        return None
    start, stop = offsets
    numbers = [start, stop, *shape]
    if {*map(type, numbers)} != _INTEGERS or min(numbers) < 0 or len(shape) > DIMENSIONS or max(numbers) > ELEMENTS:
        return None
    is_plain = code in _SIZES and _SIZES[code] * (count := prod(shape)) == stop - start and count <= ELEMENTS
    return _Entry(key, code, tuple(shape), start, stop) if is_plain else None


def _entry(path: FilePath, key: str, value: Value) -> _Entry:
    try:
        if not isinstance(value, dict):
            raise TypeError("is no object")
        code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(code, str) or code not in BY_CODE | _SIX_BITS:
            raise TypeError(f"has dtype {code!r}, which is not known"[:SHOWN])
        for name, numbers in (("shape", shape), ("data_offsets", offsets)):
            if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
                raise TypeError(f"has a {name} that is no list of non-negative integers")
        if len(offsets) != 2:
            raise TypeError(f"has {len(offsets)} data_offsets instead of 2")
        if offsets[0] > offsets[1]:
            raise TypeError(f"ends at data byte {offsets[1]:,}, before it begins at {offsets[0]:,}")
        if len(shape) > DIMENSIONS or max(shape, default=0) > ELEMENTS or prod(shape) > ELEMENTS:
            raise TypeError("has a shape of more elements than can be counted")
        shape = _halved(shape) if code == _PACKED else shape
        bits = 6 if code in _SIX_BITS else BY_CODE[code].itemsize * 8
        there, needed = offsets[1] - offsets[0], prod(shape) * bits // 8
        if there != needed or prod(shape) * bits % 8:
            raise TypeError(f"has {there:,} bytes, but shape {shape} of {code} needs {needed:,}")
    except KeyError as error:
        raise BrokenFile(path, f"tensor {key!r} has no {error.args[0]!r} in the header") from None
    except (TypeError, ValueError) as error:
        raise BrokenFile(path, f"tensor {key!r} {error}") from None
    return _Entry(key, code, tuple(shape), offsets[0], offsets[1])


def _halved(shape: list[int]) -> list[int]:
    """A shape that counts two numbers a byte, counting bytes."""
    if not shape or shape[-1] % 2:
        raise TypeError(f"has shape {shape}, whose last size is odd, of {_PACKED}")
    return [*shape[:-1], shape[-1] // 2]


def _check_layout(path: FilePath, entries: list[_Entry], data: int) -> None:
    """The format allows neither gaps nor overlaps nor bytes that belong to no tensor."""
    at = 0
    previous = "the header"
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.stop)):
        if entry.stop > data:
            raise BrokenFile(
                path,
                f"is truncated: tensor {entry.key!r} should end at data byte {entry.stop:,} of {data:,}",
                TRUNCATED,
            )
        if entry.start != at:
            what = "overlap" if entry.start < at else f"leave a gap of {entry.start - at:,} bytes"
            raise BrokenFile(path, f"{previous} and tensor {entry.key!r} {what}")
        at, previous = entry.stop, f"tensor {entry.key!r}"
    if at != data:
        raise BrokenFile(path, f"has {data - at:,} bytes after its last tensor")


def _tensor(path: FilePath, entry: _Entry, base: int, size: int) -> StoredTensor | OpaqueTensor:
    if entry.code in _SIX_BITS:
        return OpaqueTensor(f"{entry.code}, which torch has no dtype for,", _SIX_BITS[entry.code], entry.shape)
    if base + entry.stop > size:
        return OpaqueTensor(LOST, BY_CODE[entry.code], entry.shape)
    storage = Storage(ByteSpan(path, base + entry.start, base + entry.stop), entry.stop - entry.start)
    return StoredTensor(BY_CODE[entry.code], entry.shape, _strides(entry.shape), 0, storage)


# -- renaming in place


class Index:
    """The header of a file, whose keys are their own places: see :class:`.contents.Index`.

    What is shorter is padded with spaces, as the format allows.
    """

    def __init__(self, path: FilePath) -> None:
        self._raw = _header_bytes(path)
        self.contents = follow(_contents(path, self._raw))

    def places(self, node: Value, name: str) -> Sequence[Hashable]:
        """The key itself."""
        return [name]

    def rewritten(self, texts: Mapping[Hashable, str]) -> Reindexed:
        """The header with other keys.  Raises NoRoom."""
        path, room = self.contents.path, len(self._raw)
        if METADATA in texts.values():
            raise EditError([f"safetensors cannot hold a tensor called {METADATA!r}"])
        header = {texts.get(key, key): value for key, value in _parsed(path, self._raw).items()}
        if (metadata := header.get(METADATA)) and isinstance(metadata, dict):
            header[METADATA] = dict(self._renamed(metadata, texts))
        made = _dumped(header)
        if len(made) > room:
            raise NoRoom(path, len(made), room)
        padded = made.ljust(room)
        contents = follow(_contents(path, padded))
        return Reindexed((Patch(_LENGTH.size, self._raw, padded),), contents, room - len(made))

    def _renamed(self, metadata: Mapping[str, str], texts: Mapping[Hashable, str]) -> Iterator[tuple[str, str]]:
        """The metadata with alias notes on the new keys."""
        for name, text in metadata.items():
            is_note = name in self.contents.aliases
            yield (texts.get(name, name), texts.get(text, text)) if is_note else (name, text)


# -- writing


HOLDS_EXTRA_STATES = False


def check(tensors: Mapping[str, Tensor]) -> None:
    """Raise EditError naming every tensor that this format cannot hold."""
    problems = []
    for key, tensor in tensors.items():
        if isinstance(tensor, (OpaqueTensor, ExtraState)):
            problems.append(f"{key!r} ({tensor.kind})")
        elif tensor.dtype.code is None or (tensor.dtype.code == _PACKED and not tensor.shape):
            problems.append(f"{key!r} ({tensor.dtype})")
    if METADATA in tensors:
        problems.append(f"a tensor called {METADATA!r}")
    if problems:
        raise EditError(
            f"safetensors cannot hold {', '.join(problems)}", remedy="leave them out by pattern or write a .pth"
        )


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """How many bytes :func:`write` will write, up to the header's padding."""
    return sum(tensor.nbytes for tensor in tensors.values()) + len(_header(tensors, {})[0]) + 8


def write(
    sink: Sink,
    tensors: Mapping[str, Tensor],
    versions: Mapping[str, Mapping[str, Value]] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write every tensor row-major under each of its keys; the format has no place for ``versions``.

    The header keeps the order of the keys; the elements follow in order of item size, which aligns each tensor
    to its own, as the format's own serializer does.
    """
    check(tensors)
    header, order = _header(tensors, {"format": "pt", **(metadata or {})})
    header += b" " * (-len(header) % 8)
    header += b" " * _page_padding(8 + len(header), [tensors[key] for key in order])
    sink.literal(_LENGTH.pack(len(header)))
    sink.literal(header)
    with reading_ahead(spans_of(tensors[key] for key in order)):
        for run in _runs(tensors[key] for key in order):
            if isinstance(run, ByteSpan):
                sink.copy(run)
            else:
                sink.stream(run.blocks(), run.nbytes)


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """The JSON, and the keys in the order of their elements."""
    order = sorted(tensors, key=lambda key: -tensors[key].dtype.itemsize)
    starts = {}
    at = 0
    for key in order:
        starts[key] = at
        at += tensors[key].nbytes
    entries: dict[str, Value] = {METADATA: dict(metadata)} if metadata else {}
    for key, tensor in tensors.items():
        offsets = [starts[key], starts[key] + tensor.nbytes]
        packed = tensor.dtype.code == _PACKED and tensor.shape
        shape = (*tensor.shape[:-1], tensor.shape[-1] * 2) if packed else tensor.shape
        entries[key] = {"dtype": tensor.dtype.code, "shape": shape, "data_offsets": offsets}
    return _dumped(entries), order


def _dumped(header: Mapping[str, Value]) -> bytes:
    try:
        return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise EditError([f"safetensors cannot hold a key with {error.object[error.start]!r}, only UTF-8"]) from None


def _runs(tensors: Iterator[Tensor]) -> Iterator[ByteSpan | Tensor]:
    """Neighbours in the source become one span, so that an unchanged file is one kernel copy.

    A tensor that is others in sequence (a stack) is copied part by part.
    """
    run: ByteSpan | None = None
    for tensor in (part for whole in tensors for part in sequence_of(whole)):
        span = unseen_span(tensor)
        if span is not None and run is not None and (span.path, span.start) == (run.path, run.stop):
            run = ByteSpan(run.path, run.start, span.stop)
            continue
        if run is not None:
            yield run
        run = span
        if span is None:
            yield tensor
    if run is not None:
        yield run


def _page_padding(position: int, tensors: list[Tensor]) -> int:
    """Spaces that put the largest run at the same place in a page as in its source, where whole eights can."""
    best, wanted, at = PAGE_WORTH - 1, 0, position
    for run in _runs(iter(tensors)):
        length = len(run) if isinstance(run, ByteSpan) else run.nbytes
        if isinstance(run, ByteSpan) and length > best:
            best, wanted = length, (run.start - at) % PAGE
        at += length
    return wanted if wanted % 8 == 0 else 0
