"""What a reader returns: everything a file holds, before anyone has decided which part of it is the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..remote import Place
from .unpickle import Global, Value


@dataclass(frozen=True, slots=True)
class Contents:
    """The object tree of one checkpoint: dicts, lists and tuples whose leaves are tensors and anything else.

    ``container`` is the name of the format as people say it; ``metadata`` the free text that safetensors keeps.
    ``notes`` are remarks on the file that ``ckpt ls`` passes on; ``globals`` every name that its pickles mention.
    """

    path: Place
    container: str
    root: Value
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    globals: tuple[Global, ...] = ()
