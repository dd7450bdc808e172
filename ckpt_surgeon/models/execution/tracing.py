"""What a forward pass does with a model's parameters: operation after operation, with what goes in.

Every operation of torch is seen below autograd.  Where parameters are only moved (views, transposes, slices,
concatenations, look-ups by constants) their elements' numbers move along; where they meet what depends on the
model's input, that is an :class:`Operation`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from .elements import Numbered, mark, numbers_of, plainly

if TYPE_CHECKING:
    import torch

Arguments = tuple[object, ...]
Named = Mapping[str, object]

_MOVES = frozenset(
    ("view", "_unsafe_view", "_reshape_alias", "reshape", "t", "transpose", "permute", "expand", "squeeze", "unsqueeze",
     "slice", "select", "split", "split_with_sizes", "unsafe_split", "unsafe_chunk", "chunk", "unbind", "cat", "stack",
     "clone", "index", "index_select", "gather", "repeat", "flip", "roll", "constant_pad_nd", "narrow", "unfold",
     "embedding", "diagonal")
)  # fmt: skip
_KEEPS = frozenset(("detach", "alias", "_to_copy", "lift_fresh", "contiguous", "lift_fresh_copy"))
_LOOK_UPS = frozenset(("embedding", "index", "index_select", "gather"))
_PRODUCTS = {"convolution": 0, "mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}  # where the factors are
_NORMS = {"native_layer_norm": (2, 3), "native_group_norm": (1, 2), "_fused_rms_norm": (2, None)}


@dataclass(frozen=True, slots=True)
class Operation:
    """Parameters' elements meeting an activation.

    ``rows`` holds the elements' numbers, -1 for a constant or nothing.  Of a matrix (linear, convolution) a row is an
    output with its bias last; of anything else a row is one element of each operand.  ``fingerprint`` says what the
    activation holds, in whatever order; ``shape`` is that of the operand without dimensions of 1.
    """

    kind: str
    fingerprint: tuple[float, ...]
    rows: torch.Tensor
    shape: tuple[int, ...]

    @property
    def is_matrix(self) -> bool:
        return self.kind.startswith("matrix")


class Again(Exception):
    """Values changed that this pass had computed with already."""


@dataclass(slots=True)
class Tracer:
    """Follows one forward pass; ``meet`` is called before each operation is carried out."""

    numbered: Numbered
    meet: Callable[[Operation], None]
    computed: set[int] = field(default_factory=set)  # keys (by their first element) that others were computed from

    def run(self, example: object) -> object:
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode

        handle = self._handle

        class Watching(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                return handle(func, args, kwargs or {})

        self.computed = set()
        given = cast("torch.Tensor", example).clone()
        _activate(given)
        with plainly(), Watching():  # type: ignore[no-untyped-call]
            assert isinstance(given, torch.Tensor)
            return cast("object", self.numbered.model(given))

    def _handle(self, func: Callable[..., object], args: Arguments, kwargs: Named) -> object:
        name = _name(func)
        tensors = _tensors((args, kwargs))
        parameters = [tensor for tensor in tensors if numbers_of(tensor) is not None]
        if parameters and name in _PRODUCTS:  # a table of positions is an input, too
            for tensor in tensors[_PRODUCTS[name] :][:2]:
                if numbers_of(tensor) is None:
                    _activate(tensor)
        is_active = any(map(_is_active, tensors))
        if parameters and not is_active:
            return self._moved(name, func, args, kwargs)
        if not parameters:
            return _activated(func(*args, **kwargs), is_active)
        if name in _NORMS:
            return self._norm(name, func, args, kwargs)
        for operation in self._operations(name, args, kwargs):
            self.meet(operation)
        return _activated(func(*_mapped(args, self._now), **_named(kwargs, self._now)), True)

    def _moved(self, name: str, func: Callable[..., object], args: Arguments, kwargs: Named) -> object:
        """Parameters alone: the numbers move along, or are kept where a value is computed from each."""
        made = func(*args, **kwargs)
        first = next(tensor for tensor in _tensors((args, kwargs)) if numbers_of(tensor) is not None)
        numbers: object = None
        added: object = None
        if name == "constant_pad_nd":
            numbers = func(numbers_of(first), args[1], -1)
        elif name in _MOVES:
            numbers = func(*_mapped(args, _numbers), **_named(kwargs, _numbers))
            if _added(first) is not None:
                added = func(*_mapped(args, _addend), **_named(kwargs, _addend))
        elif name in _KEEPS:
            numbers, added = numbers_of(first), _added(first)
        elif name == "add" and len(_tensors((args, kwargs))) == 2 and not _is_derived(first):
            numbers, added = _sum(args)
        if numbers is None:
            self._compute(made, (args, kwargs))
        addends: Sequence[torch.Tensor | None] = _tensors(added) or [None] * len(_tensors(made))
        for tensor, held, addend in zip(_tensors(made), _tensors(numbers), addends, strict=False):
            mark(tensor, held)
            if addend is not None:
                tensor._ckpt_added = addend  # type: ignore[attr-defined]
            if _is_derived(first):
                tensor._ckpt_derived = True  # type: ignore[attr-defined]
        return made

    def _compute(self, made: object, given: object) -> None:
        """A value computed from parameters (a scaled or standardised weight) stands for the one of its shape."""
        import torch

        sources = [tensor for tensor in _tensors(given) if numbers_of(tensor) is not None]
        for tensor in sources:
            numbers = numbers_of(tensor)
            assert numbers is not None
            self.computed.update(int(element) for element in numbers.flatten()[:1])
        for tensor in _tensors(made):
            alike = next((one for one in sources if one.shape == tensor.shape), None)
            if alike is not None and isinstance(alike, torch.Tensor) and tensor.is_floating_point():
                numbers = numbers_of(alike)
                assert numbers is not None
                mark(tensor, numbers)
                tensor._ckpt_derived = True  # type: ignore[attr-defined]

    def _now(self, value: object) -> object:
        """A parameter's value of now: what was moved before it was set has the old one."""
        import torch

        numbers = numbers_of(value) if isinstance(value, torch.Tensor) else None
        if numbers is None or not isinstance(value, torch.Tensor) or _is_derived(value):
            return value
        flat = self.numbered.flat
        if value.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr():
            return value
        added = _added(value)
        now = flat[numbers.clamp(min=0)]
        return torch.where(numbers >= 0, now if added is None else now + added, value)

    def _norm(self, name: str, func: Callable[..., object], args: Arguments, kwargs: Named) -> object:
        """A normalisation as what it is elsewhere too: normalised, then scaled, then shifted."""
        import torch

        at_weight, at_bias = _NORMS[name]
        plain = [None if at in (at_weight, at_bias) else arg for at, arg in enumerate(args)]
        first, *others = _tensors(func(*plain, **kwargs))
        for at, kind in ((at_weight, "mul"), (at_bias, "add")):
            operand = args[at] if at is not None and at < len(args) else None
            if not isinstance(operand, torch.Tensor):
                continue
            numbers = numbers_of(operand)
            if numbers is not None:
                self.meet(Operation(kind, fingerprint(first), numbers.reshape(-1, 1), _squeezed(numbers)))
            value = cast("torch.Tensor", self._now(operand))
            if name == "native_group_norm":
                value = value.view(-1, *[1] * (first.dim() - 2))
            first = first * value if kind == "mul" else first + value
        made = (first, *others)
        return _activated(made, True)

    def _operations(self, name: str, args: Arguments, kwargs: Named) -> Sequence[Operation]:
        matrix = _matrix(name, args)
        if matrix is not None:
            return (matrix,)
        tensors = _tensors((args, kwargs))
        operands = [_unexpanded(numbers) for tensor in tensors if (numbers := numbers_of(tensor)) is not None]
        active = tuple(number for tensor in tensors if _is_active(tensor) for number in fingerprint(tensor))
        kind = "look up" if name in _LOOK_UPS else "batch_norm" if "batch_norm" in name else name
        shapes = {_squeezed(numbers) for numbers in operands}
        if len(shapes) == 1:
            import torch

            rows = torch.stack([numbers.reshape(-1) for numbers in operands], dim=1)
            return (Operation(kind, active, rows, shapes.pop()),)
        return [
            Operation(f"{kind} {at}", active, numbers.reshape(-1, 1), _squeezed(numbers))
            for at, numbers in enumerate(operands)
        ]


def fingerprint(tensor: torch.Tensor) -> tuple[float, ...]:
    """Four sums over the values, in which their order and zeros make no difference.

    >>> import torch
    >>> fingerprint(torch.tensor([1.0, -2.0])) == fingerprint(torch.tensor([[-2.0, 0.0, 1.0]]))
    True
    """
    import torch

    values = tensor.detach().to(torch.float64).flatten()
    squares = values * values
    sums = (values.abs().sum(), squares.sum(), values.sum(), (squares * values).sum())
    return tuple(float(one) for one in sums)


def is_same(one: tuple[float, ...], two: tuple[float, ...], tolerance: float = 1e-7) -> bool:
    """Whether two fingerprints are of the same values, but for the order of summation."""
    if len(one) != len(two):
        return False
    for at in range(0, len(one), 4):
        ones, twos = one[at : at + 4], two[at : at + 4]
        sizes = (ones[0], ones[1], ones[0], ones[1] ** 1.5)
        if any(abs(a - b) > tolerance * size for a, b, size in zip(ones, twos, sizes, strict=True)):
            return False
    return True


def _matrix(name: str, args: Arguments) -> Operation | None:
    """A product with a matrix of parameters, as rows of outputs: linear, convolution, and whatever comes to them."""
    if name == "convolution":
        return _convolution(args)
    at = _PRODUCTS.get(name)
    if at is None:
        return None
    left, right = (cast("torch.Tensor", arg) for arg in args[at : at + 2])
    bias = cast("torch.Tensor", args[0]) if at else None
    flipped = numbers_of(left) is not None
    numbers = numbers_of(left if flipped else right)
    given = right if flipped else left
    if numbers is None or not _is_active(given):
        return None
    if numbers.dim() == 3:
        same = bool((numbers == numbers[:1]).all())
        numbers = numbers[0] if same else numbers.transpose(0, 1).flatten(1) if flipped else numbers.flatten(0, 1)
    rows = numbers if flipped else numbers.t()
    return _product(given, rows, bias, "matrix 1 ")


def _convolution(args: Arguments) -> Operation | None:
    given, weight, bias = (cast("torch.Tensor", arg) for arg in args[:3])
    numbers, is_transposed, groups = numbers_of(weight), bool(args[6]), args[8]
    if numbers is None or not _is_active(given):
        return None
    if is_transposed and groups == 1:
        numbers = numbers.transpose(0, 1)
    return _product(given, numbers.flatten(1), bias, f"matrix {groups} {'transposed' if is_transposed else ''}")


def _product(given: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None, kind: str) -> Operation:
    import torch

    held = numbers_of(bias) if bias is not None else None
    if held is None or held.numel() != len(rows):
        last = torch.full((len(rows), 1), -1, dtype=torch.int64)
    else:
        last = held.reshape(-1, 1)
    return Operation(kind, fingerprint(given), torch.cat((rows, last), dim=1), tuple(rows.shape))


def _unexpanded(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers without the dimensions along which they repeat: a bias for each window is one bias."""
    for dim, size in enumerate(numbers.shape):
        first = numbers.narrow(dim, 0, 1) if size > 1 else numbers
        if size > 1 and bool((numbers == first).all()):
            numbers = first
    return numbers


def _sum(args: Arguments) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A parameter plus a constant (a bias and a mask): the parameter's numbers, and what is added to them."""
    import torch

    one, two = (arg if isinstance(arg, torch.Tensor) else None for arg in args[:2])
    if one is None or two is None or (numbers_of(one) is None) == (numbers_of(two) is None):
        return None, None
    parameter, constant = (one, two) if numbers_of(one) is not None else (two, one)
    numbers, before = numbers_of(parameter), _added(parameter)
    assert numbers is not None
    if before is not None:
        constant = constant + before
    both = torch.broadcast_tensors(numbers, constant)
    return both[0], both[1]


def _added(tensor: torch.Tensor) -> torch.Tensor | None:
    """The constant that was added to a parameter before it meets an activation."""
    return cast("torch.Tensor | None", getattr(tensor, "_ckpt_added", None))


def _addend(value: object) -> object:
    """What takes a tensor's place where addends are moved."""
    import torch

    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    added = _added(value)
    return torch.zeros_like(value) if added is None else added


def _is_derived(tensor: torch.Tensor) -> bool:
    """Whether a tensor was computed from parameters, not only moved."""
    return bool(getattr(tensor, "_ckpt_derived", False))


def _squeezed(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(size for size in tensor.shape if size != 1)


def _name(func: object) -> str:
    """The plain name of an operation: ``add`` for ``aten::add_.Tensor``."""
    name = str(getattr(getattr(func, "_schema", None), "name", func)).rpartition("::")[2]
    return name.rstrip("_") if not name.startswith("__") else name


def _tensors(value: object) -> list[torch.Tensor]:
    import torch
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _mapped(args: Arguments, change: Callable[[object], object]) -> Arguments:
    from torch.utils._pytree import tree_map

    return cast("Arguments", tree_map(change, args))


def _named(kwargs: Named, change: Callable[[object], object]) -> dict[str, object]:
    from torch.utils._pytree import tree_map

    return cast("dict[str, object]", tree_map(change, dict(kwargs)))


def _numbers(value: object) -> object:
    """What takes a tensor's place where numbers are moved: its own numbers, -1 for constants; indices stay."""
    import torch

    if not isinstance(value, torch.Tensor):
        return value
    numbers = numbers_of(value)
    if numbers is None and value.is_floating_point():
        return torch.full(value.shape, -1, dtype=torch.int64)
    return value if numbers is None else numbers


def _activate(tensor: torch.Tensor) -> None:
    tensor._ckpt_active = True  # type: ignore[attr-defined]


def _is_active(tensor: torch.Tensor) -> bool:
    return bool(getattr(tensor, "_ckpt_active", False))


def _activated(made: object, is_active: bool) -> object:
    """What an operation gave, marked where it depends on the model's input."""
    if is_active:
        for tensor in _tensors(made):
            _activate(tensor)
    return made
