"""The names of the files that DeepSpeed leaves for one step, and which of them are missing.

``deepspeed/runtime/engine.py`` gives the names: ``mp_rank_00_model_states.pt`` (in ZeRO-3
``zero_pp_rank_R_mp_rank_00_model_states.pt``, one a rank) has the module, and
``[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt`` rank R's part of the optimizer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ...errors import BrokenFile, NotACheckpoint, listed
from ...files.paths import FilePath
from ...text import plural

LATEST = ("latest", "latest_universal")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL_PART = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
_MODEL = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_OTHERS = re.compile(r"(?:layer_\d+-model_\d+|layer_\d+_expert_\d+_mp_rank_\d+)_?-?model_states\.pt|expp_rank_.*\.pt")
_STEP = re.compile(r"global_step\d+(?:_universal)?")
_MANY = "it was saved by another number of processes, or over an older checkpoint: fetch the folder again"


@dataclass(frozen=True, slots=True)
class ZeroFiles:
    """The files of one step: the module's (by rank in ZeRO-3, else one), and the optimizer's by rank."""

    folder: FilePath
    models: Mapping[int, str]
    optimizers: Mapping[int, str]
    is_stage_3: bool

    def check_count(self, ranks: int, of_optimizer: bool) -> None:
        """Raise BrokenFile unless there is a file of each of so many ranks, naming those that are missing."""
        names = self.optimizers if of_optimizer else self.models
        missing = [rank for rank in range(ranks) if rank not in names]
        more = [name for rank, name in names.items() if rank >= ranks]
        if missing and (beside := names or self.models or self.optimizers):
            like = re.sub(r"rank_\d+", "rank_{}", next(iter(beside.values())), count=1)
            shown = listed([like.format(rank) for rank in missing], 3)
            problem = f"has {len(names):,} of the files of {plural(ranks, 'rank')}; missing: {shown}"
            raise BrokenFile(self.folder, problem, "fetch the missing files")
        if more:
            raise BrokenFile(self.folder, f"was saved by {plural(ranks, 'rank')} and has {listed(more, 3)} too", _MANY)


def holds(names: Iterable[str]) -> bool:
    """Whether a folder with these names is a ZeRO checkpoint of one step.

    >>> holds(["mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"])
    True
    """
    return any(_OPTIMIZER.fullmatch(name) or _MODEL_PART.fullmatch(name) for name in names)


def is_model_file(name: str) -> bool:
    """Whether this is a file of the module, or of one rank's part of it."""
    return _MODEL.fullmatch(name) is not None or _MODEL_PART.fullmatch(name) is not None


def files_in(folder: FilePath, names: Sequence[str]) -> ZeroFiles:
    """The files of a ZeRO checkpoint.  Raises NotACheckpoint for layouts that are not read: what they are."""
    optimizers = [(match, name) for name in names if (match := _OPTIMIZER.fullmatch(name))]
    parts = [(match, name) for name in names if (match := _MODEL_PART.fullmatch(name))]
    models = [(match, name) for name in names if (match := _MODEL.fullmatch(name))]
    others = [name for name in names if _OTHERS.fullmatch(name)]
    parallel = {int(match[2]) for match, _ in (*optimizers, *parts)} | {int(match[1]) for match, _ in models}
    if others:
        problem = f"is a DeepSpeed checkpoint of pipeline stages or experts ({listed(others, 2)})"
        raise NotACheckpoint(folder, problem, "make a universal checkpoint of it with DeepSpeed's ds_to_universal.py")
    if len(parallel) > 1:
        problem = f"is a DeepSpeed checkpoint of {len(parallel):,} model-parallel ranks"
        remedy = "join their 16-bit weights: ckpt join mp_rank_00_model_states.pt … OUT --concat REGEX DIM"
        raise NotACheckpoint(folder, problem, remedy)
    whole = dict.fromkeys((0,), models[0][1]) if models else {}
    by_rank = {int(match[1]): name for match, name in parts}
    found = {int(match[1]): name for match, name in optimizers}
    return ZeroFiles(folder, by_rank or whole, dict(sorted(found.items())), bool(by_rank))


def step_folder(folder: FilePath, names: Sequence[str]) -> FilePath | None:
    """The folder of the step that a folder of steps means; None where it is no folder of DeepSpeed's.

    Raises NotACheckpoint where several steps are there and ``latest`` names none of them.
    """
    steps = [name for name in names if _STEP.fullmatch(name) and (folder / name).is_dir()]
    for name in LATEST:
        if name in names and (folder / name).is_file():
            tag = (folder / name).head()[:200].decode("utf-8", "replace").strip()
            if tag in names and (folder / tag).is_dir():
                return folder / tag
            if steps:
                raise NotACheckpoint(folder, f"has a {name!r} that names {tag!r}, which is not there",
                                     f"name one: {listed(steps, 3)}")  # fmt: skip
    if len(steps) > 1:
        raise NotACheckpoint(
            folder, f"has {len(steps):,} steps of DeepSpeed and no 'latest'", f"name one: {listed(steps, 3)}"
        )
    return folder / steps[0] if steps else None
