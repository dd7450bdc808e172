"""The two orders in which rows of queries and keys stand for rotary embeddings.

A head has pairs of rows that are turned together.  Meta's Llama, and llama.cpp for models of that architecture, has
the two of a pair next to each other; transformers has the first of all pairs, then the second of all (``rotate_half``
in ``modeling_llama.py``; ``permute`` in its ``convert_llama_weights_to_hf.py`` and in llama.cpp's
``convert_hf_to_gguf.py``).
"""

from __future__ import annotations

from math import prod
from typing import Annotated, Literal

from ..errors import Argument, EditError, Phrase
from ..tensors.checkpoint import Checkpoint
from ..tensors.records import Tensor
from ..tensors.strides import row_major
from ..tensors.views import reshaped, restrided, viewed
from .arguments import Patterns
from .change import AllowUnmatched, Change, matching
from .value_edit import each, value_edit

_WIDTHS = ("attention.key_length", "embedding_length", "attention.head_count")  # in the metadata of a GGUF file

_IN_PAIRS = ("llama",)  # architectures of llama.cpp that are known to have the rows of a pair side by side


@value_edit(
    "Reorder the rows of queries and keys for rotary embeddings.",
    "llama.pth hf.pth '*.attention.w[qk].weight' --to halves --head-dim 128",
)
def rotary(
    state_dict: Checkpoint,
    patterns: Annotated[Patterns, "Globs on keys: weights and biases of queries and keys."],
    to: Annotated[
        Literal["halves", "pairs"], "Rows of a head: first all first ones (transformers), or pair by pair (Meta, GGUF)."
    ],
    *,
    head_dim: Annotated[int, "Rows of a head; 0 takes them from the metadata of a GGUF file."] = 0,
    allow_unmatched: AllowUnmatched = False,
) -> Change[Checkpoint]:
    """Bring the rows of queries and keys into the other order of rotary embeddings, head by head.

    To ``halves`` turns Meta's and GGUF's order into that of transformers, to ``pairs`` is the way back.  All heads have
    ``head_dim`` rows.  Raises NothingMatched, EditError naming every tensor whose rows are no whole heads.

    >>> import torch
    >>> rotary({"wq.bias": torch.arange(4)}, "wq.*", to="halves", head_dim=4)["wq.bias"]
    tensor([0, 2, 1, 3])
    """  # fmt: skip
    if head_dim < 0 or head_dim % 2:
        raise EditError([Phrase(Argument("head_dim"), f" has to be even and positive, and is {head_dim}")])
    chosen = matching(state_dict, patterns, allow_unmatched=allow_unmatched)
    size = head_dim or (_head_dim(state_dict) if chosen else 0)

    def turned(key: str, tensor: Tensor) -> Tensor:
        if not tensor.shape or tensor.shape[0] % size:
            raise EditError([f"{key!r} of shape {list(tensor.shape)} is not made of heads of {size} rows"])
        return _turned(key, tensor, size, to_halves=to == "halves")

    return each(state_dict, chosen, turned)


def _turned(key: str, tensor: Tensor, size: int, *, to_halves: bool) -> Tensor:
    """The rows of each head as a matrix of pairs, turned over."""
    view = viewed(tensor)
    if not view.is_contiguous:
        view = viewed(reshaped(key, view, view.shape))
    heads, rest = view.shape[0] // size, view.shape[1:]
    inner = (size // 2, 2) if to_halves else (2, size // 2)
    step = prod(rest)
    shape = (heads, inner[1], inner[0], *rest)
    stride = (size * step, step, inner[1] * step, *row_major(rest))
    return reshaped(key, restrided(view, shape, stride, view.offset), tensor.shape)


def _head_dim(state_dict: Checkpoint) -> int:
    """Rows of a head, as the metadata of a GGUF file has them.

    Raises EditError where it does not, and for an architecture whose rows are not known to stand in pairs.
    """
    architecture = state_dict.metadata.get("general.architecture", "")
    if architecture not in ("", *_IN_PAIRS):
        problem = f"the file is of llama.cpp's architecture {architecture!r}, whose rows may stand as in transformers"
        raise EditError([problem], remedy=Phrase("if they do not, give ", Argument("head_dim", 128)))
    texts = [state_dict.metadata.get(f"{architecture}.{name}", "") for name in _WIDTHS]
    own, width, heads = (int(text) if text.isdecimal() and len(text) < 10 else 0 for text in texts)
    if own and not own % 2:
        return own
    if not width or not heads or width % (2 * heads):
        problem = "the metadata does not say how many rows a head has"
        raise EditError([problem], remedy=Phrase("give ", Argument("head_dim", 128)))
    return width // heads
