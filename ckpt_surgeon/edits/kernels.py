"""Edits that give the kernels of convolutions another size: in space, and in time.

Each is asked for by pattern and size and never guessed.
"""

from __future__ import annotations

import re
from math import prod
from typing import TYPE_CHECKING, Annotated, Literal

from ..errors import EditError
from ..tensors.checkpoint import Checkpoint
from ..tensors.records import Tensor
from ..tensors.slabs import by_slabs
from .arguments import Patterns
from .change import Change, Inline, matching
from .resize import check, computed, refuse_auto
from .value_edit import each, value_edit

if TYPE_CHECKING:
    import torch

    from ..tensors.conversion import Array

KERNEL_MODES = ("flexivit", "bicubic")
INFLATE_MODES = ("repeat", "centre")

KernelMode = Annotated[
    Literal["flexivit", "bicubic"],
    "How: flexivit keeps what resized patches give (pseudo-inverse), bicubic resizes the kernel as a picture.",
]
InflateMode = Annotated[
    Literal["repeat", "centre"], "How: the kernel in every frame, divided by their number, or in the middle one alone."
]


@value_edit(
    "Resize patch embeddings (ViT).",
    "vit.pth patch32.pth 'patch_embed.proj.weight' --size 32x32",
    inline=[Inline("{patterns}={size}")],
    computes=True,
)
def resize_kernel(
    state_dict: Checkpoint,
    patterns: Annotated[Patterns, "Globs on keys."],
    size: Annotated[str, "The new size, as 32x32; in fit, auto is the model's."],
    *,
    mode: KernelMode = "flexivit",
) -> Change[Checkpoint]:
    """Resize the kernels of patch embeddings, [out, in, h, w], to ``size``.

    A patch x of h w pixels that is resized is R x (bicubic, antialiased).  With ``mode`` "flexivit" a kernel w becomes
    (Rᵀ)⁺ w, whose product with a resized patch is as near to that of w with the patch as can be, and equal where
    patches grow: Beyer et al. 2023, FlexiViT, section 3.4, as timm's resample_patch_embed has it.  With "bicubic" it
    becomes R w, resized as a picture, so that its product grows with the number of pixels.  Computed in float32.
    Raises NothingMatched, EditError.

    >>> import torch
    >>> state = {"patch_embed.proj.weight": torch.ones(1, 1, 2, 2)}
    >>> resize_kernel(state, "*.proj.weight", "4x4")["patch_embed.proj.weight"].sum()  # the sum of 4 pixels as of 16
    tensor(4.)
    """
    if size == "auto":
        refuse_auto(state_dict, patterns)
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size)
    check(found is not None, f"{size!r} is no size of a kernel; write it like 32x32")
    assert found is not None
    after = (int(found[1]), int(found[2]))

    def resized(key: str, tensor: Tensor) -> Tensor:
        if len(tensor.shape) != 4 or not tensor.dtype.is_floating or not prod(tensor.shape):
            raise EditError([f"{key!r} ({tensor.dtype} {list(tensor.shape)}) is no weight of a 2D convolution"])
        if tensor.shape[2:] == after:
            return tensor
        before = (tensor.shape[2], tensor.shape[3])

        def compute(values: torch.Tensor) -> torch.Tensor:
            import torch

            matrix = _resizing(before, after)
            flat = values.float().flatten(2)
            made = flat @ (torch.linalg.pinv(matrix) if mode == "flexivit" else matrix.t())
            resized: torch.Tensor = made.unflatten(2, after)
            return resized

        return computed(tensor, (*tensor.shape[:2], *after), compute)

    return each(state_dict, matching(state_dict, patterns), resized)


def _resizing(before: tuple[int, int], after: tuple[int, int]) -> torch.Tensor:
    """The matrix that resizes a picture, [pixels after, pixels before]: the pictures of one pixel each, resized."""
    import torch
    from torch.nn.functional import interpolate

    pictures = torch.eye(prod(before)).reshape(-1, 1, *before)
    resized: torch.Tensor = interpolate(pictures, size=after, mode="bicubic", align_corners=False, antialias=True)
    matrix: torch.Tensor = resized.flatten(1).t()
    return matrix


@value_edit(
    "Inflate 2D convolutions to 3D.",
    "resnet.pth video.pth 'layer1.*.conv?.weight' --frames 3",
    inline=[Inline("{patterns}={frames}")],
    computes=True,
)
def inflate(
    state_dict: Checkpoint,
    patterns: Annotated[Patterns, "Globs on keys."],
    frames: Annotated[int, "The size of the new dimension; in fit, 0 is the model's."],
    *,
    mode: InflateMode = "repeat",
) -> Change[Checkpoint]:
    """Inflate the kernels of 2D convolutions, [out, in, h, w], to 3D ones, [out, in, T, h, w].

    ``mode`` "repeat" has the kernel in each of ``frames`` T frames, divided by T, so that a picture that stands still
    gives what it gave (Carreira and Zisserman 2017, I3D, section 2.4).  "centre" has it in frame T // 2 alone, zeros in
    the others (Feichtenhofer et al. 2016; "central frame" of Arnab et al. 2021, ViViT, section 3.4).  Raises
    NothingMatched, EditError.

    >>> import torch
    >>> inflate({"conv1.weight": torch.ones(1, 1, 1, 1)}, "conv1.weight", 2)["conv1.weight"].flatten()
    tensor([0.5000, 0.5000])
    """
    if frames == 0:
        refuse_auto(state_dict, patterns)
    check(frames > 0, f"{frames} frames")

    def inflated(key: str, tensor: Tensor) -> Tensor:
        if len(tensor.shape) != 4 or not tensor.dtype.is_floating:
            raise EditError([f"{key!r} ({tensor.dtype} {list(tensor.shape)}) is no weight of a 2D convolution"])

        def formula(start: int, stop: int, rows: Array) -> Array:
            import numpy as np

            shape = (*rows.shape[:2], frames, *rows.shape[2:])
            if mode == "repeat":
                spread: Array = np.broadcast_to((rows / frames)[:, :, None], shape)
                return spread
            made: Array = np.zeros(shape)
            made[:, :, frames // 2] = rows
            return made

        return by_slabs(key, [tensor], (*tensor.shape[:2], frames, *tensor.shape[2:]), formula)

    return each(state_dict, matching(state_dict, patterns), inflated)
