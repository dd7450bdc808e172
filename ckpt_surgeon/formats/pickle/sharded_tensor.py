"""ShardedTensors: what a process has of a tensor that FSDP (the first one) has spread over processes.

torch pickles one as a wrapper subclass whose state is what ``ShardedTensor.__getstate__`` gives
(``torch/distributed/_shard/sharded_tensor/api.py``): the local shards, each with its offsets, and the metadata of all.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...tensors.records import OpaqueTensor
from ...tensors.storage import Storage
from ...tensors.stored import StoredTensor
from ...tensors.strides import row_major
from .values import Global, Object, Value

_CLASS = Global("torch.distributed._shard.sharded_tensor.api", "ShardedTensor")


def is_sharded_tensor(cls: Value) -> bool:
    """Whether a class is torch's ShardedTensor."""
    return cls == _CLASS


def local_shard(made: OpaqueTensor, state: Value) -> OpaqueTensor:
    """What a ShardedTensor is as a record: one rank's part, with the one shard that it has, or none.

    ``made`` has the dtype and the shape of the whole.  A process with several shards is left as it is.
    """
    shards = state[0] if isinstance(state, tuple) and len(state) > 2 else None
    if not isinstance(shards, list) or len(shards) > 1:
        return made
    local, offsets = _shard(made, shards[0]) if shards else (_nothing(made), (0,) * len(made.shape))
    if local is None or offsets is None or not _fits(made.shape, local.shape, offsets):
        return made
    where = f"{_rank(state)}: a shard at {list(offsets)}" if shards else f"{_rank(state)}: no shard"
    return OpaqueTensor(made.kind, made.dtype, made.shape, made.device, local, where, offsets)


def _shard(made: OpaqueTensor, shard: Value) -> tuple[StoredTensor | None, tuple[int, ...] | None]:
    parts = _attributes(shard)
    tensor, offsets = parts.get("tensor"), _attributes(parts.get("metadata")).get("shard_offsets")
    if not isinstance(tensor, StoredTensor) or tensor.dtype != made.dtype:
        return None, None
    if not isinstance(offsets, (list, tuple)) or not all(type(one) is int and one >= 0 for one in offsets):
        return None, None
    return tensor, tuple(offsets)


def _nothing(made: OpaqueTensor) -> StoredTensor:
    shape = (0, *made.shape[1:]) if made.shape else (0,)
    return StoredTensor(made.dtype, shape, row_major(shape), 0, Storage(None, 0))


def _fits(shape: tuple[int, ...], sizes: tuple[int, ...], offsets: tuple[int, ...]) -> bool:
    if not len(shape) == len(sizes) == len(offsets):
        return False
    return all(start + size <= whole for start, size, whole in zip(offsets, sizes, shape, strict=True))


def _rank(state: Value) -> str:
    found = _attributes(state[2]) if isinstance(state, tuple) else {}
    rank, world = found.get("global_rank"), found.get("global_world_size")
    return f"rank {rank} of {world}" if type(rank) is int and type(world) is int else "one rank"


def _attributes(value: Value) -> Mapping[Value, Value]:
    """The attributes of an object, from its dict or its slots."""
    state = value.state if isinstance(value, Object) else None
    parts = state if isinstance(state, tuple) else (state,)
    return {name: one for part in parts[:2] if isinstance(part, dict) for name, one in part.items()}
