"""Records as HTML tables, as a notebook shows them: the command line's rows, the rest of its text below."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ..key_patterns import FEW, folded
from ..text import html, number, percent, plural
from .listings import folded_rows, listing_head, shape, stats_row

if TYPE_CHECKING:
    from ..edits.change import Change, StateDict
    from ..models.align import Alignment
    from ..models.diff import Diff
    from ..models.fit import Fit
    from ..models.load_into import LoadReport
    from ..reading.comparing import Hashes, StatsByKey, ValueDiff
    from ..reading.listing import Listing
    from ..reading.scanning import Scan
    from ..writing.plan import Plan

ROWS = 60  # how many rows a notebook shows; longer lists are folded or cut

Row = Sequence[object]


def cut(headers: Sequence[str], rows: Iterable[Row], caption: str = "") -> str:
    """A table of at most ROWS rows; the line below it says how many more there are."""
    listed = list(rows)
    more = [f"… {len(listed) - ROWS:,} more rows"] if len(listed) > ROWS else []
    return html(headers, listed[:ROWS], "\n".join([*more, *([caption] if caption else [])]))


def listing_html(listing: Listing) -> str:
    """A listing: a row for each tensor, or for each pattern where there are many."""
    caption = "\n".join(listing_head(listing))
    if listing.stats is not None:
        rows = (stats_row(key, tensor, listing.stats[key]) for key, tensor in listing.tensors.items())
        return cut(["key", "dtype", "shape", "mean", "std", "min", "max", ""], rows, caption)
    if len(listing.tensors) > ROWS:
        return cut(["key", "keys", "dtype", "shape", "bytes"], folded_rows(listing), caption)
    plain = ((key, tensor.dtype.name, shape(tensor), f"{tensor.nbytes:,}") for key, tensor in listing.tensors.items())
    return cut(["key", "dtype", "shape", "bytes"], plain, caption)


def scan_html(found: Scan) -> str:
    """The names in the pickles of a file."""
    caption = f"{found.path}: {found.container}, {plural(len(found.suspects), 'name')} that are not plainly data"
    return cut(["name", "a full torch.load would"], ((name.name, name.verdict) for name in found.names), caption)


def diff_html(found: Diff) -> str:
    """The differences between a checkpoint and a target, folded."""
    ours, theirs = found.names
    rows: list[Row] = []
    for title, keys in (("missing", found.missing), ("unused", found.unused)):
        rows += [(title, pattern, count, "", "") for pattern, count in folded(keys)]
    for title, changes in (("other shape", found.mismatched), ("other dtype", found.dtypes)):
        groups: dict[tuple[str, str], list[str]] = {}
        for change in changes:
            groups.setdefault((change.ours, change.theirs), []).append(change.key)
        rows += [(title, *row, *values) for values, keys in groups.items() for row in folded(keys)]
    verdict = "strictly loadable" if found.loadable else "NOT strictly loadable"
    matched = f"matched {len(found.matched):,} of {plural(found.target_keys, 'key')}, {percent(found.share)}"
    return cut(["", "key", "keys", ours, theirs], rows, f"{matched} of the parameters\n{verdict}")


def values_html(found: ValueDiff) -> str:
    """What became of the values, the most changed first."""
    rows: list[Row] = [
        ("changed", change.key, number(change.max_abs), number(change.relative), f"{change.cosine:.6f}", change.why)
        for change in found.changed[:FEW]
    ]
    rows += [("of the adapters", key, "", f"{one.lost:.2%}", f"{one.cosine:.4f}", "") for key, one in
             sorted(found.survived.items(), key=lambda item: item[1].cosine)[:FEW]]  # fmt: skip
    rows += [("renamed", f"{old} → {new}", "", "", "", "") for old, new in found.renamed[:FEW]]
    for title, keys in (("only in the first", found.only_ours), ("only in the second", found.only_theirs)):
        rows += [(title, pattern, "", "", "", plural(count, "key")) for pattern, count in folded(keys)]
    counts = f"{len(found.identical):,} identical, {len(found.renamed):,} renamed, {len(found.changed):,} changed"
    verdict = "same values" if found.same else "values differ"
    return cut(["", "key", "max abs", "relative", "cosine", ""], rows, f"{counts}\n{verdict}")


def hashes_html(found: Hashes) -> str:
    """The digests by key."""
    return cut(["key", "sha256"], found.tensors.items(), f"whole: {found.whole}")


def stats_html(found: StatsByKey) -> str:
    """Measures of the values by key."""
    headers = ["key", "mean", "std", "min", "max", "NaN", "inf"]
    return cut(headers, (
        (key, *map(number, (stats.mean, stats.std, stats.min, stats.max)), f"{stats.nan:,}", f"{stats.inf:,}")
        for key, stats in found.items()
    ))  # fmt: skip


def alignment_html(found: Alignment) -> str:
    """What becomes of which key, folded, with reason and certainty."""
    groups: dict[tuple[str, str], list[str]] = {}
    for proposal in found.proposals:
        groups.setdefault((proposal.certainty, proposal.reason), []).append(proposal.new)
    rows = [(*row, *reason) for reason, keys in groups.items() for row in folded(keys)]
    caption = f"open: {len(found.ambiguous):,}, missing: {len(found.missing):,}, unused: {len(found.unused):,}"
    return cut(["target's keys", "keys", "certainty", "why"], rows, caption)


def fit_html(found: Fit) -> str:
    """What became of every key, folded."""
    groups: dict[tuple[str, str], list[str]] = {}
    for outcome in found.outcomes:
        groups.setdefault((outcome.how, outcome.detail), []).append(outcome.key)
    rows = [(how, *row, detail) for (how, detail), keys in groups.items() for row in folded(keys)]
    share = f"{percent(found.matched)} of the target's parameters come from the checkpoint"
    return cut(["outcome", "key", "keys", "detail"], rows, share)


def load_html(report: LoadReport) -> str:
    """What became of every key of a model."""
    return fit_html(report.fit)


def plan_html(plan: Plan, line: str) -> str:
    """The files of an output; ``line`` is what the command line says of it."""
    rows = ((file.path, f"{len(file.tensors):,}", f"{plan.writer.size_of(file.tensors):,}") for file in plan.shards)
    return cut(["file", "tensors", "bytes"], rows, line)


def change_html(change: Change[StateDict], rows: Iterable[Row]) -> str:
    """What an edit does, key by key, as the dry run lists it."""
    caption = f"{change.renamed:,} renamed, {change.edited:,} edited, {len(change.dropped):,} dropped"
    return cut(["old", "", "new", "dtype", "shape", "bytes"], rows, "\n".join([caption, *change.notes]))
