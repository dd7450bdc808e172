"""What ``ckpt ls --tree`` says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..text import Lines, as_json, bar, document, html, long_table, percent, size, table

if TYPE_CHECKING:
    from ..reading.sizes import Amount, ModuleSize, Sizes

HEADERS = ["module", "tensors", "parameters", "bytes", "share", "", "dtypes"]


def sizes_text(found: Sizes) -> Lines:
    """What ``ckpt ls --tree`` prints: a line for each module, below the one that it is in."""
    lines: list[str] = [found.title, "", long_table(HEADERS, map(_row, found.modules))]
    whole = found.modules[0]
    if len(whole.dtypes) > 1:
        rows = [(name, *_counts(amount), percent(_share(amount, whole))) for name, amount in whole.dtypes.items()]
        lines += ["", table(["dtype", "tensors", "parameters", "bytes", "share"], rows)]
    return document(lines)


def _row(module: ModuleSize) -> tuple[object, ...]:
    name = "  " * module.depth + (module.path.rpartition(".")[2] or "(whole)")
    return (name, *_counts(module.amount), percent(module.share), bar(module.share), _dtypes(module))


def _counts(amount: Amount) -> tuple[str, str, str]:
    return f"{amount.tensors:,}", f"{amount.parameters:,}", size(amount.nbytes)


def _share(amount: Amount, whole: ModuleSize) -> float:
    return amount.nbytes / whole.amount.nbytes if whole.amount.nbytes else 1.0


def _dtypes(module: ModuleSize) -> str:
    """The dtypes of a module; of several, the bytes of each, the most first."""
    if len(module.dtypes) == 1:
        return next(iter(module.dtypes))
    ranked = sorted(module.dtypes.items(), key=lambda item: -item[1].nbytes)
    return ", ".join(f"{name} {size(amount.nbytes)}" for name, amount in ranked)


def sizes_html(found: Sizes) -> str:
    """The sizes as a notebook shows them."""
    return html(HEADERS, map(_row, found.modules), found.title)


def sizes_json(found: Sequence[Sizes]) -> Lines:
    """What ``ckpt ls --tree --json`` prints of one file or several."""
    return as_json("sizes", {"files": [_sizes(one) for one in found]})


def _sizes(found: Sizes) -> dict[str, object]:
    return {
        "title": found.title,
        "modules": [
            {"path": module.path, "depth": module.depth, **_amount_json(module.amount), "share": module.share,
             "dtypes": {name: _amount_json(amount) for name, amount in module.dtypes.items()}}
            for module in found.modules
        ],
    }  # fmt: skip


def _amount_json(amount: Amount) -> dict[str, object]:
    return {"tensors": amount.tensors, "parameters": amount.parameters, "bytes": amount.nbytes}
