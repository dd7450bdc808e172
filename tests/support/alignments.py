"""Models as shapes, renames of them, and what is asked of every alignment: for the tests of evidence."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from ckpt_surgeon.edits.recipe import Recipe
from ckpt_surgeon.models.align import Alignment, align
from ckpt_surgeon.models.align_recipe import alignment_recipe
from ckpt_surgeon.models.targets import Expected, expected
from ckpt_surgeon.tensors.dtypes import parse

Shapes = dict[str, Expected]


CERTAINTIES = {"certain", "likely", "other shape"}


def shapes(**found: tuple[int, ...]) -> Shapes:
    """Keys by keyword, ``__`` for the dot."""
    return of({key.replace("__", "."): shape for key, shape in found.items()})


def of(found: Mapping[str, tuple[int, ...]]) -> Shapes:
    return {key: Expected(parse("float32"), shape, True) for key, shape in found.items()}


def on_meta(make: Callable[[], nn.Module]) -> Shapes:
    with torch.device("meta"):
        return expected(make())


def renamed(entries: Mapping[str, Expected], rename: Callable[[str], str]) -> tuple[Shapes, dict[str, str]]:
    """The entries under other names, and each new name's old one."""
    return {rename(key): entry for key, entry in entries.items()}, {rename(key): key for key in entries}


def replaced(*pairs: tuple[str, str]) -> Callable[[str], str]:
    def rename(key: str) -> str:
        for old, new in pairs:
            key = re.sub(old, new, key)
        return key

    return rename


def rules(recipe: Recipe) -> list[object]:
    found = [one.arguments.get("pairs", [""]) for one in recipe.steps]
    return [pair for pairs in found if isinstance(pairs, list) for pair in pairs]


def checked(found: Alignment, source: Iterable[str], target: Iterable[str]) -> Alignment:
    """An alignment whose recipe does exactly what it says, and in which every key has one place."""
    recipe = alignment_recipe(found, source)
    keys = Recipe(tuple(one for one in recipe.steps if one.name != "reshape"))
    made = {olds[0]: new for new, olds in keys.plan(dict.fromkeys(source)).origins.items()}
    assert {old: made.get(old) for old in found.pairs} == found.pairs
    assert {old: new for old, new in made.items() if new in set(target)} == found.pairs
    open_keys = [key for one in found.ambiguous for key in one.olds]
    assert sorted([*found.pairs, *found.unused]) == sorted(source) or set(open_keys) - set(found.unused)
    assert {*found.pairs, *found.unused, *open_keys} == set(source)
    assert not set(found.pairs) & set(open_keys)
    assert all(one.reason and one.certainty in CERTAINTIES for one in found.proposals)
    assert all(one.reason and one.olds and one.news for one in found.ambiguous)
    return found


def aligned(source: Mapping[str, Expected], target: Mapping[str, Expected]) -> Alignment:
    return checked(align(source, target), source, target)


Tree = dict[str, "Tree | tuple[int, ...]"]


NAMES = ("conv", "fc", "proj", "norm", "attn", "mlp", "stem", "down", "head", "q", "k", "v")


FRESH = ("alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel")


def leaf(draw: random.Random) -> Tree:
    rows, columns = draw.choices((4, 4, 4, 8, 16), k=2)
    norm: Tree = {"weight": (rows,), "bias": (rows,)}
    return draw.choice(
        [
            {"weight": (rows, columns), "bias": (rows,)},
            {"weight": (rows, columns, 3, 3)},
            norm,
            {**norm, "running_mean": (rows,), "running_var": (rows,), "num_batches_tracked": ()},
        ]
    )


def tree(draw: random.Random, depth: int) -> Tree:
    """Named children, blocks that repeat, or a Sequential with gaps."""
    kind = draw.random()
    if depth == 0 or kind < 0.2:
        return leaf(draw)
    if kind < 0.6:
        start, block = draw.choice((0, 0, 0, 1)), tree(draw, depth - 1)
        repeats = draw.random() < 0.7
        return {str(start + n): block if repeats else tree(draw, depth - 1) for n in range(draw.randint(1, 4))}
    if kind < 0.7:
        return {str(n): tree(draw, depth - 1) for n in sorted(draw.sample(range(8), draw.randint(1, 4)))}
    return {name: tree(draw, depth - 1) for name in draw.sample(NAMES, draw.randint(1, 4))}


def flat(root: Tree, prefix: str = "") -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for name, value in root.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def parents(keys: Iterable[str]) -> list[str]:
    """The paths of all modules."""
    split = [key.split(".") for key in keys]
    return sorted({".".join(parts[:depth]) for parts in split for depth in range(1, len(parts))})


def one_rule(draw: random.Random, keys: list[str]) -> Callable[[str], str]:
    """A consistent rename of some keys: of a prefix, a container, a part's numbers, a wrapper, old leaves."""
    kind = draw.choice(("add", "strip", "everywhere", "everywhere", "path", "offset", "wrap", "alias"))
    used = {part for key in keys for part in key.split(".")}
    fresh = draw.choice([name for name in FRESH if name not in used])
    paths = parents(keys)
    path = draw.choice(paths or [""])
    head, _, last = path.rpartition(".")
    if kind == "add":
        prefix = draw.choice(("model", "net", "module", "encoder_q"))
        return lambda key: f"{prefix}.{key}"
    if kind == "strip" and paths and len({key.split(".")[0] for key in keys}) == 1:
        return lambda key: key.partition(".")[2]
    if kind == "everywhere" and paths and not last.isdecimal():
        return lambda key: re.sub(rf"(^|\.){last}(?=\.)", rf"\g<1>{fresh}", key)
    if kind == "path" and paths:
        new = f"{head}.{fresh}" if head else fresh
        return lambda key: new + key[len(path) :] if key.startswith(f"{path}.") else key
    if kind == "offset" and last.isdecimal():
        by, pattern = draw.choice((1, 2, 10)), rf"^({re.escape(head + '.') if head else ''})(\d+)(?=\.)"
        return lambda key: re.sub(pattern, lambda found: found[1] + str(int(found[2]) + by), key)
    if kind == "wrap" and paths:
        wrapper = draw.choice(("module", "_orig_mod", "fn", "layer"))
        return lambda key: f"{path}.{wrapper}{key[len(path) :]}" if key.startswith(f"{path}.") else key
    return replaced((r"norm\.weight$", "norm.gamma"), (r"norm\.bias$", "norm.beta"))
