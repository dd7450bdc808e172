"""An optimizer's state by names or by positions: what FSDP's full state has, and what one process has."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace

from ..errors import EditError
from .naming import Names, parameters_of
from .run import Run
from .state import Group, OptimizerState

NAMES, POSITIONS, FLAT = "names", "positions", "flat"


def with_optimizer_keys(run: Run, keys: str) -> Run:
    """A run whose optimizers' ids are the parameters' names, or their positions in the groups.

    ``"names"`` are what ``FullyShardedDataParallel.optim_state_dict`` and ``get_optimizer_state_dict`` give and take,
    ``"flat"`` the latter with ``flatten_optimizer_state_dict`` (torchtitan), ``"positions"`` what
    ``torch.optim.Optimizer.state_dict`` does; in each group parameters then stand in the order of the model.  Raises
    EditError where the names behind the ids are not certain.

    >>> import ckpt_surgeon, torch
    >>> model = torch.nn.Linear(2, 2)
    >>> optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    >>> torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "last.ckpt")
    >>> from ckpt_surgeon.runs.opening import open_run_file
    >>> with_optimizer_keys(open_run_file("last.ckpt"), "names").optimizers[0].ids
    ('weight', 'bias')
    """
    if keys not in (NAMES, FLAT, POSITIONS):
        raise EditError([f"optimizer keys are {NAMES}, {FLAT} or {POSITIONS}, not {keys!r}"])
    return replace(run, optimizers=tuple(_keyed(run, state, keys) for state in run.optimizers))


def _keyed(run: Run, state: OptimizerState, keys: str) -> OptimizerState:
    names = run.names(state)
    if names is None or names.doubtful:
        where = ".".join(state.path)
        problem = f"{where}: which parameter is behind each id is not certain"
        raise EditError([problem], remedy="give a factory that builds model and optimizer, or state the order")
    if keys == POSITIONS:
        return _by_positions(run, state, names) if state.is_by_name else state
    named = state if state.is_by_name else _by_names(state, names)
    return replace(named, is_flat=keys == FLAT)


def _by_names(state: OptimizerState, names: Names) -> OptimizerState:
    return _renumbered(state, names.keys, state.groups)


def _by_positions(run: Run, state: OptimizerState, names: Names) -> OptimizerState:
    order = {key: position for position, key in enumerate(parameters_of(run.weights))}
    groups = tuple(
        replace(group, ids=tuple(sorted(group.ids, key=lambda id_: order.get(names.keys[id_], len(order)))))
        for group in state.groups
    )
    ids: dict[Hashable, Hashable] = {}
    for group in groups:
        for id_ in group.ids:
            ids[id_] = len(ids)
    return _renumbered(state, ids, groups)


def _renumbered(state: OptimizerState, ids: Mapping[Hashable, Hashable], groups: tuple[Group, ...]) -> OptimizerState:
    slots = {ids[id_]: kept for id_, kept in state.slots.items()}
    listed_names = {
        id_: name for group in state.groups if group.names is not None
        for id_, name in zip(group.ids, group.names, strict=True)
    }  # fmt: skip
    made = tuple(
        replace(
            group,
            ids=tuple(ids[id_] for id_ in group.ids),
            names=None if group.names is None else tuple(listed_names[id_] for id_ in group.ids),
        )
        for group in groups
    )
    return replace(state, groups=made, slots=slots, is_flat=False)
