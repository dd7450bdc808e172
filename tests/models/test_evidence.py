"""Certain is what names or values say; what fits by its shape alone stays open."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from test_align import Shapes, aligned, flat, of, one_rule, parents, tree

from ckpt_surgeon.models.align import align

NEW = ("xray", "yankee", "zulu", "whiskey", "victor", "uniform", "tango", "sierra")


# A part that was replaced


def replaced_pair(draw: random.Random) -> tuple[Shapes, Shapes, dict[str, str], set[str]]:
    """A model, and the model with one part replaced by another of the same shapes under names of its own.

    Some have a prefix besides, or another rename.  The third is what is the same on both sides, the fourth the keys
    of the part that is gone.
    """
    found = flat(tree(draw, draw.randint(2, 4)))
    sizes = {path: sum(key.startswith(f"{path}.") for key in found) for path in parents(found)}
    part = draw.choice([path for path, size in sizes.items() if size < len(found)] or [""])
    gone = {key for key in found if part and key.startswith(f"{part}.")}
    has_its_names = draw.random() < 0.3 and 3 * len(gone) < len(found)
    fresh: dict[str, str] = {}
    home = part.rpartition(".")[0]
    new_part = f"{home}.{draw.choice(NEW)}" if home else draw.choice(NEW)

    def renamed(rest: str) -> str:
        *modules, leaf = rest.split(".")
        names = [
            one if has_its_names or one.isdecimal() else fresh.setdefault(one, f"{draw.choice(NEW)}{len(fresh)}")
            for one in modules
        ]
        return ".".join([new_part, *names, leaf])

    names = {key: renamed(key[len(part) + 1 :]) if key in gone else key for key in found}
    if not has_its_names and draw.random() < 0.5:
        rule = one_rule(draw, list(names.values()))
        changed = {old: rule(new) for old, new in names.items()}
        names = changed if len(set(changed.values())) == len(changed) else names
    target = of({names[key]: shape for key, shape in found.items()})
    return of(found), target, {old: new for old, new in names.items() if old not in gone}, gone


@given(st.integers(0, 2**32))
@settings(max_examples=400, derandomize=True, deadline=None)
def test_a_part_that_was_replaced_by_another_of_the_same_shapes_is_never_certain(seed: int) -> None:
    source, target, names, _ = replaced_pair(random.Random(seed))
    found = aligned(source, target)
    certain = {one.old: one.new for one in found.proposals if one.certainty == "certain"}
    assert {old: new for old, new in certain.items() if names.get(old) != new} == {}


def test_what_is_left_of_trees_with_a_replaced_part_is_mostly_certain() -> None:
    kept = certain = 0
    for seed in range(150):
        source, target, names, _ = replaced_pair(random.Random(seed))
        kept += len(names)
        certain += sum(one.certainty == "certain" for one in align(source, target).proposals)
    assert certain > 0.7 * kept
