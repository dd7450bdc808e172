"""What is needed of torch's modules: a twin without memory, its own verdict on a state_dict, wrappers, ties.

torch is imported inside the functions.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from ..errors import CheckpointError, TargetError
from ..tensors.checkpoint import Checkpoint, versions_of
from ..tensors.extra_state import SUFFIX as EXTRA_STATE_SUFFIX
from ..tensors.extra_state import is_extra_state, parts, unknown_in
from ..tensors.records import ComputedTensor, ExtraState, Shaped
from ..tensors.stored import StoredTensor
from ..tensors.torch_bridge import python_value, to_torch

if TYPE_CHECKING:
    import torch


def _computed_attributes(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Tensors that modules keep as plain attributes: the old weight_norm's ``weight``, which has a graph."""
    import torch

    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, torch.Tensor))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What torch's own ``load_state_dict`` says of a state_dict's keys: missing, unexpected, other shape.

    It counts what the model rewrites on load (an old ``weight_g``, a missing ``num_batches_tracked``).
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    refused: str = ""  # torch's words, where it raised

    @property
    def accepted(self) -> bool:
        return not (self.missing or self.unexpected or self.refused)


def meta_twin(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of a model with its parameters and buffers on the meta device: it takes no memory.

    >>> import torch
    >>> next(meta_twin(torch.nn.Linear(2, 2)).parameters()).device.type
    'meta'
    """
    return _twin(model, "meta")


def _twin(model: torch.nn.Module, device: str) -> torch.nn.Module:
    """A copy of a model with other tensors, on ``device`` and without values."""
    import torch

    memo: dict[int, object] = {}
    for tensor in (*model.parameters(), *model.buffers(), *_computed_attributes(model)):
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        if torch.nn.parameter.is_lazy(tensor):
            make = cast("Callable[..., torch.Tensor]", type(tensor))
            memo[id(tensor)] = make(requires_grad=tensor.requires_grad, device=device, dtype=tensor.dtype)
            continue
        # empty_like would import sympy
        twin = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        memo[id(tensor)] = torch.nn.Parameter(twin, tensor.requires_grad) if is_parameter else twin
    return copy.deepcopy(model, memo)


def verdict(model: torch.nn.Module, state_dict: Mapping[str, Shaped]) -> Verdict:
    """Ask torch whether it would load these keys and shapes, on a twin of the model that takes no memory.

    A model that runs code of its own when it loads, and refuses, is asked again with the values, where
    ``state_dict`` has them: that code may look at them.  Extra states with bytes in them are counted and not handed
    to the model, since a ``set_extra_state`` may unpickle them.  Raises TargetError for a model that cannot be copied.
    """
    is_plain = loads_plainly(model)
    found = _asked(model, state_dict, "meta", strict=False)
    if found.accepted and not is_plain:
        found = _asked(model, state_dict, "meta", strict=True)
    if found.refused and not is_plain and isinstance(state_dict, Checkpoint):
        found = _asked(model, state_dict, "cpu", strict=False)
        if found.accepted:
            found = _asked(model, state_dict, "cpu", strict=True)
    return found


def _asked(model: torch.nn.Module, state_dict: Mapping[str, Shaped], device: str, *, strict: bool) -> Verdict:
    """torch's verdict on the keys with tensors on ``device``: "meta" without values, "cpu" with them."""
    try:
        twin = _twin(model, device)
    except Exception as error:  # whatever a model's own attributes raise when they are copied
        raise TargetError(type(model).__name__, f"cannot be copied to try the load on ({error})") from error
    values = to_torch(state_dict) if device == "cpu" and isinstance(state_dict, Checkpoint) else {}
    state: OrderedDict[str, object] = OrderedDict(
        (key, _trial_value(twin, key, tensor, values)) for key, tensor in state_dict.items()
    )
    versions = versions_of(state_dict)
    if versions is not None:
        state._metadata = OrderedDict(versions)  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():  # torch's own says that nothing is copied into a twin on the meta device
            warnings.filterwarnings("ignore", message="for .* copying from a non-meta parameter")
            found = twin.load_state_dict(state, strict=strict)
    except Exception as error:  # torch's own, or what the model's code raises
        name = "" if isinstance(error, RuntimeError) else f"{type(error).__name__}: "
        return Verdict((), (), name + " ".join(str(error).split()))
    missing, unexpected = getattr(found, "missing_keys", ()), getattr(found, "unexpected_keys", ())
    return Verdict(tuple(missing), tuple(unexpected))


def _trial_value(twin: torch.nn.Module, key: str, tensor: Shaped, values: Mapping[str, torch.Tensor]) -> object:
    """What stands for one entry of a state_dict in a trial."""
    import torch

    if not is_extra_state(key):
        if key in values:
            return values[key]
        return torch.empty(tuple(tensor.shape), dtype=_dtype(tensor), device="meta")
    if isinstance(tensor, ExtraState) and _is_harmless(tensor):
        return python_value(tensor.value)
    with suppress(AttributeError):  # a key of no module: torch counts it as unexpected
        module = twin.get_submodule(key.removesuffix(EXTRA_STATE_SUFFIX).removesuffix("."))
        module.set_extra_state = _take  # type: ignore[method-assign]
    return None


def _take(state: object) -> None:
    """Stands for a ``set_extra_state`` that is not tried."""


def _is_harmless(state: ExtraState) -> bool:
    """Whether nothing in an extra state can be a pickle that the model would run."""
    held = (bytes, bytearray, io.BytesIO, StoredTensor, ComputedTensor)
    return not unknown_in(state) and not any(isinstance(one, held) for one in parts(state.value))


def _dtype(tensor: Shaped) -> torch.dtype:
    import torch

    found: torch.dtype = getattr(torch, str(tensor.dtype).removeprefix("torch."))
    return found


def loads_plainly(model: torch.nn.Module) -> bool:
    """Whether only torch's own code runs when the model saves and loads: then equal keys and shapes are proof enough.

    >>> import torch
    >>> loads_plainly(torch.nn.Linear(2, 2))
    True
    """
    return all(map(_has_no_code_of_its_own, model.modules()))


def _has_no_code_of_its_own(module: torch.nn.Module) -> bool:
    """Whether a module's state_dict is what torch makes of its parameters and buffers, and is loaded so."""
    import torch

    cls = type(module)
    if cls.set_extra_state is not torch.nn.Module.set_extra_state:
        return False
    if cls.state_dict is not torch.nn.Module.state_dict or cls.load_state_dict is not torch.nn.Module.load_state_dict:
        return False
    own = (cls._save_to_state_dict, cls._load_from_state_dict)
    if not all(method.__module__.startswith("torch.nn.modules.") for method in own):
        return False
    return not (
        module._state_dict_hooks
        or module._state_dict_pre_hooks
        or module._load_state_dict_pre_hooks
        or module._load_state_dict_post_hooks
    )


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside DataParallel, DistributedDataParallel and torch.compile.

    >>> import torch
    >>> inner = torch.nn.Linear(1, 1)
    >>> unwrapped(torch.nn.DataParallel(inner)) is inner
    True
    """
    import torch

    if not isinstance(model, torch.nn.Module):
        raise CheckpointError(f"a {type(model).__name__} is no torch.nn.Module", remedy="give the model itself")
    wrappers = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif "_orig_mod" in model._modules and isinstance(model._modules["_orig_mod"], torch.nn.Module):
            model = model._modules["_orig_mod"]
        else:
            return model


def tied(model: torch.nn.Module) -> list[list[str]]:
    """The names of parameters that are one object, group by group."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def tie_again(model: torch.nn.Module, groups: list[list[str]]) -> None:
    """Make the parameters of each group one object again, after they were assigned one by one."""
    for first, *others in groups:
        shared = model.get_parameter(first)
        for name in others:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, shared)
