"""Records as pages: one HTML file with pictures, which needs no other and opens from disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import EditError

if TYPE_CHECKING:
    from ...models.align import Alignment
    from ...models.diff import Diff
    from ...models.fit import Fit
    from ...reading.comparing import ValueDiff
    from ...reading.listing import Listing
    from ...runs.describe import Training


def html_page(record: Listing | Diff | ValueDiff | Fit | Alignment | Training) -> str:
    """One HTML page of a record: of what ``ls``, ``diff``, ``compare``, ``fit``, ``align`` or ``training_of`` gave.

    The page has its pictures, styles and script in itself, fetches nothing, and follows the reader's light or dark
    mode.  It shows histograms where the record has them: ``ls(…, stats=True, histograms=True)`` and
    ``compare(…, histograms=True)``.  Raises EditError for any other record.

    >>> import ckpt_surgeon, torch
    >>> torch.save({"fc.bias": torch.ones(2)}, "layer.pth")
    >>> page = ckpt_surgeon.html_page(ckpt_surgeon.ls("layer.pth"))
    >>> page.startswith("<!DOCTYPE html>"), "fc.bias" in page
    (True, True)
    """
    from . import checkpoints, comparisons, fits
    from .rendering import rendered

    makers = {
        "Listing": lambda: checkpoints.listing_page([record]),  # type: ignore[list-item]
        "Training": lambda: checkpoints.training_page(record),  # type: ignore[arg-type]
        "Diff": lambda: comparisons.diff_page(record),  # type: ignore[arg-type]
        "ValueDiff": lambda: comparisons.values_page(record),  # type: ignore[arg-type]
        "Fit": lambda: fits.fit_page(record),  # type: ignore[arg-type]
        "Alignment": lambda: fits.alignment_page(record),  # type: ignore[arg-type]
    }
    name = type(record).__name__
    if name not in makers:
        raise EditError([f"there is no page of a {name}; there is one of {', '.join(makers)}"])
    return rendered(makers[name]())
