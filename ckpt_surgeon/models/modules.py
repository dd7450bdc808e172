"""What is needed of torch's modules: a twin without memory, its own verdict on a state_dict, wrappers, ties.

torch is imported inside the functions.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import CheckpointError, TargetError
from ..tensors.checkpoint import versions_of
from ..tensors.records import Shaped

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
    import torch

    memo: dict[int, object] = {}
    for tensor in (*model.parameters(), *model.buffers(), *_computed_attributes(model)):
        # empty_like would import sympy
        twin = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        memo[id(tensor)] = torch.nn.Parameter(twin, tensor.requires_grad) if is_parameter else twin
    return copy.deepcopy(model, memo)


def verdict(model: torch.nn.Module, state_dict: Mapping[str, Shaped]) -> Verdict:
    """Ask torch whether it would load these keys and shapes, on a twin of the model that takes no memory."""
    import torch

    try:
        twin = meta_twin(model)
    except Exception as error:  # whatever a model's own attributes raise when they are copied
        raise TargetError(type(model).__name__, f"cannot be copied to try the load on ({error})") from error
    state: OrderedDict[str, object] = OrderedDict(
        (key, torch.empty(tuple(tensor.shape), dtype=_dtype(tensor), device="meta"))
        for key, tensor in state_dict.items()
    )
    versions = versions_of(state_dict)
    if versions is not None:
        state._metadata = OrderedDict(versions)  # type: ignore[attr-defined]
    try:
        found = twin.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        return Verdict((), (), " ".join(str(error).split()))
    return Verdict(tuple(found.missing_keys), tuple(found.unexpected_keys))


def _dtype(tensor: Shaped) -> torch.dtype:
    import torch

    found: torch.dtype = getattr(torch, str(tensor.dtype).removeprefix("torch."))
    return found


def loads_plainly(model: torch.nn.Module) -> bool:
    """Whether only torch's own code runs when the model loads: then equal keys and shapes are proof enough."""
    for module in model.modules():
        cls = type(module)._load_from_state_dict
        if not cls.__module__.startswith("torch.nn.modules.") or module._load_state_dict_pre_hooks:
            return False
        if module._load_state_dict_post_hooks or type(module).load_state_dict.__module__ != "torch.nn.modules.module":
            return False
    return True


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


def extra_states(model: torch.nn.Module) -> Iterator[str]:
    """Keys of a model's state_dict that hold no tensor (``_extra_state``)."""
    import torch

    yield from (key for key, value in model.state_dict().items() if not isinstance(value, torch.Tensor))
