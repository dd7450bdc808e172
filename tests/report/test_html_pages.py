"""Pages are whole by themselves, small, and show whatever a file holds as text, never as markup."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Run
from torch import nn

import ckpt_surgeon as cs
from ckpt_surgeon.errors import EditError
from ckpt_surgeon.report.pages.heatmaps import heatmap
from ckpt_surgeon.report.pages.treemaps import squarified

HOSTILE = ("</script><script>alert(1)</script>", "<!--", "a\u2028b", '" onmouseover="alert(2)', "&lt;b&gt;",
           "x\x1b[31m", "\u202egpj", "{{ 7 * 7 }}", "__proto__", "constructor.prototype")  # fmt: skip
VOID = {"meta", "input", "img", "br", "hr", "link"}


class Reader(HTMLParser):
    """Reads a page: its elements, their attributes, the texts of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID and (self.get_starttag_text() or "")[-2:] != "/>":
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        (self.scripts if self._open and self._open[-1] == "script" else self.texts).append(data)

    @property
    def data(self) -> Any:
        return json.loads(self.scripts[0])

    def names(self, tree: int = 0) -> list[str]:
        return [row[0] for row in self.data["trees"][tree]["rows"]]


def state(keys: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    names = ("attention.self.query.weight", "attention.self.query.bias", "intermediate.dense.weight", "norm.weight")
    return {f"model.encoder.layers.{n // 4}.{names[n % 4]}": torch.randn(4, 3) for n in range(keys)}


MAKERS: dict[str, Callable[[dict[str, torch.Tensor], Path], Any]] = {
    "ls": lambda held, folder: cs.ls(held),
    "ls --stats": lambda held, folder: cs.ls(held, stats=True, histograms=True),
    "diff": lambda held, folder: cs.diff(held, dict([*list(held.items())[1:], ("new", torch.ones(2))])),
    "values": lambda held, folder: cs.compare(held, {k: v + 0.1 for k, v in held.items()}, histograms=True),
    "align": lambda held, folder: cs.align(held, {f"backbone.{key}": value for key, value in held.items()}),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_page_of_a_thousand_tensors_is_small_whole_and_has_every_key(kind: str, tmp_path: Path) -> None:
    held = state(1000)
    text = cs.html_page(MAKERS[kind](held, tmp_path))
    assert len(text.encode()) < 300_000
    read = Reader(text)
    prefix = "backbone." if kind == "align" else ""
    assert {prefix + key for key in held} <= set(read.names())
    for _, attributes in read.tags:
        for name in ("src", "href", "xlink:href", "action"):
            assert (attributes.get(name) or "#").startswith("#")
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/)", text)


@pytest.mark.parametrize("kind", MAKERS)
def test_hostile_names_are_shown_and_never_markup(kind: str, tmp_path: Path) -> None:
    held = {f"{name}.w": torch.ones(2) * n for n, name in enumerate(HOSTILE, 1)}
    calm = Reader(cs.html_page(MAKERS[kind](state(len(HOSTILE)), tmp_path)))
    text = cs.html_page(MAKERS[kind](held, tmp_path))
    read = Reader(text)
    assert {tag for tag, _ in read.tags} <= {tag for tag, _ in calm.tags} | {"p", "rect", "path", "span", "code"}
    assert [tag for tag, _ in read.tags].count("script") == 2
    assert not any(name.startswith("on") for _, attributes in read.tags for name in attributes)
    assert not set(text) & {"\u2028", "\u202e", "\x1b"}
    assert "<!--" not in text
    prefix = "backbone." if kind == "align" else ""
    assert f"{prefix}</script><script>alert(1)</script>.w" in read.names()
    assert f"{prefix}{{{{ 7 * 7 }}}}.w" in read.names()


def test_only_the_script_of_the_page_itself_may_run() -> None:
    text = cs.html_page(cs.ls({"w": torch.ones(2)}))
    policy = next(attributes["content"] for _, attributes in Reader(text).tags if "http-equiv" in attributes)
    script = text.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy is not None
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")


def test_what_is_secret_in_a_url_is_in_no_page() -> None:
    text = cs.html_page(cs.ls({"https://me:hunter22@host/a.w": torch.ones(2)}))
    assert "hunter22" not in text


def test_a_histogram_counts_what_numpy_counts_and_zeros_and_what_is_not_finite() -> None:
    values = torch.tensor([0.0, 0.0, 1.0, 2.0, 3.0, float("nan"), float("inf"), -float("inf")])
    made = cs.ls({"w": values}, stats=True, histograms=True).stats
    assert made is not None
    found = made["w"].histogram
    assert found is not None
    expected, _ = torch.histogram(values[:5].double(), 32, range=(0.0, 3.0))
    assert list(found.counts) == [int(count) for count in expected]
    assert (found.zeros, found.nan, found.inf, found.total) == (2, 1, 2, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8, torch.bool, torch.float64])
def test_a_histogram_of_any_dtype_has_every_value(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    held = (torch.randn(1000) * 3).to(dtype)
    made = cs.ls({"w": held}, stats=True, histograms=True).stats
    assert made is not None
    found = made["w"].histogram
    assert found is not None
    assert found.total == 1000
    assert found.zeros == int((held == 0).sum())


def test_a_cell_of_the_heat_map_has_the_relative_change_of_its_tensors() -> None:
    ours, theirs = state(40), {key: value * 1.5 for key, value in state(40).items()}
    theirs["model.encoder.layers.0.norm.weight"] = ours["model.encoder.layers.0.norm.weight"]
    found = heatmap(cs.compare(ours, theirs))
    assert found is not None
    (panel,) = found.panels
    assert panel.rows == tuple(f"model.encoder.layers.{n}" for n in range(10))
    by_place = {(panel.rows[cell.row], panel.columns[cell.column]): cell for cell in panel.cells}
    assert by_place["model.encoder.layers.0", "norm.weight"].level == "same"
    assert by_place["model.encoder.layers.7", "norm.weight"].title.startswith("relative 0.5,")


def test_areas_of_a_treemap_are_as_the_sizes() -> None:
    sizes = [500, 300, 120, 50, 20, 9, 1]
    areas = squarified(sizes, 0, 0, 100, 40)
    for size, (x, y, width, height) in zip(sizes, areas, strict=True):
        assert math.isclose(width * height, size / 1000 * 4000, rel_tol=1e-9)
        assert x + width <= 100 + 1e-6
        assert y + height <= 40 + 1e-6


def test_the_page_of_a_fit_has_the_recipe_and_that_of_a_training_checkpoint_its_parameters(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    held = {f"module.{key}": value for key, value in model.state_dict().items()}
    fitted = Reader(cs.html_page(cs.fit(held, nn.Linear(3, 2))))
    assert set(fitted.names()) >= {"weight", "bias"}
    assert any("[[edit]]" in text for text in fitted.texts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "last.ckpt")
    trained = Reader(cs.html_page(cs.training_of(tmp_path / "last.ckpt")))
    assert set(trained.names()) == {"weight", "bias"}


def test_there_is_no_page_of_a_record_without_pictures() -> None:
    with pytest.raises(EditError, match="no page of a Hashes"):
        cs.html_page(cs.hash({"w": torch.ones(2)}))  # type: ignore[arg-type]


# -- the option


def commands(folder: Path) -> list[tuple[str, ...]]:
    return [
        ("ls", "a.pth"), ("ls", "a.pth", "b.pth", "--stats"), ("diff", "a.pth", "b.pth"),
        ("diff", "a.pth", "b.pth", "--values"), ("align", "a.pth", "b.pth"), ("ls", "last.ckpt", "--training"),
        ("fit", "a.pth", "torch.nn:Linear(3, 2)", "out.pth"),
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    torch.save(model.state_dict(), "a.pth")
    torch.save({key: value + 1 for key, value in model.state_dict().items()}, "b.pth")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "last.ckpt")
    return tmp_path


@pytest.mark.parametrize("number", range(7))
def test_a_command_writes_a_page_beside_what_it_prints(number: int, folder: Path, ckpt: Run) -> None:
    words = commands(folder)[number]
    plain = ckpt(*words)
    Path("out.pth").unlink(missing_ok=True)
    ran = ckpt(*words, "--html", "page.html")
    assert (ran.status, ran.err) == (plain.status, "")
    assert ran.out.startswith(plain.out.rstrip("\n"))
    assert ran.out.splitlines()[-1].startswith("wrote page.html: ")
    assert "weight" in "".join(Reader(Path("page.html").read_text("utf-8")).names())
    Path("out.pth").unlink(missing_ok=True)
    again = ckpt(*words, "--html", "page.html")
    assert again.status == 2
    assert "page.html: exists already" in again.err
    assert not Path("out.pth").exists()
    whole = ckpt(*words, "--html", "page.html", "--force", "--json")
    assert whole.status == plain.status
    json.loads(whole.out)


@pytest.mark.parametrize("number", range(7))
def test_a_page_never_replaces_a_file_that_the_command_reads_or_writes(number: int, folder: Path, ckpt: Run) -> None:
    words = commands(folder)[number]
    for name in dict.fromkeys(word for word in words if word.endswith((".pth", ".ckpt"))):
        before = Path(name).read_bytes() if Path(name).exists() else None
        ran = ckpt(*words, "--html", f"./{name}", "--force")
        assert ran.status == 2
        assert "no page is written over it" in ran.err
        assert before is None or Path(name).read_bytes() == before


def test_jinja_is_imported_for_pages_alone(folder: Path) -> None:
    script = (
        "import sys\nfrom ckpt_surgeon.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    print('jinja2' in sys.modules)"
    )
    for words, expected in ((["ls", "a.pth"], "False"), (["ls", "a.pth", "--html", "p.html"], "True")):
        done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == expected
