"""Extra states: values in a state_dict that are no tensors, as ``get_extra_state`` of a module returns them.

A value is a tree of data: None, numbers, strings, bytes, dicts, lists, tuples, sets, :class:`io.BytesIO`,
:class:`~ckpt_surgeon.tensors.dtypes.DType` for torch's dtypes, :class:`Device` for its devices, records of tensors.
An object of any other class is an :class:`Unknown`: it has a name, and nothing here makes or writes it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from ..errors import EditError
from .checkpoint import Checkpoint
from .dtypes import EXTRA_STATE, DType
from .records import ComputedTensor, ExtraState, OpaqueTensor, Shaped, Tensor
from .stored import StoredTensor

SUFFIX = "_extra_state"  # torch.nn.modules.module._EXTRA_STATE_KEY_SUFFIX
DEPTH = 100  # how deep a value may nest
SHOWN = 40  # characters of a string that are shown
FEW = 3  # keys of a dict that are shown

_TENSORS = (StoredTensor, ComputedTensor, OpaqueTensor)


@dataclass(frozen=True, slots=True)
class Device:
    """A torch.device, by its name."""

    name: str


@dataclass(frozen=True, slots=True)
class Unknown:
    """An object that is not data: what it is, with its class."""

    what: str


Shapes = TypeVar("Shapes", bound=Mapping[str, Shaped])


def is_extra_state(key: str) -> bool:
    """Whether a key is that of a module's extra state, as torch names it.

    >>> is_extra_state("layers.0._extra_state"), is_extra_state("_extra_state"), is_extra_state("my_extra_state")
    (True, True, False)
    """
    return key == SUFFIX or key.endswith("." + SUFFIX)


def extra_state(value: object) -> ExtraState:
    """The record of a value.

    >>> extra_state({"amax": [1.0], "recipe": "delayed"}).kind
    'dict of 2 (amax, recipe)'
    """
    return ExtraState(value, kind_of(value))


def kind_of(value: object) -> str:
    """What a value is, in a few words.

    >>> kind_of(None), kind_of(b"abc"), kind_of(io.BytesIO(b"abc")), kind_of(7)
    ('None', 'bytes of 3', 'BytesIO of 3 bytes', 'int 7')
    """
    if value is None:
        return "None"
    if isinstance(value, (bool, int, float, complex)):
        return f"{type(value).__name__} {value}" if not isinstance(value, int) or abs(value) < 1 << 64 else "int"
    if isinstance(value, str):
        return f"str {value[:SHOWN]!r}" + (" …" if len(value) > SHOWN else "")
    if isinstance(value, (bytes, bytearray)):
        return f"{type(value).__name__} of {len(value):,}"
    if isinstance(value, io.BytesIO):
        return f"BytesIO of {value.getbuffer().nbytes:,} bytes"
    if isinstance(value, dict):
        keys = [str(key)[:SHOWN] for key in islice(value, FEW) if isinstance(key, (str, int))]
        more = ", …" if len(value) > len(keys) else ""
        return f"dict of {len(value):,}" + (f" ({', '.join(keys)}{more})" if keys else "")
    if isinstance(value, (list, tuple, set, frozenset)):
        return f"{type(value).__name__} of {len(value):,}"
    if isinstance(value, Unknown):
        return value.what
    return f"{type(value).__name__.lower()} {value}" if isinstance(value, (DType, Device)) else type(value).__name__


def parts(value: object) -> Iterator[object]:
    """A value and all that is in it, containers once each."""
    seen: set[int] = set()
    ahead = [value]
    while ahead:
        one = ahead.pop()
        if isinstance(one, (dict, list, tuple, set, frozenset)):
            if id(one) in seen:
                continue
            seen.add(id(one))
            ahead.extend([*one, *one.values()] if isinstance(one, dict) else one)
        yield one


def tensors_in(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a writer has to write for a record: itself, or those in an extra state."""
    if not isinstance(tensor, ExtraState):
        yield tensor
        return
    yield from (one for one in parts(tensor.value) if isinstance(one, _TENSORS))


def unknown_in(tensor: Tensor) -> str:
    """What in an extra state is no data and so cannot be made again; empty where all is."""
    if isinstance(tensor, ExtraState):
        for one in parts(tensor.value):
            if isinstance(one, Unknown):
                return one.what
            if isinstance(one, OpaqueTensor):
                return f"{one.kind} tensor"
    return ""


def without_extra_states(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors alone."""
    return {key: tensor for key, tensor in tensors.items() if not isinstance(tensor, ExtraState)}


def tensors_alone(state_dict: Shapes) -> Shapes:
    """A mapping of the same kind without the entries that are extra states."""
    kept = {key: value for key, value in state_dict.items() if value.dtype != EXTRA_STATE}
    if len(kept) == len(state_dict):
        return state_dict
    if isinstance(state_dict, Checkpoint):
        held = without_extra_states(state_dict)
        return state_dict.with_tensors(held, state_dict.versions)  # type: ignore[return-value]
    return kept  # type: ignore[return-value]


def digest(value: object) -> str:
    """SHA-256 of a value; equal for equal values, whatever the container that they lie in."""
    import hashlib

    found = hashlib.sha256()
    _feed(found.update, value, {}, 0)
    return found.hexdigest()


def _feed(update: Callable[[bytes], object], value: object, numbers: dict[int, int], depth: int) -> None:
    """Hand the bytes that tell a value from all others to ``update``; what was met before, by its number."""
    if depth > DEPTH:
        raise EditError(["an extra state is nested too deeply"])
    if isinstance(value, (dict, list, tuple, set, frozenset)):
        if id(value) in numbers:
            update(b"<%d>" % numbers[id(value)])
            return
        numbers[id(value)] = len(numbers)
        items: list[object] = [one for pair in value.items() for one in pair] if isinstance(value, dict) else [*value]
        if isinstance(value, (set, frozenset)):
            items.sort(key=repr)
        kind = "dict" if isinstance(value, dict) else type(value).__name__
        update(f"{kind} {len(items)}(".encode())
        for one in items:
            _feed(update, one, numbers, depth + 1)
        update(b")")
    elif isinstance(value, _TENSORS):
        update(f"tensor {value.dtype} {value.shape}".encode())
        for block in value.blocks() if not isinstance(value, OpaqueTensor) else ():
            update(bytes(block))
    elif isinstance(value, io.BytesIO):
        update(f"BytesIO {value.getbuffer().nbytes} ".encode() + value.getvalue())
    else:
        raw = bytes(value) if isinstance(value, (bytes, bytearray)) else repr(value).encode("utf-8", "surrogatepass")
        update(f"{type(value).__name__} {len(raw)} ".encode() + raw)
