"""A run that is a folder: weights in one file (or shards), the optimizer in another, the rest beside them.

So write Hugging Face's Trainer (``optimizer.pt``, ``scheduler.pt``, ``rng_state.pth``, ``trainer_state.json``) and
accelerate's ``save_state`` (``optimizer.bin``, ``scheduler.bin``, ``random_states_0.pkl``).  The files are edited
together and written as a folder, all or none.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from ..edits.change import Change, Edit
from ..errors import BrokenFile, EditError, FileError, NothingMatched, OutputExists, listed
from ..files import swap
from ..files.local import LocalPath
from ..files.paths import AnyPath, file_path
from ..files.sinks import FileSink, Progress
from ..files.temporary import Hold, new_token, temporary
from ..formats.shard_names import sets_in
from ..formats.zip.whole import Whole, read_whole, write_whole
from ..reading.opening import open as open_checkpoint
from ..tensors.checkpoint import Checkpoint
from ..text import Shown
from ..writing import write
from ..writing.plan import Plan
from .follow import SAME_RUN, Planner, follow_all, notes_of, planned_and_replayed, weakest
from .naming import Names, names_of
from .nodes import differs
from .opening import open_run_file
from .optimizer_nodes import is_optimizer, read_state, written_state
from .run import Run
from .state import OptimizerState

OPTIMIZERS = ("optimizer*.pt", "optimizer*.bin")
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors")


@dataclass(frozen=True, slots=True, eq=False)
class OptimizerFile:
    """A file that holds one optimizer's state and nothing else."""

    name: str
    whole: Whole
    state: OptimizerState


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class RunFolder(Shown):
    """A folder's weights and optimizers, edited together; ``others`` are the names of files that stay as they are."""

    folder: Path
    weights: Checkpoint
    weight_files: tuple[str, ...]
    optimizers: tuple[OptimizerFile, ...]
    others: tuple[str, ...]
    stated: tuple[str, ...] = ()
    in_model_order: bool = False
    proof: str = SAME_RUN
    notes: tuple[str, ...] = ()

    def names(self, state: OptimizerState) -> Names | None:
        """The parameters behind an optimizer's ids, and how they are known."""
        return names_of(state, self.weights, stated=self.stated, in_model_order=self.in_model_order)

    def edited(
        self, plan: Planner, *, computes: bool = False, replay: Planner | None = None, reset: Iterable[str] = (),
        moments: str = "zero",
    ) -> tuple[RunFolder, Change[Checkpoint]]:  # fmt: skip
        """The folder after an edit of its weights, and the change: see :meth:`ckpt_surgeon.runs.run.Run.edited`."""
        change = plan(self.weights)
        states = [(file.state, self.names(file.state)) for file in self.optimizers]
        own = change.of_first(self.weights)
        done = follow_all(states, own, replay or plan, computes=computes, reset=reset)
        if any(followed.emptied for followed in done):
            raise EditError(["a param group would lose all its parameters, and the schedulers lie in other files"])
        files = tuple(replace(file, state=followed.state) for file, followed in zip(self.optimizers, done, strict=True))
        notes = dict.fromkeys([*self.notes, *notes_of(done, moments)])
        proofs = [self.proof, *(followed.proof for followed in done)]
        made = replace(self, weights=change.result, optimizers=files, notes=tuple(notes), proof=weakest(proofs))
        return made, change

    def left_out(self, patterns: Iterable[str]) -> RunFolder:
        """The folder without the files that the globs name, with or without their extension.  Raises NothingMatched."""
        gone: set[str] = set()
        names = [*self.others, *(file.name for file in self.optimizers)]
        for pattern in patterns:
            hits = {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(Path(name).stem, pattern)}
            if not hits:
                raise NothingMatched([pattern], what="file", examples=names)
            gone |= hits
        others = tuple(name for name in self.others if name not in gone)
        return replace(self, others=others, optimizers=tuple(file for file in self.optimizers if file.name not in gone))

    def edited_by(self, edit: Edit[...], args: tuple[object, ...], kwargs: Mapping[str, object]) -> RunFolder:
        """The folder after an edit that is called on it."""
        plan, replay = planned_and_replayed(edit, args, kwargs)
        return self.edited(plan, computes=edit.declaration.computes, replay=replay)[0]

    def save_to(self, out: AnyPath, *, force: bool = False, progress: Progress | None = None) -> Plan:
        """Write the run as a folder: see :func:`save_run_folder`."""
        return save_run_folder(self, out, force=force)


def open_run(
    source: AnyPath, *, select: str | None = None, stated: Iterable[str] = (), in_model_order: bool = False
) -> Run | RunFolder:
    """Open a training checkpoint whole, a file of torch.save or a folder of Trainer's or accelerate's.

    Nothing in it is run and no tensor is read.  Edits of it return another run whose optimizers have followed, and
    :func:`ckpt_surgeon.save` writes it.  ``select`` is the dotted path of the weights, where a file holds several;
    ``stated`` are the parameters' names in the order of the optimizer's ids; ``in_model_order`` says that the optimizer
    got the parameters in the order of the state_dict.  Raises what :func:`ckpt_surgeon.open` raises, and FileError for
    what cannot be kept whole.

    >>> import ckpt_surgeon, torch
    >>> model = torch.nn.ModuleDict({"module": torch.nn.Linear(2, 2)})
    >>> optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    >>> torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}, "last.ckpt")
    >>> plan = ckpt_surgeon.save(ckpt_surgeon.strip_prefix(ckpt_surgeon.open_run("last.ckpt")), "clean.ckpt")
    >>> torch.load("clean.ckpt")["optimizer"]["param_groups"][0]["param_names"]
    ['weight', 'bias']
    """
    where = file_path(source)
    if where.local is not None and is_run_folder(where.local):
        return open_run_folder(where.local, stated=stated, in_model_order=in_model_order)
    return open_run_file(where, select=select, stated=stated, in_model_order=in_model_order)


def is_run_folder(path: Path) -> bool:
    """Whether a folder holds an optimizer's state beside weights."""
    return path.is_dir() and any(any(path.glob(pattern)) for pattern in OPTIMIZERS)


def open_run_folder(folder: Path, *, stated: Iterable[str] = (), in_model_order: bool = False) -> RunFolder:
    """Open a folder of Trainer's or accelerate's whole.  Raises FileError where it holds no such run."""
    names = sorted(os.listdir(folder))
    weights = open_checkpoint(_weights_in(folder, names))
    optimizers = [_optimizer(folder / name) for name in names if _is_optimizer_name(folder / name)]
    found = tuple(file for file in optimizers if file is not None)
    if not found:
        raise FileError(folder, "holds no optimizer's state", "leave out --whole to take the weights alone")
    files = tuple(sorted({path.name for tensor in weights.values() for path in _files(tensor)}))
    index = tuple(name for name in names if name.endswith(".index.json"))
    used = {*files, *index, *(file.name for file in found)}
    others = tuple(name for name in names if name not in used)
    return RunFolder(folder, weights, (*files, *index), found, others, tuple(stated), in_model_order)


def _weights_in(folder: Path, names: list[str]) -> Path:
    for name in WEIGHTS:
        for there in (name, f"{name}.index.json"):
            if there in names:
                return folder / there
    return folder


def _files(tensor: object) -> tuple[Path, ...]:
    storage = getattr(tensor, "storage", None)
    return tuple(Path(str(path)) for path in storage.files) if storage is not None else ()


def _is_optimizer_name(path: Path) -> bool:
    return any(path.match(pattern) for pattern in OPTIMIZERS)


def _optimizer(path: Path) -> OptimizerFile | None:
    whole = read_whole(file_path(path))
    return OptimizerFile(path.name, whole, read_state(whole, (), whole.root)) if is_optimizer(whole.root) else None


def save_run_folder(run: RunFolder, target: AnyPath, *, force: bool = False) -> Plan:
    """Write a run as a folder: weights in their container, optimizers, and all other files as they are; all or none.

    Raises OutputExists where something is there, without ``force``; FileError where OUT is not on this machine.
    """
    out = file_path(target).local
    if out is None:
        raise FileError(file_path(target), "would be a folder at a URL", "write it on this machine")
    if out.lexists() and not force:
        raise OutputExists(out)
    swap.check_replaceable(out, is_folder=True)
    final = LocalPath(os.path.realpath(out))
    made, hold = temporary(final, new_token()), Hold()
    try:
        os.mkdir(made)
        hold.take(made)
        planned = _write_weights(run, made)
        for file in run.optimizers:
            _write_optimizer(file, made / file.name)
        for name in run.others:
            source = run.folder / name
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, made / name)
        shutil.copystat(run.folder, made)
        _refuse_other_folder(run, made, final)
        swap.put(made, final)
    except BaseException as error:
        shutil.rmtree(made, ignore_errors=True)
        if isinstance(error, OSError):
            problem = f"could not be written ({error.strerror or error}), nothing was replaced"
            raise FileError(out, problem, "write elsewhere") from error
        raise
    finally:
        hold.release()
    shutil.rmtree(made, ignore_errors=True)  # what is left of the old one: folders
    return planned


def _refuse_other_folder(run: RunFolder, made: LocalPath, out: LocalPath) -> None:
    """A folder is only replaced when all that is in it is written again, or was read as this very run's weights."""
    if not out.lexists():
        return
    mine = {str(path.relative_to(made)) for path in made.rglob("*")}
    if os.path.realpath(run.folder) == str(out):
        mine.update((*run.weight_files, *(file.name for file in run.optimizers)))
    others = sorted(str(path.relative_to(out)) for path in out.rglob("*") if str(path.relative_to(out)) not in mine)
    if others:
        problem = f"is a folder with more in it than this run ({listed(others, 4)})"
        raise FileError(out, problem, "write elsewhere, or move those away")


def _write_weights(run: RunFolder, made: Path) -> Plan:
    """The weights under the name and in the shards' size that they had."""
    shards = [name for name in run.weight_files if not name.endswith(".index.json")]
    if len(shards) == 1:
        return write.save(run.weights, made / shards[0])
    indexes = [name.removesuffix(".index.json") for name in run.weight_files if name.endswith(".index.json")]
    whole = [*indexes, *(one.whole.name for one in sets_in(file_path(run.folder), shards)), "model.safetensors"]
    limit = max((run.folder / name).stat().st_size for name in shards)
    return write.save(run.weights, made / whole[0], max_shard_size=limit)


def _write_optimizer(file: OptimizerFile, path: Path) -> None:
    """An optimizer's file, down to the disk; one that nothing reached into is written as it was."""
    original = read_state(file.whole, (), file.whole.root)
    instead = {id(file.whole.root): written_state(file.state)} if differs(file.state, original) else {}
    with open(path, "xb") as made:
        with FileSink(made.fileno(), lambda done: None) as sink:
            write_whole(sink, file.whole, instead)
        os.fsync(made.fileno())
    if not is_optimizer(read_whole(file_path(path)).root):
        raise BrokenFile(path, "did not read back as an optimizer's state, nothing was replaced")
