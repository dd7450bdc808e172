"""README.md and docs/ show what really happens: their commands and Python blocks are run, page by page, in order.

``python tests/test_pages.py`` writes what they print today, and the recipes, into all pages; with names
(``python tests/test_pages.py cookbook runs``) into these.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "support"))  # as pytest does
sys.path.append(str(Path(__file__).parent.parent / "fixtures"))

import pages
import torch
from command_line import Run
from pages import DOCS, PAGES, RECIPES, ROOT
from tables import assert_same, elements

from ckpt_surgeon import Recipe
from ckpt_surgeon.cli import COMMANDS
from ckpt_surgeon.edits.change import EDITS

HOW = "to write what happens into the page: python tests/test_pages.py"
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#]+)(?:#[^)]*)?\)")


def names_today() -> set[str]:
    """The keys of transformers' ViT, which have changed in its fifth version."""
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 4}
    return set(ViTModel(ViTConfig(**sizes, image_size=16), add_pooling_layer=False).state_dict())


def cookbook_is_true(names: dict[str, object]) -> None:
    """Compare, outside the page, what its commands have made with what the models hold."""
    vit, model = names["vit"], names["model"]
    assert isinstance(vit, torch.nn.Module)
    assert isinstance(model, torch.nn.Module)
    fused = vit.state_dict()["blocks.0.attn.qkv.weight"]
    loaded = model.state_dict()
    for part, name in zip(fused.chunk(3), "qkv", strict=True):
        assert elements(loaded[f"vit.layers.0.attention.{name}_proj.weight"]) == elements(part)
    assert_same(torch.load("once.pth"), torch.load("today.pth"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_shows_what_happens(page: Path, ckpt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands run in this process: others of the suite start them as processes."""
    if page.stem == "cookbook" and "layers.0.attention.q_proj.weight" not in names_today():
        pytest.skip("transformers before 5 has other names")
    monkeypatch.chdir(pages.kitchen(tmp_path / "try"))
    monkeypatch.setenv("COLUMNS", "100")
    text = page.read_text(encoding="utf-8")
    names: dict[str, object] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert pages.played(text, pages.in_process(ckpt), names) == text, f"{HOW} {page.stem}"
    if page.stem == "cookbook":
        cookbook_is_true(names)


def examples() -> str:
    return "".join(body for page in PAGES for body in pages.blocks("console", page.read_text("utf-8")))


@pytest.mark.parametrize("name", [*COMMANDS, *(edit.name for edit in EDITS.values())])
def test_every_command_has_an_example_on_a_page(name: str) -> None:
    assert f"$ ckpt {name} " in examples()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_shown_on_a_page_and_valid(path: Path, ckpt: Run) -> None:
    shown = {body for page in PAGES for body in pages.blocks("toml", page.read_text("utf-8"))}
    assert path.read_text(encoding="utf-8") in shown
    assert ckpt("recipe", "check", path).status == 0
    loaded = Recipe.load(path)
    assert Recipe.loads(loaded.dumps()) == loaded


@pytest.mark.parametrize("page", [*PAGES, *sorted(ROOT.glob("C*.md"))], ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page_lead_to_files(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link


def test_the_index_lists_every_page() -> None:
    listed = set(LINK.findall((DOCS / "README.md").read_text(encoding="utf-8")))
    assert {page.name for page in DOCS.glob("*.md")} - listed == {"README.md"}


def main(wanted: list[str]) -> None:
    os.environ["COLUMNS"] = "100"
    for page in PAGES:
        if wanted and page.stem not in wanted:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            os.chdir(pages.kitchen(Path(scratch) / "try"))
            torch.manual_seed(0)
            page.write_text(pages.played(page.read_text("utf-8"), pages.in_process(pages.here), {}), encoding="utf-8")
            os.chdir(ROOT)


if __name__ == "__main__":
    main(sys.argv[1:])
