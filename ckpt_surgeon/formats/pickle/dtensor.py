"""DTensors: what a process has of a tensor that is spread over a mesh of processes, and whether that is all of it.

torch pickles one as a wrapper subclass (``torch._tensor._rebuild_from_type_v2``) whose state has ``_local_tensor``, the
elements that this process holds, and ``_spec``: the mesh and, for each dimension of it, a placement (``Replicate``,
``Shard``, ``Partial`` of ``torch.distributed.tensor``).  Meshes are read as torch 2.1 to 2.14 write them.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from ...tensors.records import OpaqueTensor
from ...tensors.stored import StoredTensor
from .values import Global, Object, Value, spelled

MANY = 8  # dimensions that a mesh may have


def is_dtensor(cls: Value) -> bool:
    """Whether a class is torch's DTensor, in whichever module a version of torch has it."""
    return isinstance(cls, Global) and cls.name == "DTensor" and cls.module.startswith("torch.distributed.")


def local_or_part(made: OpaqueTensor, state: Value) -> StoredTensor | OpaqueTensor:
    """What a DTensor is as a record: the plain tensor where this process has all of it, else one rank's part.

    ``made`` has the dtype and the shape of the whole.  A process has all of it where every placement is ``Replicate``,
    or the mesh has one process.
    """
    slots = _slots(state)
    local, spec = slots.get("_local_tensor"), _slots(_state_of(slots.get("_spec")))
    placements = spec.get("placements")
    if not isinstance(local, (StoredTensor, OpaqueTensor)) or not isinstance(placements, (tuple, list)):
        return made
    if local.dtype != made.dtype or len(placements) > MANY:
        return made
    mesh = _state_of(spec.get("mesh"))
    sizes = _sizes(mesh)
    sizes = sizes if len(sizes) == len(placements) else ()
    spread = [
        placement
        for number, placement in enumerate(placements)
        if not _is(placement, "Replicate") and not (sizes and sizes[number] == 1)
    ]
    if local.shape == made.shape and all(_is(placement, "Shard", "_StridedShard") for placement in spread):
        return local
    if not isinstance(local, StoredTensor):
        return made
    where = f"{_rank(mesh)} of {_mesh(sizes)}: {', '.join(map(_placement, placements))}"
    offsets = _offsets(made.shape, local.shape, sizes, _coordinate(mesh), placements)
    return OpaqueTensor(made.kind, made.dtype, made.shape, made.device, local, where, offsets)


def _offsets(
    shape: tuple[int, ...], there: tuple[int, ...], sizes: tuple[int, ...], place: tuple[int, ...],
    placements: tuple[Value, ...] | list[Value],
) -> tuple[int, ...] | None:  # fmt: skip
    """Where the elements of one process begin in the whole; None where they are no box of it or nobody says it.

    A dimension is cut as ``torch.chunk`` does it, by one dimension of the mesh after the other; ``_StridedShard``
    stands for a cut that comes after those to its right (FSDP of what is tensor-parallel).
    """
    if len(sizes) != len(placements) or len(place) != len(sizes):
        return None
    starts, lengths = [0] * len(shape), list(shape)
    strided = [number for number, one in enumerate(placements) if _is(one, "_StridedShard")]
    for number in [*(n for n in range(len(placements)) if n not in strided), *reversed(strided)]:
        placement = placements[number]
        if _is(placement, "Replicate"):
            continue
        dim = _slots(_settings(placement)).get("dim")
        if not _is(placement, "Shard", "_StridedShard") or type(dim) is not int or not 0 <= dim < len(shape):
            return None
        share = -(-lengths[dim] // sizes[number])
        begin = min(place[number] * share, lengths[dim])
        starts[dim], lengths[dim] = starts[dim] + begin, min(share, lengths[dim] - begin)
    return tuple(starts) if tuple(lengths) == there else None


def _settings(placement: Value) -> Value:
    return placement.state if isinstance(placement, Object) else None


def _coordinate(state: Value) -> tuple[int, ...]:
    """Where a process stands in its mesh; () where that is not said."""
    place = _slots(state).get("_coordinate_on_dim")
    if isinstance(place, (tuple, list)) and len(place) <= MANY and all(type(one) is int for one in place):
        return tuple(place)
    return ()


def _slots(state: Value) -> Mapping[Value, Value]:
    """The attributes in a pickled state: a dict, or a dict (or None) and another one of slots."""
    parts = state if isinstance(state, tuple) else (state,)
    return {name: value for part in parts[:2] if isinstance(part, dict) for name, value in part.items()}


def _state_of(node: Value) -> Value:
    return node.state if isinstance(node, Object) else None


def _is(placement: Value, *names: str) -> bool:
    return isinstance(placement, Object) and isinstance(placement.cls, Global) and placement.cls.name in names


def _placement(placement: Value) -> str:
    """A placement as torch's repr gives it: ``Shard(dim=0)``."""
    if not isinstance(placement, Object) or not isinstance(placement.cls, Global):
        return spelled(placement)
    settings = ", ".join(f"{spelled(name)}={spelled(value)}" for name, value in _slots(placement.state).items())
    return f"{placement.cls.name}({settings})"


def _sizes(state: Value) -> tuple[int, ...]:
    """The size of each dimension of a mesh; () where that cannot be told."""
    mesh = _slots(state)
    if isinstance(ranks := mesh.get("mesh"), StoredTensor):  # up to torch 2.8
        return ranks.shape
    layout = _slots(_state_of(mesh.get("_layout")))
    axes = layout.get("axes")
    if isinstance(axes, (tuple, list)):
        found = [_product(_slots(_state_of(axis)).get("shape")) for axis in axes[: MANY + 1]]
    else:
        shape = layout.get("shape")
        found = [_product(size) for size in (shape if isinstance(shape, tuple) else (shape,))[: MANY + 1]]
    return tuple(size for size in found if size) if all(found) else ()


def _product(sizes: Value) -> int:
    """The product of a size or of several; 0 for anything else."""
    if type(sizes) is int:
        return sizes
    if isinstance(sizes, tuple) and len(sizes) <= MANY and all(type(size) is int for size in sizes):
        return prod(sizes)
    return 0


def _rank(state: Value) -> str:
    mesh = _slots(state)
    rank = mesh.get("_rank")
    if type(rank) is int:
        return f"rank {rank}"
    place = mesh.get("_coordinate_on_dim")
    if isinstance(place, (tuple, list)) and 0 < len(place) <= MANY and all(type(index) is int for index in place):
        return f"rank {', '.join(map(str, place))}"
    return "one rank"


def _mesh(sizes: tuple[int, ...]) -> str:
    return f"a mesh of {' x '.join(map(str, sizes))}" if sizes else "a mesh"
