"""Saves state_dicts of DTensors and ShardedTensors in one file a rank, in four processes; test_rank_files.py runs it.

``NAME/model_world_size_4_rank_R.pt`` is what rank R saved, ``NAME.pt`` the whole, as ``full_tensor()`` gives it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import init_from_local_shards
from torch.distributed._shard.sharded_tensor.shard import Shard as LocalShard
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.multiprocessing.spawn import start_processes

WORLD = 4
WEIGHT = torch.arange(35.0).reshape(7, 5)  # which no two processes share evenly
EVEN = torch.arange(8.0)
BIAS = torch.tensor([1.5, -2.0, 3.0])


def states() -> dict[str, dict[str, object]]:
    """State_dicts whose whole is known, by the kind of their placements."""
    line = init_device_mesh("cpu", (WORLD,))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    return {
        "rows": {"weight": distribute_tensor(WEIGHT, line, [Shard(0)]), "bias": BIAS,
                 "few": distribute_tensor(BIAS, line, [Shard(0)]),  # the last process has none
                 "none": distribute_tensor(torch.zeros(4, 0), line, [Shard(0)])},
        "columns": {"weight": distribute_tensor(WEIGHT, line, [Shard(1)])},
        "grid": {"weight": distribute_tensor(WEIGHT, grid, [Shard(0), Shard(1)])},
        "crossed": {"weight": distribute_tensor(WEIGHT, grid, [Shard(1), Shard(0)])},
        "twice": {"weight": distribute_tensor(WEIGHT, grid, [Shard(0), Shard(0)])},
        "replicas": {"weight": distribute_tensor(WEIGHT, grid, [Replicate(), Shard(0)]),
                     "even": distribute_tensor(EVEN, grid, [Replicate(), Shard(0)])},
        "part_of_mesh": {"weight": distribute_tensor(WEIGHT, grid["tp"], [Shard(1)])},
        "partial": {"weight": DTensor.from_local(WEIGHT, line, [Partial()])},
    }  # fmt: skip


def sharded(rank: int) -> dict[str, object]:
    """ShardedTensors as FSDP (the first one) has them: rows, of which the last process has fewer."""
    part = WEIGHT[2 * rank : 2 * rank + 2].clone()
    shard = LocalShard.from_tensor_and_offsets(part, [2 * rank, 0], rank)
    few = [LocalShard.from_tensor_and_offsets(BIAS.clone(), [0], rank)] if rank == 1 else []  # the others have none
    return {"weight": init_from_local_shards([shard], 7, 5), "bias": init_from_local_shards(few, 3)}


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model under tensor parallelism and FSDP2 (``_StridedShard``), after one step."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 4))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, grid["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=grid["dp"])
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    return model, optimizer


def whole(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: whole(one) for key, one in value.items()}
    return value.full_tensor().detach() if isinstance(value, DTensor) else value


def work(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    out = Path(folder)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    model, optimizer = trained()
    found = states() | {"sharded": sharded(rank), "fsdp": model.state_dict()}
    for name, state in found.items():
        (out / name).mkdir(exist_ok=True)
        torch.save(state, out / name / f"model_world_size_{WORLD}_rank_{rank}.pt")
        full = {"weight": WEIGHT, "bias": BIAS} if name in ("sharded", "partial") else whole(state)
        if rank == 0:
            torch.save(full, out / f"{name}.pt")
    state = optimizer.state_dict()
    torch.save(state, out / "fsdp" / f"optim_world_size_{WORLD}_rank_{rank}.pt")
    torch.save(
        {"rng": torch.full((3,), rank), "lr": 0.5}, out / "fsdp" / f"extra_state_world_size_{WORLD}_rank_{rank}.pt"
    )
    slots = whole(state["state"])
    if rank == 0:
        torch.save(slots, out / "fsdp_slots.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    start_processes(work, (sys.argv[1],), nprocs=WORLD, start_method="fork")
