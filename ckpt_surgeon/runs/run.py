"""A training checkpoint as a whole: its weights, and everything beside them that is kept when it is written.

    file ── open_run ──▶ Run ── edited ──▶ Run ── save ──▶ file

The weights are a :class:`~ckpt_surgeon.tensors.checkpoint.Checkpoint`, edited as ever.  What lies beside them stays as
it is, object for object; where an edit of the weights reaches into it (optimizers, twins with the same keys), it
follows or the edit is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from ..edits.change import Change, Edit
from ..errors import EditError, NothingMatched
from ..files.paths import AnyPath, file_path
from ..files.sinks import Progress
from ..formats.pickle.graph import CallNode, DictNode, ListNode, Pair
from ..formats.pickle.values import Value
from ..formats.zip.whole import Whole, ordered, plain_node, read_whole, tensor_node
from ..reading.opening import open as open_checkpoint
from ..tensors.checkpoint import Checkpoint
from ..tensors.records import ExtraState, Tensor
from ..text import Shown
from .follow import SAME_RUN, Plan, follow_all, notes_of, weakest
from .naming import Names, names_of
from .saving import WritePlan, save_whole
from .state import OptimizerState, Path, attributes_of, entry, named_children, optimizers_in, pairs_of, written_state


@dataclass(frozen=True, slots=True, eq=False)
class Twin:
    """A state_dict beside the weights with the same keys (EMA, SWA, a teacher), and the nodes of its tensors.

    Its keys may carry a ``prefix`` of their own, and entries that are ``beside`` them, as those of AveragedModel and of
    mmengine's EMAHook do (``module.``, and ``n_averaged`` or ``steps``).
    """

    path: Path
    tensors: Checkpoint
    nodes: Mapping[int, Value]
    prefix: str = ""
    beside: tuple[Pair, ...] = ()


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Run(Shown):
    """An opened training checkpoint; edits return another one, nothing is written before :func:`save_run`.

    ``optimizers`` are those that the file holds, ``twins`` the state_dicts that get the same edits; ``proof`` is the
    weakest class of proof among the edits so far, and ``notes`` what they said.
    """

    whole: Whole
    weights: Checkpoint
    path: Path
    nodes: Mapping[int, Value]
    optimizers: tuple[OptimizerState, ...]
    twins: tuple[Twin, ...] = ()
    stated: tuple[str, ...] = ()
    in_model_order: bool = False
    proof: str = SAME_RUN
    notes: tuple[str, ...] = ()
    without: tuple[Path, ...] = ()
    values: Mapping[Path, Value] = field(default_factory=dict)
    schedulers: Mapping[Path, tuple[int, ...]] = field(default_factory=dict)  # places in their lists that go
    unwritable: str = ""  # why the weights can only be kept as they are

    def names(self, state: OptimizerState) -> Names | None:
        """The parameters behind an optimizer's ids, and how they are known."""
        return names_of(state, self.weights, stated=self.stated, in_model_order=self.in_model_order)

    def edited(
        self, plan: Plan, *, computes: bool = False, replay: Plan | None = None, reset: Iterable[str] = (),
        moments: str = "zero",
    ) -> tuple[Run, Change[Checkpoint]]:  # fmt: skip
        """The run after an edit of its weights, and the change; optimizers and twins follow.

        ``plan`` is the edit; ``replay`` is what it does to moments in place of weights (``plan`` itself by default);
        ``computes`` says that it makes new values, so that state must be reset by name; ``moments`` is what new
        elements get in the replay.  Raises EditError.
        """
        change = plan(self.weights)
        if self.unwritable and not _is_identity(change):
            raise EditError([f"{self.whole.path}: {self.unwritable}, so they can be kept whole but not edited"])
        states = [(state, self.names(state)) for state in self.optimizers]
        done = follow_all(states, change, replay or plan, computes=computes, reset=reset)
        notes = [*self.notes, *notes_of(done, moments)]
        schedulers = dict(self.schedulers)
        for state, one in zip(self.optimizers, done, strict=True):
            if one.emptied:
                gone = self._schedulers_of(state)
                schedulers |= {path: (*schedulers.get(path, ()), *one.emptied) for path in gone}
                notes.append(f"groups {', '.join(map(str, one.emptied))} are empty and go, with their base_lrs")
        twins = tuple(self._twin(twin, plan, notes) for twin in self.twins)
        made = replace(
            self, weights=change.result, optimizers=tuple(one.state for one in done), twins=twins,
            notes=tuple(dict.fromkeys(notes)), schedulers=schedulers,
            proof=weakest([self.proof, *(one.proof for one in done)]),
        )  # fmt: skip
        return made, change

    def edited_by(self, edit: Edit[...], args: tuple[object, ...], kwargs: Mapping[str, object]) -> Run:
        """The run after an edit that is called on it: ``ckpt_surgeon.strip_prefix(run)``."""
        fills = edit.declaration.fills
        moments = {**kwargs, **({fills: 0.0 if fills == "value" else "zero"} if fills else {})}
        made, _ = self.edited(
            lambda tensors: edit.plan(tensors, *args, **kwargs),
            computes=edit.declaration.computes,
            replay=lambda tensors: edit.plan(tensors, *args, **moments),
        )
        return made

    def save_to(self, out: AnyPath, *, force: bool = False, progress: Progress | None = None) -> WritePlan:
        """Write the run to one file of torch.save: see :func:`ckpt_surgeon.save`."""
        return save_whole(self, out, force=force, progress=progress)

    def _schedulers_of(self, state: OptimizerState) -> list[Path]:
        """The schedulers whose lists have an entry for each group of an optimizer."""
        count = len(state.groups)
        return [
            path for path, node in _dicts(self.whole.root)
            if isinstance(rates := entry(node, "base_lrs"), ListNode) and len(rates.items) == count
        ]  # fmt: skip

    def _twin(self, twin: Twin, plan: Plan, notes: list[str]) -> Twin:
        """A twin after the same edit; one that cannot take it is named and stays as it is."""
        try:
            return replace(twin, tensors=plan(twin.tensors).result)
        except EditError as error:
            notes.append(f"{'.'.join(twin.path)} has the same keys and was not edited: {error}")
            return twin

    def left_out(self, patterns: Iterable[str]) -> Run:
        """The run without the entries that the dotted globs name.  Raises NothingMatched."""
        from fnmatch import fnmatchcase

        gone: list[Path] = []
        paths = [path for path, _ in self.entries()]
        for pattern in patterns:
            hits = [path for path in paths if fnmatchcase(".".join(path), pattern)]
            if not hits:
                raise NothingMatched([pattern], what="entry", examples=[".".join(path) for path in paths[:20]])
            gone += hits
        if any(self.path[: len(path)] == path for path in gone):
            raise EditError([f"{'.'.join(self.path)} holds the weights and cannot be left out"])
        kept = tuple(state for state in self.optimizers if not _is_below(state.path, gone))
        twins = tuple(twin for twin in self.twins if not _is_below(twin.path, gone))
        return replace(self, optimizers=kept, twins=twins, without=(*self.without, *gone))

    def entries(self) -> list[tuple[Path, Value]]:
        """The entries beside the weights, two levels deep, with their paths."""
        found: list[tuple[Path, Value]] = []
        for name, node in named_children(self.whole.root):
            found.append(((name,), node))
            if pairs_of(node) is not None and (name,) != self.path:
                found += [((name, inner), below) for inner, below in named_children(node)]
        return found

    def instead(self) -> dict[int, Value]:
        """What is written in place of nodes of the file, by their identity; everything else is written as it is."""
        made: dict[int, Value] = {}
        if not self.unwritable:
            old = followed(self.whole.root, self.path)
            made[id(old)] = _weights_node(old, self.weights, self.nodes)
        for twin in self.twins:
            old = followed(self.whole.root, twin.path)
            made[id(old)] = _weights_node(old, twin.tensors, twin.nodes, twin.prefix, twin.beside)
        for state, original in zip(self.optimizers, self._originals(), strict=True):
            if differs(state, original):
                made[id(followed(self.whole.root, state.path))] = written_state(state)
        for path, places in self.schedulers.items():
            node = followed(self.whole.root, path)
            made[id(node)] = _without_places(node, places)
        for path in self.without:
            parent = followed(self.whole.root, path[:-1])
            made[id(parent)] = _without(made.get(id(parent), parent), path[-1])
        for path, value in self.values.items():
            parent = followed(self.whole.root, path[:-1])
            made[id(parent)] = _with_value(made.get(id(parent), parent), path[-1], value)
        return made

    def _originals(self) -> list[OptimizerState]:
        found = {state.path: state for state in optimizers_in(self.whole, self.whole.root)}
        return [found[state.path] for state in self.optimizers]


def _is_identity(change: Change[Checkpoint]) -> bool:
    """Whether a change leaves every tensor under its key."""
    return list(change.result) == list(change.before) and all(
        tensor is change.before[key] for key, tensor in change.result.items()
    )


def _weights_node(
    old: Value, tensors: Checkpoint, nodes: Mapping[int, Value], prefix: str = "", beside: Iterable[Pair] = ()
) -> Value:
    """A state_dict: the very nodes of tensors that an edit kept, fresh ones for those that it made."""
    if not prefix and _is_untouched(old, tensors, nodes):
        return old
    like = next(iter(nodes.values()), None)
    device = next((tensor.device for tensor in tensors.values()), "cpu")
    pairs: list[Pair] = [
        (prefix + key, nodes[id(tensor)] if id(tensor) in nodes else tensor_node(tensor, like, device=device))
        for key, tensor in tensors.items()
    ]
    pairs += beside
    if isinstance(old, DictNode):
        return DictNode(pairs)
    attributes: list[Pair] | None = None
    if tensors.versions is not None:
        inner: list[Pair] = [(prefix + name, plain_node(dict(one))) for name, one in tensors.versions.items()]
        attributes = [("_metadata", ordered(inner))]
    return ordered(pairs, attributes)


def _is_untouched(old: Value, tensors: Checkpoint, nodes: Mapping[int, Value]) -> bool:
    pairs = pairs_of(old) or []
    same = [(key, nodes.get(id(tensor))) for key, tensor in tensors.items()]
    return len(pairs) == len(same) and all(
        key == name and value is node for (key, value), (name, node) in zip(pairs, same, strict=True)
    )


def differs(state: OptimizerState, original: OptimizerState) -> bool:
    return state.groups != original.groups or state.slots.keys() != original.slots.keys() or any(
        slot.node is not original.slots[one][name].node
        for one, slots in state.slots.items()
        for name, slot in slots.items()
        if name in original.slots[one]
    )  # fmt: skip


def _is_below(path: Path, above: Iterable[Path]) -> bool:
    return any(path[: len(one)] == one for one in above)


def followed(root: Value, path: Path) -> Value:
    """The node at a path of names."""
    node = root
    for name in path:
        node = next((child for key, child in named_children(node) if key == name), None)
    return node


def _without(node: Value, name: str) -> Value:
    """A copy of a dict or list without one entry."""
    if isinstance(node, DictNode):
        return DictNode([pair for pair in node.pairs if str(pair[0]) != name])
    if isinstance(node, ListNode):
        return ListNode([item for index, item in enumerate(node.items) if str(index) != name])
    if isinstance(node, CallNode):
        return _with_pairs(node, [pair for pair in node.pairs if str(pair[0]) != name])
    raise EditError([f"nothing can be left out of a {type(node).__name__}"])


def _without_places(node: Value, places: tuple[int, ...]) -> Value:
    """A scheduler without the entries of some groups in its lists (base_lrs, _last_lr …)."""
    rates = entry(node, "base_lrs")
    count = len(rates.items) if isinstance(rates, ListNode) else 0
    pairs: list[Pair] = []
    for key, value in pairs_of(node) or ():
        if isinstance(value, ListNode) and len(value.items) == count:
            value = ListNode([item for place, item in enumerate(value.items) if place not in places])
        pairs.append((key, value))
    return DictNode(pairs) if isinstance(node, DictNode) else _with_pairs(node, pairs)  # type: ignore[arg-type]


def _with_value(node: Value, name: str, value: Value) -> Value:
    """A copy of a dict or list with another value at one entry."""
    if isinstance(node, DictNode):
        return DictNode([(key, value if str(key) == name else old) for key, old in node.pairs])
    if isinstance(node, ListNode):
        return ListNode([value if str(index) == name else old for index, old in enumerate(node.items)])
    if isinstance(node, CallNode):
        made = _with_pairs(node, [(key, value if str(key) == name else old) for key, old in node.pairs])
        attributes = attributes_of(node)
        if attributes is not None:
            made.after = [
                (code, [_with_value(attributes, name, value)] if code == b"b" else ops) for code, ops in made.after
            ]
        return made
    raise EditError([f"nothing can be set in a {type(node).__name__}"])


def _with_pairs(node: CallNode, pairs: list[Pair]) -> CallNode:
    """A copy of an object with other entries, in place of those that it had."""
    others = [step for step in node.after if step[0] != b"u"]
    after = [(b"u", [value for pair in pairs for value in pair]), *others] if pairs else others
    return replace(node, after=after)


# -- opening


def open_run_file(
    source: AnyPath, *, select: str | None = None, stated: Iterable[str] = (), in_model_order: bool = False
) -> Run:
    """Open a training checkpoint whole; nothing in it is run and no tensor is read.

    ``source`` is a file of torch.save; ``select`` the dotted path of its weights, where it holds several.  ``stated``
    are the parameters' names in the order of the optimizer's ids; ``in_model_order`` says that the optimizer got the
    parameters in the order of the state_dict.  Raises what :func:`ckpt_surgeon.open` raises, and FileError for a file
    that cannot be kept whole.

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
    whole = read_whole(path)
    where, node = _weights_at(whole, chosen)
    weights, nodes, unwritable = _records(whole, node, chosen)
    twins = () if unwritable else tuple(_twins(whole, where, weights))
    optimizers = tuple(optimizers_in(whole, whole.root))
    return Run(
        whole, weights, where, nodes, optimizers, twins, tuple(stated), in_model_order, unwritable=unwritable
    )  # fmt: skip


def _weights_at(whole: Whole, chosen: Checkpoint) -> tuple[Path, Value]:
    """The path of the weights in the graph, and their node; () and None where they lie in an object."""
    ahead: list[tuple[Path, Value, str]] = [((), whole.root, chosen.selected)]
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
        if tensor is None and isinstance(key, str) and isinstance(chosen.get(key), ExtraState):
            tensor = chosen[key]  # whose node is written as it is
        if isinstance(key, str) and tensor is not None:
            tensors[key] = tensor
            nodes[id(tensor)] = value
    if list(tensors) == list(chosen):
        return replace(chosen, tensors=tensors), nodes, ""
    return chosen, {}, "its weights are a module that was saved whole, dicts in dicts, or more than plain tensors"


def _twins(whole: Whole, where: Path, weights: Checkpoint) -> Iterable[Twin]:
    """The other state_dicts with the keys of the weights, be it behind ``module.`` and beside a counter."""
    for path, node in _dicts(whole.root):
        if path != where and (twin := _twin(whole, path, node, weights)) is not None:
            yield twin


def _twin(whole: Whole, path: Path, node: Value, weights: Checkpoint) -> Twin | None:
    entries = [(str(key), value) for key, value in pairs_of(node) or ()]
    names = {key for key, _ in entries}
    prefix = next((one for one in ("", "module.") if all(one + key in names for key in weights)), None)
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


def _dicts(root: Value, deep: int = 4) -> Iterable[tuple[Path, Value]]:
    """The dicts of a file that twins may be, with their paths."""
    ahead: list[tuple[Path, Value]] = [((), root)]
    while ahead:
        path, node = ahead.pop(0)
        if path and pairs_of(node) is not None:
            yield path, node
        if len(path) < deep:
            ahead += [((*path, name), child) for name, child in named_children(node) if not isinstance(child, str)]
