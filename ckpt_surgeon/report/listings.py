"""What ``ckpt ls`` and ``ckpt scan`` say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..edits.companions import summary
from ..key_patterns import FEW, fold
from ..tensors.checkpoint import LeftOut
from ..tensors.records import ExtraState, Tensor
from ..tensors.storage import Storage
from ..tensors.stored import StoredTensor
from ..text import Lines, as_json, command, document, long_table, number, plural, size, styled, table, visible

if TYPE_CHECKING:
    from ..reading.comparing import Stats, StatsByKey
    from ..reading.listing import Listing
    from ..reading.scanning import Scan


def listings_text(found: Sequence[Listing], *, fold_rows: bool = False, by_size: bool = False) -> Lines:
    """What ``ckpt ls`` prints of one file or several, each under the line that names it."""
    texts = [listing_text(listing, fold_rows=fold_rows, by_size=by_size) for listing in found]
    return document(line for number, text in enumerate(texts) for line in ([""] * bool(number) + [text]))


def listing_text(listing: Listing, *, fold_rows: bool = False, by_size: bool = False) -> Lines:
    """What ``ckpt ls`` prints of a file; ``by_size`` puts the largest of folded rows first."""
    lines = listing_head(listing)
    if listing.tensors:
        lines += ["", _folded_table(listing, by_size) if fold_rows else _rows(listing)]
    if listing.objects:
        rows = ((one.path, one.kind, one.value) for one in listing.objects)
        lines += ["", "no tensors:", table(["path", "class", "value"], rows)]
    return document(lines)


def listing_head(listing: Listing) -> list[str]:
    """What ``ckpt ls`` prints above the tensors: the file, its state_dicts, what is beside them, notes."""
    lines: list[str] = [f"{listing.path}: {listing.container}, {size(listing.file_bytes)}"]
    for part in listing.parts:
        where = f"{part.path}: " if part.path else ""
        totals = f"{plural(part.tensors, 'tensor')}, {plural(part.parameters, 'parameter')}, {size(part.nbytes)}"
        lines.append(f"  {where}{totals}")
    if len(listing.parts) > 1:
        lines.append(f"  several state_dicts: commands that need one take --select {listing.parts[0].path}")
    lines += [f"  {line}" for line in summary(listing.tensors)]
    devices = [device for device in listing.devices if device != "cpu"]
    if devices:
        lines.append(f"  saved from {', '.join(devices)} (read on the cpu)")
    lines += [f"  {_left_out(left)}" for left in listing.beside[:FEW]]
    if len(listing.beside) > FEW:
        lines.append(f"  beside: {len(listing.beside) - FEW:,} more entries")
    if hint := wrapper_hint(listing):
        lines.append(f"  {hint}")
    for key, value in listing.metadata.items():
        shown = visible(value[:100]) + (" …" if len(value) > 100 else "")
        lines.append(f"  metadata: {visible(key)} = {shown}")
    lines += [styled(f"  note: {note}", "note") for note in listing.notes]
    slack = slack_bytes(listing.tensors)
    if slack and len(listing.tensors) == sum(part.tensors for part in listing.parts):
        lines.append(
            f"  note: the storages hold {size(slack)} that belong to no tensor; any ckpt output leaves them out"
        )
    if listing.checked is not None:
        lines.append(styled(f"  checked: {size(listing.checked)} read, no damage found", "good"))
    return lines


# Who puts these in front of keys, or into them.
_WRAPPED_BY = {
    "module.": "DataParallel",
    "base_model.model.": "PEFT",
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_fpw_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_dist_wrapped_module": "accelerate",
}


def wrapper_hint(listing: Listing) -> str:
    """What wrapped the model, and the command that takes its names off, and loses nothing; "" where nothing did."""
    prefix = listing.prefix if listing.prefix in _WRAPPED_BY else ""
    if listing.wrapper:
        said, options = f"keys have {listing.wrapper + '.'!r} in them ({_WRAPPED_BY[listing.wrapper]})", ["--wrappers"]
    elif prefix and not any(".lora_" in key for key in listing.tensors):
        said = f"every key begins with {prefix!r} ({_WRAPPED_BY[prefix]})"
        options = [] if prefix == "module." else ["--prefix", prefix]
    else:
        return ""
    options += ["--select", listing.select] if listing.select else []
    keeps_all = bool(listing.beside) and _has_whole_runs(listing.container)
    options += ["--whole"] if keeps_all else []
    suffix = listing.path.suffix if keeps_all or _is_written(listing.path.suffix.lower()) else ".pth"
    local = listing.path.local
    out = f"clean{suffix}" if local is None else local.parent / f"clean{suffix}"
    instead = " (or in the file itself: --in-place instead of the new file)" if keeps_all else ""
    return f"{said}; to take it off: {command('strip-prefix', listing.path, out, *options)}{instead}"


def _has_whole_runs(container: str) -> bool:
    """Whether files of a container can be changed with everything that they hold."""
    from ..formats import torch_legacy
    from ..formats.zip import torch_zip

    return container in (torch_zip.CONTAINER, torch_legacy.CONTAINER)


def _is_written(suffix: str) -> bool:
    """Whether an output can have an extension; the usual ones are known without any writer."""
    from ..formats.registry import writers

    return suffix in (".pth", ".safetensors") or suffix in writers()


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
    rows = (stats_row(key, tensor, stats[key]) for key, tensor in listing.tensors.items())
    styles = [_stats_style(stats[key]) for key in listing.tensors]
    return table(["key", "dtype", "shape", "mean", "std", "min", "max", ""], rows, styles=styles)


def _stats_style(one: Stats) -> str:
    """Red where values are not finite, yellow where all are zero."""
    return "bad" if one.nan or one.inf else "changed" if one.all_zero else ""


def stats_row(key: str, tensor: Tensor, one: Stats) -> Sequence[object]:
    """One tensor and the measures of its values."""
    measures = (number(value) for value in (one.mean, one.std, one.min, one.max))
    return key, tensor.dtype.name, shape(tensor), *measures, _unusual(one)


def _unusual(one: Stats) -> str:
    """What is worth a look in the values of a tensor."""
    found = [f"{one.nan:,} NaN"] * bool(one.nan) + [f"{one.inf:,} inf"] * bool(one.inf) + ["all zero"] * one.all_zero
    return ", ".join(found)


def stats_text(found: StatsByKey) -> str:
    """The measures of ``ckpt ls --stats``, tensor by tensor."""
    rows = ((key, *map(number, (one.mean, one.std, one.min, one.max)), _unusual(one)) for key, one in found.items())
    return table(["key", "mean", "std", "min", "max", ""], rows)


def _folded_table(listing: Listing, by_size: bool) -> str:
    return table(["key", "keys", "dtype", "shape", "bytes"], folded_rows(listing, by_size=by_size))


def folded_rows(listing: Listing, *, by_size: bool = False) -> list[Sequence[object]]:
    """A row for each pattern of keys of one dtype and shape, in the order of the first keys, or the largest first."""
    rows: list[tuple[int, Sequence[object]]] = []
    groups: dict[tuple[str, str], list[str]] = {}
    for key, tensor in listing.tensors.items():
        groups.setdefault((tensor.dtype.name, shape(tensor)), []).append(key)
    position = {key: index for index, key in enumerate(listing.tensors)}
    for (dtype, dims), keys in groups.items():
        for one in fold(keys):
            nbytes = listing.tensors[keys[0]].nbytes * one.count
            rank = -nbytes if by_size else position[keys[one.first]]
            rows.append((rank, [one.pattern, one.count, dtype, dims, f"{nbytes:,}"]))
    return [row for _, row in sorted(rows, key=lambda row: row[0])]


def shape(tensor: Tensor) -> str:
    """A shape as torch prints it, and what a tensor is where it is more than its elements."""
    if isinstance(tensor, ExtraState):
        return f"({visible(tensor.kind)})"
    kind = f" ({tensor.kind})" if hasattr(tensor, "kind") else ""
    return f"[{', '.join(map(str, tensor.shape))}]{kind}"


def listing_json(listing: Listing) -> Lines:
    """What ``ckpt ls --json`` prints."""
    return as_json("ls", _listed(listing))


def listings_json(found: Sequence[Listing]) -> Lines:
    """What ``ckpt ls --json`` prints of several files."""
    return as_json("listings", {"files": [_listed(listing) for listing in found]})


def _listed(listing: Listing) -> dict[str, object]:
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
    return {
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
        "belonging": summary(listing.tensors),
        "checked": listing.checked,
        "tensors": tensors,
    }


def _stats_json(one: Stats) -> dict[str, object]:
    measures = {"mean": one.mean, "std": one.std, "min": one.min, "max": one.max}
    finite: dict[str, object] = {name: value if math.isfinite(value) else None for name, value in measures.items()}
    return finite | {"nan": one.nan, "inf": one.inf, "all_zero": one.all_zero}


def scan_text(found: Scan) -> str:
    """What ``ckpt scan`` prints."""
    rows = [(one.name, one.verdict) for one in found.names]
    lines: list[str] = [f"{found.path}: {found.container}, {plural(len(found.names), 'name')} in its pickles"]
    styles = ["" if one.is_data else "bad" for one in found.names]
    lines += ["", table(["name", "a full torch.load would"], rows, styles=styles)] if rows else []
    verdict = f"{plural(len(found.suspects), 'name')} that are not plainly data" if found.suspects else "plainly data"
    said = f"{verdict} (a reader's report, not a malware scanner's)"
    return document([*lines, "", styled(said, "bad" if found.suspects else "good")])


def scan_json(found: Scan) -> str:
    """What ``ckpt scan --json`` prints."""
    names = [{"name": one.name, "data": one.is_data, "verdict": one.verdict} for one in found.names]
    return as_json(
        "scan",
        {"path": str(found.path), "container": found.container, "plainly_data": not found.suspects, "names": names},
    )
