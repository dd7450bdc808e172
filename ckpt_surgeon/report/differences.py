"""What ``ckpt diff`` and ``ckpt hash`` say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..edits.keys import is_derivable
from ..key_patterns import FEW, folded
from ..text import Lines, as_json, document, percent, plural, styled, table, visible

if TYPE_CHECKING:
    from ..models.diff import Diff, Mismatch
    from ..reading.comparing import Hashes


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
            lines += ["", *key_section(title, keys, style, limit)]
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


def key_section(title: str, keys: Sequence[str], style: str, limit: int | None) -> list[Lines]:
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
        "diff",
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
        },
    )


def hashes_text(found: Hashes) -> str:
    """What ``ckpt hash`` prints, as sha256sum does: digest, two spaces, name; the whole last."""
    lines = [f"{digest}  {visible(key)}" for key, digest in found.tensors.items()]
    return document([*lines, f"{found.whole}  (whole)"])


def hashes_json(found: Hashes) -> str:
    """What ``ckpt hash --json`` prints."""
    return as_json("hash", {"whole": found.whole, "tensors": dict(found.tensors)})
