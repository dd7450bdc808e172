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
    FrozenChanged,
    KeyCollision,
    NoRoom,
    NotACheckpoint,
    NothingMatched,
    OutputExists,
    RecipeError,
    SelectionError,
    TargetError,
)
from .fit import Fit, Outcome, fit
from .freezing import ModuleState, Trainable, freeze, snapshot, trainable, unfreeze, verify_frozen
from .grouping import GroupSummary, ParamGroups, Rule, Rules, param_groups
from .initializing import Initialized, initialize
from .inplace import InPlace, plan_in_place, rename_in_place
from .journal import recover
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
    "FrozenChanged",
    "GroupSummary",
    "Hashes",
    "Hint",
    "InPlace",
    "Initialized",
    "KeyCollision",
    "LeftOut",
    "Listing",
    "LoadReport",
    "Mismatch",
    "ModuleState",
    "Name",
    "NoRoom",
    "NotACheckpoint",
    "NothingMatched",
    "OpaqueTensor",
    "Outcome",
    "OutputExists",
    "ParamGroups",
    "Plan",
    "Proposal",
    "Recipe",
    "RecipeError",
    "RemotePath",
    "Rule",
    "Rules",
    "Scan",
    "SelectionError",
    "Stats",
    "Step",
    "Storage",
    "StoredTensor",
    "TargetError",
    "Trainable",
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
    "freeze",
    "from_torch",
    "hash",
    "initialize",
    "keep",
    "load",
    "load_into",
    "ls",
    "map_classes",
    "open",
    "pad",
    "param_groups",
    "plan_in_place",
    "recover",
    "rename",
    "rename_in_place",
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
    "snapshot",
    "split",
    "stats",
    "step",
    "strip_prefix",
    "trainable",
    "transpose",
    "unfreeze",
    "verify_frozen",
]
