"""What numpy's pickles build here: arrays as tensors in their place, scalars as numbers.

The state of an array is (version, shape, dtype, is_fortran, bytes), that of a dtype (version, byte order, …), from
numpy/_core/src/multiarray; protocol 5 has ``_frombuffer(bytes, dtype, shape, order)``.
"""

from __future__ import annotations

import struct
from math import prod

from ...files.spans import ByteSpan
from ...tensors.dtypes import BY_NAME, DType
from ...tensors.storage import Storage
from ...tensors.stored import DIMENSIONS, StoredTensor
from ...tensors.strides import row_major
from .machine import LONG
from .values import Constructor, Global, Inline, Object, Value, spelled

KINDS = {
    "f2": "float16", "f4": "float32", "f8": "float64", "c8": "complex64", "c16": "complex128", "b1": "bool",
    "i1": "int8", "i2": "int16", "i4": "int32", "i8": "int64",
    "u1": "uint8", "u2": "uint16", "u4": "uint32", "u8": "uint64",
}  # fmt: skip
_SCALARS = {"f2": "e", "f4": "f", "f8": "d", "b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q",
            "u1": "B", "u2": "H", "u4": "I", "u8": "Q", "c8": "2f", "c16": "2d"}  # fmt: skip


class NumpyDType(Object):
    """numpy.dtype: a code such as f4, and a byte order."""

    def __init__(self, code: Value = "", *_: Value) -> None:
        text = spelled(code)
        self.code = text.lstrip("<>=|")
        self.big = text.startswith(">")
        self._is_built = False
        super().__init__(Global("numpy", "dtype"), (self.code,))

    def build(self, state: Value) -> None:
        """The state is (version, byte order, subdtype, names, fields, …); those of plain numbers are None."""
        if self._is_built:  # numpy would change the dtype of arrays that are made already
            raise ValueError("a dtype that is changed after it was made")
        self._is_built = True
        self.big = isinstance(state, tuple) and len(state) > 1 and state[1] in (">", b">")
        if isinstance(state, tuple) and any(part is not None for part in state[2:5]):
            self.code = f"{self.code} with fields"

    @property
    def dtype(self) -> DType | None:
        """The dtype of torch's that it is; None for strings, objects, records, dates."""
        return BY_NAME.get(KINDS.get(self.code, ""))


class NumpyArray(Object):
    """numpy.ndarray: ``tensor`` is what it holds, where that is plain numbers; ``items`` where that is objects."""

    def __init__(self, tensor: StoredTensor | None = None) -> None:
        super().__init__(Global("numpy", "ndarray"))
        self.tensor = tensor

    def build(self, state: Value) -> None:
        if isinstance(state, tuple) and len(state) in (4, 5):  # version 0 did not have its number
            shape, dtype, fortran, raw = state[-4:]
            self.tensor = array_tensor(raw, dtype, shape, fortran=isinstance(fortran, int) and bool(fortran))
            self.items = raw if isinstance(raw, list) else []


class NumpyScalar(Object):
    """One number of numpy's, with its own class: ``numpy.float64 0.5``."""

    def __init__(self, kind: str, value: Value) -> None:
        super().__init__(Global("numpy", kind), (value,))


def array_tensor(raw: Value, dtype: Value, shape: Value, *, fortran: bool) -> StoredTensor | None:
    """An array's elements as a tensor; None where they are no plain numbers.  Raises ValueError when sizes differ."""
    found = dtype.dtype if isinstance(dtype, NumpyDType) else None
    sizes = shape if isinstance(shape, tuple) else (shape,)
    if isinstance(raw, str) and len(raw) <= LONG:  # from Python 2, where bytes that are ASCII pass for text
        raw = raw.encode("latin-1")
    if found is None or not isinstance(dtype, NumpyDType) or not isinstance(raw, (bytes, Inline)):
        return None
    numbers = tuple(size for size in sizes[:DIMENSIONS] if type(size) is int and size >= 0)
    if len(numbers) != len(sizes) or len(raw) != prod(numbers) * found.itemsize:
        raise ValueError("an array whose bytes do not fit its shape")
    stride = tuple(reversed(row_major(tuple(reversed(numbers))))) if fortran else row_major(numbers)
    if isinstance(raw, Inline):
        storage = Storage(ByteSpan(raw.path, raw.start, raw.stop), len(raw), big_endian=dtype.big)
    else:
        storage = Storage(None, len(raw), big_endian=dtype.big, memory=memoryview(raw))
    return StoredTensor(found, numbers, stride, 0, storage)


def make_array(*_: Value) -> NumpyArray:
    """numpy._core.multiarray._reconstruct."""
    return NumpyArray()


def make_from_buffer(raw: Value, dtype: Value, shape: Value, order: Value = "C", *_: Value) -> Value:
    """numpy._core.numeric._frombuffer."""
    return NumpyArray(array_tensor(raw, dtype, shape, fortran=order == "F"))


def make_scalar(dtype: Value, raw: Value = b"") -> Value:
    """numpy._core.multiarray.scalar: a number, or an object that names what it is."""
    if isinstance(raw, str) and len(raw) <= LONG:
        raw = raw.encode("latin-1")
    if isinstance(dtype, NumpyDType) and dtype.code in _SCALARS and isinstance(raw, bytes):
        try:
            values = struct.unpack((">" if dtype.big else "<") + _SCALARS[dtype.code], raw)
        except struct.error:
            raise ValueError("a numpy scalar of another size") from None
        return NumpyScalar(KINDS[dtype.code], values[0] if len(values) == 1 else complex(*values))
    if isinstance(dtype, NumpyDType) and dtype.code.startswith("U") and isinstance(raw, bytes):
        return NumpyScalar("str_", raw.decode("utf-32-be" if dtype.big else "utf-32-le", "replace").rstrip("\0"))
    return Object(Global("numpy", f"scalar {dtype.code if isinstance(dtype, NumpyDType) else ''}".strip()), (raw,))


CONSTRUCTORS: dict[tuple[str, str], Constructor] = {
    ("numpy", "dtype"): NumpyDType,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): make_array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): make_scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): make_from_buffer for core in ("core", "_core")},
}
