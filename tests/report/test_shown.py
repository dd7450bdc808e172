"""Every public record: one short line as repr, the command line's text as str, a table in a notebook."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import ckpt_surgeon
from ckpt_surgeon.cli import cli
from ckpt_surgeon.text import Shown

cs: Any = ckpt_surgeon

KEYS = 1000
VALUES = {"ByteSpan", "DType", "RemotePath"}  # small values, no reports
HOSTILE = "<script>alert('x')</script>&\x1b[31m\u202e"


class Many(nn.Module):
    """A model of a thousand keys."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(KEYS // 2))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Many()


@pytest.fixture(scope="module")
def folder(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the model, one with other names and values, one with hostile names."""
    made = tmp_path_factory.mktemp("shown")
    state = model.state_dict()
    torch.save(state, made / "many.pth")
    torch.save({f"module.{key}": value + 1 for key, value in state.items()}, made / "other.pth")
    torch.save({**{HOSTILE + str(n): torch.full((2,), float(n)) for n in range(3)}, HOSTILE: nn.Linear(2, 2)},
               made / "hostile.pth")  # fmt: skip
    torch.save({HOSTILE + str(n): torch.full((2,), n + 0.5) for n in range(1, 5)}, made / "hostile2.pth")
    return made


def records_of(folder: Path, first: str, second: str) -> dict[str, object]:
    """A record of every kind that can be had of two files."""
    a, b, out = folder / first, folder / second, folder / "out"
    select = {"select": "."} if "hostile" in first else {}
    checkpoint = cs.open(a, **select)
    key, tensor = next(iter(checkpoint.items()))
    values = cs.compare(checkpoint, b)
    alignment = cs.align(checkpoint, b)
    recipe = cs.Recipe((cs.step("rename", pairs=[[f"^{key}$", "new"]]),))
    change = cs.add_prefix.plan(checkpoint, "x.")
    hashes = cs.hash(checkpoint)
    stats = cs.stats(checkpoint)
    scan = cs.scan(a)
    found: dict[str, object] = {
        "Alignment": alignment, "Ambiguity": cs.Ambiguity((key,) * KEYS, (key,) * KEYS, "why"), "Change": change,
        "Checkpoint": checkpoint, "Diff": cs.diff(checkpoint, b), "Hashes": hashes, "Scan": scan,
        "Listing": cs.ls(a, **select), "Recipe": recipe, "Step": recipe.steps[0], "Stats": stats[key],
        "StatsByKey": stats, "StoredTensor": tensor, "Storage": tensor.storage, "ValueDiff": values,
        "Changed": cs.compare({key: tensor}, {key: torch.full((2,), 9.0)}).changed[0], "Name": scan.names[0],
        "ComputedTensor": cs.cast(checkpoint, "float16")[key], "OpaqueTensor": cs.from_torch(
            {key: torch.eye(2).to_sparse()})[key], "Proposal": cs.Proposal(key, key, "same name", "certain"),
        "Mismatch": cs.Mismatch(key, "[2]", "[3]"), "Hint": cs.Hint(key, ("strip-prefix",), 1),
        "Check": cs.check(a, cs.CheckRules(forbidden=("*",)), **select), "BrokenRule": cs.BrokenRule("keys.only", key),
        "CheckRules": cs.CheckRules.of(checkpoint.tensors),
        "Plan": cs.save(checkpoint, out.with_suffix(".pth"), force=True), "LeftOut": cs.LeftOut(key, key),
        "Expected": cs.Expected(tensor.dtype, tensor.shape, True), "Inert": cs.Inert(key, {key: 1}),
        "Outcome": cs.Outcome(key, "as is", key, 4), "Rule": cs.Rule(key, [key] * KEYS),
        "Rules": cs.Rules((cs.Rule(key, key),) * KEYS),
        "GroupSummary": cs.GroupSummary(key, (key,) * KEYS, 4, 0.1, None),
        "ModuleState": cs.ModuleState(key, key, 1, 2),
    }  # fmt: skip
    copy = folder / "copy.pth"
    copy.write_bytes(b.read_bytes())
    key = next(iter(cs.open(b)))
    found["InPlace"] = cs.plan_in_place(copy, cs.step("rename", pairs=[[f"^{key}$", "a"]]))
    return found


def run_records(folder: Path, model: nn.Module) -> dict[str, object]:
    """The records of a training checkpoint, and of one that is a folder."""
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    inside = folder / "run"
    inside.mkdir()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}, folder / "last.ckpt")
    cs.save(model, inside / "model.safetensors")
    torch.save(optimizer.state_dict(), inside / "optimizer.pt")

    def make_run() -> tuple[nn.Module, torch.optim.Optimizer]:
        made = Many()
        return made, torch.optim.SGD(made.named_parameters(), lr=0.1, momentum=0.9)

    return {
        "Run": cs.open_run(folder / "last.ckpt"),
        "RunFolder": cs.open_run(inside),
        "Training": cs.training_of(folder / "last.ckpt"),
        "RunPair": cs.RunPair("a" * KEYS, ("b",) * KEYS),
        "RunPairs": cs.RunPairs((cs.RunPair("a", ("b",)),) * KEYS, {"c": "why"}, 0.0, (1, 3, 8, 8)),
        "Made": cs.Made("a", ("b",) * KEYS, (0, 1), "why"),
        "ResumeCheck": cs.resume_check(folder / "last.ckpt", folder / "last.ckpt", make_run, steps=1),
    }


@pytest.fixture(scope="module")
def records(folder: Path, model: nn.Module) -> Mapping[str, object]:
    path = folder / "many.pth"
    return (
        records_of(folder, "many.pth", "other.pth")
        | run_records(folder, model)
        | {
            "Fit": cs.fit(path, model),
            "LoadReport": cs.load_into(model, path),
            "Trainable": cs.trainable(model),
            "ParamGroups": cs.param_groups(model, [cs.Rule("first", "layers.0.*")], lr=0.1),
            "Initialized": cs.initialize(Many(), "layers.*", "zeros"),
        }
    )


def public_records() -> list[str]:
    found = []
    for name in ckpt_surgeon.__all__:
        thing = getattr(ckpt_surgeon, name)
        if inspect.isclass(thing) and not issubclass(thing, Exception) and name not in VALUES:
            found.append(name)
    return found


@pytest.mark.parametrize("name", public_records())
def test_a_record_is_one_short_line_as_repr_and_a_table_in_a_notebook(name: str, records: Mapping[str, object]) -> None:
    record = records[name]
    assert isinstance(record, getattr(ckpt_surgeon, name))
    assert isinstance(record, Shown)
    assert len(repr(record)) < 200
    assert "\n" not in repr(record)
    table = record._repr_html_()
    assert len(table) < 20_000
    ElementTree.fromstring(f"<div>{table}</div>")


def test_whatever_a_file_calls_its_keys_no_table_has_markup_of_it(folder: Path) -> None:
    for name, record in records_of(folder, "hostile.pth", "hostile2.pth").items():
        table = record._repr_html_()  # type: ignore[attr-defined]
        tags = {element.tag for element in ElementTree.fromstring(f"<div>{table}</div>").iter()}
        pictures = {"details", "summary", "svg", "g", "rect", "text", "title", "path", "br"}
        assert tags <= {"div", "table", "thead", "tbody", "tr", "th", "td", "p", "pre"} | pictures, name
        assert " id=" not in table, name  # ids of two cells would clash
        assert "\x1b" not in table + str(record), name
        assert "\u202e" not in table + str(record), name


def printed(*words: object) -> str:
    done = CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False, standalone_mode=False)
    return done.output.rstrip("\n")


COMMANDS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "ls": (lambda folder: cs.ls(folder / "many.pth"), ("ls", "many.pth")),
    "ls of an opened checkpoint": (lambda folder: cs.open(folder / "many.pth"), ("ls", "many.pth")),
    "diff": (lambda folder: cs.diff(folder / "many.pth", folder / "many.pth"), ("diff", "many.pth", "many.pth")),
    "diff of a model": (
        lambda folder: cs.diff(folder / "many.pth", "torch.nn:Conv2d(1, 1, 3)", hints=False),
        ("diff", "many.pth", "torch.nn:Conv2d(1, 1, 3)"),
    ),
    "values": (
        lambda folder: cs.compare(folder / "many.pth", folder / "other.pth"),
        ("diff", "--values", "many.pth", "other.pth"),
    ),
    "hash": (lambda folder: cs.hash(folder / "many.pth"), ("hash", "many.pth")),
    "scan": (lambda folder: cs.scan(folder / "hostile.pth"), ("scan", "hostile.pth")),
    "align": (lambda folder: cs.align(folder / "other.pth", folder / "many.pth"), ("align", "other.pth", "many.pth")),
    "convert": (
        lambda folder: cs.convert(folder / "many.pth", folder / "new.safetensors", force=True),
        ("convert", "many.pth", "new.safetensors", "--force"),
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_text_of_a_record_is_what_the_command_prints(name: str, folder: Path) -> None:
    make, (command, *words) = COMMANDS[name]
    there = [folder / word if word.endswith((".pth", ".safetensors")) else word for word in words]
    assert str(make(folder)) == printed(command, *there)


def test_the_text_of_a_fit_is_what_the_command_prints_before_it_says_what_it_wrote(folder: Path) -> None:
    out = folder / "fitted.pth"
    cs.save({"fc.weight": torch.ones(3, 2), "fc.bias": torch.ones(3)}, folder / "linear.pth", force=True)
    (folder / "fit_target.py").write_text(
        "import torch\n\n\ndef make():\n    return torch.nn.Sequential(torch.nn.Linear(2, 3))\n"
    )
    target = f"{folder / 'fit_target.py'}:make"
    found = cs.fit(folder / "linear.pth", target, min_certainty="likely")
    lines = printed("fit", folder / "linear.pth", target, out, "--min-certainty", "likely")
    assert lines.startswith(f"{found}\nwrote {out}: ")


def test_the_text_of_a_rename_in_place_is_what_the_command_prints(folder: Path) -> None:
    path = folder / "renamed.pth"
    path.write_bytes((folder / "other.pth").read_bytes())
    planned = cs.plan_in_place(path, cs.step("strip_prefix"))
    assert str(planned) == printed("strip-prefix", path, "--in-place", "--dry-run")


def test_the_text_of_what_is_trained_and_of_groups_is_what_the_commands_print() -> None:
    target = "torch.nn:Linear(2, 3)"
    assert str(cs.freeze(nn.Linear(2, 3))) == printed("freeze-plan", target)
    assert str(cs.param_groups(nn.Linear(2, 3), lr=0.1)) == printed("groups", target, "--lr", "0.1")


def test_a_record_from_another_process_is_shown_too(folder: Path) -> None:
    script = "import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb')))"
    hashes = cs.hash(folder / "other.pth")
    (folder / "hashes.pkl").write_bytes(pickle.dumps(hashes))
    done = subprocess.run([sys.executable, "-c", script, folder / "hashes.pkl"], capture_output=True, text=True)
    assert done.stdout.rstrip("\n") == str(hashes), done.stderr


def test_every_public_record_that_is_a_dataclass_leaves_its_repr_to_shown() -> None:
    for name in public_records():
        kind = getattr(ckpt_surgeon, name)
        if dataclasses.is_dataclass(kind):
            assert "__repr__" not in vars(kind) or kind.__repr__.__module__ != "dataclasses", name
