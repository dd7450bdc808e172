"""Quantised weights as plain ones: the inverse of each scheme, by the reference formula of whoever wrote the codes.

===================  ============================================================================================
float8, int8         codes × scale of their block: DeepSeek-V3 ``inference/kernel.py`` (weight_dequant),
                     compressed-tensors ``quantization/lifecycle/forward.py`` (dequantize)
bitsandbytes int8    codes × SCB / 127, row by row: ``backends/default/ops.py`` (int8_vectorwise_dequant)
nf4, fp4             quant_map[code] × absmax of the block; a nested absmax is nested_quant_map[absmax] × nested_absmax
                     + offset: ``functional.py`` (dequantize_4bit, dequantize_blockwise)
GPTQ                 scales[group] × (code - zero - 1), packed along the inputs: AutoGPTQ ``qlinear_cuda_old.py``
AWQ                  scales[group] × (code - zero), packed along the outputs in the order 0 2 4 6 1 3 5 7: AutoAWQ
                     ``utils/packing_utils.py``
pack-quantized,      see :mod:`ckpt_surgeon.edits.packed`
NVFP4, MXFP4
===================  ============================================================================================

Every result is made in blocks of rows when it is written; codes and scales are read row by row with them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import ceil, prod
from typing import TYPE_CHECKING, Annotated

from ..errors import Argument, EditError, NothingMatched, Phrase, listed
from ..tensors.checkpoint import Checkpoint
from ..tensors.codes import Plain, floats, nibbles, part, spread, unpacked, values, viewed_as
from ..tensors.dtypes import BY_NAME
from ..tensors.dtypes import parse as parse_dtype
from ..tensors.records import Tensor
from . import companions
from .arguments import Patterns
from .change import AllowUnmatched, Change, Inline, listed_patterns, matching
from .companions import Relation
from .packed import blocks4, float4, packed_integers
from .value_edit import regrouped, settled, value_edit

if TYPE_CHECKING:
    from ..tensors.conversion import Array

PIECE = 4 << 20  # elements of a result that are made at a time
USUAL = 128  # rows and columns of a block, where the shapes leave it open
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where each column lies in its 32 bits


@value_edit(
    "Turn codes and scales into plain weights.",
    "fp8.safetensors plain.safetensors --dtype bf16",
    inline=[Inline("", help="Turn codes and scales into plain weights.")],
)
def dequantize(
    state_dict: Checkpoint,
    patterns: Annotated[Patterns, "Globs on the plain keys."] = "*",
    *,
    dtype: Annotated[str, "The dtype of the results: bf16, fp16, fp32 …"] = "",
    block: Annotated[Sequence[int], "A scale's block, as 128,128, where shapes leave it open."] = (),
    gptq_v2: Annotated[bool, "GPTQ's zeros are stored as they are, not less one."] = False,
    allow_unmatched: AllowUnmatched = False,
) -> Change[Checkpoint]:
    """Turn quantised weights into plain ones: codes and scales of float8, int8, NVFP4, MXFP4, bitsandbytes, GPTQ, AWQ.

    ``patterns`` are globs on the plain keys (``*.q_proj.weight``).  ``dtype`` is that of the results; without it the
    one that the codes were made of, where they tell (scales in half precision, bitsandbytes' state), else bfloat16.
    ``block`` is the size of a scale's block, as 128,128, where the shapes leave it open; ``gptq_v2`` says that zeros
    are stored as they are, not less one.  Scales and maps go.  Raises NothingMatched where there is nothing to
    dequantize, EditError naming every weight whose parts do not fit.

    >>> import torch
    >>> state = {"fc.weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "fc.weight_scale": torch.tensor([[2.0], [3.0]])}
    >>> dequantize(state, dtype="fp32")
    {'fc.weight': tensor([[2., 2.],
            [3., 3.]])}
    """
    wanted = parse_dtype(dtype) if dtype else None
    found = [one for one in companions.relations(state_dict) if one.has_codes]
    chosen = matching([one.key for one in found], patterns, allow_unmatched=True)
    if not chosen and not allow_unmatched:
        raise NothingMatched(listed_patterns(patterns), what="quantised weight", examples=state_dict)
    problems: list[str] = []
    remedy: str | Phrase = ""
    sets: list[tuple[tuple[str, ...], dict[str, Tensor]]] = []
    for one in found:
        if one.key not in chosen:
            continue
        try:
            plain = _plain(state_dict, one, tuple(block), gptq_v2=gptq_v2)
            sets.append((one.keys, {one.key: plain.tensor(wanted or plain.dtype, PIECE)}))
        except EditError as error:
            problems += error.problems
            remedy = remedy or error.remedy
    if problems:
        raise EditError(problems, remedy=remedy)
    return settled(regrouped(state_dict, sets), sets)


def _plain(state_dict: Checkpoint, one: Relation, block: tuple[int, ...], *, gptq_v2: bool) -> Plain:
    tensors = {key: state_dict[key] for key in one.keys}
    if one.kind in (companions.FLOAT8, companions.INT8):
        return _scaled(one, tensors, block)
    if one.kind in _BY_KIND:
        return _BY_KIND[one.kind](one, tensors)
    return _packed(one, tensors, zero=0 if gptq_v2 or one.kind == companions.AWQ else 1)


# -- codes and scales of blocks


def _scaled(one: Relation, tensors: Mapping[str, Tensor], block: tuple[int, ...]) -> Plain:
    codes, scale = tensors[one.keys[0]], tensors[one.keys[1]]
    zeros = tensors.get(f"{one.key}_zero_point")
    if further := [key for end in ("_g_idx", "_scale_2", "_global_scale") if (key := f"{one.key}{end}") in tensors]:
        problem = f"{one.key!r} has {listed(further)}, and a formula with these is not known here"
        raise EditError(problem, remedy="let the library that wrote it make it plain")
    if not codes.shape:
        raise EditError(f"{one.key!r} is a single number")
    sizes = _block_sizes(one.key, codes.shape, scale.shape, block)

    def rows(start: int, stop: int) -> Array:
        import numpy as np

        made = part(codes, 0, start, stop).astype(np.float32, copy=False)
        if zeros is not None:
            made = made - spread(zeros, codes.shape, sizes, start, stop, read=floats)
        return made * spread(scale, codes.shape, sizes, start, stop)

    half = scale.dtype.name in ("float16", "bfloat16")
    inputs = (codes, scale) if zeros is None else (codes, scale, zeros)
    return Plain(codes.shape, scale.dtype if half else BY_NAME["bfloat16"], inputs, rows)


def _block_sizes(key: str, codes: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, ...]) -> tuple[int, ...]:
    """How many indices of each dimension have one scale.  Raises EditError where the shapes do not tell."""
    counts = scale if len(scale) == len(codes) else (*scale, *(1,) * (len(codes) - len(scale)))
    counts = (1,) * len(codes) if prod(scale) == 1 else counts
    if len(counts) != len(codes):
        raise EditError(f"{key!r} {list(codes)} and its scale {list(scale)} do not fit")
    stated = (1,) * (len(codes) - len(block)) + block if block else (0,) * len(codes)
    sizes = []
    for size, count, wanted in zip(codes, counts, stated, strict=True):
        fitting = [size if count == 1 else 0, 1 if count == size else 0, wanted, USUAL, -(-size // max(count, 1))]
        usable = [one for one in fitting if one and ceil(size / one) == count]
        exact = usable and (usable[0] in (1, size, wanted, USUAL) or size % count == 0)
        if not exact:
            problem = f"{key!r} {list(codes)} and its scale {list(scale)} leave the size of a block open"
            raise EditError(problem, remedy=Phrase("give it: ", Argument("block", [USUAL, USUAL])))
        sizes.append(usable[0])
    return tuple(sizes)


# -- bitsandbytes


def _int8_rows(one: Relation, tensors: Mapping[str, Tensor]) -> Plain:
    codes, scale = tensors[one.keys[0]], tensors[one.keys[1]]
    if len(codes.shape) != 2 or scale.numel != codes.shape[0]:
        raise EditError(f"{one.key!r} {list(codes.shape)} and its SCB {list(scale.shape)} do not fit")
    layout = tensors.get(f"{one.key}_format")
    if layout is not None and bytes(b"".join(layout.blocks()))[:1] not in (b"", b"\0"):
        raise EditError(f"{one.key!r} is stored in the order of a GPU's tiles; save it in row-major order first")

    def rows(start: int, stop: int) -> Array:
        import numpy as np

        gains = part(viewed_as(scale, (codes.shape[0],)), 0, start, stop).astype(np.float32, copy=False)
        return part(codes, 0, start, stop).astype(np.float32) * gains[:, None] * np.float32(7.874015748031496e-3)

    return Plain(codes.shape, BY_NAME["float16"], (codes, scale), rows)


def _four_bits(one: Relation, tensors: Mapping[str, Tensor]) -> Plain:
    key = one.key
    state_key = next((name for name in one.keys if ".quant_state." in name), None)
    if state_key is None or f"{key}.quant_map" not in tensors:
        raise EditError(f"{key!r}: its quant_state is not in the checkpoint, which has its shape")
    try:
        state = json.loads(b"".join(bytes(part) for part in tensors[state_key].blocks()))
        shape, size, dtype = tuple(map(int, state["shape"])), int(state["blocksize"]), parse_dtype(str(state["dtype"]))
        nested_size, offset = int(state.get("nested_blocksize") or 0), float(state.get("nested_offset") or 0)
    except (ValueError, KeyError, TypeError) as error:
        raise EditError(f"{key!r}: its quant_state cannot be read ({error})") from error
    codes, absmax, table = tensors[key], tensors[f"{key}.absmax"], tensors[f"{key}.quant_map"]
    if not shape or min(shape) < 1 or size < 2 or codes.nbytes != (prod(shape) + 1) // 2 or table.numel != 16:
        raise EditError(f"{key!r}: {codes.nbytes:,} bytes of codes do not make {list(shape)} in blocks of {size}")
    if absmax.numel != ceil(prod(shape) / size):
        raise EditError(f"{key!r}: {absmax.numel:,} scales do not fit {prod(shape):,} codes in blocks of {size}")
    nested = tensors.get(f"{key}.nested_absmax"), tensors.get(f"{key}.nested_quant_map")
    flat, width = viewed_as(codes, (codes.numel,)), prod(shape[1:])

    def scales(low: int, high: int) -> Array:
        import numpy as np

        found = part(absmax, 0, low, high)
        if nested[0] is None or nested[1] is None:
            return found.astype(np.float32, copy=False)
        blocks = np.arange(low, high) // nested_size
        return floats(nested[1])[found] * floats(nested[0])[blocks] + np.float32(offset)

    def rows(start: int, stop: int) -> Array:
        import numpy as np

        low, high, per = start * width, stop * width, 2 * flat.dtype.itemsize
        packed = np.ascontiguousarray(part(flat, 0, low // per, -(-high // per))).view(np.uint8)
        codes = nibbles(packed, high_first=True)[low % per :][: high - low]
        first = low // size
        gains = scales(first, ceil(high / size)).repeat(size)[low - first * size :][: high - low]
        return (floats(table)[codes] * gains).reshape(stop - start, *shape[1:])

    return Plain(shape, dtype, tuple(tensors.values()), rows)


# -- GPTQ and AWQ


def _packed(one: Relation, tensors: Mapping[str, Tensor], *, zero: int) -> Plain:
    prefix = one.key.removesuffix("weight")
    is_awq = one.kind == companions.AWQ
    codes, scales = tensors[f"{prefix}qweight"], tensors[f"{prefix}scales"]
    zeros, index = tensors.get(f"{prefix}qzeros"), tensors.get(f"{prefix}g_idx")
    if len(codes.shape) != 2 or len(scales.shape) != 2 or zeros is None or codes.dtype.name != "int32":
        raise EditError(f"{one.key!r}: qweight {codes.dtype} {list(codes.shape)} and scales do not fit")
    outputs, groups = scales.shape[1], scales.shape[0]
    inputs = codes.shape[0] if is_awq else (index.numel if index is not None else codes.shape[0] * 8)
    bits = 4 if is_awq else 32 * codes.shape[0] // max(inputs, 1)
    fits = bits in (2, 4, 8) and codes.shape == ((inputs, outputs // 8) if is_awq else (inputs * bits // 32, outputs))
    if not fits or zeros.shape != (groups, outputs * bits // 32) or inputs % groups:
        raise EditError(f"{one.key!r}: qweight {list(codes.shape)}, qzeros and scales {list(scales.shape)} do not fit")
    per = 32 // bits

    def rows(start: int, stop: int) -> Array:
        import numpy as np

        order = AWQ_ORDER if is_awq else tuple(range(per))
        low, high = start // per, ceil(stop / per)
        offsets = unpacked(part(zeros, 1, low, high), bits, order)[:, : stop - start] + np.int32(zero)
        offsets = offsets & np.int32(2**bits - 1) if zero else offsets
        if is_awq:
            made = unpacked(part(codes, 1, low, high), bits, order)[:, : stop - start]
        else:
            made = unpacked(part(codes, 1, start, stop).T, bits, order).T
        group = np.arange(inputs) // (inputs // groups) if index is None else values(index)
        gains = part(scales, 1, start, stop).astype(np.float32, copy=False)
        return ((made - offsets[group]).astype(np.float32) * gains[group]).T

    shape = (outputs, inputs)
    return Plain(shape, scales.dtype, tuple(tensors.values()), rows, step=per)


_BY_KIND = {
    companions.INT8_ROWS: _int8_rows,
    companions.NORMAL4: _four_bits,
    companions.PACKED: packed_integers,
    companions.FLOAT4: float4,
    companions.BLOCKS4: blocks4,
}
