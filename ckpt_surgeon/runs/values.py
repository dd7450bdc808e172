"""Single values in a training checkpoint: the epoch, a learning rate, an argument; found by path, checked by type."""

from __future__ import annotations

import struct
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

from ..errors import EditError, NothingMatched
from ..formats.pickle.graph import CallNode
from ..formats.pickle.values import Value
from ..formats.zip.whole import tensor_node
from ..tensors.records import Tensor
from ..tensors.storage import Storage
from ..tensors.stored import StoredTensor
from .run import Run
from .state import PACKED, TreePath, named_children

SCALARS = (bool, int, float, str, type(None))
DEPTH = 12


def scalars(run: Run) -> Iterator[tuple[TreePath, Value]]:
    """Every number, string, flag, None and tensor of one element in a file, with its path."""
    seen: set[int] = set()
    ahead: list[tuple[TreePath, Value]] = [((), run.whole.root)]
    while ahead:
        path, node = ahead.pop()
        if isinstance(node, SCALARS) or _single(run, node) is not None:
            yield path, node
        elif id(node) not in seen and len(path) < DEPTH:
            seen.add(id(node))
            ahead.extend(reversed([((*path, name), child) for name, child in named_children(node)]))


def _single(run: Run, node: Value) -> Tensor | None:
    """A tensor of one element, None for anything else."""
    tensor = run.whole.tensor(node) if isinstance(node, CallNode) else None
    return tensor if tensor is not None and tensor.numel == 1 and tensor.dtype.name in PACKED else None


def with_values(run: Run, values: Mapping[str, object] | Iterable[str]) -> Run:
    """A run with other values at dotted paths (``*`` stands for one component), each of the type that was there.

    ``values`` maps paths to values, or holds ``PATH=VALUE`` texts whose values are spelled as in TOML (``0``, ``1e-4``,
    ``true``, ``"text"``; a bare word is a string, ``none`` is None).  An integer is taken where a float was.  Raises
    NothingMatched for a path that leads nowhere and EditError for another type.

    >>> import ckpt_surgeon, torch
    >>> torch.save({"model": {"fc.bias": torch.zeros(2)}, "epoch": 3}, "last.ckpt")
    >>> from ckpt_surgeon.runs.opening import open_run_file
    >>> with_values(open_run_file("last.ckpt"), ["epoch=0"]).values
    {('epoch',): 0}
    """
    wanted = dict(values) if isinstance(values, Mapping) else dict(map(_parsed, values))
    there = list(scalars(run))
    made: dict[TreePath, Value] = {}
    problems: list[str] = []
    for pattern, value in wanted.items():
        hits = [(path, node) for path, node in there if _fits(path, pattern)]
        if not hits:
            raise NothingMatched([pattern], what="path", examples=[".".join(path) for path, _ in there])
        for path, node in hits:
            try:
                made[path] = _of_type(run, node, value)
            except ValueError as error:
                problems.append(f"{'.'.join(path)} {error}")
    if problems:
        raise EditError(problems)
    return replace(run, values={**run.values, **made})


def _parsed(text: str) -> tuple[str, object]:
    path, sign, spelled = text.partition("=")
    if not sign or not path:
        raise EditError([f"{text!r} is not PATH=VALUE"])
    if spelled.lower() in ("none", "null"):
        return path, None
    try:
        return path, tomllib.loads(f"value = {spelled}")["value"]
    except (ValueError, RecursionError):  # no TOML, a number of too many digits, brackets that are nested too deeply
        return path, spelled


def _fits(path: TreePath, pattern: str) -> bool:
    """Whether a path fits a pattern; names may have dots themselves, so that the whole text is compared too."""
    parts = pattern.split(".")
    if len(parts) == len(path) and all(map(fnmatchcase, path, parts)):
        return True
    text = ".".join(path)
    return text == pattern or (any("." in name for name in path) and fnmatchcase(text, pattern))


def _of_type(run: Run, node: Value, value: object) -> Value:
    """The value as what was there.  Raises ValueError where the types differ."""
    tensor = _single(run, node)
    if tensor is not None:
        return _tensor(tensor, node, value)
    if node is None or value is None:
        if node is None or value is node:
            return value
        raise ValueError(f"is {_type_and_value(node)}, which None is not")
    if isinstance(node, float) and type(value) in (int, float):
        return float(value)  # type: ignore[arg-type]
    if type(node) is not type(value):
        raise ValueError(f"is {_type_and_value(node)}, and {value!r} is not of that type")
    return value


def _tensor(tensor: Tensor, node: Value, value: object) -> Value:
    if type(value) not in (int, float):
        raise ValueError(f"is a tensor of one element, and {value!r} is no number")
    if tensor.dtype.name.startswith("int") and type(value) is float:
        raise ValueError(f"is a tensor of {tensor.dtype}, and {value!r} is no integer")
    raw = struct.pack(PACKED[tensor.dtype.name], value)
    storage = Storage(None, len(raw), memory=memoryview(raw))
    made = StoredTensor(tensor.dtype, tensor.shape, (1,) * len(tensor.shape), 0, storage)
    return tensor_node(made, node, device=tensor.device)


def _type_and_value(node: Value) -> str:
    return f"{type(node).__name__} {node!r}"
