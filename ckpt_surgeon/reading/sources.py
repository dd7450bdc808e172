"""What public functions take for a checkpoint: a path or URL, an opened Checkpoint, a state_dict, a model."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias, TypeGuard, cast

from ..errors import CheckpointError
from ..files.paths import AnyPath, is_path
from ..tensors.checkpoint import Checkpoint, versions_of
from ..tensors.records import Shaped, Tensor
from .opening import open as open_checkpoint
from .parts import as_whole

if TYPE_CHECKING:
    import torch

    Source: TypeAlias = AnyPath | Mapping[str, object] | torch.nn.Module  # a mapping of records or torch tensors

TAKEN = "give a path or URL, an opened Checkpoint, a state_dict or a torch.nn.Module"


def is_module(source: object) -> TypeGuard[torch.nn.Module]:
    """Whether something is a model; torch is not imported to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.nn.Module)


def is_tensor(source: object) -> bool:
    """Whether something is one tensor, a record or torch's own."""
    torch = sys.modules.get("torch")
    return isinstance(source, Tensor) or (torch is not None and isinstance(source, torch.Tensor))


def state_dict_of(source: object, *, select: str | None = None) -> Mapping[str, Shaped]:
    """A state_dict in the form in which it is given: a path is opened, a model asked, a mapping returned as it is.

    ``select`` is the dotted path of the state_dict in a file that holds several.  Raises CheckpointError for anything
    else, and for ``select`` without a path, and what :func:`ckpt_surgeon.open` raises.

    >>> state_dict_of({"fc.bias": 1})
    {'fc.bias': 1}
    """
    if is_path(source):
        return open_checkpoint(source, select=select)
    if select is not None:
        raise CheckpointError(
            f"select={select!r} chooses in a file, not in a {type(source).__name__}", remedy="leave it out"
        )
    if is_module(source):
        return source.state_dict()
    if isinstance(source, Mapping):
        return source
    raise CheckpointError(f"a {type(source).__name__} is no checkpoint", remedy=TAKEN)


def checkpoint_of(source: object, *, select: str | None = None, allow_part: bool = False) -> Checkpoint:
    """Whatever holds a state_dict, as a Checkpoint; the tensors of checkpoints that were merged stay in their files.

    With ``allow_part``, a checkpoint that has a part of a model counts as a whole one.  The other arguments and errors
    are those of :func:`state_dict_of`; raises EditError naming entries that are no tensors.

    >>> import torch
    >>> from ckpt_surgeon import from_torch
    >>> a, b = from_torch({"a.bias": torch.zeros(2)}), from_torch({"b.bias": torch.ones(3)})
    >>> list(checkpoint_of({**a, **b}))
    ['a.bias', 'b.bias']
    """
    found: Mapping[str, object] = state_dict_of(source, select=select)
    if isinstance(found, Checkpoint):
        return as_whole(found) if allow_part else found
    records = {key: value for key, value in found.items() if isinstance(value, Tensor)}
    if len(records) == len(found):
        return Checkpoint(records, container="memory", versions=versions_of(found))
    from ..tensors.torch_bridge import from_torch

    others = {key: value for key, value in found.items() if key not in records}
    made = {**records, **from_torch(cast("Mapping[str, torch.Tensor]", others))}
    return Checkpoint({key: made[key] for key in found}, container="memory", versions=versions_of(found))
