"""What was mistyped, or is called otherwise elsewhere, is answered with the way on."""

from __future__ import annotations

import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import click
import pytest
import torch
from command_line import Run

from ckpt_surgeon.cli import GROUPS, cli
from ckpt_surgeon.cli.suggesting import CALLED_ELSEWHERE
from ckpt_surgeon.edits.change import EDITS


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.weight": torch.ones(2, 3), "fc.bias": torch.ones(2), "layer1.conv.weight": torch.ones(2)}, "m.pth")
    return "m.pth"


# -- commands


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("lss", "ckpt ls"),
        ("inspect", "ckpt ls"),
        ("show", "ckpt ls"),
        ("rename-keys", "ckpt rename"),
        ("rename_keys", "ckpt rename"),
        ("soup", "ckpt average"),
        ("avgerage", "ckpt average"),
        ("compare", "ckpt diff"),
        ("strip_prefix", "ckpt strip-prefix"),
        ("resize-token-embeddings", "ckpt resize-rows"),
        ("recipes", "ckpt recipe"),
    ],
)
def test_a_command_that_is_not_there_is_answered_with_the_one_that_was_meant(word: str, meant: str, ckpt: Run) -> None:
    ran = ckpt(word, "m.pth")
    assert ran.status == 2
    assert re.search(rf"there is no command '{word}'; did you mean {meant}\b", ran.err), ran.err
    assert ran.err.count("ckpt ") <= 5


def test_a_word_that_is_like_no_command_is_answered_with_the_list(ckpt: Run) -> None:
    assert "there is no command 'xyzzy'; ckpt --help lists all" in ckpt("xyzzy").err


def test_the_words_of_other_tools_are_no_commands_here_and_each_has_one_meaning() -> None:
    there = set(cli.list_commands(click.Context(cli)))
    words = [word for names in CALLED_ELSEWHERE.values() for word in names]
    assert len(words) == len(set(words))
    assert not there & set(words)


# -- groups


def test_the_help_groups_every_command_once(ckpt: Run) -> None:
    shown = ckpt("--help").out
    titles = re.findall(r"^(\w[\w ]*):$", shown, re.M)
    assert titles == ["Options", *GROUPS]
    assert titles[1:4] == ["Look", "Edit keys", "Edit values"]
    rows = re.findall(r"^  ([a-z][\w-]*)  +\S", shown, re.M)
    assert sorted(rows) == sorted(cli.list_commands(click.Context(cli)))
    assert len(rows) == len(set(rows))


def test_an_edit_that_takes_other_checkpoints_is_grouped_with_those_that_combine() -> None:
    assert {EDITS["join"].group, EDITS["graft"].group} == {"Combine"}
    assert {EDITS["rename"].group, EDITS["drop"].group} == {"Edit keys"}
    assert {EDITS["cast"].group, EDITS["concat"].group} == {"Edit values"}


@pytest.mark.parametrize("flag", ["-V", "--version"])
def test_the_version_is_told(flag: str, ckpt: Run) -> None:
    assert ckpt(flag).out == f"ckpt, version {version('ckpt_surgeon')}\n"


# -- files, patterns, dtypes


def test_a_mistyped_file_is_answered_with_the_file_beside_it(model: str, ckpt: Run) -> None:
    Path("clean.pth").write_bytes(Path(model).read_bytes())
    assert ckpt("ls", "claen.pth").err == "ckpt: claen.pth: does not exist; there is clean.pth\n"


@pytest.mark.parametrize(
    ("pattern", "offered"),
    [
        ("fc", "'fc.*' would match 2 keys"),
        ("fc.", "'fc.*' would match 2 keys"),
        ("conv", "'*.conv.*' would match 1 key"),
        ("conv.weight", "'*.conv.weight' would match 1 key"),
        ("fc.wieght", "there is 'fc.weight'"),
        ("layre1.*", "there are keys 'layer1.*'"),
    ],
)
@pytest.mark.parametrize("command", ["drop", "ls"])
def test_a_pattern_without_a_key_is_answered_with_one_that_has_some(
    command: str, pattern: str, offered: str, model: str, ckpt: Run
) -> None:
    ran = ckpt(command, model, *(["out.pth"] if command == "drop" else []), pattern)
    assert ran.status == 2
    assert f"pattern '{pattern}' matches no key: {offered}" in ran.err


def test_a_pattern_that_is_like_nothing_is_answered_with_keys(model: str, ckpt: Run) -> None:
    assert "'zzz' matches no key (the keys are 'fc.weight'" in ckpt("ls", model, "zzz").err


def test_a_dtype_that_is_not_there_is_answered_with_its_neighbours_alone(model: str, ckpt: Run) -> None:
    ran = ckpt("cast", model, "out.pth", "--dtype", "fp12")
    assert "no dtype is called 'fp12'; did you mean fp32 or fp16?" in ran.err
    assert len(ran.err) < 200


# -- targets


@pytest.mark.parametrize(
    ("target", "way"),
    [
        ("torch.nn.Linear(3, 2)", "write torch.nn:Linear(3, 2)"),
        ("torchvision.models.resnet18", "write torchvision.models:resnet18"),
        ("torchvision:resnt18", "did you mean"),
        ("timm:resnt18", "did you mean"),
        ("transformers:BertModel", "BertModel(BertConfig())"),
    ],
)
@pytest.mark.parametrize("command", ["diff", "align"])
def test_a_target_that_is_spelled_otherwise_is_answered_with_its_spelling(
    command: str, target: str, way: str, model: str, ckpt: Run
) -> None:
    if find_spec(re.split(r"[.:]", target)[0]) is None:
        pytest.skip("the package is not installed")
    ran = ckpt(command, model, target)
    assert ran.status == 2
    assert way in ran.err
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize("target", ["torchvision:resnet18", "timm:resnet18"])
def test_the_name_of_a_library_and_of_a_model_in_it_is_a_target(target: str, model: str, ckpt: Run) -> None:
    if find_spec(target.partition(":")[0]) is None:
        pytest.skip("the package is not installed")
    assert ckpt("diff", model, target).status == 1


def test_what_a_target_is_told_to_be_can_be_built(model: str, ckpt: Run) -> None:
    ran = ckpt("diff", model, "torch.nn.Linear(3, 2)")
    assert ckpt("diff", model, ran.err.rpartition("write ")[2].strip()).status == 1


def test_a_file_with_dots_in_its_name_is_no_model(model: str, ckpt: Run) -> None:
    Path("model.py").touch()
    assert "does not exist" in ckpt("diff", model, "model.pth").err
    assert "does not exist" in ckpt("diff", model, "my.model.pth").err
