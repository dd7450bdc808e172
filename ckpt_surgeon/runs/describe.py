"""What a training checkpoint holds for training: optimizers with a parameter behind each id, and the rest by kind."""

from __future__ import annotations

import struct
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from ..formats.pickle.graph import CallNode
from ..formats.pickle.values import Value
from ..reading.training_state import NO_WEIGHTS
from ..text import Shown
from .opening import open_run_file
from .optimizer_nodes import is_optimizer
from .run import Run
from .state import PACKED, OptimizerState, Slot, TreePath, entry, named_children, pairs_of

from ..files.paths import AnyPath, FilePath  # isort: skip


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of an optimizer: its id, its key ("" where it is unknown), slots with their shapes, its step."""

    id: Hashable
    key: str
    is_certain: bool
    slots: tuple[tuple[str, tuple[int, ...]], ...]
    step: float | None


@dataclass(frozen=True, slots=True)
class ListedGroup:
    """A param group: its options as they are in the file, and its parameters."""

    options: tuple[tuple[str, object], ...]
    parameters: tuple[Parameter, ...]


@dataclass(frozen=True, slots=True)
class ListedOptimizer:
    """One optimizer: where it lies, its kind ("" where unknown), how its names are known ("" where they are not)."""

    path: str
    kind: str
    how: str
    groups: tuple[ListedGroup, ...]


@dataclass(frozen=True, slots=True)
class TrainingPart:
    """Anything else that training goes on from: a scheduler, a scaler, loops, random state, a counter."""

    path: str
    kind: str
    value: str


@dataclass(frozen=True, slots=True, repr=False)
class Training(Shown):
    """What ``ckpt ls --training`` shows."""

    path: FilePath
    weights: str
    optimizers: tuple[ListedOptimizer, ...]
    parts: tuple[TrainingPart, ...]
    twins: tuple[str, ...]
    has_weights: bool = True  # not where it is an optimizer's file
    notes: tuple[str, ...] = ()


def training_of(
    source: AnyPath | Run, *, select: str | None = None, stated: Iterable[str] = (), in_model_order: bool = False
) -> Training:
    """The optimizers, schedulers, scalers, loops and counters of a training checkpoint.

    Raises what :func:`ckpt_surgeon.open_run` raises.

    >>> import ckpt_surgeon, torch
    >>> model = torch.nn.Linear(2, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}, "last.ckpt")
    >>> found = training_of("last.ckpt")
    >>> found.optimizers[0].groups[0].parameters[1].key, found.parts[0].value
    ('bias', '3')
    """
    run = source if isinstance(source, Run) else open_run_file(
        source, select=select, stated=stated, in_model_order=in_model_order
    )  # fmt: skip
    return Training(
        run.whole.path,
        ".".join(run.path),
        tuple(_optimizer(run, state) for state in run.optimizers),
        tuple(_parts(run)),
        tuple(".".join(twin.path) for twin in run.twins),
        not run.weights.part.startswith(NO_WEIGHTS),
        run.notes,
    )


def _optimizer(run: Run, state: OptimizerState) -> ListedOptimizer:
    names = run.names(state)
    keys = names.keys if names is not None else {}
    doubtful = names.doubtful if names is not None else frozenset()
    groups = tuple(
        ListedGroup(
            tuple((str(name), value) for name, value in group.options if isinstance(value, (bool, int, float, str))),
            tuple(_parameter(state, id_, keys.get(id_, ""), id_ not in doubtful) for id_ in group.ids),
        )
        for group in state.groups
    )
    kind = state.kind.name if state.kind is not None else ""
    return ListedOptimizer(".".join(state.path), kind, names.how if names is not None else "", groups)


def _parameter(state: OptimizerState, id_: Hashable, key: str, is_certain: bool) -> Parameter:
    slots = state.slots.get(id_, {})
    shapes = tuple((name, tuple(slot.tensor.shape)) for name, slot in slots.items() if slot.tensor is not None)
    return Parameter(id_, key, is_certain and bool(key), shapes, _step(slots.get("step")))


def _step(slot: Slot | None) -> float | None:
    """The number of steps, whether it is a number or a tensor of one element."""
    if slot is None:
        return None
    if slot.tensor is not None and slot.tensor.numel == 1 and slot.tensor.dtype.name in PACKED:
        return float(struct.unpack(PACKED[slot.tensor.dtype.name], b"".join(slot.tensor.blocks()))[0])
    return float(slot.node) if isinstance(slot.node, (int, float)) else None


# -- the rest, by what it holds

_KINDS = (
    ("scheduler", {"last_epoch", "base_lrs"}),
    ("scheduler", {"last_epoch", "_step_count"}),
    ("gradient scaler", {"scale", "growth_factor"}),
    ("loops", {"fit_loop"}),
)
_COUNTERS = ("epoch", "step", "iter", "iteration", "global_step", "iter_num", "best", "seen", "updates")


def _parts(run: Run) -> Iterable[TrainingPart]:
    skipped = {run.path, *(twin.path for twin in run.twins), *(state.path for state in run.optimizers)}
    for path, node in _entries(run.whole.root, ()):
        if path in skipped or is_optimizer(node):
            continue
        kind = _kind(path, node)
        if kind:
            yield TrainingPart(".".join(path), kind, _value_text(node))


def _entries(root: Value, above: TreePath) -> Iterable[tuple[TreePath, Value]]:
    """The entries of a file, and those of its lists and plain dicts of dicts, one level further."""
    for name, node in named_children(root):
        path = (*above, name)
        yield path, node
        if len(path) < 2 and not _kind(path, node) and not is_optimizer(node):
            yield from ((inner, below) for inner, below in _entries(node, path) if pairs_of(below) is not None)


def _kind(path: TreePath, node: Value) -> str:
    names = {str(key) for key, _ in pairs_of(node) or ()}
    for kind, wanted in _KINDS:
        if wanted <= names:
            return kind
    last = path[-1].lower()
    if "rng" in last or "random" in last:
        return "random state"
    if isinstance(node, (int, float)) and not isinstance(node, bool) and any(word in last for word in _COUNTERS):
        return "counter"
    if isinstance(node, CallNode) and node.name.endswith(("Namespace", "DictConfig")):
        return "arguments"
    return "arguments" if last in ("args", "hparams", "hyper_parameters", "config", "cfg") else ""


def _value_text(node: Value) -> str:
    if isinstance(node, (int, float, str)):
        return str(node)
    epoch = entry(node, "last_epoch")
    if isinstance(epoch, int):
        return f"last_epoch {epoch}"
    scale = entry(node, "scale")
    if isinstance(scale, float):
        return f"scale {scale:g}"
    return ", ".join(name for name, _ in list(named_children(node))[:4])
