"""Time and memory of whole processes beside ``cp`` of the same file, in the same run: ``make bench``.

Every command runs several times, in turns with ``cp``, and the fastest run counts; a busy machine still disturbs the
ratios, which more rounds make steadier.  Memory is the peak resident size that the kernel reports when the process
ends.  The files are made on the spot, in memory (``/dev/shm``) where there is room.  This process stays small and
imports no torch, because a child's reported peak is never below its parent's size.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

GIB = 1 << 30
MIB = 1 << 20
SHARD = 64 * MIB  # the output's

# Programs that make the files and the rows to compare with, each run as a process of its own.

MAKE_LARGE = """
import json, math, sys
import torch
from safetensors.torch import load_file
folder, nbytes = sys.argv[1], int(sys.argv[2])
layers = 24
width = math.isqrt(nbytes // (4 * 12 * layers))
shapes = {}
for layer in range(layers):
    at = f"module.model.layers.{layer}."
    for part in ("q", "k", "v", "o"):
        shapes[f"{at}self_attn.{part}_proj.weight"] = (width, width)
    shapes[f"{at}mlp.up_proj.weight"] = (4 * width, width)
    shapes[f"{at}mlp.up_proj.bias"] = (4 * width,)
    shapes[f"{at}mlp.down_proj.weight"] = (width, 4 * width)
    for part in ("mlp.down_proj.bias", "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
        shapes[at + part] = (width,)
header, end = {"__metadata__": {"format": "pt"}}, 0
for key, shape in shapes.items():
    size = 4 * math.prod(shape)
    header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
    end += size
raw = json.dumps(header).encode()
raw += b" " * (-len(raw) % 8)
noise = bytes(torch.randn(2 << 20).view(torch.uint8).tolist())
with open(f"{folder}/in.safetensors", "wb") as file:
    file.write(len(raw).to_bytes(8, "little") + raw)
    while end:
        end -= file.write(noise[: min(end, len(noise))])
loaded = load_file(f"{folder}/in.safetensors")
torch.save({key: loaded[key] for key in shapes}, f"{folder}/in.pth")
"""

MAKE_RUN = """
import sys
import torch
from safetensors.torch import load_file
loaded = load_file(sys.argv[1] + "/in.safetensors")
keys = list(loaded)
third = len(keys) // 3  # as many layers are the model, their averages and their averages of squares
names = keys[:third]
averages, squares = (loaded[key] for key in keys[third:2 * third]), (loaded[key] for key in keys[2 * third:])
slots = {
    index: {"step": torch.tensor(5.0), "exp_avg": one, "exp_avg_sq": other}
    for index, (one, other) in enumerate(zip(averages, squares))
}
options = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False}
groups = [{**options, "params": list(range(third)), "param_names": names}]
model = {name: loaded[name] for name in names}
run = {"model": model, "optimizer": {"state": slots, "param_groups": groups}, "epoch": 3}
torch.save(run, sys.argv[1] + "/in.run.pth")
"""

MAKE_SMALL = """
import sys
import torch
from safetensors.torch import save_file
folder = sys.argv[1]
few = {f"module.layers.{number}.weight": torch.ones(16, 16) for number in range(20)}
many = {f"layers.{number // 10}.block.{number % 10}.weight": torch.ones(4) for number in range(100_000)}
torch.save(few, f"{folder}/small.pth")
torch.save(many, f"{folder}/many.pth")
save_file(many, f"{folder}/many.safetensors")
"""

TORCH = """
import sys, torch
state_dict = torch.load(sys.argv[1], map_location="cpu")
torch.save({key.removeprefix("module."): tensor for key, tensor in state_dict.items()}, sys.argv[2])
"""

SAFETENSORS = """
import sys
from safetensors.torch import load_file, save_file
state_dict = load_file(sys.argv[1])
save_file({key.removeprefix("module."): tensor for key, tensor in state_dict.items()}, sys.argv[2])
"""

# One pass over mapped tensors: what a cast cannot well be faster than.
LOOP = """
import ctypes, sys, torch
state_dict = torch.load(sys.argv[1], mmap=True)
with open(sys.argv[2], "wb") as out:
    for tensor in state_dict.values():
        made = tensor.to(torch.bfloat16)
        out.write((ctypes.c_char * made.nbytes).from_address(made.data_ptr()))
"""

# As timm's avg_checkpoints.py: sums in float64, all in memory.
AVERAGE = """
import sys, torch
from safetensors.torch import load_file, save_file
*paths, out = sys.argv[1:]
sums = {}
for path in paths:
    for key, tensor in load_file(path).items():
        sums[key] = sums[key] + tensor.double() if key in sums else tensor.double()
save_file({key: (total / len(paths)).float() for key, total in sums.items()}, out)
"""

MODEL = """
import sys, torch
with torch.device("meta"):
    sizes = [(1024, 4096) if number % 2 == 0 else (4096, 1024) for number in range(64)]
    model = torch.nn.Sequential(*(torch.nn.Linear(*size) for size in sizes))
"""
MAKE_MODEL = (
    MODEL
    + """
from safetensors.torch import save_file
folder = sys.argv[1]
state_dict = {key: torch.full(value.shape, 0.5) for key, value in model.state_dict().items()}
torch.save(state_dict, f"{folder}/model.pth")
torch.save(state_dict, f"{folder}/legacy.pth", _use_new_zipfile_serialization=False)
save_file(state_dict, f"{folder}/model.safetensors")
"""
)
LOAD_TORCH = MODEL + "model.load_state_dict(torch.load(sys.argv[1], mmap='legacy' not in sys.argv[1]), assign=True)"
LOAD_SAFETENSORS = MODEL + (
    "from safetensors.torch import load_file; model.load_state_dict(load_file(sys.argv[1]), assign=True)"
)
LOAD_OURS = MODEL + "import ckpt_surgeon; ckpt_surgeon.load_into(model, sys.argv[1])"

PROGRAMS = {
    "torch": TORCH,
    "safetensors": SAFETENSORS,
    "import": "import torch",
    "loop": LOOP,
    "average": AVERAGE,
    "copy": "cat $0 $1 $2 > /dev/null; cp $0 $3",
    "load_torch": LOAD_TORCH,
    "load_safetensors": LOAD_SAFETENSORS,
    "load_ours": LOAD_OURS,
}


@dataclass(frozen=True, slots=True)
class Case:
    """One row: a command line with {placeholders}, and what it may take at most."""

    name: str
    command: str
    most_ratio: float | None = None  # × the group's first row
    most_seconds: float | None = None
    most_mib: float | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that are measured in turns on one file; the first one is what the others are compared with."""

    source: str
    cases: tuple[Case, ...]
    compared: bool = True


@dataclass(slots=True)
class Measured:
    """What the runs of one case took: seconds each, and the largest peak in bytes."""

    case: Case
    seconds: list[float] = field(default_factory=list)
    peak: int = 0

    @property
    def best(self) -> float:
        return min(self.seconds)


def cp(name: str) -> Case:
    """The row that others are compared with."""
    return Case(f"cp {name}", "cp {source} {out}")


def unhurried(cases: Sequence[Case]) -> Iterator[Case]:
    """The cases without their limits to the ratio: on smaller files, Python's own start weighs too much for them."""
    return (replace(case, most_ratio=None) for case in cases)


STRIP_PTH = (
    cp("in.pth"),
    Case("ckpt strip-prefix .pth → .pth", "{ckpt} strip-prefix {source} {out}.pth", 1.15, most_mib=40),
    Case("ckpt strip-prefix .pth → .safetensors", "{ckpt} strip-prefix {source} {out}.safetensors", 1.25, most_mib=40),
)
STRIP_SAFETENSORS = (
    cp("in.safetensors"),
    Case(
        "ckpt strip-prefix .safetensors → .safetensors",
        "{ckpt} strip-prefix {source} {out}.safetensors",
        1.15,
        most_mib=40,
    ),
)


WHOLE = Group(
    "in.run.pth",
    (
        cp("in.run.pth"),
        Case(
            "ckpt strip-prefix --whole .pth → .pth", "{ckpt} strip-prefix {source} {out}.pth --whole", 1.15, most_mib=60
        ),
    ),
)


def in_place(suffix: str) -> Group:
    """Names changed there and back, run for run; last of all, since it is the file that others start from."""
    renaming = "{ckpt} rename --in-place {source} ^module=eludom ^eludom=module --allow-unmatched"
    listing = Case(f"ckpt ls {suffix}", "{ckpt} ls {source}")
    return Group(f"in{suffix}", (listing, Case(f"ckpt rename --in-place {suffix}", renaming, 2, most_mib=40)))


LARGE = (
    Group("in.pth", STRIP_PTH),
    Group("in.safetensors", STRIP_SAFETENSORS),
    WHOLE,
    in_place(".pth"),
    in_place(".safetensors"),
)
ONE_GIB = (
    Group("in.pth", (*unhurried(STRIP_PTH), Case("torch.load + torch.save", "{python} -c {torch} {source} {out}"))),
    Group(
        "in.safetensors",
        (
            *unhurried(STRIP_SAFETENSORS),
            Case("safetensors load_file + save_file", "{python} -c {safetensors} {source} {out}"),
        ),
    ),
)
VALUES = (
    Group(
        "in.pth",
        (
            Case("torch: one pass of .to(bfloat16), mapped", "{python} -c {loop} {source} {out}.raw"),
            Case("ckpt cast --dtype bf16, .pth → .pth", "{ckpt} cast {source} {out}.pth --dtype bf16", 1.5),
        ),
    ),
    Group(
        "in.safetensors",
        (
            Case("cmp of two equal files", "cmp {source} {source}.copy"),
            Case("ckpt diff --values of the same", "{ckpt} diff {source} {source}.copy --values", 2),
        ),
    ),
    Group(
        "in.safetensors",
        (
            Case("cat A B C > /dev/null; cp A OUT", "sh -c {copy} {source} {source}.copy {source} {out}.safetensors"),
            Case(
                "ckpt average A B C",
                "{ckpt} average {source} {source}.copy {source} {out}.safetensors",
                1.5,
                most_mib=120,
            ),
            Case("ckpt add A B", "{ckpt} add {source} {source}.copy {out}.safetensors"),
            Case(
                "average in torch, as timm", "{python} -c {average} {source} {source}.copy {source} {out}.safetensors"
            ),
        ),
    ),
)
LOADS = tuple(
    Group(name, (Case(f"{said}, {name}", first), Case(f"load_into, {name}", "{python} -c {load_ours} {source}", 1)))
    for name, said, first in (
        ("model.pth", "torch.load(mmap=True) + assign", "{python} -c {load_torch} {source}"),
        ("model.safetensors", "safetensors load_file + assign", "{python} -c {load_safetensors} {source}"),
        ("legacy.pth", "torch.load + assign", "{python} -c {load_torch} {source}"),
    )
)
STRIP_SHARDS = "{ckpt} strip-prefix {source} {out}.safetensors --max-shard-size {shard} --threads "
CAST_SHARDS = (
    "-m ckpt_surgeon cast {source} {out}.safetensors --dtype float8_e4m3fn --max-shard-size {shard} --threads 1 -q"
)
SHARDED = (
    Group(
        "sharded",
        (
            Case("cp -r of 16 shards", "cp -r {source} {out}"),
            Case("ckpt strip-prefix, shards → shards, 1 thread", STRIP_SHARDS + "1", most_mib=400),
            Case("ckpt strip-prefix, shards → shards, 2 threads", STRIP_SHARDS + "2", 1, most_mib=400),
        ),
    ),
    Group(
        "sharded",
        (
            Case(
                "1 rank: ckpt cast --dtype float8_e4m3fn, shards → shards, 1 thread",
                "{torchrun} --nproc-per-node 1 " + CAST_SHARDS,
                most_mib=400,
            ),
            Case("2 ranks: the same", "{torchrun} --nproc-per-node 2 " + CAST_SHARDS, 1 / 1.6, most_mib=400),
            Case("2 ranks: ckpt --version", "{torchrun} --nproc-per-node 2 -m ckpt_surgeon --version"),
        ),
    ),
)
SMALL = (
    Group("small.pth", (Case("ckpt ls, 20 keys", "{ckpt} ls {source}", most_seconds=0.15, most_mib=40),), False),
    Group("many.pth", (Case("ckpt ls, 100,000 keys, .pth", "{ckpt} ls {source}", most_seconds=2),), False),
    Group(
        "many.safetensors", (Case("ckpt ls, 100,000 keys, .safetensors", "{ckpt} ls {source}", most_seconds=2),), False
    ),
    Group(
        "many.safetensors",
        (
            Case(
                "ckpt rename, 100,000 keys × 50 regular expressions",
                "{ckpt} rename {source} {out}.safetensors --regex --from {rules} --allow-unmatched",
            ),
        ),
        False,
    ),
    Group("small.pth", (Case("python -c 'import torch'", "{python} -c {import}"),), False),
)


def run(command: Sequence[str]) -> tuple[float, int]:
    """Run a process to its end: seconds and peak resident bytes."""
    start = time.perf_counter()
    environment = (
        {**os.environ, "OMP_NUM_THREADS": "1"} if "-m" in command else None
    )  # torchrun's own for several ranks
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"bench: exit status {process.returncode}: {shlex.join(command)[:200]}")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def words(case: Case, folder: Path, source: str) -> list[str]:
    """The words of a case's command line."""
    places = {
        "ckpt": str(Path(sys.executable).with_name("ckpt")),
        "python": sys.executable,
        "torchrun": f"{Path(sys.executable).with_name('torchrun')} --standalone",
        "shard": str(SHARD),
        "source": str(folder / source),
        "out": str(folder / "out" / "file"),
        "rules": str(folder / "rules.txt"),
        **PROGRAMS,
    }
    torchrun = places["torchrun"].split()
    split = shlex.split(case.command)
    return [one for word in split for one in (torchrun if word == "{torchrun}" else [word.format_map(places)])]


def measured(group: Group, folder: Path, rounds: int) -> list[Measured]:
    """Run the cases of a group in turns; every output is removed before the next one is written.

    The first turn warms the machine up (a virtual one may have to fetch its memory first) and does not count.
    """
    results = [Measured(case) for case in group.cases]
    for number in range(rounds + 1):
        for result in results:
            shutil.rmtree(folder / "out", ignore_errors=True)
            (folder / "out").mkdir()
            seconds, peak = run(words(result.case, folder, group.source))
            if number:
                result.seconds.append(seconds)
            result.peak = max(result.peak, peak)
    shutil.rmtree(folder / "out", ignore_errors=True)
    return results


def judged(value: float, most: float | None, form: str) -> str:
    """A figure, and where it has a limit, whether it keeps it."""
    said = form.format(value)
    if most is None:
        return said
    return f"{said} (≤ {most:g}: {'ok' if value <= most else 'MISSED'})"


def row(result: Measured, base: Measured | None) -> list[str]:
    """The cells of one result."""
    case = result.case
    ratio = ""
    if base is not None:
        ratio = judged(result.best / base.best, case.most_ratio, "{:.2f}")
    return [
        case.name,
        judged(result.best, case.most_seconds, "{:.2f}"),
        ratio,
        judged(result.peak / MIB, case.most_mib, "{:.0f}"),
    ]


def report(title: str, groups: Sequence[Group], folder: Path, rounds: int) -> None:
    """Measure some groups and print them as one table."""
    from tabulate import tabulate

    rows = []
    for group in groups:
        results = measured(group, folder, rounds)
        rows += [row(result, results[0] if group.compared else None) for result in results]
    headers = ["command", "seconds", "÷ the row it is compared with", "peak MiB"]
    print(f"\n{title}\n\n{tabulate(rows, headers, tablefmt='github', disable_numparse=True)}", flush=True)


@contextmanager
def workspace(nbytes: int) -> Iterator[Path]:
    """A scratch folder, in memory where that has room for ``nbytes``."""
    shared = Path("/dev/shm")
    in_memory = shared.is_dir() and shutil.disk_usage(shared).free > nbytes
    folder = Path(tempfile.mkdtemp(prefix="ckpt_bench_", dir=shared if in_memory else None))
    try:
        print(f"files lie in {folder}" + ("" if in_memory else ": on a disk, which makes every figure less steady"))
        yield folder
    finally:
        shutil.rmtree(folder)


def bench_large(folder: Path, gib: float, groups: Sequence[Group], rounds: int) -> None:
    """Make the large files, measure, and remove them."""
    run([sys.executable, "-c", MAKE_LARGE, str(folder), str(int(gib * GIB))])
    if WHOLE in groups:
        run([sys.executable, "-c", MAKE_RUN, str(folder)])
    if SHARDED[0] in groups:
        convert = [str(Path(sys.executable).with_name("ckpt")), "convert", str(folder / "in.safetensors")]
        (folder / "sharded").mkdir()
        run([*convert, str(folder / "sharded" / "in.safetensors"), "--max-shard-size", str(int(gib * GIB / 15.5))])
        (folder / "in.pth").unlink()
        (folder / "in.safetensors").unlink()
    if VALUES[0] in groups:
        shutil.copy(folder / "in.safetensors", folder / "in.safetensors.copy")
    report(f"{gib:g} GiB in 288 float32 tensors", groups, folder, rounds)
    for path in folder.glob("in.*"):
        path.unlink()
    shutil.rmtree(folder / "sharded", ignore_errors=True)


def main() -> None:
    """Measure everything and print the tables."""
    parser = argparse.ArgumentParser(description="Time and memory beside cp.")
    parser.add_argument("--gib", type=float, default=4, metavar="N", help="size of the large checkpoint [default: 4]")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="runs of each, the best counts [default: 3]")
    options = parser.parse_args()
    with workspace(int(3.2 * max(options.gib, 1) * GIB)) as folder:
        bench_large(folder, options.gib, LARGE, options.rounds)
        bench_large(folder, options.gib, SHARDED, options.rounds)
        bench_large(folder, min(options.gib, 1), (*ONE_GIB, *VALUES), options.rounds)
        run([sys.executable, "-c", MAKE_MODEL, str(folder)])
        report("a model of 1 GiB on the meta device, loaded", LOADS, folder, options.rounds)
        for name in ("model.pth", "model.safetensors", "legacy.pth"):
            (folder / name).unlink()
        run([sys.executable, "-c", MAKE_SMALL, str(folder)])
        rules = (f"part{number}\\.(.*)=other{number}.\\1" for number in range(49))
        (folder / "rules.txt").write_text("\n".join([*rules, r"layers\.(?P<n>\d+)\.(.*)=blocks.{n+1}.\2"]))
        report("small work", SMALL, folder, options.rounds)


if __name__ == "__main__":
    main()
