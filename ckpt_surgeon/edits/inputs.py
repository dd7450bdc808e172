"""Several checkpoints in one edit: their names, and the one mapping that they make.

The grammar, in one place: a key of the first checkpoint stands for itself, and ``NAME::KEY`` is KEY of the checkpoint
NAME.  In a recipe the names are those that it gives its inputs; on a command line they are numbers, IN being 1, so
that ``2::fc.*`` are keys of the second file; in Python they are the names or positions of the arguments.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import cast

from ..errors import EditError
from ..tensors.checkpoint import Checkpoint, Versions
from ..tensors.records import Tensor

MARK = "::"
FIRST = "1"  # what the first checkpoint is called beside the numbers of the others


def qualified(name: str, key: str) -> str:
    """A key of another input.

    >>> qualified("donor", "fc.bias")
    'donor::fc.bias'
    """
    return f"{name}{MARK}{key}"


def parted(text: str, names: Iterable[str]) -> tuple[str, str]:
    """The input that a key or pattern is of, and what is left of it; "" is the first input.

    >>> parted("donor::fc.*", ["donor"]), parted("at::fc.*", ["donor"])
    (('donor', 'fc.*'), ('', 'at::fc.*'))
    """
    name, mark, rest = text.partition(MARK)
    return (name, rest) if mark and name in names else ("", text)


def numbered(others: Sequence[Checkpoint]) -> dict[str, Checkpoint]:
    """Other inputs by their positions, the first checkpoint being 1.

    >>> list(numbered([Checkpoint({}), Checkpoint({})]))
    ['2', '3']
    """
    return {str(number): other for number, other in enumerate(others, 2)}


def label(name: str, checkpoint: Checkpoint) -> str:
    """How an input is called in messages: by its file, where it has one."""
    return str(checkpoint.path) if checkpoint.path is not None else f"input {name}"


def union(first: Checkpoint, others: Mapping[str, Checkpoint]) -> Checkpoint:
    """All inputs as one mapping: the first one's keys as they are, others' as ``NAME::KEY``.

    Raises EditError where a key of the first checkpoint looks like one of another input.

    >>> from ckpt_surgeon.tensors.records import OpaqueTensor
    >>> from ckpt_surgeon.tensors.dtypes import parse
    >>> bias = OpaqueTensor("meta", parse("float32"), (2,))
    >>> list(union(Checkpoint({"fc.bias": bias}), {"2": Checkpoint({"fc.bias": bias})}))
    ['fc.bias', '2::fc.bias']
    """
    if mistakable := [key for key in first if parted(key, others)[0]]:
        raise EditError([f"{mistakable[0]!r} looks like a key of another input"], remedy="rename it first")
    tensors: dict[str, Tensor] = dict(first)
    versions: dict[str, Mapping[str, object]] = dict(first.versions or {})
    for name, other in others.items():
        tensors.update((qualified(name, key), tensor) for key, tensor in other.items())
        versions.update((qualified(name, path), version) for path, version in (other.versions or {}).items() if path)
    known = any(one.versions is not None for one in (first, *others.values()))
    part = next((one.part for one in (first, *others.values()) if one.part), "")
    return replace(first, tensors=tensors, versions=versions if known else None, part=part)


def mapped(first: Mapping[str, object], others: Mapping[str, Mapping[str, object]]) -> Mapping[str, object]:
    """What :func:`union` makes, of state_dicts of any kind."""
    if isinstance(first, Checkpoint) and all(isinstance(other, Checkpoint) for other in others.values()):
        return union(first, cast("Mapping[str, Checkpoint]", others))
    more = {qualified(name, key): value for name, other in others.items() for key, value in other.items()}
    return {**first, **more}


def own_versions(versions: Versions | None, names: Iterable[str]) -> Versions | None:
    """The versions of modules without those of other inputs' modules that no key led to a new name."""
    if versions is None:
        return None
    names = list(names)
    return {path: version for path, version in versions.items() if not parted(path, names)[0]}
