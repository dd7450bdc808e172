"""From one dtype to another, a block at a time, by numpy and ml_dtypes, bit for bit as torch converts.

8-bit and 16-bit floats are handled as their codes (unsigned integers): tables of 256 or 65,536 entries say what each
code becomes.  A float32 becomes an 8-bit float through the same tables: it is first rounded to odd to the 16 bits of
a bfloat16, which keeps more than two bits beyond those of the target, so that rounding twice rounds once.

Where torch and ml_dtypes differ, torch is followed, as its vector code on x86 converts contiguous memory:

- float64 and integers go through float32 to whatever is narrower, and are rounded twice;
- a float8_e4m3fn that is too large, inf included, becomes 448 (ml_dtypes: NaN; so did earlier releases of torch);
- a float8_e8m0fnu has no sign, and zero becomes the least number, 2**-127 (ml_dtypes: NaN);
- NaNs: a bfloat16 made from float32 or float64 is 0xFFFF, one made from anything else 0x7FC0; a float16 keeps the
  upper bits of the payload and becomes quiet; 8-bit floats have one or two NaNs.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

from ..files.spans import Block
from .dtypes import BY_NAME, DType

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[Any]  # of numbers or codes; which, the dtype beside it says
    Number: TypeAlias = np.floating[Any]

_PARTS = {"complex128": "float64", "complex64": "float32", "complex32": "float16"}
_CODED = ("float16", "bfloat16")


def real(dtype: DType) -> DType:
    """The dtype of the real and the imaginary part of a complex dtype; another dtype is its own."""
    return BY_NAME[_PARTS.get(dtype.name, dtype.name)]


def is_coded(dtype: DType) -> bool:
    """Whether numbers of a dtype are handled as codes: floats of 8 and 16 bits."""
    return dtype.name in _CODED or dtype.name.startswith("float8")


def numbers(raw: Block | bytearray, dtype: DType) -> Array:
    """The numbers of a block, sharing its memory: codes of short floats, the parts of complex numbers in turn."""
    import numpy as np

    part = real(dtype)
    return np.frombuffer(raw, np.dtype(f"u{part.itemsize}" if is_coded(part) else part.name))


def widened(values: Array, dtype: DType) -> Array:
    """The same numbers in a dtype that numpy computes with: short floats as float32, exactly; others as they are."""
    import numpy as np

    if not is_coded(dtype):
        return values
    if dtype.name == "bfloat16":
        bits = values.astype(np.uint32)
        bits <<= np.uint32(16)
        return bits.view(np.float32)
    return looked_up(_widening(dtype.name), values)


def converted(values: Array, source: DType, target: DType) -> Array:
    """Real numbers in another dtype; ``values`` and the result are as :func:`numbers` gives them."""
    import numpy as np

    if source == target:
        return values
    if is_coded(source) and is_coded(target):
        return looked_up(_table(source.name, target.name)[0], values)
    if not is_coded(target):
        wide = widened(values, source)
        return wide != 0 if target.name == "bool" else wide.astype(target.name)
    short = values if values.dtype == np.float32 else values.astype(np.float32)
    return narrowed(short, target, vector=source.name in ("float32", "float64"))


def narrowed(values: Array, target: DType, *, vector: bool = False) -> Array:
    """float32 as the codes of a short float; ``vector`` gives a bfloat16 the NaN of torch's vector code."""
    import numpy as np

    if target.itemsize == 1:
        return looked_up(_table("bfloat16", target.name)[0], rounded_to_odd(values))
    codes: Array = values.astype(np.float16).view(np.uint16) if target.name == "float16" else _bfloat16(values)
    if np.isnan(values.max(initial=-np.inf)):
        nan = np.isnan(values)
        codes[nan] = (
            _short_nan(values[nan].view(np.uint32)) if target.name == "float16" else (0xFFFF if vector else 0x7FC0)
        )
    return codes


def _bfloat16(values: Array) -> Array:
    """The upper halves, rounded to nearest, ties to even; in whole numbers, which costs half of what ml_dtypes does."""
    import numpy as np

    bits = values.view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += bits
    rounded += np.uint32(0x7FFF)
    rounded >>= np.uint32(16)
    return rounded.astype(np.uint16)


def _short_nan(bits: Array) -> Array:
    import numpy as np

    wide = bits.astype(np.uint32)
    return ((wide >> 16 & 0x8000) | 0x7E00 | (wide >> 13 & 0x3FF)).astype(np.uint16)


def rounded_to_odd(values: Array) -> Array:
    """float32 as 16 bits: the upper ones, the last of them set where a lower one was.

    >>> import numpy
    >>> [hex(code) for code in rounded_to_odd(numpy.array([1.0, 1.0000001], dtype=numpy.float32))]
    ['0x3f80', '0x3f81']
    """
    import numpy as np

    bits = values.view(np.uint32)
    sticky = bits & np.uint32(0xFFFF)
    sticky += np.uint32(0xFFFF)
    sticky |= bits
    sticky >>= np.uint32(16)
    return sticky.astype(np.uint16)


def looked_up(table: Array, codes: Array) -> Array:
    """What a table says of each code."""
    import numpy as np

    made: Array = np.empty(codes.shape, table.dtype)
    return np.take(table, codes, out=made, mode="clip")  # clip needs no check of bounds


def too_large(codes: Array, source: DType, target: DType) -> Array | None:
    """Which codes an 8-bit float cannot hold, None where all are small enough."""
    import numpy as np

    flags, least = _table(source.name, target.name)[1:]
    magnitude = np.bitwise_and(codes, (1 << 8 * source.itemsize - 1) - 1)
    return looked_up(flags, codes) if magnitude.max(initial=0) >= least else None


# -- tables


def _every_code(dtype: DType) -> Array:
    import numpy as np

    return np.arange(1 << 8 * dtype.itemsize, dtype=np.dtype(f"u{dtype.itemsize}"))


def _kind(name: str) -> np.dtype[Any]:
    """numpy's dtype of a short float; only those of 8 bits need ml_dtypes."""
    import numpy as np

    if name == "float16":
        return np.dtype(np.float16)
    import ml_dtypes

    found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
    return found


@cache
def _widening(name: str) -> Array:
    """float32 for every code of a short float."""
    import numpy as np

    codes = _every_code(BY_NAME[name])
    if name == "float8_e5m2":  # the upper byte of a float16
        return looked_up(_widening("float16"), codes.astype(np.uint16) << 8)
    with np.errstate(all="ignore"):
        wide = codes.view(_kind(name)).astype(np.float32)
    nan, bits = np.isnan(wide), wide.view(np.uint32)
    sign = bits[nan] & np.uint32(0x80000000)
    if name == "float16":
        bits[nan] |= np.uint32(0x00400000)
    else:
        bits[nan] = (sign | np.uint32(0x7FF00000)) if name == "float8_e4m3fn" else 0x7F800001
    return wide


@cache
def _table(source: str, target: str) -> tuple[Array, Array, int]:
    """For every code of one short float that of another; whether it is too large; the least magnitude that is."""
    import numpy as np

    dtype = BY_NAME[target]
    with np.errstate(all="ignore"):
        wide = widened(_every_code(BY_NAME[source]), BY_NAME[source])
        if dtype.itemsize > 1:
            return narrowed(wide, dtype), np.zeros(0, np.bool_), 0
        made, lost = _eight_bits(wide, dtype)
    magnitudes = np.nonzero(lost[: len(lost) // 2])[0]
    return made, lost, int(magnitudes[0]) if len(magnitudes) else len(lost)


def _eight_bits(wide: Array, dtype: DType) -> tuple[Array, Array]:
    """float32 as an 8-bit float, one by one, and which were too large for it."""
    import numpy as np

    nan, sign = np.isnan(wide), (wide.view(np.uint32) >> 24 & 0x80).astype(np.uint8)
    if dtype.name == "float8_e8m0fnu":
        wide = np.abs(wide)
    made = wide.astype(_kind(dtype.name))
    codes = made.view(np.uint8)
    kept = np.isfinite(wide) if dtype.has_inf else ~nan
    lost: Array = ~np.isfinite(made.astype(np.float32)) & kept
    if dtype.name == "float8_e8m0fnu":
        codes[wide == 0] = 0
        lost &= wide != 0
    if dtype.name == "float8_e4m3fn":
        codes[lost] = sign[lost] | 0x7E
    codes[nan] = (sign[nan] | 0x7F) if dtype.name in ("float8_e4m3fn", "float8_e5m2") else _quiet_nan(dtype)
    return codes, lost


def _quiet_nan(dtype: DType) -> int:
    """The one NaN of an 8-bit float that has no more."""
    return 0xFF if dtype.name == "float8_e8m0fnu" else 0x80
