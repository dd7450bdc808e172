"""Saves DTensors as training does, in two processes that it starts; test_dtensors.py runs it.

``NAME_R.pt`` is what rank R saved; ``one_NAME.pt`` what a group of one process saved.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.multiprocessing.spawn import start_processes

WEIGHT = torch.arange(15.0).reshape(5, 3)  # rows that two processes cannot share equally
BIAS = torch.tensor([1.5, -2.0, 3.0, 0.0, 7.0])


def states(world: int) -> dict[str, dict[str, torch.Tensor]]:
    """State_dicts of a linear layer, each with other placements."""
    flat = init_device_mesh("cpu", (world,))
    grid = init_device_mesh("cpu", (1, world), mesh_dim_names=("dp", "tp"))
    return {
        "replicated": {"weight": distribute_tensor(WEIGHT, flat, [Replicate()]), "bias": BIAS},
        "parameters": {
            "weight": torch.nn.Parameter(distribute_tensor(WEIGHT, flat, [Replicate()])),
            "bias": torch.nn.Parameter(distribute_tensor(BIAS, flat, [Replicate()])),
        },
        "along_one": {"weight": distribute_tensor(WEIGHT, grid, [Shard(0), Replicate()]), "bias": BIAS},
        "rows": {"weight": distribute_tensor(WEIGHT, flat, [Shard(0)]), "bias": BIAS},
        "columns": {"weight": distribute_tensor(WEIGHT, grid, [Replicate(), Shard(1)]), "bias": BIAS},
        "sums": {"weight": DTensor.from_local(WEIGHT, flat, [Partial()]), "bias": BIAS},
    }


def work(rank: int, folder: str, world: int) -> None:
    out = Path(folder)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting{world}", rank=rank, world_size=world)
    for name, state in states(world).items():
        torch.save(state, out / (f"{name}_{rank}.pt" if world > 1 else f"one_{name}.pt"))
    dist.destroy_process_group()
    if rank == 0 and world > 1:
        work(0, folder, 1)


if __name__ == "__main__":
    start_processes(work, (sys.argv[1], 2), nprocs=2)
