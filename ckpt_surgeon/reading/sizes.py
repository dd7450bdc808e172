"""Where the bytes of a checkpoint are: by module and by dtype, as ``du`` says it of folders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..tensors.records import Tensor
from ..text import Shown
from .listing import Listing


@dataclass(frozen=True, slots=True, repr=False)
class Amount(Shown):
    """How much there is: keys, elements and bytes; tensors that are tied count once, under their first key."""

    tensors: int = 0
    parameters: int = 0
    nbytes: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(
            self.tensors + other.tensors, self.parameters + other.parameters, self.nbytes + other.nbytes
        )  # fmt: skip


@dataclass(frozen=True, slots=True, repr=False)
class ModuleSize(Shown):
    """A module, or a parameter at the end of a path: what is in it, in all and by dtype, and its share of all bytes."""

    path: str  # "" for the whole
    depth: int
    amount: Amount
    dtypes: Mapping[str, Amount]
    share: float


@dataclass(frozen=True, slots=True, repr=False)
class Sizes(Shown):
    """The sizes of a listing: the whole first, then its modules, each followed by its own."""

    title: str
    modules: tuple[ModuleSize, ...]


def sizes(listing: Listing, *, depth: int = 2, sort: str = "file") -> Sizes:
    """Sum up the tensors of a listing by module, down to ``depth`` levels, and by dtype.

    ``sort`` orders the modules of each module: "file" by their first tensors, "name", or "size", the largest first.

    >>> import torch
    >>> from ckpt_surgeon import ls
    >>> state_dict = {"fc.weight": torch.ones(4, 3), "fc.bias": torch.ones(4), "bn.weight": torch.ones(4)}
    >>> found = sizes(ls(state_dict), depth=1)
    >>> [(module.path, module.amount.parameters, f"{module.share:.0%}") for module in found.modules]
    [('', 20, '100%'), ('fc', 16, '80%'), ('bn', 4, '20%')]
    """
    amounts = _amounts(listing.tensors)
    whole = sum((amount for amount in amounts.values()), Amount()).nbytes
    keys = {tuple(key.split(".")): key for key in amounts}
    found = list(_walk((), keys, listing.tensors, amounts, whole, depth, sort))
    return Sizes(f"{listing.path}: {listing.container}", tuple(found))


def _amounts(tensors: Mapping[str, Tensor]) -> dict[str, Amount]:
    """What each key adds to the whole: ties add nothing but themselves."""
    seen = set()
    found = {}
    for key, tensor in tensors.items():
        is_new = tensor.tie not in seen
        seen.add(tensor.tie)
        found[key] = Amount(1, tensor.numel, tensor.nbytes) if is_new else Amount(1)
    return found


def _walk(
    path: tuple[str, ...],
    keys: Mapping[tuple[str, ...], str],
    tensors: Mapping[str, Tensor],
    amounts: Mapping[str, Amount],
    whole: int,
    depth: int,
    sort: str,
) -> Iterable[ModuleSize]:
    dtypes: dict[str, Amount] = {}
    below: dict[str, dict[tuple[str, ...], str]] = {}
    for parts, key in keys.items():
        name = tensors[key].dtype.name
        dtypes[name] = dtypes.get(name, Amount()) + amounts[key]
        if len(parts) > len(path):
            below.setdefault(parts[len(path)], {})[parts] = key
    amount = sum(dtypes.values(), Amount())
    yield ModuleSize(".".join(path), len(path), amount, dtypes, amount.nbytes / whole if whole else 1.0)
    if len(path) >= depth:
        return
    names = sorted(below) if sort == "name" else list(below)
    if sort == "size":
        names.sort(key=lambda name: -sum(amounts[key].nbytes for key in below[name].values()))
    for name in names:
        yield from _walk((*path, name), below[name], tensors, amounts, whole, depth, sort)
