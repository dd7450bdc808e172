"""Weights as codes of ggml: what a GGUF file holds as they are, and others as the float32 that they stand for."""

from __future__ import annotations

from typing import Annotated, Literal

from ..tensors import ggml
from ..tensors.checkpoint import Checkpoint
from ..tensors.records import OpaqueTensor, Tensor
from ..text import plural
from .arguments import Patterns
from .change import AllowUnmatched, Change, listed_patterns, matching
from .companions import left_alone
from .value_edit import each, value_edit


@value_edit(
    "Round weights to codes of ggml, for a GGUF file.",
    "model.pth q8.pth --dtype q8_0 --except 'embed*'",
    computes=True,
)
def quantize(
    state_dict: Checkpoint,
    dtype: Annotated[Literal["q8_0"], "The codes: q8_0, 8-bit integers with a float16 scale for each 32 of a row."],
    *,
    only: Annotated[Patterns, "Quantise only keys that match this glob."] = (),
    except_: Annotated[Patterns, "Quantise no key that matches this glob."] = (),
    allow_unmatched: AllowUnmatched = False,
) -> Change[Checkpoint]:
    """Round weights to what codes of ggml stand for; a ``.gguf`` output holds the codes, any other float32.

    Floating-point tensors with at least two dimensions are quantised whose rows are whole blocks (32 numbers); others
    stay as they are, and are counted in a note.  The codes are those of the package ``gguf`` (``gguf.quants``), bit
    for bit.  Raises NothingMatched; EditError, when it is written, where that package is not installed.

    >>> import torch
    >>> quantize({"fc.weight": torch.full((1, 32), 127.0), "fc.bias": torch.ones(2)}, "q8_0")["fc.weight"].unique()
    tensor([127.])
    """
    coding = next(coding for coding in ggml.CODINGS.values() if coding.name == dtype)
    chosen = matching(state_dict, only, allow_unmatched=allow_unmatched) if listed_patterns(only) else set(state_dict)
    chosen -= matching(state_dict, except_, allow_unmatched=allow_unmatched)
    chosen -= left_alone(state_dict)
    fitting = {key for key in chosen if _fits(state_dict[key], coding)}

    def coded(key: str, tensor: Tensor) -> Tensor:
        codes = ggml.coded(tensor)
        return tensor if codes is not None and codes.coding == coding else ggml.encoded(tensor, coding)

    change = each(state_dict, fitting, coded)
    left = len(state_dict) - len(fitting)
    note = f"{plural(left, 'tensor')} of one dimension, of other rows or excepted stay as they are"
    return Change(change.before, change.result, change.origins, (*change.notes, *[note] * bool(left)))


def _fits(tensor: Tensor, coding: ggml.Coding) -> bool:
    """Whether a tensor has rows of whole blocks of real numbers."""
    if isinstance(tensor, OpaqueTensor) or not tensor.dtype.is_floating or tensor.dtype.itemsize < 2:
        return False
    return len(tensor.shape) > 1 and tensor.shape[-1] % coding.numbers == 0 and tensor.numel > 0
