"""Nodes of a file's graph as a run writes them: dicts, lists and state_dicts with other entries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from ..errors import EditError
from ..formats.pickle.graph import CallNode, DictNode, ListNode, Pair
from ..formats.pickle.values import Value
from ..formats.zip.whole import ordered, plain_node, tensor_node
from ..tensors.checkpoint import Checkpoint
from .state import OptimizerState, TreePath, attributes_of, entry, named_children, pairs_of


def weights_node(
    old: Value, tensors: Checkpoint, nodes: Mapping[int, Value], prefix: str = "", beside: Iterable[Pair] = ()
) -> Value:
    """A state_dict: the very nodes of tensors that an edit kept, fresh ones for those that it made."""
    if not prefix and _is_untouched(old, tensors, nodes):
        return old
    like = next(iter(nodes.values()), None)
    device = next((tensor.device for tensor in tensors.values()), "cpu")
    made: list[Pair] = [
        (prefix + key, nodes[id(tensor)] if id(tensor) in nodes else tensor_node(tensor, like, device=device))
        for key, tensor in tensors.items()
    ]
    pairs = made + list(beside) if prefix else _among_others(old, made, nodes)
    if isinstance(old, DictNode):
        return DictNode(pairs)
    attributes: list[Pair] | None = None
    if tensors.versions is not None:
        inner: list[Pair] = [(prefix + name, plain_node(dict(version))) for name, version in tensors.versions.items()]
        attributes = [("_metadata", ordered(inner))]
    return ordered(pairs, attributes)


def _among_others(old: Value, made: list[Pair], nodes: Mapping[int, Value]) -> list[Pair]:
    """New entries where the old weights were, among the other entries of their dict, which stay."""
    weights = {id(node) for node in nodes.values()}
    pairs: list[Pair] = []
    is_done = False
    for pair in pairs_of(old) or ():
        if id(pair[1]) not in weights:
            pairs.append(pair)
        elif not is_done:
            pairs += made
            is_done = True
    names = {key for key, _ in made}
    if clash := [str(key) for key, value in pairs_of(old) or () if key in names and id(value) not in weights]:
        raise EditError([f"{clash[0]!r} lies beside the weights and would be taken by one of them"])
    return pairs if is_done else pairs + made


def _is_untouched(old: Value, tensors: Checkpoint, nodes: Mapping[int, Value]) -> bool:
    weights = {id(node) for node in nodes.values()}
    pairs = [pair for pair in pairs_of(old) or () if id(pair[1]) in weights]
    same = [(key, nodes.get(id(tensor))) for key, tensor in tensors.items()]
    return len(pairs) == len(same) and all(
        key == name and value is node for (key, value), (name, node) in zip(pairs, same, strict=True)
    )


def differs(state: OptimizerState, original: OptimizerState) -> bool:
    """Whether an optimizer's state has to be written anew."""
    if state.packed is not None:
        return state.slots is not state.packed
    if state.is_flat != original.is_flat:
        return True
    return state.groups != original.groups or state.slots.keys() != original.slots.keys() or any(
        slot.node is not original.slots[id_][name].node
        for id_, slots in state.slots.items()
        for name, slot in slots.items()
        if name in original.slots[id_]
    )  # fmt: skip


def followed(root: Value, path: TreePath) -> Value:
    """The node at a path of names."""
    node = root
    for name in path:
        node = next((child for key, child in named_children(node) if key == name), None)
    return node


def without_entry(node: Value, name: str) -> Value:
    """A copy of a dict or list without one entry."""
    if isinstance(node, DictNode):
        return DictNode([pair for pair in node.pairs if str(pair[0]) != name])
    if isinstance(node, ListNode):
        return ListNode([item for index, item in enumerate(node.items) if str(index) != name])
    if isinstance(node, CallNode):
        return _with_pairs(node, [pair for pair in node.pairs if str(pair[0]) != name])
    raise EditError([f"nothing can be left out of a {type(node).__name__}"])


def without_items(node: Value, positions: tuple[int, ...]) -> Value:
    """A scheduler without the entries of some groups in its lists (base_lrs, _last_lr …)."""
    rates = entry(node, "base_lrs")
    count = len(rates.items) if isinstance(rates, ListNode) else 0
    pairs: list[Pair] = []
    for key, value in pairs_of(node) or ():
        if isinstance(value, ListNode) and len(value.items) == count:
            value = ListNode([item for position, item in enumerate(value.items) if position not in positions])
        pairs.append((key, value))
    return DictNode(pairs) if isinstance(node, DictNode) else _with_pairs(node, pairs)  # type: ignore[arg-type]


def with_value(node: Value, name: str, value: Value) -> Value:
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
                (code, [with_value(attributes, name, value)] if code == b"b" else ops) for code, ops in made.after
            ]
        return made
    raise EditError([f"nothing can be set in a {type(node).__name__}"])


def _with_pairs(node: CallNode, pairs: list[Pair]) -> CallNode:
    """A copy of an object with other entries, in place of those that it had."""
    others = [step for step in node.after if step[0] != b"u"]
    after = [(b"u", [value for pair in pairs for value in pair]), *others] if pairs else others
    return replace(node, after=after)


def dicts_in(root: Value, deep: int = 4) -> Iterable[tuple[TreePath, Value]]:
    """The dicts of a file that twins may be, with their paths."""
    ahead: list[tuple[TreePath, Value]] = [((), root)]
    while ahead:
        path, node = ahead.pop(0)
        if path and pairs_of(node) is not None:
            yield path, node
        if len(path) < deep:
            ahead += [((*path, name), child) for name, child in named_children(node) if not isinstance(child, str)]
