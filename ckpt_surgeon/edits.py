"""Edits of keys: a mapping in, a mapping of the same kind out, values untouched.

Each edit works alike on a :class:`~ckpt_surgeon.checkpoint.Checkpoint` and on a plain state_dict of torch tensors,
renames torch's ``_metadata`` with the keys, and is refused, naming the keys, where it would lose a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from .checkpoint import Checkpoint, Versions
from .errors import KeyCollision, NothingMatched

# What wrappers put in front of the keys of the module that they wrap.
WRAPPERS = (
    "module",  # DataParallel, DistributedDataParallel
    "_orig_mod",  # torch.compile
    "_fsdp_wrapped_module",  # FullyShardedDataParallel
    "_fpw_module",  # the same, before torch 2.0
    "_checkpoint_wrapped_module",  # activation checkpointing
    "_dist_wrapped_module",  # DDP inside accelerate and others
)

StateDict = TypeVar("StateDict", bound=Mapping)  # type: ignore[type-arg]


@dataclass(frozen=True, slots=True)
class Renaming:
    """What an edit would do, before it is done: old key to new key, and the keys that go."""

    renamed: Mapping[str, str]
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def changed(self) -> int:
        """How many keys get another name."""
        return sum(old != new for old, new in self.renamed.items())


def strip_prefix(
    state_dict: StateDict,
    prefix: str | Iterable[str] = "module.",
    *,
    wrappers: bool = False,
    allow_unmatched: bool = False,
) -> StateDict:
    """Take prefixes off the keys, as often as they repeat; keys without them stay as they are.

    ``prefix`` is one or several prefixes of whole path components (``module.`` never touches ``submodule.``);
    ``wrappers=True`` instead takes every component of :data:`WRAPPERS` out, wherever it stands in a key.  Raises
    NothingMatched for a prefix that no key carries, unless ``allow_unmatched``, and KeyCollision when two keys
    would become one.

    >>> strip_prefix({"module.conv.weight": 1, "module.module.bn.bias": 2, "fc.bias": 3})
    {'conv.weight': 1, 'bn.bias': 2, 'fc.bias': 3}
    >>> strip_prefix({"net._orig_mod.module.fc.weight": 1}, wrappers=True)
    {'net.fc.weight': 1}
    """
    return apply(state_dict, plan_strip_prefix(state_dict, prefix, wrappers=wrappers, allow_unmatched=allow_unmatched))


def plan_strip_prefix(
    keys: Iterable[str],
    prefix: str | Iterable[str] = "module.",
    *,
    wrappers: bool = False,
    allow_unmatched: bool = False,
) -> Renaming:
    """What :func:`strip_prefix` would do."""
    keys = list(keys)
    if wrappers:
        new = {key: without_wrappers(key) for key in keys}
        if not allow_unmatched and all(old == name for old, name in new.items()):
            raise NothingMatched([", ".join(WRAPPERS)], what="wrapper", examples=keys)
        return checked(new)
    prefixes = [one.removesuffix(".") + "." for one in ([prefix] if isinstance(prefix, str) else prefix)]
    used: set[str] = set()
    new = {key: _without_prefixes(key, prefixes, used) for key in keys}
    unused = [one for one in prefixes if one not in used]
    if unused and not allow_unmatched:
        raise NothingMatched(unused, what="prefix", examples=keys)
    plain = sum(old == name for old, name in new.items())
    note = f"{plain:,} of {len(keys):,} keys had no prefix and stay as they are"
    return checked(new, notes=[note] if plain else [])


def _without_prefixes(key: str, prefixes: list[str], used: set[str]) -> str:
    stripped = True
    while stripped:
        stripped = False
        for prefix in prefixes:
            if key.startswith(prefix) and len(key) > len(prefix):
                key = key[len(prefix) :]
                used.add(prefix)
                stripped = True
    return key


def without_wrappers(key: str) -> str:
    """A key without the components that wrappers put in; a leaf is never taken for a wrapper.

    >>> without_wrappers("module._orig_mod.layers.0._fsdp_wrapped_module.weight")
    'layers.0.weight'
    """
    *path, leaf = key.split(".")
    return ".".join([*(part for part in path if part not in WRAPPERS), leaf])


def add_prefix(state_dict: StateDict, prefix: str) -> StateDict:
    """Put a prefix, whole path components, in front of every key.

    >>> add_prefix({"conv.weight": 1}, "backbone.")
    {'backbone.conv.weight': 1}
    """
    return apply(state_dict, plan_add_prefix(state_dict, prefix))


def plan_add_prefix(keys: Iterable[str], prefix: str) -> Renaming:
    """What :func:`add_prefix` would do."""
    whole = prefix.removesuffix(".") + "."
    return checked({key: whole + key for key in keys})


def checked(renamed: Mapping[str, str], *, dropped: Iterable[str] = (), notes: Iterable[str] = ()) -> Renaming:
    """A renaming in which no two keys become one.  Raises KeyCollision naming all that would."""
    origins: dict[str, list[str]] = {}
    for old, new in renamed.items():
        origins.setdefault(new, []).append(old)
    collisions = {new: olds for new, olds in origins.items() if len(olds) > 1}
    if collisions:
        raise KeyCollision(collisions)
    return Renaming(renamed, tuple(dropped), tuple(notes))


def apply(state_dict: StateDict, renaming: Renaming) -> StateDict:
    """Carry out a planned renaming; the result is of the same kind and has its ``_metadata`` renamed too."""
    tensors = {new: state_dict[old] for old, new in renaming.renamed.items()}
    versions = versions_of(state_dict)
    renamed_versions = None if versions is None else rename_versions(versions, renaming.renamed)
    return rebuilt(state_dict, tensors, renamed_versions)


def versions_of(state_dict: Mapping[str, object]) -> Versions | None:
    """torch's ``_metadata`` of a Checkpoint or a state_dict, None where it has none."""
    if isinstance(state_dict, Checkpoint):
        return state_dict.versions
    return getattr(state_dict, "_metadata", None)


def rebuilt(like: StateDict, tensors: Mapping[str, object], versions: Versions | None) -> StateDict:
    """A mapping of the same kind as ``like`` with these tensors and versions."""
    if isinstance(like, Checkpoint):
        return like.with_tensors(tensors, versions)  # type: ignore[arg-type,return-value]
    made = type(like)(tensors)  # type: ignore[call-arg]
    if versions is not None:
        made._metadata = type(like._metadata)(versions)  # type: ignore[attr-defined]
    return made


def rename_versions(versions: Versions, renamed: Mapping[str, str]) -> Versions:
    """Rename module paths as their keys were renamed.

    ``m`` becomes ``n`` when keys ``m.x`` became ``n.x``; a module without keys of its own follows its nearest
    parent that has a new name, and goes where none has.  Where a wrapper's path and the wrapped module's become
    one, the wrapped module's version stays.
    """
    moved: dict[str, str] = {}
    for old, new in renamed.items():
        for path, target in _moved_paths(old, new):
            if moved.setdefault(path, target) == path != target:
                moved[path] = target
    kept: dict[str, Mapping[str, object]] = {}
    for path, version in versions.items():
        new_path = _new_path(path, moved)
        if new_path is not None:
            kept[new_path] = version
    return kept


def _moved_paths(old: str, new: str) -> Iterator[tuple[str, str]]:
    """Pairs of module paths that a renamed key tells: as long as the components behind them are the same."""
    olds, news = old.split("."), new.split(".")
    while olds and news and olds[-1] == news[-1]:
        olds.pop()
        news.pop()
        yield ".".join(olds), ".".join(news)


def _new_path(path: str, moved: Mapping[str, str]) -> str | None:
    if path in moved:
        return moved[path]
    parent, rest = path, ""
    while parent:
        parent, _, last = parent.rpartition(".")
        rest = f".{last}{rest}"
        if parent in moved:
            target = moved[parent] + rest
            return target.removeprefix(".")
    return None
