"""The dicts of tensors in a file that may be the model, found by name and structure.

A file may hold one state_dict, or several (raw and EMA weights, generator and discriminator) beside optimizer
state, counters and anything else.  The rules, in order:

* optimizer and scheduler state is never taken for weights, by its shape (``state`` and ``param_groups``) or name;
* entries with names that people give to models (``state_dict``, ``model``, ``net``, ``ema``, ``netG`` …) are
  candidates, each for itself; where there is one, its siblings are left out;
* settings (``hyper_parameters``, ``config``, ``args``, ``callbacks`` …) are never the model, nor a part of it, where
  anything else may be;
* a module that was saved whole is the state_dict that it would give;
* otherwise a dict with one dict of tensors in it is a wrapper, and a dict of several (``backbone``, ``head``) is one
  state_dict, with dotted keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import Argument, Phrase, SelectionError
from ..formats.contents import Contents
from ..formats.pickle.values import Object, Ordered, Value, spelled
from ..tensors.checkpoint import LeftOut, Versions
from ..tensors.extra_state import is_extra_state
from ..tensors.records import Tensor
from .extra_states import read_extra_state
from .tree import (
    DEPTH,
    TENSORS,
    Bound,
    Trail,
    attribute,
    children,
    holders,
    is_mapping,
    is_module,
)
from .whole_modules import ModuleState, is_packed_entry, module_state

NAME = 200  # characters that the name of a model may have

_MODEL = re.compile(
    r"""(?:.*[_.-])?(?:model|module|net|network|state_?dict|weights|params|parameters|ema|swa|teacher|student
        |generator|discriminator|checkpoint)
        (?:[_.-]?[a-z0-9])*+
        |net_?[A-Z]\w* | [GD] | [gd]_ema | [GD]_[A-Z]+""",
    re.VERBOSE | re.IGNORECASE,
)
_SETTINGS = re.compile(r"hyper_?parameters|hparams|config|args|callbacks", re.IGNORECASE)
_TRAINING = re.compile(
    r"""optim|sched|scaler|\bamp\b|^rng|random|criterion|^loss|^train(er|ing)?_state$|^data_?loader$
        |^iteration$|^rerun_state""",
    re.IGNORECASE | re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A dict of tensors that may be the model: its dotted path in the file and its tensors by dotted key."""

    path: str
    tensors: Mapping[str, Tensor]
    versions: Versions | None = None
    trail: Trail = ()
    notes: tuple[str, ...] = ()
    lacking: tuple[LeftOut, ...] = ()  # what its state_dict would have and cannot be had

    @property
    def nbytes(self) -> int:
        return sum({tensor.tie: tensor.nbytes for tensor in self.tensors.values()}.values())

    @property
    def label(self) -> str:
        """How a message offers it."""
        counts = f" ({len(self.tensors):,} tensors, {self.nbytes:,} bytes)"
        return Phrase(Argument("select", self.path or "."), counts)


def candidates(contents: Contents) -> list[Candidate]:
    """Every dict of tensors in a file that may be the model, in the order of the file."""
    root = contents.root
    if isinstance(root, TENSORS):
        return [Candidate("", {"tensor": root})]
    bound = Bound(contents.path, root)
    search = _Search(holders(root))
    return [flattened(contents, bound, path, node, trail) for path, node, trail in search.found(root, "", ())]


def joined_path(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def is_training_state(name: str, node: Value) -> bool:
    """Whether an entry is state of the training (optimizer, scheduler, scaler …), by its name or shape."""
    if isinstance(node, dict) and (("param_groups" in node and "state" in node) or _is_flat_optimizer(node)):
        return True
    if (
        isinstance(node, Object)
        and attribute(node, "param_groups") is not None
        and attribute(node, "state") is not None
    ):
        return True
    return _TRAINING.search(name) is not None


def _is_flat_optimizer(node: dict[Value, Value]) -> bool:
    """Whether a dict is an optimizer's state whose keys were joined by dots, as FSDP2 and torchtitan write it."""
    last = next(reversed(node), None)
    return isinstance(last, str) and last.startswith("param_groups.")


class _Search:
    """Finds the candidates in a file, by the rules of this module; ``holding`` are the containers with tensors."""

    def __init__(self, holding: set[int]) -> None:
        self._holding = holding
        self._seen: set[int] = set()

    def found(self, node: Value, path: str, trail: Trail) -> Iterator[tuple[str, Value, Trail]]:
        """The candidates below a node; what is there under two names is found once."""
        if len(trail) > DEPTH or self._was_seen(node) or is_training_state("", node):
            return
        if is_module(node):
            yield path, node, trail
            return
        inside = list(children(node))
        own = [(name, child) for name, child in inside if isinstance(child, TENSORS)]
        kids = [(name, child) for name, child in inside if self._holds(child) and may_hold_weights(name, child)]
        packed = [name for name, child in kids if is_packed_entry(name, child)]
        kids = [one for one in kids if one[0] not in packed] if packed else kids
        kids = [one for one in kids if not _SETTINGS.fullmatch(one[0])] or ([] if own or packed else kids)
        weighty = any("." in name or name in ("weight", "bias") for name in (*(name for name, _ in own), *packed))
        models = [(name, child) for name, child in kids if len(name) <= NAME and _MODEL.fullmatch(name)]
        dicts = [(name, child) for name, child in kids if is_mapping(child) or is_module(child)]
        if isinstance(node, (list, tuple)) and kids and not own:
            models = kids
        if models and not weighty:
            ahead = models
        elif len(dicts) == 1 and not weighty and not (isinstance(node, dict) and _are_weights(own)):
            ahead = dicts
        elif own or dicts or packed:
            yield path, node, trail
            return
        else:
            ahead = kids if len(kids) == 1 else []
        for name, child in ahead:
            yield from self.found(child, joined_path(path, name), (*trail, (id(node), name)))

    def _holds(self, node: Value) -> bool:
        return id(node) in self._holding and not isinstance(node, TENSORS)

    def _was_seen(self, node: Value) -> bool:
        """Whether a node, or the state of an object, was here before; marks it."""
        marks = {id(node), id(node.state)} if isinstance(node, Object) and node.state is not None else {id(node)}
        before = not self._seen.isdisjoint(marks)
        self._seen |= marks
        return before


def may_hold_weights(name: str, node: Value) -> bool:
    """Whether the model may be in an entry: not in training state, nor in the extra state of a module."""
    return not is_training_state(name, node) and not is_extra_state(name)


def _are_weights(own: Sequence[tuple[str, Tensor]]) -> bool:
    """Whether tensors beside a dict of tensors are weights too, rather than a metric or two."""
    return any(len(tensor.shape) > 0 for _, tensor in own)


@dataclass(slots=True)
class _Flat:
    """A state_dict under construction out of nested dicts."""

    contents: Contents
    bound: Bound
    tensors: dict[str, Tensor] = field(default_factory=dict)
    versions: dict[str, Mapping[str, object]] | None = None
    modules: ModuleState = field(default_factory=ModuleState)

    def add(self, node: Value, prefix: str, within: tuple[int, ...]) -> None:
        """Collect the tensors below; a dict within itself (``within`` has the ids on the way) adds nothing."""
        if is_module(node):
            self._add_module(node, prefix)
            return
        if len(within) > DEPTH:
            raise SelectionError(self.contents.path, f"has dicts in dicts without end, as at {prefix[:80]!r}")
        if isinstance(node, Ordered):
            self._take_versions(node.attributes, prefix)
        if isinstance(node, dict):
            self._check_keys(node, prefix)
        for name, child in children(node):
            key = prefix + name
            self.bound.spend(1, len(key))
            if isinstance(child, TENSORS):
                self._put(key, child)
            elif is_extra_state(name):
                self._put(key, read_extra_state(child))
            elif is_packed_entry(name, child):
                self.modules.lack(key, child)
            elif continues(name, child) and id(child) not in within:
                self.add(child, key + ".", (*within, id(child)))

    def _add_module(self, node: Value, prefix: str) -> None:
        known = len(self.modules.tensors)
        module_state(node, self.bound, prefix, into=self.modules)
        for key, tensor in self.modules.tensors[known:]:
            self._put(key, tensor)
        self.versions = {**(self.versions or {}), **self.modules.versions}

    def _check_keys(self, node: Mapping[Value, Value], prefix: str) -> None:
        """Raise SelectionError for a tensor under a key that has no text: a tensor, an object, a long tuple."""
        for key, child in node.items():
            if type(key) is not str and isinstance(child, TENSORS) and spelled(key).startswith("<"):
                problem = (
                    f"has a tensor under a key that is no text, {spelled(key)}, in {prefix.removesuffix('.') or 'it'}"
                )
                raise SelectionError(self.contents.path, problem)

    def _put(self, key: str, tensor: Tensor) -> None:
        if key in self.tensors:
            raise SelectionError(self.contents.path, f"two tensors are called {key!r} once their keys are strings")
        self.tensors[key] = tensor

    def _take_versions(self, attributes: Value, prefix: str) -> None:
        saved = attributes.get("_metadata") if isinstance(attributes, dict) else None
        if not isinstance(saved, dict):
            return
        self.versions = self.versions if self.versions is not None else {}
        self.bound.spend(len(saved), len(saved) * len(prefix))
        for module, version in saved.items():
            if isinstance(module, str) and isinstance(version, dict):
                path = prefix.removesuffix(".") if not module else prefix + module
                self.bound.spend(len(version), len(module))
                self.versions[path] = {spelled(key): value for key, value in version.items()}


def flattened(contents: Contents, bound: Bound, path: str, node: Value, trail: Trail) -> Candidate:
    flat = _Flat(contents, bound)
    flat.add(node, "", (id(node),))
    found = flat.modules
    return Candidate(path, flat.tensors, flat.versions, trail, tuple(found.notes()), tuple(found.lacking))


def continues(name: str, child: Value) -> bool:
    """Whether the tensors below a child of a state_dict belong to it too."""
    is_settings = _SETTINGS.fullmatch(name) is not None
    return (is_mapping(child) or is_module(child)) and may_hold_weights(name, child) and not is_settings
