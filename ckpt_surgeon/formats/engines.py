"""Folders in which a training engine left one checkpoint in many files: the reader of each kind, by the names inside.

A reader gets what reads one file; it puts the parts together as a tree, whose tensors stay where they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from ..errors import NotACheckpoint
from ..files.paths import FilePath
from . import accelerate, rank_files, speechbrain
from .contents import Contents
from .deepspeed import files as deepspeed
from .deepspeed import universal, zero
from .megatron import ranks as megatron
from .sharded import Reader


class FolderReader(Protocol):
    """Reads a folder, of which it gets the names."""

    def __call__(
        self, folder: FilePath, names: Sequence[str], read_file: Reader, *, salvage: bool = False
    ) -> Contents: ...


class Engine(NamedTuple):
    """One kind of folder: whether a folder with these names is one, and what reads it."""

    holds: Callable[[Iterable[str]], bool]
    read: FolderReader


ENGINES: tuple[Engine, ...] = (
    Engine(universal.holds, universal.read),
    Engine(deepspeed.holds, zero.read),
    Engine(rank_files.holds, rank_files.read),
    Engine(megatron.holds, megatron.read),
    Engine(speechbrain.holds, speechbrain.read),
)

# What leads from a folder of steps to that of one, which is then read as if it had been named.
STEPS: tuple[Callable[[FilePath, Sequence[str]], FilePath | None], ...] = (
    deepspeed.step_folder,
    megatron.step_folder,
    speechbrain.step_folder,
)


# What leads on before any file in the folder is taken for the checkpoint: a scheduler's file may be the only one there.
FIRST: tuple[Callable[[FilePath, Sequence[str]], FilePath | None], ...] = (accelerate.model_folder,)


def holds(folder: FilePath) -> bool:
    """Whether a folder is one of these kinds."""
    names = folder.names()
    return any(engine.holds(names) for engine in ENGINES)


def read(folder: FilePath, read_file: Reader, *, salvage: bool = False) -> Contents | None:
    """What a folder of one of these kinds holds; None for any other folder.  Raises BrokenFile, NotACheckpoint."""
    names = folder.names()
    for engine in ENGINES:
        if engine.holds(names):
            return engine.read(folder, names, read_file, salvage=salvage)
    return None


def step(folder: FilePath) -> FilePath | None:
    """The folder of one step that a folder of steps means; None where it is none.  Raises NotACheckpoint."""
    return _led(STEPS, folder)


def beside(folder: FilePath) -> Iterator[str]:
    """A note on the step of an engine's training that lies in a folder whose own weights were read."""
    try:
        found = step(folder)
    except NotACheckpoint:
        return
    if found is not None:
        yield f"{found} is the training that these weights are of, with its optimizer, not read"


def inner(folder: FilePath) -> FilePath | None:
    """The folder inside that has the weights, whatever files are beside it; None where there is none.

    Raises NotACheckpoint where there are several.
    """
    return _led(FIRST, folder)


def _led(
    leads: Sequence[Callable[[FilePath, Sequence[str]], FilePath | None]], folder: FilePath
) -> FilePath | None:  # fmt: skip
    names = folder.names()
    return next((found for lead in leads if (found := lead(folder, names)) is not None), None)


def folder_of(path: FilePath) -> FilePath | None:
    """The folder that is read as one checkpoint and has this file as one of its parts; None where there is none."""
    if not path.has_listing or path.is_dir():
        return None
    folder = path.parent.parent if megatron.holds([path.parent.name]) else path.parent
    return folder if holds(folder) else None
