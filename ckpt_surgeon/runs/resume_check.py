"""Whether training goes on from an edited checkpoint as it would have from the one before: tried, not reasoned.

Both files are resumed by torch's own ``load_state_dict``: the edited one in the model and the optimizer that the
caller's factory builds, the one before in bare parameters under an optimizer of the same class.  Both get the same
gradients for some steps; then weights and state are compared, bit for bit, on what both have.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..edits.keys import without_wrappers
from ..errors import EditError, TargetError
from ..files.paths import AnyPath
from ..formats.pickle.graph import DictNode, ListNode
from ..formats.pickle.values import Value
from ..models.targets import called
from ..tensors.checkpoint import Checkpoint
from ..tensors.torch_bridge import to_torch
from ..text import Shown
from .opening import open_run_file
from .run import Run
from .state import Group, OptimizerState

if TYPE_CHECKING:
    import torch

STEPS = 5


@dataclass(frozen=True, slots=True, repr=False)
class ResumeCheck(Shown):
    """What :func:`resume_check` found, parameter by parameter.

    ``equal`` went on bit for bit; ``kept_part`` did so on the part that both have (they were cut or grown);
    ``different`` did not; ``fresh`` have no state to go on from; ``new`` and ``gone`` are in one file only.
    """

    steps: int
    equal: tuple[str, ...]
    kept_part: tuple[str, ...]
    different: tuple[str, ...]
    fresh: tuple[str, ...]
    new: tuple[str, ...]
    gone: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether everything that both files have goes on as it was."""
        return not self.different and bool(self.equal or self.kept_part)

    @property
    def is_same_run(self) -> bool:
        """Whether the whole run goes on bit for bit."""
        return self.holds and not (self.kept_part or self.fresh or self.new or self.gone)


def resume_check(
    before: AnyPath, after: AnyPath, factory: str | Callable[[], object], *, steps: int = STEPS,
    select: str | None = None, in_model_order: bool = True,
) -> ResumeCheck:  # fmt: skip
    """Resume both files, train some steps on the same gradients, and compare bit for bit.

    ``factory`` builds what ``after`` is resumed in: a callable, or ``file.py:make_run``, without arguments, that
    returns ``(model, optimizer)`` (more may follow).  Raises EditError where torch refuses to load, TargetError where
    the factory gives something else.

    >>> import ckpt_surgeon, torch
    >>> def make_run():
    ...     model = torch.nn.Linear(2, 2)
    ...     return model, torch.optim.SGD(model.parameters(), lr=0.1)
    >>> model, optimizer = make_run()
    >>> torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "last.ckpt")
    >>> resume_check("last.ckpt", "last.ckpt", make_run).is_same_run
    True
    """
    model, optimizers = _made(factory)
    edited = open_run_file(after, select=select)
    old = open_run_file(before, select=select, in_model_order=in_model_order)
    if not len(optimizers) == len(edited.optimizers) == len(old.optimizers):
        counts = f"{len(optimizers)}, {len(edited.optimizers)} and {len(old.optimizers)}"
        raise EditError([f"the factory, the file after and the file before have {counts} optimizers"])
    new_arm = _resumed(edited, model, optimizers)
    old_arm = [_bare(old, state, type(optimizer)) for state, optimizer in zip(old.optimizers, optimizers, strict=True)]
    return _compared(_Pairs(new_arm, old_arm), steps)


def _made(factory: str | Callable[[], object]) -> tuple[torch.nn.Module, list[torch.optim.Optimizer]]:
    """The model and the optimizers of a factory."""
    import torch

    made = called(factory) if isinstance(factory, str) else factory()
    if isinstance(made, (tuple, list)) and len(made) >= 2 and isinstance(made[0], torch.nn.Module):
        optimizers = list(made[1]) if isinstance(made[1], (tuple, list)) else [made[1]]
        if optimizers and all(isinstance(optimizer, torch.optim.Optimizer) for optimizer in optimizers):
            return made[0], optimizers
    name = factory if isinstance(factory, str) else getattr(factory, "__name__", "the factory")
    raise TargetError(name, "has to return (model, optimizer), both built but not yet loaded")


def parameter_names(factory: str | Callable[[], object]) -> list[str]:
    """The names of the parameters in the order in which a factory's optimizers have them.

    >>> import torch
    >>> def make_run():
    ...     model = torch.nn.Linear(2, 2)
    ...     return model, torch.optim.SGD(model.parameters(), lr=0.1)
    >>> parameter_names(make_run)
    ['weight', 'bias']
    """
    model, optimizers = _made(factory)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names.get(id(parameter), "") for optimizer in optimizers for parameter in _parameters(optimizer)]


# -- the two arms


@dataclass(frozen=True, slots=True, eq=False)
class _Arm:
    """An optimizer that was resumed, and its parameters by name."""

    optimizer: torch.optim.Optimizer
    parameters: Mapping[str, torch.Tensor]


def _resumed(run: Run, model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> list[_Arm]:
    """The model and its optimizers after torch's own loading.  Raises EditError where torch refuses."""
    try:
        model.load_state_dict(to_torch(run.weights), strict=True)
        for state, optimizer in zip(run.optimizers, optimizers, strict=True):
            optimizer.load_state_dict(_state_dict(run, _in_order_of(optimizer, model, state)))
    except (RuntimeError, ValueError, KeyError) as error:
        raise EditError([f"torch refuses to load {run.whole.path}: {' '.join(str(error).split())[:400]}"]) from error
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        _Arm(
            optimizer,
            {
                names.get(id(parameter), f"#{index}"): parameter
                for index, parameter in enumerate(_parameters(optimizer))
            },
        )
        for optimizer in optimizers
    ]


def _in_order_of(optimizer: torch.optim.Optimizer, model: torch.nn.Module, state: OptimizerState) -> OptimizerState:
    """A state whose ids are names, in the groups of an optimizer, as FSDP loads it; any other as it is."""
    if not state.is_by_name:
        return state
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    homes = {id_: group for group in state.groups for id_ in group.ids}
    made = []
    for group in optimizer.param_groups:
        ids = tuple(names[id(parameter)] for parameter in group["params"])
        if missing := [name for name in ids if name not in homes]:
            raise KeyError(f"{missing[0]!r} is in no param group")
        made.append(Group(ids, None, homes[ids[0]].options if ids else ()))
    return replace(state, groups=tuple(made))


def _bare(run: Run, state: OptimizerState, cls: type[torch.optim.Optimizer]) -> _Arm:
    """Parameters of a file, without their model, under an optimizer of a class."""
    import torch

    names = run.names(state)
    if names is None:
        where = ".".join(state.path)
        raise EditError([f"{run.whole.path}: nothing tells which parameter is behind each id of {where}"])
    values = to_torch(Checkpoint({key: run.weights[key] for key in names.keys.values() if key in run.weights}))
    made = {
        key: torch.nn.Parameter(value.clone(), requires_grad=value.is_floating_point()) for key, value in values.items()
    }
    saved, ids = _state_dict(run, state), state.ids
    groups = [
        {**{str(key): option for key, option in group.items() if key not in ("params", "param_names")},
         "params": [made[names.keys[ids[index]]] for index in group["params"]]}
        for group in saved["param_groups"]
    ]  # fmt: skip
    optimizer = cls(groups)  # type: ignore[call-arg]
    optimizer.load_state_dict(saved)
    return _Arm(optimizer, made)


def _state_dict(run: Run, state: OptimizerState) -> dict[str, Any]:
    """An optimizer's ``state_dict()`` as torch takes it, made without unpickling."""
    index = {id_: position for position, id_ in enumerate(state.ids)}
    groups = [
        {str(name): _python(run, value) for name, value in group.options}
        | {"params": [index[id_] for id_ in group.ids]}
        for group in state.groups
    ]
    kept = {
        index[id_]: {name: _python(run, slot.node) for name, slot in slots.items()}
        for id_, slots in state.slots.items()
        if id_ in index
    }
    return {"state": kept, "param_groups": groups}


def _python(run: Run, node: Value) -> object:
    """A node as the value that it means: numbers, strings, tuples, lists, dicts, tensors."""
    tensor = run.whole.tensor(node)
    if tensor is not None:
        return to_torch(Checkpoint({"value": tensor}))["value"].clone()
    if isinstance(node, DictNode):
        return {_python(run, key): _python(run, value) for key, value in node.pairs}
    if isinstance(node, ListNode):
        return [_python(run, item) for item in node.items]
    if isinstance(node, tuple):
        return tuple(_python(run, item) for item in node)
    return node


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


# -- trained and compared


class _Pairs:
    """Parameters of both arms that are the same one, by their names, wrappers aside."""

    def __init__(self, new: Sequence[_Arm], old: Sequence[_Arm]) -> None:
        self.new = {name: (arm, parameter) for arm in new for name, parameter in arm.parameters.items()}
        self.old = {name: (arm, parameter) for arm in old for name, parameter in arm.parameters.items()}
        self.arms = (*new, *old)
        plain = {without_wrappers(name): name for name in self.old}
        self.pairs = {name: plain[without_wrappers(name)] for name in self.new if without_wrappers(name) in plain}
        self.added = tuple(name for name in self.new if name not in self.pairs)
        self.gone = tuple(name for name in self.old if name not in set(self.pairs.values()))

    def boxes(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The part of a parameter that both have, from each."""
        new, old = self.new[name][1], self.old[self.pairs[name]][1]
        return _box(new, old.shape), _box(old, new.shape)

    def train(self, steps: int) -> None:
        """Give both the same gradients, and let both optimizers step."""
        for step in range(steps):
            for name, was in self.pairs.items():
                new, old = self.new[name][1], self.old[was][1]
                largest = [max(sizes) for sizes in zip(new.shape, old.shape, strict=True)]
                noise = _noise(f"{without_wrappers(name)} {step}", largest)
                for parameter in (new, old):
                    parameter.grad = (
                        _box(noise, parameter.shape).to(parameter.dtype).clone() if parameter.requires_grad else None
                    )
            for arm in self.arms:
                arm.optimizer.step()

    def state(self, name: str) -> tuple[dict[str, object], dict[str, object]]:
        """The optimizer's state of both."""
        (new_arm, new), (old_arm, old) = self.new[name], self.old[self.pairs[name]]
        return dict(new_arm.optimizer.state.get(new, {})), dict(old_arm.optimizer.state.get(old, {}))


def _box(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The beginning of a tensor along each dimension, no more than ``shape``."""
    for dim, size in enumerate(shape):
        tensor = tensor.narrow(dim, 0, min(size, tensor.shape[dim]))
    return tensor.detach()


def _noise(name: str, shape: Sequence[int]) -> torch.Tensor:
    import torch

    seed = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:7], "little")
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _compared(pairs: _Pairs, steps: int) -> ResumeCheck:
    """Train both arms and sort the parameters by what became of them."""
    import torch

    alike = [
        name for name, was in pairs.pairs.items()
        if pairs.new[name][1].dim() == pairs.old[was][1].dim() and torch.equal(*pairs.boxes(name))
    ]  # fmt: skip
    fresh = [
        name for name, was in pairs.pairs.items()
        if (pairs.state(name)[1] and not pairs.state(name)[0])
        or (name not in alike and pairs.new[name][1].shape != pairs.old[was][1].shape)
    ]  # fmt: skip
    unlike = [name for name in pairs.pairs if name not in alike and name not in fresh]
    for name in {*unlike, *(name for name in fresh if name not in alike)}:
        del pairs.pairs[name]
    pairs.train(steps)
    equal: list[str] = []
    kept: list[str] = []
    different = list(unlike)
    for name in alike:
        if name in fresh:
            continue
        new, old = pairs.new[name][1], pairs.old[pairs.pairs[name]][1]
        went_on = torch.equal(*pairs.boxes(name)) and _same_state(pairs, name)
        (equal if went_on and new.shape == old.shape else kept if went_on else different).append(name)
    return ResumeCheck(
        steps, tuple(equal), tuple(kept), tuple(different), tuple(fresh), pairs.added, pairs.gone
    )  # fmt: skip


def _same_state(pairs: _Pairs, name: str) -> bool:
    """Whether the state of both is equal, slot by slot, on what both have."""
    import torch

    new, old = pairs.state(name)
    if new.keys() != old.keys():
        return False
    for slot, value in new.items():
        other = old[slot]
        if isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor):
            if value.dim() != other.dim() or not torch.equal(_box(value, other.shape), _box(other, value.shape)):
                return False
        elif value != other:
            return False
    return True
