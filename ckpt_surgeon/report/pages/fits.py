"""Pages of a checkpoint and a model: what became of every key, and the recipe that renames."""

from __future__ import annotations

from collections.abc import Iterable

from ...edits.recipe import Recipe
from ...models.align import Alignment
from ...models.align_recipe import alignment_recipe, commented
from ...models.fit import HOWS, Fit
from ...text import percent, plural
from .model import Code, Column, Fact, Page, Row, Section, Status, Tree
from .treemaps import treemap

_MARKS = {"initialised": "changed", "dropped": "lost", "as is": "good", "renamed": "good", "reshaped": "retyped",
          "adapted": "retyped"}  # fmt: skip
_HOW = tuple(Status(how, _MARKS[how]) for how in reversed(HOWS))


def fit_page(found: Fit, *, title: str = "fit") -> Page:
    """The page of a fit: where every key of the target comes from, what was dropped, the recipe."""
    states = {status.title: place for place, status in enumerate(_HOW)}
    rows = []
    for one in found.outcomes:
        possible = one.possible
        maybe = f"{possible.old} ({possible.certainty}: {possible.reason})" if possible is not None else ""
        source = one.source if one.source != one.key else ""
        more = (one.detail, one.certainty, one.reason, maybe)
        rows.append(Row(one.key, (source, one.detail, one.numel), states[one.how], more if any(more) else ()))
    columns = Column("from"), Column("detail"), Column("parameters", "count")
    kept = [one for one in found.outcomes if one.how != "dropped"]
    tiles = treemap(
        {one.key: one.numel for one in kept}, title="Parameters", unit="parameter", statuses=_HOW,
        status_of={one.key: states[one.how] for one in kept},
    )  # fmt: skip
    sections: list[Section] = [tiles] if tiles is not None else []
    sections.append(Tree("Keys", columns, rows, _HOW, ("detail", "certainty", "why", "might be")))
    sections.append(_recipe(found.recipe, found.recipe.dumps()))
    share = f"{percent(found.matched)} of the target's parameters come from the checkpoint"
    facts = [Fact("matched", share, "good" if found.matched == 1 else "")]
    for how in HOWS:
        outcomes = [one for one in found.outcomes if one.how == how]
        if outcomes:
            numel = sum(one.numel for one in outcomes)
            facts.append(Fact(how, f"{plural(len(outcomes), 'key')}, {plural(numel, 'parameter')}", _MARKS[how]))
    return Page(title, "fit", tuple(facts), tuple(sections), tuple(found.change.notes))


def _recipe(recipe: Recipe, text: str) -> Code:
    said = f"{plural(len(recipe.steps), 'edit')}; ckpt apply runs it" if recipe.steps else "nothing is renamed"
    return Code("Recipe", said, text)


_CERTAIN = (
    Status("missing", "lost"), Status("open", "changed"), Status("other shape", "changed"), Status("possible", "note"),
    Status("unused", "added"), Status("likely", "retyped"), Status("certain", "good"), Status("proven", "good"),
)  # fmt: skip


def alignment_page(found: Alignment, *, title: str = "alignment", keys: Iterable[str] = ()) -> Page:
    """The page of an alignment: old and new names with certainty and reason, what is open, the recipe.

    ``keys`` are those of the checkpoint, where they are known.
    """
    states = {status.title: place for place, status in enumerate(_CERTAIN)}
    rows = [Row(one.new, (one.old, one.reason), states[one.certainty]) for one in found.proposals]
    rows += [Row(one.new, (", ".join(one.olds), f"{one.how}; {one.reason}"), states[one.certainty])
             for one in found.made]  # fmt: skip
    for choice in found.ambiguous:
        olds = ", ".join(choice.olds[:6]) + (" …" if len(choice.olds) > 6 else "")
        rows += [Row(new, (olds, choice.reason), states["open"]) for new in choice.news]
    maybe = {one.new: one for one in found.possible}
    for key in found.missing:
        one = maybe.get(key)
        cells = (one.old, f"{one.certainty}: {one.reason}") if one is not None else ("", "")
        rows.append(Row(key, cells, states["possible" if one is not None else "missing"]))
    unused = [Row(key, ("", "in the checkpoint alone"), states["unused"]) for key in found.unused]
    columns = Column("from"), Column("why")
    recipe = alignment_recipe(found, list(keys) or _olds(found))
    sections = (Tree("Keys of the target", columns, [*rows, *unused], _CERTAIN),
                _recipe(recipe, commented(recipe, found)))  # fmt: skip
    said = "every key of the target is settled" if found.complete else "some keys are open or missing"
    facts = [Fact("verdict", said, "good" if found.complete else "changed")]
    for place, status in reversed([*enumerate(_CERTAIN)]):
        count = sum(row.status == place for row in (*rows, *unused))
        facts += [Fact(status.title, plural(count, "key"), status.mark)] if count else []
    return Page(title, "alignment", tuple(facts), sections, found.notes)


def _olds(found: Alignment) -> list[str]:
    """The keys of the checkpoint, as far as an alignment names them."""
    olds = [one.old for one in found.proposals] + [old for one in found.made for old in one.olds]
    return list(dict.fromkeys([*olds, *(old for one in found.ambiguous for old in one.olds), *found.unused]))
