"""What a file holds, for people who want to see it: its kind, its nesting, its tensors, what lies beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from ..errors import SEE_ALL, Argument, BrokenFile, EditError, NotACheckpoint, NothingMatched, Phrase
from ..files import swap
from ..files.local import LocalPath
from ..files.paths import FilePath, is_path
from ..files.prefetch import reading_ahead
from ..files.sinks import Progress
from ..formats.contents import Contents
from ..key_patterns import WRAPPERS, pattern_instead
from ..tensors.checkpoint import Checkpoint, LeftOut
from ..tensors.records import Tensor, spans_of
from ..tensors.stored import StoredTensor
from ..text import Shown
from .candidates import Candidate, candidates
from .objects import Entry, describe, entries
from .opening import read
from .selecting import beside, lacking_in, part_in, select_state_dict, without_lost
from .sources import checkpoint_of
from .training_state import training_part, training_state

if TYPE_CHECKING:
    from .comparing import Stats
    from .sources import Source


ORDERS = ("file", "name", "size")

PEFT = "base_model.model."  # what PEFT puts in front of the keys of the model that it wraps

MEMORY = "(memory)"  # what stands for the path of a checkpoint that lies in no file


@dataclass(frozen=True, slots=True, repr=False)
class Part(Shown):
    """One state_dict in a file: its dotted path and totals (ties counted once)."""

    path: str
    tensors: int
    parameters: int
    nbytes: int


@dataclass(frozen=True, slots=True, repr=False)
class Listing(Shown):
    """The result of :func:`ls`.  ``tensors`` is keyed by full dotted path where the file holds several parts."""

    path: FilePath
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
    prefix: str = ""  # the first component, where all keys of the only part share it; base_model.model. is PEFT's
    wrapper: str = ""  # a component that torch's own wrappers put into keys, where some key has one
    select: str = ""  # the state_dict that was asked for

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that the tensors were saved from."""
        return tuple(dict.fromkeys(tensor.device for tensor in self.tensors.values()))


def common_prefix(keys: Iterable[str]) -> str:
    """The first component, where all keys share it.

    >>> common_prefix(["module.fc.weight", "module.fc.bias"]), common_prefix(["module.fc.bias", "fc.bias"])
    ('module.', '')
    >>> common_prefix(["base_model.model.fc.weight", "base_model.model.fc.bias"])
    'base_model.model.'
    """
    keys = list(keys)
    if keys and all(key.startswith(PEFT) for key in keys):
        return PEFT
    first = {key.partition(".")[0] + "." if "." in key else "" for key in keys}
    return first.pop() if len(first) == 1 else ""


def wrapper_in(keys: Iterable[str]) -> str:
    """A component that only torch's wrappers put into keys, where some key has one.

    >>> wrapper_in(["net._orig_mod.fc.weight"]), wrapper_in(["net.module.fc.weight"])
    ('_orig_mod', '')
    """
    own = {wrapper for wrapper in WRAPPERS if wrapper.startswith("_")}
    return next((part for key in keys for part in key.split(".")[:-1] if part in own), "")


def ls(
    source: Source,
    patterns: Iterable[str] = (),
    *,
    select: str | None = None,
    check: bool = False,
    stats: bool = False,
    histograms: bool = False,
    all: bool = False,
    salvage: bool = False,
    sort: str = "file",
    progress: Progress | None = None,
) -> Listing:
    """List what a checkpoint holds; reads its index only.

    ``source`` is a path or URL, an opened (and perhaps edited) Checkpoint, a state_dict or a model; ``patterns`` are
    globs on keys; ``select`` the dotted path of one state_dict; ``check`` reads every byte and compares the checksums
    that the container keeps; ``stats`` sums the values up, with ``histograms`` also counts how often which occur;
    ``all`` also lists every object that is no tensor, and takes files without any; ``salvage`` lists what is whole in a
    truncated file; ``sort`` is "file" for the file's order, "name", or "size" for the largest first; ``progress`` is
    told the bytes that ``check`` and ``stats`` have read.  Raises NothingMatched for a pattern without a key, and what
    :func:`ckpt_surgeon.open` raises, except that several state_dicts are all listed.

    >>> import ckpt_surgeon, torch
    >>> torch.save({"net": {"fc.bias": torch.zeros(3)}, "ema": {"fc.bias": torch.zeros(3)}}, "both.pth")
    >>> list(ckpt_surgeon.ls("both.pth").tensors)
    ['net.fc.bias', 'ema.fc.bias']
    """
    if sort not in ORDERS:
        raise EditError(Phrase(Argument("sort"), f" is file, name or size, not {sort!r}"))
    if is_path(source):
        contents = read(source, salvage=salvage)
        found, lost, left = _parts(contents, select, may_be_empty=all)
    else:
        checkpoint = checkpoint_of(source, select=select)
        contents = _contents_of(checkpoint)
        found, lost, left = [_part_of(checkpoint)], [], checkpoint.left_out
    several = len(found) > 1
    tensors: dict[str, Tensor] = {}
    for candidate in found:
        for key, tensor in candidate.tensors.items():
            tensors[f"{candidate.path}.{key}" if several and candidate.path else key] = tensor
    shown = in_order(matching(tensors, list(patterns)), sort)
    return Listing(
        contents.path,
        contents.container,
        _file_bytes(contents.path, tensors),
        tuple(_part(candidate) for candidate in found),
        shown,
        left,
        contents.metadata,
        (*contents.notes, *lost),
        _check(shown, progress) if check else None,
        _stats(shown, progress, histograms) if stats else None,
        tuple(entries(contents.root)) if all else (),
        common_prefix(tensors) if not several else "",
        wrapper_in(tensors) if not several else "",
        select or "",
    )


def in_order(tensors: Mapping[str, Tensor], order: str) -> Mapping[str, Tensor]:
    """The tensors in one of :data:`ORDERS`; of the same size, in the order of the file."""
    if order == "name":
        return dict(sorted(tensors.items()))
    if order == "size":
        return dict(sorted(tensors.items(), key=lambda item: -item[1].nbytes))
    return tensors


def _stats(tensors: Mapping[str, Tensor], progress: Progress | None, histograms: bool) -> Mapping[str, Stats]:
    from .comparing import tensor_stats

    found = {}
    with reading_ahead(spans_of(tensors.values())):
        for key, tensor in tensors.items():
            found[key] = tensor_stats(tensor, histograms=histograms)
            if progress is not None:
                progress(tensor.nbytes)
    return found


def _contents_of(checkpoint: Checkpoint) -> Contents:
    """The contents of the file that a checkpoint was opened from, or of one in memory."""
    path = checkpoint.path if checkpoint.path is not None else LocalPath(MEMORY)
    return Contents(path, checkpoint.container, checkpoint.root, checkpoint.metadata, checkpoint.notes)


def _part_of(checkpoint: Checkpoint) -> Candidate:
    return Candidate(checkpoint.selected, checkpoint.tensors, checkpoint.versions)


def _parts(
    contents: Contents, wanted: str | None, *, may_be_empty: bool
) -> tuple[list[Candidate], list[str], tuple[LeftOut, ...]]:
    """The state_dicts to list, notes on what they have lost, and what is beside them."""
    if wanted is not None:
        chosen = select_state_dict(contents, wanted)
        part = Candidate(chosen.selected, chosen.tensors, chosen.versions)
        return [part], list(chosen.notes[len(contents.notes) :]), chosen.left_out
    found = candidates(contents)
    state = None if found else training_state(contents)
    pairs = [without_lost(candidate) for candidate in ([state] if state is not None else found)]
    if not pairs and not may_be_empty:
        raise NotACheckpoint(contents.path, f"holds no tensor ({describe(contents.root)})", SEE_ALL)
    notes = [note for _, notes in pairs for note in notes]
    notes += [f"{training_part(state)}; ckpt ls --training shows its groups"] if state is not None else []
    found = [candidate for candidate, _ in pairs]
    notes += dict.fromkeys(note for candidate in found for note in candidate.notes)
    notes += filter(None, dict.fromkeys(part_in(contents, candidate) for candidate in found))
    lacking = [one for candidate in found for one in lacking_in(candidate)]
    left = (*lacking, *beside(contents.root, [candidate.trail for candidate in found]))
    return found, notes, left


def _part(candidate: Candidate) -> Part:
    counts = {tensor.tie: (tensor.numel, tensor.nbytes) for tensor in candidate.tensors.values()}
    return Part(
        candidate.path,
        len(candidate.tensors),
        sum(numel for numel, _ in counts.values()),
        sum(nbytes for _, nbytes in counts.values()),
    )


def _file_bytes(path: FilePath, tensors: Mapping[str, Tensor]) -> int:
    """The size of the file, or of all the shards behind an index."""
    stored = [tensor for tensor in tensors.values() if isinstance(tensor, StoredTensor)]
    shards = {file for tensor in stored for file in tensor.storage.files}
    if not shards and path == LocalPath(MEMORY):
        return sum({tensor.storage: tensor.storage.nbytes for tensor in stored}.values())
    return sum(swap.nbytes(file) for file in shards or {path})


def matching(tensors: Mapping[str, Tensor], patterns: list[str]) -> Mapping[str, Tensor]:
    """The tensors whose keys match one of the globs; all, where there are none."""
    if not patterns:
        return tensors
    unmatched = [pattern for pattern in patterns if not any(fnmatchcase(key, pattern) for key in tensors)]
    if unmatched:
        hints = {pattern: hint for pattern in unmatched if (hint := pattern_instead(pattern, tensors))}
        raise NothingMatched(unmatched, examples=tensors, hints=hints)
    return {key: tensor for key, tensor in tensors.items() if any(fnmatchcase(key, pattern) for pattern in patterns)}


def _check(tensors: Mapping[str, Tensor], progress: Progress | None) -> int:
    """Read every storage once, which compares its checksum; returns the bytes read."""
    storages = {tensor.storage: key for key, tensor in tensors.items() if isinstance(tensor, StoredTensor)}
    damaged: list[tuple[str, BrokenFile]] = []
    total = 0
    with reading_ahead(storage.span for storage in storages if storage.span is not None):
        for storage, key in storages.items():
            try:
                for block in storage.blocks():
                    total += len(block)
                    if progress is not None:
                        progress(len(block))
            except BrokenFile as error:
                damaged.append((key, error))
    if damaged:
        key, first = damaged[0]
        more = f" (and {len(damaged) - 1:,} more)" if len(damaged) > 1 else ""
        raise BrokenFile(first.path, f"tensor {key!r}{more}: {first.problem}", first.remedy)
    return total
