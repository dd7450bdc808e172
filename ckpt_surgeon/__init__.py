"""Checkpoint surgery: open any PyTorch checkpoint without running it, compare, edit, write it clean.

>>> import ckpt_surgeon, torch
>>> torch.save({"module.fc.weight": torch.eye(2)}, "parallel.pth")
>>> checkpoint = ckpt_surgeon.open("parallel.pth")
>>> plan = ckpt_surgeon.save(ckpt_surgeon.strip_prefix(checkpoint), "clean.pth")
>>> list(torch.load("clean.pth"))
['fc.weight']
"""

from importlib import import_module as _import_module

from .edits.change import Change
from .edits.keys import add_prefix, drop, keep, rename, select, strip_prefix
from .edits.recipe import Recipe, Step, step
from .edits.resize import map_classes, resize_bias_table, resize_channels, resize_grid, resize_rows
from .edits.values import cast, concat, fold, pad, reshape, scale, slice_, split, transpose
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
from .files.journal import recover
from .files.remote import RemotePath
from .files.spans import ByteSpan
from .models.align import Alignment, Ambiguity, Proposal, align
from .models.diff import Diff, Hint, Mismatch, diff
from .models.fit import Fit, Outcome, fit
from .models.load_into import LoadReport, load_into
from .models.targets import Expected, resolve
from .reading.comparing import Changed, Hashes, Stats, ValueDiff, compare, hash, stats
from .reading.listing import Listing, ls
from .reading.loading import load
from .reading.opening import open
from .reading.scanning import Name, Scan, scan
from .tensors.checkpoint import Checkpoint, LeftOut
from .tensors.dtypes import DType
from .tensors.records import ComputedTensor, OpaqueTensor, Storage, StoredTensor
from .tensors.torch_bridge import from_torch
from .text import looks_from as _looks_from
from .training.freezing import ModuleState, Trainable, freeze, snapshot, trainable, unfreeze, verify_frozen
from .training.grouping import GroupSummary, ParamGroups, Rule, Rules, param_groups
from .training.initializing import Initialized, initialize
from .writing.in_place import InPlace, plan_in_place, rename_in_place
from .writing.write import Plan, convert, save

__version__ = "0.1.0"

_looks_from(lambda: _import_module(".report.shown", __name__))

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
