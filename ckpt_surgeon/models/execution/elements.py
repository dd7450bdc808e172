"""A copy of a model in float64 whose values lie in one flat tensor, so that every element has a number.

torch is imported inside the functions.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from ...errors import TargetError

if TYPE_CHECKING:
    import torch

EPS = 1e-5  # what every normalisation of both models adds: the number is a setting, and in no checkpoint
_EPS_NAMES = ("eps", "epsilon", "variance_epsilon")


@dataclass(slots=True)
class Numbered:
    """A model whose floating parameters and persistent buffers are views of ``flat``, key after key.

    ``keys`` and ``offsets`` belong together; a key that shares its tensor with an earlier one is in ``ties`` alone.
    """

    model: torch.nn.Module
    flat: torch.Tensor
    keys: list[str]
    offsets: list[int]
    shapes: dict[str, tuple[int, ...]]
    ties: dict[str, str]
    number: dict[str, int]

    @classmethod
    def of(cls, model: torch.nn.Module, seed: int, eps: float | None = EPS) -> Numbered:
        """Copy a model and give it random values, and all of its normalisations this ``eps`` (None: each its own).

        Raises TargetError for a model without values, or that cannot be copied.
        """
        import torch

        twin = _copied(model, eps)
        tensors = {
            key: tensor
            for key, tensor in twin.state_dict(keep_vars=True).items()
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
        }
        firsts: dict[tuple[int, tuple[int, ...]], str] = {}
        ties: dict[str, str] = {}
        keys: list[str] = []
        for key, tensor in tensors.items():
            first = firsts.setdefault((tensor.data_ptr() if tensor.numel() else id(tensor), tuple(tensor.shape)), key)
            if first == key:
                keys.append(key)
            else:
                ties[key] = first
        offsets = [0]
        for key in keys:
            offsets.append(offsets[-1] + tensors[key].numel())
        made = cls(
            twin,
            torch.zeros(offsets[-1], dtype=torch.float64),
            keys,
            offsets,
            {key: tuple(tensor.shape) for key, tensor in tensors.items()},
            ties,
            {key: number for number, key in enumerate(keys)},
        )
        made.fill(seed)
        for key, tensor in tensors.items():
            tensor.data = made.values(key)
        for number, key in enumerate(keys):
            mark(tensors[key], torch.arange(offsets[number], offsets[number + 1]).view(tensors[key].shape))
        return made

    def span(self, key: str) -> tuple[int, int]:
        number = self.number[self.ties.get(key, key)]
        return self.offsets[number], self.offsets[number + 1]

    def values(self, key: str) -> torch.Tensor:
        begin, end = self.span(key)
        return self.flat[begin:end].view(self.shapes[key])

    def key_of(self, element: int) -> str:
        return self.keys[bisect_right(self.offsets, element) - 1]

    def fill(self, seed: int) -> None:
        """Values of the size that trained ones have: nothing dies out and nothing grows beyond bounds."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        self.flat.uniform_(-1, 1, generator=generator)
        for key in self.keys:
            values = self.values(key)
            if values.dim() > 1:
                fan_in = max(1, values[0].numel()) if values.shape[0] > 1 else 4
                values.mul_((4.5 / fan_in) ** 0.5)
            elif any(word in key.rpartition(".")[2] for word in ("bias", "beta", "mean")):
                values.mul_(0.4)
            else:
                values.mul_(0.5).add_(1)


def mark(tensor: torch.Tensor, numbers: torch.Tensor) -> None:
    """Say which elements of the flat tensor a tensor holds; -1 is a constant."""
    tensor._ckpt_numbers = numbers  # type: ignore[attr-defined]


def numbers_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """What :func:`mark` said, None for a tensor that holds no parameter's elements."""
    return cast("torch.Tensor | None", getattr(tensor, "_ckpt_numbers", None))


def _copied(model: torch.nn.Module, eps: float | None) -> torch.nn.Module:
    import torch

    name = type(model).__name__
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise TargetError(name, "has no values to run with (it is on the meta device)", remedy="build it on the CPU")
    try:
        twin = copy.deepcopy(model).cpu().double().eval()
    except Exception as error:  # whatever a model's own attributes raise when they are copied
        raise TargetError(name, f"cannot be copied to be run ({error})") from error
    for module in twin.modules():
        for attribute in _EPS_NAMES:
            if eps is not None and isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, eps)
        if isinstance(getattr(module, "fused_attn", None), bool):
            vars(module)["fused_attn"] = False  # timm: a bias of the scores is added where other libraries add it
    set_attention = getattr(twin, "set_attn_implementation", None)
    if callable(set_attention):
        with suppress(Exception):  # a family without an eager form runs as it is
            set_attention("eager")
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    _without_caches(twin)
    assert isinstance(twin, torch.nn.Module)
    return twin


def _without_caches(model: torch.nn.Module) -> None:
    """Let a model forget before each pass what it computed in an earlier one (LeViT's biases): values change here."""
    caches = [
        value
        for module in model.modules()
        for name, value in vars(module).items()
        if type(value) is dict and "cache" in name
    ]

    def forget(*_: object) -> None:
        for cache in caches:
            cache.clear()

    if caches:
        model.register_forward_pre_hook(forget)


def _in_double() -> AbstractContextManager[object]:
    """Keep float64 what a model would compute in float32: a softmax, a normalisation."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class InDouble(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            kwargs = kwargs or {}
            if func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float64:
                wanted = kwargs.get("dtype")
                if wanted is not None and wanted.is_floating_point:
                    kwargs = {**kwargs, "dtype": torch.float64}
            return func(*args, **kwargs)

    return cast("AbstractContextManager[object]", InDouble())  # type: ignore[no-untyped-call]


@contextmanager
def plainly(*, gradients: bool = False) -> Iterator[None]:
    """Run models without gradients (unless asked for) and without fused kernels, whatever the caller has set."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            torch.set_grad_enabled(gradients),
            sdpa_kernel(SDPBackend.MATH),
            torch.random.fork_rng(devices=[]),
            _in_double(),
        ):
            torch.manual_seed(0)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
