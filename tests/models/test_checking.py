"""check: every rule is kept by what keeps it and broken by what does not, and each format is what its readers take."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
import torch
from command_line import Run
from safetensors.torch import save_file

import ckpt_surgeon
from ckpt_surgeon import CheckRules, RecipeError

NAN, INF = float("nan"), float("inf")
EVIL = "<b>&\"'%0A\x1b]0;x\x07\u202e\n::error::FORGED, a:b"


def state() -> dict[str, torch.Tensor]:
    return {"fc.weight": torch.ones(3, 2), "fc.bias": torch.zeros(3), "bn.num_batches_tracked": torch.tensor(4)}


@pytest.fixture
def good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_file(state(), "good.safetensors", {"license": "MIT"})
    torch.save(state(), "good.pth")
    return tmp_path / "good.safetensors"


def broken(path: object, rules: str) -> list[tuple[str, str]]:
    found = ckpt_surgeon.check(str(path), CheckRules.loads(rules))
    assert not found.error
    return sorted((one.rule, one.key) for one in found.broken)


# A rule, what a good file keeps, and what it does not keep with the keys that the report names.
RULES: dict[str, tuple[str, str, list[str]]] = {
    "file.format": ("'safetensors'", "['torch zip', 'pickle']", [""]),
    "file.max_bytes": ("'1MB'", "100", [""]),
    "file.metadata": ("'lic*'", "['license', 'author']", [""]),
    "keys.required": ("'fc.*'", "['fc.*', 'head.*']", [""]),
    "keys.forbidden": ("'module.*'", "'fc.*'", ["fc.weight", "fc.bias"]),
    "keys.only": ("['fc.*', 'bn.*']", "'fc.*'", ["bn.num_batches_tracked"]),
    "tensors.max_bytes": ("24", "'23B'", ["fc.weight"]),
    "tensors.max_parameters": ("10", "9", [""]),
    "tensors.finite": ("'*'", "'head.*'", [""]),
    "tensors.dtypes": ("{ 'bn.*' = 'int64', '*' = 'float32' }", "{ '*' = ['float32', 'float16'] }",
                       ["bn.num_batches_tracked"]),
    "tensors.shapes": ("{ 'fc.weight' = [3, 2], '*.bias' = ['*'] }",
                       "{ 'fc.weight' = ['*', 3], 'fc.bias' = ['*'] }", ["fc.weight"]),
    "model.loads_into": ("'good.pth'", "'torch.nn:Linear(2, 3)'", [
        "weight", "bias", "fc.weight", "fc.bias", "bn.num_batches_tracked"]),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_kept_and_broken(rule: str, good: Path) -> None:
    table, _, entry = rule.partition(".")
    kept, wrong, keys = RULES[rule]
    assert broken(good, f"[{table}]\n{entry} = {kept}") == []
    assert broken(good, f"[{table}]\n{entry} = {wrong}") == sorted((rule, key) for key in keys)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e5m2", "complex64"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_one_value_that_is_not_finite_is_found_wherever_it_stands(dtype: str, value: float, tmp_path: Path) -> None:
    values = torch.ones(300_000)
    values[-1] = value
    torch.save({"a": torch.ones(2), "w": values.to(getattr(torch, dtype))}, tmp_path / "m.pth")
    found = ckpt_surgeon.check(tmp_path / "m.pth", CheckRules(finite=("*",)))
    counts = (1, 0) if value != value else (0, 1)
    assert [(one.key, one.message) for one in found.broken] == [
        ("w", f"1 of 300,000 values is not finite ({counts[0]} NaN, {counts[1]} inf)")
    ]


def test_ties_names_that_are_not_data_and_damage_are_found(good: Path) -> None:
    shared = torch.ones(2)
    torch.save({"a": shared, "b": shared}, "tied.pth")
    assert broken("tied.pth", "[tensors]\nuntied = true") == [("tensors.untied", "b")]
    assert broken(good, "[tensors]\nuntied = true\n[file]\nplain_data = true\nchecksums = true") == []
    torch.save(torch.nn.Linear(2, 2), "whole.pt")
    assert broken("whole.pt", "[file]\nplain_data = true") == [("file.plain_data", "")]
    raw = bytearray(Path("good.pth").read_bytes())
    at = raw.index(torch.ones(6).numpy().tobytes())
    raw[at] ^= 1
    Path("damaged.pth").write_bytes(raw)
    assert broken("damaged.pth", "[file]\nchecksums = true") == [("file.checksums", "")]


@pytest.mark.parametrize(("text", "said"), [
    ("[keys]\nrequird = 'a'", "line 2: unknown rule 'keys.requird' (did you mean 'keys.required'"),
    ("[tensor]\nfinite = '*'", "line 1: unknown entry 'tensor' (did you mean 'tensors'"),
    ("required = 'a'", "line 1: unknown entry 'required'"),
    ("[keys]\n\nonly = 3", "line 3: keys.only is a pattern or a list of patterns, not 3"),
    ("[file]\nformat = 'safetensor'", "(did you mean 'safetensors'?)"),
    ("[file]\nmax_bytes = 'much'", "line 2: file.max_bytes is a number of bytes such as '5GB', not 'much'"),
    ("[file]\nplain_data = 1", "line 2: file.plain_data is true or false, not 1"),
    ("[tensors.dtypes]\n'*' = 'bfloat'", "tensors.dtypes has no dtype 'bfloat' (did you mean 'bfloat16'"),
    ("[tensors.shapes]\n'*' = 3", "tensors.shapes has for '*' a list of sizes such as [10, '*'], not 3"),
    ("[tensors]\nmax_parameters = true", "tensors.max_parameters is a number above 0, not True"),
    ("", "asks for nothing"),
    ("[keys", "line 1"),
])  # fmt: skip
def test_rules_that_cannot_be_read_are_an_error_with_their_line(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(said)):
        CheckRules.loads(text)


def test_rules_made_of_a_file_are_kept_by_it_and_survive_being_written(good: Path, ckpt: Run) -> None:
    torch.save({"a[0]": torch.ones(2), **state()}, "odd.pth")
    for name, others in (("good.safetensors", "odd.pth"), ("odd.pth", "good.pth")):
        assert ckpt("check", name, "--write-rules", "made.toml", "--force").status == 0
        rules = CheckRules.load("made.toml")
        assert CheckRules.loads(rules.dumps()) == rules
        assert ckpt("check", name, "--rules", "made.toml").status == 0
        assert ckpt("check", others, "--rules", "made.toml").status == 1
    refused = ckpt("check", good, "--write-rules", "made.toml")
    assert (refused.status, "exists already" in refused.err) == (2, True)


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file whose name and keys are markup, line ends and commands."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"x{EVIL.replace('/', '')}.pth"
    torch.save({f"module.{EVIL}": torch.ones(2), "fc": torch.tensor([NAN])}, path)
    (tmp_path / "rules.toml").write_text("[keys]\nforbidden = 'module.*'\n[tensors]\nfinite = '*'\nuntied = true\n")
    return path


def test_junit_is_what_its_readers_count(evil: Path, good: Path, ckpt: Run) -> None:
    ran = ckpt("check", evil, good, "gone.pth", "--rules", "rules.toml", "--format", "junit")
    assert ran.status == 2
    root = ElementTree.fromstring(ran.out)
    suites = root.findall("testsuite")
    assert (root.tag, len(suites)) == ("testsuites", 3)
    for suite in suites:
        cases = suite.findall("testcase")
        assert int(suite.attrib["tests"]) == len(cases)
        for kind in ("failure", "error"):
            assert int(suite.attrib[f"{kind}s"]) == sum(case.find(kind) is not None for case in cases)
    failed = [case.attrib["name"] for case in suites[0] if case.find("failure") is not None]
    assert failed == ["keys.forbidden", "tensors.finite"]
    assert [suite.attrib["failures"] + suite.attrib["errors"] for suite in suites] == ["20", "00", "01"]
    assert "<b>" not in ran.out
    assert "\x1b" not in ran.out


def test_annotations_are_one_line_each_whatever_a_name_holds(evil: Path, ckpt: Run) -> None:
    ran = ckpt("check", evil, "--rules", "rules.toml", "--format", "github")
    assert ran.status == 1
    lines = ran.out.splitlines()
    form = re.compile(r"::error file=([^,:]*),title=([^,:]*)::(.*)")
    found = [form.fullmatch(line) for line in lines]
    assert [match[2] for match in found if match is not None] == ["keys.forbidden", "tensors.finite"]
    assert len(found) == 2
    assert all(match is not None and "::" in unquote(match[1]) for match in found)
    assert "%250A" in lines[0]


def test_json_has_all_of_every_file(evil: Path, good: Path, ckpt: Run) -> None:
    ran = ckpt("check", evil, good, "--rules", "rules.toml", "--json")
    found = json.loads(ran.out)
    assert (ran.status, found["passed"], [one["passed"] for one in found["files"]]) == (1, False, [False, True])
    assert [one["rule"] for one in found["files"][0]["broken"]] == ["keys.forbidden", "tensors.finite"]
    assert found["files"][0]["broken"][0]["key"] == f"module.{EVIL}"


def test_a_long_list_is_cut_and_full_shows_it(tmp_path: Path, ckpt: Run) -> None:
    torch.save({f"module.{n}": torch.ones(1) for n in range(50)}, tmp_path / "m.pth")
    (tmp_path / "r.toml").write_text("[keys]\nforbidden = 'module.*'\n")
    short, full = (ckpt("check", tmp_path / "m.pth", "--rules", tmp_path / "r.toml", *more).out
                   for more in ((), ("--full",)))  # fmt: skip
    assert "… and 39 more (--full lists all)" in short
    assert full.count("matches 'module.*'") == 50


@pytest.mark.parametrize(("words", "said"), [
    (["good.pth"], "give --rules"),
    (["good.pth", "good.pth", "--write-rules", "r.toml"], "takes one FILE"),
    (["good.pth", "--write-rules", "r.toml", "--json"], "go with --rules"),
    (["good.pth", "--rules", "gone.toml"], "gone.toml: cannot be opened"),
    (["good.pth", "--rules", "good.pth"], "is not UTF-8 text"),
])  # fmt: skip
def test_what_is_asked_wrongly_is_trouble(words: list[str], said: str, good: Path, ckpt: Run) -> None:
    ran = ckpt("check", *words)
    assert (ran.status, said in ran.err) == (2, True), ran.err


def test_a_model_that_cannot_be_built_is_told_and_is_trouble(good: Path, ckpt: Run) -> None:
    Path("r.toml").write_text("[model]\nloads_into = 'gone.py:Net'\n")
    ran = ckpt("check", good, "--rules", "r.toml")
    assert (ran.status, "not checked; gone.py:Net" in ran.out) == (2, True), ran.out + ran.err
