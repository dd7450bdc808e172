"""The state of an optimizer in a file: groups, ids, slots; read from the graph and put back into it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace

from ..formats.pickle.graph import CallNode, DictNode, ListNode, Pair
from ..formats.pickle.values import Value
from ..formats.zip.whole import Whole, tensor_node
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


def optimizers_in(whole: Whole, root: Value) -> list[OptimizerState]:
    """Every optimizer's state in a file, in its order."""
    return [read_state(whole, path, node) for path, node in _found(root) if is_optimizer(node)]


def is_optimizer(node: Value) -> bool:
    """Whether a node is what an optimizer's ``state_dict()`` gives."""
    return pairs_of(entry(node, "state")) is not None and isinstance(entry(node, "param_groups"), ListNode)


def _found(root: Value) -> Iterator[tuple[TreePath, Value]]:
    """Every dict and list in a file with its path, each once; an optimizer is not entered."""
    seen: set[int] = set()
    ahead: list[tuple[TreePath, Value]] = [((), root)]
    while ahead:
        path, node = ahead.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield path, node
        if not is_optimizer(node):
            children = [((*path, name), child) for name, child in named_children(node)]
            ahead.extend(reversed([pair for pair in children if not isinstance(pair[1], (str, int, float))]))


def read_state(whole: Whole, path: TreePath, node: Value) -> OptimizerState:
    """The state of the optimizer that a node is."""
    groups = entry(node, "param_groups")
    assert isinstance(groups, ListNode)
    slots: dict[Hashable, dict[str, Slot]] = {}
    for key, kept in pairs_of(entry(node, "state")) or ():
        if isinstance(key, (int, str)):
            slots[key] = {str(name): Slot(value, whole.tensor(value)) for name, value in pairs_of(kept) or ()}
    beside = tuple(pair for pair in pairs_of(node) or () if pair[0] not in ("state", "param_groups"))
    return OptimizerState(path, tuple(map(_group, groups.items)), slots, beside)


def _group(node: Value) -> Group:
    params, names = entry(node, "params"), entry(node, "param_names")
    ids = tuple(id_ for id_ in params.items if isinstance(id_, (int, str))) if isinstance(params, ListNode) else ()
    options = tuple(pair for pair in pairs_of(node) or () if pair[0] not in ("params", "param_names"))
    if not isinstance(names, ListNode):
        return Group(ids, None, options)
    return Group(ids, tuple(str(name) for name in names.items), options)


def written_state(state: OptimizerState) -> DictNode:
    """The node of an optimizer's state, as its ``state_dict()`` has it."""
    kept: list[Pair] = [(id_, _slots_node(state.slots[id_])) for id_ in state.slots]
    groups: list[Value] = [_group_node(group) for group in state.groups]
    return DictNode([("state", DictNode(kept)), ("param_groups", ListNode(groups)), *state.beside])


def _slots_node(slots: Mapping[str, Slot]) -> DictNode:
    return DictNode([(name, slot.node) for name, slot in slots.items()])


def _group_node(group: Group) -> DictNode:
    pairs: list[Pair] = [*group.options, ("params", ListNode(list(group.ids)))]
    if group.names is not None:
        pairs.append(("param_names", ListNode(list(group.names))))
    return DictNode(pairs)


def slot_of(tensor: Tensor, like: Slot) -> Slot:
    """A slot with another tensor, on the device of the one that it takes the place of."""
    device = like.tensor.device if like.tensor is not None else "cpu"
    return Slot(tensor_node(tensor, like.node, device=device), tensor)


def with_groups(state: OptimizerState, groups: tuple[Group, ...]) -> OptimizerState:
    """The state with other groups."""
    return replace(state, groups=groups)
