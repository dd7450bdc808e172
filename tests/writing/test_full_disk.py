"""A disk that is full, over quota, broken or read-only at any call: the old output or the new one, and one line."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from command_line import Ran, Run
from file_calls import FULL, Failing, tree

import ckpt_surgeon
from ckpt_surgeon import step
from ckpt_surgeon.files import journal

MODEL = {f"module.layer{number}.weight": torch.full((48, 48), float(number)) for number in range(2)}
Tree = dict[str, bytes | None]
OLDER = {f"old.{key}": value + 9 for key, value in MODEL.items()}


@dataclass(frozen=True)
class Case:
    """A command, and what has to be there before it."""

    words: tuple[str, ...]
    prepare: Callable[[Path], object] = lambda folder: None

    @property
    def out(self) -> str:
        """The output, or the file that is changed in place."""
        words = [word for word in self.words if word.startswith(("out.", "adapter_", "in.", "recipe."))]
        return words[-1] if words else "out.safetensors"

    def ready(self, folder: Path) -> None:
        folder.mkdir()
        torch.save(MODEL, folder / "in.pth")
        self.prepare(folder)


def older(name: str, size: int | None = None) -> Callable[[Path], object]:
    return lambda folder: ckpt_surgeon.save(OLDER, folder / name, max_shard_size=size)


def interrupted(folder: Path) -> None:
    """A rename in place whose journal is whole and of which one patch was written."""
    planned = ckpt_surgeon.plan_in_place(folder / "in.pth", step("strip_prefix"))
    content = journal._Journal((folder / "in.pth").stat().st_size, planned.patches)
    journal._write_journal(journal.journal_path(folder / "in.pth"), content)
    offset, _, new = planned.patches[0]
    with open(folder / "in.pth", "r+b") as file:
        file.seek(offset)
        file.write(new)


def adapter(folder: Path) -> None:
    from safetensors.torch import save_file

    folder = folder / "adapter"
    folder.mkdir()
    weights = {f"base_model.model.fc.lora_{name}.weight": torch.ones(4, 4) for name in "AB"}
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')


def old_adapter(folder: Path) -> None:
    adapter(folder)
    ckpt_surgeon.convert(folder / "adapter", folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")


def recipe(folder: Path) -> None:
    (folder / "recipe.toml").write_text("[[edit]]\ndo = 'add-prefix'\nprefix = 'a.'\n")


def without_index(folder: Path) -> None:
    older("out.safetensors", 10_000)(folder)
    (folder / "out.safetensors.index.json").unlink()


SHARDED = ("--max-shard-size", "10kB")
CASES = {
    "a new file": Case(("convert", "in.pth", "out.safetensors")),
    "a new .pth": Case(("cast", "in.pth", "out.pth", "--dtype", "bf16")),
    "a file that is replaced": Case(("convert", "in.pth", "out.safetensors", "--force"), older("out.safetensors")),
    "a file that is replaced by itself": Case(("cast", "in.pth", "in.pth", "--dtype", "bf16", "--force")),
    "shards": Case(("convert", "in.pth", "out.safetensors", *SHARDED)),
    "shards that are replaced": Case(
        ("convert", "in.pth", "out.safetensors", *SHARDED, "--force"), older("out.safetensors", 10_000)
    ),
    "other shards": Case(
        ("convert", "in.pth", "out.safetensors", *SHARDED, "--force"), older("out.safetensors", 20_000)
    ),
    "shards for a file": Case(("convert", "in.pth", "out.pth", *SHARDED, "--force"), older("out.pth")),
    "a folder": Case(("convert", "in.pth", "out.dcp")),
    "a folder that is replaced": Case(("convert", "in.pth", "out.dcp", "--force"), older("out.dcp")),
    "in place": Case(("strip-prefix", "in.pth", "--in-place")),
    "a journal's recovery": Case(("recover", "in.pth"), interrupted),
    "a whole run": Case(("strip-prefix", "in.pth", "out.pth", "--whole", "--force"), older("out.pth")),
    "an index": Case(("index", "."), without_index),
    "an index that is replaced": Case(("index", ".", "--force"), older("out.safetensors", 10_000)),
    "an adapter": Case(("convert", "adapter", "adapter_model.safetensors"), adapter),
    "an adapter that is replaced": Case(("convert", "adapter", "adapter_model.safetensors", "--force"), old_adapter),
    "a recipe that is replaced": Case(("recipe", "invert", "recipe.toml", "-o", "recipe.toml", "--force"), recipe),
}


def attempts(
    case: Case, scratch: Path, ckpt: Run, *, ever_after: bool = False
) -> Iterator[tuple[Path, Tree, Tree, Ran]]:
    """Run a command on a disk that fails at call 0, 1, … with each error in turn, until it is not stopped any more.

    Gives the folder, what was there before, what is there after an undisturbed run, and how the run ended.
    """
    case.ready(scratch / "before")
    before = tree(scratch / "before")
    shutil.copytree(scratch / "before", scratch / "new")
    os.chdir(scratch / "new")
    assert ckpt(*case.words).status == 0
    new = tree(scratch / "new")
    for at in range(200):
        code = FULL[at % len(FULL)]
        folder = scratch / str(at)
        shutil.copytree(scratch / "before", folder)
        os.chdir(folder)
        failing = Failing(folder, at, code, ever_after=ever_after)
        with pytest.MonkeyPatch.context() as patch:
            failing.install(patch)
            ran = ckpt(*case.words)
        print(at, failing.calls[at : at + 1], code, ran)
        if not failing.happened:
            assert at > 2
            return
        assert ran.status in (0, 2), ran
        if ran.status == 2:
            print(failing.calls[at], os.strerror(code), ran.err)
            assert ran.err.startswith("ckpt: ")
            assert ran.err.count("\n") == 1, ran.err
            assert "unexpected" not in ran.err
        yield folder, before, new, ran
        shutil.rmtree(folder)
    raise AssertionError("it fails however often it is allowed")


@pytest.mark.parametrize("name", CASES)
def test_a_call_that_fails_leaves_the_old_output_or_the_new_one(
    name: str, tmp_path: Path, ckpt: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    case = CASES[name]
    kept = tmp_path / "kept"
    for folder, before, new, ran in attempts(case, tmp_path, ckpt):
        if ran.status == 0:
            if tree(folder) != new:  # files could not be removed in the end: they are named
                note = re.search(r"^note: \.\S+.* was left behind by .* ckpt recover (.*) removes it$", ran.out, re.M)
                assert note is not None
                assert ckpt("recover", note[1]).status == 0
            assert tree(folder) == new
        elif journal.is_pending(folder / "in.pth"):
            assert "ckpt recover finishes what was begun" in ran.err or case.words[0] == "recover"
            assert ckpt("recover", "in.pth").status == 0
            assert tree(folder) in (before, new)
        else:
            assert tree(folder) == before
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(folder, kept, symlinks=True)
    if kept.exists():
        os.chdir(kept)
        assert ckpt(*case.words).status == 0
        assert tree(kept) == new


MOVING = [name for name in CASES if name not in ("a new .pth", "a whole run", "an index", "a folder")]


@pytest.mark.parametrize("name", MOVING)
def test_a_disk_that_dies_at_any_call_leaves_what_recover_makes_the_old_output_or_the_new_one(
    name: str, tmp_path: Path, ckpt: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    case = CASES[name]
    for folder, before, new, ran in attempts(case, tmp_path, ckpt, ever_after=True):
        if tree(folder) not in (before, new):
            assert ckpt("recover", case.out).err.count("does not exist") in (0, case.out not in before)
        assert tree(folder) in (before, new), ran
