"""What --json prints is what docs/json.md and docs/schemas say: every command, with and without what it may leave out.

``python tests/cli/test_json.py`` writes the tables of the page.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from jsonschema import Draft202012Validator
from safetensors.torch import save_file
from torch import nn

if __name__ == "__main__":  # as pytest does
    sys.path += [str(Path(__file__).parents[1] / "support"), str(Path(__file__).parents[2] / "fixtures")]

from json_schemas import PAGE, Schema, inside, page_with_tables, schemas
from pages import here

from ckpt_surgeon.cli import cli
from ckpt_surgeon.models.align import Alignment, Ambiguity, Made, Proposal
from ckpt_surgeon.report.alignments import alignment_json

Document = dict[str, Any]

MODELS = """
import torch
class Net(torch.nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.stem, self.bn, self.fc = torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, classes)
    def forward(self, x):
        return self.fc(self.bn(self.stem(x)))
class Fused(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(4, 12)
    def forward(self, x):
        return self.qkv(x)
class Split(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(4, 4) for _ in range(3))
    def forward(self, x):
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)
def run():
    model = Net()
    return model, torch.optim.Adam(model.parameters())
"""
RULES = "lr = 0.01\n[[group]]\nname = 'head'\nmatch = 'fc.*'\nlr = '10x'\n"
VALUES = ["diff", "net.pth", "changed.pth", "--values"]
# Each command with the status that it ends with, and what it prints in one way or another.
CASES: list[tuple[str, int, list[str]]] = [
    ("ls", 0, ["ls", "net.pth"]),
    ("ls", 0, ["ls", "net.safetensors", "--stats", "--check", "--sort", "size"]),
    ("ls", 0, ["ls", "odd.pth", "--all", "--stats"]),
    ("ls", 0, ["ls", "last.ckpt", "--all"]),
    ("listings", 0, ["ls", "net.safetensors", "last.ckpt", "odd.pth", "--all", "--stats"]),
    ("sizes", 0, ["ls", "net.pth", "--tree"]),
    ("sizes", 0, ["ls", "net.pth", "net.safetensors", "--tree"]),
    ("training", 0, ["ls", "last.ckpt", "--training"]),
    ("training", 0, ["ls", "optimizer.pt", "--training"]),
    ("diff", 0, ["diff", "net.pth", "models.py:Net"]),
    ("diff", 1, ["diff", "wrapped.pth", "models.py:Net(5)"]),
    ("diff", 1, ["diff", "wrapped.pth", "net.pth"]),
    ("diff", 1, ["diff", "other.pth", "models.py:Net"]),
    ("values", 0, ["diff", "net.pth", "net.safetensors", "--values"]),
    ("values", 1, [*VALUES, "--spectrum"]),
    ("values", 1, ["diff", "net.pth", "other.pth", "--values", "--tolerance", "0.5"]),
    (
        "values",
        1,
        [
            "diff",
            "base.safetensors",
            "merged.safetensors",
            "--values",
            "--adapter",
            "adapter.safetensors",
            "--alpha",
            "4",
        ],
    ),
    ("hash", 0, ["hash", "net.pth"]),
    ("scan", 0, ["scan", "net.pth"]),
    ("scan", 1, ["scan", "whole.pt"]),
    ("check", 0, ["check", "net.pth", "--rules", "check.toml"]),
    ("check", 2, ["check", "wrapped.pth", "gone.pth", "--rules", "check.toml"]),
    ("align", 0, ["align", "wrapped.pth", "models.py:Net"]),
    ("align", 1, ["align", "renamed.pth", "models.py:Net(5)"]),
    ("align", 0, ["align", "split.pth", "models.py:Fused", "--source", "models.py:Split"]),
    ("fit", 0, ["fit", "wrapped.pth", "models.py:Net(5)", "fitted.pth", "--on-mismatch", "zeros", "--force"]),
    ("fit", 0, ["fit", "renamed.pth", "models.py:Net", "fitted.pth", "--allow-missing", "*", "--force"]),
    ("freeze-plan", 0, ["freeze-plan", "models.py:Net", "stem.*"]),
    ("groups", 0, ["groups", "models.py:Net", "--rules", "rules.toml"]),
    ("resume-check", 0, ["resume-check", "last.ckpt", "last.ckpt", "models.py:run"]),
    ("resume-check", 1, ["resume-check", "last.ckpt", "later.ckpt", "models.py:run"]),
]


RARE = Alignment(
    (Proposal("q", "k", "the same values", "proven", (4, 2), ((2, 2, 2), (1, 0, 2))),),
    (Ambiguity(("a", "b"), ("c", "d"), "one shape"),),
    ("a", "b"),
    ("c", "d"),
    made=(
        Made("q", ("qkv",), (0, 3), "the same output", 1, 2, (4, 4, 4), (1, 0)),
        Made("experts.w", ("experts.0.w", "experts.1.w"), (0, 1), "numbers", stacked=1, certainty="certain"),
    ),
)  # an alignment with all that is seldom in one


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's checkpoint, and what each command compares it with."""
    folder = tmp_path_factory.mktemp("json")
    (folder / "models.py").write_text(MODELS)
    (folder / "rules.toml").write_text(RULES)
    (folder / "check.toml").write_text("[keys]\nforbidden = 'module.*'\n")
    names: dict[str, Any] = {}
    exec(MODELS, names)
    torch.manual_seed(0)
    model = names["Net"]()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    net = {key: value.clone() for key, value in model.state_dict().items()}
    run = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "args": {"lr": 0.1}}
    changed = {key: value + 1 if value.is_floating_point() else value for key, value in net.items()}
    strange = {"ünder": torch.tensor([float("nan"), float("inf")]), "twin": net["fc.bias"], "twin2": net["fc.bias"]}
    later = {**run, "optimizer": {**run["optimizer"], "state": {}}}
    saved = {
        "net.pth": net, "changed.pth": changed, "whole.pt": nn.Linear(2, 2), "last.ckpt": run, "later.ckpt": later,
        "wrapped.pth": {f"module.{key}": value for key, value in net.items()},
        "renamed.pth": {key.replace("stem", "input").replace("bn", "norm"): value for key, value in net.items()},
        "other.pth": {"stem.weight": net["stem.weight"].half(), "stem.bias": net["fc.weight"], "new": net["fc.bias"]},
        "odd.pth": {**strange, "sparse": torch.eye(2).to_sparse(), "x._extra_state": {"a": 1}},
        "optimizer.pt": optimizer.state_dict(), "split.pth": names["Split"]().state_dict(),
    }  # fmt: skip
    for name, value in saved.items():
        torch.save(value, folder / name)
    adapter = {f"base_model.model.fc.lora_{part}.weight": torch.ones(shape) for part, shape in
               {"A": (2, 4), "B": (3, 2)}.items()}  # fmt: skip
    merged = {**net, "fc.weight": net["fc.weight"] + 2}
    for name, tensors in (("net", net), ("base", net), ("merged", merged), ("adapter", adapter)):
        save_file(tensors, folder / f"{name}.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def documents(files: Path) -> Mapping[str, list[Document]]:
    """What all the commands print, by schema."""
    found: dict[str, list[Document]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(files)
        patch.setattr(sys, "argv", [])
        for name, status, words in CASES:
            ran = here(*words, "--json")
            assert ran.status == status, (words, ran.out)
            printed = "\n".join(line for line in ran.out.splitlines() if not line.startswith("ckpt: "))  # not stderr
            found.setdefault(f"ckpt_surgeon.{name}", []).append(json.loads(printed))
    found["ckpt_surgeon.align"].append(json.loads(alignment_json(RARE)))
    return found


@pytest.mark.parametrize("name", schemas())
def test_what_commands_print_is_what_the_schema_says(name: str, documents: Mapping[str, list[Document]]) -> None:
    schema = schemas()[name]
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(closed(schema))
    for found in documents[name]:
        assert list(found.items())[:2] == [("schema", name), ("version", 1)]
        assert [error.message for error in validator.iter_errors(found)] == []


def closed(node: Any) -> Any:
    """A schema that allows no other fields than its own: users' copies let later versions add some."""
    if isinstance(node, list):
        return [closed(each) for each in node]
    if not isinstance(node, dict):
        return node
    made = {name: closed(each) for name, each in node.items()}
    return {"additionalProperties": False, **made} if isinstance(node.get("properties"), dict) else made


def test_every_field_of_a_schema_is_printed_by_some_command(documents: Mapping[str, list[Document]]) -> None:
    known = schemas()
    listed = {field for name, schema in known.items() for field in fields_below(schema, schema, name)}
    printed = {field for name, found in documents.items() for one in found
               for field in fields_in(one, known[name], known[name], name)}  # fmt: skip
    assert sorted(listed - printed) == []


def fields_below(node: Schema, whole: Schema, where: str) -> Iterator[tuple[str, str]]:
    """Every field that a schema has: the object that it is in, by definition or path, and its name."""
    for name, one in node.get("properties", {}).items():
        yield where, name
        yield from fields_below(*stepped(one, whole, f"{where}.{name}"))


def fields_in(value: object, node: Schema, whole: Schema, where: str) -> Iterator[tuple[str, str]]:
    """The same of a document that it describes."""
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, dict):
            for name, one in each.items():
                if name in node.get("properties", {}):
                    yield where, name
                    inner, whole, there = stepped(node["properties"][name], whole, f"{where}.{name}")
                    by_name = isinstance(one, dict) and "additionalProperties" in node["properties"][name] and (
                        "properties" not in node["properties"][name])  # fmt: skip
                    yield from fields_in(list(one.values()) if by_name else one, inner, whole, there)


def stepped(one: Schema, whole: Schema, where: str) -> tuple[Schema, Schema, str]:
    """The object in a field, and what it is called: a definition's name, or the path."""
    inner, _ = inside(one, whole)
    reference = one.get("$ref") or one.get("items", {}).get("$ref")
    return inner, whole, reference or where


def test_every_command_with_json_is_tried() -> None:
    context = cli.make_context("ckpt", ["ls"], resilient_parsing=True)
    commands = {name: cli.get_command(context, name) for name in cli.list_commands(context)}
    take_json = {
        name
        for name, command in commands.items()
        if command is not None and not isinstance(command, click.Group) and takes_json(command)
    }  # fmt: skip
    assert take_json == {words[0] for _, _, words in CASES if words[0] in take_json}
    assert {title.removeprefix("ckpt_surgeon.") for title in schemas()} == {name for name, _, _ in CASES}


def takes_json(command: click.Command) -> bool:
    return any("--json" in one.opts for one in command.params)


def test_the_page_has_a_table_of_each_schema() -> None:
    text = PAGE.read_text("utf-8")
    assert text == page_with_tables(text), "to write it: python tests/cli/test_json.py"


if __name__ == "__main__":
    PAGE.write_text(page_with_tables(PAGE.read_text("utf-8")), "utf-8")
