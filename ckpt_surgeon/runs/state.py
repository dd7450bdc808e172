"""The state of an optimizer in a file: groups, ids, slots; and the entries of nodes."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace

from ..formats.pickle.graph import CallNode, DictNode, ListNode, Pair
from ..formats.pickle.values import Value
from ..formats.zip.whole import tensor_node
from ..tensors.records import Tensor
from .optimizers import Optimizer, kind_of

PACKED = {"float32": "<f", "float64": "<d", "int64": "<q", "int32": "<i"}  # struct's formats of small tensors
TreePath = tuple[str, ...]  # the names from the root of a file to something in it


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """One value that an optimizer keeps for a parameter: its node, and its record where it is a tensor."""

    node: Value
    tensor: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """A param group: the ids of its parameters in order, their names where it has them, and its options."""

    ids: tuple[Hashable, ...]
    names: tuple[str, ...] | None
    options: tuple[Pair, ...]


@dataclass(frozen=True, slots=True, eq=False)
class OptimizerState:
    """The ``state_dict()`` of one optimizer: ``path`` is where it lies, ``slots`` its state by id and slot."""

    path: TreePath
    groups: tuple[Group, ...]
    slots: Mapping[Hashable, Mapping[str, Slot]]
    beside: tuple[Pair, ...] = ()  # entries of its dict beside state and param_groups
    packed: Mapping[Hashable, Mapping[str, Slot]] | None = None  # the slots as they were cut out of one flat vector
    is_flat: bool = False  # whether its keys are joined by dots: state.<name>.<slot>, param_groups.<name>.<option>

    @property
    def ids(self) -> tuple[Hashable, ...]:
        """All ids, in the order of the groups."""
        return tuple(id_ for group in self.groups for id_ in group.ids)

    @property
    def kind(self) -> Optimizer | None:
        """Which optimizer it is, where that is known."""
        options = {str(key) for group in self.groups for key, _ in group.options}
        return kind_of(options, {name for slots in self.slots.values() for name in slots})

    @property
    def is_by_name(self) -> bool:
        """Whether its ids are the parameters' names."""
        return any(isinstance(id_, str) for id_ in self.ids)


def pairs_of(node: Value) -> list[Pair] | None:
    """The entries of a dict, an OrderedDict or another object with entries; None for anything else."""
    if isinstance(node, DictNode):
        return node.pairs
    if isinstance(node, CallNode) and any(code == b"u" for code, _ in node.after):
        return node.pairs
    if isinstance(node, CallNode) and node.name.endswith("OrderedDict"):
        return node.pairs
    return None


def entry(node: Value, name: str) -> Value:
    """One entry of a dict; None where it has none of that name."""
    return next((value for key, value in pairs_of(node) or () if key == name), None)


def attributes_of(node: Value) -> DictNode | None:
    """The attributes of an object that has some, as a Namespace or a dataclass has; None for anything else."""
    state = node.state if isinstance(node, CallNode) else None
    return state if isinstance(state, DictNode) else None


def named_children(node: Value) -> Iterator[tuple[str, Value]]:
    """The entries of a dict by key, the items of a list or tuple by number, the attributes of an object by name."""
    attributes = attributes_of(node)
    for key, value in (*(pairs_of(node) or ()), *(attributes.pairs if attributes is not None else ())):
        if isinstance(key, (str, int)):
            yield str(key), value
    if isinstance(node, (ListNode, tuple)):
        yield from (
            (str(index), value) for index, value in enumerate(node.items if isinstance(node, ListNode) else node)
        )


def slot_of(tensor: Tensor, like: Slot) -> Slot:
    """A slot with another tensor, on the device of the one that it takes the place of."""
    device = like.tensor.device if like.tensor is not None else "cpu"
    return Slot(tensor_node(tensor, like.node, device=device), tensor)


def with_groups(state: OptimizerState, groups: tuple[Group, ...]) -> OptimizerState:
    """The state with other groups."""
    return replace(state, groups=groups)
