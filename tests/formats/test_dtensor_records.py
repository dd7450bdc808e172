"""What is made of a DTensor's pickled state, as other versions of torch and hostile files have it."""

from __future__ import annotations

import pytest
import torch

from ckpt_surgeon import from_torch
from ckpt_surgeon.formats.pickle.dtensor import is_dtensor, local_or_part
from ckpt_surgeon.formats.pickle.values import Global, Object, Value
from ckpt_surgeon.tensors.dtypes import BY_NAME
from ckpt_surgeon.tensors.records import OpaqueTensor
from ckpt_surgeon.tensors.stored import StoredTensor

MADE = OpaqueTensor("subclass DTensor", BY_NAME["float32"], (4, 3))
PLACEMENTS = "torch.distributed.tensor.placement_types"


def local(*shape: int, dtype: torch.dtype = torch.float32) -> StoredTensor:
    found = from_torch({"w": torch.ones(shape, dtype=dtype)})["w"]
    assert isinstance(found, StoredTensor)
    return found


def placement(name: str, **settings: Value) -> Object:
    return Object(Global(PLACEMENTS, name), state=dict(settings))


def mesh(*sizes: int, rank: object = (1,)) -> Object:
    """A mesh as torch 2.2 to 2.8 pickle it: a tensor of ranks."""
    state = {"device_type": "cuda", "mesh": local(*sizes, dtype=torch.int32), "_coordinate_on_dim": rank}
    return Object(Global("torch.distributed.device_mesh", "DeviceMesh"), state=state)


def state(part: Value, on: Value, *placements: Value) -> Value:
    spec = Object(Global("torch.distributed.tensor._dtensor_spec", "DTensorSpec"),
                  state={"mesh": on, "placements": placements})  # fmt: skip
    return None, {"_local_tensor": part, "_spec": spec}


@pytest.mark.parametrize(
    ("saved", "part"),
    [
        (state(local(2, 3), mesh(2), placement("Shard", dim=0)), "rank 1 of a mesh of 2: Shard(dim=0)"),
        (
            state(local(2, 3), mesh(2, 2, rank=[1, 0]), placement("Shard", dim=0), placement("Replicate")),
            "rank 1, 0 of a mesh of 2 x 2: Shard(dim=0), Replicate()",
        ),
        (
            state(local(4, 3), mesh(2), placement("Partial", reduce_op="sum")),
            "rank 1 of a mesh of 2: Partial(reduce_op=sum)",
        ),
        (state(local(4, 3), None, placement("Partial")), "one rank of a mesh: Partial()"),
        (state(local(2, 3), None, placement("Shard", dim=0)), "one rank of a mesh: Shard(dim=0)"),
        (state(local(1, 3), mesh(4, rank=None), placement("_StridedShard", dim=0, split_factor=2)),
         "one rank of a mesh of 4: _StridedShard(dim=0, split_factor=2)"),
    ],
)  # fmt: skip
def test_what_is_not_all_there_is_one_ranks_part(saved: Value, part: str) -> None:
    made = local_or_part(MADE, saved)
    assert isinstance(made, OpaqueTensor)
    assert (made.part, made.shape) == (part, (4, 3))
    assert made.local is not None
    assert made.nbytes == made.local.nbytes


@pytest.mark.parametrize(
    ("on", "placements"),
    [
        (mesh(2), [placement("Replicate")]),
        (None, [placement("Replicate")]),
        (mesh(1), [placement("Shard", dim=0)]),
        (mesh(1), [placement("Partial")]),
        (mesh(1, 2), [placement("Shard", dim=0), placement("Replicate")]),
    ],
)
def test_what_is_all_there_is_the_plain_tensor(on: Value, placements: list[Value]) -> None:
    whole = local(4, 3)
    assert local_or_part(MADE, state(whole, on, *placements)) is whole


@pytest.mark.parametrize(
    "saved",
    [
        None,
        (None, {"_local_tensor": local(4, 3)}),
        (None, {"_local_tensor": local(4, 3), "_spec": 7}),
        state(7, mesh(2), placement("Replicate")),
        state(local(4, 3, dtype=torch.float64), mesh(2), placement("Replicate")),
        state(local(4, 3), mesh(1), *[placement("Replicate")] * 50),
    ],
)
def test_a_state_that_says_too_little_makes_no_tensor_of_it(saved: Value) -> None:
    assert local_or_part(MADE, saved) is MADE


@pytest.mark.parametrize("what", [7, "Shard", None, Object(Global("posix", "system"), ("true",))])
def test_a_placement_that_is_none_makes_no_whole_tensor(what: Value) -> None:
    made = local_or_part(MADE, state(local(4, 3), mesh(2), what))
    assert isinstance(made, OpaqueTensor)


@pytest.mark.parametrize(
    ("module", "is_one"),
    [("torch.distributed.tensor", True), ("torch.distributed._tensor.api", True), ("mine.torch.distributed", False)],
)
def test_a_dtensor_is_torchs_in_whichever_module_it_lay(module: str, is_one: bool) -> None:
    assert is_dtensor(Global(module, "DTensor")) is is_one
