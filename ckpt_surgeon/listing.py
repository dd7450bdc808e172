"""What a file holds, for people who want to see it: its kind, its nesting, its tensors, what lies beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint import LeftOut
from .errors import BrokenFile, NotACheckpoint, NothingMatched
from .formats.contents import Contents
from .opening import read
from .selecting import Candidate, beside, candidates, without_lost
from .selecting import select as select_state_dict
from .tensors import StoredTensor, Tensor
from .tree import Entry, describe, entries

if TYPE_CHECKING:
    from .values import Stats


@dataclass(frozen=True, slots=True)
class Part:
    """One state_dict in a file: its dotted path and totals (ties counted once)."""

    path: str
    tensors: int
    parameters: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Listing:
    """The result of :func:`ls`.  ``tensors`` is keyed by full dotted path where the file holds several parts."""

    path: Path
    container: str
    file_bytes: int
    parts: tuple[Part, ...]
    tensors: Mapping[str, Tensor]
    beside: tuple[LeftOut, ...]
    metadata: Mapping[str, str]
    notes: tuple[str, ...]
    checked: int | None = None  # bytes that a check read
    stats: Mapping[str, Stats] | None = None
    objects: tuple[Entry, ...] = ()

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that the tensors were saved from."""
        return tuple(dict.fromkeys(tensor.device for tensor in self.tensors.values()))

    @property
    def common_prefix(self) -> str:
        """The first component, where all keys share it."""
        first = {key.partition(".")[0] + "." if "." in key else "" for key in self.tensors}
        return first.pop() if len(first) == 1 else ""


def ls(
    path: str | Path,
    patterns: Iterable[str] = (),
    *,
    select: str | None = None,
    check: bool = False,
    stats: bool = False,
    all: bool = False,
    salvage: bool = False,
) -> Listing:
    """List what a checkpoint holds; reads its index only.

    ``patterns`` are globs on keys; ``select`` the dotted path of one state_dict; ``check`` reads every byte and
    compares the checksums that the container keeps; ``stats`` sums the values up; ``all`` also lists every object that
    is no tensor, and takes files without any; ``salvage`` lists what is whole in a truncated file.  Raises
    NothingMatched for a pattern without a key, and what :func:`ckpt_surgeon.open` raises, except that several
    state_dicts are all listed.

    >>> import ckpt_surgeon, torch
    >>> torch.save({"net": {"fc.bias": torch.zeros(3)}, "ema": {"fc.bias": torch.zeros(3)}}, "both.pth")
    >>> list(ckpt_surgeon.ls("both.pth").tensors)
    ['net.fc.bias', 'ema.fc.bias']
    """
    contents = read(path, salvage=salvage)
    found, lost = _parts(contents, select, may_be_empty=all)
    several = len(found) > 1
    tensors: dict[str, Tensor] = {}
    for candidate in found:
        for key, tensor in candidate.tensors.items():
            tensors[f"{candidate.path}.{key}" if several and candidate.path else key] = tensor
    shown = matching(tensors, list(patterns))
    paths = [candidate.path for candidate in found]
    others = () if several and "" in paths else tuple(_beside_all(contents.root, paths))
    return Listing(
        contents.path,
        contents.container,
        _file_bytes(contents.path, tensors),
        tuple(_part(candidate) for candidate in found),
        shown,
        others,
        contents.metadata,
        (*contents.notes, *lost),
        _check(shown) if check else None,
        _stats(shown) if stats else None,
        tuple(entries(contents.root)) if all else (),
    )


def _stats(tensors: Mapping[str, Tensor]) -> Mapping[str, Stats]:
    from .values import stats

    return {key: stats(tensor) for key, tensor in tensors.items()}


def _parts(contents: Contents, wanted: str | None, *, may_be_empty: bool) -> tuple[list[Candidate], list[str]]:
    """The state_dicts to list, and notes on what they have lost."""
    if wanted is not None:
        chosen = select_state_dict(contents, wanted)
        return [Candidate(chosen.selected, chosen.tensors, chosen.versions)], list(chosen.notes[len(contents.notes) :])
    pairs = [without_lost(candidate) for candidate in candidates(contents)]
    if not pairs and not may_be_empty:
        raise NotACheckpoint(contents.path, f"holds no tensor ({describe(contents.root)})", "see: ckpt ls --all")
    return [candidate for candidate, _ in pairs], [note for _, notes in pairs for note in notes]


def _part(candidate: Candidate) -> Part:
    counts = {tensor.tie: (tensor.numel, tensor.nbytes) for tensor in candidate.tensors.values()}
    return Part(
        candidate.path,
        len(candidate.tensors),
        sum(numel for numel, _ in counts.values()),
        sum(nbytes for _, nbytes in counts.values()),
    )


def _beside_all(root: object, paths: list[str]) -> Iterable[LeftOut]:
    """What is beside all the parts: none of them, nothing inside them."""
    seen = {}
    for path in paths:
        for left in beside(root, path):
            inside = any(other == left.path or other.startswith(left.path + ".") for other in paths)
            within = any(other and left.path.startswith(other + ".") for other in paths if other != path)
            if not inside and not within:
                seen[left.path] = left
    return seen.values()


def _file_bytes(path: Path, tensors: Mapping[str, Tensor]) -> int:
    """The size of the file, or of all the shards behind an index."""
    shards = {
        tensor.storage.span.path
        for tensor in tensors.values()
        if isinstance(tensor, StoredTensor) and tensor.storage.span is not None
    }
    return sum(file.stat().st_size for file in shards or {path})


def matching(tensors: Mapping[str, Tensor], patterns: list[str]) -> Mapping[str, Tensor]:
    """The tensors whose keys match one of the globs; all, where there are none."""
    if not patterns:
        return tensors
    unmatched = [pattern for pattern in patterns if not any(fnmatchcase(key, pattern) for key in tensors)]
    if unmatched:
        raise NothingMatched(unmatched, examples=tensors)
    return {key: tensor for key, tensor in tensors.items() if any(fnmatchcase(key, pattern) for pattern in patterns)}


def _check(tensors: Mapping[str, Tensor]) -> int:
    """Read every storage once, which compares its checksum; returns the bytes read."""
    storages = {tensor.storage: key for key, tensor in tensors.items() if isinstance(tensor, StoredTensor)}
    damaged: list[tuple[str, BrokenFile]] = []
    total = 0
    for storage, key in storages.items():
        try:
            total += sum(map(len, storage.blocks()))
        except BrokenFile as error:
            damaged.append((key, error))
    if damaged:
        key, first = damaged[0]
        more = f" (and {len(damaged) - 1:,} more)" if len(damaged) > 1 else ""
        raise BrokenFile(first.path, f"tensor {key!r}{more}: {first.problem}", first.remedy)
    return total
