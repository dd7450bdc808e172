"""Several processes' shares of one output, played by threads: the same bytes as by one, wherever they go."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import pytest
import torch
from tables import TABLE, assert_same

import ckpt_surgeon
from ckpt_surgeon import CheckpointError, EditError
from ckpt_surgeon.files.local import LocalPath
from ckpt_surgeon.writing import ranks
from ckpt_surgeon.writing.destinations import Destination, destination
from ckpt_surgeon.writing.group import Group, shares
from ckpt_surgeon.writing.plan import Plan, plan
from ckpt_surgeon.writing.write import Json, carry_out, write

STATE = {f"layer{number}.weight": torch.randn(16, number + 1) for number in range(9)} | {"big": torch.randn(200, 8)}


class Threads:
    """One of several threads that stand for torchrun's processes."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, said: dict[int, Json]) -> None:
        self.rank, self.size, self._barrier, self._said = rank, size, barrier, said

    def share(self, planned: Plan) -> Sequence[int]:
        return shares(planned.sizes, self.size)[self.rank]

    def announce(self, doing: str) -> None:
        pass

    def gathered(self, value: Json) -> list[Json]:
        self._said[self.rank] = value
        self.wait()
        return [self._said[rank] for rank in range(self.size)]

    def wait(self) -> None:
        self._barrier.wait(60)


def together(make: Callable[[], Plan], size: int = 3) -> list[tuple[str, ...]]:
    """Have threads carry out the same plan, each one made by itself."""
    barrier, said = threading.Barrier(size), dict[int, Json]()

    def run(rank: int) -> tuple[str, ...]:
        planned = make()
        group = cast(Group, Threads(rank, size, barrier, said))
        where: Destination
        if (out := planned.out.local) is not None:
            where = ranks.Parts(planned, out, "job", group, lambda _: None)
            if rank == 0:
                where.prepare(force=False)
        else:
            where = destination(planned, lambda _: None)
        group.wait()
        try:
            return carry_out(planned, where, group=group, threads=1)
        except CheckpointError:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        done = [pool.submit(run, rank) for rank in range(size)]
    errors = [error for one in done if (error := one.exception()) is not None]
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):  # one that waited for a process that gave up
            raise error
    return [one.result() for one in done]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["out.pth", "out.safetensors", "out.dcp"])
def test_shares_are_the_same_bytes_as_one_process_writes(name: str, tmp_path: Path) -> None:
    source = tmp_path / "in.pth"
    torch.save(STATE, source)
    for folder in ("alone", "together"):
        (tmp_path / folder).mkdir()

    def make(folder: str) -> Plan:
        return plan(ckpt_surgeon.open(source), tmp_path / folder / name, max_shard_size=1500)

    write(make("alone"), threads=1)
    together(lambda: make("together"))
    assert contents(tmp_path / "together") == contents(tmp_path / "alone")
    assert len(contents(tmp_path / "alone")) > 4


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_dcp_folder_of_shares_is_what_torch_loads(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.state_dict_loader import load

    source = tmp_path / "in.pth"
    torch.save(STATE, source)
    together(lambda: plan(ckpt_surgeon.open(source), tmp_path / "out.dcp", max_shard_size=1500))
    read = {key: torch.zeros_like(value) for key, value in STATE.items()}
    load(read, checkpoint_id=str(tmp_path / "out.dcp"), no_dist=True)
    assert_same(read, STATE)


@pytest.mark.parametrize("case", ["tied", "dense", "bfloat16 stepped"])
def test_tensors_of_every_kind_are_shared_out(case: str, tmp_path: Path) -> None:
    source = tmp_path / "in.pth"
    torch.save(TABLE[case](), source)
    together(lambda: plan(ckpt_surgeon.open(source), tmp_path / "out.dcp", max_shard_size=16))
    assert_same(ckpt_surgeon.load(tmp_path / "out.dcp"), TABLE[case](), ties=False)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_shares_of_an_output_at_a_url_are_the_same_bytes_as_of_a_local_one(suffix: str, tmp_path: Path) -> None:
    import fsspec

    source = tmp_path / "in.pth"
    torch.save(STATE, source)
    (tmp_path / "alone").mkdir()
    write(plan(ckpt_surgeon.open(source), tmp_path / "alone" / f"out{suffix}", max_shard_size=1500), threads=1)
    url = f"memory://shares{suffix}"
    together(lambda: plan(ckpt_surgeon.open(source), f"{url}/out{suffix}", max_shard_size=1500))
    files = fsspec.filesystem("memory")
    there = {path.rpartition("/")[2]: files.cat_file(path) for path in files.find(url)}
    assert there == contents(tmp_path / "alone")


def test_problems_of_all_shares_are_told_by_all_and_nothing_is_kept(tmp_path: Path) -> None:
    source = tmp_path / "in.pth"
    torch.save({f"w{number}": torch.full((4, 64), 1e6) for number in range(4)}, source)

    def make() -> Plan:
        return plan(
            ckpt_surgeon.cast(ckpt_surgeon.open(source), "fp16"), tmp_path / "o.safetensors", max_shard_size=600
        )

    with pytest.raises(EditError) as raised:
        together(make)
    assert all(f"w{number}" in str(raised.value) for number in range(4))
    assert not list(tmp_path.glob("o*"))
    assert not list(LocalPath(tmp_path / ".o.safetensors.parts").glob("*.done"))


def test_a_replaced_output_of_shares_keeps_its_modes(tmp_path: Path) -> None:
    source = tmp_path / "in.pth"
    torch.save(STATE, source)

    def make() -> Plan:
        return plan(ckpt_surgeon.open(source), tmp_path / "o.dcp", max_shard_size=1500, force=True)

    write(make())
    (tmp_path / "o.dcp").chmod(0o700)
    with pytest.raises(ckpt_surgeon.OutputExists):
        together(make, size=1)
    group = cast(Group, Threads(0, 1, threading.Barrier(1), {}))
    where = ranks.Parts(make(), LocalPath(tmp_path / "o.dcp"), "job", group, lambda _: None)
    where.prepare(force=True)
    carry_out(make(), where, group=group)
    assert (tmp_path / "o.dcp").stat().st_mode & 0o777 == 0o700
