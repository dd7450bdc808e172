"""Initialising what a checkpoint did not bring, by a named scheme, and a record of what it touched.

torch is imported inside the functions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod, sqrt
from typing import TYPE_CHECKING, TypeAlias

from ..errors import EditError, listed
from ..models.load_into import LoadReport
from ..text import Shown
from .selectors import Anatomy, Selectors, anatomy, chosen, is_norm

if TYPE_CHECKING:
    import torch

    Fill: TypeAlias = Callable[[torch.Tensor], object]
    Scheme: TypeAlias = Callable[[torch.nn.Module, str, torch.Tensor, torch.Generator | None], None]

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, slots=True, repr=False)
class Initialized(Shown):
    """What :func:`initialize` touched, key by key, and how; ``str()`` of it is a table."""

    how: dict[str, str]

    @property
    def keys(self) -> tuple[str, ...]:
        """Every parameter and buffer that has another value now."""
        return tuple(self.how)


def initialize(
    model: torch.nn.Module,
    what: Selectors | LoadReport,
    how: str | Fill,
    *,
    generator: torch.Generator | None = None,
    **options: object,
) -> Initialized:
    """Initialise parameters by a named scheme; all or nothing, returns what was touched.

    ``what`` chooses keys (see :mod:`.selectors`), or is the report of :func:`load_into`: what it says was
    not loaded.  ``how`` is one of

    * a function of torch.nn.init by name, its last underscore optional, with its ``options``: ``"kaiming_normal"``,
      ``"xavier_uniform"``, ``"trunc_normal"`` with ``std=0.02``, ``"zeros"``, ``"ones"``, ``"constant"`` with ``val``;
    * ``"conv_normal_fan_out"``: weights of convolutions from N(0, √(2 / (kernel elements × output channels))), as in
      https://arxiv.org/abs/1502.01852; norm weights 1, biases 0;
    * ``"bilinear"``: transposed convolutions as bilinear upsampling, from each channel to itself;
    * ``"reset_parameters"``: what the module's own method gives to these parameters;
    * a function of a tensor that fills it.

    Running statistics among the keys are reset.  ``generator`` seeds what is drawn.  Raises NothingMatched,
    EditError naming every key that the scheme has no rule for, a tied parameter of which another name is not chosen,
    or one on the meta device; then nothing has changed.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    >>> touched = initialize(model, "*", "conv_normal_fan_out", generator=torch.Generator().manual_seed(0))
    >>> touched.how["0.weight"], touched.how["1.weight"]
    ('conv_normal_fan_out', 'ones')
    """
    import torch

    parts = anatomy(model)
    keys = chosen(parts, what.initialized if isinstance(what, LoadReport) else what)
    ordered = [key for key in (*parts.parameters, *parts.buffers) if key in keys]
    _check(parts, ordered)
    scheme = _scheme(how, options)
    made: dict[str, torch.Tensor] = {}
    described: dict[str, str] = {}
    problems = []
    for key in ordered:
        first = parts.names_of(parts.parameters[key])[0] if key in parts.parameters else key
        if first in described:
            described[key] = f"as {first}"
            continue
        try:
            made[key], described[key] = _value(parts, key, how, scheme, generator)
        except (ValueError, TypeError, RuntimeError) as error:
            problems.append(f"{key!r}: {' '.join(str(error).split())}")
    if problems:
        raise EditError(problems, remedy=f"choose other keys, or another scheme than {_called(how)}")
    with torch.no_grad():
        for key, value in made.items():
            _tensor(parts, key).copy_(value)
    return Initialized(described)


def _tensor(parts: Anatomy, key: str) -> torch.Tensor:
    return parts.parameters[key] if key in parts.parameters else parts.buffers[key]


def _check(parts: Anatomy, keys: list[str]) -> None:
    if not keys:
        raise EditError(["nothing is to be initialised: no key was given"])
    problems = []
    for key in keys:
        if _tensor(parts, key).is_meta:
            problems.append(f"{key!r} is on the meta device: give it memory first (model.to_empty)")
        if key in parts.buffers and key.rpartition(".")[2] not in STATISTICS:
            problems.append(f"{key!r} is a buffer that no scheme knows; leave it out")
        names = parts.names_of(parts.parameters[key]) if key in parts.parameters else []
        if others := [name for name in names if name not in keys]:
            problems.append(f"{key!r} is the same parameter as {listed(others)}, which is not chosen")
    if problems:
        raise EditError(problems)


def _value(
    parts: Anatomy, key: str, how: str | Fill, scheme: Scheme, generator: torch.Generator | None
) -> tuple[torch.Tensor, str]:
    """A fresh value for one key, on the generator's device, and how it came about."""
    import torch

    if key in parts.buffers:
        return torch.full_like(parts.buffers[key], int(key.endswith("running_var"))), "reset"
    parameter = parts.parameters[key]
    value = torch.empty_like(parameter, requires_grad=False, device=generator.device if generator else None)
    module, leaf = parts.owner(key), key.rpartition(".")[2]
    if how == "conv_normal_fan_out" and (is_norm(module) or leaf == "bias"):
        is_one = is_norm(module) and leaf == "weight"
        return value.fill_(int(is_one)), "ones" if is_one else "zeros"
    scheme(module, leaf, value, generator)
    return value, _called(how)


def _called(how: str | Fill) -> str:
    return how if isinstance(how, str) else getattr(how, "__name__", type(how).__name__)


# -- schemes


def _scheme(how: str | Fill, options: dict[str, object]) -> Scheme:
    """The function for a scheme.  Raises EditError for a name that is none."""
    import torch

    if callable(how):
        return lambda module, leaf, value, generator: _filled(how, value, generator, options)
    own: dict[str, Scheme] = {"conv_normal_fan_out": _conv_normal, "bilinear": _bilinear, "reset_parameters": _reset}
    if how in own:
        if options:
            raise EditError([f"{how} takes no options, not {', '.join(options)}"])
        return own[how]
    name = how.rstrip("_") + "_"
    found = getattr(torch.nn.init, name, None)
    if found is None or name.startswith("_"):
        there = [one[:-1] for one in dir(torch.nn.init) if one.endswith("_") and not one.startswith("_")]
        raise EditError([f"no scheme is called {how!r}; there are {', '.join([*own, *there])}"])
    return lambda module, leaf, value, generator: _filled(found, value, generator, options)


def _filled(
    fill: Callable[..., object], value: torch.Tensor, generator: torch.Generator | None, options: dict[str, object]
) -> None:
    """Call a function that fills a tensor in place; where it takes no generator, the global one is seeded for it."""
    from inspect import signature

    if generator is not None and "generator" in signature(fill).parameters:
        fill(value, generator=generator, **options)
        return
    with _seeded(generator):
        fill(value, **options)


@contextmanager
def _seeded(generator: torch.Generator | None) -> Iterator[None]:
    """The global generator follows this one for a while; afterwards it is what it was."""
    import torch

    with torch.random.fork_rng(enabled=generator is not None):
        if generator is not None:
            torch.manual_seed(int(torch.randint(1 << 62, (), generator=generator, device=generator.device)))
        yield


def _conv_normal(module: torch.nn.Module, leaf: str, value: torch.Tensor, generator: torch.Generator | None) -> None:
    from torch import nn

    if not isinstance(module, nn.modules.conv._ConvNd) or leaf != "weight":
        raise ValueError(f"{leaf} of {type(module).__name__} is no convolution's, no norm's and no bias")
    value.normal_(0.0, sqrt(2.0 / (prod(module.kernel_size) * module.out_channels)), generator=generator)


def _bilinear(module: torch.nn.Module, leaf: str, value: torch.Tensor, generator: torch.Generator | None) -> None:
    """The kernel of Long, Shelhamer, Darrell (https://arxiv.org/abs/1411.4038), in any number of dimensions."""
    import torch
    from torch import nn

    if not isinstance(module, nn.modules.conv._ConvTransposeNd):
        raise ValueError(f"{type(module).__name__} is no transposed convolution")
    if leaf == "bias":
        value.zero_()
        return
    kernel = torch.ones((), dtype=torch.float64)
    for size in module.kernel_size:
        factor = (size + 1) // 2
        center = factor - 1 if size % 2 else factor - 0.5
        line = 1 - (torch.arange(size, dtype=torch.float64) - center).abs() / factor
        kernel = kernel[..., None] * line
    inputs, outputs = value.shape[:2]
    value.zero_()
    if module.groups == module.in_channels == module.out_channels:
        value[:, 0] = kernel.to(value)
    elif module.groups == 1 and inputs == outputs:
        value[range(inputs), range(inputs)] = kernel.to(value)
    else:
        raise ValueError(f"{module.in_channels} channels become {module.out_channels}: none of them is its own")


def _reset(module: torch.nn.Module, leaf: str, value: torch.Tensor, generator: torch.Generator | None) -> None:
    """What a module's own ``reset_parameters`` gives to one of its parameters, found on a copy of the module."""
    names = [name for name in ("reset_parameters", "_reset_parameters") if callable(getattr(module, name, None))]
    if not names:
        raise ValueError(f"{type(module).__name__} has no reset_parameters")
    twin = copy.deepcopy(module)
    with _seeded(generator):
        getattr(twin, names[0])()
    value.copy_(twin.get_parameter(leaf).detach())
