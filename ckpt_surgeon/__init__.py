"""Checkpoint surgery: open any PyTorch checkpoint without running it, compare, edit, write it clean.

>>> import ckpt_surgeon, torch
>>> torch.save({"module.fc.weight": torch.eye(2)}, "parallel.pth")
>>> checkpoint = ckpt_surgeon.open("parallel.pth")
>>> plan = ckpt_surgeon.save(ckpt_surgeon.strip_prefix(checkpoint), "clean.pth")
>>> list(torch.load("clean.pth"))
['fc.weight']
"""

from .checkpoint import Checkpoint, LeftOut
from .diff import Diff, Hint, Mismatch, diff
from .dtypes import DType
from .edits import Renaming, add_prefix, strip_prefix
from .errors import (
    BrokenFile,
    CheckpointError,
    EditError,
    FileError,
    KeyCollision,
    NotACheckpoint,
    NothingMatched,
    OutputExists,
    RecipeError,
    SelectionError,
    TargetError,
)
from .listing import Listing, ls
from .loading import from_torch, load
from .opening import open
from .targets import Expected, resolve
from .tensors import ByteSpan, ComputedTensor, OpaqueTensor, Storage, StoredTensor
from .writing import Plan, convert, save

__version__ = "0.1.0"

__all__ = [
    "BrokenFile",
    "ByteSpan",
    "Checkpoint",
    "CheckpointError",
    "ComputedTensor",
    "DType",
    "Diff",
    "EditError",
    "Expected",
    "FileError",
    "Hint",
    "KeyCollision",
    "LeftOut",
    "Listing",
    "Mismatch",
    "NotACheckpoint",
    "NothingMatched",
    "OpaqueTensor",
    "OutputExists",
    "Plan",
    "RecipeError",
    "Renaming",
    "SelectionError",
    "Storage",
    "StoredTensor",
    "TargetError",
    "add_prefix",
    "convert",
    "diff",
    "from_torch",
    "load",
    "ls",
    "open",
    "resolve",
    "save",
    "strip_prefix",
]
