"""Writes distributed checkpoints as training does, in several processes that it starts; test_dcp.py runs it.

Beside each folder NAME lies NAME.pth: the whole model, gathered.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from tables import DTYPES, noise
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardedStateDictConfig, StateDictType, fully_shard
from torch.distributed.tensor import DTensor, Placement, Shard, distribute_tensor
from torch.multiprocessing.spawn import start_processes

State = dict[str, torch.Tensor]


def network() -> nn.Module:
    """Sizes that no number of processes divides; an integer buffer, a parameter without dimensions to spare."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 3), nn.Linear(3, 1))


def whole(state: Mapping[str, object]) -> dict[str, object]:
    return {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in state.items()}


def keep(out: Path, name: str, state: Mapping[str, object]) -> None:
    """Gather a state_dict and have one process save it."""
    gathered = whole(state)
    if dist.get_rank() == 0:
        torch.save(gathered, out / f"{name}.pth")
    dist.barrier()


def training(out: Path, mesh: DeviceMesh) -> None:
    """FSDP2 with an optimizer after one step, and what people save beside."""
    model = network()
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 7)).sum().backward()
    optimizer.step()
    weights, state = get_state_dict(model, optimizer)
    keep(out, "training", weights)
    beside = {"step": 7, "args": {"lr": 0.1, "names": ("a", "b")}, "history": [torch.ones(2), {"loss": torch.zeros(3)}]}
    save({"model": weights, "optimizer": state, **beside}, checkpoint_id=out / "training")


def fsdp1(out: Path, mesh: DeviceMesh) -> None:
    """FSDP1 with its sharded state_dict."""
    model = FullyShardedDataParallel(network(), device_id=torch.device("cpu"))
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
        keep(out, "fsdp1", model.state_dict())
    with FullyShardedDataParallel.state_dict_type(
        model, StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(offload_to_cpu=True)
    ):
        save({"state_dict": model.state_dict(), "epoch": 3}, checkpoint_id=out / "fsdp1")


def dtypes(out: Path, mesh: DeviceMesh) -> None:
    """Every dtype: cut along columns, without dimensions, empty; under names with dots and of other scripts."""
    whole: State = {}
    cut: State = {}
    for name in DTYPES:
        if not name.startswith("bits"):  # torch cannot write those
            whole[f"层.{name}.columns"] = columns = noise(name, 6, 10)
            whole[f"层.{name}.single"] = noise(name)
            whole[f"层.{name}.empty"] = noise(name, 0, 3)
            local = columns.chunk(mesh.size(), 1)[mesh.get_rank()].contiguous()  # gloo does not send every dtype
            cut[f"层.{name}.columns"] = DTensor.from_local(
                local, mesh, [Shard(1)], run_check=False, shape=columns.shape, stride=columns.stride()
            )
    keep(out, "dtypes", whole)
    save({**whole, **cut}, checkpoint_id=out / "dtypes")


def grid(out: Path) -> None:
    """Tensors cut along both dimensions, evenly and not, and along an inner one."""
    mesh = init_device_mesh("cpu", (2, 2))
    both: list[Placement] = [Shard(0), Shard(1)]
    state: State = {
        "even": distribute_tensor(torch.arange(48.0).reshape(6, 8), mesh, both),
        "uneven": distribute_tensor(torch.arange(35.0).reshape(5, 7), mesh, both),
        "few": distribute_tensor(torch.arange(3.0).reshape(1, 3), mesh, both),
        "crossed": distribute_tensor(torch.arange(60.0).reshape(3, 4, 5), mesh, [Shard(2), Shard(0)]),
        "twice": distribute_tensor(torch.arange(18.0).reshape(9, 2), mesh, [Shard(0), Shard(0)]),
    }
    keep(out, "grid", state)
    save({"net": state, "list": [{"a": state["even"]}, {"a": state["uneven"]}]}, checkpoint_id=out / "grid")


def hugging_face(out: Path, mesh: DeviceMesh) -> None:
    """The safetensors variant: in pieces, and consolidated beside the pieces."""
    model = nn.Sequential(nn.Linear(7, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    fully_shard(model, mesh=mesh)
    state = {**model.state_dict(), "scale": torch.ones(2, dtype=torch.bfloat16)}
    for name in ("hf", "consolidated"):
        keep(out, name, state)
    save(state, storage_writer=HuggingFaceStorageWriter(str(out / "hf"), save_distributed=True))
    writer = HuggingFaceStorageWriter(str(out / "consolidated"), save_distributed=True, enable_consolidation=True)
    save(state, storage_writer=writer)


def write_all(rank: int, out: Path, processes: int) -> None:
    """What one of the processes does."""
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=processes)
    mesh = init_device_mesh("cpu", (processes,))
    training(out, mesh)
    fsdp1(out, mesh)
    dtypes(out, mesh)
    hugging_face(out, mesh)
    if processes == 4:
        grid(out)
    dist.destroy_process_group()


if __name__ == "__main__":
    # Forked, so that torch is imported once for all processes.
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    start_processes(write_all, args=(folder, count), nprocs=count, start_method="fork")
