"""Optimizers' states read from a file's graph, and put back into it; nested, or with keys joined by dots.

``torch.optim`` has ``state`` by id and ``param_groups``.  Joined by dots, as ``get_optimizer_state_dict`` writes it
with ``flatten_optimizer_state_dict`` (FSDP2, torchtitan), every parameter carries the options of its group:
``state.<name>.<slot>`` and ``param_groups.<name>.<option>``.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping

from ..errors import EditError
from ..formats.pickle import graph_writer
from ..formats.pickle.graph import DictNode, ListNode, Pair
from ..formats.pickle.values import Value
from ..formats.zip.whole import Whole
from .state import Group, OptimizerState, Slot, TreePath, entry, named_children, pairs_of

STATE, GROUPS = "state.", "param_groups."


def optimizers_in(whole: Whole, root: Value) -> list[OptimizerState]:
    """Every optimizer's state in a file, in its order."""
    return [read_state(whole, path, node) for path, node in _found(root) if is_optimizer(node)]


def is_optimizer(node: Value) -> bool:
    """Whether a node is what an optimizer's ``state_dict()`` gives, or that with keys joined by dots."""
    if pairs_of(entry(node, "state")) is not None and isinstance(entry(node, "param_groups"), ListNode):
        return True
    return is_flat(node)


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
    if is_flat(node):
        return _flat_state(whole, path, node)
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
    if state.is_flat:
        return _written_flat(state)
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


# -- keys joined by dots


def is_flat(node: Value) -> bool:
    """Whether a node is an optimizer's state whose keys are joined by dots."""
    names = [key for key, _ in pairs_of(node) or ()]
    return (
        bool(names)
        and all(isinstance(name, str) and name.startswith((STATE, GROUPS)) for name in names)
        and str(names[-1]).startswith(GROUPS)
    )


def _flat_state(whole: Whole, path: TreePath, node: Value) -> OptimizerState:
    """The state of an optimizer whose keys are joined by dots; parameters of equal options are one group.

    Raises EditError where a key names a parameter that has no options.
    """
    options: dict[str, list[Pair]] = {}
    slots: dict[Hashable, dict[str, Slot]] = {}
    for key, value in pairs_of(node) or ():
        name = str(key)
        if name.startswith(GROUPS):
            parameter, _, option = name.removeprefix(GROUPS).rpartition(".")
            options.setdefault(parameter, []).append((option, value))
    for key, value in pairs_of(node) or ():
        name = str(key)
        if name.startswith(STATE):
            parameter, slot = _parted(name.removeprefix(STATE), options, path)
            slots.setdefault(parameter, {})[slot] = Slot(value, whole.tensor(value))
    groups: dict[Hashable, list[str]] = {}
    for parameter, pairs in options.items():
        groups.setdefault(_signature(whole, pairs), []).append(parameter)
    made = tuple(Group(tuple(members), None, tuple(options[members[0]])) for members in groups.values())
    return OptimizerState(path, made, slots, is_flat=True)


def _parted(name: str, parameters: Mapping[str, object], path: TreePath) -> tuple[str, str]:
    """A key as parameter and slot: both may hold dots, so that the parameters that have options decide."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if (parameter := ".".join(parts[:end])) in parameters:
            return parameter, ".".join(parts[end:])
    where = ".".join(path)
    raise EditError([f"{where}: {STATE}{name} belongs to no parameter that has options in it"])


def _signature(whole: Whole, pairs: list[Pair]) -> Hashable:
    """What tells the options of one group from those of another: names and values."""
    found: list[tuple[Value, bytes]] = []
    for name, value in pairs:
        tensor = whole.tensor(value)
        found.append((name, graph_writer.written(value) if tensor is None else b"".join(map(bytes, tensor.blocks()))))
    return tuple(found)


def _written_flat(state: OptimizerState) -> DictNode:
    pairs: list[Pair] = [
        (f"{STATE}{id_}.{name}", slot.node) for id_, slots in state.slots.items() for name, slot in slots.items()
    ]
    pairs += [
        (f"{GROUPS}{id_}.{option}", value)
        for group in state.groups
        for id_ in group.ids
        for option, value in group.options
    ]
    return DictNode(pairs)
