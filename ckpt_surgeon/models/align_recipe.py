"""An alignment as a recipe that a person can read: a few rules where they explain the pairs, pairs where not."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping

from ..edits.keys import rename
from ..edits.recipe import Recipe, Step, step
from ..edits.rename import Rules
from ..errors import EditError
from .align import Alignment, Made

Pair = tuple[str, str]
Kind = tuple[int, int, tuple[int, ...]]  # how tensors are joined or taken apart: dimension, groups, unequal sizes

_DIGITS = re.compile(r"(\d+)")
_LETTERS = "nmkijpqrst"


def alignment_recipe(found: Alignment, keys: Iterable[str]) -> Recipe:
    """The recipe that carries an alignment out on a checkpoint with these keys.

    First what is taken apart or joined, then renames, as rules, then other orders of dimensions and shapes.  A key
    without a proposal keeps its name, unless the target means something by that name: what is open would be settled
    by accident.  Then it is dropped.
    """
    pairs = found.pairs
    steps, keys = _regrouping(found, list(keys))
    made = {one.new for one in found.made}
    taken = {*pairs.values(), *found.missing, *(key for one in found.ambiguous for key in one.news)}
    blocking = {key: None for key in keys if key not in pairs and key in taken - made}
    if blocking:
        steps.append(step("drop", patterns=[_escaped(key) for key in blocking]))
    left = [key for key in keys if key not in blocking]
    prefix = _common_prefix(pairs, left)
    rules = [] if prefix else rename_rules(pairs, left)
    if prefix:
        steps.append(step("add_prefix", prefix=prefix))
    if rules:
        steps.append(step("rename", pairs=[list(rule) for rule in rules]))
    steps += _layouts(found, [*(pairs.get(key, key) for key in left)])
    return Recipe(tuple(steps))


def _layouts(found: Alignment, keys: list[str]) -> list[Step]:
    """The steps that permute and reshape what has its new name; those of one kind are one step."""
    layouts: dict[tuple[tuple[str, tuple[int, ...]], ...], list[str]] = {}
    for one in found.proposals:
        split, dims = one.permute or ((), ())
        wanted = [("reshape", split), ("transpose", dims), ("reshape", one.reshape or ())]
        layouts.setdefault(tuple((name, sizes) for name, sizes in wanted if sizes), []).append(one.new)
    for made in found.made:
        layouts.setdefault((("transpose", made.dims),) if made.dims else (), []).append(made.new)
    return [
        step("reshape", patterns=patterns, shape=list(sizes))
        if name == "reshape"
        else step("transpose", patterns=patterns, **({} if sizes == (1, 0) else {"dims": list(sizes)}))
        for layout, names in layouts.items()
        for patterns in ([_globs(names, keys)] if layout else [])
        for name, sizes in layout
    ]


def _globs(names: list[str], keys: Iterable[str]) -> list[str]:
    """Few globs that match exactly these of the keys: one for keys that differ in numbers, where it takes no others."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_DIGITS.sub("#", name), []).append(name)
    found: list[str] = []
    for group in groups.values():
        glob = "*".join(map(_escaped, _DIGITS.sub("\n", group[0]).split("\n")))
        is_exact = len(group) > 1 and set(fnmatch.filter(keys, glob)) == set(group)
        found += [glob] if is_exact else map(_escaped, group)
    return found


def _regrouping(found: Alignment, keys: list[str]) -> tuple[list[Step], list[str]]:
    """The steps that take apart and join, with an index for what numbers alone tell apart; and the keys after them."""
    joined: dict[Kind, list[tuple[str, ...]]] = {}
    wholes: dict[tuple[str, Kind], dict[int, str]] = {}
    for one in (one for one in found.made if not one.stacked):
        kind = (one.dim, one.groups, one.sizes)
        if len(one.olds) > 1:
            joined.setdefault(kind, []).append((one.new, *one.olds))
        else:
            wholes.setdefault((one.olds[0], kind), {})[one.part[0]] = one.new
    parts: dict[Kind, list[tuple[str, ...]]] = {}
    for (old, kind), news in wholes.items():
        parts.setdefault(kind, []).append((old, *(news[at] for at in sorted(news))))
    steps = [
        step("split", source=old, into=list(news), **_arguments(kind))
        for kind, sets in parts.items()
        for old, *news in _templates(sets, keys)
    ]
    steps += [
        step("concat", sources=list(olds), into=new, **_arguments(kind))
        for kind, sets in joined.items()
        for new, *olds in _templates(sets, keys)
    ]
    steps += _stacking([one for one in found.made if one.stacked], keys)
    gone = {old for one in found.made for old in one.olds}
    return steps, [*(key for key in keys if key not in gone), *(one.new for one in found.made)]


def _stacking(made: list[Made], keys: list[str]) -> list[Step]:
    """The steps that stack and take stacks apart; ``{e}`` stands where only the number differs."""
    steps: list[Step] = []
    stacks: dict[int, list[tuple[str, ...]]] = {}
    place: dict[str, int] = {}  # of the number, by the first key of a stack with other digits
    for one in made:
        if len(one.olds) > 1:
            first = one.olds[: one.stacked]
            for old, next_ in zip(first, one.olds[one.stacked :], strict=False):
                place[_DIGITS.sub("#", old)] = _differs(old, next_)
            stacks.setdefault(one.stacked, []).append((one.new, *first))
    for count, sets in stacks.items():
        for new, *olds in _templates(sets, keys):
            sources = [_with_number(old, place[_DIGITS.sub("#", re.sub(r"\{n\}", "0", old))]) for old in olds]
            if count > 1:
                joined = f"{sources[0].partition('{e}')[0]}{{e}}.{new.rpartition('.')[2]}"
                steps.append(step("concat", sources=sources, into=joined))
                sources = [joined]
            steps.append(step("stack", sources=sources, into=new))
    wholes: dict[str, list[str]] = {}
    for one in made:
        if len(one.olds) == 1:
            wholes.setdefault(one.olds[0], []).append(one.new)
    numbers = {_DIGITS.sub("#", news[0]): _differs(*news[:2]) for news in wholes.values()}
    for old, new in _templates([(old, news[0]) for old, news in wholes.items()], keys):
        at = numbers[_DIGITS.sub("#", re.sub(r"\{n\}", "0", new))]
        steps.append(step("unstack", source=old, into=[_with_number(new, at)]))
    return steps


def _differs(one: str, other: str) -> int:
    """The component in which two keys differ."""
    return next(at for at, (a, b) in enumerate(zip(one.split("."), other.split("."), strict=True)) if a != b)


def _with_number(key: str, at: int) -> str:
    return ".".join([*key.split(".")[:at], "{e}", *key.split(".")[at + 1 :]])


def _arguments(kind: Kind) -> dict[str, object]:
    """What a split or concat says besides its keys: only what is not so by default."""
    dim, groups, sizes = kind
    found: dict[str, object] = {"dim": dim} if dim else {}
    found |= {"groups": groups} if groups > 1 else {}
    return found | ({"sizes": list(sizes)} if len(set(sizes)) > 1 else {})


def _templates(sets: list[tuple[str, ...]], keys: Iterable[str]) -> list[tuple[str, ...]]:
    """Sets of keys that differ in one number alone, as one set of templates, where they name no key besides."""
    groups: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for one in sets:
        groups.setdefault(tuple(_DIGITS.sub("#", text) for text in one), []).append(one)
    found: list[tuple[str, ...]] = []
    for group in groups.values():
        numbers = [[int(number) for text in one for number in _DIGITS.findall(text)] for one in group]
        varying = {tuple(column) for column in zip(*numbers, strict=True) if len(set(column)) > 1}
        texts = [] if len(varying) != 1 else [_indexed(text, slots) for text, slots in _slots(group[0], numbers)]
        named = sum(any(re.fullmatch(_pattern(text), key) for text in texts) for key in keys)
        in_each = all("{n}" in text for text in texts)
        covered = len({text for one in group for text in one} & set(keys))
        found += [tuple(texts)] if texts and in_each and named == covered else group
    return found


def _slots(texts: tuple[str, ...], numbers: list[list[int]]) -> Iterable[tuple[str, list[bool]]]:
    """Each text with which of its numbers vary."""
    varying = [len(set(column)) > 1 for column in zip(*numbers, strict=True)]
    for text in texts:
        count = len(_DIGITS.findall(text))
        yield text, varying[:count]
        varying = varying[count:]


def _indexed(text: str, varying: list[bool]) -> str:
    numbers = _DIGITS.findall(text)
    return _with_numbers(text, ["{n}" if vary else number for number, vary in zip(numbers, varying, strict=True)])


def _pattern(template: str) -> str:
    return r"\d+".join(re.escape(text) for text in template.split("{n}"))


def _common_prefix(pairs: Mapping[str, str], keys: list[str]) -> str:
    """The prefix that every key gets, if that is all that happens."""
    prefixes = {new.removesuffix(old) for old, new in pairs.items() if new.endswith("." + old)}
    if len(prefixes) != 1 or len(pairs) != len(keys):
        return ""
    prefix = prefixes.pop()
    return prefix if all(new == prefix + old for old, new in pairs.items()) else ""


def rename_rules(pairs: Mapping[str, str], keys: Iterable[str]) -> list[Pair]:
    """Few rules that rename exactly as the pairs say, and leave every other key alone.

    >>> pairs = {f"layers.{i}.fc.weight": f"blocks.{i + 1}.fc.weight" for i in range(3)}
    >>> rename_rules(pairs, pairs)
    [('^layers.{n}', 'blocks.{n+1}')]
    """
    keys = list(keys)
    wanted = {key: pairs.get(key, key) for key in keys}
    changed = {old: new for old, new in wanted.items() if old != new}
    if not changed:
        return []
    rules = _generalised(sorted({_trimmed(old, new) for old, new in changed.items()}, key=_length))
    exact: list[Pair] = []
    for _ in range(3):
        got = _renamed(keys, [*exact, *rules])
        wrong = [key for key in keys if got is None or got[key] != wanted[key]]
        if not wrong:
            return _without_idle([*exact, *rules], keys)
        exact = [(f"^{key}$", wanted[key]) for key in keys if key in set(wrong) or (f"^{key}$", wanted[key]) in exact]
        if got is None:
            break
    return [(f"^{old}$", new) for old, new in changed.items()]


def folded_pairs(pairs: Mapping[str, str]) -> list[tuple[str, str, int]]:
    """Pairs of keys as few lines: what is old, what is new, and how many keys that is.

    >>> folded_pairs({f"layers.{i}.fc.weight": f"blocks.{i + 1}.fc.weight" for i in range(3)})
    [('layers.{n}.*', 'blocks.{n+1}.*', 3)]
    """
    trimmed: dict[Pair, list[Pair]] = {}
    for old, new in pairs.items():
        trimmed.setdefault(_trimmed(old, new), []).append((old, new))
    templates: dict[Pair, list[Pair]] = {}
    for rule in trimmed:
        templates.setdefault((_DIGITS.sub("#", rule[0]), _DIGITS.sub("#", rule[1])), []).append(rule)
    found = []
    for group in templates.values():
        rules = _one_rule(group) or group
        counts = (
            [sum(len(trimmed[rule]) for rule in group)] if len(rules) == 1 else [len(trimmed[one]) for one in rules]
        )
        found += [(*_whole(old, new), count) for (old, new), count in zip(rules, counts, strict=True)]
    return found


def _whole(old: str, new: str) -> Pair:
    """A rule as the names that it is about: ``blocks.*`` where more follows."""
    if old.endswith("$"):
        return old.strip("^$"), new
    return old.removeprefix("^") + ".*", new + ".*" if new else "*"


def _length(rule: Pair) -> tuple[int, Pair]:
    """Longer rules first: they are the exceptions of the shorter ones."""
    return -rule[0].count("."), rule


def _renamed(keys: list[str], rules: list[Pair]) -> dict[str, str] | None:
    """What rules make of keys; None where they make one of two."""
    try:
        change = rename.plan(dict.fromkeys(keys), [(old, new) for old, new in rules], allow_unmatched=True)
    except EditError:
        return None
    return {olds[0]: new for new, olds in change.origins.items()}


def _without_idle(rules: list[Pair], keys: Iterable[str]) -> list[Pair]:
    """Without the rules whose keys all go by another one: a recipe refuses a rename that matches nothing."""
    tried = Rules(rules)
    tried.new_names(keys)
    idle = set(tried.unused)
    return [rule for rule in rules if rule[0] not in idle]


def _trimmed(old: str, new: str) -> Pair:
    """A pair without the components that both end with, as a rule bound to the beginning."""
    olds, news = old.split("."), new.split(".")
    whole = True
    while len(olds) > 1 and news and olds[-1] == news[-1]:
        olds.pop()
        news.pop()
        whole = False
    return "^" + ".".join(olds) + ("$" if whole else ""), ".".join(news)


def _generalised(rules: list[Pair]) -> list[Pair]:
    """Rules that differ in numbers only become one, where the new numbers follow from the old ones."""
    groups: dict[Pair, list[Pair]] = {}
    for rule in rules:
        groups.setdefault((_DIGITS.sub("#", rule[0]), _DIGITS.sub("#", rule[1])), []).append(rule)
    made: list[Pair] = []
    for group in groups.values():
        made += _few_rules(group)
    return sorted(made, key=_length)


def _few_rules(group: list[Pair]) -> list[Pair]:
    """One rule for a group, or one for each value of the number that keeps it from being one, or the group itself."""
    one = _one_rule(group)
    if one is not None or len(group) < 2:
        return one or group
    best = group
    for slot in range(len(_DIGITS.findall(group[0][0]))):
        parts: dict[str, list[Pair]] = {}
        for rule in group:
            parts.setdefault(_DIGITS.findall(rule[0])[slot], []).append(rule)
        rules = [rule for part in parts.values() for rule in (_one_rule(part) or part)]
        best = rules if len(rules) < len(best) else best
    return best


def _one_rule(group: list[Pair]) -> list[Pair] | None:
    """One rule with indices for several that differ in numbers, or None where no arithmetic explains them."""
    if len(group) < 2:
        return None
    olds = [[int(number) for number in _DIGITS.findall(old)] for old, _ in group]
    news = [[int(number) for number in _DIGITS.findall(new)] for _, new in group]
    varying = [slot for slot in range(len(olds[0])) if len({numbers[slot] for numbers in olds}) > 1]
    if not varying or len(varying) > len(_LETTERS):
        return None
    names = dict(zip(varying, _LETTERS, strict=False))
    texts = []
    for slot in range(len(news[0])):
        values = [numbers[slot] for numbers in news]
        text = str(values[0]) if len(set(values)) == 1 else _from_old(values, olds, names)
        if text is None:
            return None
        texts.append(text)
    old_texts = [f"{{{names[slot]}}}" if slot in names else str(olds[0][slot]) for slot in range(len(olds[0]))]
    return [(_with_numbers(group[0][0], old_texts), _with_numbers(group[0][1], texts))]


def _from_old(values: list[int], olds: list[list[int]], names: Mapping[int, str]) -> str | None:
    """New numbers as an old index and an offset."""
    for slot, name in names.items():
        offsets = {value - numbers[slot] for value, numbers in zip(values, olds, strict=True)}
        if len(offsets) == 1:
            offset = offsets.pop()
            return f"{{{name}{offset:+d}}}" if offset else f"{{{name}}}"
    return None


def _with_numbers(text: str, numbers: list[str]) -> str:
    waiting = iter(numbers)
    return _DIGITS.sub(lambda _: next(waiting), text)


def _escaped(key: str) -> str:
    """A key as a glob that matches it alone."""
    return re.sub(r"([*?[])", r"[\1]", key)


def commented(recipe: Recipe, found: Alignment) -> str:
    """The recipe's TOML with the reasons in front: what a reviewer wants to know first."""
    reasons: dict[tuple[str, str], int] = {}
    for one in found.proposals:
        reasons[one.certainty, one.reason] = reasons.get((one.certainty, one.reason), 0) + 1
    for made in found.made:
        why = (made.certainty, f"{made.how}; {made.reason}")
        reasons[why] = reasons.get(why, 0) + 1
    count = len(found.proposals) + len(found.made)
    lines = [f"# {count:,} keys aligned; review before you apply it"]
    lines += [f"#   {certainty}: {reason} ({count:,} keys)" for (certainty, reason), count in reasons.items()]
    for open_choice in found.ambiguous:
        lines.append(f"# open: {', '.join(open_choice.olds[:6])} -> {', '.join(open_choice.news[:6])}")
        lines.append(f"#   {open_choice.reason}")
    if found.missing:
        lines.append(f"# missing in the checkpoint: {', '.join(found.missing[:6])} ({len(found.missing):,} keys)")
    return "\n".join(line.encode("unicode_escape").decode() if not line.isprintable() else line for line in lines) + (
        "\n\n" + recipe.dumps()
    )
