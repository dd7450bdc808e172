"""What the calls in torch's pickles build here: records of places, by an allow-list of our own constructors.

The names and arguments are those of ``torch/_utils.py`` and ``torch/_tensor.py`` (``_rebuild_tensor_v2`` and its
kin, torch 0.1 to 2.14).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod

from ...tensors.dtypes import BY_NAME, BY_STORAGE, DType
from ...tensors.records import DIMENSIONS, ELEMENTS, OpaqueTensor, Storage, StoredTensor
from .machine import Constructor, Global, Object, Ordered, Value, hashable, set_pairs, spelled

_INTEGERS = frozenset({int})
PARTS = 16  # how many arguments of another call a call may have

LOST = "lost"  # the kind of a tensor whose bytes are missing from a truncated file


@dataclass(frozen=True, slots=True, eq=False)
class TypedStorage:
    """A storage as a pickle refers to it: with a dtype, and where in it (in elements) a legacy view begins."""

    storage: Storage
    dtype: DType
    base: int = 0


def storage_dtype(cls: Value) -> DType:
    """The dtype of ``torch.FloatStorage`` and its kin; untyped storages count bytes.

    Raises ValueError for anything else.
    """
    if isinstance(cls, Global):
        return _storage_dtype(cls)
    raise ValueError(f"{spelled(cls)} is no storage class that torch has")


@cache
def _storage_dtype(cls: Global) -> DType:
    if cls.module.partition(".")[0] == "torch":
        if cls.name in ("UntypedStorage", "_UntypedStorage"):
            return BY_NAME["uint8"]
        if cls.name in BY_STORAGE:
            return BY_STORAGE[cls.name]
    raise ValueError(f"{cls} is no storage class that torch has")


def named_dtype(value: Value) -> DType:
    """The dtype that a pickle names as ``torch.float8_e4m3fn``."""
    if isinstance(value, Global) and value.module == "torch" and value.name in BY_NAME:
        return BY_NAME[value.name]
    raise ValueError(f"{spelled(value)} is no dtype that is known here")


def _sizes(value: Value) -> tuple[int, ...]:
    if isinstance(value, (tuple, list)) and len(value) <= DIMENSIONS and _INTEGERS.issuperset(map(type, value)):
        return tuple(value)
    raise ValueError(f"a shape or stride that is no tuple of at most {DIMENSIONS} integers")


def _shape(value: Value) -> tuple[int, ...]:
    sizes = _sizes(value)
    if min(sizes, default=0) < 0:
        raise ValueError(f"a negative size in shape {sizes}")
    if prod(sizes) > ELEMENTS:
        raise ValueError("a tensor with more elements than can be counted")
    return sizes


def _typed(value: Value) -> TypedStorage:
    if isinstance(value, TypedStorage):
        return value
    raise ValueError("a tensor without a storage")


def _stored(
    typed: Value, dtype: DType | None, offset: Value, shape: Value, stride: Value, metadata: Value = None
) -> StoredTensor | OpaqueTensor:
    """A tensor in a storage, of the storage's dtype where it has none of its own; LOST where the storage is."""
    found = _typed(typed)
    storage, stored_as, base = found.storage, found.dtype, found.base
    if type(offset) is not int:
        raise ValueError("an offset that is no integer")
    dtype = dtype or stored_as
    if storage.is_lost:
        return OpaqueTensor(LOST, dtype, _shape(shape), storage.device)
    start = offset + base * stored_as.itemsize // dtype.itemsize
    if not metadata:
        return StoredTensor(dtype, _sizes(shape), _sizes(stride), start, storage)
    flags = metadata if isinstance(metadata, Mapping) else {}
    conjugate, negative = bool(flags.get("conj")), bool(flags.get("neg"))
    return StoredTensor(dtype, _sizes(shape), _sizes(stride), start, storage, conjugate, negative)


def rebuild_tensor(typed: Value, offset: Value, shape: Value, stride: Value) -> StoredTensor | OpaqueTensor:
    """torch._utils._rebuild_tensor, torch 0.1.12 to 0.3."""
    return _stored(typed, None, offset, shape, stride)


def rebuild_tensor_v2(
    typed: Value, offset: Value, shape: Value, stride: Value, _grad: Value, _hooks: Value, metadata: Value = None
) -> StoredTensor | OpaqueTensor:
    """torch._utils._rebuild_tensor_v2, torch 0.4 and later."""
    return _stored(typed, None, offset, shape, stride, metadata)


def rebuild_tensor_v3(
    typed: Value,
    offset: Value,
    shape: Value,
    stride: Value,
    _grad: Value,
    _hooks: Value,
    dtype: Value,
    metadata: Value = None,
) -> StoredTensor | OpaqueTensor:
    """torch._utils._rebuild_tensor_v3: dtypes that have no storage class (the fp8 kinds, uint16 …)."""
    return _stored(typed, named_dtype(dtype), offset, shape, stride, metadata)


def rebuild_parameter(data: Value, *_: Value) -> Value:
    """torch._utils._rebuild_parameter: a parameter is its tensor."""
    return data


def rebuild_qtensor(typed: Value, _offset: Value, shape: Value, *_: Value) -> OpaqueTensor:
    """torch._utils._rebuild_qtensor."""
    found = _typed(typed)
    return OpaqueTensor("quantized", found.dtype, _shape(shape), found.storage.device)


def rebuild_sparse(layout: Value, data: Value) -> OpaqueTensor:
    """torch._utils._rebuild_sparse_tensor: indices, values and size behind a layout."""
    if not isinstance(data, tuple) or not 3 <= len(data) <= PARTS:
        raise ValueError("a sparse tensor without its parts")
    parts = [part for part in data if isinstance(part, (StoredTensor, OpaqueTensor))]
    sizes = [part for part in data if isinstance(part, tuple)]
    if not parts or not sizes:
        raise ValueError("a sparse tensor without its parts")
    kind = layout.args[0] if isinstance(layout, Object) and layout.args else layout
    name = kind.name if isinstance(kind, Global) else spelled(kind)
    return OpaqueTensor(name.removeprefix("torch."), parts[-1].dtype, _shape(sizes[-1]), parts[-1].device)


def rebuild_nested(values: Value, *_: Value) -> Value:
    """torch._utils._rebuild_nested_tensor: its rows differ in length, so its shape here is that of all elements."""
    if not isinstance(values, (StoredTensor, OpaqueTensor)):
        raise ValueError("a nested tensor without its elements")
    return OpaqueTensor("nested", values.dtype, values.shape, values.device)


def rebuild_meta(dtype: Value, shape: Value, *_: Value) -> OpaqueTensor:
    """torch._utils._rebuild_meta_tensor_no_storage."""
    return OpaqueTensor("meta", named_dtype(dtype), _shape(shape), "meta")


def rebuild_subclass(cls: Value, dtype: Value, shape: Value, *_: Value) -> OpaqueTensor:
    """torch._utils._rebuild_wrapper_subclass: data that only its class can reach (DTensor and its kin)."""
    return OpaqueTensor(f"subclass {spelled(cls)}", named_dtype(dtype), _shape(shape))


def rebuild_from_type(function: Value, cls: Value, args: Value, *_: Value) -> Value:
    """torch._tensor._rebuild_from_type_v2: a subclass around one of the calls above, or a tensor with attributes."""
    if not isinstance(function, Global) or not isinstance(args, tuple) or len(args) > PARTS:
        raise ValueError("a tensor subclass that names no way to rebuild it")
    constructor = CONSTRUCTORS.get((function.module, function.name))
    return constructor(*args) if constructor else _named_for_its_class(cls, args)


def _named_for_its_class(cls: Value, args: tuple[Value, ...]) -> Value:
    """A subclass that has a way of its own to be rebuilt: of its parts, the first tensor tells dtype and elements."""
    parts = [
        inside for arg in args for inside in (arg.values() if isinstance(arg, dict) and len(arg) <= PARTS else [arg])
    ]
    for part in parts:
        if isinstance(part, (StoredTensor, OpaqueTensor)):
            return OpaqueTensor(f"subclass {spelled(cls)}", part.dtype, part.shape, part.device)
    return Object(cls, args)


def make_size(sizes: Value = ()) -> tuple[int, ...]:
    """torch.Size."""
    return _sizes(sizes)


def make_ordered(pairs: Value = ()) -> Ordered:
    """collections.OrderedDict, with or without pairs."""
    made = Ordered()
    if isinstance(pairs, dict):
        made.update(pairs)
    elif isinstance(pairs, (list, tuple)):
        for pair in pairs:
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise ValueError("an OrderedDict of something else than pairs")
            set_pairs(made, list(pair))
    return made


def make_defaultdict(*_: Value) -> Ordered:
    """collections.defaultdict: what makes its defaults is left aside."""
    return Ordered()


def make_reconstructed(cls: Value, _base: Value = None, state: Value = None, *_: Value) -> Object:
    """copyreg._reconstructor: an object as protocols 0 and 1 write it."""
    return Object(cls, () if state is None else (state,))


def make_list(items: Value = ()) -> list[Value]:
    """builtins.list."""
    return list(items) if isinstance(items, (list, tuple)) else []


def make_set(items: Value = ()) -> set[Value]:
    """builtins.set."""
    return {hashable(item) for item in items} if isinstance(items, (list, tuple)) else set()


def make_frozenset(items: Value = ()) -> frozenset[Value]:
    """builtins.frozenset."""
    return frozenset(make_set(items))


def make_bytes(*args: Value) -> Value:
    """builtins.bytes: how Python 3 writes b"" in the old protocols."""
    return Object(Global("builtins", "bytes"), args) if args else b""


def encode(text: Value, encoding: Value = "utf-8") -> bytes:
    """_codecs.encode: how Python 3 writes bytes in the old protocols."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8", "utf8"):
        raise ValueError("bytes in an encoding that is not known")
    return text.encode(str(encoding))


CONSTRUCTORS: dict[tuple[str, str], Constructor] = {
    ("torch._utils", "_rebuild_tensor"): rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): rebuild_parameter,
    ("torch._utils", "_rebuild_qtensor"): rebuild_qtensor,
    ("torch._utils", "_rebuild_sparse_tensor"): rebuild_sparse,
    ("torch._utils", "_rebuild_sparse_csr_tensor"): rebuild_sparse,
    ("torch._utils", "_rebuild_nested_tensor"): rebuild_nested,
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): rebuild_meta,
    ("torch._utils", "_rebuild_wrapper_subclass"): rebuild_subclass,
    ("torch._tensor", "_rebuild_from_type_v2"): rebuild_from_type,
    ("torch._tensor", "_rebuild_from_type"): rebuild_from_type,
    ("torch", "Size"): make_size,
    ("collections", "OrderedDict"): make_ordered,
    ("collections", "defaultdict"): make_defaultdict,
    ("builtins", "list"): make_list,
    ("__builtin__", "list"): make_list,
    ("builtins", "dict"): make_ordered,
    ("__builtin__", "dict"): make_ordered,
    ("builtins", "set"): make_set,
    ("__builtin__", "set"): make_set,
    ("builtins", "frozenset"): make_frozenset,
    ("__builtin__", "frozenset"): make_frozenset,
    ("builtins", "bytes"): make_bytes,
    ("__builtin__", "bytes"): make_bytes,
    ("_codecs", "encode"): encode,
    ("copyreg", "_reconstructor"): make_reconstructed,
    ("copy_reg", "_reconstructor"): make_reconstructed,
}
