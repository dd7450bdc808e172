"""Edits that fit tensors to another size: rows, classes, input channels, position grids.

Each is asked for by pattern and size and never guessed.  What they make is computed when it is written, one tensor at
a time in memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from ..errors import EditError
from ..tensors.arithmetic import by_torch
from ..tensors.checkpoint import Checkpoint
from ..tensors.records import ComputedTensor, Tensor
from ..tensors.slabs import by_slabs
from ..tensors.views import axis_of, concatenated, filled, sliced
from .arguments import Patterns
from .change import Change, Inline, matching
from .value_edit import each, value_edit

if TYPE_CHECKING:
    import torch

FILLS = ("error", "zero", "mean", "normal")
CHANNEL_MODES = ("sum", "mean", "repeat", "copy", "copy-mean")
ANTIALIAS = ("shrinking", "always", "never")

Fill = Annotated[Literal["error", "zero", "mean", "normal"], "What new rows get; error refuses to make any."]
Seed = Annotated[int, "The seed of the random fill."]
ChannelMode = Annotated[
    Literal["error", "sum", "mean", "repeat", "copy", "copy-mean"],
    "How: sum or mean of the old channels (to fewer), repeat them, copy them with zeros or their mean behind.",
]
Antialias = Annotated[
    Literal["shrinking", "always", "never"], "When the interpolation is antialiased: timm always, transformers never."
]
GridMode = Annotated[Literal["bicubic", "bilinear"], "How values between those of the old grid are found."]


@value_edit(
    "Cut or pad rows (vocabularies, class heads).",
    "llm.pth grown.pth 'embed_tokens.weight' 'lm_head.weight' --rows 32002 --fill mean",
    inline=[Inline("{patterns}={rows}")],
    fills="fill",
)
def resize_rows(
    state_dict: Checkpoint,
    patterns: Annotated[Patterns, "Globs on keys."],
    rows: Annotated[int, "How many rows there should be."],
    *,
    old: Annotated[int, "How many rows there have to be now; 0 takes any number."] = 0,
    fill: Fill = "error",
    dim: Annotated[int, "The dimension of the rows."] = 0,
    seed: Seed = 0,
) -> Change[Checkpoint]:
    """Cut tensors to their first ``rows`` indices of a dimension, or pad them: vocabularies, class heads.

    ``old`` is how many there have to be now, if that is stated.  ``fill`` is what new rows get: "zero", the "mean" of
    the old ones, or "normal": drawn with the old rows' mean and deviation, by ``seed``.  Raises NothingMatched,
    EditError.

    >>> import torch
    >>> resize_rows({"embed.weight": torch.ones(2, 3)}, "embed.weight", 4, fill="mean")["embed.weight"].shape
    torch.Size([4, 3])
    """
    check(rows >= 0, f"{rows} rows")
    check(fill in FILLS, f"fill {fill!r} is none of {', '.join(FILLS)}")

    def resized(key: str, tensor: Tensor) -> Tensor:
        axis = axis_of(key, tensor, dim)
        held = tensor.shape[axis]
        if old not in (0, held):
            raise EditError([f"{key!r} has {held:,} rows, not {old:,}"])
        if rows > held and fill == "error":
            raise EditError([f"{key!r} has {held:,} rows, {rows - held:,} more need a fill: zero, mean or normal"])

        if rows <= held or fill == "zero":
            return _of_size(tensor, axis, rows)

        def compute(values: torch.Tensor) -> torch.Tensor:
            import torch

            return torch.cat([values, _filling(values, axis, rows - held, fill, seed)], axis)

        return computed(tensor, (*tensor.shape[:axis], rows, *tensor.shape[axis + 1 :]), compute)

    return each(state_dict, matching(state_dict, patterns), resized)


def _filling(values: torch.Tensor, axis: int, count: int, fill: str, seed: int) -> torch.Tensor:
    """New rows beside old ones."""
    import torch

    shape = [*values.shape[:axis], count, *values.shape[axis + 1 :]]
    if fill == "zero" or not values.shape[axis]:
        return torch.zeros(shape, dtype=values.dtype)
    wide = values.double()
    mean = wide.mean(axis, keepdim=True)
    if fill == "mean":
        return mean.expand(shape).to(values.dtype)
    noise = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (mean + noise * wide.std(axis, keepdim=True, correction=0)).to(values.dtype)


@value_edit(
    "Reorder a head's rows by class name.",
    "model.pth mapped.pth 'fc.*' --old cat,dog,bird --new dog,fish --fill zero",
    fills="fill",
)
def map_classes(
    state_dict: Checkpoint,
    patterns: Annotated[Patterns, "Globs on keys."],
    old: Annotated[Sequence[str], "The class names in the order of the rows now."],
    new: Annotated[Sequence[str], "The class names in the order that is wanted."],
    *,
    fill: Fill = "error",
    seed: Seed = 0,
) -> Change[Checkpoint]:
    """Reorder a class head's rows by class name: ``old`` and ``new`` list the names in the order of the rows.

    Classes that only ``new`` has get rows by ``fill`` (see :func:`resize_rows`), those that only ``old`` has go.
    Raises NothingMatched, EditError.

    >>> import torch
    >>> map_classes({"fc.bias": torch.tensor([1.0, 2.0])}, "fc.*", ["cat", "dog"], ["dog", "cat"])["fc.bias"]
    tensor([2., 1.])
    """
    check(fill in FILLS, f"fill {fill!r} is none of {', '.join(FILLS)}")
    check(len(set(old)) == len(old), "a class stands twice among the old ones")
    places = {name: row for row, name in enumerate(old)}
    unknown = [name for name in new if name not in places]
    check(
        not unknown or fill != "error",
        f"{len(unknown)} new classes ({', '.join(unknown[:3])}) need a fill: zero, mean or normal",
    )

    def mapped(key: str, tensor: Tensor) -> Tensor:
        if not tensor.shape or tensor.shape[0] != len(old):
            raise EditError([f"{key!r} has shape {list(tensor.shape)}, the old classes are {len(old):,}"])

        def compute(values: torch.Tensor) -> torch.Tensor:
            import torch

            rows = torch.tensor([places.get(name, 0) for name in new])
            chosen = values.index_select(0, rows)
            fresh = torch.tensor([name not in places for name in new])
            if fresh.any():
                chosen[fresh] = _filling(values, 0, int(fresh.sum()), fill, seed)
            return chosen

        return computed(tensor, (len(new), *tensor.shape[1:]), compute)

    return each(state_dict, matching(state_dict, patterns), mapped)


@value_edit(
    "Change the input channels of convolutions.",
    "rgb.pth grey.pth 'conv1.weight' --channels 1 --mode sum",
    inline=[Inline("{patterns}={channels}")],
    computes=True,
)
def resize_channels(
    state_dict: Checkpoint,
    patterns: Annotated[Patterns, "Globs on keys."],
    channels: Annotated[int, "How many input channels there should be."],
    *,
    mode: ChannelMode = "error",
) -> Change[Checkpoint]:
    """Change the input channels of convolutions (dimension 1), keeping the scale of their activations.

    ``mode`` says how: "sum" (to fewer: each new channel is the sum of its share of the old ones, which gives grey
    images what RGB gave), "mean" (the same, divided by the share), "repeat" (to more: the old ones in turn, scaled by
    old / new), "copy" (the first ones as they are, zeros behind), "copy-mean" (the old ones as they are, the mean of
    them behind: for a fourth channel beside RGB).  Raises NothingMatched, EditError.

    >>> import torch
    >>> resize_channels({"conv1.weight": torch.ones(1, 3, 1, 1)}, "conv1.weight", 1, mode="sum")["conv1.weight"].item()
    3.0
    """
    check(mode in CHANNEL_MODES, f"the mode has to be stated: {', '.join(CHANNEL_MODES)}")
    check(channels > 0, f"{channels} channels")

    def resized(key: str, tensor: Tensor) -> Tensor:
        if len(tensor.shape) < 3:
            raise EditError([f"{key!r} of shape {list(tensor.shape)} is no convolution"])
        old = tensor.shape[1]
        if mode in ("sum", "mean") and old % channels:
            raise EditError([f"{key!r} has {old} channels, which {channels} do not share evenly; repeat or copy them"])
        if mode == "copy-mean" and channels < old:
            raise EditError([f"{key!r} has {old} channels, and copy-mean only adds some; sum or copy to fewer"])
        if mode == "copy" or channels == old:
            return _of_size(tensor, 1, channels)
        if mode == "copy-mean":
            return concatenated([tensor, *[_mean_of_channels(key, tensor)] * (channels - old)], 1)

        def compute(values: torch.Tensor) -> torch.Tensor:
            if mode in ("sum", "mean"):
                shares: torch.Tensor = values.unflatten(1, (old // channels, channels))
                return shares.sum(1) if mode == "sum" else shares.mean(1)
            repeated = values.repeat(1, math.ceil(channels / old), *[1] * (values.dim() - 2))
            return repeated[:, :channels] * (old / channels)

        return computed(tensor, (tensor.shape[0], channels, *tensor.shape[2:]), compute)

    return each(state_dict, matching(state_dict, patterns), resized)


def _mean_of_channels(key: str, tensor: Tensor) -> Tensor:
    """The mean over dimension 1, which stays with size 1; computed in float64."""
    if not tensor.dtype.is_floating or not tensor.shape[1]:
        raise EditError([f"{key!r} ({tensor.dtype} {list(tensor.shape)}) has no channels with a mean"])
    shape = (tensor.shape[0], 1, *tensor.shape[2:])
    return by_slabs(key, [tensor], shape, lambda start, stop, rows: rows.mean(1, keepdims=True))


@value_edit(
    "Interpolate position embeddings.",
    "vit.pth large.pth 'pos_embed' --grid 14x14:24x24 --prefix-tokens 1",
    inline=[Inline("{patterns}={grid}")],
    computes=True,
)
def resize_grid(
    state_dict: Checkpoint,
    patterns: Annotated[Patterns, "Globs on keys."],
    grid: Annotated[str, "The old and the new grid, as 14x14:32x32; in fit, auto is that of square ones."],
    *,
    prefix_tokens: Annotated[int, "How many class tokens stand in front of the grid."] = 0,
    mode: GridMode = "bicubic",
    antialias: Antialias = "shrinking",
) -> Change[Checkpoint]:
    """Interpolate position embeddings from one grid to another: ``grid`` is OLD:NEW, as ``14x14:32x32``.

    Of shape [1, N, C] or [N, C], with ``prefix_tokens`` class tokens in front that stay as they are.  Computed in
    float32 by torch's interpolate (``mode`` bicubic or bilinear), antialiased when it shrinks; with ``antialias``
    "always" as timm's resample_abs_pos_embed does it, with "never" as transformers' interpolate_pos_encoding.  Raises
    NothingMatched, EditError.

    >>> import torch
    >>> state = {"pos_embed": torch.zeros(1, 5, 8)}
    >>> resize_grid(state, "pos_embed", "2x2:4x4", prefix_tokens=1)["pos_embed"].shape
    torch.Size([1, 17, 8])
    """
    if grid == "auto":
        refuse_auto(state_dict, patterns)
    before, after = parse_grid(grid)

    def resized(key: str, tensor: Tensor) -> Tensor:
        length = tensor.shape[-2] if len(tensor.shape) in (2, 3) else -1
        if length != prefix_tokens + before[0] * before[1] or (len(tensor.shape) == 3 and tensor.shape[0] != 1):
            raise EditError(
                [f"{key!r} of shape {list(tensor.shape)} is no {before[0]}x{before[1]} grid and {prefix_tokens} tokens"]
            )

        def compute(values: torch.Tensor) -> torch.Tensor:
            import torch

            flat = values.reshape(length, -1)
            tokens, cells = flat[:prefix_tokens], flat[prefix_tokens:]
            made = torch.cat([tokens, _interpolated(cells, before, after, mode, antialias).to(values.dtype)])
            return made.reshape(*values.shape[:-2], *made.shape)

        cells = prefix_tokens + after[0] * after[1]
        return computed(tensor, (*tensor.shape[:-2], cells, tensor.shape[-1]), compute)

    return each(state_dict, matching(state_dict, patterns), resized)


@value_edit(
    "Interpolate relative-position tables.",
    "swin.pth large.pth '*relative_position_bias_table' --window 7x7:12x12",
    inline=[Inline("{patterns}={window}")],
    computes=True,
)
def resize_bias_table(
    state_dict: Checkpoint,
    patterns: Annotated[Patterns, "Globs on keys."],
    window: Annotated[str, "The old and the new window, as 7x7:12x12; in fit, auto is that of square ones."],
    *,
    mode: GridMode = "bicubic",
) -> Change[Checkpoint]:
    """Interpolate relative-position tables from one window to another: ``window`` is OLD:NEW, as ``7x7:12x12``.

    A table has (2h - 1)(2w - 1) rows, one column a head (Swin).  The index that goes with it is the model's own:
    drop it with ``drop --derivable``.  Raises NothingMatched, EditError.

    >>> import torch
    >>> state = {"relative_position_bias_table": torch.zeros(9, 4)}
    >>> resize_bias_table(state, "*_table", "2x2:3x3")["relative_position_bias_table"].shape
    torch.Size([25, 4])
    """
    if window == "auto":
        refuse_auto(state_dict, patterns)
    old, new = parse_grid(window)
    before, after = (2 * old[0] - 1, 2 * old[1] - 1), (2 * new[0] - 1, 2 * new[1] - 1)

    def resized(key: str, tensor: Tensor) -> Tensor:
        if len(tensor.shape) != 2 or tensor.shape[0] != before[0] * before[1]:
            raise EditError([f"{key!r} of shape {list(tensor.shape)} is no table of a {old[0]}x{old[1]} window"])

        def compute(values: torch.Tensor) -> torch.Tensor:
            return _interpolated(values, before, after, mode).to(values.dtype)

        return computed(tensor, (after[0] * after[1], tensor.shape[1]), compute)

    return each(state_dict, matching(state_dict, patterns), resized)


def _interpolated(
    cells: torch.Tensor, before: tuple[int, int], after: tuple[int, int], mode: str, antialias: str = "shrinking"
) -> torch.Tensor:
    """Rows of a grid, [h * w, C], at another resolution."""
    from torch.nn.functional import interpolate

    picture = cells.float().reshape(1, *before, -1).permute(0, 3, 1, 2)
    shrinks = after[0] < before[0] or after[1] < before[1]
    smooth = antialias == "always" or (antialias == "shrinking" and shrinks)
    scaled = interpolate(picture, size=after, mode=mode, align_corners=False, antialias=smooth)
    return scaled.permute(0, 2, 3, 1).reshape(after[0] * after[1], -1)


def parse_grid(text: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Two grids from ``14x14:32x32``.  Raises EditError: a grid is stated, never guessed.

    >>> parse_grid("14x14:7x28")
    ((14, 14), (7, 28))
    """
    found = re.fullmatch(r"(\d+)x(\d+):(\d+)x(\d+)", text)
    if found is None or "0" in found.groups():
        raise EditError([f"{text!r} is no pair of grids; write it like 14x14:32x32"])
    rows, columns, new_rows, new_columns = map(int, found.groups())
    return (rows, columns), (new_rows, new_columns)


def refuse_auto(state_dict: Checkpoint, patterns: Patterns) -> None:
    """Raise EditError for a size that only a model tells; NothingMatched for keys that are not there comes first."""
    matching(state_dict, patterns)
    raise EditError(["sizes are read from a model by fit alone"], remedy="state the size")


def check(holds: bool, problem: str) -> None:
    """Raise EditError with a problem unless something holds."""
    if not holds:
        raise EditError([problem])


def _of_size(tensor: Tensor, axis: int, size: int) -> Tensor:
    """A tensor cut to a size along one dimension, or padded with zeros behind."""
    held = tensor.shape[axis]
    if size <= held:
        return sliced(tensor, axis, 0, size)
    return concatenated([tensor, filled(tensor, axis, size - held, 0.0)], axis)


def computed(tensor: Tensor, shape: tuple[int, ...], compute: Callable[[torch.Tensor], torch.Tensor]) -> ComputedTensor:
    """A tensor that torch computes from one whole input when it is written."""
    return ComputedTensor(tensor.dtype, shape, (tensor,), lambda inputs: by_torch(inputs, compute, tensor.dtype))
