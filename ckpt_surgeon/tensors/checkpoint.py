"""The checkpoint: an immutable ordered mapping from key to tensor, and what came with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from .. import hooks
from ..errors import NothingMatched
from ..files.paths import FilePath
from ..text import Shown
from .records import Tensor

if TYPE_CHECKING:
    import torch

PEFT_CONFIG = "adapter_config.json"  # the file beside PEFT's adapters, and the name of its text in metadata

Versions = Mapping[str, Mapping[str, object]]  # torch's _metadata: module path -> {"version": 2}


@dataclass(frozen=True, slots=True, repr=False)
class LeftOut(Shown):
    """Something in the file beside the tensors that were selected: its path, what it is, and how big."""

    path: str
    what: str
    tensors: int = 0
    nbytes: int = 0


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Checkpoint(Shown, Mapping[str, Tensor]):
    """An ordered mapping from key to tensor; reading it reads no tensor data.

    ``selected`` is the dotted path of the state_dict inside its file ("" for the whole file), ``metadata`` the
    free text of safetensors, ``versions`` torch's ``_metadata`` (None when the file has none), ``left_out`` what
    else the file holds.  No file is kept open, so ``with open(…) as checkpoint`` only gives it a name.

    >>> Checkpoint({}).nbytes
    0
    """

    tensors: Mapping[str, Tensor]
    path: FilePath | None = None
    container: str = ""
    selected: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    versions: Versions | None = None
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()
    part: str = ""  # what part of a model it is, where it is one (one rank's) and is not allowed as a whole
    root: object = None  # everything that the file holds, as :meth:`value` finds it

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def numel(self) -> int:
        """Elements of all tensors, tied ones counted once."""
        return sum({tensor.tie: tensor.numel for tensor in self.tensors.values()}.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all elements, tied tensors counted once."""
        return sum({tensor.tie: tensor.nbytes for tensor in self.tensors.values()}.values())

    def tensor(self, key: str) -> torch.Tensor:
        """One tensor as torch's, in memory of its own or mapped.  Raises NothingMatched for a key that is not there.

        >>> import ckpt_surgeon, torch
        >>> torch.save({"fc.bias": torch.ones(2)}, "layer.pth")
        >>> ckpt_surgeon.open("layer.pth").tensor("fc.bias")
        tensor([1., 1.])
        """
        if key not in self.tensors:
            raise NothingMatched([key], what="key", examples=self.tensors)
        return self.tensors[key].load()

    def value(self, path: str) -> object:
        """What the file holds at a dotted path beside its weights: ``epoch``, ``args.lr``, ``optimizer.param_groups``.

        Numbers, texts and None come as they are, lists, tuples and dicts of them too; tensors as records, whose
        ``load()`` gives torch's; classes and functions by their names.  An object is an ``Inert`` mapping, and nothing
        is imported for it.  Raises SelectionError where nothing is at the path.

        >>> import argparse, ckpt_surgeon, torch
        >>> args = argparse.Namespace(lr=0.1)
        >>> torch.save({"model": {"fc.bias": torch.ones(2)}, "epoch": 7, "args": args}, "run.pth")
        >>> run = ckpt_surgeon.open("run.pth")
        >>> run.value("epoch"), run.value("args.lr")
        (7, 0.1)
        """
        return hooks.answer("value at")(self, path)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def with_tensors(self, tensors: Mapping[str, Tensor], versions: Versions | None) -> Checkpoint:
        """The same checkpoint with other tensors."""
        return replace(self, tensors=tensors, versions=versions)

    def __repr__(self) -> str:
        where = f"{self.path}" + (f" [{self.selected}]" if self.selected else "")
        return f"<Checkpoint {where}: {len(self):,} tensors, {self.nbytes:,} bytes>"


def versions_of(state_dict: Mapping[str, object]) -> Versions | None:
    """torch's ``_metadata`` of a Checkpoint or a state_dict, None where it has none."""
    if isinstance(state_dict, Checkpoint):
        return state_dict.versions
    return getattr(state_dict, "_metadata", None)
