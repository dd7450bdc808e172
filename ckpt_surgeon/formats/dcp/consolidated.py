"""The safetensors variant of torch.distributed.checkpoint: each process writes the pieces that it has.

``HuggingFaceStorageWriter(save_distributed=True)`` leaves ``shard-00001-model-00001-of-00002.safetensors`` and so on,
no index, and in each header, under ``DCP_SHARDING_INFO``, where the pieces begin in their tensors.  How large a tensor
is nobody wrote down: it reaches as far as its pieces do.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

from ...errors import BrokenFile
from ...files.local import LocalPath
from ...tensors.records import Tensor
from ...tensors.stored import StoredTensor
from .. import safetensors
from ..contents import Contents
from ..pickle.values import Value
from ..sharded import SUFFIX, listed_problems
from .metadata import in_pieces
from .pieces import Piece, Pieced, Sizes, flaw

CONTAINER = "torch distributed safetensors"


def holds(folder: LocalPath) -> bool:
    """Whether all checkpoints in a folder are of this kind, and no index says how they belong together."""
    names = os.listdir(folder)
    paths = _paths(folder)
    if not paths or any(name.endswith(SUFFIX) for name in names):
        return False
    return all(map(safetensors.has_pieces, paths))


def _paths(folder: LocalPath) -> list[LocalPath]:
    return [folder / name for name in sorted(os.listdir(folder)) if name.endswith(safetensors.SUFFIXES)]


def read(folder: LocalPath) -> Contents:
    """Read the headers of all files and put the tensors' pieces together.

    Raises BrokenFile, naming every tensor that they do not make up.
    """
    found: dict[str, list[tuple[Sizes, StoredTensor]]] = {}
    paths = _paths(folder)
    for path in paths:
        for key, offsets, piece in _pieces(path):
            found.setdefault(key, []).append((offsets, piece))
    root: dict[Value, Value] = {}
    problems = []
    for key, pieces in found.items():
        try:
            root[key] = _joined(key, pieces)
        except ValueError as error:
            problems.append(f"{key!r}: {error}")
    if problems:
        raise BrokenFile(folder, listed_problems(problems), "fetch the missing files again, or save it again")
    return Contents(folder, f"{CONTAINER}, {len(paths):,} file{'' if len(paths) == 1 else 's'}", root)


def _pieces(path: LocalPath) -> Iterator[tuple[str, Sizes, StoredTensor]]:
    """Key, offsets in the whole, and place of each piece in one file."""
    contents = safetensors.read_pieces(path)
    try:
        info = json.loads(contents.metadata.get(safetensors.SHARDING, ""))
    except (ValueError, RecursionError) as error:
        raise BrokenFile(path, f"its {safetensors.SHARDING} is no JSON ({error})") from error
    tensors = contents.root if isinstance(contents.root, dict) else {}
    for key, piece in tensors.items():
        entry = info.get(key) if isinstance(info, dict) else None
        offsets = entry.get("saved_offsets") if isinstance(entry, dict) else None
        if not isinstance(offsets, list) or any(type(one) is not int or one < 0 for one in offsets):
            raise BrokenFile(path, f"its {safetensors.SHARDING} does not say where {key!r} begins")
        yield key, tuple(offsets), piece


def _joined(key: str, pieces: list[tuple[Sizes, StoredTensor]]) -> Tensor:
    """One tensor: the only piece itself, or what torch makes of several.  Raises ValueError when they do not fit."""
    dtypes = {piece.dtype.name: piece.dtype for _, piece in pieces}
    if len(dtypes) > 1 or len({len(piece.shape) for _, piece in pieces}) > 1:
        raise ValueError("its pieces have different dtypes or numbers of dimensions")
    boxes = [(offsets, piece.shape) for offsets, piece in pieces]
    if any(len(offsets) != len(sizes) for offsets, sizes in boxes):
        raise ValueError("a piece has another number of dimensions than its offset")
    ends = [[start + size for start, size in zip(*box, strict=True)] for box in boxes]
    shape = tuple(max(end) for end in zip(*ends, strict=True))
    if problem := flaw(shape, boxes):
        raise ValueError(problem)
    filled = [(offsets, piece) for offsets, piece in pieces if piece.nbytes or len(pieces) == 1]
    if len(filled) == 1:
        return filled[0][1]
    places = [Piece(offsets, piece.shape, piece.span) for offsets, piece in filled if piece.span is not None]
    return in_pieces(Pieced(key, dtypes.popitem()[1], shape, tuple(places)), safetensors=True)
