"""Codes of a few bits that share a word, as plain weights: compressed-tensors', ModelOpt's and gpt-oss's formats.

==================  ============================================================================================
pack-quantized      (code - zero) × scale of the group; codes of 1, 2, 4 or 8 bits in 32, the lowest first, zeros
                    packed along the outputs: compressed-tensors ``compressors/pack_quantized`` (decompress)
NVFP4               float4 × (float8 scale of 16 / global scale): compressed-tensors ``compressors/nvfp4``; with
                    ModelOpt's ``weight_scale_2``, float4 × (float8 scale × scale_2)
MXFP4               float4 × 2 ** (byte of 32 - 127): compressed-tensors ``compressors/mxfp4``; gpt-oss's ``_blocks``
                    and ``_scales``, transposed: transformers ``integrations/mxfp4.py`` (convert_moe_packed_tensors)
==================  ============================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import TYPE_CHECKING

from ..errors import EditError
from ..tensors.codes import Plain, e2m1, floats, nibbles, part, powers, scales, unpacked, values
from ..tensors.dtypes import BY_NAME
from ..tensors.records import Tensor
from ..tensors.views import sliced
from .companions import Relation

if TYPE_CHECKING:
    from ..tensors.conversion import Array

_BITS = (1, 2, 4, 8)  # of codes of which none lies in two words
_GROUPS = {8: 16, 16: 32}  # codes to a scale, by the bytes to a scale: NVFP4 and MXFP4
_WAY = "let the library that wrote it make it plain"


def packed_integers(one: Relation, tensors: Mapping[str, Tensor]) -> Plain:
    """compressed-tensors' pack-quantized weights.  Raises EditError where shapes do not fit or leave the bits open."""
    packed, scale = tensors[one.keys[0]], tensors[f"{one.key}_scale"]
    stated = tensors.get(f"{one.key}_shape")
    if stated is None or len(packed.shape) != 2 or packed.dtype.name != "int32":
        raise EditError(f"{one.key!r}: {packed.dtype} {list(packed.shape)} without a weight_shape", remedy=_WAY)
    shape = tuple(int(size) for size in values(stated).reshape(-1))
    fitting = [bits for bits in _BITS if len(shape) == 2 and ceil(shape[1] * bits / 32) == packed.shape[1]]
    groups = scale.shape[1] if len(scale.shape) == 2 else 1
    fits = len(fitting) == 1 and shape[0] == packed.shape[0] and not shape[1] % max(groups, 1)
    if not fits or scale.numel not in (1, shape[0] * groups):
        problem = f"{one.key!r}: codes {list(packed.shape)} and scales {list(scale.shape)} do not make {list(shape)}"
        raise EditError(problem, remedy=_WAY)
    bits = fitting[0]
    zeros = _zeros(one, tensors, (shape[0], groups), bits)
    index = _index(one, tensors, shape[1], groups)

    def rows(start: int, stop: int) -> Array:
        import numpy as np

        codes = unpacked(part(packed, 0, start, stop), bits)[:, : shape[1]]
        gains = floats(scale).reshape(-1, groups)
        gains = gains[start:stop] if len(gains) > 1 else gains
        shifts = np.int32(1 << (bits - 1)) if zeros is None else zeros[start:stop][:, index]
        return (codes - shifts).astype(np.float32) * gains[:, index]

    return Plain((shape[0], shape[1]), scale.dtype, tuple(tensors.values()), rows)


def _zeros(one: Relation, tensors: Mapping[str, Tensor], shape: tuple[int, int], bits: int) -> Array | None:
    """The zeros of every output and group, as codes; None where they are all in the middle."""
    packed = tensors.get(f"{one.key}_zero_point")
    if packed is None:
        return None
    if packed.dtype.name != "int32" or packed.shape != (ceil(shape[0] * bits / 32), shape[1]):
        raise EditError(f"{one.key!r}: zeros {packed.dtype} {list(packed.shape)} do not fit {list(shape)}", remedy=_WAY)
    return unpacked(values(packed).T, bits)[:, : shape[0]].T


def _index(one: Relation, tensors: Mapping[str, Tensor], inputs: int, groups: int) -> Array:
    """The group of every input: in order, or as ``weight_g_idx`` says (all -1: nothing was reordered)."""
    import numpy as np

    stated = tensors.get(f"{one.key}_g_idx")
    found = np.arange(inputs) // (inputs // max(groups, 1) or 1)
    if stated is None:
        return found
    given = values(stated).reshape(-1).astype(np.int64)
    if len(given) != inputs or given.max(initial=0) >= groups:
        raise EditError(f"{one.key!r}: weight_g_idx {list(stated.shape)} does not fit {inputs:,} inputs", remedy=_WAY)
    return found if bool((given < 0).any()) else given


def float4(one: Relation, tensors: Mapping[str, Tensor]) -> Plain:
    """NVFP4 and MXFP4: two codes in a byte.  Raises EditError where there is no formula for the shapes."""
    packed, scale = tensors[one.keys[0]], tensors[f"{one.key}_scale"]
    divisor, factor = tensors.get(f"{one.key}_global_scale"), tensors.get(f"{one.key}_scale_2")
    ratio = packed.shape[-1] / (scale.shape[-1] or 1) if packed.shape and len(scale.shape) == len(packed.shape) else 0
    size = _GROUPS.get(int(ratio), 0) if ratio == int(ratio) else 0
    is_mx = scale.dtype.name in ("uint8", "float8_e8m0fnu")
    has_global = divisor is not None or factor is not None
    is_known = packed.dtype.name == "uint8" and packed.shape[:-1] == scale.shape[:-1] and has_global != is_mx
    if not is_known or size != (32 if is_mx else 16) or f"{one.key}_zero_point" in tensors:
        problem = f"{one.key!r}: {packed.dtype} {list(packed.shape)} with scales {scale.dtype} {list(scale.shape)}"
        raise EditError(f"{problem} are of a format whose formula is not known here", remedy=_WAY)

    def rows(start: int, stop: int) -> Array:
        gains = scales(sliced(scale, 0, start, stop))
        if divisor is not None:
            gains = gains / floats(divisor).reshape(-1)[:1]
        elif factor is not None:
            gains = gains * floats(factor).reshape(-1)[:1]
        return e2m1()[nibbles(part(packed, 0, start, stop))] * gains.repeat(size, -1)

    shape = (*packed.shape[:-1], 2 * packed.shape[-1])
    return Plain(shape, BY_NAME["bfloat16"], tuple(tensors.values()), rows)


def blocks4(one: Relation, tensors: Mapping[str, Tensor]) -> Plain:
    """gpt-oss's experts: ``_blocks`` [experts, outputs, groups, bytes], made [experts, inputs, outputs]."""
    packed, scale = (tensors[key] for key in one.keys[:2])
    if len(packed.shape) != 4 or packed.shape[:-1] != scale.shape or packed.shape[-1] != 16:
        problem = f"{one.key!r}: blocks {list(packed.shape)} and scales {list(scale.shape)} do not fit"
        raise EditError(problem, remedy=_WAY)
    experts, outputs, groups, _ = packed.shape

    def rows(start: int, stop: int) -> Array:
        numbers = e2m1()[nibbles(part(packed, 0, start, stop))]
        made = numbers * powers(part(scale, 0, start, stop))[..., None]
        return made.reshape(stop - start, outputs, -1).swapaxes(1, 2)

    return Plain((experts, groups * 32, outputs), BY_NAME["bfloat16"], (packed, scale), rows)
