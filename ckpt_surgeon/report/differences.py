"""What ``ckpt diff`` and ``ckpt hash`` say."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..edits.keys import is_derivable
from ..errors import listed
from ..key_patterns import FEW, folded
from ..tensors.combining import GREATEST_ERROR, LEAST_COSINE, Survival
from ..text import Lines, as_json, document, number, percent, plural, styled, table, visible

if TYPE_CHECKING:
    from ..models.diff import Diff, Mismatch
    from ..reading.comparing import Changed, Hashes, ValueDiff


def diff_text(
    found: Diff, ours: str, theirs: str, *, hint: str = "", full: bool = False, has_values: bool = False
) -> str:
    """What ``ckpt diff`` prints; ``hint`` is the command that the hint suggests, ``has_values`` whether the target is
    a checkpoint too."""
    limit = None if full else FEW
    lines: list[str] = []
    if not found.matched and found.target_keys:
        here = "is here in its shape" if found.mismatched else "is here"
        said = f"NOTHING MATCHES: none of the {plural(found.target_keys, 'key')} that {theirs} expects {here}"
        lines.append(styled(said, "bad"))
    share = f"{percent(found.share)} of the parameters"
    lines.append(f"matched {len(found.matched):,} of {plural(found.target_keys, 'key')}, {share}")
    if found.rewritten:
        lines.append(f"{plural(len(found.rewritten), 'key')} of these the model makes itself of others when it loads")
    if found.tied:
        pairs = ", ".join(f"{visible(key)} from {visible(twin)}" for key, twin in found.tied[:FEW])
        lines.append(f"{plural(len(found.tied), 'key')} of these the model ties to a key that is there: {pairs}")
    lines += [styled(f"note: {visible(note)}", "note") for note in found.notes]
    for title, keys, style in (
        (f"missing (in {theirs} only)", [key for key in found.missing if not is_derivable(key)], "lost"),
        ("missing, buffers that models make themselves", [key for key in found.missing if is_derivable(key)], "note"),
        (f"unused (in {ours} only)", [key for key in found.unused if not is_derivable(key)], "added"),
        ("unused, buffers that models make themselves", [key for key in found.unused if is_derivable(key)], "note"),
    ):
        if keys:
            lines += ["", *_keys(title, keys, style, limit)]
    for title, changes, style in (
        ("mismatched shapes", found.mismatched, "changed"),
        ("other dtype, converted on load", found.dtypes, "retyped"),
    ):
        if changes:
            heading = f"{title}: {plural(len(changes), 'key')}"
            lines += ["", styled(heading, style), _changes(changes, ours, theirs, limit).indented()]
    if found.hint is not None:
        lines += ["", f"{found.hint.said}:", f"  {hint}"]
    if found.refused:
        lines += ["", styled(f"the model's own code refuses to load it: {visible(found.refused)}", "bad")]
    verdict = "strictly loadable" if found.loadable else "NOT strictly loadable"
    if found.loadable and found.tied:
        verdict += ", tied names filled: by load_into, fit, from_pretrained; load_state_dict alone asks for them"
    verdict += " (values not compared: --values)" if found.loadable and has_values else ""
    return document([*lines, "", styled(verdict, "good" if found.loadable else "bad")])


def _keys(title: str, keys: Sequence[str], style: str, limit: int | None) -> list[Lines]:
    """A heading and the keys below it, folded, in one style."""
    rows = table(["key", "keys"], folded(keys, limit=limit)).indented(skip=1)
    return [styled(f"{title}: {plural(len(keys), 'key')}", style), styled(rows, style)]


def _changes(changes: Sequence[Mismatch], ours: str, theirs: str, limit: int | None) -> Lines:
    groups: dict[tuple[str, str], list[str]] = {}
    for change in changes:
        groups.setdefault((change.ours, change.theirs), []).append(change.key)
    rows = [
        (pattern, count, was, wanted)
        for (was, wanted), keys in groups.items()
        for pattern, count in folded(keys, limit=limit)
    ]
    return table(["key", "keys", ours, theirs], rows)


def diff_json(found: Diff, command_line: str = "") -> str:
    """What ``ckpt diff --json`` prints."""
    return as_json(
        {
            "loadable": found.loadable,
            "matched": list(found.matched),
            "missing": list(found.missing),
            "unused": list(found.unused),
            "mismatched": [
                {"name": one.key, "shape": json.loads(one.ours), "expected": json.loads(one.theirs)}
                for one in found.mismatched
            ],
            "dtypes": [{"name": one.key, "dtype": one.ours, "expected": one.theirs} for one in found.dtypes],
            "rewritten": list(found.rewritten),
            "refused": found.refused or None,
            "tied": dict(found.tied),
            "part": found.part or None,
            "notes": list(found.notes),
            "matched_parameters": found.matched_numel,
            "target_parameters": found.target_numel,
            "hint": {"text": found.hint.said, "command": command_line} if found.hint else None,
        }
    )


def values_text(found: ValueDiff, *, full: bool = False) -> str:
    """What ``ckpt diff --values`` prints."""
    limit = None if full else FEW
    counts = [f"{len(found.identical):,} identical", f"{len(found.renamed):,} identical under another key"]
    counts += [f"{len(found.close):,} close"] if found.close else []
    counts += [f"{len(found.changed):,} changed", f"{len(found.only_ours) + len(found.only_theirs):,} on one side only"]
    lines = [", ".join(counts)]
    if found.changed:
        rows = [
            (
                one.key,
                number(one.max_abs),
                number(one.relative),
                f"{one.cosine:.6f}",
                _both(one.nan),
                _both(one.inf),
                one.why,
            )
            for one in found.changed[:limit]
        ]
        lines += [
            "",
            "changed, the most first:",
            table(["key", "max abs", "relative", "cosine", "NaN", "inf", ""], rows),
        ]
        if limit and len(found.changed) > limit:
            lines.append(f"… {len(found.changed) - limit:,} more (--full lists all)")
    if found.renamed:
        lines += ["", "identical under another key:", table(["ours", "theirs"], found.renamed[:limit])]
        if limit and len(found.renamed) > limit:
            lines.append(f"… {len(found.renamed) - limit:,} more (--full lists all)")
    for title, keys, style in (
        ("only in the first", found.only_ours, "lost"),
        ("only in the second", found.only_theirs, "added"),
    ):
        if keys:
            lines += ["", *_keys(title, keys, style, limit)]
    lines += _survived(found, limit) if found.survived else []
    verdict = styled("same values", "good") if found.same else styled("values differ", "changed")
    return document([*lines, "", verdict])


def _survived(found: ValueDiff, limit: int | None) -> list[str]:
    """How much of what adapters add is there, the least first; and what changed without them."""
    total = Survival()
    for one in found.survived.values():
        total.add(one)
    poor = sum(one.is_poor for one in found.survived.values())
    lines: list[str] = ["", f"of what the adapters add, {plural(len(found.survived), 'tensor')}: {_kept(total)}"]
    if poor:
        limits = f"below cos {LEAST_COSINE} or with an error over {GREATEST_ERROR:.0%}"
        lines.append(f"warning: {plural(poor, 'tensor')} {limits}, the least first:")
    least = sorted(found.survived.items(), key=lambda item: (item[1].cosine, -item[1].lost))[:limit]
    lines += [table(["key", "cosine", "error"], [(key, f"{one.cosine:.4f}", f"{one.lost:.2%}") for key, one in least])]
    if limit and len(found.survived) > limit:
        lines.append(f"… {len(found.survived) - limit:,} more (--full lists all)")
    if others := [one.key for one in found.changed if one.key not in found.survived]:
        lines.append(f"changed without the adapters: {listed(others)}")
    return lines


def _kept(one: Survival) -> str:
    return f"cos {one.cosine:.4f}, error {one.lost:.2%}"


def _both(counts: tuple[int, int]) -> str:
    return f"{counts[0]:,} / {counts[1]:,}" if any(counts) else ""


def values_json(found: ValueDiff) -> str:
    """What ``ckpt diff --values --json`` prints; numbers that JSON does not have are null."""
    return as_json(
        {
            "same": found.same,
            "identical": list(found.identical),
            "renamed": [{"ours": old, "theirs": new} for old, new in found.renamed],
            "close": [_changed_json(one) for one in found.close],
            "changed": [_changed_json(one) for one in found.changed],
            "only_ours": list(found.only_ours),
            "only_theirs": list(found.only_theirs),
            "survived": [{"name": key, "cosine": one.cosine, "error": one.lost} for key, one in found.survived.items()],
        }
    )


def _changed_json(one: Changed) -> dict[str, object]:
    measures = {"max_abs": one.max_abs, "relative": one.relative, "cosine": one.cosine}
    finite = {name: value if math.isfinite(value) else None for name, value in measures.items()}
    return {"name": one.key, **finite, "nan": list(one.nan), "inf": list(one.inf), "why": one.why}


def hashes_text(found: Hashes) -> str:
    """What ``ckpt hash`` prints, as sha256sum does: digest, two spaces, name; the whole last."""
    lines = [f"{digest}  {visible(key)}" for key, digest in found.tensors.items()]
    return document([*lines, f"{found.whole}  (whole)"])


def hashes_json(found: Hashes) -> str:
    """What ``ckpt hash --json`` prints."""
    return as_json({"whole": found.whole, "tensors": dict(found.tensors)})
