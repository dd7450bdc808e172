"""Pages of what a file holds: its tensors with their sizes and values, or what training goes on from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ...edits.companions import summary
from ...reading.comparing import Stats
from ...reading.histograms import Histogram
from ...reading.listing import Listing
from ...runs.describe import ListedOptimizer, Training
from ...tensors.records import Tensor
from ...text import number, percent, plural, size
from ..listings import shape, slack_bytes, wrapper_hint
from ..trainings import optimizer_head
from .model import Card, Cards, Column, Fact, Page, Row, Section, Status, Table, Tree
from .treemaps import treemap

CARDS = 24  # histograms that are shown without being asked for: the most notable first
_NONE = Histogram(0.0, 0.0, ())
_STATES = (Status(""), Status("NaN or inf", "lost"), Status("all zero", "changed"))
_MEASURES = ("mean", "std", "min", "max", "zeros", "NaN", "inf")


def listing_page(found: Sequence[Listing]) -> Page:
    """The page of one file, or of several: sizes as a treemap, the tree of keys, what is beside them."""
    sections: list[Section] = []
    for listing in found:
        sections += _listing_sections(listing, f"{listing.path.name}: " if len(found) > 1 else "")
    first = found[0]
    if len(found) > 1:
        facts = [Fact(str(one.path), f"{one.container}, {size(one.file_bytes)}; {_totals(one)}") for one in found]
        return Page(" · ".join(one.path.name for one in found), "", tuple(facts), tuple(sections))
    subtitle = f"{first.container}, {size(first.file_bytes)}"
    return Page(str(first.path), subtitle, tuple(_listing_facts(first)), tuple(sections), tuple(_notes(first)))


def _listing_facts(listing: Listing) -> Iterable[Fact]:
    for part in listing.parts:
        totals = f"{plural(part.tensors, 'tensor')}, {plural(part.parameters, 'parameter')}, {size(part.nbytes)}"
        yield Fact(part.path or "weights", totals)
    yield Fact("dtypes", _dtypes(listing.tensors))
    for line in summary(listing.tensors):
        yield Fact("belonging", line)
    if devices := [device for device in listing.devices if device != "cpu"]:
        yield Fact("saved from", ", ".join(devices))
    if hint := wrapper_hint(listing):
        yield Fact("names", hint)
    if listing.stats is not None:
        yield _finite(listing.stats)
    if listing.checked is not None:
        yield Fact("checked", f"{size(listing.checked)} read, no damage found", "good")


def _totals(listing: Listing) -> str:
    return ", ".join(
        f"{plural(part.tensors, 'tensor')}, {plural(part.parameters, 'parameter')}" for part in listing.parts
    )


def _dtypes(tensors: Mapping[str, Tensor]) -> str:
    """The dtypes with their shares of all bytes, the greatest first."""
    amounts: dict[str, int] = {}
    for tensor in {tensor.tie: tensor for tensor in tensors.values()}.values():
        amounts[tensor.dtype.name] = amounts.get(tensor.dtype.name, 0) + tensor.nbytes
    whole = sum(amounts.values())
    shares = sorted(amounts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {percent(nbytes / whole)}" if whole else name for name, nbytes in shares)


def _finite(stats: Mapping[str, Stats]) -> Fact:
    nan, inf = sum(one.nan for one in stats.values()), sum(one.inf for one in stats.values())
    zero = sum(one.all_zero for one in stats.values())
    said = [f"{nan:,} NaN"] * bool(nan) + [f"{inf:,} inf"] * bool(inf)
    said += [f"{plural(zero, 'tensor')} all zero"] * bool(zero)
    return Fact("values", ", ".join(said) or "all finite, no tensor all zero", "lost" if nan or inf else "")


def _notes(listing: Listing) -> Iterable[str]:
    yield from listing.notes
    slack = slack_bytes(listing.tensors)
    if slack and len(listing.tensors) == sum(part.tensors for part in listing.parts):
        yield f"the storages hold {size(slack)} that belong to no tensor; any ckpt output leaves them out"


def counted_sizes(listing: Listing) -> dict[str, int]:
    """The bytes by key; tensors that are tied count once."""
    counted = _counted(listing.tensors)
    return {key: tensor.nbytes for key, tensor in listing.tensors.items() if key in counted}


def _listing_sections(listing: Listing, before: str) -> list[Section]:
    counted = _counted(listing.tensors)
    tiles = treemap(counted_sizes(listing), title=f"{before}Sizes")
    sections: list[Section] = [tiles] if tiles is not None else []
    sections += [_cards(listing.stats, before)] if listing.stats and _has_histograms(listing.stats) else []
    sections += [_tree(listing, counted, before)] if listing.tensors else []
    if listing.beside:
        rows = [(one.path, one.what, plural(one.tensors, "tensor") if one.tensors else "",
                 size(one.nbytes) if one.tensors else "") for one in listing.beside]  # fmt: skip
        sections.append(Table(f"{before}Beside the weights", ("path", "what", "tensors", "bytes"), rows))
    if listing.metadata:
        sections.append(Table(f"{before}Metadata", ("name", "value"), list(listing.metadata.items()), is_open=False))
    if listing.objects:
        objects = [(one.path, one.kind, one.value) for one in listing.objects]
        sections.append(Table(f"{before}Objects", ("path", "class", "value"), objects, is_open=False))
    return sections


def _counted(tensors: Mapping[str, Tensor]) -> set[str]:
    """The first keys of tensors that are tied, and all others."""
    first: dict[object, str] = {}
    for key, tensor in tensors.items():
        first.setdefault(tensor.tie, key)
    return set(first.values())


def _tree(listing: Listing, counted: set[str], before: str) -> Tree:
    first: dict[object, str] = {}
    rows = []
    for key, tensor in listing.tensors.items():
        tied = first.setdefault(tensor.tie, key)
        stats = listing.stats[key] if listing.stats is not None else None
        facts = (*(_facts(stats) if stats is not None else ()), tied if tied != key else "")
        rows.append(
            Row(
                key,
                (tensor.dtype.name, shape(tensor), tensor.numel, tensor.nbytes),
                0 if stats is None else _state(stats),
                facts if any(facts) else (),
                (stats.histogram,) if stats is not None and stats.histogram is not None else (),
                key in counted,
            )
        )
    columns = Column("dtype"), Column("shape"), Column("parameters", "count"), Column("size", "bytes")
    details = (*(_MEASURES if listing.stats is not None else ()), "tied to")
    return Tree(f"{before}Keys", columns, rows, _STATES, details)


def _state(stats: Stats) -> int:
    return 1 if stats.nan or stats.inf else 2 if stats.all_zero else 0


def _facts(stats: Stats) -> tuple[str, ...]:
    zeros = stats.histogram.zeros if stats.histogram is not None else None
    counts = ("" if zeros is None else f"{zeros:,}", f"{stats.nan:,}", f"{stats.inf:,}")
    return (*(number(value) for value in (stats.mean, stats.std, stats.min, stats.max)), *counts)


def _has_histograms(stats: Mapping[str, Stats]) -> bool:
    return any(one.histogram is not None for one in stats.values())


def _cards(stats: Mapping[str, Stats], before: str) -> Cards:
    """The histograms of what is not finite, of what is all zero, then of the tensors with most values."""
    shown = [(key, one) for key, one in stats.items() if one.histogram is not None]
    shown.sort(key=lambda item: (not (item[1].nan or item[1].inf), -(item[1].histogram or _NONE).total))
    cards = tuple(
        Card(key, (one.histogram,), (f"mean {number(one.mean)} · std {number(one.std)}", *_counts_said(one)),
             _STATES[_state(one)].mark)
        for key, one in shown[:CARDS] if one.histogram is not None
    )  # fmt: skip
    more = f"; {len(shown) - CARDS:,} more in the tree below" if len(shown) > CARDS else ""
    said = "what is not finite first, then the largest; bins within four standard deviations of the mean"
    return Cards(f"{before}Values", f"{said}{more}", cards)


def _counts_said(one: Stats) -> Iterable[str]:
    found = one.histogram or _NONE
    said = [f"zeros {percent(found.zeros / found.total)}" if found.total else "no values"]
    said += [f"NaN {one.nan:,}"] * bool(one.nan) + [f"inf {one.inf:,}"] * bool(one.inf)
    outside = found.below + found.above
    said += [f"{outside:,} further out"] * bool(outside)
    return [" · ".join(said)]


# -- training


def training_page(found: Training) -> Page:
    """The page of a training checkpoint: each optimizer's groups and parameters, then what else goes on from."""
    where = f"weights at {found.weights or '.'}" if found.has_weights else "no weights"
    facts = [Fact("weights", where), *(Fact("the same keys, edited alike", twin) for twin in found.twins)]
    facts += [Fact(optimizer.path or ".", optimizer_head(optimizer)) for optimizer in found.optimizers]
    facts += [] if found.optimizers else [Fact("optimizer", "no optimizer's state")]
    sections: list[Section] = []
    for optimizer in found.optimizers:
        name = optimizer.path or "optimizer"
        sections += [_groups(optimizer, f"{name}: param groups"), _parameters(optimizer, f"{name}: parameters")]
    if found.parts:
        parts = [(part.path, part.kind, part.value) for part in found.parts]
        sections.append(Table("Beside the optimizers", ("entry", "what", "value"), parts))
    return Page(str(found.path), "training checkpoint", tuple(facts), tuple(sections), found.notes)


def _groups(optimizer: ListedOptimizer, title: str) -> Table:
    names = list(dict.fromkeys(name for group in optimizer.groups for name, _ in group.options))
    rows = [
        (at, f"{len(group.parameters):,}", *(_option(dict(group.options).get(name, "")) for name in names))
        for at, group in enumerate(optimizer.groups)
    ]
    return Table(title, ("group", "parameters", *names), rows)


def _option(value: object) -> str:
    return number(value) if isinstance(value, float) else str(value)


_KNOWN = (Status(""), Status("by order only", "changed"), Status("unknown", "lost"))


def _parameters(optimizer: ListedOptimizer, title: str) -> Tree:
    rows = [
        Row(
            parameter.key or f"unknown.{parameter.id}",
            (
                str(parameter.id),
                str(at),
                ", ".join(f"{name} {list(dims)}" if dims else name for name, dims in parameter.slots) or "none",
                "" if parameter.step is None else f"{parameter.step:g}",
            ),
            0 if parameter.is_certain else 1 if parameter.key else 2,
        )
        for at, group in enumerate(optimizer.groups)
        for parameter in group.parameters
    ]
    columns = Column("id"), Column("group"), Column("slots"), Column("step", "measure")
    return Tree(title, columns, rows, _KNOWN)
