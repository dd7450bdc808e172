"""The edit that folds reparametrised weights into plain ones: weight norm, spectral norm, pruning masks.

The formulas are torch's: ``torch._weight_norm`` (torch/nn/utils/weight_norm.py), weight / sigma with
sigma = uᵀ W v (torch/nn/utils/spectral_norm.py), weight × mask (torch/nn/utils/prune.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

from ..errors import EditError, NothingMatched
from ..files.spans import Block
from ..tensors.arithmetic import by_torch
from ..tensors.checkpoint import Checkpoint
from ..tensors.records import ComputedTensor, Tensor
from . import companions
from .arguments import Patterns
from .change import AllowUnmatched, Change, Inline, listed_patterns, matching
from .value_edit import regrouped, settled, value_edit

if TYPE_CHECKING:
    import torch


@value_edit(
    "Fold weight norm, spectral norm, masks.",
    "vocoder.pth plain.pth",
    inline=[Inline("", help="Fold weight norm, spectral norm, masks.")],
    computes=True,
)
def fold(
    state_dict: Checkpoint,
    patterns: Annotated[Patterns, "Globs on keys."] = "*",
    *,
    allow_unmatched: AllowUnmatched = False,
) -> Change[Checkpoint]:
    """Fold reparametrised weights into plain ones: weight norm, spectral norm and pruning masks.

    Both spellings are known: ``weight_g``/``weight_v``, ``weight_orig``/``weight_u``, ``weight_orig``/
    ``weight_mask``, and torch's ``parametrizations.weight.original…``.  ``patterns`` are globs on the plain keys
    (``*.conv.weight``).  Computed by torch's own formulas.  Raises NothingMatched when there is nothing to fold.

    >>> import torch
    >>> layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 2))
    >>> torch.equal(fold(layer.state_dict())["weight"], layer.weight.detach())
    True
    """
    found = list(reparametrised(state_dict))
    chosen = matching([one.key for one in found], patterns, allow_unmatched=True)
    if not chosen and not allow_unmatched:
        raise NothingMatched(listed_patterns(patterns), what="reparametrised weight", examples=state_dict)
    problems: list[str] = []
    sets: list[tuple[tuple[str, ...], dict[str, Tensor]]] = []
    for one in found:
        try:
            if one.key in chosen:
                sets.append((one.keys, {one.key: one.plain()}))
        except EditError as error:
            problems += error.problems
    if problems:
        raise EditError(problems)
    return settled(regrouped(state_dict, sets), sets)


@dataclass(frozen=True, slots=True)
class Reparametrised:
    """One plain weight: its key, the keys that it replaces, and what makes the tensor that computes it.

    ``plain`` raises EditError where the shapes do not fit or the checkpoint does not tell the formula.
    """

    key: str
    keys: tuple[str, ...]
    plain: Callable[[], ComputedTensor]


_FITS = 0.9  # cosine; power iteration leaves it near 1, vectors that do not belong together near 0


def reparametrised(state_dict: Checkpoint) -> Iterator[Reparametrised]:
    """Every reparametrised weight of a state_dict, in the order of its keys."""
    formulas: dict[str, Callable[..., ComputedTensor]] = {
        companions.WEIGHT_NORM: _weight_norm,
        companions.SPECTRAL_NORM: _spectral_norm,
        companions.MASKED: _masked,
        companions.PARAMETRIZED: _unknown,
    }
    for one in companions.reparametrised(state_dict):
        yield Reparametrised(one.key, one.keys, partial(formulas[one.kind], state_dict, *one.keys))


def _unknown(_: Checkpoint, key: str) -> ComputedTensor:
    raise EditError([f"{key!r}: the formula of its parametrization is not in the checkpoint"])


def _masked(state_dict: Checkpoint, key: str, mask: str) -> ComputedTensor:
    return _computed(state_dict, (key, mask), lambda weight, kept: weight * kept)


def _weight_norm(state_dict: Checkpoint, g: str, v: str) -> ComputedTensor:
    shape, whole_shape = state_dict[g].shape, state_dict[v].shape
    kept = [dim for dim, size in enumerate(shape) if size > 1]
    fits = [dim for dim in kept if dim < len(whole_shape) and shape[dim] == whole_shape[dim]]
    if len(kept) > 1 or kept != fits or (shape and len(shape) != len(whole_shape)):
        raise EditError([f"{g!r} {list(shape)} and {v!r} {list(whole_shape)} are no weight norm"])
    if not kept and shape and whole_shape[0] != 1:
        raise EditError([f"{g!r} {list(shape)} does not tell over which dimension {v!r} was normalised"])
    dim = kept[0] if kept else (0 if shape else -1)

    def plain(gain: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
        import torch

        return torch._weight_norm(direction, gain, dim)

    return _computed(state_dict, (g, v), plain, like=v)


def _spectral_norm(state_dict: Checkpoint, key: str, u: str, v: str) -> ComputedTensor:
    rows, columns = state_dict[u].numel, state_dict[v].numel
    dims = [dim for dim, size in enumerate(state_dict[key].shape) if size == rows]
    if not dims or rows * columns != state_dict[key].numel:
        raise EditError([f"{key!r}: its spectral norm's vectors do not fit its shape {list(state_dict[key].shape)}"])

    def plain(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        import torch

        return weight / torch.vdot(left, torch.mv(_matrix(key, weight, left, right, dims), right))

    return _computed(state_dict, (key, u, v), plain)


def _matrix(key: str, weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, dims: list[int]) -> torch.Tensor:
    """The matrix that spectral norm sees; of several dimensions of one size, the one that u = W v / |W v| tells."""
    from torch.nn.functional import cosine_similarity

    matrices = [weight.movedim(dim, 0).flatten(1) for dim in dims]
    if len(dims) == 1:
        return matrices[0]
    fits = [float(cosine_similarity(matrix.mv(right), left, dim=0)) for matrix in matrices]
    if max(fits) > _FITS:
        return matrices[fits.index(max(fits))]
    if dims[0] != 0:
        raise EditError([f"{key!r}: its spectral norm's vectors do not tell which dimension they belong to"])
    return matrices[0]  # never trained, and 0 is torch's default


def _computed(
    state_dict: Checkpoint,
    keys: tuple[str, ...],
    formula: Callable[..., torch.Tensor],
    *,
    like: str = "",
) -> ComputedTensor:
    model = state_dict[like or keys[0]]

    def make(inputs: tuple[Tensor, ...]) -> Iterator[Block]:
        return by_torch(inputs, formula, model.dtype)

    return ComputedTensor(model.dtype, model.shape, tuple(state_dict[key] for key in keys), make)
