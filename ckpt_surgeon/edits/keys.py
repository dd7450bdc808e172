"""Edits of keys: a mapping in, a mapping of the same kind out, values untouched.

Each edit works alike on a :class:`~ckpt_surgeon.tensors.checkpoint.Checkpoint` and on a plain state_dict of torch
tensors, renames torch's ``_metadata`` with the keys, and is refused, naming the keys, where it would lose a tensor.
Calling an edit does it; its ``plan``, with the same arguments, says what it does.  Its name and arguments are also
those of the recipe step and of the command.
"""

from __future__ import annotations

from typing import Annotated

from ..errors import EditError, NothingMatched
from ..key_patterns import WRAPPERS
from .arguments import Pairs, Patterns
from .change import AllowUnmatched, Change, Inline, OnCollision, StateDict, edit, listed_patterns, matching, rekeyed
from .rename import Rules, parse_pairs

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

# -- the edits


@edit(
    "Take module. and other prefixes off the keys.",
    "parallel.pth clean.pth",
    "compiled.pth clean.safetensors --wrappers",
    "--in-place training.ckpt",
    only_renames=True,
    inline=[
        Inline("{prefix}", help="Take a prefix off the keys."),
        Inline("", "strip-wrappers", (("wrappers", True),), "Peel every known wrapper."),
    ],
)
def strip_prefix(
    state_dict: StateDict,
    prefix: Annotated[Patterns, "A prefix of whole path components."] = "module.",
    *,
    wrappers: Annotated[bool, "Peel every known wrapper (module, _orig_mod …), anywhere in the keys."] = False,
    allow_unmatched: AllowUnmatched = False,
    on_collision: OnCollision = "error",
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


@edit("Put a prefix in front of the keys.", "backbone.pth wrapped.pth --prefix model.", only_renames=True)
def add_prefix(
    state_dict: StateDict, prefix: Annotated[str, "The prefix, whole path components."]
) -> Change[StateDict]:
    """Put a prefix, whole path components, in front of every key.

    >>> add_prefix({"conv.weight": 1}, "backbone.")
    {'backbone.conv.weight': 1}
    """
    whole = prefix.removesuffix(".") + "."
    if whole == ".":
        raise EditError([f"{prefix!r} is no prefix to add"])
    return rekeyed(state_dict, {key: whole + key for key in state_dict})


@edit(
    "Rename keys by components, indices, patterns.",
    "old.pth new.pth 'layers.{n}=blocks.{n+1}' 'gamma$=weight'",
    r"old.pth new.pth --regex '(.*)\.attn\.(\w+)=\1.attention.\2'",
    only_renames=True,
    inline=[
        Inline("{pairs}", help="Rename components."),
        Inline("{pairs}", "rename-regex", (("regex", True),), "Rename by a regular expression."),
    ],
)
def rename(
    state_dict: StateDict,
    pairs: Annotated[Pairs, "Old and new names."],
    *,
    regex: Annotated[bool, "OLD is a regular expression for whole keys, NEW may have its groups."] = False,
    allow_unmatched: AllowUnmatched = False,
    on_collision: OnCollision = "error",
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


@edit("Keep some keys only.", "model.pth backbone.pth 'layer*.*' 'conv1.*'")
def keep(
    state_dict: StateDict, patterns: Annotated[Patterns, "Globs on keys."], *, allow_unmatched: AllowUnmatched = False
) -> Change[StateDict]:
    """Keep the keys that match one of the globs (``*``, ``?``, ``[…]``, on whole keys), drop all others.

    Raises NothingMatched for a pattern without a key.

    >>> keep({"conv.weight": 1, "fc.weight": 2, "fc.bias": 3}, "fc.*")
    {'fc.weight': 2, 'fc.bias': 3}
    """
    matched = matching(state_dict, patterns, allow_unmatched=allow_unmatched)
    return rekeyed(state_dict, {key: key for key in state_dict if key in matched})


@edit(
    "Drop some keys.",
    "model.pth headless.pth 'fc.*' --derivable",
    inline=[
        Inline("{patterns}"),
        Inline("", "drop-derivable", (("derivable", True),), "Drop the buffers that models make themselves."),
    ],
)
def drop(
    state_dict: StateDict,
    patterns: Annotated[Patterns, "Globs on keys."] = (),
    *,
    derivable: Annotated[bool, "Also drop the buffers that models make themselves (num_batches_tracked …)."] = False,
    allow_unmatched: AllowUnmatched = False,
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


@edit(
    "Take one sub-tree, its prefix stripped.",
    "moco.pth encoder.pth --prefix encoder_q.",
    inline=[Inline("{prefix}", "select-prefix")],
)
def select(
    state_dict: StateDict, prefix: Annotated[str, "Where the sub-tree begins, whole path components."]
) -> Change[StateDict]:
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
