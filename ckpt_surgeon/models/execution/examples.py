"""Inputs on which two models can be compared: pictures of the size that they want, or words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from ...errors import TargetError, text_of
from .elements import plainly

if TYPE_CHECKING:
    import torch

_SIZES = (96, 224, 64, 32, 299, 256, 384)
LONGEST = 1024  # words of an input
_SIZE_NAMES = ("image_size", "img_size", "input_size")


def example_for(source: torch.nn.Module, target: torch.nn.Module) -> torch.Tensor:
    """An input that both models take.  Raises TargetError where none is found."""
    problems: list[str] = []
    for example in _candidates(source, target):
        try:
            for model in (source, target):
                with plainly():
                    model(example)
        except Exception as error:  # whatever a model raises at an input that is not for it
            problems.append(f"{list(example.shape)}: {text_of(error, 120)}")
            continue
        return example
    raise TargetError(
        f"{type(source).__name__} and {type(target).__name__}",
        f"no input was found that both take ({problems[0] if problems else 'neither takes pictures nor words'})",
        remedy="give one with example=",
    )


def heads_of(*models: torch.nn.Module) -> tuple[int, ...]:
    """The numbers of attention heads that models speak of.

    >>> import torch
    >>> heads_of(torch.nn.MultiheadAttention(8, 2))
    (2,)
    """
    names = ("num_heads", "num_attention_heads", "n_head", "n_heads", "n_kv_heads", "num_key_value_heads")
    holders = [
        one for model in models for module in model.modules() for one in (module, getattr(module, "config", None))
    ]
    found = [getattr(holder, name, None) for holder in holders for name in names]
    return tuple(sorted({one for one in found if isinstance(one, int) and not isinstance(one, bool) and one > 1}))


def turns_rows(*models: torch.nn.Module) -> bool:
    """Whether a model speaks of rotary embeddings, for which the rows of queries and keys stand in one of two orders.

    >>> import torch
    >>> turns_rows(torch.nn.ModuleDict({"rotary_emb": torch.nn.Identity()})), turns_rows(torch.nn.Linear(2, 2))
    (True, False)
    """
    words = ("rotary", "rope", "freqs")
    return any(
        word in name.lower()
        for model in models
        for holder in model.modules()
        for name in (*vars(holder), *holder._buffers, *holder._modules)
        for word in words
    )


def reaching(
    source: torch.nn.Module, target: torch.nn.Module, example: torch.Tensor, tables: Iterable[int]
) -> torch.Tensor:
    """A longer input of words, that reaches more rows of ``tables`` (their numbers of rows); else ``example``.

    It is as long as a table of positions, if both models take it, and has the first and the last word.
    """
    import torch

    words = min((count for model in (source, target) if (count := _vocabulary(model))), default=0)
    if example.is_floating_point() or example.dim() != 2 or not words:
        return example
    generator = torch.Generator().manual_seed(2)
    lengths = {min(rows - less, LONGEST) for rows in tables for less in (0, 2)}
    for length in sorted((one for one in lengths if one > example.shape[1]), reverse=True):
        longer = torch.randperm(words, generator=generator)[torch.arange(length) % words]
        longer[0], longer[-1] = 0, words - 1
        with suppress(Exception):  # whatever a model raises at an input that is too long for it
            for model in (source, target):
                with plainly():
                    model(longer[None])
            return longer[None]
    return example


def _candidates(source: torch.nn.Module, target: torch.nn.Module) -> Iterator[torch.Tensor]:
    import torch

    generator = torch.Generator().manual_seed(1)
    words = min((count for model in (source, target) if (count := _vocabulary(model))), default=0)
    if words:
        yield torch.randint(0, words, (1, 9), generator=generator)
    channels = next((count for model in (source, target) if (count := _channels(model))), 0)
    if channels:
        for size in dict.fromkeys((*_sizes(source), *_sizes(target), *_SIZES)):
            yield torch.randn(1, channels, size, size, generator=generator, dtype=torch.float64)
    widths = {width for model in (source, target) if (width := _width(model))}
    for width in sorted(widths):
        yield torch.randn(16, width, generator=generator, dtype=torch.float64)


def _vocabulary(model: torch.nn.Module) -> int:
    import torch

    if getattr(model, "main_input_name", "input_ids") != "input_ids" or _channels(model):
        return 0
    tables = [module.num_embeddings for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    return max(tables, default=0)


def _channels(model: torch.nn.Module) -> int:
    import torch

    first = next((module for module in model.modules() if isinstance(module, torch.nn.Conv2d)), None)
    return first.in_channels if first is not None else 0


def _width(model: torch.nn.Module) -> int:
    import torch

    first = next((module for module in model.modules() if isinstance(module, torch.nn.Linear)), None)
    return first.in_features if first is not None else 0


def _sizes(model: torch.nn.Module) -> Iterator[int]:
    """The sizes of pictures that a model names as its own: only those that it insists on are worth the time."""
    holders = [getattr(model, "config", None), model, *islice_modules(model)]
    for holder in holders:
        for name in _SIZE_NAMES:
            size = getattr(holder, name, None)
            with suppress(TypeError, IndexError, ValueError):
                size = size[-1] if isinstance(size, (tuple, list)) else size
                if isinstance(size, int) and size > 0:
                    yield size


def islice_modules(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """A model's first modules: where a patch embedding is."""
    for number, module in enumerate(model.modules()):
        if number > 8:
            return
        yield module
