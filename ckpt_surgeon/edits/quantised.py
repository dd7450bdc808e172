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
===================  ============================================================================================

Every result is made in blocks of rows when it is written; codes and scales are read row by row with them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import TYPE_CHECKING, Annotated

from ..errors import Argument, EditError, NothingMatched, Phrase
from ..files.spans import Block
from ..tensors.checkpoint import Checkpoint
from ..tensors.dtypes import BY_NAME, DType
from ..tensors.dtypes import parse as parse_dtype
from ..tensors.records import ComputedTensor, Tensor
from ..tensors.torch_bridge import raw_bytes, whole
from ..tensors.views import reshaped, sliced, viewed
from . import companions
from .arguments import Patterns
from .change import AllowUnmatched, Change, Inline, listed_patterns, matching
from .companions import Relation
from .value_edit import regrouped, settled, value_edit

if TYPE_CHECKING:
    import torch

PIECE = 4 << 20  # elements of a result that are made at a time
USUAL = 128  # rows and columns of a block, where the shapes leave it open
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where each column lies in its 32 bits

Rows = Callable[[int, int], "torch.Tensor"]  # some rows of a result, in float32


@dataclass(frozen=True, slots=True)
class _Plain:
    """What a weight becomes: its shape, the dtype that its writer means, and what makes its rows."""

    shape: tuple[int, ...]
    dtype: DType
    inputs: tuple[Tensor, ...]
    rows: Rows
    step: int = 1  # rows are asked for in multiples of so many


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
    """Turn quantised weights into plain ones: float8 and int8 with scales, bitsandbytes' int8, nf4, fp4, GPTQ, AWQ.

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
    sets: list[tuple[tuple[str, ...], dict[str, Tensor]]] = []
    for one in found:
        if one.key not in chosen:
            continue
        try:
            plain = _plain(state_dict, one, tuple(block), gptq_v2=gptq_v2)
            sets.append((one.keys, {one.key: _computed(plain, wanted or plain.dtype)}))
        except EditError as error:
            problems += error.problems
    if problems:
        raise EditError(problems)
    return settled(regrouped(state_dict, sets), sets)


def _plain(state_dict: Checkpoint, one: Relation, block: tuple[int, ...], *, gptq_v2: bool) -> _Plain:
    tensors = {key: state_dict[key] for key in one.keys}
    if one.kind in (companions.FLOAT8, companions.INT8):
        return _scaled(one, tensors, block)
    if one.kind == companions.INT8_ROWS:
        return _int8_rows(one, tensors)
    if one.kind == companions.NORMAL4:
        return _four_bits(one, tensors)
    return _packed(one, tensors, zero=0 if gptq_v2 or one.kind == companions.AWQ else 1)


def _computed(plain: _Plain, dtype: DType) -> ComputedTensor:
    """The tensor that rows make up, some at a time."""
    width = prod(plain.shape[1:]) or 1
    step = max(PIECE // width // plain.step, 1) * plain.step

    def make(_: tuple[Tensor, ...]) -> Iterator[Block]:
        import torch

        wanted = getattr(torch, dtype.name)
        for start in range(0, plain.shape[0], step):
            made = plain.rows(start, min(start + step, plain.shape[0]))
            yield raw_bytes(made.to(wanted).contiguous())

    return ComputedTensor(dtype, plain.shape, plain.inputs, make)


# -- codes and scales of blocks


def _scaled(one: Relation, tensors: Mapping[str, Tensor], block: tuple[int, ...]) -> _Plain:
    codes, scale = tensors[one.keys[0]], tensors[one.keys[1]]
    zeros = tensors.get(f"{one.key}_zero_point")
    if f"{one.key}_g_idx" in tensors or f"{one.key}_scale_2" in tensors:
        raise EditError(f"{one.key!r} has further parts, whose formula is not known here")
    if not codes.shape:
        raise EditError(f"{one.key!r} is a single number")
    sizes = _block_sizes(one.key, codes.shape, scale.shape, block)

    def rows(start: int, stop: int) -> torch.Tensor:
        values = whole(sliced(codes, 0, start, stop)).float()
        if zeros is not None:
            values = values - _spread(zeros, codes.shape, sizes, start, stop)
        return values * _spread(scale, codes.shape, sizes, start, stop)

    half = scale.dtype.name in ("float16", "bfloat16")
    inputs = (codes, scale) if zeros is None else (codes, scale, zeros)
    return _Plain(codes.shape, scale.dtype if half else BY_NAME["bfloat16"], inputs, rows)


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


def _spread(scale: Tensor, codes: tuple[int, ...], sizes: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
    """The scales of some rows, one for each code or to be broadcast; float8_e8m0fnu are powers of two."""
    counts = [ceil(size / one) for size, one in zip(codes, sizes, strict=True)]
    first, last = start // sizes[0], ceil(stop / sizes[0])
    part = whole(sliced(viewed_as(scale, tuple(counts)), 0, first, last)).float()
    for axis, (size, one) in enumerate(zip(codes, sizes, strict=True)):
        if axis == 0:
            shift = start - first * one
            part = part.repeat_interleave(one, 0)[shift : shift + stop - start] if one > 1 else part
        elif one not in (1, size):
            part = part.repeat_interleave(one, axis).narrow(axis, 0, size)
    return part


def viewed_as(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor with ones in its shape, or without."""
    return reshaped("scale", viewed(tensor), shape)


# -- bitsandbytes


def _int8_rows(one: Relation, tensors: Mapping[str, Tensor]) -> _Plain:
    codes, scale = tensors[one.keys[0]], tensors[one.keys[1]]
    if len(codes.shape) != 2 or scale.numel != codes.shape[0]:
        raise EditError(f"{one.key!r} {list(codes.shape)} and its SCB {list(scale.shape)} do not fit")
    layout = tensors.get(f"{one.key}_format")
    if layout is not None and bytes(b"".join(layout.blocks()))[:1] not in (b"", b"\0"):
        raise EditError(f"{one.key!r} is stored in the order of a GPU's tiles; save it in row-major order first")

    def rows(start: int, stop: int) -> torch.Tensor:
        values = whole(sliced(codes, 0, start, stop)).float()
        gains = whole(sliced(scale, 0, start, stop)).float().reshape(-1, 1)
        return values * gains * 7.874015748031496e-3  # 1 / 127

    return _Plain(codes.shape, BY_NAME["float16"], (codes, scale), rows)


def _four_bits(one: Relation, tensors: Mapping[str, Tensor]) -> _Plain:
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

    def scales(low: int, high: int) -> torch.Tensor:
        part = whole(sliced(absmax, 0, low, high))
        if nested[0] is None or nested[1] is None:
            return part.float()
        numbers = part.long()
        import torch

        blocks = torch.arange(low, high) // nested_size
        return whole(nested[1]).float()[numbers] * whole(nested[0]).float()[blocks] + offset

    def rows(start: int, stop: int) -> torch.Tensor:
        import torch

        low, high = start * width, stop * width
        packed = whole(sliced(flat, 0, low // flat.dtype.itemsize // 2, -(-high // (2 * flat.dtype.itemsize))))
        packed = packed.view(torch.uint8)
        skipped = low - low // (2 * flat.dtype.itemsize) * 2 * flat.dtype.itemsize
        nibbles = torch.stack([packed >> 4, packed & 15], 1).flatten()[skipped : skipped + high - low]
        first = low // size
        gains = scales(first, ceil(high / size)).repeat_interleave(size)[low - first * size :][: high - low]
        return (whole(table).float()[nibbles.long()] * gains).reshape(stop - start, *shape[1:])

    return _Plain(shape, dtype, tuple(tensors.values()), rows)


# -- GPTQ and AWQ


def _packed(one: Relation, tensors: Mapping[str, Tensor], *, zero: int) -> _Plain:
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

    def rows(start: int, stop: int) -> torch.Tensor:
        import torch

        order = AWQ_ORDER if is_awq else tuple(range(per))
        low, high = start // per, ceil(stop / per)
        offsets = _unpacked(whole(sliced(zeros, 1, low, high)), bits, order)[:, : stop - start] + zero
        if is_awq:
            values = _unpacked(whole(sliced(codes, 1, low, high)), bits, order)[:, : stop - start]
        else:
            values = _unpacked(whole(sliced(codes, 1, start, stop)).t(), bits, order).t()
        group = torch.arange(inputs) // (inputs // groups) if index is None else whole(index).long()
        gains = whole(sliced(scales, 1, start, stop)).float()
        return ((values - (offsets & (2**bits - 1) if zero else offsets)[group]) * gains[group]).t()

    shape = (outputs, inputs)
    return _Plain(shape, scales.dtype, tuple(tensors.values()), rows, step=per)


def _unpacked(packed: torch.Tensor, bits: int, order: Sequence[int]) -> torch.Tensor:
    """Codes [n, k] of 32 bits as [n, k * 32 / bits] numbers; ``order`` is where each lies, counted from the lowest."""
    import torch

    shifts = torch.tensor(order, dtype=torch.int32) * bits
    numbers: torch.Tensor = (packed[..., None] >> shifts) & (2**bits - 1)
    return numbers.flatten(-2)
