"""What ``ckpt align`` and ``ckpt fit`` say."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..key_patterns import FEW, folded
from ..text import as_json, document, percent, plural, styled, table, visible

if TYPE_CHECKING:
    from ..models.align import Alignment, Made, Proposal
    from ..models.fit import Fit


def alignment_text(found: Alignment, *, full: bool = False) -> str:
    """What ``ckpt align`` prints: proposals folded, with reason and certainty, then what is open."""
    limit = None if full else FEW
    groups: dict[tuple[str, str], list[str]] = {}
    for proposal in found.proposals:
        groups.setdefault((proposal.certainty, proposal.reason), []).append(proposal.new)
    for made in found.made:
        groups.setdefault((made.certainty, f"{made.how}; {made.reason}"), []).append(made.new)
    rows = [
        (pattern, count, certainty, reason)
        for (certainty, reason), keys in groups.items()
        for pattern, count in folded(keys, limit=limit)
    ]
    lines: list[str] = (
        [table(["target's keys", "keys", "certainty", "why"], rows)] if rows else ["nothing could be aligned"]
    )
    if found.possible:
        lines += ["", f"not taken: {plural(len(found.possible), 'key')}", *_indented(_renames(found.possible, limit))]
    for choice in found.ambiguous:
        olds, news = (", ".join(pattern for pattern, _ in folded(keys, limit=4)) for keys in (choice.olds, choice.news))
        lines += ["", visible(f"open: {olds} → {news}"), visible(f"  {choice.reason}")]
    for title, keys in (("missing in the checkpoint", found.missing), ("unused", found.unused)):
        if keys:
            style = "added" if title == "unused" else "lost"
            lines += ["", styled(f"{title}: {plural(len(keys), 'key')}", style)]
            lines.append(styled(table(["key", "keys"], folded(keys, limit=limit)).indented(skip=1), style))
    lines += [styled(f"note: {note}", "note") for note in found.notes]
    return document(lines)


def _renames(proposals: Iterable[Proposal], limit: int | None) -> str:
    """Old names and new ones, folded, with certainty and reason."""
    from ..models.align_recipe import folded_pairs

    groups: dict[tuple[str, str], dict[str, str]] = {}
    for proposal in proposals:
        groups.setdefault((proposal.certainty, proposal.reason), {})[proposal.old] = proposal.new
    rows = [
        (old, "→", new, f"{count:,}", certainty, reason)
        for (certainty, reason), pairs in groups.items()
        for old, new, count in folded_pairs(pairs)
    ]
    left = len(rows) - limit if limit and len(rows) > limit else 0
    text = table(["old", "", "new", "keys", "certainty", "why"], rows[:limit])
    return text + (f"\n… {left:,} more (--full lists all)" if left else "")


def _indented(text: str) -> list[str]:
    return [f"  {line}" for line in text.splitlines()]


def alignment_json(found: Alignment) -> str:
    """What ``ckpt align --json`` prints."""
    return as_json(
        "align",
        {
            "proposals": [_proposal_json(proposal) for proposal in found.proposals],
            "possible": [_proposal_json(proposal) for proposal in found.possible],
            "ambiguous": [
                {"olds": list(choice.olds), "news": list(choice.news), "reason": choice.reason}
                for choice in found.ambiguous
            ],
            "unused": list(found.unused),
            "missing": list(found.missing),
            "notes": list(found.notes),
        }
        | ({"made": [_made_json(made) for made in found.made]} if found.made else {}),
    )


def _made_json(made: Made) -> dict[str, object]:
    found: dict[str, object] = {
        "new": made.new,
        "olds": list(made.olds),
        "reason": made.reason,
        "certainty": made.certainty,
    }
    found |= {} if len(made.olds) > 1 else {"part": list(made.part), "sizes": list(made.sizes)}
    found |= {"dim": made.dim} if made.dim else {}
    found |= {"groups": made.groups} if made.groups > 1 else {}
    found |= {"stacked": made.stacked} if made.stacked else {}
    return found | ({"dims": list(made.dims)} if made.dims else {})


def _proposal_json(proposal: Proposal) -> dict[str, object]:
    found: dict[str, object] = {
        "old": proposal.old,
        "new": proposal.new,
        "reason": proposal.reason,
        "certainty": proposal.certainty,
    }
    if proposal.permute is not None:
        split, dims = proposal.permute
        found |= {"dims": list(dims)} | ({"split": list(split)} if split else {})
    return found | ({"reshape": list(proposal.reshape)} if proposal.reshape else {})


def fit_text(found: Fit, *, full: bool = False) -> str:
    """What became of every key: counts and shares first, then those that did not come as they were."""
    from ..models.align import Proposal
    from ..models.fit import HOWS

    rows = []
    for how in HOWS:
        outcomes = [outcome for outcome in found.outcomes if outcome.how == how]
        if outcomes:
            numel = sum(outcome.numel for outcome in outcomes)
            share = "" if how == "dropped" else percent(numel / found.target_numel if found.target_numel else 1.0)
            rows.append((how, f"{len(outcomes):,}", f"{numel:,}", share))
    limit = None if full else FEW
    styles = [{"initialised": "changed", "dropped": "lost"}.get(how, "") for how, *_ in rows]
    lines: list[str] = [table(["outcome", "keys", "parameters", "share"], rows, styles=styles)]
    renamed = [
        Proposal(outcome.source, outcome.key, outcome.reason or "the recipe says so", outcome.certainty)
        for outcome in found.outcomes
        if outcome.source not in ("", outcome.key) and not outcome.detail
    ]
    if renamed:
        lines += ["", "renamed", *_indented(_renames(renamed, limit))]
    details: dict[str, list[str]] = {}
    for outcome in found.outcomes:
        if outcome.how == "initialised" or (full and outcome.how == "dropped"):
            details.setdefault(f"{outcome.how}: {outcome.detail}" if outcome.detail else outcome.how, []).append(
                outcome.key
            )
    for title, keys in details.items():
        lines += ["", visible(title)]
        lines += [
            f"  {line}" for line in table(["key", "keys"], folded(keys, limit=None if full else FEW)).splitlines()[1:]
        ]
    possible = [outcome.possible for outcome in found.outcomes if outcome.possible is not None]
    if possible:
        lines += ["", "possible, and not taken (--min-certainty takes it):", *_indented(_renames(possible, limit))]
    for note in found.change.notes:
        lines.append(visible(f"note: {note}"))
    return document([*lines, "", f"{percent(found.matched)} of the target's parameters come from the checkpoint"])


def fit_json(found: Fit) -> str:
    """What ``ckpt fit --json`` prints."""
    outcomes = [
        {
            "name": outcome.key,
            "how": outcome.how,
            "source": outcome.source,
            "parameters": outcome.numel,
            "detail": outcome.detail,
        }
        | ({"reason": outcome.reason, "certainty": outcome.certainty} if outcome.reason else {})
        | ({"possible": _proposal_json(outcome.possible)} if outcome.possible is not None else {})
        for outcome in found.outcomes
    ]
    return as_json("fit", {"matched": found.matched, "outcomes": outcomes, "recipe": found.recipe.dumps()})
