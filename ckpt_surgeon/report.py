"""Records as text: tables for people, JSON for machines.  Everything is returned, nothing printed."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence

from .checkpoint import LeftOut
from .diff import Diff, Mismatch
from .edits import Renaming
from .fold import fold
from .listing import Listing
from .tensors import StoredTensor, Tensor
from .writing import Plan

FEW = 12  # lines that a list may take before it is cut, where it can be
MANY = 2_000  # rows from which on tabulate's second or more is felt

_RIGHT = {"bytes", "parameters", "keys", "count", "share", "tensors"}


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A plain table; numbers stand right.

    >>> print(table(["key", "bytes"], [["fc.bias", 40], ["fc.weight", 20480]]))
    key        bytes
    fc.bias       40
    fc.weight  20480
    """
    texts = [[visible(str(cell)) for cell in row] for row in rows]
    right = [header in _RIGHT for header in headers]
    if len(texts) <= MANY:
        from tabulate import tabulate

        align = ["right" if is_right else "left" for is_right in right]
        return tabulate(texts, list(headers), tablefmt="plain", disable_numparse=True, colalign=align)
    columns = list(zip(headers, *texts, strict=True))
    form = "  ".join(
        f"{{:{'>' if is_right else '<'}{max(map(len, column))}}}"
        for column, is_right in zip(columns, right, strict=True)
    ).format
    return "\n".join(form(*row).rstrip() for row in [list(headers), *texts])


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
    """>>> plural(1, "key"), plural(22, "key")
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
    if listing.common_prefix == "module." and len(listing.parts) == 1:
        out = listing.path.with_name(f"clean{listing.path.suffix}")
        lines.append(f"  every key begins with 'module.' (DataParallel); {command('strip-prefix', listing.path, out)}")
    for key, value in listing.metadata.items():
        lines.append(f"  metadata: {visible(key)} = {visible(value[:100])}" + (" …" if len(value) > 100 else ""))
    lines += [f"  note: {note}" for note in listing.notes]
    slack = slack_bytes(listing.tensors)
    if slack:
        lines.append(
            f"  note: the storages hold {size(slack)} that belong to no tensor; any ckpt output leaves them out"
        )
    if listing.checked is not None:
        lines.append(f"  checked: {size(listing.checked)} read, no damage found")
    return "\n".join([*lines, "", _folded_rows(listing) if fold_rows else _rows(listing)])


def slack_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the storages behind tensors that no tensor's elements can account for."""
    stored = [tensor for tensor in tensors.values() if isinstance(tensor, StoredTensor)]
    storages = {id(tensor.storage): tensor.storage.nbytes for tensor in stored}
    used: dict[int, dict[object, int]] = {}
    for tensor in stored:
        used.setdefault(id(tensor.storage), {})[tensor.tie] = tensor.nbytes
    return sum(max(nbytes - sum(used[key].values()), 0) for key, nbytes in storages.items())


def _left_out(left: LeftOut) -> str:
    inside = f", {plural(left.tensors, 'tensor')} of {size(left.nbytes)}" if left.tensors else ""
    return f"beside: {visible(left.path)}: {visible(left.what)}{inside}"


def _rows(listing: Listing) -> str:
    rows = ((key, tensor.dtype.name, shape(tensor), f"{tensor.nbytes:,}") for key, tensor in listing.tensors.items())
    return table(["key", "dtype", "shape", "bytes"], rows)


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
            "metadata": dict(listing.metadata),
            "notes": list(listing.notes),
            "tensors": tensors,
        }
    )


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=True)


# -- diff


def diff_text(found: Diff, ours: str, theirs: str, *, hint: str = "", full: bool = False) -> str:
    """What ``ckpt diff`` prints; ``hint`` is the command that the hint suggests."""
    limit = None if full else FEW
    lines = []
    if not found.matched and found.target_keys:
        lines.append(f"NOTHING MATCHES: none of the {plural(found.target_keys, 'key')} that {theirs} expects is here")
    share = f"{percent(found.share)} of the parameters"
    lines.append(f"matched {len(found.matched):,} of {plural(found.target_keys, 'key')}, {share}")
    for title, keys in (
        (f"missing (in {theirs} only)", found.missing),
        (f"unused (in {ours} only)", found.unused),
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
            "mismatched": [{"name": one.key, "shape": one.ours, "expected": one.theirs} for one in found.mismatched],
            "dtypes": [{"name": one.key, "dtype": one.ours, "expected": one.theirs} for one in found.dtypes],
            "matched_parameters": found.matched_numel,
            "target_parameters": found.target_numel,
            "hint": {"text": found.hint.said, "command": command_line} if found.hint else None,
        }
    )


# -- writing


def plan_text(plan: Plan, renaming: Renaming, before: int) -> str:
    """What ``--dry-run`` prints: every key, the files, the bytes."""
    rows = []
    for old, new in renaming.renamed.items():
        tensor = plan.checkpoint[new]
        rows.append((old, "→" if old != new else "=", new if old != new else "", tensor.dtype.name, shape(tensor)))
    rows += [(old, "dropped", "", "", "") for old in renaming.dropped]
    lines = [table(["old", "", "new", "dtype", "shape"], rows), ""]
    lines += [f"note: {note}" for note in renaming.notes]
    lines += [f"beside, left out: {visible(left.path)}: {left.what}" for left in plan.checkpoint.left_out]
    for file in plan.files:
        lines.append(f"would write {file.path}: {plural(len(file.tensors), 'tensor')}")
    if plan.index is not None:
        lines.append(f"would write {plan.index}")
    lines.append(f"{size(before)} before, about {size(plan.nbytes)} after; nothing was written (--dry-run)")
    return "\n".join(lines)


def summary(plan: Plan, renaming: Renaming, before: int, after: int) -> str:
    """The one line after a write, and a line for each thing worth knowing."""
    what = [plural(len(plan.checkpoint), "tensor")]
    if renaming.changed:
        what.append(f"{renaming.changed:,} renamed")
    if renaming.dropped:
        what.append(f"{len(renaming.dropped):,} dropped")
    if len(plan.files) > 1:
        what.append(plural(len(plan.files), "shard"))
    lines = [f"wrote {plan.index or plan.out}: {', '.join(what)}, {size(before)} → {size(after)}"]
    lines += [f"note: {note}" for note in renaming.notes]
    left = plan.checkpoint.left_out
    if left:
        names = ", ".join(visible(one.path) for one in left[:FEW]) + (" …" if len(left) > FEW else "")
        lines.append(f"note: left out, beside the weights: {names}")
    return "\n".join(lines)
