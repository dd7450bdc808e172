"""What ``ckpt diff --values`` says."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..errors import listed
from ..key_patterns import FEW
from ..tensors.combining import GREATEST_ERROR, LEAST_COSINE, Survival
from ..text import Lines, as_json, bar, document, number, plural, styled, table
from .differences import key_section

if TYPE_CHECKING:
    from ..reading.comparing import Changed, ValueDiff


def values_text(found: ValueDiff, *, full: bool = False, by_layer: bool = False, sort: str = "rel") -> Lines:
    """What ``ckpt diff --values`` prints; ``by_layer`` sums the changed parameters up by layers, in the order of
    ``sort``."""
    limit = None if full else FEW
    lines: list[str] = [_counts(found)]
    parameters = [one for one in found.changed if not one.is_buffer]
    buffers = [one for one in found.changed if one.is_buffer]
    if parameters and by_layer:
        lines += ["", "changed, by layer:", _layer_table(parameters, found.identical, sort)]
    elif parameters:
        lines += ["", "changed, the most first:", *_cut(_changed_table(parameters[:limit]), parameters, limit)]
    if buffers:
        lines += ["", "buffers changed, the most first:", *_cut(_changed_table(buffers[:limit]), buffers, limit)]
    if found.renamed:
        rows = table(["ours", "theirs"], found.renamed[:limit])
        lines += ["", "identical under another key:", *_cut(rows, found.renamed, limit)]
    for title, keys, style in (
        ("only in the first", found.only_ours, "lost"),
        ("only in the second", found.only_theirs, "added"),
    ):
        if keys:
            lines += ["", *key_section(title, keys, style, limit)]
    lines += _survived(found, limit) if found.survived else []
    verdict = styled("same values", "good") if found.same else styled("values differ", "changed")
    return document([*lines, "", verdict])


def _counts(found: ValueDiff) -> str:
    counts = [f"{len(found.identical):,} identical", f"{len(found.renamed):,} identical under another key"]
    counts += [f"{len(found.close):,} close"] if found.close else []
    counts += [f"{len(found.changed):,} changed", f"{len(found.only_ours) + len(found.only_theirs):,} on one side only"]
    return ", ".join(counts)


def _cut(rows: Lines, listed: Sequence[object], limit: int | None) -> list[str]:
    more = len(listed) - limit if limit else 0
    return [rows, f"… {more:,} more (--full lists all)"] if more > 0 else [rows]


def _changed_table(changed: Sequence[Changed]) -> Lines:
    """A row for each key; columns that have nothing to say are left out."""
    greatest = max((one.relative for one in changed if math.isfinite(one.relative)), default=0.0)
    headers = [
        "key",
        "max abs",
        "relative",
        "",
        "cosine",
        "change",
        "NaN",
        "inf",
        "stable rank",
        "effective rank",
        "note",
    ]
    rows = [
        (
            one.key,
            number(one.max_abs),
            number(one.relative),
            bar(one.relative / greatest) if greatest and math.isfinite(one.relative) else "",
            f"{one.cosine:.6f}",
            _kind(one),
            _both(one.nan),
            _both(one.inf),
            number(one.spectrum.stable) if one.spectrum else "",
            number(one.spectrum.effective) if one.spectrum else "",
            "" if one.kind == "cast" else one.why,
        )
        for one in changed
    ]
    kept = [place for place in range(len(headers)) if place < 6 or any(row[place] for row in rows)]
    styles = ["bad" if one.nan[1] > one.nan[0] or one.inf[1] > one.inf[0] else "retyped" if one.kind == "cast" else ""
              for one in changed]  # fmt: skip
    return table([headers[place] for place in kept], [[row[place] for place in kept] for row in rows], styles=styles)


def _kind(one: Changed) -> str:
    """What the change is; of a cast, with both dtypes."""
    if one.kind == "cast":
        return f"cast ({one.why.removeprefix('dtype ')})"
    return "" if one.why and one.kind == "all" else one.kind


def _both(counts: tuple[int, int]) -> str:
    return f"{counts[0]:,} / {counts[1]:,}" if any(counts) else ""


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


# -- by layer


@dataclass(slots=True)
class Layer:
    """The changed parameters of a layer, summed up."""

    keys: int = 0
    max_abs: float = 0.0
    sums: list[float] = field(default_factory=lambda: [0.0] * 4)

    def add(self, one: Changed) -> None:
        self.keys += 1
        self.max_abs = max(self.max_abs, one.max_abs)
        self.sums = [mine + other for mine, other in zip(self.sums, one.sums, strict=True)]

    @property
    def relative(self) -> float:
        """|a - b| / |a| over all of its changed parameters."""
        difference, ours, *_ = self.sums
        return math.sqrt(difference / ours) if ours else math.inf

    @property
    def cosine(self) -> float:
        """The cosine of both sides, over all of its changed parameters."""
        _, ours, theirs, product = self.sums
        return product / math.sqrt(ours * theirs) if ours and theirs else 0.0

    def rank(self, sort: str) -> float:
        """What is least for the most changed layer, by "rel", "abs" or "cos"."""
        return {"rel": -self.relative, "abs": -self.max_abs, "cos": self.cosine}[sort]


def layer_of(key: str) -> str:
    """The layer that a key is in: what its name has up to the first number, or else its module.

    >>> layer_of("encoder.layer.3.attention.0.weight"), layer_of("fc.weight"), layer_of("cls_token")
    ('encoder.layer.3', 'fc', 'cls_token')
    """
    numbered = re.match(r"(?:[^.]+\.)*?\d+(?=\.)", key)
    return numbered[0] if numbered else key.rpartition(".")[0] or key


def layers(changed: Iterable[Changed]) -> dict[str, Layer]:
    """The layers of the changed keys that can be measured, in the order of their first keys."""
    found: dict[str, Layer] = {}
    for one in changed:
        if math.isfinite(one.max_abs):
            found.setdefault(layer_of(one.key), Layer()).add(one)
    return found


def _layer_table(changed: Sequence[Changed], identical: Iterable[str], sort: str) -> Lines:
    """A row for each layer, the most changed first."""
    still: dict[str, int] = {}
    for key in identical:
        still[layer_of(key)] = still.get(layer_of(key), 0) + 1
    found = dict(sorted(layers(changed).items(), key=lambda item: item[1].rank(sort)))
    greatest = max((layer.relative for layer in found.values() if math.isfinite(layer.relative)), default=0.0)
    rows = [
        (
            name,
            f"{layer.keys:,}" + (f" (+ {still[name]:,} identical)" if name in still else ""),
            number(layer.max_abs),
            number(layer.relative),
            bar(layer.relative / greatest) if greatest and math.isfinite(layer.relative) else "",
            f"{layer.cosine:.6f}",
        )
        for name, layer in found.items()
    ]
    return table(["layer", "changed keys", "max abs", "relative", "", "cosine"], rows)


# -- for machines


def values_json(found: ValueDiff) -> Lines:
    """What ``ckpt diff --values --json`` prints; numbers that JSON does not have are null."""
    return as_json(
        "values",
        {
            "same": found.same,
            "identical": list(found.identical),
            "renamed": [{"ours": old, "theirs": new} for old, new in found.renamed],
            "close": [_changed_json(one) for one in found.close],
            "changed": [_changed_json(one) for one in found.changed],
            "layers": [
                {"name": name, "changed": one.keys, "max_abs": one.max_abs, "relative": _finite(one.relative),
                 "cosine": one.cosine}
                for name, one in layers(one for one in found.changed if not one.is_buffer).items()
            ],
            "only_ours": list(found.only_ours),
            "only_theirs": list(found.only_theirs),
            "survived": [{"name": key, "cosine": one.cosine, "error": one.lost} for key, one in found.survived.items()],
        }
    )  # fmt: skip


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _changed_json(one: Changed) -> dict[str, object]:
    measures = {"max_abs": one.max_abs, "relative": one.relative, "cosine": one.cosine}
    finite = {name: _finite(value) for name, value in measures.items()}
    made: dict[str, object] = {"name": one.key, **finite, "nan": list(one.nan), "inf": list(one.inf), "why": one.why,
                               "kind": one.kind, "buffer": one.is_buffer}  # fmt: skip
    if one.spectrum is not None:
        made["spectrum"] = {"values": list(one.spectrum.values), "stable_rank": one.spectrum.stable,
                            "effective_rank": one.spectrum.effective, "rank": one.spectrum.rank,
                            "full_rank": one.spectrum.full}  # fmt: skip
    return made
