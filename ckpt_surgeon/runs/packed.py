"""A state that is one flat vector of all parameters, as fairseq's FP16Optimizer has it, cut into that of each.

``fairseq/optim/fp16_optimizer.py`` puts all parameters one after another, in the order of the model, and gives the
optimizer that one vector: every slot of id 0 has as many elements as all parameters together.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from itertools import accumulate, pairwise
from math import prod

from ..formats.zip.whole import tensor_node
from ..tensors.checkpoint import Checkpoint
from ..tensors.records import Tensor
from ..tensors.views import concatenated, reshaped, sliced
from .follow import zeros
from .naming import parameters_of
from .state import OptimizerState, Slot, slot_of


def unpacked(state: OptimizerState, weights: Checkpoint) -> OptimizerState:
    """The state with an id for each parameter, where it is one vector of all; any other as it is."""
    keys = parameters_of(weights)
    if len(state.ids) != 1 or state.is_by_name or len(keys) < 2:
        return state
    kept = state.slots.get(state.ids[0], {})
    ends = list(accumulate((weights[key].numel for key in keys), initial=0))
    flat = {name for name, slot in kept.items() if slot.tensor is not None and tuple(slot.tensor.shape) == (ends[-1],)}
    if not flat:
        return state
    slots: dict[Hashable, Mapping[str, Slot]] = {}
    for id_, (key, (start, stop)) in enumerate(zip(keys, pairwise(ends), strict=True)):
        shape = tuple(weights[key].shape)
        slots[id_] = {
            name: _part(key, slot, start, stop, shape) if name in flat else slot for name, slot in kept.items()
        }
    ids = tuple(slots)
    groups = tuple(replace(group, ids=ids if group.ids else (), names=None) for group in state.groups)
    return replace(state, groups=groups, slots=slots, packed=slots)


def _part(key: str, slot: Slot, start: int, stop: int, shape: tuple[int, ...]) -> Slot:
    assert slot.tensor is not None
    view = reshaped(key, sliced(slot.tensor, 0, start, stop), shape)
    return Slot(tensor_node(view, device=slot.tensor.device), view)


def packed_again(state: OptimizerState, shapes: Mapping[Hashable, tuple[int, ...]]) -> OptimizerState:
    """The state as one vector again; zeros stand where a parameter, whose shape is given, has none.

    ``shapes`` has those of all ids.
    """
    slots: dict[str, Slot] = {}
    for name, like in next(iter(state.slots.values()), {}).items():
        if like.tensor is None or name not in (state.kind.shaped if state.kind is not None else ()):
            slots[name] = like
            continue
        parts: list[Tensor] = []
        for id_ in state.ids:
            own = state.slots.get(id_, {}).get(name)
            found = own.tensor if own is not None and own.tensor is not None else zeros(like.tensor.dtype, shapes[id_])
            parts.append(reshaped(str(id_), found, (prod(shapes[id_]),)))
        slots[name] = slot_of(concatenated(parts, 0), like)
    groups = tuple(replace(group, ids=(0,) if group.ids else ()) for group in state.groups)
    return replace(state, groups=groups, slots={0: slots}, packed=None)
