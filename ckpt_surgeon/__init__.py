"""Checkpoint surgery: open any PyTorch checkpoint without running it, compare, edit, write it clean.

>>> import ckpt_surgeon, torch
>>> torch.save({"module.fc.weight": torch.eye(2)}, "parallel.pth")
>>> checkpoint = ckpt_surgeon.open("parallel.pth")
>>> plan = ckpt_surgeon.save(ckpt_surgeon.strip_prefix(checkpoint), "clean.pth")
>>> list(torch.load("clean.pth"))
['fc.weight']
"""

from .adapt import map_classes, resize_bias_table, resize_channels, resize_grid, resize_rows
from .align import Alignment, Ambiguity, Proposal, align
from .checkpoint import Checkpoint, LeftOut
from .diff import Diff, Hint, Mismatch, diff
from .dtypes import DType
from .edits import Change, add_prefix, drop, keep, rename, select, strip_prefix
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
from .fit import Fit, Outcome, fit
from .listing import Listing, ls
from .loading import LoadReport, from_torch, load, load_into
from .opening import open
from .recipe import Recipe, Step, step
from .remote import RemotePath
from .scanning import Name, Scan, scan
from .targets import Expected, resolve
from .tensors import ByteSpan, ComputedTensor, OpaqueTensor, Storage, StoredTensor
from .transforms import cast, concat, fold, pad, reshape, scale, slice_, split, transpose
from .values import Changed, Hashes, Stats, ValueDiff, compare, hash, stats
from .writing import Plan, convert, save

__version__ = "0.1.0"

__all__ = [
    "Alignment",
    "Ambiguity",
    "BrokenFile",
    "ByteSpan",
    "Change",
    "Changed",
    "Checkpoint",
    "CheckpointError",
    "ComputedTensor",
    "DType",
    "Diff",
    "EditError",
    "Expected",
    "FileError",
    "Fit",
    "Hashes",
    "Hint",
    "KeyCollision",
    "LeftOut",
    "Listing",
    "LoadReport",
    "Mismatch",
    "Name",
    "NotACheckpoint",
    "NothingMatched",
    "OpaqueTensor",
    "Outcome",
    "OutputExists",
    "Plan",
    "Proposal",
    "Recipe",
    "RecipeError",
    "RemotePath",
    "Scan",
    "SelectionError",
    "Stats",
    "Step",
    "Storage",
    "StoredTensor",
    "TargetError",
    "ValueDiff",
    "add_prefix",
    "align",
    "cast",
    "compare",
    "concat",
    "convert",
    "diff",
    "drop",
    "fit",
    "fold",
    "from_torch",
    "hash",
    "keep",
    "load",
    "load_into",
    "ls",
    "map_classes",
    "open",
    "pad",
    "rename",
    "reshape",
    "resize_bias_table",
    "resize_channels",
    "resize_grid",
    "resize_rows",
    "resolve",
    "save",
    "scale",
    "scan",
    "select",
    "slice_",
    "split",
    "stats",
    "step",
    "strip_prefix",
    "transpose",
]
