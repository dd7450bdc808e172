"""Choosing parameters of a model: by key, by class, by module, by role.  What chooses nothing is an error.

A selector is one of

* a key, or a glob on keys: ``"fc.*"``, ``"*.bias"``;
* ``"module:layer1"`` (everything below a path, which may be a glob), or the sub-module itself;
* ``"class:BatchNorm2d"`` (everything below each module of that class or of one that inherits from it; the name may
  be a glob), or the class itself;
* ``"role:bias"``, ``"role:norm"``, ``"role:head"``, ``"role:backbone"``.

torch is imported inside the functions.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, TypeAlias

from ..errors import EditError, NothingMatched, listed

if TYPE_CHECKING:
    import torch

Selector: TypeAlias = "str | torch.nn.Module | type[torch.nn.Module]"
Selectors: TypeAlias = "Selector | Iterable[Selector]"

ROLES = ("bias", "norm", "head", "backbone")
KINDS = ("class", "module", "role")


@dataclass(frozen=True, slots=True)
class Anatomy:
    """A model's parts by their names in its state_dict: every name of a tied parameter, and all buffers.

    >>> import torch
    >>> list(anatomy(torch.nn.DataParallel(torch.nn.Linear(1, 1))).parameters)  # wrappers are looked through
    ['weight', 'bias']
    """

    model: torch.nn.Module
    modules: Mapping[str, torch.nn.Module]
    parameters: Mapping[str, torch.nn.Parameter]
    buffers: Mapping[str, torch.Tensor]

    def owner(self, key: str) -> torch.nn.Module:
        """The module that a parameter or buffer belongs to."""
        return self.modules[key.rpartition(".")[0]]

    def names_of(self, parameter: torch.nn.Parameter) -> list[str]:
        """All names of a parameter; more than one where it is tied."""
        return [name for name, other in self.parameters.items() if other is parameter]


def anatomy(model: torch.nn.Module) -> Anatomy:
    """Look at a model's parts, inside DataParallel, DistributedDataParallel and torch.compile."""
    from ..models.modules import unwrapped

    inner = unwrapped(model)
    return Anatomy(
        inner,
        dict(inner.named_modules(remove_duplicate=False)),
        dict(inner.named_parameters(remove_duplicate=False)),
        dict(inner.named_buffers(remove_duplicate=False)),
    )


def chosen(parts: Anatomy, selectors: Selectors) -> set[str]:
    """The names of the parameters and buffers that any of the selectors chooses.

    Raises NothingMatched naming each selector that chooses nothing, and what would; EditError for one that cannot be
    read.

    >>> import torch
    >>> parts = anatomy(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)))
    >>> sorted(chosen(parts, ["role:bias", torch.nn.BatchNorm1d]))
    ['0.bias', '1.bias', '1.num_batches_tracked', '1.running_mean', '1.running_var', '1.weight']
    """
    found: set[str] = set()
    unmatched: dict[str, str] = {}
    for selector in each(selectors):
        names = _chosen_by_one(parts, selector)
        found.update(names)
        if not names:
            unmatched[spelled(selector)] = _hint(parts, selector)
    if unmatched:
        raise NothingMatched(list(unmatched), hints=unmatched)
    return found


def each(selectors: Selectors) -> list[Selector]:
    """One selector or several, as a list; a module is one, though some can be iterated over."""
    if isinstance(selectors, (str, type)) or hasattr(selectors, "named_parameters"):
        return [selectors]  # type: ignore[list-item]
    return list(selectors)


def spelled(selector: Selector) -> str:
    """A selector as a message names it."""
    if isinstance(selector, str):
        return selector
    return f"class:{selector.__name__}" if isinstance(selector, type) else f"a {type(selector).__name__}"


def _chosen_by_one(parts: Anatomy, selector: Selector) -> set[str]:
    if isinstance(selector, type):
        return _below(parts, lambda _, module: isinstance(module, selector))
    if not isinstance(selector, str):
        return _below(parts, lambda _, module: module is selector)
    if selector in parts.parameters or selector in parts.buffers:
        return {selector}
    kind, colon, name = selector.partition(":")
    if colon and kind not in KINDS:
        raise EditError([f"{selector!r} is no selector: before the colon stands one of {', '.join(KINDS)}"])
    if kind == "class" and colon:
        return _below(parts, lambda _, module: is_called(type(module), name))
    if kind == "module" and colon:
        return _below(parts, lambda path, _: fnmatchcase(path, name.rstrip(".")))
    if kind == "role" and colon:
        return _of_role(parts, name)
    return {key for key in (*parts.parameters, *parts.buffers) if fnmatchcase(key, selector)}


def is_called(cls: type, name: str) -> bool:
    """Whether a class, or one that it inherits from, has this name: ``Linear``, ``torch.nn.*.Linear``, a glob."""
    names = ((base.__name__, f"{base.__module__}.{base.__qualname__}") for base in cls.__mro__[:-1])
    return any(fnmatchcase(short, name) or fnmatchcase(full, name) for short, full in names if short != "Module")


def _below(parts: Anatomy, is_meant: Callable[[str, torch.nn.Module], bool]) -> set[str]:
    """Every parameter and buffer below the modules that are meant."""
    paths = {path for path, module in parts.modules.items() if is_meant(path, module)}
    if not paths:
        return set()
    return {key for key in (*parts.parameters, *parts.buffers) if any(path in paths for path in above(key))}


def above(key: str) -> Iterator[str]:
    """The paths of the modules that a key lies in, from its own to the root.

    >>> list(above("layer1.0.weight"))
    ['layer1.0', 'layer1', '']
    """
    while key:
        key = key.rpartition(".")[0]
        yield key


def _of_role(parts: Anatomy, role: str) -> set[str]:
    if role not in ROLES:
        raise EditError([f"'role:{role}' is no selector: the roles are {', '.join(ROLES)}"])
    if role == "bias":
        return {key for key in parts.parameters if key.endswith("bias")}
    if role == "norm":
        norms = {path for path, module in parts.modules.items() if is_norm(module)}
        return {key for key in (*parts.parameters, *parts.buffers) if key.rpartition(".")[0] in norms}
    head = _head(parts)
    in_head = {key for key in (*parts.parameters, *parts.buffers) if head in above(key)}
    return in_head if role == "head" else {*parts.parameters, *parts.buffers} - in_head


def is_norm(module: torch.nn.Module) -> bool:
    """Whether a module normalises: torch's own layers, and others that own parameters and are called so."""
    from torch import nn

    known = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)
    is_leaf = not any(True for _ in module.children())
    return isinstance(module, known) or (is_leaf and "norm" in type(module).__name__.lower())


def has_parameters(module: torch.nn.Module, *, own: bool = False) -> bool:
    """Whether a module has parameters: any below it, or of its ``own``."""
    return any(True for _ in module.parameters(recurse=not own))


def _head(parts: Anatomy) -> str:
    """The path of the classifier: what timm's ``get_classifier`` says, else the last layer with a matrix of weights."""
    named = getattr(parts.model, "get_classifier", None)
    if callable(named):
        classifier = named()
        paths = [path for path, module in parts.modules.items() if module is classifier and has_parameters(module)]
        if paths:
            return paths[0]
    own = [(path, list(module.parameters(recurse=False))) for path, module in parts.modules.items()]
    layers = [path for path, parameters in own if any(parameter.dim() > 1 for parameter in parameters)]
    if not layers:
        raise EditError([f"{type(parts.model).__name__} has no layer that could be its head; choose by key"])
    return layers[-1]


def _hint(parts: Anatomy, selector: Selector) -> str:
    """What would choose something, where a selector chose nothing."""
    if not isinstance(selector, str):
        return _of_no_parameters(parts, selector)
    kind, colon, name = selector.partition(":")
    name = name if colon else kind
    kind = kind if colon else "key"
    classes = [type(module) for module in parts.modules.values()]
    of_class = [cls for cls in classes if is_called(cls, name)]
    if of_class and kind != "class":
        layers = f"{len(of_class):,} module{'s are' if len(of_class) > 1 else ' is'} of it"
        return f"{name!r} is a class, not part of a name: select by class, 'class:{name}' ({layers})"
    if of_class:
        return f"the {len(of_class):,} modules of class {name!r} have no parameters"
    if kind == "module" and any(fnmatchcase(path, name.rstrip(".")) for path in parts.modules):
        return "there is no parameter in it"
    if kind != "module" and name in parts.modules:
        return f"{name!r} is a module: select it with 'module:{name}' or '{name}.*'"
    if kind == "key" and name in ROLES:
        return f"for the role, write 'role:{name}'"
    containing = [key for key in parts.parameters if name.strip("*") and name.strip("*.") in key]
    if kind == "key" and containing:
        return f"'*{name.strip('*.')}*' would match {len(containing):,} keys ({listed(containing, 3)})"
    known = {"class": [cls.__name__ for cls in classes], "module": list(parts.modules)}.get(
        kind, list(parts.parameters)
    )
    near = difflib.get_close_matches(name, dict.fromkeys(known), 3, 0.5)
    there = list(dict.fromkeys(known if kind == "class" else filter(None, known)))
    what = {"class": "classes", "module": "modules"}.get(kind, "keys")
    return f"near it: {listed(near)}" if near else f"the {what} are {listed(there, 4)}"


def _of_no_parameters(parts: Anatomy, selector: torch.nn.Module | type[torch.nn.Module]) -> str:
    if isinstance(selector, type):
        there = any(isinstance(module, selector) for module in parts.modules.values())
        classes = dict.fromkeys(type(module).__name__ for module in parts.modules.values())
        return "its modules have no parameters" if there else f"the classes are {listed(classes, 8)}"
    there = any(module is selector for module in parts.modules.values())
    return "it has no parameters" if there else "it is no part of this model"
