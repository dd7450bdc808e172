"""Edits of keys: a mapping in, a mapping of the same kind out, values untouched.

Each edit works alike on a :class:`~ckpt_surgeon.checkpoint.Checkpoint` and on a plain state_dict of torch tensors,
renames torch's ``_metadata`` with the keys, and is refused, naming the keys, where it would lose a tensor.  Calling
an edit does it; its ``plan``, with the same arguments, says what it does.  Its name and arguments are also those of
the recipe step and of the command.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import translate
from functools import update_wrapper
from itertools import takewhile
from typing import Concatenate, Generic, ParamSpec, TypeVar, cast

from ..errors import EditError, KeyCollision, NothingMatched
from ..tensors.checkpoint import Checkpoint, Versions
from .rename import Rules, parse_pairs

# What wrappers put in front of the keys of the module that they wrap.
WRAPPERS = (
    "module",  # DataParallel, DistributedDataParallel
    "_orig_mod",  # torch.compile
    "_fsdp_wrapped_module",  # FullyShardedDataParallel
    "_fpw_module",  # the same, before torch 2.0
    "_checkpoint_wrapped_module",  # activation checkpointing
    "_dist_wrapped_module",  # DDP inside accelerate and others
)

# Buffers that a model makes by itself and that come and go between versions: the last component of their keys.
DERIVABLE = (
    "num_batches_tracked",  # BatchNorm, since torch 0.4.1
    "position_ids",  # BERT and its kin, until transformers 4.31
    "relative_position_index",  # Swin
    "relative_coords_table",  # Swin v2
    "attn_mask",  # Swin
    "inv_freq",  # rotary embeddings
    "masked_bias",  # GPT-2
    "total_ops",  # thop
    "total_params",
)

StateDict = TypeVar("StateDict", bound=Mapping)  # type: ignore[type-arg]
Arguments = ParamSpec("Arguments")
Patterns = str | Iterable[str]


@dataclass(frozen=True, slots=True)
class Change(Generic[StateDict]):
    """What an edit does: the result, the old keys behind each new one, and what is worth saying.

    ``origins`` maps each new key to the old keys that it is made of.
    """

    before: StateDict
    result: StateDict
    origins: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()

    @property
    def dropped(self) -> tuple[str, ...]:
        """Old keys that are in no new one."""
        used = {old for olds in self.origins.values() for old in olds}
        return tuple(old for old in self.before if old not in used)

    @property
    def edited(self) -> int:
        """How many tensors are not the ones that they were made of."""
        return sum(len(olds) != 1 or self.result[new] is not self.before[olds[0]] for new, olds in self.origins.items())

    @property
    def renamed(self) -> int:
        """How many keys have another name."""
        return sum(len(olds) == 1 and olds != (new,) for new, olds in self.origins.items())


class Edit(Generic[Arguments]):
    """A function that edits a state_dict; ``plan`` takes the same arguments and returns the :class:`Change`."""

    def __init__(self, function: Callable[Concatenate[StateDict, Arguments], Change[StateDict]]) -> None:
        self._function = function
        self.__name__ = function.__name__
        update_wrapper(cast(Callable[..., object], self), function)

    def __call__(self, state_dict: StateDict, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> StateDict:
        return self.plan(state_dict, *args, **kwargs).result

    def plan(self, state_dict: StateDict, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Change[StateDict]:
        """What the edit would do, with the same arguments."""
        function = cast(Callable[..., Change[StateDict]], self._function)
        return function(state_dict, *args, **kwargs)


EDITS: dict[str, Edit[...]] = {}  # every edit by its name, as recipes and the command line find them


def edit(function: Callable[Concatenate[StateDict, Arguments], Change[StateDict]]) -> Edit[Arguments]:
    """Make a planning function an :class:`Edit` and give it a place in :data:`EDITS`."""
    made: Edit[Arguments] = Edit(function)
    EDITS[function.__name__.removesuffix("_")] = made
    return made


# -- the edits


@edit
def strip_prefix(
    state_dict: StateDict,
    prefix: Patterns = "module.",
    *,
    wrappers: bool = False,
    allow_unmatched: bool = False,
    on_collision: str = "error",
) -> Change[StateDict]:
    """Take prefixes off the keys, as often as they repeat; keys without them stay as they are.

    ``prefix`` is one or several prefixes of whole path components (``module.`` never touches ``submodule.``);
    ``wrappers=True`` instead takes every component of :data:`WRAPPERS` out, wherever it stands in a key.  Raises
    NothingMatched for a prefix that no key carries, unless ``allow_unmatched``, and KeyCollision when two keys
    would become one, unless ``on_collision`` is "first" or "last" (that one stays).

    >>> strip_prefix({"module.conv.weight": 1, "module.module.bn.bias": 2, "fc.bias": 3})
    {'conv.weight': 1, 'bn.bias': 2, 'fc.bias': 3}
    >>> strip_prefix({"net._orig_mod.module.fc.weight": 1}, wrappers=True)
    {'net.fc.weight': 1}
    """
    if wrappers:
        new = {key: without_wrappers(key) for key in state_dict}
        if not allow_unmatched and all(old == name for old, name in new.items()):
            raise NothingMatched([", ".join(WRAPPERS)], what="wrapper", examples=state_dict)
        return rekeyed(state_dict, new, on_collision=on_collision)
    prefixes = [one.removesuffix(".") + "." for one in listed_patterns(prefix)]
    used: set[str] = set()
    new = {key: _without_prefixes(key, prefixes, used) for key in state_dict}
    unused = [one for one in prefixes if one not in used]
    if unused and not allow_unmatched:
        raise NothingMatched(unused, what="prefix", examples=state_dict)
    plain = sum(old == name for old, name in new.items())
    note = f"{plain:,} of {len(state_dict):,} keys had no prefix and stay as they are"
    return rekeyed(state_dict, new, on_collision=on_collision, notes=[note] if plain else [])


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


@edit
def add_prefix(state_dict: StateDict, prefix: str) -> Change[StateDict]:
    """Put a prefix, whole path components, in front of every key.

    >>> add_prefix({"conv.weight": 1}, "backbone.")
    {'backbone.conv.weight': 1}
    """
    whole = prefix.removesuffix(".") + "."
    if whole == ".":
        raise EditError([f"{prefix!r} is no prefix to add"])
    return rekeyed(state_dict, {key: whole + key for key in state_dict})


@edit
def rename(
    state_dict: StateDict,
    pairs: Mapping[str, str] | Iterable[str] | Iterable[tuple[str, str]],
    *,
    regex: bool = False,
    allow_unmatched: bool = False,
    on_collision: str = "error",
) -> Change[StateDict]:
    """Rename keys by pairs of old and new: a mapping, ``(old, new)`` tuples, or strings ``OLD=NEW``.

    An old name is a whole key or whole path components anywhere in keys; ``^`` binds it to the beginning, ``$`` to
    the end.  ``{n}`` stands for an integer component, and the new name may compute with it.  With ``regex`` the
    old names are regular expressions that match whole keys (a string is parted at its last ``=``), the new ones
    have their groups (``\\1``, ``\\g<name>``) and compute with named groups (``{n+1}``).  Every key is renamed once:
    by all pairs that fit different parts of it, or by the first regular expression.  Raises NothingMatched for a pair
    that no key answers to, KeyCollision when two keys would become one, EditError for a pair that is not well formed.

    >>> rename({"layers.0.gamma": 1, "layers.1.gamma": 2}, ["layers.{n}=blocks.{n+1}", "gamma=weight"])
    {'blocks.1.weight': 1, 'blocks.2.weight': 2}
    >>> rename({"fc.weight": 1}, {r"(.*)\\.weight": r"\\1.kernel"}, regex=True)
    {'fc.kernel': 1}
    """
    rules = Rules(parse_pairs(pairs, regex=regex), regex=regex)
    new = rules.new_names(state_dict)
    if rules.unused and not allow_unmatched:
        raise NothingMatched(rules.unused, what="rename", examples=state_dict)
    return rekeyed(state_dict, new, on_collision=on_collision)


@edit
def keep(state_dict: StateDict, patterns: Patterns, *, allow_unmatched: bool = False) -> Change[StateDict]:
    """Keep the keys that match one of the globs (``*``, ``?``, ``[…]``, on whole keys), drop all others.

    Raises NothingMatched for a pattern without a key.

    >>> keep({"conv.weight": 1, "fc.weight": 2, "fc.bias": 3}, "fc.*")
    {'fc.weight': 2, 'fc.bias': 3}
    """
    matched = matching(state_dict, patterns, allow_unmatched=allow_unmatched)
    return rekeyed(state_dict, {key: key for key in state_dict if key in matched})


@edit
def drop(
    state_dict: StateDict, patterns: Patterns = (), *, derivable: bool = False, allow_unmatched: bool = False
) -> Change[StateDict]:
    """Drop the keys that match one of the globs, and with ``derivable`` the buffers that models make themselves.

    The derivable buffers are :data:`DERIVABLE`.  Raises NothingMatched for a pattern without a key.

    >>> drop({"conv.weight": 1, "bn.num_batches_tracked": 2, "fc.bias": 3}, "fc.*", derivable=True)
    {'conv.weight': 1}
    """
    matched = matching(state_dict, patterns, allow_unmatched=allow_unmatched)
    if derivable:
        found = {key for key in state_dict if is_derivable(key)}
        if not found and not allow_unmatched:
            raise NothingMatched([", ".join(DERIVABLE)], what="derivable buffer", examples=state_dict)
        matched |= found
    elif not listed_patterns(patterns):
        raise EditError(["drop needs patterns, or derivable"])
    return rekeyed(state_dict, {key: key for key in state_dict if key not in matched})


def is_derivable(key: str) -> bool:
    """Whether a key is that of a buffer that models make themselves.

    >>> is_derivable("layer1.0.bn1.num_batches_tracked"), is_derivable("fc.bias")
    (True, False)
    """
    return key.rpartition(".")[2] in DERIVABLE


@edit
def select(state_dict: StateDict, prefix: str) -> Change[StateDict]:
    """Take one sub-tree: the keys below ``prefix``, without it; the others are left out and counted.

    >>> select({"encoder_q.conv.weight": 1, "encoder_k.conv.weight": 2, "queue": 3}, "encoder_q.")
    {'conv.weight': 1}
    """
    whole = prefix.removesuffix(".") + "."
    new = {key: key[len(whole) :] for key in state_dict if key.startswith(whole) and len(key) > len(whole)}
    if not new:
        raise NothingMatched([whole], what="prefix", examples=state_dict)
    others = len(state_dict) - len(new)
    return rekeyed(state_dict, new, notes=[f"{others:,} keys outside {whole!r} left out"] if others else [])


# -- what they are made of


def listed_patterns(patterns: Patterns) -> list[str]:
    """One pattern or several, as a list."""
    return [patterns] if isinstance(patterns, str) else list(patterns)


def matching(keys: Iterable[str], patterns: Patterns, *, allow_unmatched: bool = False) -> set[str]:
    """The keys that match one of the globs.  Raises NothingMatched for each glob without a key.

    >>> sorted(matching(["fc.weight", "fc.bias", "conv.bias"], ["fc.*", "*.bias"]))
    ['conv.bias', 'fc.bias', 'fc.weight']
    """
    keys = list(keys)
    found: set[str] = set()
    unmatched = []
    for pattern in listed_patterns(patterns):
        fits = re.compile(translate(pattern)).match
        hits = [key for key in keys if fits(key)]
        found.update(hits)
        if not hits:
            unmatched.append(pattern)
    if unmatched and not allow_unmatched:
        raise NothingMatched(unmatched, examples=keys)
    return found


def rekeyed(
    state_dict: StateDict,
    new_names: Mapping[str, str],
    *,
    on_collision: str = "error",
    notes: Iterable[str] = (),
) -> Change[StateDict]:
    """The change that gives each old key its new name and leaves out those without one.

    Raises KeyCollision naming all keys that would become one, unless ``on_collision`` says which stays.
    """
    if on_collision not in ("error", "first", "last"):
        raise EditError([f"on_collision is error, first or last, not {on_collision!r}"])
    origins: dict[str, list[str]] = {}
    for old, new in new_names.items():
        origins.setdefault(new, []).append(old)
    collisions = {new: olds for new, olds in origins.items() if len(olds) > 1}
    if collisions and on_collision == "error":
        raise KeyCollision(collisions)
    kept = {new: olds[0 if on_collision == "first" else -1] for new, olds in origins.items()}
    said = [*notes, *([f"{len(collisions):,} collisions: the {on_collision} key stays"] if collisions else [])]
    tensors = {new: state_dict[old] for new, old in kept.items()}
    versions = versions_of(state_dict)
    moved = None if versions is None else rename_versions(versions, {old: new for new, old in kept.items()})
    result = rebuilt(state_dict, tensors, moved)
    return Change(state_dict, result, {new: (old,) for new, old in kept.items()}, tuple(said))


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
    one, the wrapped module's version stays.  The root stays where no key tells otherwise.
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
    if "" in versions and "" not in moved and "" not in kept:
        return {"": versions[""], **kept}
    return kept


def _moved_paths(old: str, new: str) -> Iterator[tuple[str, str]]:
    """Pairs of module paths that a renamed key tells: as long as the components behind them are the same.

    What both names begin with stays where it is.  The leaf itself may be renamed (gamma to weight): it names no
    module.
    """
    olds, news = old.split(".")[:-1], new.split(".")[:-1]
    shared = list(takewhile(lambda parts: parts[0] == parts[1], zip(olds, news, strict=False)))
    if old != new and shared:
        for depth in range(len(shared) + 1):
            yield ".".join(olds[:depth]), ".".join(olds[:depth])
    yield ".".join(olds), ".".join(news)
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
