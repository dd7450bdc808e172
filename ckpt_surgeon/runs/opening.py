"""Opening a training checkpoint that is one file: its weights, its optimizers, and the twins of its weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ..errors import listed
from ..files.paths import AnyPath, FilePath, file_path
from ..formats import engines
from ..formats.dcp.metadata import METADATA
from ..formats.dcp.whole import read_whole_folder
from ..formats.pickle.graph import Pair
from ..formats.pickle.values import Value
from ..formats.tree_whole import whole_of
from ..formats.zip.whole import Whole, read_whole
from ..reading.opening import open as open_checkpoint
from ..tensors.checkpoint import Checkpoint
from ..tensors.records import Tensor
from .follow import NO_PROOF, SAME_RUN
from .layouts import remarks
from .nodes import dicts_in
from .optimizer_nodes import optimizers_in
from .packed import unpacked
from .run import Run, Twin
from .state import TreePath, named_children, pairs_of


def open_run_file(
    source: AnyPath, *, select: str | None = None, stated: Iterable[str] = (), in_model_order: bool = False
) -> Run:
    """Open a training checkpoint whole; nothing in it is run and no tensor is read.

    ``source`` is a file of torch.save or a distributed checkpoint; ``select`` the dotted path of its weights, where it
    holds several.  ``stated`` are the parameters' names in the order of the optimizer's ids; ``in_model_order`` says
    that the optimizer got the parameters in the order of the state_dict.  Raises what :func:`ckpt_surgeon.open` raises,
    and FileError for a file that cannot be kept whole.

    >>> import ckpt_surgeon, torch
    >>> model = torch.nn.Linear(2, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}, "last.ckpt")
    >>> run = open_run_file("last.ckpt")
    >>> list(run.weights), run.optimizers[0].ids
    (['weight', 'bias'], (0, 1))
    """
    path = file_path(source)
    chosen = open_checkpoint(path, select=select)
    whole, lost = _whole_at(path, chosen)
    where, node = _weights_at(whole, chosen)
    weights, nodes, unwritable = _records(whole, node, chosen)
    twins = () if unwritable else tuple(_twins(whole, where, weights))
    optimizers = tuple(unpacked(state, weights) for state in optimizers_in(whole, whole.root))
    return Run(
        whole, weights, where, nodes, optimizers, twins, tuple(stated), in_model_order, unwritable=unwritable,
        notes=(*remarks(whole.root), *lost), proof=NO_PROOF if lost else SAME_RUN,
    )  # fmt: skip


def _whole_at(path: FilePath, chosen: Checkpoint) -> tuple[Whole, tuple[str, ...]]:
    """The graph of a file of torch.save, a distributed checkpoint or an engine's folder, and notes on what it lacks."""
    local = path.local
    if local is not None and (local.name == METADATA or (local.is_dir() and (local / METADATA).lexists())):
        return read_whole_folder(local), ()
    if chosen.path is not None and chosen.path.is_dir() and engines.holds(chosen.path):
        whole, left = whole_of(chosen.path, chosen.root)
        lost = _lost_in(chosen.container)
        return whole, (lost, *((f"objects, not kept: {listed(left, 3)}",) if left else ()))
    return read_whole(path), ()


def _lost_in(container: str) -> str:
    """What of a folder is not in the one file that it becomes."""
    if container.startswith("SpeechBrain"):
        return "put together out of the files of a folder, which the library reads each for itself"
    scaler = ", nor is the engine's loss scaler" if container.startswith("DeepSpeed") else ""
    return f"put together out of the files of all ranks; how they were cut is not kept{scaler}"


def _weights_at(whole: Whole, chosen: Checkpoint) -> tuple[TreePath, Value]:
    """The path of the weights in the graph, and their node; () and None where they lie in an object."""
    ahead: list[tuple[TreePath, Value, str]] = [((), whole.root, chosen.selected)]
    while ahead:
        path, node, rest = ahead.pop()
        if not rest:
            return path, node
        for name, child in named_children(node):
            if rest == name or rest.startswith(name + "."):
                ahead.append(((*path, name), child, rest[len(name) + 1 :]))
    return (), None


def _records(whole: Whole, node: Value, chosen: Checkpoint) -> tuple[Checkpoint, dict[int, Value], str]:
    """The weights as records made from the graph, the node of each, and why they cannot be written, "" if they can."""
    tensors: dict[str, Tensor] = {}
    nodes: dict[int, Value] = {}
    for key, value in pairs_of(node) or ():
        tensor = whole.tensor(value)
        if tensor is None and isinstance(key, str):
            tensor = chosen.get(key)  # an extra state, or more than a plain tensor: its node is written as it is
        if isinstance(key, str) and tensor is not None:
            tensors[key] = tensor
            nodes[id(tensor)] = value
    if list(tensors) == list(chosen):
        return replace(chosen, tensors=tensors), nodes, ""
    return chosen, {}, "its weights are a module that was saved whole, or dicts in dicts"


def _twins(whole: Whole, where: TreePath, weights: Checkpoint) -> Iterable[Twin]:
    """The other state_dicts with the keys of the weights, be it behind ``module.`` and beside a counter."""
    for path, node in dicts_in(whole.root):
        if path != where and (twin := _twin(whole, path, node, weights)) is not None:
            yield twin


def _twin(whole: Whole, path: TreePath, node: Value, weights: Checkpoint) -> Twin | None:
    entries = [(str(key), value) for key, value in pairs_of(node) or ()]
    names = {key for key, _ in entries}
    prefix = next(
        (candidate for candidate in ("", "module.") if all(candidate + key in names for key in weights)), None
    )
    if prefix is None or len(entries) > len(weights) + 2:
        return None
    tensors: dict[str, Tensor] = {}
    nodes: dict[int, Value] = {}
    beside: list[Pair] = []
    for key, value in entries:
        tensor = whole.tensor(value)
        plain = key.removeprefix(prefix)
        if key.startswith(prefix) and plain in weights and tensor is not None:
            tensors[plain] = tensor
            nodes[id(tensor)] = value
        else:
            beside.append((key, value))
    return Twin(path, Checkpoint(tensors), nodes, prefix, tuple(beside)) if len(tensors) == len(weights) else None
