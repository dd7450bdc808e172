"""Several processes that write one output: torchrun's, with gloo, on this machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from command_line import Ran, Run
from hypothesis import given
from hypothesis import strategies as st
from tables import assert_same

import ckpt_surgeon
from ckpt_surgeon.files.sinks import Progress, Sink
from ckpt_surgeon.writing import write
from ckpt_surgeon.writing.group import shares
from ckpt_surgeon.writing.plan import Plan, Written, plan

RECIPE = "[[edit]]\ndo = 'strip-prefix'\n[[edit]]\ndo = 'cast'\ndtype = 'bf16'\n"

# The command line with something of it broken, in one process of several.
BROKEN = """
import glob, os, signal, sys, time
from ckpt_surgeon import cli
from ckpt_surgeon.writing import ranks
plain, rank, left = ranks.Plan.fill, os.environ["RANK"], [{after}]

def fill(planned, number, sink, *rest):
    written = plain(planned, number, sink, *rest)
    left[0] -= 1
    if rank == {rank!r} and left[0] < 0:
        {breaks}
    return written

ranks.Plan.fill = fill
cli.main(several=True)
"""
KILLED = """while not glob.glob(".out*/*.done"):  # some shard is finished before
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)"""
FULL = "raise OSError(28, 'No space left on device')"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "big.pth"
    torch.manual_seed(0)
    state = {f"module.layers.{number}.weight": torch.randn(64, 16 * (number + 1)) for number in range(8)}
    state["module.tied"] = state["module.layers.3.weight"]
    torch.save({"state_dict": state, "epoch": 3}, path)
    path.with_name("recipe.toml").write_text(RECIPE)
    return path


def torchrun(folder: Path, *words: object, processes: int = 2, script: Sequence[str] = ("-m", "ckpt_surgeon")) -> Ran:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *script]
    done = subprocess.run([*command, *map(str, words)], cwd=folder, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    return Ran(done.returncode, done.stdout, done.stderr)


def broken(folder: Path, *words: object, rank: int, after: int, breaks: str) -> Ran:
    script = folder / "broken.py"
    script.write_text(BROKEN.format(rank=str(rank), after=after, breaks=breaks))
    return torchrun(folder, *words, script=[str(script)])


def said(ran: Ran) -> list[str]:
    return [line for line in ran.err.splitlines() if line.startswith("ckpt: ")]


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "broken.py"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("words", "processes"),
    [
        (["strip-prefix", "{source}", "out.safetensors"], 2),
        (["convert", "{source}", "out.pth"], 3),
        (["strip-prefix", "{source}", "out.dcp"], 2),
        (["apply", "{recipe}", "{source}", "out.safetensors"], 2),
    ],
)
def test_several_processes_write_the_same_bytes_as_one(
    words: list[str], processes: int, checkpoint: Path, tmp_path: Path, ckpt_process: Run
) -> None:
    recipe = checkpoint.with_name("recipe.toml")
    command = [word.format(source=checkpoint, recipe=recipe) for word in words]
    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir()
    together.mkdir()
    command[-1:] = [str(alone / command[-1]), "--max-shard-size", "30kB"]
    assert ckpt_process(*command).status == 0
    ran = torchrun(together, *[word.replace("alone", "together") for word in command], processes=processes)
    assert ran.status == 0, ran.err
    assert ran.out.count("wrote ") == 1
    assert contents(together) == contents(alone)
    assert len(contents(alone)) > 4


def test_a_process_that_dies_is_named_with_its_shard_and_the_next_run_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    command = ["strip-prefix", checkpoint, "out.safetensors", "--max-shard-size", "30kB"]
    ran = broken(tmp_path, *command, rank=1, after=1, breaks=KILLED)
    assert ran.status != 0
    (line,) = said(ran)
    assert re.fullmatch(
        r"ckpt: rank 1 \(out-0000\d-of-00006\.safetensors\): died; run the same command again to go on", line
    )
    assert not list(tmp_path.glob("out*"))
    staging = tmp_path / ".out.safetensors.parts"
    finished = {path.name.removesuffix(".done") for path in staging.glob("*.done")}
    inodes = {name: (staging / name).stat().st_ino for name in finished}
    assert finished
    again = torchrun(tmp_path, *command)
    assert again.status == 0, again.err
    assert {name: (tmp_path / name).stat().st_ino for name in finished} == inodes  # moved, not made again
    assert not staging.exists()
    state = torch.load(checkpoint)["state_dict"]
    assert_same(ckpt_surgeon.load(tmp_path / "out.safetensors.index.json"),
                {key.removeprefix("module."): value for key, value in state.items()}, ties=False)  # fmt: skip


def test_a_shard_that_was_damaged_in_between_and_another_job_are_made_anew(checkpoint: Path, tmp_path: Path) -> None:
    command = ["strip-prefix", checkpoint, "out.safetensors", "--max-shard-size", "30kB"]
    broken(tmp_path, *command, rank=0, after=1, breaks=KILLED)
    staging = tmp_path / ".out.safetensors.parts"
    done = sorted(path for path in staging.glob("*.safetensors"))
    done[0].write_bytes(done[0].read_bytes()[:-8])
    other = ["convert", checkpoint, "out.safetensors", "--max-shard-size", "30kB"]
    ran = torchrun(tmp_path, *command)
    assert ran.status == 0, ran.err
    assert set(ckpt_surgeon.open(tmp_path / "out.safetensors.index.json")) == {
        key.removeprefix("module.") for key in ckpt_surgeon.open(checkpoint)
    }
    refused = torchrun(tmp_path, *other)
    assert said(refused) == [
        "ckpt: out.safetensors.index.json: exists already, nothing was written; use --force to replace it"
    ]
    assert not staging.exists()
    assert torchrun(tmp_path, *other, "--force").status == 0
    assert set(ckpt_surgeon.open(tmp_path / "out.safetensors.index.json")) == set(ckpt_surgeon.open(checkpoint))


def test_an_output_that_would_replace_what_it_is_made_of_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    ckpt_surgeon.convert(checkpoint, tmp_path / "m.safetensors", max_shard_size=30_000)
    before = contents(tmp_path)
    ran = torchrun(tmp_path, "strip-prefix", ".", "m.safetensors", "--max-shard-size", "30kB", "--force")
    (line,) = said(ran)
    assert "is read by this very run" in line
    assert contents(tmp_path) == before


def test_a_ckpt_that_a_training_script_runs_is_one_process_by_itself(checkpoint: Path, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    ckpt = Path(sys.executable).with_name("ckpt")
    script.write_text(
        "import os, subprocess\n"
        f"command = [{str(ckpt)!r}, 'strip-prefix', {str(checkpoint)!r}, 'out' + os.environ['RANK'] + '.pth']\n"
        "raise SystemExit(subprocess.run(command).returncode)\n"
    )
    assert torchrun(tmp_path, script=[str(script)]).status == 0
    assert (tmp_path / "out0.pth").read_bytes() == (tmp_path / "out1.pth").read_bytes()


def test_what_all_processes_meet_alike_is_told_once(tmp_path: Path) -> None:
    assert said(torchrun(tmp_path, "convert", "nothing.pth", "out.pth")) == [
        "ckpt: nothing.pth: does not exist; check the name"
    ]


def test_a_disk_that_is_full_is_told_once_by_the_process_that_met_it(checkpoint: Path, tmp_path: Path) -> None:
    ran = broken(tmp_path, "convert", checkpoint, "out.pth", "--max-shard-size", "30kB",
                 rank=1, after=0, breaks=FULL)  # fmt: skip
    assert ran.status != 0
    (line,) = said(ran)
    assert line.startswith("ckpt: rank 1 (out-0000")
    assert "cannot be written (No space left on device)" in line
    assert not list(tmp_path.glob("out*"))


def test_values_that_cannot_be_had_are_told_once_for_all_processes(tmp_path: Path) -> None:
    torch.save({f"w{number}": torch.full((4, 64), 1e6) for number in range(4)}, tmp_path / "in.pth")
    ran = torchrun(tmp_path, "cast", "in.pth", "out.safetensors", "--dtype", "fp16", "--max-shard-size", "600")
    assert ran.status != 0
    (line,) = said(ran)
    assert all(f"w{number}" in line for number in range(4))
    assert not list(tmp_path.glob("out*"))


def test_a_crash_while_shards_are_put_in_place_is_gone_on_from(checkpoint: Path, tmp_path: Path) -> None:
    command = ["convert", checkpoint, "out.safetensors", "--max-shard-size", "30kB"]
    script = tmp_path / "crash.py"
    script.write_text(
        "import os\nfrom ckpt_surgeon import cli\n"
        "from ckpt_surgeon.files import swap\nplain, left = os.replace, [9]\n"
        "def replace(old, new):\n    if '.tmp' not in str(old):\n        left[0] -= 3\n"
        "    if left[0] < 0:\n        os._exit(9)\n    plain(old, new)\n"
        "swap.os.replace = replace\ncli.main(several=True)\n"
    )
    ran = torchrun(tmp_path, *command, script=[str(script)])
    assert ran.status != 0
    moved = list(tmp_path.glob("out-*"))
    assert len(moved) == 3
    assert not list(tmp_path.glob("*.index.json"))
    assert torchrun(tmp_path, *command).status == 0
    assert json.loads((tmp_path / "out.safetensors.index.json").read_text())["weight_map"]
    assert set(ckpt_surgeon.open(tmp_path / "out.safetensors.index.json")) == set(ckpt_surgeon.open(checkpoint))


@given(st.lists(st.integers(1, 1000), max_size=40), st.integers(1, 8))
def test_shards_are_shared_out_once_each_and_no_process_has_much_more(sizes: list[int], count: int) -> None:
    made = shares(sizes, count)
    assert sorted(index for share in made for index in share) == list(range(len(sizes)))
    loads = [sum(sizes[index] for index in share) for share in made]
    assert max(loads) - min(loads) <= max(sizes, default=0)


# Threads of one process


def shards_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_threads_write_the_same_bytes_and_tell_of_all_of_them(checkpoint: Path, tmp_path: Path) -> None:
    made = {}
    for threads in (1, 3, 64):
        folder = tmp_path / str(threads)
        folder.mkdir()
        planned = plan(ckpt_surgeon.open(checkpoint), folder / "out.pth", max_shard_size=30_000)
        told: list[int] = []
        write.write(planned, threads=threads, progress=told.append)
        made[threads] = shards_of(folder), sum(told)
    assert made[1] == made[3] == made[64]
    assert len(made[1][0]) > 4


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), SystemExit(143)])
def test_one_shard_that_fails_stops_the_others_and_nothing_is_left(
    error: BaseException, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, begun = Plan.fill, []

    def fill(planned: Plan, number: int, sink: Sink, tell: Progress, metadata: Mapping[str, str]) -> Written:
        begun.append(number)
        if len(begun) == 2:
            raise error
        written = plain(planned, number, sink, tell, metadata)
        tell(0)  # what is still to be written asks whether it should be
        return written

    monkeypatch.setattr(Plan, "fill", fill)
    planned = plan(ckpt_surgeon.open(checkpoint), tmp_path / "out.pth", max_shard_size=20_000)
    wanted = ckpt_surgeon.FileError if isinstance(error, OSError) else type(error)
    with pytest.raises(wanted):
        write.write(planned, threads=2)
    assert list(tmp_path.iterdir()) == []
    assert len(begun) < len(planned.files)


def test_damage_in_the_source_is_told_and_not_that_the_others_stopped(tmp_path: Path) -> None:
    torch.save({f"w{number}": torch.randn(1000, 100) for number in range(6)}, tmp_path / "in.pth")
    opened = ckpt_surgeon.open(tmp_path / "in.pth")
    with open(tmp_path / "in.pth", "r+b") as file:
        file.truncate(1_000_000)
    (tmp_path / "out").mkdir()
    planned = plan(opened, tmp_path / "out" / "out.safetensors", max_shard_size=400_000)
    with pytest.raises(ckpt_surgeon.BrokenFile, match=r"in\.pth: changed while it was read"):
        write.write(planned, threads=3)
    assert list((tmp_path / "out").iterdir()) == []
