"""The folder that Megatron-Core saves: a distributed checkpoint, and beside it what every process has alike.

``.metadata`` and the files of torch.distributed.checkpoint have the weights under flat keys; among them lie the
optimizer's slots (``optimizer.state.exp_avg.<key>``, ``chained_0.optimizer.state.…``; here by key, then by slot) and
the state of the training (``rng_state/shard_0.0_1.1``).  ``common.pt`` is a file of torch.save with arguments, the
iteration and the options of the optimizer's groups, ``metadata.json`` names the format
(``megatron.core.dist_checkpointing``).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace

from ..contents import Contents
from ..pickle.values import Ordered, Value
from .metadata import METADATA

COMMON = "common.pt"
FORMAT = "metadata.json"
CONTAINER = "Megatron-Core"
_TRAINING = re.compile(
    r"""(?P<entry>(?:chained_\d+\.)?optimizer | rng_state | opt_param_scheduler | rerun_state_machine_state
        | grad_scaler | lr_scheduler | iteration | num_floating_point_operations_so_far | checkpoint_version | args)
        (?:[./](?P<rest>.+))?""",
    re.VERBOSE,
)
_SLOT = re.compile(r"state\.(?P<slot>[^.]+)\.(?P<key>.+)")


def holds(names: Collection[str]) -> bool:
    """Whether a folder with these names is such a checkpoint."""
    return METADATA in names and COMMON in names


def lacks_metadata(names: Collection[str]) -> bool:
    """Whether a folder with these names is one whose weights are not in torch's format, or not there."""
    return METADATA not in names and COMMON in names and FORMAT in names


def joined(pieces: Contents, common: Contents) -> Contents:
    """One checkpoint of both: weights at the top, the state of the training in entries of its own."""
    root, training = _parted(pieces.root if isinstance(pieces.root, dict) else {})
    for name, value in common.root.items() if isinstance(common.root, dict) else ():
        held = training.get(name)
        if isinstance(held, dict) and isinstance(value, dict):
            held.update({key: inner for key, inner in value.items() if key not in held})
        elif name not in root:
            training.setdefault(name, value)
    root.update(training)
    return replace(
        pieces,
        container=f"{CONTAINER}, {pieces.container}",
        root=root,
        notes=(*pieces.notes, *common.notes),
        globals=tuple(dict.fromkeys((*pieces.globals, *common.globals))),
        globals_inside=lambda: [*pieces.globals_inside(), *common.globals_inside()],
    )


def _parted(entries: Mapping[Value, Value]) -> tuple[Ordered, dict[Value, Value]]:
    """The weights, and the state of the training by the entry that it belongs to."""
    root = Ordered()
    training: dict[Value, Value] = {}
    for key, value in entries.items():
        found = _TRAINING.fullmatch(key) if isinstance(key, str) else None
        if found is None:
            root[key] = value
            continue
        entry, rest = found["entry"], found["rest"]
        if isinstance(value, dict) and not rest:
            training[entry] = value
            continue
        held = training.setdefault(entry, {})
        if isinstance(held, dict):
            held[rest or "value"] = value
    if isinstance(entries, Ordered):
        root.attributes = entries.attributes
    return root, {entry: _by_parameter(held, root) for entry, held in training.items()}


def _by_parameter(held: Value, weights: Mapping[Value, Value]) -> Value:
    """An optimizer's ``state.<slot>.<key>`` as ``state`` by key and slot, as torch.optim nests it.

    What names no weight stays under its flat key (buckets of a distributed optimizer).
    """
    if not isinstance(held, dict):
        return held
    state: dict[Value, dict[Value, Value]] = {}
    rest: dict[Value, Value] = {}
    for name, value in held.items():
        found = _SLOT.fullmatch(name) if isinstance(name, str) else None
        if found is None or found["key"] not in weights:
            rest[name] = value
        else:
            state.setdefault(found["key"], {})[found["slot"]] = value
    return {"state": state, **rest} if state and "state" not in rest else held
