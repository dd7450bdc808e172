"""What can be done with tensors that are more than plain elements, which no writer can copy one by one."""

from __future__ import annotations

from ..errors import SHOWN, Argument, Either, Phrase
from .checkpoint import Checkpoint
from .records import OpaqueTensor

LEAVE_OUT = Phrase("leave them out by pattern (", Either("ckpt_surgeon.drop", "ckpt drop"), ")")
_WHOLE = Phrase(
    ", or keep them as they are: ",
    Either("save(open_run(…), 'OUT.pth')", "--whole with an OUT that ends in .pth"),
    " has the whole file",
)
_IN_PLACE = Phrase(
    ", and ", Either("rename_in_place(…)", "ckpt rename … --in-place"), " renames keys where they lie"
)  # fmt: skip
_ANEW = ", or load the file with torch.load and save it with torch.save, whose files can be kept whole"


def named_opaque(checkpoint: Checkpoint) -> str:
    """The tensors of a checkpoint that are more than plain elements, each with what it is; "" where there are none.

    >>> from ckpt_surgeon.tensors.dtypes import BY_NAME
    >>> named_opaque(Checkpoint({"fc.weight": OpaqueTensor("quantized", BY_NAME["qint8"], (2, 3))}))
    "'fc.weight' (quantized)"
    """
    named = [f"{key!r} ({tensor.kind})" for key, tensor in checkpoint.items() if isinstance(tensor, OpaqueTensor)]
    more = [f"{len(named) - SHOWN:,} more"] if len(named) > SHOWN else []
    return ", ".join([*named[:SHOWN], *more])


def ways_on(checkpoint: Checkpoint) -> Phrase:
    """What to do about tensors that are more than plain elements, as far as the file's container allows it."""
    is_here = checkpoint.path is not None and checkpoint.path.local is not None
    if checkpoint.container == "torch zip":
        return Phrase(LEAVE_OUT, _WHOLE, *([_IN_PLACE] if is_here else []))
    if checkpoint.container == "safetensors":
        return Phrase(LEAVE_OUT, *([_IN_PLACE] if is_here else []))
    return Phrase(LEAVE_OUT, *([_ANEW] if checkpoint.container == "torch legacy" else []))


def ways_beside(checkpoint: Checkpoint) -> Phrase:
    """What to do where the values of such a tensor were to be edited: edit others, and keep it or leave it out."""
    if checkpoint.part:
        return Phrase("take the elements that are there with ", Argument("allow_part", True))
    others = Phrase(
        "choose other keys by pattern, and leave this one out (", Either("ckpt_surgeon.drop", "ckpt drop"), ")"
    )
    if checkpoint.container != "torch zip":
        return others
    return Phrase(others, " or keep it: ", Either("edit open_run(…)", "--whole with an OUT that ends in .pth"))


def ways_to_load(checkpoint: Checkpoint) -> Phrase:
    """What to do where tensors that are more than plain elements are asked for in memory."""
    if any(isinstance(tensor, OpaqueTensor) and tensor.local is not None for tensor in checkpoint.values()):
        return Phrase(LEAVE_OUT, ", or open the file with ", Argument("allow_part", True), " for this rank's elements")
    return Phrase(LEAVE_OUT, *([", or load the file with torch.load"] if checkpoint.container != "safetensors" else []))
