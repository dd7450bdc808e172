"""DDP and FSDP by torchrun: saved by torch's own means, edited, resumed, and compared with the run that went on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import run_worker
import torch

import ckpt_surgeon
from ckpt_surgeon.runs.optimizer_keys import with_optimizer_keys
from ckpt_surgeon.runs.run import Run

WORKER = Path(run_worker.__file__)
PROCESSES = 2


def torchrun(what: str, folder: Path) -> None:
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}", WORKER, what, folder]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-4000:]


def opened(path: Path) -> Run:
    run = ckpt_surgeon.open_run(path)
    assert isinstance(run, Run)
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that were trained, saved, edited (``body`` is called ``trunk`` now) and resumed."""
    made = tmp_path_factory.mktemp("runs")
    torchrun("train", made)
    (made / "edited").mkdir()
    for name in run_worker.ARRANGEMENTS:
        run = opened(made / name)
        run = ckpt_surgeon.strip_prefix(run) if name.startswith("ddp") else run
        run = ckpt_surgeon.rename(run, ["body=trunk"])
        assert run.proof == "same run"
        ckpt_surgeon.save(run, made / "edited" / name)
    torchrun("resume", made)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", run_worker.ARRANGEMENTS)
def test_several_processes_go_on_bit_for_bit_from_an_edited_run(name: str, folder: Path) -> None:
    wanted, found = (torch.load(folder / f"{name}.{what}") for what in ("train", "resume"))
    assert found["losses"] == wanted["losses"]
    assert all(map(torch.equal, found["weights"], wanted["weights"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sharded.dcp", "flat.dcp", "full.pth", "fsdp1.pth"])
def test_one_process_takes_over_the_state_of_several(name: str, folder: Path) -> None:
    ckpt_surgeon.save(with_optimizer_keys(opened(folder / name), "positions"), folder / f"{name}.one.pth")
    file = torch.load(folder / f"{name}.one.pth", weights_only=True)
    model = run_worker.Net("body")
    model.load_state_dict(file["model"] if "model" in file else {key: file[key] for key in model.state_dict()})
    optimizer = run_worker.optimizer_of(model)
    optimizer.load_state_dict(file["optimizer"])
    full = torch.load(folder / "full.pth", weights_only=True)["optimizer"]["state"]
    for key, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        assert state["step"] == 5
        assert all(torch.allclose(state[slot], full[key][slot]) for slot in ("exp_avg", "exp_avg_sq"))
        if name != "fsdp1.pth":
            assert all(torch.equal(state[slot], full[key][slot]) for slot in ("exp_avg", "exp_avg_sq"))


@pytest.mark.slow
def test_several_processes_take_over_the_state_of_one(folder: Path) -> None:
    plain = ckpt_surgeon.strip_prefix(opened(folder / "ddp.pth"))
    ckpt_surgeon.save(with_optimizer_keys(plain, "names"), folder / "named.dcp")
    ckpt_surgeon.save(with_optimizer_keys(plain, "flat"), folder / "dots.dcp")
    for name in ("named.dcp", "dots.dcp"):
        back = opened(folder / name)
        assert [*back.weights] == [*run_worker.Net("body").state_dict()]
        ckpt_surgeon.save(with_optimizer_keys(back, "positions"), folder / f"{name}.pth")
        paths = (folder / "ddp.pth", folder / f"{name}.pth")
        one, other = (torch.load(path, weights_only=True)["optimizer"] for path in paths)
        assert one["state"].keys() == other["state"].keys()
        assert all(
            torch.equal(value, other["state"][id_][slot])
            for id_, slots in one["state"].items()
            for slot, value in slots.items()
        )
