"""A training checkpoint as a whole: its weights, and everything beside them that is kept when it is written.

    file ── open_run ──▶ Run ── edited ──▶ Run ── save ──▶ file

The weights are a :class:`~ckpt_surgeon.tensors.checkpoint.Checkpoint`, edited as any other.  What lies beside them
stays as it is, object for object; where an edit of the weights reaches into it (optimizers, twins with the same keys),
it follows or the edit is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from ..edits.change import Change, Edit
from ..errors import EditError, NothingMatched
from ..files.paths import AnyPath
from ..files.sinks import Progress
from ..formats.pickle.graph import ListNode, Pair
from ..formats.pickle.values import Value
from ..formats.zip.whole import Whole
from ..tensors.checkpoint import Checkpoint
from ..text import Shown
from ..writing.plan import Plan
from .follow import SAME_RUN, Planner, follow_all, notes_of, planned_and_replayed, weakest
from .naming import Names, names_of
from .nodes import dicts_in, differs, followed, weights_node, with_value, without_entry, without_items
from .optimizer_nodes import optimizers_in, written_state
from .packed import packed_again
from .saving import save_whole
from .state import OptimizerState, TreePath, entry, named_children, pairs_of


@dataclass(frozen=True, slots=True, eq=False)
class Twin:
    """A state_dict beside the weights with the same keys (EMA, SWA, a teacher), and the nodes of its tensors.

    Its keys may carry a ``prefix`` of their own, and entries that are ``beside`` them, as those of AveragedModel and of
    mmengine's EMAHook do (``module.``, and ``n_averaged`` or ``steps``).
    """

    path: TreePath
    tensors: Checkpoint
    nodes: Mapping[int, Value]
    prefix: str = ""
    beside: tuple[Pair, ...] = ()


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Run(Shown):
    """An opened training checkpoint; edits return another one, nothing is written before :func:`save_run`.

    ``optimizers`` are those that the file holds, ``twins`` the state_dicts that get the same edits; ``proof`` is the
    weakest class of proof among the edits so far, and ``notes`` are those of the edits.
    """

    whole: Whole
    weights: Checkpoint
    path: TreePath
    nodes: Mapping[int, Value]
    optimizers: tuple[OptimizerState, ...]
    twins: tuple[Twin, ...] = ()
    stated: tuple[str, ...] = ()
    in_model_order: bool = False
    proof: str = SAME_RUN
    notes: tuple[str, ...] = ()
    without: tuple[TreePath, ...] = ()
    values: Mapping[TreePath, Value] = field(default_factory=dict)
    schedulers: Mapping[TreePath, tuple[int, ...]] = field(default_factory=dict)  # positions in their lists that go
    unwritable: str = ""  # why the weights can only be kept as they are

    def names(self, state: OptimizerState) -> Names | None:
        """The parameters behind an optimizer's ids, and how they are known."""
        return names_of(state, self.weights, stated=self.stated, in_model_order=self.in_model_order)

    def edited(
        self, plan: Planner, *, computes: bool = False, replay: Planner | None = None, reset: Iterable[str] = (),
        moments: str = "zero",
    ) -> tuple[Run, Change[Checkpoint]]:  # fmt: skip
        """The run after an edit of its weights, and the change; optimizers and twins follow.

        ``plan`` is the edit; ``replay`` is what it does to moments in place of weights (``plan`` itself by default);
        ``computes`` says that it makes new values, so that state must be reset by name; ``moments`` is what new
        elements get in the replay.  Raises EditError.
        """
        change = plan(self.weights)
        own = change.of_first(self.weights)
        if self.unwritable and not _is_identity(own):
            raise EditError([f"{self.whole.path}: {self.unwritable}, so they can be kept whole but not edited"])
        states = [(state, self.names(state)) for state in self.optimizers]
        done = follow_all(states, own, replay or plan, computes=computes, reset=reset)
        notes = [*self.notes, *notes_of(done, moments)]
        schedulers = dict(self.schedulers)
        for state, after in zip(self.optimizers, done, strict=True):
            if after.emptied:
                gone = self._schedulers_of(state)
                schedulers |= {path: (*schedulers.get(path, ()), *after.emptied) for path in gone}
                notes.append(f"groups {', '.join(map(str, after.emptied))} are empty and go, with their base_lrs")
        twins = self.twins
        if computes and change.inputs:
            notes += [
                f"{'.'.join(twin.path)} has the same keys and was not edited: no other input is its twin"
                for twin in twins
            ]
        else:
            twins = tuple(self._twin(twin, plan, notes) for twin in twins)
        made = replace(
            self, weights=change.result, optimizers=tuple(after.state for after in done), twins=twins,
            notes=tuple(dict.fromkeys(notes)), schedulers=schedulers,
            proof=weakest([self.proof, *(after.proof for after in done)]),
        )  # fmt: skip
        return made, change

    def edited_by(self, edit: Edit[...], args: tuple[object, ...], kwargs: Mapping[str, object]) -> Run:
        """The run after an edit that is called on it: ``ckpt_surgeon.strip_prefix(run)``."""
        plan, replay = planned_and_replayed(edit, args, kwargs)
        return self.edited(plan, computes=edit.declaration.computes, replay=replay)[0]

    def save_to(self, out: AnyPath, *, force: bool = False, progress: Progress | None = None) -> Plan:
        """Write the run to one file of torch.save: see :func:`ckpt_surgeon.save`."""
        return save_whole(self, out, force=force, progress=progress)

    def _schedulers_of(self, state: OptimizerState) -> list[TreePath]:
        """The schedulers whose lists have an entry for each group of an optimizer."""
        count = len(state.groups)
        return [
            path for path, node in dicts_in(self.whole.root)
            if isinstance(rates := entry(node, "base_lrs"), ListNode) and len(rates.items) == count
        ]  # fmt: skip

    def _twin(self, twin: Twin, plan: Planner, notes: list[str]) -> Twin:
        """A twin after the same edit; one that cannot take it is named and stays as it is."""
        try:
            return replace(twin, tensors=plan(twin.tensors).result)
        except EditError as error:
            notes.append(f"{'.'.join(twin.path)} has the same keys and was not edited: {error}")
            return twin

    def left_out(self, patterns: Iterable[str]) -> Run:
        """The run without the entries that the dotted globs name.  Raises NothingMatched."""
        from fnmatch import fnmatchcase

        gone: list[TreePath] = []
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

    def entries(self) -> list[tuple[TreePath, Value]]:
        """The entries beside the weights, two levels deep, with their paths."""
        found: list[tuple[TreePath, Value]] = []
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
            made[id(old)] = weights_node(old, self.weights, self.nodes)
        for twin in self.twins:
            old = followed(self.whole.root, twin.path)
            made[id(old)] = weights_node(old, twin.tensors, twin.nodes, twin.prefix, twin.beside)
        for state, original in zip(self.optimizers, self._originals(), strict=True):
            if differs(state, original):
                made[id(followed(self.whole.root, state.path))] = written_state(self._repacked(state))
        for path, positions in self.schedulers.items():
            node = followed(self.whole.root, path)
            made[id(node)] = without_items(node, positions)
        for path in self.without:
            parent = followed(self.whole.root, path[:-1])
            made[id(parent)] = without_entry(made.get(id(parent), parent), path[-1])
        for path, value in self.values.items():
            parent = followed(self.whole.root, path[:-1])
            made[id(parent)] = with_value(made.get(id(parent), parent), path[-1], value)
        return made

    def _repacked(self, state: OptimizerState) -> OptimizerState:
        """A state that was cut out of one flat vector as that vector; any other as it is."""
        names = self.names(state) if state.packed is not None else None
        if names is None:
            return state
        return packed_again(state, {id_: tuple(self.weights[key].shape) for id_, key in names.keys.items()})

    def _originals(self) -> list[OptimizerState]:
        found = {state.path: state for state in optimizers_in(self.whole, self.whole.root)}
        return [found[state.path] for state in self.optimizers]


def _is_identity(change: Change[Checkpoint]) -> bool:
    """Whether a change leaves every tensor under its key."""
    return list(change.result) == list(change.before) and all(
        tensor is change.before[key] for key, tensor in change.result.items()
    )


def _is_below(path: TreePath, above: Iterable[TreePath]) -> bool:
    return any(path[: len(parent)] == parent for parent in above)
