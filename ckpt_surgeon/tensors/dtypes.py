"""One table of element types: torch's name, bytes per element, safetensors code, torch storage class.

The safetensors codes are those of its format (https://github.com/huggingface/safetensors#format); the storage
classes are the globals that torch's pickles name (``torch.FloatStorage``).  Types without a storage class are
saved by torch as an ``UntypedStorage`` beside the dtype itself; types without a code cannot be written to
safetensors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

_NO_NUMBERS = re.compile(r"bits\w+|float4\w+|bcomplex32|u?int[1-7]|qu?int\w+")


@dataclass(frozen=True, slots=True)
class DType:
    """An element type, spelled as torch spells it.

    >>> BY_NAME["bfloat16"].itemsize
    2
    """

    name: str
    itemsize: int  # bytes
    code: str | None = None  # in a safetensors header
    storage: str | None = None  # class in torch's pickles
    quantized: bool = False

    @property
    def is_floating(self) -> bool:
        """Whether it holds real floating-point numbers (not complex, not integers)."""
        return self.name.startswith(("float", "bfloat"))

    @property
    def is_complex(self) -> bool:
        return "complex" in self.name

    @property
    def is_computable(self) -> bool:
        """Whether torch computes with it; it only stores packed bits and the like."""
        return not _NO_NUMBERS.fullmatch(self.name)

    @property
    def has_inf(self) -> bool:
        """Whether a float of this type can be infinite."""
        return not self.name.endswith(("fn", "fnu", "fnuz"))

    @property
    def part(self) -> int:
        """Bytes that are swapped together when the byte order differs: a complex number is two parts."""
        return self.itemsize // 2 if self.is_complex else self.itemsize

    def __str__(self) -> str:
        return self.name


_TABLE = (
    DType("float64", 8, "F64", "DoubleStorage"),
    DType("float32", 4, "F32", "FloatStorage"),
    DType("float16", 2, "F16", "HalfStorage"),
    DType("bfloat16", 2, "BF16", "BFloat16Storage"),
    DType("float8_e4m3fn", 1, "F8_E4M3"),
    DType("float8_e5m2", 1, "F8_E5M2"),
    DType("float8_e4m3fnuz", 1, "F8_E4M3FNUZ"),
    DType("float8_e5m2fnuz", 1, "F8_E5M2FNUZ"),
    DType("float8_e8m0fnu", 1, "F8_E8M0"),
    DType("float4_e2m1fn_x2", 1, "F4"),  # two numbers a byte: safetensors counts both, torch the bytes
    DType("complex128", 16, None, "ComplexDoubleStorage"),
    DType("complex64", 8, "C64", "ComplexFloatStorage"),
    DType("complex32", 4),
    DType("bcomplex32", 4),
    DType("int64", 8, "I64", "LongStorage"),
    DType("int32", 4, "I32", "IntStorage"),
    DType("int16", 2, "I16", "ShortStorage"),
    DType("int8", 1, "I8", "CharStorage"),
    DType("uint64", 8, "U64"),
    DType("uint32", 4, "U32"),
    DType("uint16", 2, "U16"),
    DType("uint8", 1, "U8", "ByteStorage"),
    DType("bool", 1, "BOOL", "BoolStorage"),
    *(DType(f"{sign}int{bits}", 1) for sign in ("", "u") for bits in range(1, 8)),
    *(DType(f"bits{shape}", 2 if shape == "16" else 1) for shape in ("1x8", "2x4", "4x2", "8", "16")),
    DType("quint8", 1, None, "QUInt8Storage", quantized=True),
    DType("qint8", 1, None, "QInt8Storage", quantized=True),
    DType("qint32", 4, None, "QInt32Storage", quantized=True),
    DType("quint4x2", 1, None, "QUInt4x2Storage", quantized=True),
    DType("quint2x4", 1, None, "QUInt2x4Storage", quantized=True),
)

BY_NAME = {dtype.name: dtype for dtype in _TABLE}
BY_CODE = {dtype.code: dtype for dtype in _TABLE if dtype.code}
BY_STORAGE = {dtype.storage: dtype for dtype in _TABLE if dtype.storage}

EXTRA_STATE = DType("extra_state", 0)  # what stands for a dtype where the value under a key is no tensor

# Other spellings: torch's aliases, and the short names people type.
ALIASES = {
    "double": "float64",
    "float": "float32",
    "half": "float16",
    "long": "int64",
    "int": "int32",
    "short": "int16",
    "cfloat": "complex64",
    "cdouble": "complex128",
    "chalf": "complex32",
    "fp64": "float64",
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "f64": "float64",
    "f32": "float32",
    "f16": "float16",
}


def parse(dtype: object) -> DType:
    """Find a dtype by torch's name, with or without ``torch.``, by a usual short name, or by torch's or numpy's own.

    Raises ValueError for a name that no dtype has, TypeError for what is no dtype at all.

    >>> parse("bf16").name, parse("torch.float32").name
    ('bfloat16', 'float32')
    >>> import torch
    >>> parse(torch.bfloat16).name
    'bfloat16'
    """
    spelling = _name_of(dtype)
    name = spelling.removeprefix("torch.")
    try:
        return BY_NAME[ALIASES.get(name, name)]
    except KeyError:
        close = get_close_matches(name, [*BY_NAME, *ALIASES], n=3)
        known = f"did you mean {' or '.join(close)}?" if close else "usual are bf16, fp16, fp32, int8, float8_e4m3fn"
        raise ValueError(f"no dtype is called {spelling!r}; {known}") from None


def _name_of(dtype: object) -> str:
    """The name of a dtype: this module's, torch's, numpy's, or a scalar type of numpy or ml_dtypes."""
    if isinstance(dtype, str):
        return dtype
    if isinstance(dtype, DType):
        return dtype.name
    kind = dtype if isinstance(dtype, type) else type(dtype)
    if kind.__module__.partition(".")[0] not in ("torch", "numpy", "ml_dtypes"):
        raise TypeError(f"{dtype!r} is no dtype")
    if isinstance(dtype, type):
        return dtype.__name__.rstrip("_")
    return str(getattr(dtype, "name", dtype))
