"""What a notebook shows of a record: its table, and below it the pictures of its page, folded and small."""

from __future__ import annotations

from ...models.align import Alignment
from ...models.diff import Diff
from ...models.fit import Fit
from ...reading.comparing import ValueDiff
from ...reading.listing import Listing
from .. import notebook
from . import checkpoints, comparisons, fits
from .heatmaps import heatmap
from .model import Cards, Code, Page, Section, Treemap
from .treemaps import treemap

TILES = 32
CELLS = 60
CARDS = 6
CODE = 4000  # characters of a recipe


def listing_fragment(listing: Listing) -> str:
    """A listing: its table, sizes as a treemap, some histograms."""
    sizes = checkpoints.counted_sizes(listing)
    tiles = treemap(sizes, limit=TILES)
    cards = _cards(checkpoints.listing_page([listing])) if listing.stats is not None else []
    return _with(notebook.listing_html(listing), [*([tiles] if tiles is not None else []), *cards])


def diff_fragment(found: Diff) -> str:
    """A diff: its table, and where in the model keys differ."""
    tiles = comparisons.diff_tiles(found, limit=TILES)
    return _with(notebook.diff_html(found), [] if tiles is None or found.loadable else [tiles])


def values_fragment(found: ValueDiff) -> str:
    """A comparison of values: its table, what moved as a heat map, some histograms."""
    drift = heatmap(found, cells=CELLS)
    cards = _cards(comparisons.values_page(found)) if any(one.histograms for one in found.changed) else []
    return _with(notebook.values_html(found), [*([drift] if drift is not None else []), *cards])


def fit_fragment(found: Fit) -> str:
    """A fit: its table and its recipe."""
    return _with(notebook.fit_html(found), _code(fits.fit_page(found)))


def alignment_fragment(found: Alignment) -> str:
    """An alignment: its table and its recipe."""
    return _with(notebook.alignment_html(found), _code(fits.alignment_page(found)))


def _cards(page: Page) -> list[Section]:
    return [Cards(one.title, "", one.cards[:CARDS], one.legend) for one in page.sections if isinstance(one, Cards)]


def _code(page: Page) -> list[Section]:
    return [
        Code(one.title, one.summary, one.text if len(one.text) <= CODE else f"{one.text[:CODE]}\n…")
        for one in page.sections
        if isinstance(one, Code)
    ]


def _with(table: str, sections: list[Section | Treemap]) -> str:
    """A table with pictures; where there are none, jinja2 is not imported for it."""
    from .rendering import fragment

    return fragment(sections, table) if sections else table
