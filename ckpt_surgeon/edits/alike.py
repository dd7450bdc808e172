"""Checkpoints of one model, taken key by key, whose tensors an edit computes with.

Of integers and bools (counters, indices) nothing is computed: those that are equal everywhere stay, BatchNorm's
counters become the largest, others are refused unless it is said which count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias, cast

from ..errors import Argument, EditError, NothingMatched, Phrase, listed
from ..files.spans import Block
from ..tensors import arithmetic, casts
from ..tensors.checkpoint import Checkpoint
from ..tensors.combining import NEAREST, Kept, Rounding, combined
from ..tensors.dtypes import DType
from ..tensors.dtypes import parse as parse_dtype
from ..tensors.records import ComputedTensor, ExtraState, Finding, OpaqueTensor, Tensor
from ..text import plural
from .arguments import DTypeLike
from .change import Change
from .companions import LORA, relations
from .inputs import FIRST, label, numbered, qualified, union
from .value_edit import of_first

if TYPE_CHECKING:
    from ..tensors.combining import Formula

COUNTERS = ("num_batches_tracked",)  # of which the largest counts
STATISTICS = ("running_mean", "running_var")

# Arguments that several edits have.
Common = Annotated[bool, "Take the keys that all inputs have; without it, a key that one lacks is an error."]
Integers = Annotated[
    Literal["equal", "first", "largest"],
    "Which integers and bools count; equal refuses those that differ, but for counters: of these, the largest.",
]
OutDType = Annotated[DTypeLike, "The dtype of the result; without it, each tensor has that of the first input."]
HowRounded = Annotated[Literal["nearest", "stochastic"], "How the result is rounded to its dtype, once."]
Seed = Annotated[int, "What random numbers begin with: the same seed gives the same output."]

Preparing: TypeAlias = (
    "Callable[[str, Sequence[Tensor]], Formula]"  # reads what the formula needs to know of whole tensors
)


def rounding_of(how: str, seed: int) -> Rounding:
    """How results are rounded."""
    return Rounding(seed) if how == "stochastic" else NEAREST


class Alike:
    """Several checkpoints with the same keys and shapes.

    ``common`` takes only the keys that all have; ``integers`` says which integers count, ``dtype`` what floats become.
    Raises EditError naming the keys that one of them lacks, and those of another shape; NothingMatched where no key is
    in all.
    """

    def __init__(
        self, first: Checkpoint, others: Sequence[object], *, common: bool = False, integers: str = "equal",
        dtype: DTypeLike = "",
    ) -> None:  # fmt: skip
        self.first = first
        self.others = numbered(cast(Sequence[Checkpoint], others))
        self.inputs = {FIRST: first, **self.others}
        self.integers = integers
        self.dtype = dtype_of(dtype)
        self.notes: list[str] = []
        self.keys = self._keys(common)

    def _keys(self, common: bool) -> list[str]:
        keys = [key for key in self.first if all(key in other for other in self.others.values())]
        lacking: list[str] = []
        for name, checkpoint in self.inputs.items():
            there = dict.fromkeys(key for other in self.inputs.values() for key in other)
            absent = [key for key in there if key not in checkpoint]
            if absent:
                lacking.append(f"{label(name, checkpoint)} lacks {plural(len(absent), 'key')}: {listed(absent, 3)}")
        if lacking and not common:
            raise EditError(lacking, remedy=Phrase("take what all have with ", Argument("common", True)))
        if not keys:
            raise NothingMatched(["*"], what="pattern")
        sizes = {key: dict.fromkeys(tensor.shape for tensor in self.tensors(key)) for key in keys}
        shapes = [
            f"{key!r} is {' and '.join(str(list(shape)) for shape in found)}"
            for key, found in sizes.items()
            if len(found) > 1
        ]
        if shapes:
            raise EditError(shapes, remedy="the inputs are no checkpoints of one model; resize or drop these first")
        self.notes += [f"left out, not in all inputs: {line}" for line in lacking]
        return keys

    def tensors(self, key: str) -> tuple[Tensor, ...]:
        """The tensors of one key, in the order of the inputs."""
        return tuple(checkpoint[key] for checkpoint in self.inputs.values())

    def change(
        self, prepare: Preparing, rounding: Rounding = NEAREST, *, kept: Kept | None = None, averages: bool = True
    ) -> Change[Checkpoint]:
        """The change that makes each floating-point tensor by a formula of the inputs' values.

        ``kept`` compares what is added to the first input with what should be; ``averages`` says in notes what an
        average does not mean.  Raises EditError naming all tensors that cannot be computed with.
        """
        made: dict[object, Tensor] = {}
        result: dict[str, Tensor] = {}
        problems: list[str] = []
        for key in self.keys:
            tensors = self.tensors(key)
            tie = tuple(tensor.tie for tensor in tensors)
            try:
                if tie not in made:
                    made[tie] = self._made(key, tensors, prepare, rounding, kept)
                result[key] = made[tie]
            except EditError as error:
                problems += error.problems
        if problems:
            raise EditError(problems)
        whole = union(self.first, self.others)
        origins = {
            key: (key, *(qualified(name, key) for name in self.others))
            if result[key] is not self.first[key] else (key,)
            for key in self.keys
        }  # fmt: skip
        states = [key for key, tensor in result.items() if isinstance(tensor, ExtraState)]
        if states:
            self.notes.append(f"extra states are those of the first input, as they are: {listed(states, 3)}")
        notes = [*self.notes, *(self._of_averages(result) if averages else [])]
        done = Change(whole, self.first.with_tensors(result, self.first.versions), origins)
        return of_first(done, self.inputs, notes)

    def _made(
        self, key: str, tensors: tuple[Tensor, ...], prepare: Preparing, rounding: Rounding, kept: Kept | None
    ) -> Tensor:
        """One tensor of the result."""
        first = tensors[0]
        if any(isinstance(tensor, OpaqueTensor) for tensor in tensors):
            raise EditError([f"{key!r} is a tensor that cannot be computed with"], remedy="drop it first")
        if isinstance(first, ExtraState):
            return first
        if not all(tensor.dtype.is_floating or tensor.dtype.is_complex for tensor in tensors):
            return self._integer(key, tensors)
        if len({tensor.dtype.is_complex for tensor in tensors}) > 1:
            raise EditError([f"{key!r} is complex in one input and real in another"])
        dtype = first.dtype if self.dtype is None or first.dtype.is_complex else self.dtype
        for tensor in tensors:
            casts.check_computable(key, tensor.dtype)
        casts.check_computable(key, dtype)
        finding = Finding()

        def make(inputs: tuple[Tensor, ...]) -> Iterator[Block]:
            losses = casts.Losses()
            formula = prepare(key, inputs)
            yield from combined(inputs, formula, dtype, key=key, rounding=rounding, kept=kept, losses=losses)
            if losses.infinite:
                finding.problem = f"{key!r}: {losses.infinite:,} values are too large for {dtype}; give another dtype"

        sums = ComputedTensor(dtype, first.shape, tensors, make, finding)
        return sums if kept is None else ComputedTensor(dtype, first.shape, (sums,), lambda own: own[0].blocks(), kept)

    def _integer(self, key: str, tensors: tuple[Tensor, ...]) -> Tensor:
        """The integers or bools that count."""
        first = tensors[0]
        if any(tensor.dtype != first.dtype for tensor in tensors):
            raise EditError([f"{key!r} has several dtypes, and {first.dtype} is no floating-point number"])
        if self.integers == "first":
            return first
        if self.integers == "largest" or key.rpartition(".")[2] in COUNTERS:
            return ComputedTensor(first.dtype, first.shape, tensors, arithmetic.largest)
        finding = Finding()

        def make(inputs: tuple[Tensor, ...]) -> Iterator[Block]:
            for block, same in arithmetic.equal_blocks(inputs):
                if not same:
                    way = Phrase(Argument("integers", "first"), " or largest")
                    finding.problem = Phrase(
                        f"{key!r} ({first.dtype}) is not the same in all inputs; say which counts: ", way
                    )
                yield block

        return ComputedTensor(first.dtype, first.shape, tensors, make, finding)

    def _of_averages(self, result: dict[str, Tensor]) -> Iterator[str]:
        """What an average of these tensors does not mean."""
        if any(key.rpartition(".")[2] in STATISTICS for key in result):
            yield "running statistics fit no computed weights: re-estimate them (torch.optim.swa_utils.update_bn)"
        pairs = [one for one in relations(result) if one.kind == LORA]
        if pairs:
            yield f"{plural(len(pairs), 'LoRA pair')}: averages of A and B are not the average of their products"
        untied = len({tensor.tie for tensor in result.values()}) - len({self.first[key].tie for key in result})
        if untied > 0:
            yield f"{untied:,} keys are tied in the first input only and get values of their own"


def dtype_of(spelling: DTypeLike) -> DType | None:
    if spelling == "":
        return None
    try:
        found = parse_dtype(spelling)
    except ValueError as error:
        raise EditError([str(error)]) from None
    if not found.is_floating:
        raise EditError([f"{found} is no floating-point dtype"])
    return found
