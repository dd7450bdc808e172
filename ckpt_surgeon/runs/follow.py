"""An optimizer's state after its parameters were edited: ids, names, groups and slots follow.

Three classes of proof, and what becomes of the state in each:

* *same run*: keys, order or groups changed; training goes on bit for bit as it would have;
* *kept part*: parameters were added, dropped, cut or grown; what is kept trains on as it would have, given the same
  gradients; a new parameter has no entry, and a parameter whose update needs it whole (Adafactor, Muon) starts afresh;
* *no proof*: values were computed; the state of those parameters has to be given up by name.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod

from ..edits.change import Change, Edit, matching
from ..edits.keys import without_wrappers
from ..errors import EditError, listed
from ..tensors.checkpoint import Checkpoint
from ..tensors.dtypes import DType, parse
from ..tensors.records import Tensor
from ..tensors.storage import Storage
from ..tensors.stored import StoredTensor
from .naming import Names, is_buffer
from .state import Group, OptimizerState, Slot, slot_of

SAME_RUN = "same run"
KEPT_PART = "kept part"
NO_PROOF = "no proof"
ADAMS = ("Adam", "NAdam")  # their first update on zero moments beside an old step is up to 3.16 times the rate

Planner = Callable[[Checkpoint], Change[Checkpoint]]
Replay = Callable[[Checkpoint], Checkpoint]  # what the edit makes of other tensors with the same keys and shapes


@dataclass(frozen=True, slots=True)
class Followed:
    """An optimizer's state after an edit, the class of proof, and what is worth saying."""

    state: OptimizerState
    proof: str
    notes: tuple[str, ...] = ()
    grown: tuple[str, ...] = ()  # parameters with new elements whose moments are new beside an old step
    emptied: tuple[int, ...] = ()  # the positions of groups that lost all their parameters, and are gone


def follow(
    state: OptimizerState, names: Names | None, change: Change[Checkpoint], replay: Replay | None,
    *, computes: bool = False, reset: Iterable[str] = (),
) -> Followed:  # fmt: skip
    """What becomes of an optimizer's state when the weights change.

    ``replay`` carries the edit out on moments in place of weights, None where that means nothing; ``computes`` says
    that the edit makes new values, so that only parameters that ``reset`` names may be touched by it.  Raises
    EditError where ids have no certain names, or values would change under state that is kept.
    """
    work = _Work(state, names, change, replay)
    if work.is_in_place and not computes:
        return Followed(state, SAME_RUN)
    work.check_names()
    forgotten = matching(change.result, list(reset), allow_unmatched=True) if reset else set()
    if computes:
        work.refuse_values(forgotten)
    done = work.followed(forgotten)
    return replace(done, proof=NO_PROOF) if computes else done


def follow_all(
    states: Iterable[tuple[OptimizerState, Names | None]], change: Change[Checkpoint], again: Planner,
    *, computes: bool = False, reset: Iterable[str] = (),
) -> list[Followed]:  # fmt: skip
    """What becomes of several optimizers: see :func:`follow`; ``again`` is the edit as it is done to moments."""
    patterns = list(reset)
    return [
        follow(state, names, change, lambda tensors: again(tensors).result, computes=computes, reset=patterns)
        for state, names in states
    ]


def notes_of(done: Iterable[Followed], moments: str) -> list[str]:
    """What is worth saying of optimizers that followed; ``moments`` is what new elements got."""
    notes: list[str] = []
    for followed in done:
        notes += followed.notes
        if followed.grown and moments == "zero":
            text = "new elements have zero moments beside an old step: Adam's first update on them is up to 3.16 × lr"
            notes.append(f"{listed(followed.grown)}: {text}; moments of the others' mean avoid that")
    return list(dict.fromkeys(notes))


def planned_and_replayed(
    edit: Edit[...], args: tuple[object, ...], kwargs: Mapping[str, object]
) -> tuple[Planner, Planner]:
    """An edit that is called on a run, as it is done to the weights and to moments: new elements get zeros there."""
    fills = edit.declaration.fills
    moments = {**kwargs, **({fills: 0.0 if fills == "value" else "zero"} if fills else {})}
    return lambda tensors: edit.plan(tensors, *args, **kwargs), lambda tensors: edit.plan(tensors, *args, **moments)


def weakest(proofs: Iterable[str]) -> str:
    """The weakest of some classes of proof.

    >>> weakest([KEPT_PART, SAME_RUN])
    'kept part'
    """
    return max(proofs, key=(SAME_RUN, KEPT_PART, NO_PROOF).index)


class _Work:
    """One edit and one optimizer."""

    def __init__(
        self, state: OptimizerState, names: Names | None, change: Change[Checkpoint], replay: Replay | None
    ) -> None:
        self.state, self.change, self.replay = state, change, replay
        self.names = names
        self.kind = state.kind
        self.ids = {key: id_ for id_, key in names.keys.items()} if names is not None else {}
        self.replayed: dict[str, Checkpoint] = {}
        self.notes: list[str] = []
        self.grown: list[str] = []

    # -- what the edit does to the parameters

    def same(self, new: str) -> bool:
        """Whether a new key is an old tensor under another name."""
        olds = self.change.origins[new]
        return len(olds) == 1 and self.change.result[new] is self.change.before[olds[0]]

    @property
    def is_in_place(self) -> bool:
        """Whether positions stay as they are, and nothing carries names: all keys kept, each once, in their order."""
        if self.names is not None and self.names.how.startswith(("the names", "its ids")):
            return False
        before = [key for key in self.change.before if not is_buffer(key)]
        after = [new for new in self.change.result if not is_buffer(new)]
        return all(map(self.same, after)) and [self.change.origins[new][0] for new in after] == before

    def touched(self) -> set[str]:
        """The old keys that are not simply kept under some name."""
        kept = {self.change.origins[new][0] for new in self.change.result if self.same(new)}
        return {key for key in self.change.before if key not in kept and not is_buffer(key)}

    # -- refusals

    def check_names(self) -> None:
        """Raise EditError unless the ids of all touched parameters are certain."""
        way = "give a factory that builds model and optimizer, state the order, or leave the optimizer out"
        if self.names is None:
            where = ".".join(self.state.path)
            raise EditError([f"{where}: nothing tells which parameter is behind each of its ids"], remedy=way)
        touched = self.touched()
        shapes = {tuple(self.change.before[key].shape) for key in touched if key in self.change.before}
        doubted = {self.names.keys[id_] for id_ in self.names.doubtful}
        kept = {tuple(self.change.before[key].shape) for key in doubted - touched}
        mixed = [key for key in doubted if tuple(self.change.before[key].shape) in shapes & kept]
        if mixed:
            problem = f"{listed(sorted(mixed))} have the same shape, so their ids are told by order alone"
            raise EditError([problem], remedy=way)

    def refuse_values(self, forgotten: set[str]) -> None:
        """Raise EditError for parameters whose values changed while their state would stay."""
        kept = [
            new for new in self.change.result
            if not self.same(new) and new not in forgotten and any(old in self.ids for old in self.change.origins[new])
        ]  # fmt: skip
        if kept:
            problem = f"{listed(kept)}: their values change, and no state fits the new ones"
            raise EditError([problem], remedy="reset their state by a pattern, or leave the optimizer out")

    # -- the new state

    def followed(self, forgotten: set[str]) -> Followed:
        """The state that belongs to the result."""
        fresh_id = _fresh_ids(self.state.ids)
        slots: dict[Hashable, Mapping[str, Slot]] = {}
        new_ids: dict[str, Hashable] = {}
        used: set[Hashable] = set()
        proof = SAME_RUN
        for new in self.change.result:
            if not self.change.origins[new] and not is_buffer(new):
                new_ids[new] = new if self.state.is_by_name else fresh_id()
                self.notes.append(f"{new!r} is new and starts without state")
                proof = KEPT_PART
            olds = [old for old in self.change.origins[new] if old in self.ids]
            if not olds:
                continue
            was = self.ids[olds[0]]
            id_: Hashable = new if self.state.is_by_name else was if was not in used else fresh_id()
            used.add(was)
            new_ids[new] = id_
            if self.same(new) and new not in forgotten:
                if was in self.state.slots:
                    slots[id_] = self.state.slots[was]
                continue
            proof = KEPT_PART
            made = None if new in forgotten else self._slots(new, olds)
            if made is not None:
                slots[id_] = made
            elif was in self.state.slots:
                self.notes.append(f"{new!r} starts with fresh optimizer state")
        gone = [key for key in self.ids if key not in {old for new in new_ids for old in self.change.origins[new]}]
        if gone:
            proof = KEPT_PART
            self.notes.append(f"{listed(gone)}: their optimizer state goes with them")
        groups = [self._group(group, new_ids) for group in self.state.groups]
        slots = self._in_file_order(slots, new_ids)
        if self.kind is not None and self.kind.joint and slots and not self._keeps_order(groups, new_ids, proof):
            slots, proof = {}, KEPT_PART
            self.notes.append(f"{self.kind.name} keeps one state of all parameters together: it starts afresh")
        pairs = enumerate(zip(self.state.groups, groups, strict=True))
        emptied = tuple(position for position, (old, new_group) in pairs if old.ids and not new_group.ids)
        kept = tuple(group for position, group in enumerate(groups) if position not in emptied)
        return Followed(
            replace(self.state, groups=kept, slots=slots), proof, tuple(self.notes), tuple(self.grown), emptied
        )

    def _keeps_order(self, groups: Iterable[Group], new_ids: Mapping[str, Hashable], proof: str) -> bool:
        """Whether all parameters stay as they are, and in their order."""
        origin = {id_: self.ids.get((self.change.origins[new] or ("",))[0]) for new, id_ in new_ids.items()}
        return proof == SAME_RUN and [origin.get(id_) for group in groups for id_ in group.ids] == [*self.state.ids]

    def _in_file_order(
        self, slots: Mapping[Hashable, Mapping[str, Slot]], new_ids: Mapping[str, Hashable]
    ) -> dict[Hashable, Mapping[str, Slot]]:
        """Slots in the order that those of the file have."""
        order = {id_: position for position, id_ in enumerate(self.state.slots)}
        origin = {id_: self.ids.get((self.change.origins[new] or ("",))[0]) for new, id_ in new_ids.items()}
        return dict(sorted(slots.items(), key=lambda pair: order.get(origin[pair[0]], len(order))))

    def _group(self, group: Group, new_ids: Mapping[str, Hashable]) -> Group:
        """A group with the new ids of its parameters, in the order that it had (or that the result has)."""
        members = {self.names.keys[id_]: position for position, id_ in enumerate(group.ids)} if self.names else {}
        keys = [new for new in new_ids if self._home(new, members, group)]
        order = list(self.change.before)
        positions = [order.index(key) for key in members if key in self.change.before]
        if positions != sorted(positions):
            keys.sort(
                key=lambda new: members[self.change.origins[new][0]] if self.change.origins[new] else len(members)
            )
        names = None if group.names is None else tuple(self._name(new, group, members) for new in keys)
        return Group(tuple(new_ids[new] for new in keys), names, group.options)

    def _home(self, new: str, members: Mapping[str, int], group: Group) -> bool:
        """Whether a parameter belongs to a group: with what it was made of, or, where it is new, with its like."""
        olds = self.change.origins[new]
        if olds:
            return olds[0] in members
        if len(self.state.groups) == 1:
            return True
        assert self.names is not None
        like = [
            position
            for position, other in enumerate(self.state.groups)
            if any(self._is_like(self.names.keys[id_], new) for id_ in other.ids)
        ]
        if len(like) != 1:
            problem = f"{new!r} is new, and which of {len(self.state.groups)} param groups it belongs to is open"
            raise EditError([problem], remedy="leave the optimizer out")
        return self.state.groups[like[0]] is group

    def _is_like(self, old: str, new: str) -> bool:
        dims = len(self.change.before[old].shape) if old in self.change.before else -1
        return old.rpartition(".")[2] == new.rpartition(".")[2] and dims == len(self.change.result[new].shape)

    def _name(self, new: str, group: Group, members: Mapping[str, int]) -> str:
        """The name of a parameter in its group: with wrappers where it had them and the key still has."""
        if not self.change.origins[new]:
            return new
        old = self.change.origins[new][0]
        listed_name = (group.names or ())[members[old]]
        return listed_name if listed_name != old and without_wrappers(listed_name) == without_wrappers(new) else new

    def _slots(self, new: str, olds: list[str]) -> dict[str, Slot] | None:
        """The slots of a parameter that was cut, grown, turned or joined; None where it starts afresh."""
        if self.kind is None or not self.kind.elementwise or self.replay is None:
            return None
        if len(olds) != len(self.change.origins[new]):
            return None
        kept = [self.state.slots.get(self.ids[old], {}) for old in olds]
        if any(set(slots) != set(kept[0]) for slots in kept) or not kept[0]:
            return None
        made: dict[str, Slot] = {}
        for name, slot in kept[0].items():
            if name in self.kind.shaped and slot.tensor is not None:
                made[name] = slot_of(self._replayed(name)[new], slot)
            elif all(_same_value(slot, slots[name]) for slots in kept):
                made[name] = slot
            else:
                return None
        size = sum(self.change.before[old].numel for old in olds)
        if self.kind.name in ADAMS and self.change.result[new].numel > size:
            self.grown.append(new)
        return made

    def _replayed(self, name: str) -> Checkpoint:
        """The edit carried out on one slot of all parameters; zeros stand where there is none."""
        if name not in self.replayed:
            slots = {key: self.state.slots.get(id_, {}).get(name) for key, id_ in self.ids.items()}
            real = {key: slot.tensor for key, slot in slots.items() if slot is not None and slot.tensor is not None}
            dtype = next((tensor.dtype for tensor in real.values()), parse("float32"))
            tensors: dict[str, Tensor] = {
                key: real[key] if key in real and real[key].shape == tensor.shape else zeros(dtype, tensor.shape)
                for key, tensor in self.change.before.items()
            }
            assert self.replay is not None
            self.replayed[name] = self.replay(Checkpoint(tensors))
        return self.replayed[name]


def _same_value(one: Slot, other: Slot) -> bool:
    """Whether two small slots (``step``) hold the same."""
    if one.tensor is None or other.tensor is None:
        return one.tensor is other.tensor and one.node == other.node
    return one is other or b"".join(one.tensor.blocks()) == b"".join(other.tensor.blocks())


def zeros(dtype: DType, shape: tuple[int, ...]) -> StoredTensor:
    """A tensor of zeros that takes no memory.

    >>> zeros(parse("float32"), (1000, 1000)).storage.nbytes
    4
    """
    nbytes = dtype.itemsize if prod(shape) else 0
    storage = Storage(None, nbytes, memory=memoryview(bytes(nbytes)))
    return StoredTensor(dtype, tuple(shape), (0,) * len(shape), 0, storage)


def _fresh_ids(ids: Iterable[Hashable]) -> Callable[[], int]:
    last = max((id_ for id_ in ids if isinstance(id_, int)), default=-1)

    def fresh() -> int:
        nonlocal last
        last += 1
        return last

    return fresh
