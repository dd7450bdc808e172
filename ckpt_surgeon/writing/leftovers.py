"""What runs that were killed left behind beside an output: named by the next run, removed by ``ckpt recover``."""

from __future__ import annotations

from ..files.local import LocalPath
from ..files.moves import clear, take_back
from ..files.paths import AnyPath, FilePath, file_path
from ..files.swap import nbytes, remove
from ..files.temporary import MOVES, is_held, is_name_of, leftovers, short
from ..formats import sharded
from ..tensors.checkpoint import PEFT_CONFIG
from ..text import size

JOB = "job"  # in the folder of finished files: what is being made, and who is alive has its lock
ADAPTER = "adapter_model"  # the stem of an output that has its settings beside it
READY = "ready"  # in it, a folder that will be the output


def left_behind(out: FilePath) -> tuple[str, ...]:
    """A note that names the temporary files of killed runs beside an output."""
    local = out.local
    if local is None:
        return ()
    found = [path for paths in _found(local).values() for path in paths]
    if (parts := parts_folder(local)).is_dir() and (parts / JOB).exists() and not is_held(parts / JOB):
        found.append(parts)
    if not found:
        return ()
    names = ", ".join(path.name for path in found[:3]) + (f" and {len(found) - 3:,} more" if found[3:] else "")
    total = size(sum(map(nbytes, found)))
    return (f"{names} ({total}) was left behind by a run that was killed; ckpt recover {out} removes it",)


def clear_leftovers(path: AnyPath) -> list[LocalPath]:
    """Remove the temporary files that killed runs left beside an output; returns them.

    Files of a run that is still alive stay.

    >>> clear_leftovers("never-written.pth")
    []
    """
    local = file_path(path).local
    if local is None or local.name in ("", ".."):
        return []
    gone = clear(_found(local))
    parts = parts_folder(local)
    if parts.is_dir() and not (parts / JOB).exists():
        return gone
    if parts.is_dir() and not is_held(parts / JOB):
        clear_parts(parts)
        gone.append(parts)
    return gone


def was_interrupted(out: FilePath) -> bool:
    """Whether a run was killed while it put the files of an output in their places.

    >>> was_interrupted(LocalPath("never-written.pth"))
    False
    """
    paths = _found(out.local).values() if out.local is not None else ()
    return any(path.suffix == MOVES for group in paths for path in group)


def take_back_moves(out: LocalPath) -> None:
    """Bring back the old files of an output that a killed run was replacing; what that run made stays beside them.

    >>> take_back_moves(LocalPath("never-written.pth"))
    """
    for paths in _found(out).values():
        for path in paths:
            if path.suffix == MOVES:
                take_back(path)


def clear_parts(folder: LocalPath) -> None:
    """Remove the folder of the files that processes of a torchrun have finished, with what is in it."""
    remove(folder / READY)
    remove(folder)


def parts_folder(out: LocalPath) -> LocalPath:
    """Where the processes of a torchrun put the files that they have finished.

    >>> parts_folder(LocalPath("run/model.pth"))
    LocalPath('run/.model.pth.parts')
    """
    return out.with_name(f".{short(out.name)}.parts")


def is_written(out: LocalPath) -> bool:
    """Whether an output is there, as a file, a folder, or shards and their index.

    >>> is_written(LocalPath("never-written.pth"))
    False
    """
    return out.lexists() or sharded.index_name(_whole(out)).lexists()


def _whole(out: LocalPath) -> LocalPath:
    """The name of the output that an index belongs to; any other name as it is."""
    return out.with_name(out.name.removesuffix(sharded.SUFFIX)) if out.name.endswith(sharded.SUFFIX) else out


def _found(out: LocalPath) -> dict[str, list[LocalPath]]:
    out = _whole(out)
    index = sharded.index_name(out)
    assert isinstance(index, LocalPath)
    beside = [out.with_name(PEFT_CONFIG)] if out.stem == ADAPTER else []

    def belongs(name: str) -> bool:
        return any(is_name_of(path, name) for path in (out, index, *beside)) or sharded.is_shard_of(out, name)

    return leftovers(out.parent, belongs)
