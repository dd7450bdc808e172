"""Modules that were saved whole: the state_dict that each would give, its ``_metadata``, and what of it is not known.

``state_dict()`` runs code of the module's class, and nothing of a file is run here.  Parameters, buffers and
sub-modules are in the object's attributes; the version of a class is in :mod:`.module_classes`, or not known; what a
quantised layer packs into a script object, and what a module makes by code of its own, cannot be had.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from ..errors import listed
from ..formats.pickle.values import Object, Value, spelled
from ..tensors.checkpoint import LeftOut
from ..tensors.records import Tensor
from .module_classes import has_own_state, is_known, version_of
from .tree import TENSORS, Bound, Weights, attribute, attribute_dicts, is_module

# How the name of a part begins: of a quantised model, and of any other module.
PACKED = "a quantised model of which torch keeps a part in objects of its own"
LACKING = "a module whose state_dict cannot be had whole"
SCRIPT_OBJECTS = frozenset({"torch.ScriptObject", "torch._C.ScriptObject"})
_SCRIPTED = "__torch__."
_SPECTRAL_NORM = "torch.nn.utils.spectral_norm.SpectralNormStateDictHook"
_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks")
_REGISTERED = frozenset({"_parameters", "_buffers", "_modules"})
_SHOWN = 3  # names in a note


@dataclass(slots=True)
class ModuleState:
    """What is known of the state_dict of a module, names and order as its own ``state_dict()`` gives them.

    ``versions`` is torch's ``_metadata``; ``lacking`` what the state_dict would have and cannot be had; ``unknown``
    the classes about which nothing is known; ``hooks`` the paths of modules with hooks that may change a state_dict.
    """

    tensors: list[tuple[str, Tensor]] = field(default_factory=list)
    versions: dict[str, dict[str, object]] = field(default_factory=dict)
    lacking: list[LeftOut] = field(default_factory=list)
    unknown: dict[str, None] = field(default_factory=dict)
    hooks: dict[str, None] = field(default_factory=dict)
    _weights: Weights = field(default_factory=Weights)

    def lack(self, path: str, node: Value) -> None:
        """Note what a state_dict has at ``path`` and cannot be had."""
        what = node.class_name if isinstance(node, Object) else type(node).__name__
        self.lacking.append(LeftOut(path, what, *self._weights.of(node)))

    def notes(self) -> Iterator[str]:
        """What cannot be known of the state_dict without running the module's own code."""
        if self.unknown:
            count = len(self.unknown)
            classes = "1 class" if count == 1 else f"{count:,} classes"
            yield (
                f"what only the code of {classes} says is not known ({listed(self.unknown, _SHOWN)}): the version in "
                "torch's _metadata, for which 1, torch's default, stands, and whether a state_dict has other keys"
            )
        if self.hooks:
            yield (f"state_dict hooks are not run, which may rename or add keys: those of {listed(self.hooks, _SHOWN)}")


def part_text(lacking: Iterable[LeftOut]) -> str:
    """What of a module there is, where its state_dict cannot be had whole; "" where it can."""
    names: dict[str, None] = {}
    begins = LACKING
    for one in lacking:
        names[f"{one.path or 'the module itself'} ({one.what.rpartition('.')[2]})"] = None
        is_script = one.what in SCRIPT_OBJECTS or one.what.startswith(_SCRIPTED)
        if is_script or has_own_state(one.what) or is_packed(one.path):
            begins = PACKED
    return f"{begins}: not had is {listed(names, _SHOWN)}" if names else ""


def module_state(node: Value, bound: Bound, prefix: str = "", *, into: ModuleState | None = None) -> ModuleState:
    """The state_dict of a whole module, with keys that begin with ``prefix``; added to ``into``, where it is given.

    Parameters, then persistent buffers, then sub-modules, as in ``torch.nn.Module.state_dict``; what is None is
    skipped.  A module within itself adds nothing.
    """
    state = into if into is not None else ModuleState()
    within: set[int] = set()
    ahead: list[tuple[str, Value, bool]] = [(prefix, node, True)]
    while ahead:
        prefix, node, enters = ahead.pop()
        if not enters:
            within.discard(id(node))
            continue
        if id(node) in within:
            continue
        within.add(id(node))
        ahead.append((prefix, node, False))
        if not is_module(node):
            state.lack(prefix.removesuffix("."), node)
            continue
        _add(state, node, prefix, bound)
        modules = attribute(node, "_modules")
        named = [(spelled(name), child) for name, child in modules.items()] if isinstance(modules, dict) else []
        bound.spend(len(named) + 1, sum(len(prefix) + len(name) for name, _ in named))
        ahead += [(f"{prefix}{name}.", child, True) for name, child in reversed(named) if child is not None]
    return state


def _add(state: ModuleState, node: Value, prefix: str, bound: Bound) -> None:
    """Add what one module says of itself, without its sub-modules."""
    path = prefix.removesuffix(".")
    for name, value in _registered(node):
        bound.spend(1, len(prefix) + len(name))
        if isinstance(value, TENSORS):
            state.tensors.append((prefix + name, value))
        else:
            state.lack(prefix + name, value)
    class_name = node.class_name if isinstance(node, Object) else ""
    own = attribute(node, "_version")
    if isinstance(own, (int, str)):
        state.versions[path] = {"version": own}
    else:
        state.versions[path] = {"version": version_of(class_name)}
    if not is_known(class_name):
        state.unknown[class_name] = None
    _note_hooks(state, node, path)
    packed = list(_packed(node, has_own_state(class_name)))
    for name, value in packed:
        state.lack(prefix + name, value)
    modules = attribute(node, "_modules")
    holds_packed = isinstance(modules, dict) and modules.get("_packed_params") is not None  # named for itself
    if has_own_state(class_name) and not packed and not holds_packed:
        state.lack(path, node)


def _registered(node: Value) -> Iterator[tuple[str, Value]]:
    """A module's own parameters and persistent buffers that are not None."""
    transient = attribute(node, "_non_persistent_buffers_set")
    skipped = transient if isinstance(transient, (set, frozenset)) else set()
    for group in ("_parameters", "_buffers"):
        entries = attribute(node, group)
        for name, value in entries.items() if isinstance(entries, dict) else ():
            if value is not None and not (group == "_buffers" and name in skipped):
                yield spelled(name), value


def _packed(node: Value, has_own: bool) -> Iterator[tuple[str, Value]]:
    """The script objects among a module's attributes; of a class with a state of its own, all that has tensors."""
    weights = Weights()
    for part in attribute_dicts(node) if isinstance(node, Object) else ():
        for name, value in part.items():
            if is_script_object(value) or (has_own and name not in _REGISTERED and weights.of(value)[0]):
                yield spelled(name), value


def is_packed_entry(name: str, value: Value) -> bool:
    """Whether an entry of a state_dict is a quantised layer's that is no tensor: a script object, a tuple of parts."""
    return is_script_object(value) or (is_packed(name) and value is not None)


def is_script_object(value: Value) -> bool:
    """Whether a value is an object of TorchScript's, in a pickle of torch.save or in an archive of torch.jit.save."""
    return isinstance(value, Object) and (value.class_name in SCRIPT_OBJECTS or value.class_name.startswith(_SCRIPTED))


def is_packed(name: str) -> bool:
    """Whether a key is that of a quantised layer's packed weights.

    >>> is_packed("fc._packed_params._packed_params"), is_packed("fc.weight")
    (True, False)
    """
    return "_packed_params" in name.split(".")


def _note_hooks(state: ModuleState, node: Value, path: str) -> None:
    """Note a module's state_dict hooks; what spectral_norm's hook adds to the ``_metadata`` is known."""
    for name in _HOOKS:
        hooks = attribute(node, name)
        for hook in hooks.values() if isinstance(hooks, dict) else ():
            if isinstance(hook, Object) and hook.class_name == _SPECTRAL_NORM:
                normed = attribute(attribute(hook, "fn"), "name")
                known = state.versions[path].setdefault("spectral_norm", {})
                if isinstance(normed, str) and isinstance(known, dict):
                    known[f"{normed}.version"] = 1
            else:
                state.hooks[path or "the module itself"] = None
