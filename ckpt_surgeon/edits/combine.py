"""Edits of several tensors that belong together: concat and split.

Their keys are named by templates: ``{n}`` stands for an integer and ``*`` for anything, alike in all templates.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Annotated

from ..errors import EditError, NothingMatched
from ..tensors.checkpoint import Checkpoint
from ..tensors.records import Tensor
from ..tensors.views import interleaved, parts_of
from .change import Change, Inline
from .value_edit import regrouped, value_edit

# -- several tensors that belong together


@value_edit(
    "Join tensors (q, k, v into qkv).",
    "model.pth fused.pth --sources 'l.{n}.q,l.{n}.k,l.{n}.v' --into 'l.{n}.qkv'",
    inline=[Inline("{sources}={into}")],
)
def concat(
    state_dict: Checkpoint,
    sources: Annotated[Sequence[str], "Templates of the keys that are joined, in this order."],
    into: Annotated[str, "The template of the new key."],
    *,
    dim: Annotated[int, "The dimension."] = 0,
    groups: Annotated[int, "Interleave in so many groups (attention heads)."] = 1,
) -> Change[Checkpoint]:
    """Join tensors along one dimension, for every set of keys that the templates name.

    With ``groups`` the result interleaves: first the first of ``groups`` equal parts of every source, then the
    second (per attention head, say); 1 puts the sources one after the other.  Raises NothingMatched, EditError,
    KeyCollision.

    >>> import torch
    >>> state = {"l.0.q": torch.zeros(2), "l.0.k": torch.ones(2)}
    >>> concat(state, ["l.{n}.q", "l.{n}.k"], "l.{n}.qk")
    {'l.0.qk': tensor([0., 0., 1., 1.])}
    """
    problems: list[str] = []
    sets: list[tuple[tuple[str, ...], dict[str, Tensor]]] = []
    for bound, first in _bound(state_dict, sources[0] if sources else ""):
        keys = [first, *(_substituted(template, bound) for template in sources[1:])]
        absent = [key for key in keys if key not in state_dict]
        if absent:
            problems += [f"{key!r}, wanted beside {first!r}, is not there" for key in absent]
            continue
        try:
            joined = interleaved([state_dict[key] for key in keys], keys, dim, groups)
            sets.append((tuple(keys), {_substituted(into, bound): joined}))
        except EditError as error:
            problems += error.problems
    if problems:
        raise EditError(problems)
    return regrouped(state_dict, sets)


@value_edit(
    "Take tensors apart (qkv into q, k, v).",
    "model.pth parts.pth --source 'l.{n}.qkv' --into 'l.{n}.q,l.{n}.k,l.{n}.v'",
    inline=[Inline("{source}={into}")],
)
def split(
    state_dict: Checkpoint,
    source: Annotated[str, "The template of the keys that are taken apart."],
    into: Annotated[Sequence[str], "Templates of the new keys, in this order."],
    *,
    dim: Annotated[int, "The dimension."] = 0,
    sizes: Annotated[Sequence[int], "The sizes of the parts, as 64,64,128; equal without it."] = (),
    groups: Annotated[int, "The parts are interleaved in so many groups (attention heads)."] = 1,
) -> Change[Checkpoint]:
    """Take tensors apart along one dimension, for every key that the template ``source`` names.

    ``sizes`` are the parts' (equal without it); ``groups`` as in :func:`concat`, which this undoes.  Raises
    NothingMatched, EditError, KeyCollision.

    >>> import torch
    >>> split({"l.0.qkv": torch.arange(6)}, "l.{n}.qkv", ["l.{n}.q", "l.{n}.k", "l.{n}.v"], groups=2)["l.0.k"]
    tensor([1, 4])
    """
    problems: list[str] = []
    sets: list[tuple[tuple[str, ...], dict[str, Tensor]]] = []
    for bound, key in _bound(state_dict, source):
        try:
            parts = parts_of(key, state_dict[key], dim, len(into), sizes, groups)
            names = [_substituted(template, bound) for template in into]
            if len(set(names)) < len(names):
                raise EditError([f"{key!r} would be split into parts of one name: {', '.join(names)}"])
            sets.append(((key,), dict(zip(names, parts, strict=True))))
        except EditError as error:
            problems += error.problems
    if problems:
        raise EditError(problems)
    return regrouped(state_dict, sets)


def _bound(keys: Iterable[str], template: str) -> list[tuple[re.Match[str], str]]:
    """The keys that a template names, each with what its placeholders stand for."""
    names: set[str] = set()
    parts = []
    for part in re.split(r"(\{[A-Za-z]\w*\}|\*)", template):
        if part == "*":
            parts.append("(.*)")
        elif part.startswith("{"):
            name = part[1:-1]
            parts.append(f"(?P={name})" if name in names else rf"(?P<{name}>\d+)")
            names.add(name)
        else:
            parts.append(re.escape(part))
    pattern = re.compile("".join(parts))
    keys = list(keys)
    found = [(match, key) for key in keys if (match := pattern.fullmatch(key))]
    if not found:
        raise NothingMatched([template], what="template", examples=keys)
    return found


def _substituted(template: str, bound: re.Match[str]) -> str:
    """A template with what another one's placeholders stood for."""
    named = {bound.start(name) for name in bound.re.groupindex}
    stars = iter([text for index, text in enumerate(bound.groups(), 1) if bound.start(index) not in named])
    problem = EditError([f"{template!r} has placeholders that the first template does not have"])

    def fill(part: re.Match[str]) -> str:
        name = part[0][1:-1]
        if part[0] == "*":
            text = next(stars, None)
            if text is None:
                raise problem
            return text
        if name not in bound.re.groupindex:
            raise problem
        return bound[name]

    return re.sub(r"\{[A-Za-z]\w*\}|\*", fill, template)
