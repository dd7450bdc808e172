"""Freezing parts of a model, with the running statistics of its normalisation layers decided, never by accident.

``requires_grad = False`` keeps an optimizer away from a BatchNorm's weight and bias; its running mean and variance
still move with every forward pass of ``model.train()``.  Here that is a choice which has to be made, which is shown,
and which later calls of ``model.train()`` do not undo.  torch is imported inside the functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ..errors import Argument, EditError, FrozenChanged, Phrase, listed
from ..reading.comparing import Hashes
from ..reading.comparing import hash as hash_checkpoint
from ..text import Shown
from .selectors import Anatomy, Selectors, above, anatomy, chosen, has_parameters

if TYPE_CHECKING:
    import torch

NORMS = ("eval", "train")


@dataclass(frozen=True, slots=True, repr=False)
class ModuleState(Shown):
    """One module with parameters or running statistics of its own: how many of its parameters are trained or frozen.

    ``norm`` is "" without running statistics, else "eval" (they stay, whatever ``model.train()`` says), "train"
    (they move, as was chosen or as the layer is trained), or "open" (frozen elsewhere, they move unasked).
    """

    path: str
    class_name: str
    trainable: int
    frozen: int
    norm: str = ""

    @property
    def state(self) -> str:
        """trainable, frozen, partly; "" without parameters."""
        if self.trainable and self.frozen:
            return "partly"
        return "trainable" if self.trainable else "frozen" if self.frozen else ""


@dataclass(frozen=True, slots=True, repr=False)
class Trainable(Shown):
    """What of a model is trained: keys, and one record per module; ``str()`` of it is a table, a notebook shows one.

    ``trainable`` and ``frozen`` are names of parameters, every name of a tied one; the counts are of elements, those
    of tied parameters counted once.
    """

    trainable: tuple[str, ...]
    frozen: tuple[str, ...]
    modules: tuple[ModuleState, ...]

    @property
    def trainable_numel(self) -> int:
        return sum(module.trainable for module in self.modules)

    @property
    def numel(self) -> int:
        return sum(module.trainable + module.frozen for module in self.modules)


def freeze(
    model: torch.nn.Module, what: Selectors = "*", *, except_: Selectors = (), norm: str | None = None
) -> Trainable:
    """Freeze parameters: no gradient, no update; returns what is trained now, as a table.

    ``what`` and ``except_`` choose by key, module, class or role (see :mod:`.selectors`); a LoadReport's
    ``loaded`` or ``initialized`` will do.  ``norm`` says what becomes of the running statistics of BatchNorm layers
    in the frozen part: "eval" keeps them still, also after later calls of ``model.train()``; "train" leaves them
    moving.  Gradients that frozen parameters had are cleared, since an optimizer would still apply them.

    Raises NothingMatched for a selector that chooses nothing, EditError where the frozen part has running statistics
    and ``norm`` is not given, or where one name of a tied parameter is chosen and another excepted; nothing has
    changed then.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    >>> freeze(model, except_="2.*", norm="eval").trainable
    ('2.weight', '2.bias')
    >>> model.train()[1].training
    False
    """
    if norm not in (None, *NORMS):
        raise EditError(Phrase(Argument("norm", norm), f" is none of {', '.join(map(repr, NORMS))}"))
    parts = anatomy(model)
    keys = _asked(parts, what, except_)
    frozen = {id(parts.parameters[key]) for key in keys if key in parts.parameters}
    if not frozen:
        raise EditError([f"{listed(keys)} {'is a buffer' if len(keys) == 1 else 'are buffers'}: parameters are frozen, "
                         "the running statistics of a layer with norm='eval'"])  # fmt: skip
    norms = [
        path for path in _norms_among(parts, keys)
        if all(
            id(parameter) in frozen or not parameter.requires_grad
            for parameter in parts.modules[path].parameters(recurse=False)
        )
    ]  # fmt: skip
    undecided = [path for path in norms if not _mode(parts.modules[path])]
    if undecided and norm is None:
        raise EditError([
            f"the frozen part has running statistics ({len(undecided):,} layers: {listed(undecided, 3)}), which move "
            "in training though no parameter does: choose norm='eval' (they stay) or norm='train' (they move)"
        ])  # fmt: skip
    for parameter in parts.parameters.values():
        if id(parameter) in frozen:
            parameter.requires_grad_(False)
            parameter.grad = None
    for path in norms if norm is not None else ():
        _set_mode(parts.modules[path], norm or "", training=parts.model.training)
    return _trainable(parts)


def unfreeze(model: torch.nn.Module, what: Selectors = "*", *, except_: Selectors = ()) -> Trainable:
    """Train parameters again; the running statistics of normalisation layers among them follow ``model.train()``.

    Selectors and errors are those of :func:`freeze`.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    >>> _ = freeze(model)
    >>> unfreeze(model, "module:1").trainable
    ('1.weight', '1.bias')
    """
    parts = anatomy(model)
    keys = _asked(parts, what, except_)
    for key in keys:
        if key in parts.parameters and (
            parts.parameters[key].is_floating_point() or parts.parameters[key].is_complex()
        ):
            parts.parameters[key].requires_grad_(True)
    for path in _norms_among(parts, keys):
        _set_mode(parts.modules[path], "", training=parts.model.training)
    return _trainable(parts)


def trainable(model: torch.nn.Module) -> Trainable:
    """What of a model is trained: a table of its modules, folded, with what their running statistics do.

    >>> import torch
    >>> found = trainable(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)))
    >>> found.numel, found.frozen, [module.norm for module in found.modules]
    (15, (), ['', 'train'])
    """
    return _trainable(anatomy(model))


def snapshot(model: torch.nn.Module) -> Hashes:
    """Hash a model's parameters and buffers: for :func:`verify_frozen`, for tests and logs.

    ``tensors`` has a digest for every parameter and buffer (also for buffers that a state_dict leaves out); ``whole``
    is that of the state_dict, the same as ``ckpt hash`` prints for a file of it.  Raises EditError for a model on the
    meta device.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1)
    >>> before = snapshot(model)
    >>> with torch.no_grad():
    ...     _ = model.bias.add_(1)
    >>> [key for key, digest in snapshot(model).tensors.items() if digest != before.tensors[key]]
    ['bias']
    """
    import torch

    from ..tensors.torch_bridge import from_torch

    parts = anatomy(model)
    state = {key: value for key, value in parts.model.state_dict().items() if isinstance(value, torch.Tensor)}
    rest = {
        key: value.detach() for key, value in (*parts.parameters.items(), *parts.buffers.items()) if key not in state
    }
    whole = hash_checkpoint(from_torch(state))
    return Hashes(whole.whole, {**whole.tensors, **hash_checkpoint(from_torch(rest)).tensors})


def verify_frozen(model: torch.nn.Module, before: Hashes) -> tuple[str, ...]:
    """Prove that what is frozen has the bits that it had at a :func:`snapshot`; returns the names that were compared.

    Compared are the parameters without a gradient, the buffers of modules whose parameters are all frozen, and
    running statistics unless ``freeze(norm="train")`` lets them move.  Raises FrozenChanged naming all that changed,
    EditError where nothing is frozen or the snapshot is of another model.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1)
    >>> _ = freeze(model, "weight")
    >>> verify_frozen(model, snapshot(model))
    ('weight',)
    """
    parts = anatomy(model)
    keys = [key for key, parameter in parts.parameters.items() if not parameter.requires_grad]
    if not keys:
        raise EditError(["no parameter of the model is frozen"])
    keys += [key for key in parts.buffers if _is_frozen_buffer(parts, key)]
    if unknown := [key for key in keys if key not in before.tensors]:
        raise EditError([f"the snapshot has no {listed(unknown)}: it is of another model, or of other names"])
    now = snapshot(model).tensors
    if changed := [key for key in keys if now[key] != before.tensors[key]]:
        moved = [key for key in changed if key in parts.buffers and has_statistics(parts.owner(key))]
        why = "running statistics move in training: freeze with norm='eval', or norm='train' if they may"
        raise FrozenChanged(changed, why if moved else "")
    return tuple(keys)


# -- running statistics


def has_statistics(module: torch.nn.Module) -> bool:
    """Whether a module keeps running statistics that move with every forward pass in training."""
    from torch import nn

    return isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None


def _norms_among(parts: Anatomy, keys: set[str]) -> Iterator[str]:
    """The paths of the layers with running statistics that have any of these names."""
    for path in dict.fromkeys(key.rpartition(".")[0] for key in (*parts.parameters, *parts.buffers) if key in keys):
        if has_statistics(parts.modules[path]):
            yield path


def _in_mode(module: torch.nn.Module, wanted: str, mode: bool = True) -> torch.nn.Module:
    """Stands in for a layer's ``train``: it stays in evaluation, or ("train", a choice on record) follows as ever."""
    return type(module).train(module, mode and wanted == "train")


def _set_mode(module: torch.nn.Module, wanted: str, *, training: bool) -> None:
    """Decide what the running statistics of a layer do; "" leaves it to ``model.train()`` again.

    ``train`` is replaced on the layer itself: no hook is left in its way, and a deep copy or a pickle of the model
    keeps the choice.
    """
    vars(module).pop("train", None)
    module.train(training and wanted != "eval")
    if wanted:
        vars(module)["train"] = partial(_in_mode, module, wanted)


def _mode(module: torch.nn.Module) -> str:
    """What was decided for a layer, "" where nothing was."""
    found = vars(module).get("train")
    return str(found.args[1]) if isinstance(found, partial) and found.func is _in_mode else ""


# -- what they are made of


def _asked(parts: Anatomy, what: Selectors, except_: Selectors) -> set[str]:
    """The names that are chosen and not excepted, with all names of what is tied to them."""
    excepted = chosen(parts, except_)
    keys = chosen(parts, what) - excepted
    problems = []
    for key in [key for key in parts.parameters if key in keys]:
        names = parts.names_of(parts.parameters[key])
        kept = [name for name in names if name in excepted]
        if kept:
            problems.append(f"{key!r} and {listed(kept)} are one parameter, and one of them is excepted")
        keys.update(names)
    if problems:
        raise EditError(problems, remedy="choose all of its names or none")
    if not keys:
        raise EditError(["nothing is chosen: every key is excepted, or none was given"])
    return keys


def _trainable(parts: Anatomy) -> Trainable:
    counted: set[int] = set()
    modules = []
    for path, module in parts.modules.items():
        counts = {True: 0, False: 0}
        own = [parameter for parameter in module.parameters(recurse=False) if id(parameter) not in counted]
        counted.update(map(id, own))
        for parameter in own:
            counts[parameter.requires_grad] += parameter.numel()
        norm = _shown_mode(module, frozen=not counts[True]) if has_statistics(module) else ""
        if own or norm:
            modules.append(ModuleState(path, type(module).__name__, counts[True], counts[False], norm))
    names = {state: tuple(key for key, parameter in parts.parameters.items() if parameter.requires_grad is state)
             for state in (True, False)}  # fmt: skip
    return Trainable(names[True], names[False], tuple(modules))


def _shown_mode(module: torch.nn.Module, *, frozen: bool) -> str:
    return _mode(module) or ("open" if frozen and has_parameters(module, own=True) else "train")


def _is_frozen_buffer(parts: Anatomy, key: str) -> bool:
    """Whether a buffer belongs to a frozen module: of the modules around it, the nearest with parameters is frozen."""
    module = parts.owner(key)
    if has_statistics(module) and _mode(module):
        return _mode(module) == "eval"
    for path in above(key):
        parameters = list(parts.modules[path].parameters())
        if parameters:
            return not any(parameter.requires_grad for parameter in parameters)
    return False
