"""Sizes that edits of shapes leave to the model: read from the keys of a checkpoint and of the target, where both say.

A grid or window is read where it is square, the size of a kernel and its number of frames as they are.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping
from math import isqrt

from ..edits.change import matching
from ..edits.recipe import Recipe, Step
from ..errors import EditError
from ..tensors.checkpoint import Checkpoint
from ..tensors.records import Tensor
from .targets import Expected, build

# Class, distillation and register tokens are fewer than this.  No two different lengths leave squares for two numbers
# below it: each difference below ten of two squares (3, 5, 7, 8, 9) is that of one pair alone.
PREFIX_TOKENS = 10

Reader = Callable[[str, Tensor, Expected, Step], dict[str, object]]


def with_sizes(recipe: Recipe, checkpoint: Checkpoint, target: Mapping[str, Expected]) -> Recipe:
    """A recipe whose sizes that are "auto" (0 frames) are those of the target.

    Such a step becomes one for each of its keys.  Raises EditError for keys that do not tell.

    >>> from ckpt_surgeon import from_torch, step
    >>> from ckpt_surgeon.models.targets import resolve
    >>> import torch
    >>> old, new = torch.zeros(1, 5, 8), torch.zeros(1, 17, 8)
    >>> from ckpt_surgeon.tensors.dtypes import parse
    >>> wanted = {"pos_embed": Expected(parse("float32"), (1, 17, 8), True)}
    >>> recipe = Recipe((step("resize_grid", patterns="pos_embed", grid="auto"),))
    >>> print(with_sizes(recipe, from_torch({"pos_embed": old}), wanted).dumps())
    [[edit]]
    do = 'resize-grid'
    patterns = 'pos_embed'
    grid = '2x2:4x4'
    prefix_tokens = 1
    <BLANKLINE>
    """
    steps: list[Step] = []
    state = checkpoint
    for one in recipe.steps:
        made = [one]
        if (read := _reader(one)) is not None:
            made = _for_each_key(one, read, state, target)
        for settled in made:
            state = settled.plan(state).result
        steps += made
    return Recipe(tuple(steps))


def _reader(one: Step) -> Reader | None:
    """What reads the size that a step leaves open; None where it leaves none."""
    readers: dict[tuple[str, str, object], Reader] = {
        ("resize_grid", "grid", "auto"): _grid,
        ("resize_bias_table", "window", "auto"): _window,
        ("resize_kernel", "size", "auto"): _kernel,
        ("inflate", "frames", 0): _frames,
    }
    return next((read for (name, argument, value), read in readers.items()
                 if one.name == name and one.arguments.get(argument) == value), None)  # fmt: skip


def _for_each_key(one: Step, read: Reader, state: Checkpoint, target: Mapping[str, Expected]) -> list[Step]:
    patterns = one.arguments["patterns"]
    chosen = matching(state, patterns if isinstance(patterns, str) else list(patterns))  # type: ignore[call-overload]
    problems: list[str] = []
    made: list[Step] = []
    for key in (key for key in state if key in chosen):
        try:
            if key not in target:
                raise EditError([f"{key!r} is no key of the target, which would tell its size"])
            if state[key].shape != target[key].shape:
                found = read(key, state[key], target[key], one)
                made.append(Step(one.name, {**one.arguments, "patterns": glob.escape(key), **found}))
        except EditError as error:
            problems += error.problems
    if problems:
        raise EditError(problems, remedy="state the sizes")
    return made


def _square(count: int) -> str:
    """A square grid of so many cells, "" where there is none."""
    side = isqrt(max(count, 0))
    return f"{side}x{side}" if side and side * side == count else ""


def _grid(key: str, tensor: Tensor, wanted: Expected, one: Step) -> dict[str, object]:
    """Both grids, and the tokens in front where they are not stated: as many as leave two squares."""
    lengths = [shape[-2] if len(shape) in (2, 3) else -1 for shape in (tensor.shape, wanted.shape)]
    stated = one.arguments.get("prefix_tokens", 0)
    assert isinstance(stated, int)
    for tokens in [stated] if stated else range(PREFIX_TOKENS):
        old, new = (_square(length - tokens) for length in lengths)
        if old and new:
            return {"grid": f"{old}:{new}", "prefix_tokens": tokens}
    raise EditError([f"{key!r} {list(tensor.shape)} and the target's {list(wanted.shape)} are no square grids"])


def _window(key: str, tensor: Tensor, wanted: Expected, _: Step) -> dict[str, object]:
    sides = [isqrt(shape[0]) if len(shape) == 2 else 0 for shape in (tensor.shape, wanted.shape)]
    if any(side % 2 == 0 or side * side != shape[0] for side, shape in zip(sides, (tensor.shape, wanted.shape),
                                                                        strict=True)):  # fmt: skip
        raise EditError([f"{key!r} {list(tensor.shape)} and the target's {list(wanted.shape)} are no square windows"])
    old, new = ((side + 1) // 2 for side in sides)
    return {"window": f"{old}x{old}:{new}x{new}"}


def _kernel(key: str, tensor: Tensor, wanted: Expected, _: Step) -> dict[str, object]:
    if len(wanted.shape) != 4 or len(tensor.shape) != 4 or tensor.shape[:2] != wanted.shape[:2]:
        raise EditError([f"{key!r} {list(tensor.shape)} and the target's {list(wanted.shape)} are no two kernels"])
    return {"size": f"{wanted.shape[2]}x{wanted.shape[3]}"}


def _frames(key: str, tensor: Tensor, wanted: Expected, _: Step) -> dict[str, object]:
    if len(wanted.shape) != 5 or (*wanted.shape[:2], *wanted.shape[3:]) != tensor.shape:
        raise EditError([f"{key!r} {list(tensor.shape)} does not inflate to the target's {list(wanted.shape)}"])
    return {"frames": wanted.shape[2]}


def norm_eps(model: str) -> float:
    """The eps of the batch norms of a model, spelled ``package.module:factory``.

    Raises TargetError for a model that cannot be built, EditError for one with no batch norm or with several eps.

    >>> norm_eps("torch.nn:BatchNorm2d(3, eps=0.25)")
    0.25
    """
    built = build(model)
    if isinstance(built, Mapping):
        raise EditError([f"{model!r} is a state_dict, which holds no eps"])
    norms = [module for module in built.modules() if getattr(module, "running_var", None) is not None]
    found = {float(str(module.eps)) for module in norms if hasattr(module, "eps")}
    if len(found) != 1:
        several = f"the batch norms of {model!r} have eps {' and '.join(f'{one:g}' for one in sorted(found))}"
        raise EditError([several if found else f"{model!r} has no batch norm"],
                        remedy="fold them in a recipe, a step for each eps" if found else "")  # fmt: skip
    return found.pop()
