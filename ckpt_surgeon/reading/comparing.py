"""Values compared, hashed and summed up, block by block; numpy only where numbers are needed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, overload

from ..edits.change import Patterns, listed_patterns, matching
from ..edits.keys import is_derivable
from ..edits.values import cast
from ..errors import Argument, EditError, Either, Phrase
from ..files.prefetch import reading_ahead
from ..files.sinks import Progress
from ..files.spans import Block
from ..tensors.arithmetic import distance, summed
from ..tensors.checkpoint import Checkpoint
from ..tensors.combining import Survival, survival
from ..tensors.extra_state import digest
from ..tensors.opaque import named_opaque
from ..tensors.records import ExtraState, OpaqueTensor, Tensor, spans_of
from ..tensors.stored import StoredTensor
from ..text import Shown
from .change_kinds import Spectrum, kind_of, spectrum, with_rank
from .histograms import Histogram, histogram
from .histograms import histograms as histograms_of
from .sources import checkpoint_of, is_tensor

if TYPE_CHECKING:
    import torch

    from .sources import Source


SORTS = ("rel", "abs", "cos")

# -- comparing


@dataclass(frozen=True, slots=True, repr=False)
class Changed(Shown):
    """One key whose values differ: the greatest absolute difference, |a - b| / |a| and the cosine of the two.

    ``nan`` and ``inf`` count them on both sides; the measures are over what is finite on both.  ``why`` says what
    else differs (shapes that cannot be compared, dtypes), ``kind`` what the values show (see
    :mod:`.change_kinds`), ``sums`` are |a - b|², |a|², |b|² and a·b.  ``histograms`` are those of both sides, over one
    range, where they were asked for.
    """

    key: str
    max_abs: float
    relative: float
    cosine: float
    nan: tuple[int, int]
    inf: tuple[int, int]
    why: str = ""
    kind: str = "all"
    is_buffer: bool = False
    sums: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    spectrum: Spectrum | None = None
    histograms: tuple[Histogram, Histogram] | None = None


@dataclass(frozen=True, slots=True, repr=False)
class ValueDiff(Shown):
    """How the values of two checkpoints differ; ``changed`` has the most changed first.

    ``renamed`` pairs keys with the same bytes under another name, ``close`` holds those within the tolerance.
    ``survived`` says for each key that adapters change how much of that change the second one has.
    """

    identical: tuple[str, ...]
    renamed: tuple[tuple[str, str], ...]
    close: tuple[Changed, ...]
    changed: tuple[Changed, ...]
    only_ours: tuple[str, ...]
    only_theirs: tuple[str, ...]
    survived: Mapping[str, Survival] = field(default_factory=dict)
    names: tuple[str, str] = field(default=("the first", "the second"), compare=False)  # what a page calls the two

    @property
    def same(self) -> bool:
        """Whether nothing differs (beyond the tolerance) under any key."""
        return not (self.renamed or self.changed or self.only_ours or self.only_theirs)


def compare(
    ours: Source,
    theirs: Source,
    patterns: Patterns = (),
    *,
    tolerance: float = 0.0,
    relative_tolerance: float = 0.0,
    sort: str = "rel",
    spectra: bool = False,
    histograms: bool = False,
    adapters: Sequence[Source] = (),
    scale: Sequence[float] = (1.0,),
    alpha: float = 0.0,
    progress: Progress | None = None,
) -> ValueDiff:
    """Compare two checkpoints value by value; equal bytes are found without computing.

    Each is a path or URL, an opened Checkpoint, a state_dict or a model; ``patterns`` are globs on the keys of both.
    ``tolerance`` is the greatest absolute difference that counts as close, ``relative_tolerance`` the greatest
    |a - b| / |a| of a tensor that does.  ``sort`` puts the greatest relative ("rel") or absolute ("abs") change first,
    or the least cosine ("cos"); ``spectra`` computes the singular values of the differences of matrices,
    ``histograms`` counts how often which values occur in what changed;
    ``progress`` is told the bytes of each tensor of ``ours`` that has been compared.

    With ``adapters`` the second checkpoint is one into which they were merged, whoever did that, and the first their
    base: ``survived`` says how much of them is in it (``scale`` and ``alpha`` are those of
    :func:`ckpt_surgeon.merge_lora`).  Raises EditError for tensors without plain values, and for adapters that do not
    fit, NothingMatched for a pattern without a key on either side.

    >>> import torch
    >>> from ckpt_surgeon import from_torch
    >>> a, b = from_torch({"fc.bias": torch.ones(2)}), from_torch({"fc.bias": torch.tensor([1.0, 1.5])})
    >>> compare(a, b).changed[0].max_abs
    0.5
    """
    if sort not in SORTS:
        raise EditError(Phrase(Argument("sort"), f" is rel, abs or cos, not {sort!r}"))
    ours, theirs = _chosen(checkpoint_of(ours), checkpoint_of(theirs), patterns)
    opaque = [f"{key!r} is a {tensor.kind} tensor" for side in (ours, theirs) for key, tensor in side.items()
           if isinstance(tensor, OpaqueTensor)]  # fmt: skip
    if opaque:
        remedy = Phrase("leave it out first: ", Either("ckpt_surgeon.drop", "ckpt drop"))
        raise EditError([f"{problem}, its values cannot be compared" for problem in opaque], remedy=remedy)
    identical, differing = [], []
    common = [key for key in ours if key in theirs]
    with reading_ahead(spans_of(side[key] for side in (ours, theirs) for key in common)):
        for key in common:
            if same_bytes(ours[key], theirs[key]):
                identical.append(key)
            else:
                change = _measured(key, ours[key], theirs[key], spectra=spectra)
                differing.append(_with_histograms(change, ours[key], theirs[key]) if histograms else change)
            if progress is not None:
                progress(ours[key].nbytes)
    only_ours = [key for key in ours if key not in theirs]
    only_theirs = [key for key in theirs if key not in ours]
    renamed = _renamed(ours, only_ours, theirs, only_theirs)
    olds, news = {old for old, _ in renamed}, {new for _, new in renamed}
    close = [change for change in differing if _is_close(change, tolerance, relative_tolerance)]
    close_keys = {change.key for change in close}
    changed = [change for change in differing if change.key not in close_keys]
    return ValueDiff(
        tuple(identical),
        tuple(renamed),
        tuple(close),
        tuple(sorted(changed, key=partial(_severity, sort))),
        tuple(key for key in only_ours if key not in olds),
        tuple(key for key in only_theirs if key not in news),
        _survived(ours, theirs, adapters, scale, alpha) if adapters else {},
        _names(ours, theirs),
    )


def _names(ours: Checkpoint, theirs: Checkpoint) -> tuple[str, str]:
    """What the two are called: their files' names, where these tell them apart."""
    mine, other = (side.path.name if side.path is not None else "" for side in (ours, theirs))
    return (mine or "the first", other or "the second") if mine != other else ("the first", "the second")


def _survived(
    base: Checkpoint, made: Checkpoint, adapters: Sequence[Source], scale: Sequence[float], alpha: float
) -> dict[str, Survival]:
    """How much of what adapters add to a base is in another checkpoint, key by key."""
    from ..edits.lora.merging import merge_lora

    given = [checkpoint_of(adapter) for adapter in adapters]
    exact = merge_lora.plan(base, *given, scale=scale, alpha=alpha, dtype="float32").result
    touched = [key for key in base if exact[key] is not base[key] and base[key].shape == exact[key].shape]
    return {key: survival(base[key], exact[key], made[key]) for key in touched
            if key in made and made[key].shape == base[key].shape}  # fmt: skip


def _chosen(ours: Checkpoint, theirs: Checkpoint, patterns: Patterns) -> tuple[Checkpoint, Checkpoint]:
    """The keys of both that match one of the patterns; all, where there are none."""
    globs = listed_patterns(patterns)
    if not globs:
        return ours, theirs
    chosen = matching({**ours, **theirs}, globs)
    mine, other = ({key: side[key] for key in side if key in chosen} for side in (ours, theirs))
    return ours.with_tensors(mine, None), theirs.with_tensors(other, None)


def _is_close(change: Changed, tolerance: float, relative_tolerance: float) -> bool:
    is_finite = not change.why and sum(change.nan) == sum(change.inf) == 0
    return is_finite and (change.max_abs <= tolerance or 0 < change.relative <= relative_tolerance)


def _severity(sort: str, change: Changed) -> tuple[bool, bool, float]:
    """What comes first: parameters before buffers, what cannot be compared before what can, then the most changed."""
    measure = {"rel": -change.relative, "abs": -change.max_abs, "cos": change.cosine}[sort]
    odd = change.why or change.nan[0] != change.nan[1] or change.inf[0] != change.inf[1]
    return change.is_buffer, not odd, measure


def is_buffer(key: str, tensor: Tensor) -> bool:
    """Whether a key is known as a buffer's: a running statistic, a counter, a mask, an index.

    >>> import torch
    >>> from ckpt_surgeon import from_torch
    >>> found = from_torch(torch.nn.BatchNorm1d(2).state_dict())
    >>> [key for key, tensor in found.items() if is_buffer(key, tensor)]
    ['running_mean', 'running_var', 'num_batches_tracked']
    """
    plain = tensor.dtype.is_floating or tensor.dtype.is_complex
    return not plain or is_derivable(key) or key.rpartition(".")[2] in ("running_mean", "running_var")


def same_bytes(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and elements, bit for bit."""
    if isinstance(ours, ExtraState) and isinstance(theirs, ExtraState):
        return digest(ours.value) == digest(theirs.value)
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    if ours.span is not None and theirs.span is not None:
        for tensor in (ours, theirs) if ours.span != theirs.span else ():
            if isinstance(tensor, StoredTensor):
                tensor.storage.check(tensor.nbytes)
        return ours.span.same_bytes(theirs.span)
    return all(mine == other for mine, other in _aligned(ours.blocks(), theirs.blocks()))


def _aligned(ours: Iterator[Block], theirs: Iterator[Block]) -> Iterator[tuple[Block, Block]]:
    """Two streams of blocks, cut at the same offsets."""
    mine: Block = b""
    other: Block = b""
    for our_block, their_block in zip_longest(ours, theirs, fillvalue=b""):
        if not mine and not other and len(our_block) == len(their_block):
            yield our_block, their_block
            continue
        mine, other = bytes(mine) + bytes(our_block), bytes(other) + bytes(their_block)
        length = min(len(mine), len(other))
        yield mine[:length], other[:length]
        mine, other = mine[length:], other[length:]
    yield mine, other


def _renamed(
    ours: Checkpoint, only_ours: list[str], theirs: Checkpoint, only_theirs: list[str]
) -> list[tuple[str, str]]:
    """Pairs of keys, each on one side only, whose tensors are the same bit for bit."""
    kinds = {(theirs[key].dtype.name, theirs[key].shape) for key in only_theirs}
    known: dict[str, list[str]] = {}
    for key in only_ours:
        if (ours[key].dtype.name, ours[key].shape) in kinds:
            known.setdefault(tensor_hash(ours[key]), []).append(key)
    if not known:
        return []
    pairs = []
    for key in only_theirs:
        candidates = known.get(tensor_hash(theirs[key]), [])
        if candidates:
            leaf = key.rpartition(".")[2]
            best = next((old for old in candidates if old.rpartition(".")[2] == leaf), candidates[0])
            candidates.remove(best)
            pairs.append((best, key))
    return pairs


def _measured(key: str, ours: Tensor, theirs: Tensor, *, spectra: bool) -> Changed:
    """How far two tensors are apart."""
    if isinstance(ours, ExtraState) or isinstance(theirs, ExtraState):
        why = "extra states, which are no numbers"
        return Changed(key, math.inf, math.inf, 0.0, (0, 0), (0, 0), why)
    if ours.shape != theirs.shape:
        why = f"shape {list(ours.shape)} and {list(theirs.shape)}"
        return Changed(key, math.inf, math.inf, 0.0, (0, 0), (0, 0), why)
    if not (ours.dtype.is_computable and theirs.dtype.is_computable):
        why = f"dtype {ours.dtype} and {theirs.dtype}, which torch does not compute with"
        return Changed(key, math.inf, math.inf, 0.0, (0, 0), (0, 0), why)
    found = distance(ours, theirs)
    relative = math.sqrt(found.difference / found.ours) if found.ours else (math.inf if found.difference else 0.0)
    both = found.ours and found.theirs
    cosine = found.product / math.sqrt(found.ours * found.theirs) if both else float(found.ours == found.theirs)
    why = f"dtype {ours.dtype} and {theirs.dtype}" if ours.dtype != theirs.dtype else ""
    values = spectrum(ours, theirs) if spectra else None
    is_cast = ours.dtype != theirs.dtype and (_is_cast(ours, theirs) or _is_cast(theirs, ours))
    kind = "cast" if is_cast else with_rank(kind_of(ours, theirs, found), values)
    sums = (found.difference, found.ours, found.theirs, found.product)
    buffer = is_buffer(key, theirs)
    return Changed(key, found.greatest, relative, cosine, found.nan, found.inf, why, kind, buffer, sums, values)


def _with_histograms(change: Changed, ours: Tensor, theirs: Tensor) -> Changed:
    """A change that was measured, with the histograms of both sides."""
    if not math.isfinite(change.max_abs):
        return change
    mine, other = histograms_of([ours, theirs])
    return change if mine is None or other is None else replace(change, histograms=(mine, other))


def _is_cast(source: Tensor, made: Tensor) -> bool:
    """Whether one tensor of floating-point numbers is the other, cast: equal bit for bit."""
    if not (made.dtype.is_floating and source.dtype.is_floating):
        return False
    return same_bytes(cast(Checkpoint({"tensor": source}), made.dtype.name)["tensor"], made)


# -- hashing


@dataclass(frozen=True, slots=True, repr=False)
class Hashes(Shown):
    """SHA-256 digests that depend on keys and values only: ``whole``, and one per tensor."""

    whole: str
    tensors: Mapping[str, str]


def hash(source: Source, *, select: str | None = None, progress: Progress | None = None) -> Hashes:
    """Hash a checkpoint's tensors, whatever the container, key order, strides or shards.

    ``source`` is a path or URL, an opened Checkpoint, a state_dict or a model; ``progress`` is told the bytes of each
    tensor that has been hashed.
    A tensor's digest is SHA-256 over its dtype, its shape and its elements in row-major order, little-endian; the
    whole's is over the sorted keys and digests.

    >>> import torch
    >>> from ckpt_surgeon import from_torch
    >>> a, b = torch.arange(6.0).reshape(2, 3), torch.arange(6.0).reshape(2, 3).t().contiguous().t()
    >>> hash(from_torch({"w": a})).whole == hash(from_torch({"w": b})).whole
    True
    """
    checkpoint = checkpoint_of(source, select=select)
    if opaque := named_opaque(checkpoint):
        remedy = Phrase("leave it out first: ", Either("ckpt_surgeon.drop", "ckpt drop"))
        raise EditError(f"{opaque}: more than plain elements, cannot be hashed", remedy=remedy)
    known: dict[object, str] = {}
    tensors = {}
    with reading_ahead(spans_of({tensor.tie: tensor for tensor in checkpoint.values()}.values())):
        for key, tensor in checkpoint.items():
            if tensor.tie not in known:
                known[tensor.tie] = tensor_hash(tensor)
                if progress is not None:
                    progress(tensor.nbytes)
            tensors[key] = known[tensor.tie]
    whole = hashlib.sha256()
    for key in sorted(tensors):
        whole.update(f"{key}\0{tensors[key]}\n".encode("utf-8", "surrogatepass"))
    return Hashes(whole.hexdigest(), tensors)


def tensor_hash(tensor: Tensor) -> str:
    """The digest of one tensor; see :func:`hash`."""
    if isinstance(tensor, ExtraState):
        return digest(tensor.value)
    found = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
    for block in tensor.blocks():
        found.update(block)
    return found.hexdigest()


# -- summing up


@dataclass(frozen=True, slots=True, repr=False)
class Stats(Shown):
    """What a tensor's values are like; mean, std (of the population), min and max are over the finite ones.

    ``histogram`` says how often which values occur, where that was asked for.
    """

    mean: float
    std: float
    min: float
    max: float
    nan: int
    inf: int
    all_zero: bool
    histogram: Histogram | None = None


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class StatsByKey(Shown, Mapping[str, Stats]):
    """The :class:`Stats` of every tensor of a checkpoint, by key."""

    tensors: Mapping[str, Stats]

    def __getitem__(self, key: str) -> Stats:
        return self.tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@overload
def stats(source: Tensor | torch.Tensor) -> Stats: ...


@overload
def stats(source: Source, *, select: str | None = None) -> StatsByKey: ...


def stats(source: object, *, select: str | None = None) -> Stats | StatsByKey:
    """Sum up the values of one tensor, or of each tensor of a path or URL, a Checkpoint, a state_dict or a model.

    Values are streamed; complex numbers count by their magnitudes.
    All measures are NaN where there are no numbers to sum up (no elements, a sparse tensor, packed bits).

    >>> import torch
    >>> from ckpt_surgeon import from_torch
    >>> found = stats(from_torch({"w": torch.tensor([1.0, 3.0, float("nan")])}))
    >>> found["w"].mean, found["w"].std, found["w"].nan
    (2.0, 1.0, 1)
    """
    if is_tensor(source):
        return tensor_stats(checkpoint_of({"tensor": source})["tensor"])
    tensors = checkpoint_of(source, select=select).tensors
    with reading_ahead(spans_of(tensors.values())):
        return StatsByKey({key: tensor_stats(tensor) for key, tensor in tensors.items()})


def tensor_stats(tensor: Tensor, *, histograms: bool = False) -> Stats:
    """The :class:`Stats` of one tensor, with its histogram if that is asked for; see :func:`stats`."""
    if isinstance(tensor, (OpaqueTensor, ExtraState)) or not tensor.dtype.is_computable:
        return Stats(math.nan, math.nan, math.nan, math.nan, 0, 0, False)
    found = summed(tensor)
    if not found.count:
        return Stats(math.nan, math.nan, math.nan, math.nan, found.nan, found.inf, False)
    std = math.sqrt(found.squares / found.count)
    all_zero = found.low == found.high == 0 and not (found.nan or found.inf)
    counts = histogram(tensor, sums=found) if histograms else None
    return Stats(found.mean, std, found.low, found.high, found.nan, found.inf, all_zero, counts)
