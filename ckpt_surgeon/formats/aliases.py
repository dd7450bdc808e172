"""Alias notes: a key that a safetensors file leaves out, since another key has the same tensor.

``safetensors.torch.save_model`` and ``huggingface_hub.save_torch_state_dict`` write one key of tensors that share
memory, and for each other one an entry of ``__metadata__`` (of shards, of the index's ``metadata``): the name that was
left out → the name that is there.  ``__metadata__`` is free text, so an entry is such a note only where its value is a
key of the file, its name is none, and its name is that of a tensor: it ends as the value does, or has a dot.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace

from ..errors import listed
from ..tensors.records import ExtraState, OpaqueTensor, Tensor
from .contents import Contents

_RESERVED = frozenset({"", "format", "__metadata__"})  # names that mean something else
_SHOWN = 3


def is_alias(name: str, kept: str) -> bool:
    """Whether two names can be those of one tensor, by their spelling.

    >>> is_alias("transformer.wte.weight", "lm_head.weight"), is_alias("author", "bias"), is_alias("format", "pt")
    (True, False, False)
    """
    if name in _RESERVED or name == kept:
        return False
    return "." in name or name.rpartition(".")[2] == kept.rpartition(".")[2]


def aliases_in(keys: Mapping[str, object], metadata: Mapping[str, str]) -> dict[str, str]:
    """The entries of ``metadata`` that are notes on keys, from the key that is not there to the one that is.

    >>> aliases_in({"a.weight": 0}, {"b.weight": "a.weight", "c.weight": "b.weight", "format": "pt"})
    {'b.weight': 'a.weight'}
    """
    return {name: kept for name, kept in metadata.items() if kept in keys and name not in keys and is_alias(name, kept)}


def follow(contents: Contents) -> Contents:
    """Contents with the keys that alias notes stand for, last, in place of the notes.

    The tree's root, which the reader has just made, gets the keys; a note names entries that may be meant so and are
    not taken.
    """
    root = contents.root
    if not isinstance(root, dict) or not contents.metadata:
        return contents
    found = aliases_in(root, contents.metadata)
    open_ones = [
        f"{name} = {kept}"
        for name, kept in contents.metadata.items()
        if kept in root and name not in root and name not in found and name not in _RESERVED
    ]
    notes = contents.notes
    if open_ones:
        notes = (*notes, f"its metadata names tensors, perhaps as other names of them: {listed(open_ones, _SHOWN)}")
    root.update({name: root[kept] for name, kept in found.items()})
    rest = {name: text for name, text in contents.metadata.items() if name not in found}
    return replace(contents, metadata=rest, aliases={**contents.aliases, **found}, notes=notes)


def aliases_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The keys to leave out of a file, each with the one that is kept: the first by name, as safetensors chooses it.

    Only one and the same tensor counts, and names that :func:`is_alias` knows again; what ``metadata`` says already
    stays as it is.
    """
    groups: dict[Hashable, list[str]] = {}
    for key in sorted(tensors):
        tensor = tensors[key]
        if tensor.numel and not isinstance(tensor, (OpaqueTensor, ExtraState)):
            groups.setdefault(tensor.tie, []).append(key)
    return {
        name: kept
        for kept, *others in groups.values()
        for name in others
        if is_alias(name, kept) and name not in metadata
    }
