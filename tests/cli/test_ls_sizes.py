"""ls of several files, in another order, and as a tree of sizes; torch says what the numbers have to be."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torchvision
from command_line import Run

import ckpt_surgeon
from ckpt_surgeon.reading.sizes import ModuleSize, sizes


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    made: torch.nn.Module = torchvision.models.squeezenet1_1()
    assert isinstance(made.classifier, torch.nn.Module)
    made.classifier.half()
    return made


@pytest.fixture(scope="module")
def file(model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sizes") / "squeezenet.pth"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.pth"
    torch.save({"fc.weight": torch.ones(2, 3), "fc.bias": torch.ones(9), "a.weight": torch.ones(1)}, path)
    return path


def keys_in(out: str) -> list[str]:
    """The keys of the rows of a table."""
    return re.findall(r"^([\w.]+)  +\w+  +\[", out, re.M)


# -- several files


def test_files_that_exist_are_listed_one_below_the_other_each_under_its_name(
    file: Path, small: Path, ckpt: Run
) -> None:
    both = ckpt("ls", file, small).out
    assert both == ckpt("ls", file).out + "\n" + ckpt("ls", small).out
    assert f"\n{small}: torch zip" in both


def test_a_pattern_behind_files_chooses_in_each_of_them(small: Path, ckpt: Run) -> None:
    other = small.with_name("other.pth")
    torch.save({"fc.weight": torch.ones(1), "head.weight": torch.ones(1)}, other)
    assert keys_in(ckpt("ls", small, other, "fc.*").out) == ["fc.weight", "fc.bias", "fc.weight"]


def test_a_word_is_a_pattern_where_no_such_file_exists(small: Path, ckpt: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small.parent)
    assert keys_in(ckpt("ls", small, "a.weight").out) == ["a.weight"]
    torch.save({"other": torch.ones(1)}, "a.weight")
    assert keys_in(ckpt("ls", small, "a.weight").out) == ["fc.weight", "fc.bias", "a.weight", "other"]


def test_several_files_are_a_list_of_what_one_is_in_json(file: Path, small: Path, ckpt: Run) -> None:
    both = json.loads(ckpt("ls", file, small, "--json").out)["files"]
    alone = [json.loads(ckpt("ls", each, "--json").out) for each in (file, small)]
    assert [{"schema": "ckpt_surgeon.ls", "version": 1, **each} for each in both] == alone


# -- order


def test_sorted_by_size_the_largest_tensor_is_first(file: Path, model: torch.nn.Module, ckpt: Run) -> None:
    wanted = sorted(model.state_dict().items(), key=lambda item: -item[1].nbytes)
    assert keys_in(ckpt("ls", file, "--sort", "size").out) == [key for key, _ in wanted]


def test_sorted_by_name_or_as_in_the_file(small: Path, ckpt: Run) -> None:
    assert keys_in(ckpt("ls", small, "--sort", "name").out) == ["a.weight", "fc.bias", "fc.weight"]
    assert keys_in(ckpt("ls", small, "--sort", "file").out) == ["fc.weight", "fc.bias", "a.weight"]
    assert list(ckpt_surgeon.ls(small, sort="size").tensors) == ["fc.bias", "fc.weight", "a.weight"]


def test_folded_rows_sorted_by_size_have_the_most_bytes_first(file: Path, ckpt: Run) -> None:
    out = ckpt("ls", file, "--fold", "--sort", "size").out
    nbytes = [int(row.replace(",", "")) for row in re.findall(r"([\d,]+)$", out, re.M)]
    assert nbytes == sorted(nbytes, reverse=True)
    assert len(nbytes) > 10


def test_an_order_that_there_is_not_is_refused(small: Path, ckpt: Run) -> None:
    assert "'bytes' is not one of 'file', 'name', 'size'" in ckpt("ls", small, "--sort", "bytes").err
    with pytest.raises(ckpt_surgeon.EditError, match="sort is file, name or size, not 'bytes'"):
        ckpt_surgeon.ls(small, sort="bytes")


# -- the tree


def by_path(file: object, depth: int, sort: str = "file") -> Mapping[str, ModuleSize]:
    found = sizes(ckpt_surgeon.ls(file), depth=depth, sort=sort)  # type: ignore[arg-type]
    return {module.path: module for module in found.modules}


def test_every_module_has_the_parameters_and_bytes_that_torch_counts(file: Path, model: torch.nn.Module) -> None:
    found = by_path(file, depth=3)
    state = model.state_dict()
    for path, module in found.items():
        inside = [value for key, value in state.items() if not path or key == path or key.startswith(f"{path}.")]
        assert module.amount.tensors == len(inside)
        assert module.amount.parameters == sum(value.numel() for value in inside)
        assert module.amount.nbytes == sum(value.nbytes for value in inside)
        assert set(module.dtypes) == {str(value.dtype).removeprefix("torch.") for value in inside}
    assert {
        path for path, _ in model.named_modules() if path.count(".") <= 2 and model.get_submodule(path).state_dict()
    } <= set(found)


def test_the_shares_of_the_modules_of_a_module_are_its_share(file: Path) -> None:
    found = by_path(file, depth=2)
    below = [module.share for path, module in found.items() if path.startswith("features.")]
    assert sum(below) == pytest.approx(found["features"].share)
    assert found[""].share == 1.0


def test_tied_tensors_count_once(tmp_path: Path) -> None:
    shared = torch.ones(4, 4)
    torch.save({"embed.weight": shared, "head.weight": shared}, tmp_path / "tied.pth")
    found = by_path(tmp_path / "tied.pth", depth=1)
    assert (found[""].amount.nbytes, found["embed"].amount.nbytes, found["head"].amount.nbytes) == (64, 64, 0)


def test_depth_bounds_the_tree_and_zero_is_the_whole_alone(file: Path) -> None:
    assert list(by_path(file, depth=0)) == [""]
    assert list(by_path(file, depth=1)) == ["", "features", "classifier"]


def test_the_tree_is_printed_indented_with_shares_and_the_dtypes_of_all(file: Path, ckpt: Run) -> None:
    out = ckpt("ls", file, "--tree", "--depth", "1", "--sort", "size").out
    rows = out.splitlines()
    assert rows[3].startswith("(whole) ")
    assert "100 %" in rows[3]
    assert rows[4].startswith("  features ")
    assert "float16" in rows[5]
    assert re.search(r"^float16  +2 +513,000 +1.0 MB", out, re.M)


def test_the_tree_in_json_has_the_same_numbers(file: Path, small: Path, ckpt: Run) -> None:
    [sizes] = json.loads(ckpt("ls", small, "--tree", "--depth", "1", "--json").out)["files"]
    whole, fc, *_ = sizes["modules"]
    assert (whole["parameters"], whole["bytes"], fc["path"], fc["bytes"]) == (16, 64, "fc", 60)
    assert fc["dtypes"] == {"float32": {"tensors": 2, "parameters": 15, "bytes": 60}}
    assert len(json.loads(ckpt("ls", small, file, "--tree", "--json").out)["files"]) == 2


def test_an_empty_state_dict_has_a_tree(tmp_path: Path) -> None:
    assert by_path({}, depth=2)[""].amount.tensors == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--depth", "1"], "--depth goes with --tree"),
        (["--tree", "--fold"], "exclude each other"),
        (["--tree", "--stats"], "exclude each other"),
        (["--training", "--tree"], "--training shows one file"),
    ],
)
def test_options_that_do_not_go_together_are_refused(words: list[str], said: str, small: Path, ckpt: Run) -> None:
    ran = ckpt("ls", small, *words)
    assert (ran.status, ran.out) == (2, "")
    assert said in ran.err
