"""ZeRO's optimizer by the parameters' names, as ``torch.optim`` has it by position."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ...tensors.stored import StoredTensor
from ..pickle.values import Object, Value
from .cut import Cut
from .model import Model

SCALARS = (int, float, bool, str, type(None))


def optimizer_state(model: Model, cut: Cut, bases: Sequence[Value]) -> dict[Value, Value]:
    """The optimizer's state out of those that the ranks have, each with one flat vector a group.  Raises BrokenFile."""
    by_group = [slots_of(base) for base in bases]
    slots = dict.fromkeys(slot for rank in by_group for kept in rank.values() for slot in kept)
    state: dict[Value, Value] = {name: {} for name in cut.shapes}
    for slot in slots:
        flats = [[rank.get(group, {}).get(slot) for group in range(len(model.groups))] for rank in by_group]
        every = [value for one in flats for value in one]
        if all(value is None or (isinstance(value, StoredTensor) and len(value.shape) == 1) for value in every):
            for parameter, tensor in cut.tensors(flats, f"slot {slot!r}").items():
                _put(state, parameter, slot, tensor)
            continue
        for parameter, group in cut.groups.items():
            if (value := flats[0][group]) is not None and is_scalar(value):
                _put(state, parameter, slot, value)
    groups = param_groups(bases[0], model)
    return {"state": {name: kept for name, kept in state.items() if kept}, "param_groups": groups}


def _put(state: dict[Value, Value], parameter: str, slot: Value, value: Value) -> None:
    kept = state[parameter]
    assert isinstance(kept, dict)
    kept[slot] = value


def is_scalar(value: Value) -> bool:
    return isinstance(value, SCALARS) or (isinstance(value, StoredTensor) and not value.shape)


def slots_of(base: Value) -> dict[int, Mapping[Value, Value]]:
    """The slots of each flat vector: by position as torch.optim has them, or in a list of the groups."""
    kept = base.get("state") if isinstance(base, dict) else base
    pairs: Iterable[tuple[Value, Value]] = enumerate(kept) if isinstance(kept, list) else ()
    pairs = kept.items() if isinstance(kept, dict) else pairs
    return {number: slots for number, slots in pairs if isinstance(number, int) and isinstance(slots, dict)}


def param_groups(base: Value, model: Model) -> list[Value]:
    """The groups with their options, and the names of their parameters for the positions of flat vectors."""
    groups = base.get("param_groups") if isinstance(base, dict) else None
    if not isinstance(groups, list):
        return [{"params": list(group)} for group in model.groups]
    made: list[Value] = []
    for group in groups:
        if not isinstance(group, dict):
            continue
        params = group.get("params")
        numbers = [one for one in (params if isinstance(params, list) else ()) if isinstance(one, int)]
        names = [name for one in numbers if 0 <= one < len(model.groups) for name in model.groups[one]]
        options = {option: value for option, value in group.items() if _is_option(value) and option != "param_names"}
        made.append({**options, "params": names})
    return made


def _is_option(value: Value) -> bool:
    """Whether an option of a group is plain data: numbers, tuples of them, tensors."""
    if isinstance(value, (tuple, list)):
        return all(map(_is_option, value))
    return not isinstance(value, (Object, dict))
