"""One process of several that dies, sleeps, plans otherwise or says rubbish: a named error in bounded time, no output.

Threads of this process play the processes, with a store of torch.distributed's between them.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch

import ckpt_surgeon
from ckpt_surgeon import CheckpointError, EditError
from ckpt_surgeon.errors import RankFailed
from ckpt_surgeon.writing import group as groups
from ckpt_surgeon.writing.group import Group, member
from ckpt_surgeon.writing.plan import Plan, plan
from ckpt_surgeon.writing.ranks import write_share
from ckpt_surgeon.writing.write import Json

STATE = {f"layer{number}.weight": torch.full((8, 8), float(number)) for number in range(6)}
SIZE = 3
Play = Callable[[Group], object]  # what a process does instead of its share


@pytest.fixture(autouse=True)
def _short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "STARTING", timedelta(seconds=0.6))
    monkeypatch.setattr(groups, "SILENCE", 0.4)
    monkeypatch.setattr(groups, "STANDSTILL", 0.8)
    monkeypatch.setattr(groups, "BEAT", 0.05)
    monkeypatch.setattr(groups, "GRACE", 0.2)


def planned(folder: Path, source: str = "in.pth") -> Plan:
    path = folder / source
    if not path.exists():
        torch.save(STATE, path)
    return plan(ckpt_surgeon.open(path), folder / "out.safetensors", max_shard_size=600, force=True)


def together(share: Mapping[int, Play], everyone: Play) -> list[BaseException | None]:
    """Let threads be the processes of one torchrun; what each of them ended with."""
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    store = HashStore()

    def run(rank: int) -> object:
        group = Group(rank, SIZE, store)
        if rank in share:
            return share[rank](group)
        with member(group):
            return everyone(group)

    with ThreadPoolExecutor(SIZE) as pool:
        return [done.exception() for done in [pool.submit(run, rank) for rank in range(SIZE)]]


def outcome(folder: Path, share: Mapping[int, Play]) -> list[CheckpointError]:
    """The errors of the processes that do as they should, which end soon, and leave no output."""
    made = planned(folder)
    begun = time.monotonic()
    ended = together(share, lambda group: write_share(group, made))
    assert time.monotonic() - begun < 10
    assert not list(folder.glob("out*"))
    errors = [error for rank, error in enumerate(ended) if rank not in share]
    found = [error for error in errors if isinstance(error, CheckpointError)]
    assert len(found) == len(errors), ended
    return found


def told(errors: list[CheckpointError], others: Mapping[int, Play]) -> str:
    """The one line that the processes print together."""
    ranks = [rank for rank in range(SIZE) if rank not in others]
    lines = {str(error) for rank, error in zip(ranks, errors, strict=True) if getattr(error, "told_by", rank) == rank}
    (line,) = lines
    return line


def dies(group: Group) -> None:
    group.beat()
    group.announce("out-00003-of-00006.safetensors")


def never_comes(_: Group) -> None:
    pass


@pytest.mark.parametrize(
    ("play", "why"),
    [
        (dies, r"rank 1 \(out-00003-of-00006\.safetensors\): gave no sign of life for 0 seconds; run the same command"),
        (never_comes, "rank 1: has not come within 1 seconds"),
    ],
)
def test_a_process_that_is_not_there_is_named(play: Play, why: str, tmp_path: Path) -> None:
    errors = outcome(tmp_path, {1: play})
    assert all(isinstance(error, RankFailed) and error.rank == 1 for error in errors)
    import re

    assert re.match(why, told(errors, {1: play}))


def test_a_process_that_is_alive_and_does_nothing_is_named(tmp_path: Path) -> None:
    done = threading.Event()

    def idles(group: Group) -> None:
        group.announce("the middle of nowhere")
        while not done.wait(0.05):
            group.beat()

    timer = threading.Timer(3, done.set)
    timer.start()
    errors = outcome(tmp_path, {2: idles})
    timer.cancel()
    done.set()
    assert told(errors, {2: idles}).startswith("rank 2 (the middle of nowhere): has done nothing for 1 seconds")


def test_a_process_that_is_slow_and_gets_on_is_waited_for(tmp_path: Path) -> None:
    made = planned(tmp_path)

    def share(group: Group) -> object:
        for _ in range(12 if group.rank == 1 else 0):
            time.sleep(0.1)
            group.step()
        return write_share(group, made)

    assert together({}, share) == [None] * SIZE
    assert list(ckpt_surgeon.open(tmp_path / "out.safetensors.index.json")) == list(STATE)


# -- other plans


def _plan_of(state: dict[str, torch.Tensor], folder: Path) -> Plan:
    torch.save(state, folder / "in.pth")
    os.utime(folder / "in.pth", ns=(1, 1))
    return planned(folder)


@pytest.mark.parametrize("kind", ["values", "keys", "a file", "command"])
def test_a_process_that_plans_another_output_is_named_with_what_differs(kind: str, tmp_path: Path) -> None:
    ours = _plan_of(STATE, tmp_path)
    other = {
        "values": lambda: _plan_of({key: value + 1 for key, value in STATE.items()}, tmp_path),
        "keys": lambda: _plan_of({f"x{key[1:]}": value for key, value in STATE.items()}, tmp_path),
        "a file": lambda: planned(tmp_path, "other.pth"),
        "command": lambda: ours,
    }[kind]()
    ended = together(
        {}, lambda group: write_share(group, other if group.rank else ours, job="b" if group.rank == 1 else "a")
    )
    assert all(isinstance(error, EditError) for error in ended)
    what = {"a file": "input", "command": "command"}.get(kind, "tensors")
    assert all(what in str(error) and "than rank 0" in str(error) for error in ended)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("said", [["an older version"], {"job": "1"}, 7, None])
def test_a_process_of_another_version_is_named(said: Json, tmp_path: Path) -> None:
    def speaks(group: Group) -> None:
        with member(group):
            group.gathered(said)

    errors = outcome(tmp_path, {1: speaks})
    assert "rank 1 plans another output than rank 0: other version of ckpt_surgeon" in str(errors[0])


# -- rubbish


RUBBISH = {
    "no text": b"\xff\x00{",
    "no JSON": b"{'0': 1}",
    "deep": b"[" * 100_000,
    "a list": b"[1, 2]",
    "a number": b'{"0": 5}',
    "a name": b'{"zero": [[], [], [], []]}',
    "places of text": b'{"2": [[["a", "b"]], [], [], []]}',
    "notes that are none": b'{"2": [[], [5], [], []]}',
    "too much": b'{"2": [[], [], [], [], [], []]}',
}


@pytest.mark.parametrize("name", RUBBISH)
def test_a_process_that_says_rubbish_is_named(name: str, tmp_path: Path) -> None:
    made = planned(tmp_path)

    class Hostile(Group):
        """A process that is right until it is asked what it has made."""

        def gathered(self, value: Json) -> list[Json]:
            if not isinstance(value, dict) or "command" in value:
                return super().gathered(value)
            self._store.set(f"value/{self._rounds}/{self.rank}", RUBBISH[name])  # type: ignore[arg-type]
            self.wait()
            raise CheckpointError("is hostile")

    def speaks(group: Group) -> None:
        hostile = Hostile(group.rank, group.size, group._store)
        with member(hostile):
            write_share(hostile, made)

    errors = outcome(tmp_path, {2: speaks})
    assert all(str(error).startswith("rank 2") for error in errors)
    assert any("says what is not understood" in str(error) for error in errors)


def test_a_process_that_says_that_it_made_a_file_and_did_not_is_found_out(tmp_path: Path) -> None:
    made = planned(tmp_path)

    def claims(group: Group) -> None:
        from ckpt_surgeon.writing.ranks import _facts

        with member(group):
            group.agree(_facts(made, "", {}), made.out)
            group.wait()
            group.gathered({str(number): [[], [], [], []] for number in group.share(made)})
            group.wait()
            group.wait()

    errors = outcome(tmp_path, {1: claims})
    assert any("is not there as it was made; run the same command again" in str(error) for error in errors)
    json.dumps([str(error) for error in errors])
