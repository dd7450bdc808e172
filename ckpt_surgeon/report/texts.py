"""Records as text: tables for people, JSON for machines.  Everything is returned, nothing printed."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ..edits.keys import is_derivable
from ..files import swap
from ..files.paths import is_there
from ..files.remote import RemotePath
from ..formats import sharded
from ..formats.registry import WRITERS
from ..key_patterns import fold
from ..tensors.checkpoint import Checkpoint, LeftOut
from ..tensors.records import Storage, StoredTensor, Tensor
from ..writing.write import source_bytes

if TYPE_CHECKING:
    from ..edits.keys import Change
    from ..models.align import Alignment
    from ..models.diff import Diff, Mismatch
    from ..models.fit import Fit
    from ..reading.comparing import Changed, Hashes, Stats, ValueDiff
    from ..reading.listing import Listing
    from ..reading.scanning import Scan
    from ..writing.in_place import InPlace
    from ..writing.write import Plan

FEW = 12  # lines that a list may take before it is cut, where it can be

_RIGHT = {"bytes", "modules", "parameters", "keys", "count", "share", "tensors"}


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A plain table; numbers stand right.

    >>> print(table(["key", "bytes"], [["fc.bias", 40], ["fc.weight", 20480]]))
    key          bytes
    fc.bias         40
    fc.weight    20480
    """
    from tabulate import tabulate

    right = [header in _RIGHT for header in headers]
    align = ["right" if is_right else "left" for is_right in right]
    return tabulate(_cells(rows), list(headers), tablefmt="plain", disable_numparse=True, colalign=align)


def long_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """The same table without tabulate, which takes a second or more for 100,000 rows and 25 ms to import.

    >>> print(long_table(["key", "bytes"], [["fc.bias", 40], ["fc.weight", 20480]]))
    key          bytes
    fc.bias         40
    fc.weight    20480
    """
    texts = _cells(rows)
    columns = zip(*texts, strict=True) if texts else ((),) * len(headers)
    form = "  ".join(
        f"{{:{'>' if header in _RIGHT else '<'}{max(len(header) + 2, *map(len, column), 0)}}}"  # as tabulate does
        for header, column in zip(headers, columns, strict=True)
    ).format
    return "\n".join(form(*row).rstrip() for row in [list(headers), *texts])


def _cells(rows: Iterable[Sequence[object]]) -> list[list[str]]:
    """Cells as text that a terminal may show."""
    texts = [[str(cell) for cell in row] for row in rows]
    if all("".join(row).isprintable() for row in texts):
        return texts
    return [[visible(cell) for cell in row] for row in texts]


def visible(text: str) -> str:
    """A key as a terminal may show it: control characters escaped.

    >>> visible("fc\\x1b[31m.bias")
    'fc\\\\x1b[31m.bias'
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text
    )


def size(nbytes: int) -> str:
    """Bytes as people read them.

    >>> size(412323), size(12), size(5 << 30)
    ('412.3 kB', '12 bytes', '5.4 GB')
    """
    if nbytes < 1000:
        return f"{nbytes} bytes"
    value = float(nbytes)
    for unit in ("kB", "MB", "GB", "TB", "PB"):
        value /= 1000
        if value < 999.95:
            return f"{value:.1f} {unit}"
    return f"{value:,.1f} PB"


def percent(share: float) -> str:
    """A share of 1 as a percentage that says 100 % only when it is all.

    >>> percent(1.0), percent(0.99999), percent(0.5), percent(0.0)
    ('100 %', '99.9 %', '50.0 %', '0 %')
    """
    if share in (0.0, 1.0):
        return f"{share:.0%}".replace("%", " %")
    return f"{min(max(share, 0.001), 0.999) * 100:.1f} %"


def plural(count: int, noun: str) -> str:
    """A count and its noun.

    >>> plural(1, "key"), plural(22, "key")
    ('1 key', '22 keys')
    """
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def command(*words: object) -> str:
    """A command line that can be pasted."""
    return " ".join(shlex.quote(str(word)) for word in ("ckpt", *words))


def folded(keys: Iterable[str], *, limit: int | None = FEW) -> list[tuple[str, int]]:
    """Keys as patterns and counts; at most ``limit`` of them, the rest as one line."""
    found = [(one.pattern, one.count) for one in fold(keys)]
    if limit is None or len(found) <= limit:
        return found
    rest = found[limit - 1 :]
    return [*found[: limit - 1], (f"… {len(rest):,} more patterns (--full lists all)", sum(count for _, count in rest))]


# -- ls


def listing_text(listing: Listing, *, fold_rows: bool = False) -> str:
    """What ``ckpt ls`` prints."""
    lines = [f"{listing.path}: {listing.container}, {size(listing.file_bytes)}"]
    for part in listing.parts:
        where = f"{part.path}: " if part.path else ""
        totals = f"{plural(part.tensors, 'tensor')}, {plural(part.parameters, 'parameter')}, {size(part.nbytes)}"
        lines.append(f"  {where}{totals}")
    if len(listing.parts) > 1:
        lines.append(f"  several state_dicts: commands that need one take --select {listing.parts[0].path}")
    devices = [device for device in listing.devices if device != "cpu"]
    if devices:
        lines.append(f"  saved from {', '.join(devices)} (read on the cpu)")
    lines += [f"  {_left_out(left)}" for left in listing.beside[:FEW]]
    if len(listing.beside) > FEW:
        lines.append(f"  beside: {len(listing.beside) - FEW:,} more entries")
    if listing.prefix == "module.":
        suffix = listing.path.suffix if listing.path.suffix.lower() in WRITERS else ".pth"
        name = f"clean{suffix}"
        out = name if isinstance(listing.path, RemotePath) else listing.path.parent / name
        remedy = command("strip-prefix", listing.path, out)
        lines.append(f"  every key begins with 'module.' (DataParallel); to take it off: {remedy}")
    for key, value in listing.metadata.items():
        shown = visible(value[:100]) + (" …" if len(value) > 100 else "")
        lines.append(f"  metadata: {visible(key)} = {shown}")
    lines += [f"  note: {note}" for note in listing.notes]
    slack = slack_bytes(listing.tensors)
    if slack and len(listing.tensors) == sum(part.tensors for part in listing.parts):
        lines.append(
            f"  note: the storages hold {size(slack)} that belong to no tensor; any ckpt output leaves them out"
        )
    if listing.checked is not None:
        lines.append(f"  checked: {size(listing.checked)} read, no damage found")
    if listing.tensors:
        lines += ["", _folded_rows(listing) if fold_rows else _rows(listing)]
    if listing.objects:
        rows = ((one.path, one.kind, one.value) for one in listing.objects)
        lines += ["", "no tensors:", table(["path", "class", "value"], rows)]
    return "\n".join(lines)


def slack_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the storages behind tensors that no tensor's elements can account for."""
    left: dict[Storage, int] = {}
    for tensor in tensors.values():
        if isinstance(tensor, StoredTensor):
            left[tensor.storage] = left.get(tensor.storage, tensor.storage.nbytes) - tensor.nbytes
    return sum(nbytes for nbytes in left.values() if nbytes > 0)


def _left_out(left: LeftOut) -> str:
    inside = f", {plural(left.tensors, 'tensor')} of {size(left.nbytes)}" if left.tensors else ""
    return f"beside: {visible(left.path)}: {visible(left.what)}{inside}"


def _rows(listing: Listing) -> str:
    if listing.stats is not None:
        return _stats_rows(listing, listing.stats)
    rows = ((key, tensor.dtype.name, shape(tensor), f"{tensor.nbytes:,}") for key, tensor in listing.tensors.items())
    return long_table(["key", "dtype", "shape", "bytes"], rows)


def _stats_rows(listing: Listing, stats: Mapping[str, Stats]) -> str:
    rows = []
    for key, tensor in listing.tensors.items():
        one = stats[key]
        odd = [f"{one.nan:,} NaN"] * bool(one.nan) + [f"{one.inf:,} inf"] * bool(one.inf) + ["all zero"] * one.all_zero
        measures = (number(value) for value in (one.mean, one.std, one.min, one.max))
        rows.append((key, tensor.dtype.name, shape(tensor), *measures, ", ".join(odd)))
    return table(["key", "dtype", "shape", "mean", "std", "min", "max", ""], rows)


def _folded_rows(listing: Listing) -> str:
    rows = []
    groups: dict[tuple[str, str], list[str]] = {}
    for key, tensor in listing.tensors.items():
        groups.setdefault((tensor.dtype.name, shape(tensor)), []).append(key)
    place = {key: index for index, key in enumerate(listing.tensors)}
    for (dtype, dims), keys in groups.items():
        for one in fold(keys):
            nbytes = listing.tensors[keys[0]].nbytes * one.count
            rows.append((place[keys[one.first]], [one.pattern, one.count, dtype, dims, f"{nbytes:,}"]))
    return table(["key", "keys", "dtype", "shape", "bytes"], [row for _, row in sorted(rows, key=lambda row: row[0])])


def shape(tensor: Tensor) -> str:
    """A shape as torch prints it, and what a tensor is where it is more than its elements."""
    kind = f" ({tensor.kind})" if hasattr(tensor, "kind") else ""
    return f"[{', '.join(map(str, tensor.shape))}]{kind}"


def listing_json(listing: Listing) -> str:
    """What ``ckpt ls --json`` prints."""
    groups: dict[object, str] = {}
    tensors = []
    for key, tensor in listing.tensors.items():
        tied = groups.setdefault(tensor.tie, key)
        entry: dict[str, object] = {
            "name": key,
            "dtype": tensor.dtype.name,
            "shape": list(tensor.shape),
            "bytes": tensor.nbytes,
            "device": tensor.device,
        }
        if isinstance(tensor, StoredTensor):
            entry |= {"stride": list(tensor.stride), "storage_bytes": tensor.storage.nbytes}
        if hasattr(tensor, "kind"):
            entry["kind"] = tensor.kind
        if tied != key:
            entry["tied_to"] = tied
        if listing.stats is not None:
            entry["stats"] = _stats_json(listing.stats[key])
        tensors.append(entry)
    return _json(
        {
            "path": str(listing.path),
            "container": listing.container,
            "file_bytes": listing.file_bytes,
            "parts": [
                {"path": part.path, "tensors": part.tensors, "parameters": part.parameters, "bytes": part.nbytes}
                for part in listing.parts
            ],
            "beside": [
                {"path": left.path, "what": left.what, "tensors": left.tensors, "bytes": left.nbytes}
                for left in listing.beside
            ],
            "objects": [{"path": one.path, "class": one.kind, "value": one.value} for one in listing.objects],
            "metadata": dict(listing.metadata),
            "notes": list(listing.notes),
            "tensors": tensors,
        }
    )


def _stats_json(one: Stats) -> dict[str, object]:
    measures = {"mean": one.mean, "std": one.std, "min": one.min, "max": one.max}
    finite: dict[str, object] = {name: value if math.isfinite(value) else None for name, value in measures.items()}
    return finite | {"nan": one.nan, "inf": one.inf, "all_zero": one.all_zero}


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=True)


def scan_text(found: Scan) -> str:
    """What ``ckpt scan`` prints."""
    rows = [(one.name, one.verdict) for one in found.names]
    lines = [f"{found.path}: {found.container}, {plural(len(found.names), 'name')} in its pickles"]
    lines += ["", table(["name", "a full torch.load would"], rows)] if rows else []
    verdict = f"{plural(len(found.suspects), 'name')} that are not plainly data" if found.suspects else "plainly data"
    return "\n".join([*lines, "", f"{verdict} (a reader's report, not a malware scanner's)"])


def scan_json(found: Scan) -> str:
    """What ``ckpt scan --json`` prints."""
    names = [{"name": one.name, "data": one.is_data, "verdict": one.verdict} for one in found.names]
    return _json(
        {"path": str(found.path), "container": found.container, "plainly_data": not found.suspects, "names": names}
    )


# -- diff


def diff_text(
    found: Diff, ours: str, theirs: str, *, hint: str = "", full: bool = False, has_values: bool = False
) -> str:
    """What ``ckpt diff`` prints; ``hint`` is the command that the hint suggests, ``has_values`` whether the target is
    a checkpoint too."""
    limit = None if full else FEW
    lines = []
    if not found.matched and found.target_keys:
        here = "is here in its shape" if found.mismatched else "is here"
        lines.append(f"NOTHING MATCHES: none of the {plural(found.target_keys, 'key')} that {theirs} expects {here}")
    share = f"{percent(found.share)} of the parameters"
    lines.append(f"matched {len(found.matched):,} of {plural(found.target_keys, 'key')}, {share}")
    if found.rewritten:
        lines.append(f"{plural(len(found.rewritten), 'key')} of these the model makes itself of others when it loads")
    for title, keys in (
        (f"missing (in {theirs} only)", [key for key in found.missing if not is_derivable(key)]),
        ("missing, buffers that models make themselves", [key for key in found.missing if is_derivable(key)]),
        (f"unused (in {ours} only)", [key for key in found.unused if not is_derivable(key)]),
        ("unused, buffers that models make themselves", [key for key in found.unused if is_derivable(key)]),
    ):
        if keys:
            lines += ["", f"{title}: {plural(len(keys), 'key')}"]
            lines += [f"  {line}" for line in table(["key", "keys"], folded(keys, limit=limit)).splitlines()[1:]]
    for title, changes in (("mismatched shapes", found.mismatched), ("other dtype, converted on load", found.dtypes)):
        if changes:
            lines += ["", f"{title}: {plural(len(changes), 'key')}"]
            lines += [f"  {line}" for line in _changes(changes, ours, theirs, limit).splitlines()]
    if found.hint is not None:
        lines += ["", f"{found.hint.said}:", f"  {hint}"]
    verdict = "strictly loadable" if found.loadable else "NOT strictly loadable"
    verdict += " (values not compared: --values)" if found.loadable and has_values else ""
    return "\n".join([*lines, "", verdict])


def _changes(changes: Sequence[Mismatch], ours: str, theirs: str, limit: int | None) -> str:
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
    return _json(
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
            "matched_parameters": found.matched_numel,
            "target_parameters": found.target_numel,
            "hint": {"text": found.hint.said, "command": command_line} if found.hint else None,
        }
    )


# -- align and fit


def alignment_text(found: Alignment, *, full: bool = False) -> str:
    """What ``ckpt align`` prints: proposals folded, with reason and certainty, then what is open."""
    limit = None if full else FEW
    groups: dict[tuple[str, str], list[str]] = {}
    for one in found.proposals:
        groups.setdefault((one.certainty, one.reason), []).append(one.new)
    rows = [
        (pattern, count, certainty, reason)
        for (certainty, reason), keys in groups.items()
        for pattern, count in folded(keys, limit=limit)
    ]
    lines = [table(["target's keys", "keys", "certainty", "why"], rows)] if rows else ["nothing could be aligned"]
    for choice in found.ambiguous:
        olds, news = (", ".join(pattern for pattern, _ in folded(keys, limit=4)) for keys in (choice.olds, choice.news))
        lines += ["", f"open: {olds} → {news}", f"  {choice.reason}"]
    for title, keys in (("missing in the checkpoint", found.missing), ("unused", found.unused)):
        if keys:
            lines += ["", f"{title}: {plural(len(keys), 'key')}"]
            lines += [f"  {line}" for line in table(["key", "keys"], folded(keys, limit=limit)).splitlines()[1:]]
    return "\n".join(lines)


def fit_text(found: Fit, *, full: bool = False) -> str:
    """What became of every key: counts and shares first, then those that did not come as they were."""
    from ..models.fit import HOWS

    rows = []
    for how in HOWS:
        ones = [one for one in found.outcomes if one.how == how]
        if ones:
            numel = sum(one.numel for one in ones)
            share = "" if how == "dropped" else percent(numel / found.target_numel if found.target_numel else 1.0)
            rows.append((how, f"{len(ones):,}", f"{numel:,}", share))
    lines = [table(["outcome", "keys", "parameters", "share"], rows)]
    details: dict[str, list[str]] = {}
    for one in found.outcomes:
        if one.how == "initialised" or (full and one.how == "dropped"):
            details.setdefault(f"{one.how}: {one.detail}" if one.detail else one.how, []).append(one.key)
    for title, keys in details.items():
        lines += ["", title]
        lines += [
            f"  {line}" for line in table(["key", "keys"], folded(keys, limit=None if full else FEW)).splitlines()[1:]
        ]
    for note in found.change.notes:
        lines.append(f"note: {note}")
    return "\n".join([*lines, "", f"{percent(found.matched)} of the target's parameters come from the checkpoint"])


def fit_json(found: Fit) -> str:
    """What ``ckpt fit --json`` prints."""
    outcomes = [
        {"name": one.key, "how": one.how, "source": one.source, "parameters": one.numel, "detail": one.detail}
        for one in found.outcomes
    ]
    return _json({"matched": found.matched, "outcomes": outcomes, "recipe": found.recipe.dumps()})


def alignment_json(found: Alignment) -> str:
    """What ``ckpt align --json`` prints."""
    return _json(
        {
            "proposals": [
                {"old": one.old, "new": one.new, "reason": one.reason, "certainty": one.certainty}
                | ({"reshape": list(one.reshape)} if one.reshape else {})
                for one in found.proposals
            ],
            "ambiguous": [
                {"olds": list(one.olds), "news": list(one.news), "reason": one.reason} for one in found.ambiguous
            ],
            "unused": list(found.unused),
            "missing": list(found.missing),
        }
    )


# -- values


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
    for title, keys in (("only in the first", found.only_ours), ("only in the second", found.only_theirs)):
        if keys:
            lines += ["", f"{title}: {plural(len(keys), 'key')}"]
            lines += [f"  {line}" for line in table(["key", "keys"], folded(keys, limit=limit)).splitlines()[1:]]
    return "\n".join([*lines, "", "same values" if found.same else "values differ"])


def _changed_row(one: Changed) -> Sequence[object]:
    measures = (number(one.max_abs), number(one.relative), f"{one.cosine:.6f}")
    return one.key, *measures, _both(one.nan), _both(one.inf), one.why


def _both(counts: tuple[int, int]) -> str:
    return f"{counts[0]:,} / {counts[1]:,}" if any(counts) else ""


def number(value: float) -> str:
    """A measure in four digits."""
    return f"{value:.4g}"


def values_json(found: ValueDiff) -> str:
    """What ``ckpt diff --values --json`` prints; numbers that JSON does not have are null."""
    return _json(
        {
            "same": found.same,
            "identical": list(found.identical),
            "renamed": [{"ours": old, "theirs": new} for old, new in found.renamed],
            "close": [_changed_json(one) for one in found.close],
            "changed": [_changed_json(one) for one in found.changed],
            "only_ours": list(found.only_ours),
            "only_theirs": list(found.only_theirs),
        }
    )


def _changed_json(one: Changed) -> dict[str, object]:
    measures = {"max_abs": one.max_abs, "relative": one.relative, "cosine": one.cosine}
    finite = {name: value if math.isfinite(value) else None for name, value in measures.items()}
    return {"name": one.key, **finite, "nan": list(one.nan), "inf": list(one.inf), "why": one.why}


def hashes_text(found: Hashes) -> str:
    """What ``ckpt hash`` prints, as sha256sum does: digest, two spaces, name; the whole last."""
    lines = [f"{digest}  {visible(key)}" for key, digest in found.tensors.items()]
    return "\n".join([*lines, f"{found.whole}  (whole)"])


def hashes_json(found: Hashes) -> str:
    """What ``ckpt hash --json`` prints."""
    return _json({"whole": found.whole, "tensors": dict(found.tensors)})


# -- writing


def plan_text(plan: Plan, change: Change[Checkpoint]) -> str:
    """What ``--dry-run`` prints: every key, the files, the bytes."""
    lines = [table(["old", "", "new", "dtype", "shape", "bytes"], _change_rows(change)), ""]
    lines += [f"note: {note}" for note in change.notes]
    lines += [f"beside, left out: {visible(left.path)}: {left.what}" for left in plan.checkpoint.left_out]
    lines += [f"would write {file.path}: {plural(len(file.tensors), 'tensor')}" for file in plan.files]
    if plan.index is not None:
        lines.append(f"would write {plan.index}")
    before = source_bytes(change.before)
    lines.append(f"{size(before)} before, about {size(plan.nbytes)} after; nothing was written (--dry-run)")
    return "\n".join(lines)


def _change_rows(change: Change[Checkpoint]) -> Iterator[Sequence[object]]:
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
    if change.renamed:
        what.append(f"{change.renamed:,} renamed")
    if change.edited:
        what.append(f"{change.edited:,} with other values or shape")
    if change.dropped:
        what.append(f"{len(change.dropped):,} dropped")
    if len(plan.files) > 1:
        what.append(plural(len(plan.files), "shard"))
    before, after = source_bytes(change.before), sum(swap.nbytes(file.path) for file in plan.files)
    lines = [f"wrote {plan.index or plan.out}: {', '.join(what)}, {size(before)} → {size(after)}"]
    lines += [f"note: {note}" for note in (*plan.checkpoint.notes, *change.notes, *remarks)]
    if plan.index is None and is_there(sharded.index_name(plan.out)):
        beside = sharded.index_name(plan.out).name
        lines.append(f"note: {beside} is still beside it; whoever opens the folder reads the shards that it lists")
    left = plan.checkpoint.left_out
    if left:
        names = ", ".join(visible(one.path) for one in left[:FEW]) + (" …" if len(left) > FEW else "")
        lines.append(f"note: left out, beside the weights: {names}")
    return "\n".join(lines)


def in_place_plan_text(plan: InPlace) -> str:
    """What ``--dry-run --in-place`` prints: every key, the bytes."""
    lines = [table(["old", "", "new", "dtype", "shape", "bytes"], _change_rows(plan.change)), ""]
    lines += [f"note: {note}" for note in plan.change.notes]
    told = "no key changes"
    if plan.patches:
        told = f"would rewrite {size(plan.nbytes)} of {plan.path}, {plan.spare:,} bytes to spare"
    return "\n".join([*lines, f"{told}; nothing was written (--dry-run)"])


def in_place_summary(plan: InPlace) -> str:
    """The line after a rename in place, and a line for each thing worth knowing."""
    if not plan.patches:
        return f"{plan.path}: no key changes, nothing was written"
    what = f"{plan.change.renamed:,} of {plural(len(plan.change.before), 'key')} renamed"
    lines = [f"changed {plan.path} in place: {what}, {size(plan.nbytes)} rewritten"]
    return "\n".join([*lines, *(f"note: {note}" for note in (*plan.change.before.notes, *plan.change.notes))])
