"""What a reader returns: everything a file holds, before anyone has decided which part of it is the model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..files.journal import Patch
from ..files.paths import FilePath
from .pickle.values import Global, Value


@dataclass(frozen=True, slots=True)
class Contents:
    """The object tree of one checkpoint: dicts, lists and tuples whose leaves are tensors and anything else.

    ``container`` is the name of the format as people say it; ``metadata`` the free text that safetensors keeps.
    ``notes`` are remarks on the file that ``ckpt ls`` passes on; ``globals`` every name that its pickles mention.
    ``globals_inside`` reads the pickles that listing has no need of, and gives the names in those.  ``aliases`` are
    keys that the file does not have itself, each with the key whose tensor it is (see :mod:`.aliases`).
    """

    path: FilePath
    container: str
    root: Value
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    globals: tuple[Global, ...] = ()
    globals_inside: Callable[[], Iterable[Global]] = tuple
    aliases: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reindexed:
    """A new index in the room of the old one: the bytes to change, what the file holds then, the bytes to spare."""

    patches: tuple[Patch, ...]
    contents: Contents
    spare: int


class Index(Protocol):
    """A file's index as it can be rewritten where it lies: the names in it, each in its places, and the rest."""

    contents: Contents

    def places(self, node: Value, name: str) -> Sequence[Hashable]:
        """Where the index says one key of one of its dicts; nowhere, where it says it in an odd way."""
        ...

    def rewritten(self, texts: Mapping[Hashable, str]) -> Reindexed:
        """The index with these names in these places.  Raises NoRoom when it is longer then."""
        ...
