"""Which state_dict of a file is taken: the only candidate, or the one that the caller names.

Candidates are never ranked (see :mod:`.candidates`): :func:`select_state_dict` lists them and asks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace

from ..errors import SEE_ALL, NotACheckpoint, SelectionError, listed
from ..formats.contents import Contents
from ..formats.pickle.torch_objects import LOST
from ..formats.pickle.values import Value
from ..tensors.checkpoint import Checkpoint, LeftOut
from ..tensors.extra_state import is_extra_state, without_extra_states
from ..tensors.records import OpaqueTensor
from .candidates import Candidate, candidates, continues, flattened, is_training_state, joined_path
from .objects import describe
from .parts import as_whole, part_of
from .training_state import everything_below, training_part, training_state
from .tree import TENSORS, Bound, Trail, Weights, children, followed, holders, is_module
from .whole_modules import is_packed_entry, part_text

OFFERED = 20  # how many candidates a message offers


def without_lost(candidate: Candidate) -> tuple[Candidate, tuple[str, ...]]:
    """A candidate without the tensors that a truncated file has lost, and a note that names them."""
    lost = {
        key: None
        for key, tensor in candidate.tensors.items()
        if isinstance(tensor, OpaqueTensor) and tensor.kind == LOST
    }
    if not lost:
        return candidate, ()
    whole = {key: tensor for key, tensor in candidate.tensors.items() if key not in lost}
    note = f"lost, cut off or missing: {len(lost):,} of {len(candidate.tensors):,} tensors ({listed(lost)})"
    return replace(candidate, tensors=whole), (note,)


def select_state_dict(contents: Contents, wanted: str | None = None, *, allow_part: bool = False) -> Checkpoint:
    """The checkpoint of one candidate: the only one, or the one at the dotted path ``wanted``.

    With ``allow_part``, one rank's part of a model counts as a whole one.  Raises SelectionError when
    there are several or the path is not there, NotACheckpoint when the file holds no tensor.
    """
    training = ""
    if wanted is not None:
        candidate = _at(contents, "" if wanted == "." else wanted)
    else:
        found = candidates(contents)
        if not found and (state := training_state(contents)) is not None:
            found, training = [state], training_part(state)
        if not found:
            raise NotACheckpoint(contents.path, f"holds no tensor ({describe(contents.root)})", SEE_ALL)
        if len(found) > 1:
            raise SelectionError(contents.path, f"holds {len(found):,} state_dicts", _offered(found))
        candidate = found[0]
    candidate, lost = without_lost(candidate)
    part = training or part_in(contents, candidate)
    made = Checkpoint(
        candidate.tensors,
        path=contents.path,
        container=contents.container,
        selected=candidate.path,
        metadata=contents.metadata,
        versions=candidate.versions,
        left_out=(*lacking_in(candidate), *beside(contents.root, [candidate.trail])),
        notes=(*contents.notes, *lost, *candidate.notes, *([part] if part else [])),
        part=part,
        root=contents.root,
    )
    return as_whole(made) if allow_part else made


def part_in(contents: Contents, candidate: Candidate) -> str:
    """What part of a model a candidate is; "" for one that, as far as is known, is a whole one."""
    return part_text(candidate.lacking) or part_of(contents, candidate.tensors)


def lacking_in(candidate: Candidate) -> Iterator[LeftOut]:
    """What the state_dict of a candidate has and cannot be had, with paths in the file."""
    for one in candidate.lacking:
        yield replace(one, path=joined_path(candidate.path, one.path) or ".")


def _offered(found: list[Candidate]) -> list[str]:
    more = [f"and {len(found) - OFFERED:,} more"] if len(found) > OFFERED else []
    return [*(candidate.label for candidate in found[:OFFERED]), *more]


def _at(contents: Contents, path: str) -> Candidate:
    """The candidate at a dotted path.  Raises SelectionError when nothing is there, or no tensor."""
    found = followed(contents.root, path)
    if found is None:
        raise SelectionError(contents.path, f"has nothing at {path!r}", _offered(candidates(contents)))
    node, trail = found
    if isinstance(node, TENSORS):
        return Candidate(path, {"tensor": node}, trail=trail)
    candidate = flattened(contents, Bound(contents.path, contents.root), path, node, trail)
    if not candidate.tensors and not candidate.lacking:
        candidate = everything_below(contents, path, node, trail)  # of an optimizer, which is asked for
    if not without_extra_states(candidate.tensors) and not candidate.lacking:
        raise SelectionError(contents.path, f"has no tensor at {path!r}", _offered(candidates(contents)))
    return candidate


def beside(root: Value, trails: Iterable[Trail]) -> Iterator[LeftOut]:
    """What a file holds beside the state_dicts that the trails lead to, level by level on the way to them."""
    ends = {trail[-1] if trail else None for trail in trails}
    steps = {step for trail in trails for step in trail}
    holding = holders(root)
    weights = Weights()
    levels = deque([("", root, None in ends)])
    while levels:
        path, node, chosen = levels.popleft()
        if is_module(node):
            continue
        for name, child in children(node):
            step, here = (id(node), name), joined_path(path, name)
            if step in steps:
                levels.append((here, child, step in ends))
            elif not chosen or not _belongs(name, child, holding):
                yield _left(here, name, child, weights)


def _belongs(name: str, child: Value, holding: set[int]) -> bool:
    """Whether a child of a selected state_dict is part of it."""
    if isinstance(child, TENSORS) or is_extra_state(name) or is_packed_entry(name, child):
        return True
    return id(child) in holding and continues(name, child)


def _left(path: str, name: str, node: Value, weights: Weights) -> LeftOut:
    return LeftOut(path, describe(node, training=is_training_state(name, node)), *weights.of(node))
