"""Checkpoints in several files with a JSON index, and folders that hold one.

The index is that of Hugging Face's hub: ``{"metadata": {…}, "weight_map": {key: file}}``, called
``model.safetensors.index.json`` or ``pytorch_model.bin.index.json``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path, PureWindowsPath
from typing import Protocol

from ..errors import BrokenFile, CheckpointError, NotACheckpoint, listed
from ..files.local import LocalPath
from ..files.paths import FilePath, prefetch_heads
from ..tensors.dtypes import BY_NAME
from ..tensors.extra_state import is_extra_state
from ..tensors.records import OpaqueTensor
from ..tensors.stored import StoredTensor
from ..text import plural
from .aliases import follow
from .contents import Contents
from .pickle.torch_objects import LOST
from .pickle.values import Global, Ordered, Value, spelled
from .shard_names import set_in

SUFFIX = ".index.json"
LIMIT = 1 << 28  # bytes that an index may have
PREFERRED = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")
TENSORS = (StoredTensor, OpaqueTensor)
_CHECKPOINTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".gguf")
_OTHERS = (".npz",)  # of other libraries, beside none of these


class Reader(Protocol):
    """Reads one shard."""

    def __call__(self, path: FilePath, *, salvage: bool = False) -> Contents: ...


def matches(head: bytes) -> bool:
    """Whether a file begins like an index: a JSON object."""
    return head.lstrip()[:1] == b"{"


def find(folder: FilePath) -> FilePath:
    """The index or the one checkpoint file in a folder, or the first shard of a set.

    Raises NotACheckpoint when there is none, or several.
    """
    names = folder.names()
    indexes = [name for name in names if name.endswith(SUFFIX)]
    for preferred in PREFERRED:
        if preferred + SUFFIX in indexes:
            return folder / (preferred + SUFFIX)
        if preferred in names and not indexes:
            return folder / preferred
    files = indexes or [name for name in names if name.endswith(_CHECKPOINTS)]
    files = files or [name for name in names if name.endswith(_OTHERS)]
    if len(files) == 1:
        return folder / files[0]
    if not indexes and (shards := set_in(folder, files)) is not None:
        return shards.first
    if files:
        raise NotACheckpoint(folder, f"is a directory with {len(files)} checkpoints ({listed(files)})", "name one")
    raise NotACheckpoint(folder, "is a directory without a checkpoint", "name the file")


def read(path: FilePath, read_shard: Reader, *, salvage: bool = False) -> Contents:
    """Read an index and the headers of its shards; with ``salvage``, shards may be missing or cut off.

    Raises BrokenFile, naming every shard and key, when index and shards disagree.
    """
    weight_map, metadata = _index(path)
    root = Ordered()
    problems: list[str] = []
    gathered = Gathered(metadata=metadata)
    places = {name: path.parent / name for name in weight_map.values()}
    prefetch_heads(list(places.values()))
    for name, place in places.items():
        if place.is_file():
            gathered.add(name, read_shard(place, salvage=salvage))
        elif not salvage:
            problems.append(f"shard {name!r} is missing")
    shards = gathered.roots
    for key, name in weight_map.items():
        tensor = shards.get(name, {}).get(key)
        if isinstance(tensor, TENSORS) or (is_extra_state(key) and key in shards.get(name, {})):
            root[key] = tensor
        elif salvage:
            root[key] = OpaqueTensor(LOST, BY_NAME["uint8"], ())
        elif name in shards:
            elsewhere = [other for other, held in shards.items() if key in held]
            where = f"it is in {elsewhere[0]!r}" if elsewhere else "no shard has it"
            problems.append(f"tensor {key!r} is not in shard {name!r} ({where})")
    for name, held in shards.items():
        extra = [key for key, value in held.items() if key not in weight_map and isinstance(value, TENSORS)]
        if extra:
            problems.append(f"shard {name!r} has {listed(map(spelled, extra), 3)} that the index does not list")
    if problems:
        remedy = f"fetch the missing files again, or rebuild the index: ckpt index {path.parent} --force"
        raise BrokenFile(path, listed_problems(problems), remedy)
    return gathered.contents(path, root, _strays(path, set(weight_map.values())))


@dataclass(slots=True)
class Gathered:
    """What several shards hold, one after another: their roots by name, and what is known of all together."""

    metadata: Mapping[str, str] = field(default_factory=dict)
    roots: dict[str, Mapping[Value, Value]] = field(default_factory=dict)
    containers: set[str] = field(default_factory=set)
    versions: dict[Value, Value] = field(default_factory=dict)
    names: dict[Global, None] = field(default_factory=dict)
    inside: list[Callable[[], Iterable[Global]]] = field(default_factory=list)

    def add(self, name: str, contents: Contents) -> None:
        """Add one shard."""
        self.containers.add(contents.container)
        self.names.update(dict.fromkeys(contents.globals))
        self.inside.append(contents.globals_inside)
        self.metadata = {**contents.metadata, **contents.aliases, **self.metadata}
        held = contents.root if isinstance(contents.root, dict) else {}
        self.roots[name] = {key: held[key] for key in held if key not in contents.aliases} if contents.aliases else held
        if isinstance(contents.root, Ordered) and isinstance(contents.root.attributes, dict):
            self.versions.update(_versions(contents.root.attributes))

    def contents(self, path: FilePath, root: Ordered, notes: tuple[str, ...]) -> Contents:
        """The contents of all shards, whose tensors are in ``root``."""
        if self.versions:
            root.attributes = {"_metadata": self.versions}
        container = f"{'/'.join(sorted(self.containers))}, {plural(len(self.roots), 'shard')}"
        found = Contents(path, container, root, self.metadata, notes, tuple(self.names), _all_of(self.inside))
        return follow(found)


def _all_of(sources: Sequence[Callable[[], Iterable[Global]]]) -> Callable[[], Iterable[Global]]:
    """The names that several files give, when they are asked for."""
    return lambda: chain.from_iterable(source() for source in sources)


def _strays(path: FilePath, listed_names: set[str]) -> tuple[str, ...]:
    """A note on files that look like shards of this index and are not listed in it."""
    if not path.has_listing:
        return ()
    stem, _, suffix = path.name.removesuffix(SUFFIX).rpartition(".")
    alike = re.compile(rf"{re.escape(stem)}-\d{{5}}-of-\d{{5}}\.{re.escape(suffix)}")
    strays = [name for name in path.parent.names() if alike.fullmatch(name) and name not in listed_names]
    return (f"not listed in the index, not read: {listed(strays)}",) if strays else ()


def listed_problems(problems: list[str], shown: int = 5) -> str:
    """Several problems in one line."""
    more = f"; and {len(problems) - shown:,} more" if len(problems) > shown else ""
    return "; ".join(problems[:shown]) + more


def _versions(attributes: Mapping[Value, Value]) -> Mapping[Value, Value]:
    found = attributes.get("_metadata")
    return found if isinstance(found, dict) else {}


def _index(path: FilePath) -> tuple[dict[str, str], dict[str, str]]:
    """The weight map and the metadata that are text."""
    nbytes = path.size
    if nbytes > LIMIT:
        problem = f"begins like JSON, but no index has {nbytes:,} bytes"
        raise NotACheckpoint(path, problem, "give the checkpoint's index")
    try:
        index = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BrokenFile(path, f"is no JSON ({error})", "fetch it again") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise NotACheckpoint(path, "is a JSON file without a weight_map", "give the checkpoint's index")
    _check_names(path, weight_map.values())
    weight_map = {key: os.path.normpath(name) for key, name in weight_map.items()}
    metadata = index.get("metadata")
    texts = metadata if isinstance(metadata, dict) else {}
    return weight_map, {key: value for key, value in texts.items() if isinstance(value, str)}


def _check_names(path: FilePath, names: Iterable[Value]) -> None:
    """Raise BrokenFile for shards that no index may name, as huggingface_hub's load_torch_model refuses them."""
    suffix = Path(path.name.removesuffix(SUFFIX)).suffix if path.name.endswith(SUFFIX) else ""
    outside: dict[str, None] = {}
    others: dict[str, None] = {}
    for name in dict.fromkeys(name if isinstance(name, str) else type(name) for name in names):
        if not isinstance(name, str):
            outside[f"a {name.__name__}"] = None
        elif not stays_inside(name):
            outside[name] = None
        elif suffix in (*_CHECKPOINTS, *_OTHERS) and not name.endswith(suffix):
            others[name] = None
    if outside:
        raise BrokenFile(path, f"names shards outside its directory ({listed(outside)})", "do not use it")
    if others:
        problem = f"is an index of {suffix} files and names others as its shards ({listed(others)})"
        raise BrokenFile(path, problem, "do not use it, or rebuild the index")


def stays_inside(name: str) -> bool:
    """Whether a relative path leads to no place outside of its folder, on any system.

    Backslashes, drive letters, URLs and what no name of a file has do not.

    >>> [stays_inside(name) for name in ("sub/a.bin", "../a.bin", "C:a.bin", "..\\\\a.bin", "s3://b/a.bin", "a\\0.bin")]
    [True, False, False, False, False, False]
    """
    path = PureWindowsPath(name)
    if not path.parts or path.drive or path.root or ".." in path.parts:
        return False
    return not any(character in "\\:" or not character.isprintable() for character in name)


def shard_name(path: FilePath, index: int, count: int) -> FilePath:
    """The name of one shard (from 1) of an output.

    >>> from ckpt_surgeon.files.paths import file_path
    >>> str(shard_name(file_path("out/model.safetensors"), 2, 5))
    'out/model-00002-of-00005.safetensors'
    """
    return path.with_name(f"{path.stem}-{index:05d}-of-{count:05d}{path.suffix}")


def is_shard_of(path: FilePath, name: str) -> bool:
    """Whether a name is one that :func:`shard_name` gives to a shard of ``path``."""
    return re.fullmatch(rf"{re.escape(path.stem)}-\d{{5}}-of-\d{{5}}{re.escape(path.suffix)}", name) is not None


def index_name(path: FilePath) -> FilePath:
    """The name of the index of an output: ``model.safetensors.index.json``."""
    return path.with_name(path.name + SUFFIX)


def index_over(path: LocalPath) -> LocalPath | None:
    """The index beside a file that lists it as a shard, if there is one."""
    for name in sorted(os.listdir(path.parent)):
        if name.endswith(SUFFIX):
            try:
                listed_files = _index(path.with_name(name))[0].values()
            except (CheckpointError, OSError):
                continue
            if path.name in listed_files:
                return path.with_name(name)
    return None


def index_bytes(weight_map: Mapping[str, str], total: int, aliases: Mapping[str, str] | None = None) -> bytes:
    """An index file's bytes; ``total`` counts the elements' bytes in all shards, ``aliases`` are the notes on keys."""
    index = {"metadata": {"total_size": total, **(aliases or {})}, "weight_map": dict(weight_map)}
    text = json.dumps(index, indent=2, ensure_ascii=False)
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):  # a name that is no text
        text = json.dumps(index, indent=2)
    return f"{text}\n".encode()
