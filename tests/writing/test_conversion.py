"""The cookbook and the story of fine-tuning: their commands and Python run as they stand on the page.

``python tests/writing/test_conversion.py`` writes what they print today, and the recipes, into the pages.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import safetensors.torch
import torch
from command_line import Run
from tables import assert_same, elements, save_safetensors

import ckpt_surgeon
from ckpt_surgeon import Recipe

DOCS = Path(__file__).resolve().parents[2] / "docs"
COOKBOOK = DOCS / "cookbook.md"
FINE_TUNING = DOCS / "fine_tuning.md"
RUNS = DOCS / "runs.md"
COMBINING = DOCS / "combining.md"
PAGES = (COOKBOOK, FINE_TUNING, RUNS, COMBINING)
RECIPES = sorted((DOCS / "recipes").glob("*.toml"))

BLOCK = re.compile(r"^```(console|python|toml|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
STATUS = re.compile(r"  # exit status (\d+)$")

Command = Callable[[str], tuple[int, str]]


def console(body: str, run: Command) -> str:
    """A console block as it should read: every ``$`` line with its exit status, where not 0, and its output."""
    lines: list[str] = []
    for line in body.splitlines():
        if line.startswith("$ "):
            command = STATUS.sub("", line)
            status, said = run(command[2:])
            lines += [command + (f"  # exit status {status}" if status else ""), *said.splitlines()]
    return "\n".join(lines) + "\n"


def recipe(body: str) -> str:
    """A toml block as it should read: the recipe that begins like it, or that it names."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in RECIPES}
    named = texts.get(body.strip())
    return named or next(text for text in texts.values() if text.splitlines()[0] == body.splitlines()[0])


def played(text: str, run: Command, names: dict[str, object]) -> str:
    """The page after everything on it was run, in order; Python's names are shared by its blocks.

    A text block is what the Python block before it prints.
    """
    printed = ""

    def python(body: str) -> str:
        nonlocal printed
        out = io.StringIO()
        with redirect_stdout(out):
            exec(body, names)
        printed = "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())
        return body

    def play(found: re.Match[str]) -> str:
        language, body = found[1], found[2]
        make: dict[str, Callable[[], str]] = {
            "console": lambda: console(body, run),
            "toml": lambda: recipe(body),
            "python": lambda: python(body),
            "text": lambda: printed,
        }
        return f"```{language}\n{make[language]()}```"

    return BLOCK.sub(play, text)


def blocks(language: str, text: str) -> Iterator[str]:
    return (body for found, body in BLOCK.findall(text) if found == language)


def names_today() -> set[str]:
    """The keys of transformers' ViT, which have changed in its fifth version."""
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 4}
    return set(ViTModel(ViTConfig(**sizes, image_size=16), add_pooling_layer=False).state_dict())


@pytest.fixture
def kitchen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the recipes, to work in."""
    for path in RECIPES:
        shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


def test_the_cookbook_is_what_happens(kitchen: Path, ckpt: Run) -> None:
    if "layers.0.attention.q_proj.weight" not in names_today():
        pytest.skip("transformers before 5 has other names")

    def run(line: str) -> tuple[int, str]:
        ran = ckpt(*shlex.split(line)[1:])
        return ran.status, ran.out + ran.err

    text = COOKBOOK.read_text(encoding="utf-8")
    torch.manual_seed(0)
    names: dict[str, object] = {}
    assert played(text, run, names) == text, (
        "to write what happens into the page: python tests/writing/test_conversion.py"
    )
    vit, model = names["vit"], names["model"]
    assert isinstance(vit, torch.nn.Module)
    assert isinstance(model, torch.nn.Module)
    fused = vit.state_dict()["blocks.0.attn.qkv.weight"]
    loaded = model.state_dict()
    for part, name in zip(fused.chunk(3), "qkv", strict=True):
        assert elements(loaded[f"vit.layers.0.attention.{name}_proj.weight"]) == elements(part)
    assert_same(torch.load("once.pth"), torch.load("today.pth"))


@pytest.mark.parametrize("page", [FINE_TUNING, RUNS, COMBINING], ids=lambda page: page.stem)
def test_a_story_is_what_happens(page: Path, kitchen: Path, ckpt: Run) -> None:
    def run(line: str) -> tuple[int, str]:
        ran = ckpt(*shlex.split(line)[1:])
        return ran.status, ran.out + ran.err

    text = page.read_text(encoding="utf-8")
    with torch.random.fork_rng():
        assert played(text, run, {}) == text, (
            "to write what happens into the page: python tests/writing/test_conversion.py"
        )


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_the_cookbook_is_shown_and_valid(path: Path, ckpt: Run) -> None:
    assert path.read_text(encoding="utf-8") in {
        body for page in PAGES for body in blocks("toml", page.read_text("utf-8"))
    }
    assert ckpt("recipe", "check", path).status == 0
    loaded = Recipe.load(path)
    assert Recipe.loads(loaded.dumps()) == loaded


def state_of_timm() -> dict[str, torch.Tensor]:
    import timm

    sizes = {"img_size": 32, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
    model: torch.nn.Module = timm.create_model("vit_tiny_patch16_224", **sizes)
    return dict(model.state_dict())


def test_the_library_and_both_containers_give_the_same(kitchen: Path, ckpt: Run) -> None:
    state = state_of_timm()
    rules = Recipe.load("vit_timm_to_transformers.toml")
    wanted = rules.apply(state)
    assert ckpt("apply", "vit_timm_to_transformers.toml", save_safetensors(state, kitchen), "out.pth").status == 0
    assert_same(torch.load("out.pth"), wanted, order=False)
    ckpt_surgeon.save(rules.apply(ckpt_surgeon.from_torch(state)), "out.safetensors")
    assert_same(safetensors.torch.load_file("out.safetensors"), wanted, order=False)


def test_the_conversion_can_be_taken_back(kitchen: Path) -> None:
    state = state_of_timm()
    rules = Recipe.load("vit_timm_to_transformers.toml")
    split, renames = Recipe(rules.steps[:1]), Recipe(rules.steps[1:])
    apart = split.apply(state)
    back = renames.invert(apart).apply(rules.apply(state))
    parts = [f"blocks.{{n}}.attn.{part}_proj.*" for part in "qkv"]
    assert_same(ckpt_surgeon.concat(back, parts, "blocks.{n}.attn.qkv.*"), state)


def test_a_model_of_another_kind_is_refused_and_every_rule_without_a_key_is_named(kitchen: Path, ckpt: Run) -> None:
    state = state_of_timm()
    del state["cls_token"], state["norm.weight"], state["norm.bias"]
    ran = ckpt("apply", "vit_timm_to_transformers.toml", save_safetensors(state, kitchen), "out.pth")
    assert ran.status == 2
    assert "'^cls_token$' matches no key" in ran.err
    assert "'^norm' matches no key" in ran.err
    assert not Path("out.pth").exists()


def main() -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

    def run(line: str) -> tuple[int, str]:
        done = subprocess.run(["sh", "-c", line], env={**os.environ, "PATH": path, "COLUMNS": "100"},
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")  # fmt: skip
        return done.returncode, done.stdout

    with tempfile.TemporaryDirectory() as folder:
        for one in RECIPES:
            shutil.copy(one, folder)
        os.chdir(folder)
        for page in PAGES:
            page.write_text(played(page.read_text(encoding="utf-8"), run, {}), encoding="utf-8")


if __name__ == "__main__":
    main()
