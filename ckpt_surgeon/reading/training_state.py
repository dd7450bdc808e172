"""Files that hold the state of an optimizer and no weights: what is in them, by dotted paths."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import Argument, Either, FileError, Phrase
from ..formats.contents import Contents
from ..formats.pickle.values import Value
from ..tensors.checkpoint import Checkpoint
from ..tensors.records import Tensor
from .candidates import Candidate, is_training_state, joined_path
from .tree import CONTAINERS, DEPTH, TENSORS, Bound, Trail, children, holders

NO_WEIGHTS = "training state alone"  # how what such a file is called begins


def training_state(contents: Contents) -> Candidate | None:
    """The state of an optimizer, or other state of a training, in a file without weights; None where there is none.

    It is ``state_dict()`` of an optimizer as a file of its own (Trainer's ``optimizer.pt``) or with counters and
    schedulers beside it (DeepSpeed's ``…_optim_states.pt``); where there are several, the file that has them.
    """
    found = list(_found(contents.root, holders(contents.root)))
    if not found:
        return None
    path, node, trail = found[0] if len(found) == 1 else ("", contents.root, ())
    return everything_below(contents, path, node, trail)


def everything_below(contents: Contents, path: str, node: Value, trail: Trail) -> Candidate:
    """Every tensor below a node by its dotted path, training state or not."""
    return Candidate(path, dict(_tensors(node, Bound(contents.path, contents.root))), trail=trail)


def training_part(candidate: Candidate) -> str:
    """What a file is that has nothing but such state."""
    return f"{NO_WEIGHTS}, the state of an optimizer{' at ' + candidate.path if candidate.path else ''}"


def refuse_training_state(checkpoint: Checkpoint) -> None:
    """Raise FileError for a checkpoint that is the state of an optimizer, where weights are needed."""
    if not checkpoint.part.startswith(NO_WEIGHTS):
        return
    taken = Argument("select", checkpoint.selected or ".")
    remedy = Phrase(
        "give the file of the model; ",
        Either("training_of(…)", "ckpt ls --training"),
        " shows groups and slots, and ",
        taken,
        " takes these tensors as they are",
    )
    raise FileError(checkpoint.path or "the checkpoint", f"has no weights: it is {checkpoint.part}", remedy)


def _found(root: Value, holding: set[int]) -> Iterator[tuple[str, Value, Trail]]:
    """The outermost nodes that are training state and have tensors, in the order of the file."""
    seen: set[int] = set()
    ahead: list[tuple[str, str, Value, Trail]] = [("", "", root, ())]
    while ahead:
        path, name, node, trail = ahead.pop()
        if id(node) not in holding or id(node) in seen or len(trail) > DEPTH:
            continue
        seen.add(id(node))
        if is_training_state(name, node):
            yield path, node, trail
            continue
        inside = [
            (joined_path(path, child_name), child_name, child, (*trail, (id(node), child_name)))
            for child_name, child in children(node)
        ]
        ahead.extend(reversed(inside))


def _tensors(node: Value, bound: Bound) -> Iterator[tuple[str, Tensor]]:
    """Every tensor below a node by its dotted path; an object within itself adds nothing."""
    seen: set[int] = set()
    ahead: list[tuple[str, Value]] = [("", node)]
    while ahead:
        path, node = ahead.pop()
        bound.spend(1, len(path))
        if isinstance(node, TENSORS):
            yield path, node
        elif isinstance(node, CONTAINERS) and id(node) not in seen:
            seen.add(id(node))
            ahead.extend(reversed([(joined_path(path, name), child) for name, child in children(node)]))
