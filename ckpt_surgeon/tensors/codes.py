"""Codes of quantised weights as numbers: packed bits taken apart, tables looked up, scales spread over their blocks.

Numbers are numpy's float32 (or integers); what is made of them is rounded once, as torch rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil, prod
from typing import TYPE_CHECKING

from ..files.spans import Block
from .casts import bytes_of
from .conversion import converted, numbers, widened
from .dtypes import BY_NAME, DType
from .records import ComputedTensor, Tensor
from .views import reshaped, sliced, viewed

if TYPE_CHECKING:
    from .conversion import Array

Rows = Callable[[int, int], "Array"]  # some rows of a result, in float32

# The sixteen values of a float4_e2m1: a sign, two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0).
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True, slots=True)
class Plain:
    """What a weight becomes: its shape, the dtype that its writer means, and what makes its rows."""

    shape: tuple[int, ...]
    dtype: DType
    inputs: tuple[Tensor, ...]
    rows: Rows
    step: int = 1  # rows are asked for in multiples of so many

    def tensor(self, dtype: DType, elements: int) -> ComputedTensor:
        """The tensor that the rows make up, about so many elements at a time."""
        width = prod(self.shape[1:]) or 1
        step = max(elements // width // self.step, 1) * self.step

        def make(_: tuple[Tensor, ...]) -> Iterator[Block]:
            import numpy as np

            for start in range(0, self.shape[0], step):
                with np.errstate(all="ignore"):
                    made = self.rows(start, min(start + step, self.shape[0]))
                    yield bytes_of(converted(np.ascontiguousarray(made).reshape(-1), BY_NAME["float32"], dtype))

        return ComputedTensor(dtype, self.shape, self.inputs, make)


def values(tensor: Tensor) -> Array:
    """All numbers of a tensor in its shape: short floats as float32, others as they are."""
    raw = b"".join(tensor.blocks())
    return widened(numbers(raw, tensor.dtype), tensor.dtype).reshape(tensor.shape)


def floats(tensor: Tensor) -> Array:
    """All numbers of a tensor in its shape, in float32."""
    import numpy as np

    return values(tensor).astype(np.float32, copy=False)


def part(tensor: Tensor, axis: int, start: int, stop: int) -> Array:
    """Some indices of a dimension, as :func:`values` gives them."""
    return values(sliced(tensor, axis, start, stop))


def viewed_as(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor with ones in its shape, or without."""
    return reshaped("scale", viewed(tensor), shape)


def unpacked(packed: Array, bits: int, order: Sequence[int] = ()) -> Array:
    """Codes [n, k] of 32 bits as [n, k · 32 / bits] numbers; ``order`` is where each lies, counted from the lowest.

    >>> import numpy
    >>> unpacked(numpy.array([[0x76543210]], dtype=numpy.int32), 4).tolist()
    [[0, 1, 2, 3, 4, 5, 6, 7]]
    """
    import numpy as np

    shifts = np.array(order or range(32 // bits), np.int32) * np.int32(bits)
    found: Array = (packed[..., None] >> shifts) & np.int32(2**bits - 1)
    return found.reshape(*packed.shape[:-1], -1)


def nibbles(packed: Array, *, high_first: bool = False) -> Array:
    """The two codes of 4 bits in each byte of the last dimension, in turn; the lower ones come first.

    >>> import numpy
    >>> nibbles(numpy.array([0x21, 0x43], dtype=numpy.uint8)).tolist()
    [1, 2, 3, 4]
    """
    import numpy as np

    halves = (packed >> 4, packed & 15) if high_first else (packed & 15, packed >> 4)
    return np.stack(halves, axis=-1).reshape(*packed.shape[:-1], -1)


@cache
def e2m1() -> Array:
    """The values of :data:`E2M1` as a table of float32."""
    import numpy as np

    return np.array(E2M1, np.float32)


def powers(exponents: Array) -> Array:
    """Powers of two for the bytes of an E8M0 scale: 2 ** (byte - 127); the greatest is inf, as in float32.

    >>> import numpy
    >>> powers(numpy.array([126, 127, 128], dtype=numpy.uint8)).tolist()
    [0.5, 1.0, 2.0]
    """
    import numpy as np

    return np.ldexp(np.float32(1), exponents.astype(np.int32) - 127)


def scales(tensor: Tensor) -> Array:
    """Scales in float32; bytes are exponents of two (E8M0), of which float8_e8m0fnu knows by itself."""
    found = values(tensor)
    if tensor.dtype.name == "uint8":
        return powers(found)
    import numpy as np

    return found.astype(np.float32, copy=False)


def spread(
    scale: Tensor,
    codes: tuple[int, ...],
    sizes: tuple[int, ...],
    start: int,
    stop: int,
    *,
    read: Callable[[Tensor], Array] = scales,
) -> Array:
    """The scales (or zeros) of some rows, one for each code or to be broadcast: ``sizes`` are those of a block."""
    counts = tuple(ceil(size / one) for size, one in zip(codes, sizes, strict=True))
    first, last = start // sizes[0], ceil(stop / sizes[0])
    found = read(sliced(viewed_as(scale, counts), 0, first, last))
    for axis, (size, one) in enumerate(zip(codes, sizes, strict=True)):
        if axis == 0:
            shift = start - first * one
            found = found.repeat(one, 0)[shift : shift + stop - start] if one > 1 else found
        elif one not in (1, size):
            found = found.repeat(one, axis)[(slice(None),) * axis + (slice(size),)]
    return found
