"""Which tensors of a state_dict belong together, as data: codes and their scales, pairs, masks, ties, extra states.

:func:`relations` finds them by the names and dtypes that quantisers and wrappers write.  :func:`checked` is asked of
every change that an edit plans: it refuses one that touches a part and forgets the others.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..errors import Argument, Call, EditError, Phrase, listed
from ..tensors.extra_state import is_extra_state

# Kinds of relations.  The values of codes mean nothing without their scales.
FLOAT8, INT8, NORMAL4, INT8_ROWS, GPTQ, AWQ = "float8", "int8", "4-bit", "int8 rows", "GPTQ", "AWQ"
PACKED, FLOAT4, BLOCKS4 = "packed integers", "float4", "float4 blocks"
CODES = frozenset({FLOAT8, INT8, NORMAL4, INT8_ROWS, GPTQ, AWQ, PACKED, FLOAT4, BLOCKS4})
LORA, WEIGHT_NORM, SPECTRAL_NORM, MASKED, PARAMETRIZED = "LoRA", "weight norm", "spectral norm", "mask", "parametrized"
REPLACED = "replaced by PEFT"

# What is in the name of one tensor of each relation; a name ends at a new line.
_MARKS = ("scale", "absmax", "SCB\n", "qweight\n", "_g\n", "_orig\n", "parametrizations.", "lora_", "modules_to_save")
_SCALES = ("_scale_inv", "_scale")  # behind the codes' key; DeepSeek-V3, compressed-tensors, fbgemm, ModelOpt
_BESIDE = ("_zero_point", "_scale_2", "_global_scale", "_g_idx", "_shape")  # further parts, behind the codes' key
# What goes through the layer has scales of its own.
_ACTIVATIONS = tuple(f"input_{name}" for name in ("scale", "global_scale", "zero_point", "scale_ub"))
_ACTIVATIONS += ("activation_scale", "output_scale")
_STATES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")  # bitsandbytes, 4 bits
_LORA = re.compile(r"(.*?)\.?(lora_(?:embedding_)?A|lora_down|lora_a)((?:\..+)?)")
_PARTNERS = {"lora_A": "lora_B", "lora_embedding_A": "lora_embedding_B", "lora_down": "lora_up", "lora_a": "lora_b"}
_PARAMETRIZED = re.compile(r"(.*\.|)parametrizations\.([^.]+)\.original(0?)")
_STACK = re.compile(r"(.*\bexperts)\.\d+\.(.+)")


@dataclass(frozen=True, slots=True)
class Relation:
    """Tensors that belong together: the plain ``key`` that they stand for, and their keys, the main one first.

    ``label`` says what the main one is, for people: "float8 codes with block scales".
    """

    kind: str
    key: str
    keys: tuple[str, ...]
    label: str

    @property
    def has_codes(self) -> bool:
        """Whether the first tensor's values mean nothing without the others."""
        return self.kind in CODES


def relations(state_dict: Mapping[str, object]) -> list[Relation]:
    """The relations between the tensors of a state_dict, in the order of its keys.

    >>> from ckpt_surgeon.models.targets import Expected
    >>> from ckpt_surgeon.tensors.dtypes import parse
    >>> codes, scale = Expected(parse("float8_e4m3fn"), (256, 256), True), Expected(parse("float32"), (2, 2), True)
    >>> [found] = relations({"proj.weight": codes, "proj.weight_scale_inv": scale})
    >>> found.label, found.keys
    ('float8 codes with block scales', ('proj.weight', 'proj.weight_scale_inv'))
    """
    found: list[Relation] = []
    names = "\n".join([*map(str, state_dict), ""])
    if not any(mark in names for mark in _MARKS):  # most state_dicts have none, and many have very many keys
        return found
    for key, tensor in state_dict.items():
        for finder in (_scaled, _shared, _bitsandbytes, _packed, _lora, _reparametrised, _peft):
            relation = finder(state_dict, key, tensor)
            if relation is not None:
                found.append(relation)
                break
    return found


def left_alone(state_dict: Mapping[str, object]) -> set[str]:
    """The keys whose values are no weights: scales, maps and zeros of codes, masks, extra states."""
    keys = {key for key in state_dict if is_extra_state(key)}
    for one in relations(state_dict):
        if one.has_codes or one.kind == MASKED:
            keys.update(one.keys[1:])
    return keys


def summary(state_dict: Mapping[str, object]) -> list[str]:
    """What belongs together, counted, for people.

    >>> from ckpt_surgeon.models.targets import Expected
    >>> from ckpt_surgeon.tensors.dtypes import parse
    >>> half = Expected(parse("float16"), (2, 2), True)
    >>> summary({"fc.weight_g": half, "fc.weight_v": half})
    ['1 weight is weight norm: gain and direction']
    """
    lines = []
    for label, count in Counter(one.label for one in relations(state_dict)).items():
        lines.append(f"1 weight is {label}" if count == 1 else f"{count:,} weights are {label}")
    groups: dict[object, int] = Counter(tie for tensor in state_dict.values() if (tie := _tie(tensor)) is not None)
    if tied := sum(count for count in groups.values() if count > 1):
        lines.append(f"{tied:,} keys are tied: several names of one tensor")
    if extra := sum(map(is_extra_state, state_dict)):
        lines.append("1 key is the extra state of a module" if extra == 1 else f"{extra:,} keys are extra states")
    if stacks := len(
        {(found[1], found[2]) for key in state_dict if "experts" in key and (found := _STACK.fullmatch(key))}
    ):
        lines.append("1 stack of experts" if stacks == 1 else f"{stacks:,} stacks of experts, a key for each expert")
    return lines


# -- what an edit does to them


def checked(
    before: Mapping[str, object],
    result: Mapping[str, object],
    origins: Mapping[str, Sequence[str]],
    settled: frozenset[str] = frozenset(),
) -> list[str]:
    """Notes on the relations that a change parts.  Raises EditError for one that it would make wrong.

    Codes and their scales keep their values; of a pair, not one alone gets another shape.  ``settled`` are the keys
    whose relations the edit itself has seen to.
    """
    found = [one for one in relations(before) if not settled.intersection(one.keys)]
    if not found:
        return []
    news: dict[str, list[str]] = {}
    for new, olds in origins.items():
        for old in olds:
            news.setdefault(old, []).append(new)

    def became(old: str, same: Callable[[object, object], bool]) -> bool:
        """Whether a tensor is as it was, or gone."""
        return all(len(origins[new]) == 1 and same(before[old], result[new]) for new in news.get(old, ()))

    problems = []
    for one in found:
        if one.has_codes:
            changed = [key for key in one.keys if not became(key, _is_same)]
        else:
            changed = [key for key in one.keys if not became(key, _has_same_shape)]
            changed = changed if len(changed) < len(one.keys) else []
        if changed:
            others = [key for key in one.keys if key not in changed] or list(one.keys[1:])
            problems.append(f"{listed(changed, 2)} belongs with {listed(others, 2)} ({one.label})")
    if problems:
        raise EditError(problems[:SHOWN] + _more(problems), remedy=_way(found))
    return _parted(found, result, news)


SHOWN = 3  # how many relations an error names


def _more(problems: Sequence[str]) -> list[str]:
    return [f"and {len(problems) - SHOWN:,} more like these"] if len(problems) > SHOWN else []


def _way(found: Iterable[Relation]) -> Phrase:
    if any(one.has_codes for one in found):
        cast = Phrase(" or leave them out; cast with ", Argument("allow_codes", True), " takes codes as numbers")
        return Phrase("dequantize first (", Call("dequantize"), ")", cast)
    return Phrase("edit all of a pair alike, or make them plain first (", Call("fold"), ")")


def _parted(found: Iterable[Relation], result: Mapping[str, object], news: Mapping[str, list[str]]) -> list[str]:
    """Notes on codes whose scales were dropped or are no longer named beside them."""
    kept = {key for one in relations(result) for key in one.keys}
    alone = [
        one.keys[0]
        for one in found
        if one.has_codes and news.get(one.keys[0]) and not all(new in kept for new in news[one.keys[0]])
    ]
    if not alone:
        return []
    return [f"{listed(alone, 2)}: codes whose scales are no longer beside them under a name that belongs to them"]


def missing_scales(checkpoint: Mapping[str, object], target: Mapping[str, object]) -> list[Relation]:
    """The codes of a checkpoint that a target would take without the scales that they need."""
    return [
        one
        for one in relations(checkpoint)
        if one.has_codes and one.keys[0] in target and not any(key in target for key in one.keys[1:])
    ]


def unmerged(keys: Iterable[str]) -> list[str]:
    """The keys of LoRA tensors, whose weights are not merged.

    >>> unmerged(["q.base_layer.weight", "q.lora_A.default.weight", "q.lora_B.default.weight"])
    ['q.lora_A.default.weight', 'q.lora_B.default.weight']
    """
    return [key for key in keys if re.search(r"(^|\.)lora_(embedding_)?[ABab]\b|(^|\.)lora_(up|down|magnitude)", key)]


# -- finders: by a main key, the relation or None


def _dtype(tensor: object) -> str:
    return str(getattr(tensor, "dtype", "")).removeprefix("torch.")


def _shape(tensor: object) -> tuple[int, ...]:
    return tuple(getattr(tensor, "shape", ()))


def _tie(tensor: object) -> object:
    return getattr(tensor, "tie", None)


def _is_same(old: object, new: object) -> bool:
    return old is new


def _has_same_shape(old: object, new: object) -> bool:
    """Whether shapes are equal, and a record is no transposed view (equal shapes, other strides)."""
    strides = [getattr(one, "stride", None) for one in (old, new)]
    if all(isinstance(one, tuple) for one in strides) and _dtype(old) == _dtype(new) and strides[0] != strides[1]:
        return False
    return _shape(old) == _shape(new)


def _there(state_dict: Mapping[str, object], keys: Iterable[str]) -> tuple[str, ...]:
    return tuple(key for key in keys if key in state_dict)


def _scaled(state_dict: Mapping[str, object], key: str, tensor: object) -> Relation | None:
    """float8 and int8 codes with scales behind their own key, or ``scale`` in their module."""
    dtype = _dtype(tensor)
    is_float8 = dtype.startswith("float8") and "e8m0" not in dtype
    if not is_float8 and dtype != "int8":
        return None
    module = key.rpartition(".")[0]
    prefix = f"{module}." if module else ""
    scales = _there(state_dict, [key + end for end in _SCALES])
    if not scales and is_float8 and key == f"{prefix}weight":
        scales = _there(state_dict, [f"{prefix}scale", f"{prefix}scale_weight"])
    if not scales:
        return None
    more = [*(key + end for end in _BESIDE), *(prefix + name for name in _ACTIVATIONS)]
    grain = _grain(_shape(tensor), _shape(state_dict[scales[0]]))
    kind = FLOAT8 if is_float8 else INT8
    return Relation(kind, key, (key, *scales, *_there(state_dict, more)), f"{kind} codes with {grain}")


def _shared(state_dict: Mapping[str, object], key: str, tensor: object) -> Relation | None:
    """Codes that share a byte or a word: compressed-tensors' ``_packed``, ModelOpt's NVFP4, gpt-oss's ``_blocks``."""
    dtype = _dtype(tensor)
    if dtype not in ("uint8", "int32"):
        return None
    if key.endswith("_blocks") and f"{key.removesuffix('_blocks')}_scales" in state_dict:
        base = key.removesuffix("_blocks")
        return Relation(BLOCKS4, base, (key, f"{base}_scales"), "MXFP4 codes with a scale for each block")
    base = key.removesuffix("_packed")
    if f"{base}_scale" not in state_dict or not (base != key or f"{base}_scale_2" in state_dict):
        return None
    module = base.rpartition(".")[0]
    prefix = f"{module}." if module else ""
    more = [*(base + end for end in _BESIDE), *(prefix + name for name in _ACTIVATIONS)]
    parts = (key, f"{base}_scale", *_there(state_dict, more))
    if dtype == "int32":
        return Relation(PACKED, base, parts, "packed integer codes with scales for groups")
    name = "MXFP4" if _dtype(state_dict[f"{base}_scale"]) in ("uint8", "float8_e8m0fnu") else "NVFP4"
    return Relation(FLOAT4, base, parts, f"{name} codes with a scale for each block")


def _grain(codes: tuple[int, ...], scale: tuple[int, ...]) -> str:
    if sum(size > 1 for size in scale) == 0:
        return "one scale"
    is_channel = scale[0] == codes[0] and all(size == 1 for size in scale[1:]) if codes else False
    return "a scale for each channel" if is_channel else "block scales"


def _bitsandbytes(state_dict: Mapping[str, object], key: str, tensor: object) -> Relation | None:
    """4-bit codes with their state behind them, int8 rows with ``SCB`` beside them."""
    if f"{key}.absmax" in state_dict:
        states = tuple(f"{key}.{name}" for name in _STATES)
        tail = f"{key}.quant_state.bitsandbytes__"
        names = [f"{tail}nf4", f"{tail}fp4"]
        kind = next((name[-3:] for name in names if name in state_dict), "4-bit")
        parts = _there(state_dict, [*states, *names])
        return Relation(NORMAL4, key, (key, *parts), f"bitsandbytes {kind} codes with absmax")
    module, _, leaf = key.rpartition(".")
    prefix = f"{module}." if module else ""
    if leaf == "weight" and _dtype(tensor) == "int8" and f"{prefix}SCB" in state_dict:
        parts = _there(state_dict, [f"{prefix}SCB", f"{prefix}weight_format"])
        return Relation(INT8_ROWS, key, (key, *parts), "bitsandbytes int8 codes with a scale for each row")
    return None


def _packed(state_dict: Mapping[str, object], key: str, tensor: object) -> Relation | None:
    """GPTQ's and AWQ's ``qweight``, ``qzeros``, ``scales``, ``g_idx``."""
    module, _, leaf = key.rpartition(".")
    prefix = f"{module}." if module else ""
    if leaf != "qweight" or f"{prefix}scales" not in state_dict:
        return None
    shape, scales = _shape(tensor), _shape(state_dict[f"{prefix}scales"])
    is_awq = len(shape) == 2 and len(scales) == 2 and shape[1] * 8 == scales[1]
    kind = AWQ if is_awq else GPTQ
    parts = _there(state_dict, [prefix + name for name in ("qzeros", "scales", "g_idx")])
    return Relation(kind, f"{prefix}weight", (key, *parts), f"{kind} codes with scales for groups")


def _lora(state_dict: Mapping[str, object], key: str, _: object) -> Relation | None:
    if "lora_" not in key:
        return None
    found = _LORA.fullmatch(key)
    if found is None:
        return None
    module, name, rest = found.groups()
    dot = "." if module else ""
    other = f"{module}{dot}{_PARTNERS[name]}{rest}"
    return Relation(LORA, module, (key, other), "a LoRA pair") if other in state_dict else None


def _peft(state_dict: Mapping[str, object], key: str, _: object) -> Relation | None:
    """PEFT's copies of whole modules (``modules_to_save``), beside the original ones."""
    before, found, after = key.partition(".modules_to_save.")
    if not found:
        return None
    original = f"{before}.original_module.{after.partition('.')[2]}"
    if original not in state_dict:
        return None
    label = "a module that PEFT trained, beside its original"
    return Relation(REPLACED, f"{before}.{after.partition('.')[2]}", (key, original), label)


def _reparametrised(state_dict: Mapping[str, object], key: str, _: object) -> Relation | None:
    """weight norm, spectral norm, masks and parametrizations, in both of torch's spellings."""
    if key.endswith("_g"):
        return _pair(state_dict, WEIGHT_NORM, key[:-2], (key, f"{key[:-2]}_v"), "weight norm: gain and direction")
    if key.endswith("_orig"):
        base = key.removesuffix("_orig")
        masked = _pair(state_dict, MASKED, base, (key, f"{base}_mask"), "pruned: a weight and its mask")
        return masked or _pair(
            state_dict, SPECTRAL_NORM, base, (key, f"{base}_u", f"{base}_v"), "spectral norm: a weight and its vectors"
        )
    found = _PARAMETRIZED.fullmatch(key) if "parametrizations." in key else None
    if found is None:
        return None
    prefix, name, index = found.groups()
    plain, base = prefix + name, f"{prefix}parametrizations.{name}."
    keys: tuple[str, ...]
    if index:
        keys = (key, f"{base}original1")
        norm = _pair(state_dict, WEIGHT_NORM, plain, keys, "weight norm: gain and direction")
    else:
        keys = (key, f"{base}0._u", f"{base}0._v")
        norm = _pair(state_dict, SPECTRAL_NORM, plain, keys, "spectral norm: a weight and its vectors")
    return norm or Relation(PARAMETRIZED, plain, (key,), "parametrized by a formula that is not in the file")


def _pair(state_dict: Mapping[str, object], kind: str, base: str, keys: tuple[str, ...], label: str) -> Relation | None:
    return Relation(kind, base, keys, label) if all(key in state_dict for key in keys) else None


def reparametrised(state_dict: Mapping[str, object]) -> Iterator[Relation]:
    """The relations of weights that torch makes of others when a model runs."""
    kinds = (WEIGHT_NORM, SPECTRAL_NORM, MASKED, PARAMETRIZED)
    yield from (one for one in relations(state_dict) if one.kind in kinds)
