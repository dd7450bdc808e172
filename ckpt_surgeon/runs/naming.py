"""Which parameter is behind each id of an optimizer, and how that is known.

In this order: the names that the groups carry (``param_names``, torch 2.6 and later), ids that are names themselves
(FSDP, distributed checkpoints), the order of the parameters in a model that was built for it, and last the order of the
state_dict without its buffers, as ``model.parameters()`` gives it.  That last one is only a guess wherever two
parameters have the same shape: nobody would notice if they were exchanged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..edits.keys import is_derivable, without_wrappers
from ..tensors.checkpoint import Checkpoint
from .state import OptimizerState

STATISTICS = ("running_mean", "running_var")
BY_NAMES = "the names in its groups"
BY_IDS = "its ids are names"
BY_RUN = "the optimizer that the factory builds"
BY_ORDER = "the order of the state_dict"
BY_DECAY_FIRST = "the order of the state_dict, matrices (with weight decay) first"
BY_PACKING = "one flat vector of all parameters, cut in the order of the state_dict"
BY_DECAY_LAST = "the order of the state_dict, vectors (without weight decay) first"


@dataclass(frozen=True, slots=True)
class Names:
    """The key behind each id, and ``how`` it is known; ``doubtful`` ids could be exchanged without a trace."""

    keys: Mapping[Hashable, str]
    how: str
    doubtful: frozenset[Hashable] = frozenset()


def names_of(
    state: OptimizerState, weights: Checkpoint, *, stated: Iterable[str] = (), in_model_order: bool = False
) -> Names | None:
    """The names behind the ids of an optimizer; None where nothing tells them.

    ``stated`` are the parameters' names in the order of the ids, as a factory gives them.
    """
    if state.packed is not None and len(keys := parameters_of(weights)) == len(state.ids):
        return Names(dict(zip(state.ids, keys, strict=True)), BY_PACKING)
    listed_names = [name for group in state.groups for name in group.names or ()]
    if listed_names and len(listed_names) == len(state.ids):
        return _matched(zip(state.ids, listed_names, strict=True), weights, BY_NAMES)
    if state.is_by_name:
        return _matched(((id_, str(id_)) for id_ in state.ids), weights, BY_IDS)
    names = list(stated)
    if names:
        return _matched(zip(state.ids, names, strict=True), weights, BY_RUN) if len(names) == len(state.ids) else None
    return _by_order(state, weights, is_stated=in_model_order)


def _matched(pairs: Iterable[tuple[Hashable, str]], weights: Checkpoint, how: str) -> Names:
    """Names as keys of the weights, wrappers aside (``module.fc.bias`` and ``fc.bias`` are one)."""
    plain = {without_wrappers(key): key for key in weights}
    found = {id_: name if name in weights else plain.get(without_wrappers(name), name) for id_, name in pairs}
    return Names(found, how)


def parameters_of(weights: Checkpoint) -> list[str]:
    """The keys of a state_dict that are parameters as far as names tell; ties count once.

    >>> parameters_of(Checkpoint({}))
    []
    """
    seen: set[Hashable] = set()
    found = []
    for key, tensor in weights.items():
        if is_buffer(key) or tensor.tie in seen:
            continue
        seen.add(tensor.tie)
        found.append(key)
    return found


def is_buffer(key: str) -> bool:
    """Whether a key is that of a buffer, by its last component."""
    return is_derivable(key) or key.rpartition(".")[2] in STATISTICS


def _by_order(state: OptimizerState, weights: Checkpoint, *, is_stated: bool) -> Names | None:
    """Names by an order that the parameters may have been given in, where every slot's shape fits it.

    Where several orders fit, or shapes are shared, an id is doubtful unless the caller states that the order is right.
    """
    keys = parameters_of(weights)
    if len(keys) != len(state.ids):
        return None
    guesses = [(how, dict(zip(state.ids, order, strict=True))) for how, order in _orders(state, keys, weights)]
    fitting = [
        (how, found)
        for how, found in guesses
        if all(fits(state, id_, tuple(weights[key].shape)) for id_, key in found.items())
    ]
    if not fitting:
        return None
    how, found = fitting[0]
    if is_stated:
        return Names(found, f"{how}, as stated")
    shapes = Counter(tuple(weights[key].shape) for key in keys)
    shared = {id_ for id_, key in found.items() if shapes[tuple(weights[key].shape)] > 1}
    differing = {id_ for id_, key in found.items() if any(other[id_] != key for _, other in fitting[1:])}
    return Names(found, how, frozenset(shared | differing))


def _orders(state: OptimizerState, keys: list[str], weights: Checkpoint) -> Iterator[tuple[str, list[str]]]:
    """The orders in which optimizers are given parameters: as they come, or parted by weight decay.

    Matrices with weight decay come first in nanoGPT's and transformers' groups, vectors without it in timm's.
    """
    yield BY_ORDER, keys
    sizes = [len(group.ids) for group in state.groups if group.ids]
    matrices = [key for key in keys if len(weights[key].shape) >= 2]
    vectors = [key for key in keys if len(weights[key].shape) < 2]
    if sizes == [len(matrices), len(vectors)]:
        yield BY_DECAY_FIRST, matrices + vectors
    if sizes == [len(vectors), len(matrices)]:
        yield BY_DECAY_LAST, vectors + matrices


def fits(state: OptimizerState, id_: Hashable, shape: tuple[int, ...]) -> bool:
    """Whether the slots of an id have the shape of the parameter that it may be; no slot says nothing against it."""
    kind = state.kind
    shaped = kind.shaped if kind is not None else frozenset()
    slots = state.slots.get(id_, {})
    return all(tuple(slot.tensor.shape) == shape for name, slot in slots.items() if name in shaped and slot.tensor)
