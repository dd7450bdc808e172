"""Which dict of tensors inside a training checkpoint is the model.

A file may hold one state_dict, or several (raw and EMA weights, generator and discriminator) beside optimizer
state, counters and anything else.  The rules, in order:

* optimizer and scheduler state is never taken for weights, by its shape (``state`` and ``param_groups``) or name;
* entries with names that people give to models (``state_dict``, ``model``, ``net``, ``ema``, ``netG`` …) are
  candidates, each for itself; where there is one, its siblings are left out;
* a module that was saved whole is the state_dict that it would give;
* otherwise a dict with one dict of tensors in it is a wrapper, and a dict of several (``backbone``, ``head``) is one
  state_dict, with dotted keys.

Two candidates are never ranked: :func:`select` lists them and asks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from .checkpoint import Checkpoint, LeftOut, Versions
from .errors import NotACheckpoint, SelectionError, listed
from .formats.contents import Contents
from .formats.torch_objects import LOST
from .formats.unpickle import Object, Ordered, Value
from .tensors import OpaqueTensor, Tensor
from .tree import (
    DEPTH,
    TENSORS,
    attributes,
    children,
    describe,
    holds_tensors,
    is_module,
    module_state,
    tensors_below,
)

DICTS = 1_000_000  # how many a state_dict may be made of; a small pickle can name one dict so often that it has more

_MODEL = re.compile(
    r"""(?:.*[_.-])?(?:model|module|net|network|state_?dict|weights|params|parameters|ema|swa|teacher|student
        |generator|discriminator|checkpoint)
        (?:[_.-]?(?:ema|swa|state|state_?dict|dict|weights|params|best|last|avg|averaged|model|[a-z]|\d+))*
        |net_?[A-Z]\w* | [GD] | [gd]_ema | [GD]_[A-Z]+""",
    re.VERBOSE | re.IGNORECASE,
)
_TRAINING = re.compile(r"optim|sched|scaler|\bamp\b|^rng|random|criterion|^loss", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A dict of tensors that may be the model: its dotted path in the file and its tensors by dotted key."""

    path: str
    tensors: Mapping[str, Tensor]
    versions: Versions | None = None

    @property
    def nbytes(self) -> int:
        return sum({tensor.tie: tensor.nbytes for tensor in self.tensors.values()}.values())

    @property
    def label(self) -> str:
        """How a message offers it."""
        return f"--select {self.path or '.'} ({len(self.tensors):,} tensors, {self.nbytes:,} bytes)"


@dataclass(slots=True)
class _Flat:
    tensors: dict[str, Tensor] = field(default_factory=dict)
    versions: dict[str, Mapping[str, object]] | None = None
    dicts: int = 0


def candidates(contents: Contents) -> list[Candidate]:
    """Every dict of tensors in a file that may be the model, in the order of the file."""
    root = contents.root
    if isinstance(root, TENSORS):
        return [Candidate("", {"tensor": root})]
    return [_flattened(contents, path, node) for path, node in _found(root, "", 0, set())]


def without_lost(candidate: Candidate) -> tuple[Candidate, tuple[str, ...]]:
    """A candidate without the tensors that a truncated file has lost, and a note that names them."""
    lost = [
        key for key, tensor in candidate.tensors.items() if isinstance(tensor, OpaqueTensor) and tensor.kind == LOST
    ]
    if not lost:
        return candidate, ()
    whole = {key: tensor for key, tensor in candidate.tensors.items() if key not in set(lost)}
    note = f"lost, cut off or missing: {len(lost):,} of {len(candidate.tensors):,} tensors ({listed(lost)})"
    return Candidate(candidate.path, whole, candidate.versions), (note,)


def select(contents: Contents, wanted: str | None = None) -> Checkpoint:
    """The checkpoint of one candidate: the only one, or the one at the dotted path ``wanted``.

    Raises SelectionError when there are several or the path is not there, NotACheckpoint when the file holds no
    tensor.
    """
    if wanted is not None:
        candidate = _at(contents, "" if wanted == "." else wanted)
    else:
        found = candidates(contents)
        if not found:
            raise NotACheckpoint(
                contents.path, f"holds no tensor ({describe(contents.root)})", "see what it holds: ckpt ls --all"
            )
        if len(found) > 1:
            raise SelectionError(
                contents.path, f"holds {len(found)} state_dicts", [candidate.label for candidate in found]
            )
        candidate = found[0]
    candidate, lost = without_lost(candidate)
    return Checkpoint(
        candidate.tensors,
        path=contents.path,
        container=contents.container,
        selected=candidate.path,
        metadata=contents.metadata,
        versions=candidate.versions,
        left_out=tuple(beside(contents.root, candidate.path)),
        notes=(*contents.notes, *lost),
    )


def _at(contents: Contents, path: str) -> Candidate:
    node, rest = contents.root, path
    while rest:
        for name, child in children(node):
            if rest == name or rest.startswith(name + "."):
                node, rest = child, rest[len(name) + 1 :]
                break
        else:
            raise SelectionError(
                contents.path, f"has nothing at {path!r}", [candidate.label for candidate in candidates(contents)]
            )
    if isinstance(node, TENSORS):
        return Candidate(path, {"tensor": node})
    candidate = _flattened(contents, path, node)
    if not candidate.tensors:
        raise SelectionError(
            contents.path, f"has no tensor at {path!r}", [candidate.label for candidate in candidates(contents)]
        )
    return candidate


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def is_training_state(name: str, node: Value) -> bool:
    """Whether an entry is state of the training (optimizer, scheduler, scaler …), by its name or shape."""
    held = attributes(node) if isinstance(node, Object) else node
    if isinstance(held, dict) and "param_groups" in held and "state" in held:
        return True
    return _TRAINING.search(name) is not None


def _found(node: Value, path: str, depth: int, seen: set[int]) -> Iterator[tuple[str, Value]]:
    """The candidates below a node, by the rules of this module; what is there under two names is found once."""
    if depth > DEPTH or id(node) in seen or is_training_state("", node):
        return
    seen.add(id(node))
    if is_module(node):
        yield path, node
        return
    own = [name for name, child in children(node) if isinstance(child, TENSORS)]
    kids = [
        (name, child)
        for name, child in children(node)
        if not isinstance(child, TENSORS) and not is_training_state(name, child) and holds_tensors(child)
    ]
    weighty = any("." in name or name in ("weight", "bias") for name in own)
    models = [(name, child) for name, child in kids if _MODEL.fullmatch(name)]
    dicts = [(name, child) for name, child in kids if isinstance(child, dict) or is_module(child)]
    if isinstance(node, (list, tuple)) and kids and not own:
        models = kids
    if models and not weighty:
        for name, child in models:
            yield from _found(child, _join(path, name), depth + 1, seen)
    elif len(dicts) == 1 and not weighty and not _siblings_matter(node, own):
        yield from _found(dicts[0][1], _join(path, dicts[0][0]), depth + 1, seen)
    elif own or dicts:
        yield path, node
    elif len(kids) == 1:
        yield from _found(kids[0][1], _join(path, kids[0][0]), depth + 1, seen)


def _siblings_matter(node: Value, own: list[str]) -> bool:
    """Whether tensors beside a dict of tensors are weights too, rather than a metric or two."""
    return isinstance(node, dict) and any(
        isinstance(tensor := node.get(name), TENSORS) and len(tensor.shape) > 0 for name in own
    )


def _flattened(contents: Contents, path: str, node: Value) -> Candidate:
    flat = _Flat()
    _flatten(contents, flat, node, "", (id(node),))
    return Candidate(path, flat.tensors, flat.versions)


def _flatten(contents: Contents, flat: _Flat, node: Value, prefix: str, within: tuple[int, ...]) -> None:
    """Collect the tensors in nested dicts; a dict within itself (``within`` has the ids on the way) adds nothing."""
    flat.dicts += 1
    if is_module(node):
        flat.tensors |= {prefix + name: tensor for name, tensor in module_state(node).items()}
        return
    if len(within) > DEPTH or flat.dicts > DICTS:
        raise SelectionError(contents.path, f"has dicts in dicts without end, as at {prefix[:80]!r}")
    if isinstance(node, Ordered) and isinstance(node.attributes, dict):
        _take_versions(flat, node.attributes.get("_metadata"), prefix)
    for name, child in children(node):
        key = prefix + name
        if isinstance(child, TENSORS):
            if key in flat.tensors:
                raise SelectionError(contents.path, f"two tensors are called {key!r} once their keys are strings")
            flat.tensors[key] = child
        elif isinstance(child, (dict, Object)) and id(child) not in within and not is_training_state(name, child):
            if isinstance(child, Object) and not is_module(child):
                continue
            _flatten(contents, flat, child, key + ".", (*within, id(child)))


def _take_versions(flat: _Flat, saved: Value, prefix: str) -> None:
    if not isinstance(saved, dict):
        return
    flat.versions = flat.versions if flat.versions is not None else {}
    for module, version in saved.items():
        if isinstance(module, str) and isinstance(version, dict):
            path = prefix.removesuffix(".") if not module else prefix + module
            flat.versions[path] = {str(key): value for key, value in version.items()}


def beside(root: Value, selected: str) -> Iterator[LeftOut]:
    """What a file holds beside the selected state_dict, level by level on the way to it."""
    node, path, rest = root, "", selected
    while not is_module(node):
        following = None
        for name, child in children(node):
            here = _join(path, name)
            if rest and (rest == name or rest.startswith(name + ".")):
                following = (child, here, rest[len(name) + 1 :])
            elif rest:
                tensors = list(tensors_below(child))
                yield LeftOut(
                    here,
                    describe(child, training=is_training_state(name, child)),
                    len(tensors),
                    sum(tensor.nbytes for tensor in tensors),
                )
            elif isinstance(child, TENSORS):
                continue
            elif not ((isinstance(child, dict) or is_module(child)) and holds_tensors(child)):
                yield _left(here, name, child)
            elif is_training_state(name, child):
                tensors = list(tensors_below(child))
                yield LeftOut(
                    here,
                    describe(child, training=is_training_state(name, child)),
                    len(tensors),
                    sum(tensor.nbytes for tensor in tensors),
                )
        if following is None:
            return
        node, path, rest = following


def _left(path: str, name: str, node: Value) -> LeftOut:
    tensors = list(tensors_below(node))
    what = describe(node, training=is_training_state(name, node))
    return LeftOut(path, what, len(tensors), sum(tensor.nbytes for tensor in tensors))
