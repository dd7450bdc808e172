"""Advice is followed: what an error tells to do works, and never ends in the same advice."""

from __future__ import annotations

import json
import re
import shutil
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from command_line import Ran, Run
from torch.utils._pytree import tree_map

import ckpt_surgeon

KEY = "module.fc.weight"


class Codes(torch.Tensor):
    """A wrapper subclass whose elements only its class can reach, as torchao's ``Int8Tensor`` is."""

    codes: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor) -> Codes:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def,override]
        if func is torch.ops.aten.detach.default:
            return Codes(args[0].codes, args[0].scale)
        plain = tree_map(lambda one: one.codes * one.scale if isinstance(one, Codes) else one, args)
        return func(*plain, **(kwargs or {}))


VALUES = {  # each, and what it is to be when other keys are chosen
    "cast IN OUT.pth --dtype bf16": "cast IN OUT.pth --dtype bf16 --except module.fc.weight",
    "scale IN OUT.pth module.* --factor 2": "scale IN OUT.pth module.fc.bias --factor 2",
}


def subclass() -> torch.Tensor:
    return Codes(torch.arange(6, dtype=torch.int8).reshape(2, 3), torch.tensor(0.5))


def per_tensor() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8)


def per_channel() -> torch.Tensor:
    return torch.quantize_per_channel(torch.ones(2, 3), torch.tensor([0.1, 0.2]), torch.zeros(2), 0, torch.qint8)


def sparse() -> torch.Tensor:
    return torch.eye(3).to_sparse()


def meta() -> torch.Tensor:
    return torch.empty(2, 3, device="meta")


MADE: dict[str, Callable[[], torch.Tensor]] = {
    "subclass": subclass,
    "per tensor": per_tensor,
    "per channel": per_channel,
    "sparse": sparse,
    "meta": meta,
}
COMMANDS = {
    "convert": "convert IN OUT.pth",
    "to safetensors": "convert IN OUT.safetensors",
    "to a folder": "convert IN OUT.dcp",
    "strip-prefix": "strip-prefix IN OUT.pth",
    "rename": "rename IN OUT.pth fc=head",
    "keep": "keep IN OUT.pth module.*",
    "edit": "edit IN OUT.pth --strip-prefix module.",
}


def saved(name: str, folder: Path, *, legacy: bool = False) -> Path:
    path = folder / "odd.pth"
    with warnings.catch_warnings(action="ignore"):
        state = {KEY: MADE[name](), "module.fc.bias": torch.ones(2)}
        torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    return path


def words(line: str, path: Path, folder: Path) -> list[str]:
    """A command of the table for one file."""
    return [str(path) if word == "IN" else str(folder / word) if word.startswith("OUT.") else word
            for word in line.split()]  # fmt: skip


def advised(said: str, line: str, path: Path, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The commands that a message tells to run, each with what names it there."""
    whole = [re.sub(r"OUT\.\w+", "OUT.pth", word) for word in line.split()]
    if "--whole" in said:
        yield "--whole", [*words(" ".join(whole), path, folder), "--whole"]
    if "ckpt drop" in said:
        yield "drop", ["drop", str(path), str(folder / "OUT.pth"), KEY]
    if "--in-place" in said:
        copy = folder / "copy" / path.name
        copy.parent.mkdir()
        shutil.copy(path, copy)
        yield "--in-place", ["rename", str(copy), "fc=head", "--in-place"]
    if "--allow-codes" in said:
        yield "--allow-codes", [*words(line, path, folder), "--allow-codes"]


def followed(ckpt: Run, line: str, path: Path, folder: Path) -> tuple[Ran, dict[str, Ran]]:
    """What a command says, and how it ends to do what that tells."""
    first = ckpt(*words(line, path, folder))
    ends: dict[str, Ran] = {}
    for name, command in advised(first.err, line, path, folder):
        for out in folder.glob("OUT.*"):
            shutil.rmtree(out) if out.is_dir() else out.unlink()
        ends[name] = ckpt(*command)
    return first, ends


@pytest.mark.parametrize("line", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize("name", MADE)
def test_what_an_error_on_a_tensor_that_is_more_than_elements_tells_to_do_works(
    name: str, line: str, ckpt: Run, tmp_path: Path
) -> None:
    path = saved(name, tmp_path)
    first, ends = followed(ckpt, line, path, tmp_path)
    assert first.status == 2
    assert set(ends) == {"--whole", "drop", "--in-place"}, first.err
    for advice, ran in ends.items():
        assert ran.status == 0, f"{first.err}\n{advice}: {ran.err}"


@pytest.mark.parametrize("line", VALUES)
@pytest.mark.parametrize("name", MADE)
def test_an_edit_of_values_that_are_not_there_is_told_to_choose_others(
    name: str, line: str, ckpt: Run, tmp_path: Path
) -> None:
    path = saved(name, tmp_path)
    refused = ckpt(*words(line, path, tmp_path))
    assert refused.status == 2
    assert "choose other keys by pattern" in refused.err
    assert "in-place" not in refused.err
    ends = dict(advised(refused.err, VALUES[line], path, tmp_path))
    assert set(ends) == {"--whole", "drop"}
    for command in ends.values():
        ran = ckpt(*command, "--force")
        assert ran.status == 0, ran.err


@pytest.mark.parametrize("name", MADE)
def test_values_of_other_keys_are_edited_while_the_file_is_kept_whole(name: str, ckpt: Run, tmp_path: Path) -> None:
    path, out = saved(name, tmp_path), tmp_path / "OUT.pth"
    assert ckpt("cast", path, out, "--dtype", "bf16", "--except", KEY, "--whole").status == 0
    with warnings.catch_warnings(action="ignore"):
        found = torch.load(out, weights_only=False)
    assert found["module.fc.bias"].dtype == torch.bfloat16
    assert type(found[KEY]) is type(MADE[name]())
    assert found[KEY].shape == MADE[name]().shape


@pytest.mark.parametrize("name", ["per tensor", "per channel", "sparse"])
def test_what_is_kept_whole_or_renamed_in_place_has_the_values_that_it_had(
    name: str, ckpt: Run, tmp_path: Path
) -> None:
    path, out = saved(name, tmp_path), tmp_path / "OUT.pth"
    assert ckpt("strip-prefix", path, out, "--whole").status == 0
    assert ckpt("strip-prefix", path, "--in-place").status == 0
    with warnings.catch_warnings(action="ignore"):
        for file in (out, path):
            found, wanted = torch.load(file, weights_only=False)["fc.weight"], MADE[name]()
            if wanted.is_sparse:
                assert torch.equal(found.to_dense(), wanted.to_dense())
            else:
                assert torch.equal(found.int_repr(), wanted.int_repr())
                assert torch.equal(found.dequantize(), wanted.dequantize())


@pytest.mark.parametrize("name", MADE)
def test_a_file_in_torchs_old_format_is_told_the_way_that_there_is(name: str, ckpt: Run, tmp_path: Path) -> None:
    path = saved(name, tmp_path, legacy=True)
    first, ends = followed(ckpt, "convert IN OUT.pth", path, tmp_path)
    assert first.status == 2
    assert set(ends) == {"drop"}
    assert ends["drop"].status == 0
    assert "torch.load" in first.err


def test_a_dtype_that_torch_has_not_is_renamed_in_place_or_left_out(ckpt: Run, tmp_path: Path) -> None:
    header = json.dumps(
        {
            KEY: {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]},
            "module.fc.bias": {"dtype": "U8", "shape": [5], "data_offsets": [3, 8]},
        }
    ).encode()
    path = tmp_path / "six.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    first, ends = followed(ckpt, "convert IN OUT.safetensors", path, tmp_path)
    assert (first.status, set(ends)) == (2, {"drop", "--in-place"})
    assert all(ran.status == 0 for ran in ends.values())
    with pytest.raises(ckpt_surgeon.EditError) as refused:
        ckpt_surgeon.load(path)
    assert "torch.load" not in str(refused.value)


def test_hashing_says_which_to_leave_out(ckpt: Run, tmp_path: Path) -> None:
    path = saved("per tensor", tmp_path)
    refused = ckpt("hash", path)
    assert (refused.status, f"'{KEY}'" in refused.err, "ckpt drop" in refused.err) == (2, True, True)
    assert ckpt("drop", path, tmp_path / "OUT.pth", KEY).status == 0
    assert ckpt("hash", tmp_path / "OUT.pth").status == 0


def test_comparing_values_says_which_to_leave_out(ckpt: Run, tmp_path: Path) -> None:
    path = saved("per tensor", tmp_path)
    refused = ckpt("diff", path, path, "--values")
    assert (refused.status, "ckpt drop" in refused.err) == (2, True)
    assert ckpt("drop", path, tmp_path / "OUT.pth", KEY).status == 0
    assert ckpt("diff", tmp_path / "OUT.pth", tmp_path / "OUT.pth", "--values").status == 0
