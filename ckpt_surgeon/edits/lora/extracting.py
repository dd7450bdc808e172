"""An adapter made of the difference of two checkpoints, by singular values."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from math import prod
from threading import Lock
from typing import TYPE_CHECKING, Annotated, cast

from ...errors import Argument, EditError, NothingMatched, Phrase, listed
from ...files.spans import Block
from ...tensors import arithmetic, casts
from ...tensors.checkpoint import PEFT_CONFIG, Checkpoint
from ...tensors.dtypes import BY_NAME, DType
from ...tensors.records import ComputedTensor, ExtraState, OpaqueTensor, Tensor
from ...tensors.torch_bridge import raw_bytes, whole
from ...text import plural
from ..alike import OutDType, dtype_of
from ..arguments import Input, Patterns
from ..change import Change, Inline, listed_patterns, matching
from ..inputs import FIRST, qualified, union
from ..value_edit import of_first, value_edit
from .layers import PEFT_PREFIX

if TYPE_CHECKING:
    import torch

# What embeddings are called; PEFT has other names for the halves of their pairs.
EMBEDDINGS = ("*embed*.weight", "*.wte.weight", "*.wpe.weight", "wte.weight", "wpe.weight")


@value_edit(
    "Make a LoRA adapter of a difference.",
    "tuned.pth pretrained.pth adapter_model.safetensors --rank 16",
    "tuned.pth pretrained.pth adapter_model.safetensors --energy 0.95 --whole-modules",
    computes=True,
    inline=[Inline("{rank}")],
)
def extract_lora(
    state_dict: Checkpoint,
    base: Annotated[Input, "The checkpoint that was fine-tuned."],
    *,
    rank: Annotated[int, "The rank of every layer, or the greatest with --energy."] = 0,
    energy: Annotated[float, "The share of the squares of the singular values to keep, from 0 to 1."] = 0.0,
    only: Annotated[Patterns, "Globs on the keys of the weights that become pairs."] = (),
    embeddings: Annotated[Patterns, "Globs on the keys of embeddings, where their names do not tell."] = (),
    fan_in_fan_out: Annotated[bool, "Weights are stored as (inputs, outputs), as Conv1D of transformers."] = False,
    whole_modules: Annotated[bool, "Take whole what changed and is no matrix: norms, biases, new heads."] = False,
    dtype: OutDType = "float32",
) -> Change[Checkpoint]:
    """Make a LoRA adapter in PEFT's layout of the difference of a fine-tuning and its base.

    Of each weight that changed, ΔW ≈ B A with B = U √S and A = √S Vᵀ, from the greatest ``rank`` singular values
    (Eckart and Young 1936), computed in float32; alpha is the rank, so that the scale is 1.  ``energy`` takes as many
    as have that share of Σ σ².  At full rank, base and adapter merged are the fine-tuning up to rounding in float32.

    Which weights changed is found by reading both when this is called, and so are the ranks for ``energy``; the pairs
    are computed when they are written.  Tensors that changed and are no matrices or convolutions are named, or taken
    with ``whole_modules``.  The settings go into the metadata, and into adapter_config.json beside an output that is
    called adapter_model.  Raises NothingMatched, EditError.

    >>> import torch
    >>> base = {"fc.weight": torch.zeros(4, 3), "norm.weight": torch.ones(4)}
    >>> adapter = extract_lora({**base, "fc.weight": torch.ones(4, 3)}, base, rank=1)
    >>> {key: tuple(tensor.shape) for key, tensor in adapter.items()}
    {'base_model.model.fc.lora_A.weight': (1, 3), 'base_model.model.fc.lora_B.weight': (4, 1)}
    """
    if rank < 0 or not 0 <= energy <= 1 or (state_dict and not (rank or energy)):
        way = Phrase("give ", Argument("rank", 16), " or ", Argument("energy", 0.95))
        raise EditError(["an adapter needs a rank, or a share of the energy from 0 to 1"], remedy=way)
    theirs = cast(Checkpoint, base)
    adapter = _Extracted(state_dict, theirs, dtype_of(dtype) or BY_NAME["float32"], fan_in_fan_out)
    if patterns := listed_patterns(only):
        matching(state_dict, patterns)
    tables = [*listed_patterns(embeddings), *EMBEDDINGS]
    others = []
    for key in _changed(state_dict, theirs):
        if _is_matrix(key, state_dict, theirs) and (not patterns or any(fnmatch(key, one) for one in patterns)):
            adapter.add_pair(key, rank, energy, is_table=any(fnmatch(key, one) for one in tables))
        else:
            others.append(key)
    if whole_modules:
        adapter.add_whole(others)
    if not adapter.tensors and state_dict:
        raise NothingMatched(["*"], what="weight that changed, in")
    return adapter.change([] if whole_modules else others)


def _changed(tuned: Checkpoint, base: Checkpoint) -> Iterator[str]:
    """The keys whose values differ, or that the base has not."""
    for key, tensor in tuned.items():
        old = base.get(key)
        if isinstance(tensor, ExtraState):
            continue
        if isinstance(tensor, OpaqueTensor) or isinstance(old, OpaqueTensor):
            raise EditError([f"{key!r} is a tensor that cannot be computed with"], remedy="drop it first")
        if old is None or old.shape != tensor.shape or _differ(tensor, old):
            yield key


def _differ(ours: Tensor, theirs: Tensor) -> bool:
    if ours.dtype == theirs.dtype:
        return not all(same for _, same in arithmetic.equal_blocks((ours, theirs)))
    return arithmetic.distance(ours, theirs).greatest > 0


def _is_matrix(key: str, tuned: Checkpoint, base: Checkpoint) -> bool:
    tensor, old = tuned[key], base.get(key)
    return (
        old is not None
        and key.endswith(".weight")
        and old.shape == tensor.shape
        and 2 <= len(tensor.shape) <= 5
        and tensor.dtype.is_floating
        and old.dtype.is_floating
    )


@dataclass(slots=True)
class _Extracted:
    """An adapter in the making: its tensors, the keys that each is made of, and its settings."""

    tuned: Checkpoint
    base: Checkpoint
    dtype: DType
    is_flipped: bool
    tensors: dict[str, Tensor] = field(default_factory=dict)
    origins: dict[str, tuple[str, ...]] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    saved: dict[str, None] = field(default_factory=dict)  # modules that are taken whole
    has_biases: bool = False

    def add_pair(self, key: str, rank: int, energy: float, *, is_table: bool) -> None:
        """The two halves of the difference of one weight."""
        new, old = self.tuned[key], self.base[key]
        for tensor in (new, old):
            casts.check_computable(key, tensor.dtype)
        flip = (is_table or self.is_flipped) and len(new.shape) == 2
        shape = (new.shape[1], new.shape[0]) if flip else new.shape
        outs, ins = shape[0], prod(shape[1:])
        count = min(rank or outs, outs, ins)
        if energy:
            count = min(count, _rank_for(_difference(new, old, flip), energy))
        module = key.removesuffix(".weight")
        names = ("lora_embedding_A", "lora_embedding_B") if is_table and len(shape) == 2 else (
            "lora_A.weight", "lora_B.weight")  # fmt: skip
        factors = _Factors(count, flip)
        sizes = ((count, *shape[1:]), (outs, count, *(1,) * (len(shape) - 2)))
        for half, (name, size) in enumerate(zip(names, sizes, strict=True)):
            made = f"{PEFT_PREFIX}{module}.{name}"
            self.tensors[made] = ComputedTensor(self.dtype, size, (new, old), factors.maker(half, self.dtype))
            self.origins[made] = (key, qualified("base", key))
        self.ranks[module] = count

    def add_whole(self, keys: list[str]) -> None:
        """Tensors as they are, with all others of their modules; biases of layers with a pair by themselves."""
        for key in keys:
            module, _, leaf = key.rpartition(".")
            if module in self.ranks:
                name = f"{PEFT_PREFIX}{module}.base_layer.{leaf}"
                self.tensors[name], self.origins[name] = self.tuned[key], (key,)
                self.has_biases = True
                continue
            self.saved[module] = None
            for own in self.tuned:
                if own.rpartition(".")[0] == module:
                    self.tensors[PEFT_PREFIX + own] = self.tuned[own]
                    self.origins[PEFT_PREFIX + own] = (own,)

    def change(self, left: list[str]) -> Change[Checkpoint]:
        """The adapter in place of the fine-tuning; ``left`` are keys that changed and are not in it."""
        inputs = {FIRST: self.tuned, "base": self.base}
        before = union(self.tuned, {"base": self.base})
        metadata = {"format": "pt", PEFT_CONFIG: json.dumps(self.settings(), indent=2)}
        result = replace(self.tuned, tensors=self.tensors, versions=None, metadata=metadata)
        notes = [f"{plural(len(self.ranks), 'pair')} of rank {_span(self.ranks.values())}"] if self.ranks else []
        if self.saved:
            notes.append(f"{plural(len(self.saved), 'module')} taken whole: {listed(self.saved, 3)}")
        if left:
            way = Phrase("take them with ", Argument("whole_modules", True))
            notes.append(
                Phrase(f"changed and not in the adapter: {plural(len(left), 'tensor')} ({listed(left, 3)}); ", way)
            )
        return of_first(Change(before, result, self.origins), inputs, notes)

    def settings(self) -> dict[str, object]:
        """What PEFT reads beside the tensors (``LoraConfig``)."""
        usual = max(self.ranks.values(), default=1)
        own = {module: rank for module, rank in self.ranks.items() if rank != usual}
        return {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": None,
            "inference_mode": True,
            "r": usual,
            "lora_alpha": usual,
            "rank_pattern": {f"^{module}": rank for module, rank in own.items()},
            "alpha_pattern": {f"^{module}": rank for module, rank in own.items()},
            "target_modules": list(self.ranks),
            "modules_to_save": list(self.saved) or None,
            "bias": "lora_only" if self.has_biases else "none",
            "fan_in_fan_out": self.is_flipped,
            "init_lora_weights": True,
        }


def _span(ranks: Iterable[int]) -> str:
    found = sorted(set(ranks))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _difference(new: Tensor, old: Tensor, flip: bool) -> torch.Tensor:
    """ΔW as a matrix of outputs and inputs, in float32."""
    delta = whole(new).double() if new.dtype.name == "float64" else whole(new).float()
    delta = (delta - whole(old).to(delta.dtype)).float()
    matrix = delta.flatten(1)
    return matrix.T if flip else matrix


def _rank_for(matrix: torch.Tensor, energy: float) -> int:
    """How many singular values have a share of Σ σ²."""
    import torch

    squares = torch.linalg.svdvals(matrix).double().square()
    shares = squares.cumsum(0) / squares.sum()
    return int((shares < energy * (1 - 1e-12)).sum()) + 1


class _Factors:
    """Both halves of one difference, from one decomposition; kept until each was taken."""

    def __init__(self, rank: int, flip: bool) -> None:
        self._rank, self._flip = rank, flip
        self._lock = Lock()
        self._made: dict[int, torch.Tensor] = {}

    def maker(self, half: int, dtype: DType) -> Callable[[tuple[Tensor, ...]], Iterator[Block]]:
        """What makes the bytes of one half: 0 is A, 1 is B."""

        def make(tensors: tuple[Tensor, ...]) -> Iterator[Block]:
            import torch

            with self._lock:
                if half not in self._made:
                    self._made = dict(enumerate(self._halves(tensors)))
                found = self._made.pop(half)
            yield raw_bytes(found.to(getattr(torch, dtype.name)).contiguous())

        return make

    def _halves(self, tensors: tuple[Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        left, values, right = torch.linalg.svd(_difference(tensors[0], tensors[1], self._flip), full_matrices=False)
        root = values[: self._rank].sqrt()
        return root[:, None] * right[: self._rank], left[:, : self._rank] * root
