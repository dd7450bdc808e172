"""Files that hold one part of a model and look like the whole of it: what each is, and of which rank.

A training framework that spreads a model over processes saves a file of each.  Known here are DeepSpeed's ZeRO-3
(``param_shapes`` beside tensors of no elements), Megatron's tensor and pipeline parallelism (``args``, or the folder
``mp_rank_…``), FSDP's files ``model_world_size_N_rank_R.pt``, and DTensors that are sharded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod

from ..errors import Argument, FileError, Phrase
from ..files.paths import FilePath
from ..formats.contents import Contents
from ..formats.pickle.values import Value
from ..tensors.checkpoint import Checkpoint
from ..tensors.records import OpaqueTensor, Tensor
from .training_state import NO_WEIGHTS, refuse_training_state
from .tree import attribute
from .whole_modules import LACKING, PACKED

_ZERO = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_.*")
_FSDP = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.\w+")
_MEGATRON = re.compile(r"mp_rank_\d+(?:_\d+)*")
_JOINED = ("torch distributed", "DeepSpeed", "one file a rank", "Megatron-LM")  # containers of all ranks' parts
_REMEDIES = {
    PACKED: "save the model as it was before it was quantised, or take what there is with ",
    LACKING: "load it with torch and save its state_dict(), or take what there is with ",
    "": "join the ranks with the tool that saved them, or take this one with ",
}
_PARALLEL = (
    ("tensor_model_parallel_size", "tensor-parallel"),
    ("model_parallel_size", "model-parallel"),
    ("pipeline_model_parallel_size", "pipeline-parallel"),
)


def part_of(contents: Contents, tensors: Mapping[str, Tensor]) -> str:
    """What part of a model a file has, with its rank; "" for a file that, as far as is known, has a whole one."""
    if sharded := _dtensors(tensors):
        return sharded
    if not isinstance(contents.root, dict) or any(word in contents.container for word in _JOINED):
        return ""
    return _zero(contents.path, contents.root, tensors) or _megatron(contents.path, contents.root) or _fsdp(contents)


def refuse_part(checkpoint: Checkpoint) -> None:
    """Raise FileError for a checkpoint that has a part of a model, where a whole one is needed."""
    refuse_training_state(checkpoint)
    if checkpoint.part:
        from ..formats import engines

        kinds = (kind for kind in _REMEDIES if checkpoint.part.startswith(kind))
        way = _REMEDIES[next(kinds, "")]
        if checkpoint.path is not None and (folder := engines.folder_of(checkpoint.path)) is not None:
            way = f"open the folder, {folder}, which joins the files of all ranks, or take this one with "
        remedy = Phrase(way, Argument("allow_part", True))
        raise FileError(checkpoint.path or "the checkpoint", f"is no whole model: it is {checkpoint.part}", remedy)


def as_whole(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint of which the part of a model that it has counts as a whole one; training state is no model."""
    if not checkpoint.part or checkpoint.part.startswith(NO_WEIGHTS):
        return checkpoint
    return replace(checkpoint, tensors=local_parts(checkpoint.tensors), part="")


def local_parts(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The elements that a file has of each tensor, in place of tensors of which it has one rank's part."""
    return {
        key: tensor.local if isinstance(tensor, OpaqueTensor) and tensor.local is not None else tensor
        for key, tensor in tensors.items()
    }


def _dtensors(tensors: Mapping[str, Tensor]) -> str:
    """One rank of a state_dict of DTensors, of which some are sharded."""
    parts = {key: tensor for key, tensor in tensors.items() if isinstance(tensor, OpaqueTensor) and tensor.local}
    for key, tensor in parts.items():
        rank, _, placements = tensor.part.partition(": ")
        kind = "ShardedTensors" if "ShardedTensor" in tensor.kind else "DTensors"
        here = list(tensor.local.shape) if tensor.local is not None else []
        first = f"{key!r} has {here} of {list(tensor.shape)}, {placements}"
        return f"{rank}, in which {len(parts):,} of {len(tensors):,} tensors are sharded {kind} ({first})"
    return ""


def _zero(path: FilePath, root: Mapping[Value, Value], tensors: Mapping[str, Tensor]) -> str:
    """One rank of ZeRO-3, whose weights lie in flat pieces in the files of the optimizer."""
    shapes = dict(_shapes(root.get("param_shapes")))
    empty = [key for key, tensor in tensors.items() if not tensor.numel and shapes.get(key)]
    if not empty:
        return ""
    found = _ZERO.fullmatch(path.name)
    rank = f"rank {int(found[1])}" if found else "one rank"
    where = "the weights are in the files …optim_states.pt of all ranks"
    return f"{rank} of DeepSpeed ZeRO-3, in which {len(empty):,} of {len(tensors):,} tensors are empty ({where})"


def _shapes(found: Value) -> Iterator[tuple[str, int]]:
    """The elements of each parameter in ``param_shapes``: a dict of shapes, or a list of one for each group."""
    for group in found if isinstance(found, list) else [found]:
        for name, shape in group.items() if isinstance(group, dict) else ():
            if isinstance(name, str) and isinstance(shape, tuple):
                yield name, prod(size for size in shape if isinstance(size, int))


def _megatron(path: FilePath, root: Mapping[Value, Value]) -> str:
    """One rank of Megatron's (or of DeepSpeed's over Megatron): what ``args`` say, or the folders of the ranks."""
    folder = path.parent.name
    rank = folder if _MEGATRON.fullmatch(folder) else "one rank"
    if (known := re.search(r"mp_rank_\d+", path.name)) is not None:
        rank = known[0]
    args = root.get("args")
    for name, words in _PARALLEL:
        size = args.get(name) if isinstance(args, dict) else attribute(args, name)
        if isinstance(size, int) and size > 1:
            return f"{rank} of a {words} model of {size:,} parts"
    size = root.get("mp_world_size")
    if isinstance(size, int) and size > 1:
        return f"{rank} of a model-parallel model of {size:,} parts"
    if "checkpoint_version" in root and rank == folder and path.local is not None:
        count = sum(_MEGATRON.fullmatch(name) is not None for name in path.parent.parent.names())
        return f"{rank} of a Megatron model of {count:,} parts" if count > 1 else ""
    return ""


def _fsdp(contents: Contents) -> str:
    found = _FSDP.fullmatch(contents.path.name)
    if found is None or int(found[1]) < 2:
        return ""
    return f"rank {int(found[2])} of {int(found[1]):,} of a sharded state_dict (FSDP)"
