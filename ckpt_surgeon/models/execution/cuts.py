"""Where two models with different heads are the same: the input of a module through which all that ran before goes.

An equal activation alone proves little: a query that is copied from a key gives the key's output.  At a cut, the
output gets all that it has of earlier parameters through the one tensor that is equal, so each of them is where it
belongs.  torch is imported inside the functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import permutations
from typing import TYPE_CHECKING, cast

from .elements import plainly
from .outputs import leaves, outputs, tensors_of
from .tracing import fingerprint, is_same

if TYPE_CHECKING:
    import torch

TRIED = 24  # modules whose input is equal and that are looked at, from the last one on


@dataclass(frozen=True, slots=True)
class Cut:
    """A module of the target by its name, and what of the source its input is equal to; no name: an output."""

    module: str = ""
    seen: str = ""
    difference: float = 0.0
    number: int = 0  # of the output

    def tensors(self, model: torch.nn.Module, example: torch.Tensor, *, gradients: bool = False) -> list[torch.Tensor]:
        """What a model gives, or gives the module at the cut."""
        if not self.seen:
            return outputs(model, example, gradients=gradients)
        if not self.module:
            return outputs(model, example, gradients=gradients)[self.number :]
        found: list[torch.Tensor] = []
        handle = model.get_submodule(self.module).register_forward_pre_hook(
            lambda _, args, kwargs: found.extend(leaves((args, kwargs))), with_kwargs=True
        )
        try:
            outputs(model, example, gradients=gradients)
        finally:
            handle.remove()
        return found[:1]


OUTPUT = Cut()


@dataclass(slots=True)
class _Seen:
    """What went into and came out of a model's modules in one forward pass, in the order of their calls."""

    inputs: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    outputs: list[tuple[str, torch.Tensor]] = field(default_factory=list)


def cuts(source: torch.nn.Module, target: torch.nn.Module, example: torch.Tensor, tolerance: float) -> Iterator[Cut]:
    """The cuts of the target at which the source has the same, the latest first."""
    ours, theirs = _seen(source, example), _seen(target, example)
    every = [(name, tensor, fingerprint(tensor)) for name, tensor in (*ours.inputs, *ours.outputs)]
    for number, tensor in enumerate(outputs(target, example)):
        found = _equal_to(tensor, every, tolerance)
        if found is not None:
            yield Cut("", *found, number)
    tried = 0
    for name, tensor in reversed(list({name: tensor for name, tensor in theirs.inputs if name}.items())):
        found = _equal_to(tensor, every, tolerance)
        if found is None:
            continue
        tried += 1
        if tried > TRIED:
            return
        if _is_cut(target, name, example):
            yield Cut(name, *found)


def _seen(model: torch.nn.Module, example: torch.Tensor) -> _Seen:
    found = _Seen()
    with ExitStack() as stack:
        for name, module in model.named_modules():

            def before(_: object, args: object, kwargs: object, name: str = name) -> None:
                found.inputs.extend((name, one) for one in [*leaves((args, kwargs))][:1])

            def after(_: object, __: object, made: object, name: str = name) -> None:
                found.outputs.extend((name or type(model).__name__, one) for one in tensors_of(made))

            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
        outputs(model, example)
    return found


def _equal_to(
    tensor: torch.Tensor, seen: list[tuple[str, torch.Tensor, tuple[float, ...]]], tolerance: float
) -> tuple[str, float] | None:
    """What of the source is equal to a tensor, or has it as the first of its tokens; and how far they are apart."""
    if tensor.numel() < 2:
        return None
    mine = fingerprint(tensor)
    for name, other, theirs in seen:
        part = other
        if other.dim() == 3 and tensor.dim() == 2 and other.shape[::2] == tensor.shape:
            part = other[:, 0]
        elif other.numel() != tensor.numel() or not is_same(mine, theirs):
            continue
        difference = equal_layouts(tensor, part)
        if difference is not None and difference <= tolerance:
            return name or "the model", difference
    return None


def equal_layouts(given: torch.Tensor, wanted: torch.Tensor) -> float | None:
    """The largest difference of two tensors, as a share of the largest value; None where no layout makes them alike.

    Dimensions of one do not count; pictures may have their channels last, and their pixels in one dimension.

    >>> import torch
    >>> picture = torch.rand(1, 3, 4, 5)
    >>> equal_layouts(picture, picture.flatten(2).transpose(1, 2)), equal_layouts(picture, torch.rand(7))
    (0.0, None)
    """
    one, two = sorted((given.squeeze(), wanted.squeeze()), key=lambda tensor: tensor.dim())
    if one.numel() != two.numel():
        return None
    size = float(wanted.abs().max().clamp(min=1e-30))
    differences = [float((one - other).abs().max()) / size for other in _layouts(two) if other.shape == one.shape]
    return min(differences, default=None)


def _layouts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    yield tensor
    if 2 <= tensor.dim() <= 3:
        for dims in permutations(range(tensor.dim())):
            yield tensor.permute(dims)
            yield tensor.permute(dims).flatten(0, 1)
            yield tensor.permute(dims).flatten(tensor.dim() - 2)


def _is_cut(target: torch.nn.Module, name: str, example: torch.Tensor) -> bool:
    """Whether, with the module's input held fast, the output depends on no parameter that the input depends on.

    A parameter that a later module owns too (a tied head) does not count.
    """

    parameters = {id(one): one for one in target.parameters() if one.is_floating_point()}
    for one in parameters.values():
        one.requires_grad_(True)
    held: list[torch.Tensor] = []
    later: set[int] = set()
    with ExitStack() as stack:

        def hold(_: object, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[object, dict[str, object]]:
            from torch.utils._pytree import tree_map

            first = next(iter(leaves((args, kwargs))))
            held.append(first)
            return cast(
                "tuple[object, dict[str, object]]",
                tree_map(lambda one: one.detach() if one is first else one, (args, kwargs)),
            )

        def notice(module: torch.nn.Module, _: object) -> None:
            if held:
                later.update(id(one) for one in module.parameters(recurse=False))

        stack.callback(
            target.get_submodule(name).register_forward_pre_hook(hold, with_kwargs=True, prepend=True).remove
        )
        for module in target.modules():
            stack.callback(module.register_forward_pre_hook(notice).remove)
        given = outputs(target, example, gradients=True)
    before = _moved(held[:1], parameters) if len(held) == 1 else None
    after = _moved(given, parameters)
    for one in parameters.values():
        one.requires_grad_(False)
    return before is not None and bool(before) and not (before & after) - later


def _moved(made: list[torch.Tensor], parameters: Mapping[int, torch.Tensor]) -> set[int]:
    """The parameters on which tensors depend."""
    import torch

    with plainly(gradients=True):
        generator = torch.Generator().manual_seed(6)
        total = sum(
            (one * torch.randn(one.shape, generator=generator, dtype=torch.float64)).sum()
            for one in made
            if one.requires_grad
        )
        if not isinstance(total, torch.Tensor):
            return set()
        found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True, retain_graph=True)
    return {key for key, one in zip(parameters, found, strict=True) if one is not None and bool(one.any())}
