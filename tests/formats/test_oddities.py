"""Valid files of all kinds open as their oracle opens them, and ``ls --all`` and ``scan`` say what is in them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
from command_line import Run
from tables import assert_same, ramp
from unusual_files import EMPTY, SILERO, SPECIAL, UNUSUAL, UnusualFile, build, save, vanishing

import ckpt_surgeon

CASES = [pytest.param(*names, id="-".join(names)) for names in UNUSUAL]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], UnusualFile]:
    return cache(lambda family, name: build(family, name, tmp_path_factory.mktemp("odd")))


@pytest.fixture
def made(family: str, name: str, shelf: Callable[[str, str], UnusualFile]) -> UnusualFile:
    return shelf(family, name)


def without_extra_states(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a state_dict; what modules keep beside them has tests of its own."""
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize(("family", "name"), CASES)
def test_it_opens_as_its_oracle_opens_it(made: UnusualFile) -> None:
    loaded = ckpt_surgeon.load(made.path, select=made.select)
    assert_same(without_extra_states(loaded), made.state, strides=made.strides, ties=made.ties)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_all_that_is_no_tensor_is_listed_with_its_class_and_value(made: UnusualFile) -> None:
    listed = {entry.path: f"{entry.kind} {entry.value}" for entry in ckpt_surgeon.ls(made.path, all=True).objects}
    assert {path: listed.get(path, "")[: len(said)] for path, said in made.objects.items()} == made.objects


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), CASES)
def test_scan_tells_plain_data_from_the_rest(made: UnusualFile, ckpt: Run) -> None:
    ran = ckpt("scan", made.path)
    assert (ran.status, ran.err) == (int(made.suspect), "")
    if made.suspect:
        assert "not plainly data" in ran.out


@pytest.mark.parametrize(("family", "name"), CASES)
def test_the_list_has_no_control_characters_and_the_json_all_keys(made: UnusualFile, ckpt: Run) -> None:
    ran = ckpt("ls", made.path, "--all")
    assert (ran.status, ran.err) == (0, "")
    assert all(line.isprintable() for line in ran.out.splitlines())
    if made.select is None:
        tensors = json.loads(ckpt("ls", made.path, "--json").out)["tensors"]
        assert [tensor["name"] for tensor in tensors if "_extra_state" not in tensor["name"]] == list(made.state)


@pytest.mark.parametrize(("family", "name"), [case for case in CASES if case.values[0] != "keys"])
def test_it_becomes_a_file_that_torch_loads(made: UnusualFile, ckpt: Run, tmp_path: Path) -> None:
    options = ["--select", made.select] if made.select else []
    if ckpt_surgeon.open(made.path, select=made.select or None).part:
        assert ckpt("convert", made.path, tmp_path / "out.pth", *options).status == 2
        options.append("--allow-part")
    ran = ckpt("convert", made.path, tmp_path / "out.pth", "--quiet", *options)
    assert (ran.status, ran.out, ran.err) == (0, "", "")
    assert_same(without_extra_states(torch.load(tmp_path / "out.pth")), made.state)


def test_a_vanished_class_is_what_stops_torch(tmp_path: Path) -> None:
    with vanishing() as models:
        path = save(models.Net(), tmp_path)
    with pytest.raises(ModuleNotFoundError, match="vanished"):
        torch.load(path, weights_only=False)


@pytest.mark.real
def test_a_scripted_model_of_others_opens_as_torch_opens_it() -> None:
    if not SILERO.is_file():
        pytest.skip("it is not there; fetch it: python fixtures/fetch_real.py")
    with warnings.catch_warnings(action="ignore"):
        state = torch.jit.load(SILERO).state_dict()
    assert_same(ckpt_surgeon.load(SILERO), state, strides=True)


# -- storages larger than their tensors


@pytest.mark.parametrize("legacy", [False, True])
def test_bytes_that_belong_to_no_tensor_are_shown(legacy: bool, ckpt: Run, tmp_path: Path) -> None:
    path = save({"row": ramp(1000, 100)[3]}, tmp_path, legacy=legacy)
    assert "the storages hold 399.6 kB that belong to no tensor" in ckpt("ls", path).out
    (row,) = json.loads(ckpt("ls", path, "--json").out)["tensors"]
    assert (row["bytes"], row["storage_bytes"]) == (400, 400_000)


# -- tensors that are more than their elements


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", SPECIAL)
def test_a_tensor_that_is_more_than_its_elements_is_named_and_can_be_left_out(
    name: str, legacy: bool, ckpt: Run, tmp_path: Path
) -> None:
    special = SPECIAL[name]
    with warnings.catch_warnings(action="ignore"):
        path = save({"plain": ramp(2), "odd.one": special.make()}, tmp_path, legacy=legacy)
    listed = ckpt("ls", path)
    assert listed.status == 0
    assert f"({special.kind})" in next(line for line in listed.out.splitlines() if line.startswith("odd.one"))
    for out in ("out.pth", "out.safetensors"):
        refused = ckpt("convert", path, tmp_path / out)
        assert (refused.status, refused.out) == (2, "")
        assert f"'odd.one' ({special.kind})" in refused.err
        assert "leave them out by pattern" in refused.err
        assert not (tmp_path / out).exists()
        assert ckpt("drop", path, tmp_path / out, "odd.*", "--quiet").status == 0
        assert_same(ckpt_surgeon.load(tmp_path / out), {"plain": ramp(2)})
    with pytest.raises(ckpt_surgeon.EditError, match=r"'odd\.one' is a"):
        ckpt_surgeon.load(path)


# -- files without any tensor


@pytest.mark.parametrize("command", ["ls", "diff", "hash", "convert", "strip-prefix", "keep", "drop", "cast", "select"])
def test_a_file_without_a_tensor_is_an_error_for_every_command(command: str, ckpt: Run, tmp_path: Path) -> None:
    path, out = save({"epoch": 3}, tmp_path), tmp_path / "out.pth"
    words: dict[str, list[object]] = {
        "ls": [], "hash": [], "diff": [path], "keep": [out, "*"], "drop": [out, "*"], "select": [out, "--prefix", "a."],
        "cast": [out, "--dtype", "float16"],
    }  # fmt: skip
    ran = ckpt(command, path, *words.get(command, [out]))
    assert (ran.status, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert "no tensor" in ran.err
    assert not out.exists()


@pytest.mark.parametrize("name", EMPTY)
def test_what_a_file_without_a_tensor_holds_is_still_listed(name: str, ckpt: Run, tmp_path: Path) -> None:
    path = save(EMPTY[name], tmp_path)
    plain = ckpt("ls", path)
    assert (plain.status, plain.out, plain.err.count("\n")) == (2, "", 1)
    assert "ckpt ls --all" in plain.err
    listed = ckpt("ls", path, "--all")
    assert (listed.status, listed.err) == (0, "")
    if name == "numbers":
        assert ["epoch", "int", "3"] in [line.split() for line in listed.out.splitlines()]
