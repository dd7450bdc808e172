"""Sums of several tensors: computed in float64 a block at a time, rounded once, and what of a change survives that.

Nothing here imports numpy or ml_dtypes before a value is asked for.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from ..errors import Argument, Phrase
from ..files.spans import Block
from ..text import plural
from .blocks import Piece, alongside, in_order, scratch
from .casts import Losses, bytes_of, cast_by_numpy
from .conversion import is_coded, numbers, real, widened
from .dtypes import BY_NAME, DType
from .records import Finding, Tensor

if TYPE_CHECKING:
    import numpy as np

    from .conversion import Array

    Formula = Callable[[int, list[Array]], Array]  # the number of the block, float64 of each input; float64

LEAST_COSINE = 0.99  # below it, what is left of a change points elsewhere: a warning
GREATEST_ERROR = 0.1  # and so where so much of its length got lost
RANDOM = " rounded at random"
WORST = 3  # how many tensors a warning names
STEP = 32 << 10  # elements computed with at a time: float64 sums and one input of as many stay in a core's cache
BATCH = 8  # steps that a thread takes at once


@dataclass(frozen=True, slots=True)
class Rounding:
    """How float64 becomes the output's dtype: to nearest, or up and down at random so that the mean is kept.

    ``seed`` makes random rounding the same each time; None rounds to nearest, ties to even.
    """

    seed: int | None = None


NEAREST = Rounding()


@dataclass(slots=True)
class Survival:
    """Sums over the elements of a tensor: squares of the change and of what is kept of it, their product, the error."""

    change: float = 0.0
    kept: float = 0.0
    product: float = 0.0
    error: float = 0.0

    def add(self, other: Survival) -> None:
        self.change += other.change
        self.kept += other.kept
        self.product += other.product
        self.error += other.error

    @property
    def cosine(self) -> float:
        """cos(kept, change): 1 where the direction survived."""
        norms = math.sqrt(self.change) * math.sqrt(self.kept)
        return self.product / norms if norms else float(self.change == self.kept)

    @property
    def lost(self) -> float:
        """‖kept − change‖ ÷ ‖change‖: 0 where all of it survived."""
        return math.sqrt(self.error / self.change) if self.change else 0.0

    @property
    def is_poor(self) -> bool:
        """Whether too much got lost to call it the change that was asked for."""
        return self.change > 0 and (self.cosine < LEAST_COSINE or self.lost > GREATEST_ERROR)


Item = TypeVar("Item")
Row: TypeAlias = tuple[str, list[str], float, float, float, float]  # a tensor, its dtypes, and the sums of Survival


class Kept(Finding):
    """What of a small change is in an output, tensor by tensor; one for all tensors of an edit.

    A change far below the spacing of an output's dtype is rounded away: bfloat16 has 8 bits, so that a change of
    relative size 1e-3 keeps a cosine of about 0.64, one of 3e-4 about 0.37.
    """

    __slots__ = ("dtypes", "tensors")

    def __init__(self) -> None:
        self.problem = ""
        self.dtypes: dict[str, None] = {}
        self.tensors: dict[str, Survival] = {}

    def add(self, key: str, dtype: DType, found: Survival, *, random: bool = False) -> None:
        """Add what one block of a tensor kept, rounded to nearest or at random."""
        self.dtypes[f"{dtype.name}{RANDOM * random}"] = None
        self.tensors.setdefault(key, Survival()).add(found)

    def rows(self) -> list[Row]:
        """What is known so far, as plain data that other processes can be told."""
        return [
            (key, list(self.dtypes), one.change, one.kept, one.product, one.error)
            for key, one in list(self.tensors.items())
        ]

    @classmethod
    def joined(cls, rows: Iterable[Row]) -> Kept:
        """What several files' or processes' rows say together; of one tensor, the row that saw most of it."""
        made = cls()
        for key, dtypes, *sums in rows:
            found = Survival(*sums)
            made.dtypes.update(dict.fromkeys(dtypes))
            if key not in made.tensors or made.tensors[key].change < found.change:
                made.tensors[key] = found
        return made

    @property
    def total(self) -> Survival:
        """The sums over all tensors."""
        total = Survival()
        for one in list(self.tensors.values()):
            total.add(one)
        return total

    @property
    def note(self) -> str:  # type: ignore[override]
        """One line: what is kept in all, and the worst tensors where too much got lost."""
        total = self.total
        if not total.change:
            return "nothing changes" if self.tensors else ""
        text = f"of the change, {' and '.join(self.dtypes)} keeps cos {total.cosine:.4f}, error {total.lost:.2%}"
        poor = sorted((one.cosine, key) for key, one in self.tensors.items() if one.is_poor)
        if not poor or all(name.endswith(RANDOM) for name in self.dtypes):  # the mean is kept, as was asked for
            return text
        worst = ", ".join(f"{key} {cosine:.2f}" for cosine, key in poor[:WORST])
        way = Phrase(Argument("dtype", "fp32"), " keeps it, ", Argument("rounding", "stochastic"), " its mean")
        return Phrase(f"warning: {text}; {plural(len(poor), 'tensor')} below cos {LEAST_COSINE} or with an error over ",
                      f"{GREATEST_ERROR:.0%} (worst: {worst}); ", way)  # fmt: skip


def combined(
    tensors: Sequence[Tensor], formula: Formula, dtype: DType, *, key: str = "", rounding: Rounding = NEAREST,
    kept: Kept | None = None, losses: Losses | None = None,
) -> Iterator[Block]:  # fmt: skip
    """Yield what a formula makes of tensors of one shape, in ``dtype``.

    The formula gets the number of the block and the float64 values of each tensor, and may change their arrays in
    place unless ``kept`` is given: then what the result adds to the first tensor is compared with what it should add.
    The parts of complex numbers are numbers of their own.
    """

    part, kinds = real(dtype), [tensor.dtype for tensor in tensors]

    def compute(steps: Sequence[tuple[int, tuple[Piece, ...]]]) -> tuple[Block, Losses, Survival]:
        import numpy as np

        counts = [parts[0].nbytes // kinds[0].part for _, parts in steps]
        made, lost, found, at = np.empty(sum(counts), codes_of(part)), Losses(), Survival(), 0
        with np.errstate(all="ignore"):
            for (index, parts), count in zip(steps, counts, strict=True):
                out = made[at : at + count]
                at += count
                if isinstance(formula, WeightedSum) and kept is None:
                    exact = formula.streamed(zip(parts, kinds, strict=True))
                else:
                    wide = [float64(piece.read(0), kind) for piece, kind in zip(parts, kinds, strict=True)]
                    exact = formula(index, wide)
                random = None if rounding.seed is None else random_numbers(rounding.seed, key, index)
                lost.add(rounded_into(out, exact, part, random))
                if kept is not None:
                    found.add(_survival(wide[0], exact, out, part))
        return bytes_of(made), lost, found

    nbytes = sum(tensor.nbytes for tensor in tensors)
    for block, lost, found in in_order(compute, _batched(enumerate(alongside(*tensors, count=STEP))), nbytes):
        if losses is not None:
            losses.add(lost)
        if kept is not None:
            kept.add(key, dtype, found, random=rounding.seed is not None)
        yield block


def _batched(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Items in lists of :data:`BATCH`."""
    given = iter(items)
    while batch := list(islice(given, BATCH)):
        yield batch


@dataclass(frozen=True, slots=True)
class WeightedSum:
    """The formula Σ wᵢ xᵢ ÷ total, in the order of the inputs, which are added one by one as they are read."""

    weights: Sequence[float]
    total: float = 1.0

    def __call__(self, index: int, wide: list[Array]) -> Array:
        made = wide[0]
        if self.weights[0] != 1:
            made *= self.weights[0]
        for weight, other in zip(self.weights[1:], wide[1:], strict=True):
            if weight != 1:
                other *= weight
            made += other
        if self.total != 1:
            made /= self.total
        return made

    def streamed(self, inputs: Iterable[tuple[Piece, DType]]) -> Array:
        """The sum of pieces, in memory that the next sum of this thread takes again."""
        import numpy as np

        made: Array | None = None
        for weight, (piece, dtype) in zip(self.weights, inputs, strict=True):
            values = _in_scratch(piece.read(0), dtype)
            if weight != 1 or made is None:
                term = scratch("sum" if made is None else "term", len(values), "f8")
                np.copyto(term, values)
                values = term if weight == 1 else np.multiply(term, weight, out=term)
            made = values if made is None else np.add(made, values, out=made)
        assert made is not None
        return made if self.total == 1 else np.divide(made, self.total, out=made)


def survival(base: Tensor, exact: Tensor, made: Tensor) -> Survival:
    """What a tensor has of the change that another one has in full: ``made`` and ``exact``, both beside ``base``."""

    def compute(parts: tuple[Piece, ...]) -> Survival:
        wide = [float64(piece.read(slot), tensor.dtype)
                for slot, (piece, tensor) in enumerate(zip(parts[:2], (base, exact), strict=True))]  # fmt: skip
        return _survival(wide[0], wide[1], numbers(parts[2].read(2), real(made.dtype)), made.dtype)

    total = Survival()
    for one in in_order(compute, alongside(base, exact, made), base.nbytes):
        total.add(one)
    return total


def float64(raw: Block | bytearray, dtype: DType) -> Array:
    """A block as float64, in memory of its own."""
    import numpy as np

    made: Array = widened(numbers(raw, dtype), real(dtype)).astype(np.float64)
    return made


def _in_scratch(raw: Block | bytearray, dtype: DType) -> Array:
    """The numbers of a block, in a dtype that numpy computes with; of bfloat16 in memory that is used again."""
    import numpy as np

    values = numbers(raw, dtype)
    if dtype.name != "bfloat16":
        return widened(values, real(dtype))
    bits = scratch("wide", len(values), "u4")
    np.copyto(bits, values)
    np.left_shift(bits, 16, out=bits)
    return bits.view(np.float32)


def rounded(exact: Array, dtype: DType, random: object = None) -> tuple[Array, Losses]:
    """float64 in another dtype, rounded once, and what got lost; with a generator of random numbers, up and down.

    Short floats are made from a float32 that was rounded to odd, which keeps what the second rounding needs to know
    (Boldo, Melquiond: Emulation of FMA and correctly rounded sums, 2008); bfloat16 from one that was rounded to
    nearest, where that has no part in the result: everywhere but in the middle between two of them.
    """
    import numpy as np

    part = real(dtype)
    if part.name == "float64":
        return exact, Losses()
    made: Array = np.empty(exact.shape, codes_of(part))
    return made, rounded_into(made, exact, part, random)


def rounded_into(made: Array, exact: Array, part: DType, random: object = None) -> Losses:
    """Round as :func:`rounded` does, into an array of the numbers (or codes) of a dtype; returns what got lost."""
    import numpy as np

    with np.errstate(all="ignore"):
        lost = Losses()
        if part.name in ("float64", "float32"):
            np.copyto(made, exact, casting="unsafe")
            if part.name == "float32" and not _is_finite(made):
                lost.infinite = int((np.isinf(made) & np.isfinite(exact)).sum())
        elif part.name != "bfloat16" or not _bfloat16_into(made, exact):
            raw, lost = cast_by_numpy(bytes_of(_odd_float32(exact)), BY_NAME["float32"], part)
            made[:] = numbers(raw, part)
        if random is not None and part.name != "float64":
            made[:] = _stochastic(exact, made, part, random)
        return lost


def codes_of(part: DType) -> np.dtype[Any]:
    """numpy's dtype for the numbers of a real dtype, or for their codes."""
    import numpy as np

    return np.dtype(f"u{part.itemsize}" if is_coded(part) else part.name)


def _is_finite(values: Array) -> bool:
    """Whether all numbers are finite, in two quick passes."""
    import numpy as np

    return bool(values.max(initial=0) < np.inf and values.min(initial=0) > -np.inf)


def _bfloat16_into(made: Array, exact: Array) -> bool:
    """Round float64 to the codes of bfloat16; False, and nothing of worth, where some are not finite or many are ties.

    A float32 on the way hides on which side of the middle between two bfloat16 a number lies only where it is this
    middle itself; there float64 is asked again.
    """
    import numpy as np

    near = scratch("near", len(exact), "f4")
    np.copyto(near, exact, casting="unsafe")
    if not _is_finite(near):
        return False
    bits = near.view(np.uint32)
    np.copyto(made, bits, casting="unsafe")  # the lower halves
    middles = np.flatnonzero(made == 0x8000)
    if len(middles) > len(exact) // 8:
        return False
    back, wanted = np.abs(near[middles].astype(np.float64)), np.abs(exact[middles])
    np.add(bits, np.uint32(0x8000), out=bits)
    np.right_shift(bits, np.uint32(16), out=bits)
    np.copyto(made, bits, casting="unsafe")
    upper = made[middles]
    made[middles] = upper - np.where(back == wanted, upper & 1, back > wanted).astype(np.uint16)
    return bool(((made & 0x7FFF) < 0x7F80).all())


def _odd_float32(exact: Array) -> Array:
    """float64 as float32, rounded to odd: towards zero, the last bit set where anything was cut off."""
    import numpy as np

    near = exact.astype(np.float32)
    back = near.astype(np.float64)
    bits = near.view(np.uint32)
    bits -= (np.abs(back) > np.abs(exact)).astype(np.uint32)
    bits |= (back != exact).astype(np.uint32)
    return near


def _stochastic(exact: Array, near: Array, dtype: DType, random: object) -> Array:
    """One of the two neighbours of each number, each the likelier the nearer it is."""
    import numpy as np

    assert isinstance(random, np.random.Generator)
    codes = near.view(np.dtype(f"u{dtype.itemsize}"))
    value = widened(near, dtype).astype(np.float64)
    step = np.where(np.abs(exact) > np.abs(value), 1, -1).astype(codes.dtype)
    step[value == 0] = 1  # from zero, its sign being that of the number, there is only one way
    other_codes = codes + step
    other = widened(other_codes if is_coded(dtype) else other_codes.view(near.dtype), dtype).astype(np.float64)
    gap = np.abs(other - value)
    moves = random.random(exact.shape) * gap < np.abs(exact - value)
    moves &= np.isfinite(other) & (exact != value) & np.isfinite(exact)
    return np.where(moves, other_codes, codes).view(near.dtype)


def random_numbers(seed: int, key: str, index: int) -> object:
    """Random numbers of their own for each block of each tensor, whatever threads compute it."""
    import numpy as np

    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, zlib.crc32(key.encode()), index])))


def _survival(base: Array, exact: Array, made: Array, dtype: DType) -> Survival:
    import numpy as np

    change = exact - base
    kept = widened(made, real(dtype)).astype(np.float64)
    kept -= base
    finite = np.isfinite(change) & np.isfinite(kept)
    if not finite.all():
        change, kept = change[finite], kept[finite]
    product, error = kept * change, kept - change
    change *= change
    kept *= kept
    error *= error
    return Survival(
        *(float(squares.sum()) for squares in (change, kept, product, error))
    )  # no BLAS: it has its own threads
