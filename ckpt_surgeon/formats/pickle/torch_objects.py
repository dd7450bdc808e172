"""What the calls in torch's pickles build here: records of places, by an allow-list of our own constructors.

The names and arguments are those of ``torch/_utils.py`` and ``torch/_tensor.py`` (``_rebuild_tensor_v2`` and its
kin, torch 0.1 to 2.14).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod

from ...tensors.dtypes import BY_NAME, BY_STORAGE, DType
from ...tensors.records import OpaqueTensor
from ...tensors.storage import Storage
from ...tensors.stored import DIMENSIONS, ELEMENTS, StoredTensor
from .dtensor import is_dtensor, local_or_part
from .numpy_objects import NumpyArray
from .sharded_tensor import is_sharded_tensor, local_shard
from .values import Class, Constructor, Global, Object, Ordered, Value, hashable, set_pairs, spelled

_INTEGERS = frozenset({int})
PARTS = 16  # how many arguments of another call a call may have

TENSORS = (StoredTensor, OpaqueTensor)
CHANGING = frozenset({"data", "real", "imag", "__class__", "__dict__"})  # attributes that change what a tensor holds

LOST = "lost"  # the kind of a tensor whose bytes are missing from a truncated file


@dataclass(frozen=True, slots=True, eq=False)
class TypedStorage:
    """A storage as a pickle refers to it: its dtype, and the part of it (in elements) that a legacy view is.

    ``base`` is where the view begins, ``numel`` how many elements it has, None where it goes to the end.
    """

    storage: Storage
    dtype: DType
    base: int = 0
    numel: int | None = None


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
    storage, stored_as = found.storage, found.dtype
    if type(offset) is not int:
        raise ValueError("an offset that is no integer")
    if offset < 0:
        raise ValueError(f"negative offset {offset}")
    dtype = dtype or stored_as
    conjugate, negative = _flags(metadata, dtype)
    if storage.is_lost:
        return OpaqueTensor(LOST, dtype, _shape(shape), storage.device)
    if storage.device == "meta":  # torch throws the elements away
        return OpaqueTensor("meta", dtype, _shape(shape), "meta")
    if storage.big_endian and stored_as.part != dtype.part:  # torch swaps a storage by the dtype of its class
        return OpaqueTensor(f"{dtype} in big-endian {stored_as}, which torch does not swap,", dtype, _shape(shape))
    if negative and not (dtype.is_floating or dtype.is_complex):
        return OpaqueTensor(f"negative view of {dtype}", dtype, _shape(shape), storage.device)
    start = offset + _base(found, dtype)
    made = StoredTensor(dtype, _sizes(shape), _sizes(stride), start, storage, conjugate, negative)
    if found.numel is not None and _end(made) > (found.base + found.numel) * stored_as.itemsize:
        raise ValueError("a tensor that reaches outside of its view of a storage")
    return made


def _flags(metadata: Value, dtype: DType) -> tuple[bool, bool]:
    """Whether a tensor is conjugate and negative: torch sets these when they are there, whatever their value."""
    if not metadata:
        return False, False
    if not isinstance(metadata, dict) or not all(type(flag) is str for flag in metadata):
        raise ValueError("metadata of a tensor that is no dict of names")
    if "conj" in metadata and not dtype.is_complex:
        raise ValueError(f"a conjugate tensor of {dtype}, which is not complex")
    return "conj" in metadata, "neg" in metadata


def _base(found: TypedStorage, dtype: DType) -> int:
    """Where a view begins, in elements of the tensor's dtype."""
    start, rest = divmod(found.base * found.dtype.itemsize, dtype.itemsize)
    if rest:
        raise ValueError(f"a view of a storage that begins within an element of {dtype}")
    return start


def _end(tensor: StoredTensor) -> int:
    """The byte of the storage after the last element of a tensor; 0 where it has none."""
    if 0 in tensor.shape:
        return 0
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride, strict=True))
    return (tensor.offset + last + 1) * tensor.dtype.itemsize


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
    if not isinstance(data, TENSORS):
        raise ValueError(f"a parameter of {spelled(data)}, which is no tensor")
    return data


def rebuild_parameter_with_state(data: Value, _grad: Value = None, _hooks: Value = None, state: Value = None) -> Value:
    """torch._utils._rebuild_parameter_with_state: a parameter with attributes."""
    _check_attributes(state)
    return rebuild_parameter(data)


def make_parameter(data: Value = None, *_: Value) -> Value:
    """torch.nn.Parameter itself, called; without data it is an empty tensor."""
    return OpaqueTensor("parameter without data", BY_NAME["float32"], (0,)) if data is None else rebuild_parameter(data)


def _check_attributes(state: Value) -> None:
    """Attributes that torch sets on a finished tensor.  Raises ValueError for those that change what it holds."""
    parts = state if isinstance(state, tuple) else (state,)
    for part in parts:
        changed = CHANGING.intersection(part) if isinstance(part, dict) else ()
        if changed:
            raise ValueError(f"a tensor whose {', '.join(sorted(map(spelled, changed)))} is set after it was made")


def rebuild_device_tensor(data: Value, dtype: Value, device: Value, *_: Value) -> StoredTensor | OpaqueTensor:
    """torch._utils._rebuild_device_tensor_from_cpu_tensor and its kin: XLA, maia and mtia tensors.

    What was saved is a tensor or a numpy array on the CPU; torch moves it, and casts it where its dtype is another.
    """
    found = data.tensor if isinstance(data, NumpyArray) else data
    wanted = named_dtype(dtype)
    if not isinstance(found, TENSORS):
        raise ValueError(f"a tensor of a device made of {spelled(data)}, which is no tensor")
    if isinstance(found, OpaqueTensor):
        return found
    if found.dtype != wanted:
        return OpaqueTensor(f"{found.dtype} saved for {wanted} on {spelled(device)}", wanted, found.shape)
    return found


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
    """torch._utils._rebuild_wrapper_subclass: data that only its class can reach."""
    return OpaqueTensor(f"subclass {spelled(cls)}", named_dtype(dtype), _shape(shape))


def rebuild_from_type(function: Value, cls: Value, args: Value, state: Value = None, *_: Value) -> Value:
    """torch._tensor._rebuild_from_type_v2: a subclass around one of the calls above, or a tensor with attributes."""
    if not isinstance(function, Global) or not isinstance(args, tuple) or len(args) > PARTS:
        raise ValueError("a tensor subclass that names no way to rebuild it")
    _check_attributes(state)
    constructor = CONSTRUCTORS.get((function.module, function.name))
    made = constructor(*args) if constructor else _named_for_its_class(cls, args)
    if isinstance(made, OpaqueTensor) and is_sharded_tensor(cls):
        return local_shard(made, state)
    return local_or_part(made, state) if isinstance(made, OpaqueTensor) and is_dtensor(cls) else made


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
    else:
        raise ValueError(f"an OrderedDict of {spelled(pairs)}, which has no pairs")
    return made


def make_defaultdict(_factory: Value = None, pairs: Value = ()) -> Ordered:
    """collections.defaultdict: what makes its defaults is left aside."""
    return make_ordered(pairs)


def make_counter(counts: Value = ()) -> Value:
    """collections.Counter, from the dict that it is saved as."""
    return make_ordered(counts) if isinstance(counts, dict) or not counts else Object(_COUNTER, (counts,))


_COUNTER = Global("collections", "Counter")


def _empty_ordered(*_: Value) -> Ordered:
    """What ``OrderedDict.__new__`` makes, whatever it is given."""
    return Ordered()


def _empty_list(*_: Value) -> list[Value]:
    return []


def _empty_set(*_: Value) -> set[Value]:
    return set()


def make_reconstructed(cls: Value, _base: Value = None, state: Value = None, *_: Value) -> Object:
    """copyreg._reconstructor: an object as protocols 0 and 1 write it."""
    return Object(cls, () if state is None else (state,))


def make_graph_module(body: Value, *rest: Value) -> Object:
    """torch.fx.graph_module.reduce_graph_module: a traced module, from its attributes and the code of its forward."""
    return Object(Global("torch.fx.graph_module", "GraphModule"), rest, state=body)


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


def _tensor_class(name: str, dtype: DType) -> Constructor:
    """torch.FloatTensor and its kin, called: numbers that stand in the pickle, or memory that nobody has written."""

    def make(*_: Value) -> OpaqueTensor:
        return OpaqueTensor(f"{name}(…)", dtype, ())

    return make


_FUNCTIONS: dict[tuple[str, str], Constructor] = {
    **{("torch._utils", name): function for name, function in (
        ("_rebuild_tensor", rebuild_tensor),
        ("_rebuild_tensor_v2", rebuild_tensor_v2),
        ("_rebuild_tensor_v3", rebuild_tensor_v3),
        ("_rebuild_parameter", rebuild_parameter),
        ("_rebuild_parameter_with_state", rebuild_parameter_with_state),
        ("_rebuild_qtensor", rebuild_qtensor),
        ("_rebuild_sparse_tensor", rebuild_sparse),
        ("_rebuild_sparse_csr_tensor", rebuild_sparse),
        ("_rebuild_nested_tensor", rebuild_nested),
        ("_rebuild_meta_tensor_no_storage", rebuild_meta),
        ("_rebuild_wrapper_subclass", rebuild_subclass),
        ("_rebuild_device_tensor_from_cpu_tensor", rebuild_device_tensor),
        ("_rebuild_device_tensor_from_numpy", rebuild_device_tensor),
        ("_rebuild_xla_tensor", rebuild_device_tensor),
    )},
    ("torch._tensor", "_rebuild_from_type_v2"): rebuild_from_type,
    ("torch._tensor", "_rebuild_from_type"): rebuild_from_type,
    ("_codecs", "encode"): encode,
    ("copyreg", "_reconstructor"): make_reconstructed,
    ("copy_reg", "_reconstructor"): make_reconstructed,
    ("torch.fx.graph_module", "reduce_graph_module"): make_graph_module,
}  # fmt: skip
_BUILTINS: dict[str, Constructor] = {
    "list": Class(make_list, _empty_list),
    "dict": Class(make_ordered, _empty_ordered),
    "set": Class(make_set, _empty_set),
    "frozenset": Class(make_frozenset, make_frozenset),
    "bytes": Class(make_bytes, make_bytes),
}
_CLASSES: dict[tuple[str, str], Constructor] = {
    ("torch", "Size"): Class(make_size, make_size),
    ("torch.nn.parameter", "Parameter"): Class(make_parameter, make_parameter),
    ("collections", "OrderedDict"): Class(make_ordered, _empty_ordered),
    ("collections", "defaultdict"): Class(make_defaultdict, _empty_ordered),
    ("collections", "Counter"): Class(make_counter, _empty_ordered),
    **{(module, name): made for module in ("builtins", "__builtin__") for name, made in _BUILTINS.items()},
}
_TENSOR_CLASSES = {
    (module, name): Class(make, make)
    for module in ("torch", "torch.cuda")
    for name, make in (
        *((name.replace("Storage", "Tensor"), _tensor_class(f"{module}.{name.replace('Storage', 'Tensor')}", dtype))
          for name, dtype in BY_STORAGE.items()),
        ("Tensor", _tensor_class("torch.Tensor", BY_NAME["float32"])),
    )
}  # fmt: skip
CONSTRUCTORS: dict[tuple[str, str], Constructor] = _FUNCTIONS | _CLASSES | _TENSOR_CLASSES
