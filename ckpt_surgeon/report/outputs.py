"""What commands print before and after a file is written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, cast

from ..edits.change import Change, StateDict
from ..files import swap
from ..formats import sharded
from ..formats.zip import torch_zip
from ..key_patterns import FEW
from ..tensors.checkpoint import Checkpoint
from ..text import Lines, document, plural, size, styled, table, visible
from ..writing.write import source_bytes
from .listings import shape

if TYPE_CHECKING:
    from ..writing.in_place import InPlace
    from ..writing.plan import Plan


def plan_text(plan: Plan, change: Change[Checkpoint], *, notes: Iterable[str] = ()) -> str:
    """What ``--dry-run`` prints: every key, the files, the bytes."""
    lines: list[str] = [_change_table(change), ""]
    lines += [styled(f"note: {note}", "note") for note in (*change.notes, *notes)]
    lines += [f"beside, left out: {visible(left.path)}: {left.what}" for left in plan.checkpoint.left_out]
    lines += [f"would write {file.path}: {plural(len(file.tensors), 'tensor')}" for file in plan.shards]
    lines += [f"would write {file.path}: a copy of {file.copy_of}" for file in plan.files if file.copy_of is not None]
    if plan.index is not None:
        lines.append(f"would write {plan.index}")
    before = source_bytes(change.before)
    lines.append(f"{size(before)} before, about {size(plan.nbytes)} after; nothing was written (--dry-run)")
    return document(lines)


def plan_line(plan: Plan) -> str:
    """What ``ckpt convert`` prints of an output that was written; of a plan, what would be written."""
    checkpoint = plan.checkpoint
    if plan.written:
        return summary(plan, Change(checkpoint, checkpoint, {key: (key,) for key in checkpoint}), ())
    shards = f", {plural(len(plan.shards), 'shard')}" if len(plan.shards) > 1 else ""
    what = f"{plural(len(checkpoint), 'tensor')}{shards}, about {size(plan.nbytes)}"
    return f"would write {plan.out if plan.is_folder else plan.index or plan.out}: {what}"


def change_text(change: Change[StateDict]) -> str:
    """What an edit does, key by key, as ``--dry-run`` prints it."""
    lines: list[str] = [_change_table(change)]
    return document([*lines, *(visible(f"note: {note}") for note in change.notes)])


def _change_table(change: Change[StateDict]) -> Lines:
    """What becomes of every key: dropped ones, new ones, other dtypes and other shapes have colours of their own."""
    rows = list(change_rows(change))
    return table(["old", "", "new", "dtype", "shape", "bytes"], rows, styles=map(_row_style, rows))


def _row_style(row: Sequence[object]) -> str:
    old, sign, _, dtype, dims, *_ = map(str, row)
    if sign == "✗":
        return "lost"
    if not old:
        return "added"
    return "retyped" if "→" in dtype else "changed" if "→" in dims else ""


def change_rows(change: Change[StateDict]) -> Iterator[Sequence[object]]:
    """A row for each key, new or dropped, of a change of a Checkpoint or of any other state_dict."""
    if isinstance(change.before, Checkpoint) and isinstance(change.result, Checkpoint):
        yield from _record_rows(cast("Change[Checkpoint]", change))
        return
    for new, olds in change.origins.items():
        same = olds == (new,)
        yield " + ".join(olds), "=" if same else "→", "" if same else new, *_described(change.result[new])
    for old in change.dropped:
        yield old, "✗", "dropped", *_described(change.before[old])


def _described(value: object) -> tuple[str, str, str]:
    """The dtype, shape and bytes of a torch tensor."""
    dims, nbytes = getattr(value, "shape", None), getattr(value, "nbytes", None)
    dtype = str(getattr(value, "dtype", type(value).__name__)).removeprefix("torch.")
    return dtype, "" if dims is None else str(list(dims)), "" if nbytes is None else f"{nbytes:,}"


def _record_rows(change: Change[Checkpoint]) -> Iterator[Sequence[object]]:
    for new, olds in change.origins.items():
        made = change.result[new]
        same = olds == (new,)
        sources = [change.before[old] for old in olds]
        dtypes = " + ".join(dict.fromkeys(source.dtype.name for source in sources))
        shapes = " + ".join(dict.fromkeys(shape(source) for source in sources))
        yield (
            " + ".join(olds),
            "=" if same else "→",
            "" if same else new,
            dtypes if dtypes == made.dtype.name else f"{dtypes} → {made.dtype}",
            shapes if shapes == shape(made) else f"{shapes} → {shape(made)}",
            f"{made.nbytes:,}",
        )
    for old in change.dropped:
        gone = change.before[old]
        yield old, "✗", "dropped", gone.dtype.name, shape(gone), f"-{gone.nbytes:,}"


def summary(plan: Plan, change: Change[Checkpoint], remarks: Iterable[str]) -> str:
    """The one line after a write, and a line for each thing worth knowing."""
    what = [plural(len(plan.checkpoint), "tensor")]
    if change.taken:
        what.append(f"{change.taken:,} of other inputs")
    if change.renamed:
        what.append(f"{change.renamed:,} renamed")
    if change.edited:
        what.append(f"{change.edited:,} with other values or shape")
    if change.dropped:
        what.append(f"{len(change.dropped):,} dropped")
    if len(plan.shards) > 1:
        what.append(plural(len(plan.shards), "shard"))
    if copies := len(plan.files) - len(plan.shards):
        what.append(f"{plural(copies, 'file')} copied beside")
    before, after = source_bytes(change.before), _written_bytes(plan)
    made = plan.out if plan.is_folder else plan.index or plan.out
    lines: list[str] = [f"wrote {made}: {', '.join(what)}, {size(before)} → {size(after)}"]
    lines += map(noted, (*plan.checkpoint.notes, *change.notes, *remarks))
    if plan.index is None and plan.model_folder is None and sharded.index_name(plan.out).lexists():
        beside = sharded.index_name(plan.out).name
        lines.append(f"note: {beside} is still beside it; whoever opens the folder reads the shards that it lists")
    left = plan.checkpoint.left_out
    if left:
        names = ", ".join(visible(entry.path) for entry in left[:FEW]) + (" …" if len(left) > FEW else "")
        keeps = " (--whole keeps them)" if plan.checkpoint.container == torch_zip.CONTAINER else ""
        lines.append(f"note: left out, beside the weights: {names}{keeps}")
    return document(lines)


def noted(note: str) -> str:
    """A note as a line; one that warns says so itself.

    >>> noted("2 keys are tied"), noted("warning: little is kept")
    ('note: 2 keys are tied', 'warning: little is kept')
    """
    return note if note.startswith("warning: ") else f"note: {note}"


def in_place_text(plan: InPlace) -> str:
    """What the command line prints of a rename in place: that it was done, or what would be."""
    return in_place_summary(plan) if plan.written else in_place_plan_text(plan)


def _written_bytes(plan: Plan) -> int:
    return swap.nbytes(plan.out) if plan.is_folder else sum(swap.nbytes(file.path) for file in plan.shards)


def in_place_plan_text(plan: InPlace) -> str:
    """What ``--dry-run --in-place`` prints: every key, the bytes."""
    lines: list[str] = [_change_table(plan.change), ""]
    lines += [f"note: {note}" for note in plan.change.notes]
    verdict = "no key changes"
    if plan.patches:
        verdict = f"would rewrite {size(plan.nbytes)} of {plan.path}, {plan.spare:,} bytes to spare"
    return document([*lines, f"{verdict}; nothing was written (--dry-run)"])


def in_place_summary(plan: InPlace) -> str:
    """The line after a rename in place, and a line for each thing worth knowing."""
    if not plan.patches:
        return f"{plan.path}: no key changes, nothing was written"
    what = f"{plan.change.renamed:,} of {plural(len(plan.change.before), 'key')} renamed"
    lines = [f"changed {plan.path} in place: {what}, {size(plan.nbytes)} rewritten"]
    return document([*lines, *(f"note: {note}" for note in (*plan.change.before.notes, *plan.change.notes))])
