"""Trains under DDP and FSDP, saves and resumes with torch's own means; tests/runs/test_torchrun.py has torchrun run it.

``torchrun run_worker.py train FOLDER`` trains five steps, saves, and trains five more; ``resume FOLDER`` goes on from
the edited files.  Each leaves the losses and the final weights of every arrangement.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
    fully_shard,
)
from torch.nn.parallel import DistributedDataParallel

Made = tuple[nn.Module, torch.optim.Optimizer]
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Net(nn.Module):
    """``name`` is that of its body; no size is divided by the number of processes."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.name = name
        setattr(self, name, nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7)))
        self.fc = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(getattr(self, self.name)(x))  # type: ignore[no-any-return]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def ddp(name: str) -> Made:
    model = DistributedDataParallel(Net(name))
    return model, torch.optim.AdamW(model.named_parameters(), lr=0.01)


def fsdp2(name: str) -> Made:
    model = Net(name)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, optimizer_of(model)


def fsdp1(name: str) -> Made:
    model = FullyShardedDataParallel(Net(name), device_id=torch.device("cpu"), use_orig_params=False)
    return model, optimizer_of(model)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> list[float]:
    generator = torch.Generator().manual_seed(seed + dist.get_rank())
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 5, generator=generator)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# -- each arrangement's own way of saving and resuming


def save_ddp(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if dist.get_rank() == 0:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 1}, path)


def resume_ddp(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    file = torch.load(path, weights_only=True)
    model.module.load_state_dict(file["model"])  # type: ignore[union-attr]
    optimizer.load_state_dict(file["optimizer"])


def save_sharded(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    weights, state = get_state_dict(model, optimizer)
    save({"model": weights, "optimizer": state, "epoch": 1}, checkpoint_id=path)


def resume_sharded(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    weights, state = get_state_dict(model, optimizer)
    found = {"model": weights, "optimizer": state, "epoch": 0}
    load(found, checkpoint_id=path)
    assert found["epoch"] == 1
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)


def save_flat(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """As torchtitan does: weights at the root, the optimizer's keys joined by dots."""
    weights, state = get_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    save({**weights, "optimizer": state, "train_state": {"step": torch.tensor(5)}}, checkpoint_id=path)


def resume_flat(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    weights, state = get_state_dict(model, optimizer, options=options)
    found = {**weights, "optimizer": state}
    load(found, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=options)


def save_full(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """FSDP2's full state: one process has all of it, by name."""
    weights = get_model_state_dict(model, options=FULL)
    state = get_optimizer_state_dict(model, optimizer, options=FULL)
    if dist.get_rank() == 0:
        torch.save({"model": weights, "optimizer": state}, path)


def resume_full(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    file = torch.load(path, weights_only=True)
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, file["model"], options=options)
    set_optimizer_state_dict(model, optimizer, file["optimizer"], options=options)


def save_fsdp1(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """FSDP1's full state, as optim_state_dict gives it."""
    configs = FullStateDictConfig(rank0_only=True), FullOptimStateDictConfig(rank0_only=True)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, *configs):
        weights, state = model.state_dict(), FullyShardedDataParallel.optim_state_dict(model, optimizer)
    if dist.get_rank() == 0:
        torch.save({"model": weights, "optimizer": state}, path)


def resume_fsdp1(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    file = torch.load(path, weights_only=True)
    configs = FullStateDictConfig(rank0_only=False), FullOptimStateDictConfig(rank0_only=False)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, *configs):
        model.load_state_dict(file["model"])
        state = FullyShardedDataParallel.optim_state_dict_to_load(model, optimizer, file["optimizer"])
        optimizer.load_state_dict(state)


Saving = Callable[[Path, nn.Module, torch.optim.Optimizer], None]

ARRANGEMENTS: dict[str, tuple[Callable[[str], Made], Saving, Saving]] = {
    "ddp.pth": (ddp, save_ddp, resume_ddp),
    "sharded.dcp": (fsdp2, save_sharded, resume_sharded),
    "flat.dcp": (fsdp2, save_flat, resume_flat),
    "full.pth": (fsdp2, save_full, resume_full),
    "fsdp1.pth": (fsdp1, save_fsdp1, resume_fsdp1),
}


def leave(folder: Path, what: str, name: str, losses: list[float], model: nn.Module) -> None:
    """Have the first process write the losses and the whole weights."""
    weights = get_model_state_dict(model, options=FULL)
    if dist.get_rank() == 0:
        torch.save({"losses": losses, "weights": list(weights.values())}, folder / f"{name}.{what}")
    dist.barrier()


def main(what: str, folder: Path) -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    for name, (make, saving, resuming) in ARRANGEMENTS.items():
        if what == "train":
            model, optimizer = make("body")
            train(model, optimizer, 1)
            saving(folder / name, model, optimizer)
        else:
            model, optimizer = make("trunk")
            resuming(folder / "edited" / name, model, optimizer)
        dist.barrier()
        leave(folder, what, name, train(model, optimizer, 100), model)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
