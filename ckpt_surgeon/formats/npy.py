"""NumPy's container of one array, ``.npy``: a magic, a version, a header in Python's syntax, the elements.

The layout is that of NumPy's ``numpy.lib.format`` (versions 1 to 3).  numpy has no bfloat16: ml_dtypes (which JAX
uses) and MLX write it as two bytes without a meaning, ``V2``, and no other type of theirs looks like that.  Types of
one byte (float8 of five kinds, int4) all become ``V1``, and which of them it was is not in the file.  An array of
objects is a pickle behind the header; it is read by the inert unpickler, and numpy runs it only where it is told to.
"""

from __future__ import annotations

import mmap
import re
import struct
from functools import partial
from math import prod
from typing import NamedTuple

from ..errors import BrokenFile
from ..files.fetched import ensure_all_fetched
from ..files.paths import FilePath
from ..files.spans import ByteSpan
from ..tensors.dtypes import BY_NAME, DType
from ..tensors.records import OpaqueTensor, Tensor
from ..tensors.storage import Storage
from ..tensors.stored import DIMENSIONS, ELEMENTS, StoredTensor
from ..tensors.strides import row_major
from . import plain_pickle
from .contents import Contents
from .payloads import names_in_loads
from .pickle.machine import PickleError, Unpickled
from .pickle.numpy_objects import KINDS, NumpyArray
from .pickle.torch_objects import LOST
from .pickle.values import Global, Object, Value

CONTAINER = "NumPy array (.npy)"
MAGIC = b"\x93NUMPY"
HEADER_LIMIT = 10_000  # bytes, as numpy.load takes them of files that nobody vouches for
AGAIN = "fetch it again"

CODES = {"V2": "bfloat16", **KINDS}  # torch's names by numpy's, without the byte order
CODES_BY_NAME = {name: code for code, name in CODES.items()}
BFLOAT16 = "V2, two bytes without a type, is taken for bfloat16, as ml_dtypes (JAX) and MLX write it"
ALIGNMENT = 64  # bytes, on which numpy puts the elements
_LENGTHS = {1: struct.Struct("<H"), 2: struct.Struct("<I"), 3: struct.Struct("<I")}
_ITEM = re.compile(
    r"""['"](descr|fortran_order|shape)['"]\s*:\s*('[^'\\]*'|"[^"\\]*"|True|False|\([\d,\sL]*\))""", re.ASCII
)
_HEADER = re.compile(rf"\s*\{{\s*(?:{_ITEM.pattern}\s*(?:,\s*|(?=\}}))){{3}}\}}\s*", re.ASCII)
_STRUCTURED = re.compile(r"""['"]descr['"]\s*:\s*[\[({]""")
_KIND_NAMES = {
    "U": "text", "S": "bytes of fixed length", "M": "dates", "m": "time spans", "V": "records without a type",
    "O": "Python objects",
}  # fmt: skip


class Header(NamedTuple):
    """What a header says: the type as numpy spells it, its byte order, the order of the elements, the shape.

    ``start`` is the byte at which the elements begin.
    """

    code: str
    big: bool
    fortran: bool
    shape: tuple[int, ...]
    start: int

    @property
    def dtype(self) -> DType | None:
        """The dtype of torch's; None for what is no number."""
        return BY_NAME.get(CODES.get(self.code, ""))

    @property
    def nbytes(self) -> int | None:
        """Bytes of the elements; None where the type does not tell."""
        return None if self.dtype is None else prod(self.shape) * self.dtype.itemsize

    @property
    def kind(self) -> str:
        """What the elements are where they are no numbers."""
        if self.code == "V1":
            return "float8 or int4 without its name (V1)"
        if self.code == "structured":
            return "records of several fields (a structured dtype)"
        return f"{_KIND_NAMES.get(self.code[:1], 'elements')} (dtype {self.code[:20]!r})"


def matches(head: bytes) -> bool:
    """Whether a file begins as an array of numpy's."""
    return head.startswith(MAGIC)


def parse_header(raw: bytes) -> Header:
    """The header that some bytes begin with.  Raises ValueError saying what is wrong with it."""
    if not raw.startswith(MAGIC):
        raise ValueError("does not begin as an array of numpy's")
    version = raw[6] if len(raw) > 7 else 0
    if len(raw) > 7 and (version not in _LENGTHS or raw[7]):
        raise ValueError(f"has format version {version}.{raw[7]}; known are 1.0 to 3.0")
    length = _LENGTHS.get(version, _LENGTHS[1])
    if len(raw) < 8 + length.size:
        raise ValueError("is truncated in its header")
    (count,) = length.unpack_from(raw, 8)
    start = 8 + length.size + count
    if count > HEADER_LIMIT:
        raise ValueError(f"announces a header of {count:,} bytes; numpy.load takes {HEADER_LIMIT:,}")
    if len(raw) < start:
        raise ValueError("is truncated in its header")
    return _parsed(raw[8 + length.size : start].decode("utf-8" if version == 3 else "latin-1", "replace"), start)


def _parsed(text: str, start: int) -> Header:
    if _STRUCTURED.search(text):
        return Header("structured", False, False, (), start)
    parts = dict(_ITEM.findall(text)) if _HEADER.fullmatch(text) else {}
    descr, order, sizes = (parts.get(name, "") for name in ("descr", "fortran_order", "shape"))
    if descr[:1] not in ("'", '"') or order not in ("True", "False") or sizes[:1] != "(":
        raise ValueError(f"has a header that is none of numpy's ({text[:40]!r})")
    words = re.findall(r"[^\s,]+", sizes[1:-1])
    if not all(re.fullmatch(r"\d{1,19}L?", word) for word in words) or len(words) > DIMENSIONS:
        raise ValueError(f"has a shape that is none, {sizes[:40]!r}")
    shape = tuple(int(word.rstrip("L")) for word in words)
    if prod(shape) > ELEMENTS or max(shape, default=0) > ELEMENTS:
        raise ValueError("has a shape of more elements than can be counted")
    return Header(descr[1:-1].lstrip("<>=|"), descr[1:2] == ">", order == "True", shape, start)


def strides_of(header: Header) -> tuple[int, ...]:
    """The strides of an array's elements: row-major, or column-major (Fortran's order)."""
    return row_major(header.shape[::-1])[::-1] if header.fortran else row_major(header.shape)


def read(path: FilePath, *, salvage: bool = False) -> Contents:
    """Read the header of a ``.npy``; of an array of objects its pickle, inertly.

    Raises BrokenFile where it is damaged, or truncated (without ``salvage``).
    """
    size = path.size
    with path.opened() as file:
        raw = file.read(min(size, HEADER_LIMIT + 16))
    try:
        header = parse_header(raw)
    except ValueError as error:
        raise BrokenFile(path, f"is a NumPy array that {error}", AGAIN) from None
    if header.code == "O":
        return _contents_of_objects(path, header)
    if header.dtype is None or header.nbytes is None:
        raise BrokenFile(path, f"holds {header.kind}, no numbers that a tensor can have", "save the numbers alone")
    there = size - header.start
    if there < header.nbytes and not salvage:
        problem = f"is truncated: its elements should end at byte {header.start + header.nbytes:,} of {size:,}"
        raise BrokenFile(path, problem, AGAIN)
    more = there - header.nbytes
    notes = [f"{more:,} bytes behind the array, which numpy.load does not read either"] if more > 0 else []
    notes += [BFLOAT16] if header.code == "V2" else []
    return Contents(path, CONTAINER, _tensor(path, header, header.dtype, there), notes=tuple(notes))


def _tensor(path: FilePath, header: Header, dtype: DType, there: int) -> Tensor:
    nbytes = prod(header.shape) * dtype.itemsize
    if there < nbytes:
        return OpaqueTensor(LOST, dtype, header.shape)
    storage = Storage(ByteSpan(path, header.start, header.start + nbytes), nbytes, big_endian=header.big)
    return StoredTensor(dtype, header.shape, strides_of(header), 0, storage)


def _contents_of_objects(path: FilePath, header: Header) -> Contents:
    with path.mapped() as data:
        ensure_all_fetched(data)
        made = objects_in(path, data, header)
    inside = partial(names_in_loads, path, made.loads)
    return Contents(path, CONTAINER, made.root, globals=made.globals, globals_inside=inside)


def objects_in(path: FilePath, data: bytes | mmap.mmap, header: Header) -> Unpickled:
    """An array of objects, read inertly: the one object of an array without dimensions, else a list.

    Raises BrokenFile where its pickle is damaged.
    """
    try:
        made = plain_pickle.load(path, data, header.start)
    except (PickleError, BrokenFile) as error:
        problem = f"holds {header.kind}, whose pickle is damaged or truncated: {error}"
        raise BrokenFile(path, problem, AGAIN) from error
    root: Value = made.root
    if isinstance(root, NumpyArray) and root.tensor is None:
        root = root.items[0] if header.shape == () and len(root.items) == 1 else list(root.items)
    return made._replace(root=plain_pickle.arrays_as_tensors(root))


def left_aside(header: Header) -> Object:
    """What stands for an array that is no tensor in the tree of a file."""
    return Object(Global("numpy", "ndarray"), (header.kind,))


def header_bytes(dtype: DType, shape: tuple[int, ...], *, fortran: bool = False) -> bytes:
    """The magic and the header of an array, as numpy.save writes them; little-endian.

    Raises KeyError for a dtype that numpy cannot be told.

    >>> header_bytes(BY_NAME["bfloat16"], (3, 4))[10:].rstrip()
    b"{'descr': '<V2', 'fortran_order': False, 'shape': (3, 4), }"
    """
    code = CODES_BY_NAME[dtype.name]
    order = "|" if code[1:] == "1" else "<"
    text = f"{{'descr': '{order}{code}', 'fortran_order': {fortran}, 'shape': {shape!r}, }}"
    padded = text + " " * (-(len(MAGIC) + 4 + len(text) + 1) % ALIGNMENT) + "\n"
    return MAGIC + bytes((1, 0)) + struct.pack("<H", len(padded)) + padded.encode("ascii")
