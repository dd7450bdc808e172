"""Checkpoint surgery: open any PyTorch checkpoint without running it, compare, edit, write it clean.

>>> import ckpt_surgeon, torch
>>> torch.save({"module.fc.weight": torch.eye(2)}, "parallel.pth")
>>> checkpoint = ckpt_surgeon.open("parallel.pth")
>>> plan = ckpt_surgeon.save(ckpt_surgeon.strip_prefix(checkpoint), "clean.pth")
>>> list(torch.load("clean.pth"))
['fc.weight']
"""

from importlib import import_module as _import_module

from .hooks import provide as _provide

TYPE_CHECKING = False  # type checkers take it for True; typing itself is not imported for it
if TYPE_CHECKING:
    from .edits.averages import average, ema, lerp, slerp
    from .edits.change import Change
    from .edits.combine import concat, split, stack, sum_, unstack
    from .edits.deltas import add, merge, subtract
    from .edits.fold import fold
    from .edits.join import graft, join
    from .edits.kernels import inflate, resize_kernel
    from .edits.keys import add_prefix, drop, keep, rename, select, strip_prefix
    from .edits.lora.extracting import extract_lora
    from .edits.lora.merging import merge_lora
    from .edits.norms import fold_norm, norm_to_conv
    from .edits.quantised import dequantize
    from .edits.quantize import quantize
    from .edits.recipe import Recipe, Step, step
    from .edits.resize import map_classes, resize_bias_table, resize_channels, resize_grid, resize_rows
    from .edits.rotary import rotary
    from .edits.values import cast, pad, reshape, scale, slice_, transpose
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
    from .models.align import Alignment, Ambiguity, Made, Proposal, align
    from .models.check_rules import CheckRules
    from .models.checking import BrokenRule, Check, check
    from .models.diff import Diff, Hint, Mismatch, diff
    from .models.execution import RunPair, RunPairs, pairs_by_running
    from .models.fit import Fit, Outcome, fit
    from .models.load_into import LoadReport, load_into
    from .models.targets import Expected, resolve
    from .reading.comparing import Changed, Hashes, Stats, StatsByKey, ValueDiff, compare, hash, stats
    from .reading.listing import Listing, ls
    from .reading.loading import load
    from .reading.opening import open
    from .reading.scanning import Name, Scan, scan
    from .reading.values import Inert
    from .report.pages import html_page
    from .runs.applying import applied, fitted
    from .runs.describe import Training, training_of
    from .runs.folder import RunFolder, open_run
    from .runs.optimizer_keys import with_optimizer_keys
    from .runs.resume_check import ResumeCheck, resume_check
    from .runs.run import Run
    from .runs.values import with_values
    from .tensors.checkpoint import Checkpoint, LeftOut
    from .tensors.dtypes import DType
    from .tensors.records import ComputedTensor, OpaqueTensor
    from .tensors.storage import Storage
    from .tensors.stored import StoredTensor
    from .tensors.torch_bridge import from_torch
    from .training.freezing import ModuleState, Trainable, freeze, snapshot, trainable, unfreeze, verify_frozen
    from .training.grouping import GroupSummary, ParamGroups, param_groups
    from .training.initializing import Initialized, initialize
    from .training.rules import Rule, Rules
    from .writing.in_place import InPlace, plan_in_place, rename_in_place
    from .writing.plan import Plan
    from .writing.shard_index import write_index
    from .writing.write import convert, save

__version__ = "0.1.0"

__all__ = [
    "Alignment",
    "Ambiguity",
    "BrokenFile",
    "BrokenRule",
    "ByteSpan",
    "Change",
    "Changed",
    "Check",
    "CheckRules",
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
    "Inert",
    "Initialized",
    "KeyCollision",
    "LeftOut",
    "Listing",
    "LoadReport",
    "Made",
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
    "ResumeCheck",
    "Rule",
    "Rules",
    "Run",
    "RunFolder",
    "RunPair",
    "RunPairs",
    "Scan",
    "SelectionError",
    "Stats",
    "StatsByKey",
    "Step",
    "Storage",
    "StoredTensor",
    "TargetError",
    "Trainable",
    "Training",
    "ValueDiff",
    "add",
    "add_prefix",
    "align",
    "applied",
    "average",
    "cast",
    "check",
    "compare",
    "concat",
    "convert",
    "dequantize",
    "diff",
    "drop",
    "ema",
    "extract_lora",
    "fit",
    "fitted",
    "fold",
    "fold_norm",
    "freeze",
    "from_torch",
    "graft",
    "hash",
    "html_page",
    "inflate",
    "initialize",
    "join",
    "keep",
    "lerp",
    "load",
    "load_into",
    "ls",
    "map_classes",
    "merge",
    "merge_lora",
    "norm_to_conv",
    "open",
    "open_run",
    "pad",
    "pairs_by_running",
    "param_groups",
    "plan_in_place",
    "quantize",
    "recover",
    "rename",
    "rename_in_place",
    "reshape",
    "resize_bias_table",
    "resize_channels",
    "resize_grid",
    "resize_kernel",
    "resize_rows",
    "resolve",
    "resume_check",
    "rotary",
    "save",
    "scale",
    "scan",
    "select",
    "slerp",
    "slice_",
    "snapshot",
    "split",
    "stack",
    "stats",
    "step",
    "strip_prefix",
    "subtract",
    "sum_",
    "trainable",
    "training_of",
    "transpose",
    "unfreeze",
    "unstack",
    "verify_frozen",
    "with_optimizer_keys",
    "with_values",
    "write_index",
]

# Where each public name is made; its module is imported when the name is first asked for.
_HOMES = {
    "edits.averages": "average ema lerp slerp",
    "edits.change": "Change",
    "edits.combine": "concat split stack sum_ unstack",
    "edits.deltas": "add merge subtract",
    "edits.fold": "fold",
    "edits.kernels": "inflate resize_kernel",
    "edits.norms": "fold_norm norm_to_conv",
    "edits.quantised": "dequantize",
    "edits.quantize": "quantize",
    "edits.rotary": "rotary",
    "edits.join": "graft join",
    "edits.keys": "add_prefix drop keep rename select strip_prefix",
    "edits.lora.extracting": "extract_lora",
    "edits.lora.merging": "merge_lora",
    "edits.recipe": "Recipe Step step",
    "edits.resize": "map_classes resize_bias_table resize_channels resize_grid resize_rows",
    "edits.values": "cast pad reshape scale slice_ transpose",
    "errors": (
        "BrokenFile CheckpointError EditError FileError FrozenChanged KeyCollision "
        "NoRoom NotACheckpoint NothingMatched OutputExists RecipeError SelectionError TargetError"
    ),
    "files.journal": "recover",
    "files.remote": "RemotePath",
    "files.spans": "ByteSpan",
    "models.align": "Alignment Ambiguity Made Proposal align",
    "models.check_rules": "CheckRules",
    "models.checking": "BrokenRule Check check",
    "models.diff": "Diff Hint Mismatch diff",
    "models.execution": "RunPair RunPairs pairs_by_running",
    "models.fit": "Fit Outcome fit",
    "models.load_into": "LoadReport load_into",
    "models.targets": "Expected resolve",
    "reading.comparing": "Changed Hashes Stats StatsByKey ValueDiff compare hash stats",
    "reading.listing": "Listing ls",
    "reading.loading": "load",
    "reading.opening": "open",
    "reading.scanning": "Name Scan scan",
    "reading.values": "Inert",
    "report.pages": "html_page",
    "runs.applying": "applied fitted",
    "runs.describe": "Training training_of",
    "runs.folder": "RunFolder open_run",
    "runs.optimizer_keys": "with_optimizer_keys",
    "runs.resume_check": "ResumeCheck resume_check",
    "runs.run": "Run",
    "runs.values": "with_values",
    "tensors.checkpoint": "Checkpoint LeftOut",
    "tensors.dtypes": "DType",
    "tensors.records": "ComputedTensor OpaqueTensor",
    "tensors.storage": "Storage",
    "tensors.stored": "StoredTensor",
    "tensors.torch_bridge": "from_torch",
    "training.freezing": "ModuleState Trainable freeze snapshot trainable unfreeze verify_frozen",
    "training.grouping": "GroupSummary ParamGroups param_groups",
    "training.rules": "Rule Rules",
    "training.initializing": "Initialized initialize",
    "writing.in_place": "InPlace plan_in_place rename_in_place",
    "writing.plan": "Plan",
    "writing.shard_index": "write_index",
    "writing.write": "convert save",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

_provide("looks", lambda: _import_module(".report.shown", __name__).register)
_provide("state_dict of", lambda: _import_module(".reading.sources", __name__).state_dict_of)
_provide("value at", lambda: _import_module(".reading.values", __name__).value_at)
_provide("load tensor", lambda: _import_module(".tensors.torch_bridge", __name__).load_tensor)


if not TYPE_CHECKING:  # to a type checker, a name that is not imported above is none

    def __getattr__(name: str) -> object:
        if name not in _HOME_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found: object = getattr(_import_module(f".{_HOME_OF[name]}", __name__), name)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
