"""Pages in a real browser: their layout, their search, the keyboard, light and dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from browser import Browser, browser, found
from torch import nn

import ckpt_surgeon as cs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(found() is None, reason="there is no Chromium on this machine"),
]
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">\u2028'.w"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages of a model, of what became of it, and of hostile names."""
    folder = tmp_path_factory.mktemp("pages")
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32)
    before = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).state_dict()
    after = {key: value + 0.01 * torch.randn_like(value) for key, value in before.items()}
    after["layers.2.linear1.weight"][0, 0] = float("nan")
    records: dict[str, cs.Listing | cs.ValueDiff] = {
        "listing": cs.ls(before, stats=True, histograms=True),
        "values": cs.compare(before, after, histograms=True),
        "hostile": cs.ls({HOSTILE: torch.ones(2), f"a.{HOSTILE}": torch.ones(3)}, stats=True, histograms=True),
    }
    made = {}
    for name, record in records.items():
        made[name] = folder / f"{name}.html"
        made[name].write_text(cs.html_page(record), "utf-8")
    return made


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as made:
        yield made


def seen(tab: Browser) -> int:
    """How many keys a person sees in the tree."""
    return int(tab.value("[...document.querySelectorAll('.leaf')].filter(one => one.checkVisibility()).length"))


@pytest.mark.parametrize("name", ["listing", "values", "hostile"])
@pytest.mark.parametrize("width", [390, 800, 1400])
def test_a_page_fits_its_window_and_has_nothing_to_complain_of(
    name: str, width: int, tab: Browser, page: dict[str, Path]
) -> None:
    tab.go(page[name], width=width)
    assert tab.value("document.documentElement.scrollWidth") <= width
    assert tab.value("document.querySelectorAll('.leaf, details.module').length") > 0
    assert tab.value("document.title") != "owned"
    assert tab.value("document.querySelectorAll('img, script').length") == 2  # its data and its script
    assert tab.trouble() == []


def test_the_search_finds_words_globs_and_nothing_else(tab: Browser, page: dict[str, Path]) -> None:
    tab.go(page["listing"])
    search = """new Promise(done => {
        const input = document.querySelector('input[type=search]');
        input.value = %r;
        input.dispatchEvent(new Event('input'));
        setTimeout(() => done(document.querySelector('.count').textContent), 150);
    })"""
    assert tab.value(search % "layers.1 BIAS") == "6 of 48 keys"
    assert seen(tab) == 6
    assert tab.value("document.querySelector('mark') !== null")
    assert tab.value(search % "*.norm?.weight") == "0 of 48 keys"
    assert tab.value(search % "*.norm2.weight") == "4 of 48 keys"
    assert tab.value(search % "") == "48 keys"
    assert tab.trouble() == []


def test_the_tree_folds_and_unfolds_by_button_and_by_the_keyboard(tab: Browser, page: dict[str, Path]) -> None:
    tab.go(page["listing"])
    for label, keys in (("Unfold all", 48), ("Fold all", 0)):
        tab.value(f"[...document.querySelectorAll('button')].find(one => one.textContent === {label!r}).click()")
        assert seen(tab) == keys
    tab.value("document.querySelector('.grid summary').focus()")
    tab.press("ArrowRight")
    assert tab.value("document.querySelector('.grid details').open")
    tab.press("ArrowDown")
    assert tab.value("document.activeElement.tagName") == "SUMMARY"
    tab.press("ArrowUp")
    tab.press("ArrowLeft")
    assert not tab.value("document.querySelector('.grid details').open")


def test_a_tile_of_the_treemap_leads_to_its_keys(tab: Browser, page: dict[str, Path]) -> None:
    tab.go(page["listing"])
    tab.value("document.querySelector('svg.wide [data-path=\"layers.3.linear1.weight\"] rect')"
              ".dispatchEvent(new MouseEvent('click', {bubbles: true}))")  # fmt: skip
    assert tab.value("document.querySelector('.count').textContent") == "1 of 48 keys"


def test_a_cell_of_the_heat_map_tells_its_numbers_to_the_pointer_and_to_the_keyboard(
    tab: Browser, page: dict[str, Path]
) -> None:
    tab.go(page["values"])
    box = tab.value(
        "(({x, y}) => [x + 5, y + 5])(document.querySelector('svg.heat rect[data-i]').getBoundingClientRect())"
    )
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
    first = tab.value("document.getElementById('tip').textContent")
    assert first.startswith("layers.0 · ")
    assert "relative " in first
    tab.value("document.querySelector('svg.heat').focus()")
    tab.press("ArrowDown")
    tab.press("ArrowDown")
    assert tab.value("document.getElementById('tip').textContent").startswith("layers.")
    assert tab.value("document.querySelectorAll('rect.at').length") == 1


def test_what_is_dark_follows_the_reader(tab: Browser, page: dict[str, Path]) -> None:
    grounds = []
    for dark in (False, True):
        tab.go(page["values"], dark=dark)
        ground = tab.value("getComputedStyle(document.body).backgroundColor")
        grounds.append(sum(map(int, ground.removeprefix("rgb(").rstrip(")").split(","))))
    assert grounds[0] > 600 > 150 > grounds[1]
