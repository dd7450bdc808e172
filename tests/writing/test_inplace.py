"""Keys renamed in place: torch and safetensors find the new names, and everything else as it was, byte for byte."""

from __future__ import annotations

import argparse
import os
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from command_line import Run
from tables import (
    pickle_of,
    ramp,
    rewritten,
    save_deflated,
    save_legacy,
    save_safetensors,
    save_shards,
    save_without_checksums,
    save_zip,
)
from torch import nn

import ckpt_surgeon
from ckpt_surgeon import EditError, FileError, KeyCollision, NoRoom, NothingMatched, Recipe, rename_in_place, step

STRIP = step("strip_prefix")


def add(prefix: str) -> ckpt_surgeon.Step:
    return step("add_prefix", prefix=prefix)


def rename(*pairs: str, regex: bool = False) -> ckpt_surgeon.Step:
    return step("rename", pairs=list(pairs), regex=regex)


def network() -> nn.Module:
    """A model with buffers, a tie, modules without tensors of their own, and keys that torch itself uses too ("0")."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Sequential(nn.BatchNorm2d(2)))
    model.register_module("head", nn.Linear(4, 4))
    model.register_module("tail", nn.Linear(4, 4))
    model.tail.weight = model.head.weight  # type: ignore[union-attr]
    return model


def parallel() -> dict[str, torch.Tensor]:
    return nn.DataParallel(network()).state_dict()


def training() -> dict[str, object]:
    """What a training loop saves: names said again in other places, objects, an averaged copy with its own tensors."""
    model = nn.DataParallel(network())
    optimizer = torch.optim.Adam(model.parameters())
    model.module.head(torch.ones(1, 4)).sum().backward()  # type: ignore[operator]
    optimizer.step()
    state = model.state_dict()
    return {
        "epoch": 3,
        "state_dict": state,
        "optimizer": optimizer.state_dict(),
        "param_names": list(state),
        "args": argparse.Namespace(arch="small", lr=0.1),
        "averages": {"of": [key for key in state if "weight" in key], "steps": torch.tensor(3)},
    }


def everything(value: object) -> object:
    """All that an object of torch.load is, to be compared: the order of keys, torch's _metadata, every bit."""
    if isinstance(value, torch.Tensor):
        raw = value.detach().contiguous().reshape(-1).view(torch.uint8).tolist() if value.numel() else []
        return ("tensor", value.dtype, tuple(value.shape), value.stride(), raw)
    if isinstance(value, dict):
        return (type(value), [(key, everything(item)) for key, item in value.items()], everything_in(value))
    if isinstance(value, (list, tuple)):
        return (type(value), [everything(item) for item in value])
    return value


def everything_in(state: object) -> object:
    metadata = getattr(state, "_metadata", None)
    return None if metadata is None else sorted((path, sorted(version.items())) for path, version in metadata.items())


def loaded(path: Path) -> object:
    return torch.load(path, weights_only=False)


def edited(state: dict[str, torch.Tensor], edit: ckpt_surgeon.Step) -> dict[str, torch.Tensor]:
    """The same edit on a state_dict of torch's."""
    result: dict[str, torch.Tensor] = edit.plan(state).result
    return result


def unchanged_outside(before: bytes, after: bytes, patches: Iterable[tuple[int, bytes, bytes]]) -> None:
    restored = bytearray(after)
    for offset, old, new in patches:
        assert after[offset : offset + len(new)] == new
        assert len(old) == len(new)
        restored[offset : offset + len(old)] = old
    assert bytes(restored) == before


# -- torch zips


ZIPS: dict[str, Callable[[object, Path], Path]] = {
    "torch's": save_zip,
    "torch's, without checksums": save_without_checksums,
    "python's": lambda state, folder: rewritten(save_zip(state, folder), folder / "python.pth"),
}


@pytest.mark.parametrize("name", ZIPS)
def test_a_training_checkpoint_keeps_all_but_its_prefix(name: str, tmp_path: Path) -> None:
    path = ZIPS[name](training(), tmp_path)
    path.chmod(0o640)
    before, raw, status = loaded(path), path.read_bytes(), path.stat()
    planned = rename_in_place(path, STRIP)
    assert isinstance(before, dict)
    wanted = {**before, "state_dict": edited(before["state_dict"], STRIP)}
    assert everything(loaded(path)) == everything(wanted)
    assert "head.weight" in wanted["state_dict"]
    unchanged_outside(raw, path.read_bytes(), planned.patches)
    assert (path.stat().st_ino, path.stat().st_mode, path.stat().st_size) == (
        status.st_ino,
        status.st_mode,
        status.st_size,
    )
    assert os.listdir(tmp_path).count(path.name) == 1
    assert not [left for left in os.listdir(tmp_path) if left.startswith(".")]
    if "without" not in name:
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
    assert ckpt_surgeon.ls(path, check=True).checked


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("state", [parallel, training, lambda: dict(parallel())], ids=["parallel", "training", "plain"])
def test_every_protocol_of_torch_is_rewritten(
    state: Callable[[], dict[str, object]], protocol: int, tmp_path: Path
) -> None:
    path = tmp_path / "model.pth"
    saved = state()
    if protocol >= 4:  # where the memo cannot be made smaller, the names that stay need more room than there is
        saved = {key: value for key, value in saved.items() if key not in ("param_names", "averages")}
    torch.save(saved, path, pickle_protocol=protocol)
    before = loaded(path)
    rename_in_place(path, STRIP)
    rename_in_place(path, rename("head=fc", "^0=first"))
    assert isinstance(before, dict)
    old = before.get("state_dict", before)
    new = edited(edited(old, STRIP), rename("head=fc", "^0=first"))
    wanted = new if old is before else {**before, "state_dict": new}
    assert everything(loaded(path)) == everything(wanted)
    if protocol == 2 and old is before:
        for mmap in (False, True):
            assert everything(torch.load(path, weights_only=True, mmap=mmap)) == everything(wanted)


def test_ties_stay_ties_and_the_result_loads_strictly(tmp_path: Path) -> None:
    path = save_zip(parallel(), tmp_path)
    rename_in_place(path, STRIP)
    state = torch.load(path, mmap=True)
    assert state["head.weight"].data_ptr() == state["tail.weight"].data_ptr()
    assert str(network().load_state_dict(state, strict=True)) == "<All keys matched successfully>"
    assert dict(state._metadata) == dict(network().state_dict()._metadata)  # type: ignore[attr-defined]


def test_what_is_in_the_room_of_the_old_index_does_not_disturb_the_next_rename(tmp_path: Path) -> None:
    path = save_zip(training(), tmp_path)
    before = loaded(path)
    size = path.stat().st_size
    assert isinstance(before, dict)
    state = before["state_dict"]
    for edit in (STRIP, add("net."), rename("^net=n"), rename("^n=module")):
        rename_in_place(path, edit)
        state = edited(state, edit)
    assert everything(loaded(path)) == everything({**before, "state_dict": state})
    assert list(state) == list(before["state_dict"])
    assert path.stat().st_size == size


def test_a_longer_name_finds_room_where_the_pickle_says_more_than_it_needs(tmp_path: Path) -> None:
    path = save_zip(network().state_dict(), tmp_path)
    before = loaded(path)
    rename_in_place(path, add("model."))
    assert isinstance(before, dict)
    assert everything(torch.load(path)) == everything(edited(before, add("model.")))


def test_what_ckpt_wrote_is_renamed_too(tmp_path: Path) -> None:
    source = save_zip(parallel(), tmp_path)
    path = tmp_path / "ours.pth"
    ckpt_surgeon.convert(source, path)
    rename_in_place(path, STRIP)
    assert everything(torch.load(path, mmap=True)) == everything(edited(torch.load(source), STRIP))


@pytest.mark.parametrize("key", ["größe.重み", "it's", "line\nbreak", 'say "hi"', "\\back", "x" * 300, "0", "module."])
@pytest.mark.parametrize("protocol", [2, 4])
def test_any_key_can_be_given_and_taken(key: str, protocol: int, tmp_path: Path) -> None:
    room = "r" * 400  # a key that is long enough for any other
    path = tmp_path / "model.pth"
    torch.save({room: ramp(2), "b": ramp(3)}, path, pickle_protocol=protocol)
    there = step("rename", pairs=[[f"^{room}$", re.sub(r"\\", r"\\\\", key)]], regex=True)
    rename_in_place(path, there)
    assert list(torch.load(path, weights_only=False)) == [key, "b"]
    rename_in_place(path, step("rename", pairs=[["(?s)" + re.escape(key), room]], regex=True))
    assert list(torch.load(path, weights_only=False)) == [room, "b"]


def test_names_that_the_pickle_says_in_two_places_change_in_one(tmp_path: Path) -> None:
    state = parallel()
    ema = OrderedDict((key, tensor + 1) for key, tensor in state.items())
    path = save_zip({"model": state, "ema": ema, "names": list(state)}, tmp_path)
    before = loaded(path)
    rename_in_place(path, STRIP, select="ema")
    assert isinstance(before, dict)
    assert everything(loaded(path)) == everything({**before, "ema": edited(before["ema"], STRIP)})


def test_names_that_stay_elsewhere_and_have_no_room_are_told(tmp_path: Path) -> None:
    state = parallel()
    path = tmp_path / "model.pth"
    torch.save({"model": state, "param_names": list(state)}, path, pickle_protocol=4)
    raw = path.read_bytes()
    with pytest.raises(
        NoRoom, match=r"that are there \(because its names are also in 'param_names', where they stay\);"
    ) as refused:
        rename_in_place(path, STRIP)
    assert refused.value.needed > refused.value.room
    assert path.read_bytes() == raw


def test_a_key_that_is_the_number_of_a_storage_too_changes_alone(tmp_path: Path) -> None:
    path = save_zip({"0": ramp(2), "1": ramp(3), "longer": ramp(4)}, tmp_path)
    rename_in_place(path, rename("^0=zero", "^longer=l"))
    assert everything(torch.load(path)) == everything({"zero": ramp(2), "1": ramp(3), "l": ramp(4)})


def test_nested_dicts_are_renamed_where_their_nesting_stays(tmp_path: Path) -> None:
    body, head = nn.Sequential(nn.BatchNorm1d(2)).state_dict(), nn.Linear(2, 2).state_dict()
    path = save_zip({"backbone": body, "classifier": head}, tmp_path)
    assert "backbone.0.weight" in ckpt_surgeon.open(path)
    rename_in_place(path, rename("backbone=body", "classifier=head", "weight=w"))
    found = torch.load(path)
    assert list(found) == ["body", "head"]
    assert list(found["body"]) == ["0.w", *list(body)[1:]]
    assert dict(found["body"]._metadata) == dict(body._metadata)  # type: ignore[attr-defined]
    assert ckpt_surgeon.open(path).versions == {
        "body": {"version": 1}, "body.0": {"version": 2}, "head": {"version": 1}
    }  # fmt: skip


@pytest.mark.parametrize("edit", [add("m."), rename("^head=the.head"), rename("^body=b")])
def test_the_outermost_of_nested_names_may_have_more_parts_or_fewer(edit: ckpt_surgeon.Step, tmp_path: Path) -> None:
    path = save_zip({"body": {"fc.weight": ramp(2)}, "head": {"fc.bias": ramp(2)}}, tmp_path)
    planned = rename_in_place(path, edit)
    assert list(ckpt_surgeon.open(path)) == list(planned.change.result)
    assert [list(inner) for inner in torch.load(path).values()] == [["fc.weight"], ["fc.bias"]]


def test_wrappers_inside_go_with_their_versions(tmp_path: Path) -> None:
    model = nn.Sequential(nn.DataParallel(nn.BatchNorm1d(3)), nn.Linear(3, 3))
    path = save_zip(model.state_dict(), tmp_path)
    edit = step("strip_prefix", wrappers=True)
    wanted = edited(model.state_dict(), edit)
    rename_in_place(path, edit)
    assert everything(torch.load(path)) == everything(wanted)


class Trained(nn.Module):
    """A model in a module of a training framework, with losses and metrics beside it that have no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.model, self.loss, self.metric = nn.Identity(), network(), nn.MSELoss(), nn.Identity()


def test_modules_without_tensors_beside_the_prefix_leave_torch_s_metadata(tmp_path: Path) -> None:
    path = save_zip({"state_dict": Trained().state_dict()}, tmp_path)
    before = torch.load(path)["state_dict"]
    assert {"", "before", "model", "loss", "metric"} <= set(before._metadata)
    edit = step("strip_prefix", prefix="model.")
    rename_in_place(path, edit)
    assert everything_in(torch.load(path)["state_dict"]) == everything_in(edited(before, edit))
    assert dict(torch.load(path)["state_dict"]._metadata) == dict(network().state_dict()._metadata)  # type: ignore[attr-defined]
    rename_in_place(path, add("model."))
    assert list(torch.load(path)["state_dict"]) == list(before)


# -- safetensors


def test_a_safetensors_header_keeps_its_length_its_order_and_its_metadata(tmp_path: Path) -> None:
    source = save_safetensors(parallel(), tmp_path)
    path = tmp_path / "ours.safetensors"
    ckpt_surgeon.save(ckpt_surgeon.open(source), path, metadata={"licence": "none, größe", "format": "pt"})
    raw = path.read_bytes()
    wanted = edited(dict(safetensors_of(path)), STRIP)
    planned = rename_in_place(path, STRIP)
    assert everything(safetensors_of(path)) == everything(wanted)
    unchanged_outside(raw, path.read_bytes(), planned.patches)
    assert path.read_bytes()[:8] == raw[:8]
    assert list(ckpt_surgeon.open(path)) == [key.removeprefix("module.") for key in ckpt_surgeon.open(source)]
    assert ckpt_surgeon.open(path).metadata == {"licence": "none, größe", "format": "pt"}
    rename_in_place(path, add("module."))
    assert path.read_bytes() == raw


def safetensors_of(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return dict(sorted(load_file(path).items()))


def test_a_tensor_cannot_be_called_as_the_metadata_is(tmp_path: Path) -> None:
    path = save_safetensors({"a_long_enough_name": ramp(2)}, tmp_path)
    with pytest.raises(EditError, match="__metadata__"):
        rename_in_place(path, rename("a_long_enough_name=__metadata__"))


def test_a_key_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = save_safetensors({"a_long_enough_name": ramp(2)}, tmp_path)
    with pytest.raises(EditError, match=r"cannot hold a key with '\\udcff'"):
        rename_in_place(path, rename("a_long_enough_name=\udcff"))


# -- room


@pytest.mark.parametrize("save", [save_zip, save_safetensors], ids=["zip", "safetensors"])
def test_the_bytes_that_are_short_are_told_exactly(
    save: Callable[[dict[str, torch.Tensor], Path], Path], tmp_path: Path
) -> None:
    path = save({"a": ramp(2), "b": ramp(3)}, tmp_path)
    raw = path.read_bytes()
    with pytest.raises(
        FileError, match=r"needs [\d,]+ bytes, ([\d,]+) more than the ([\d,]+) that are there"
    ) as refused:
        rename_in_place(path, rename(f"^a={'x' * 1000}"))
    short = int(str(refused.value).split(" more than")[0].rpartition(" ")[2].replace(",", ""))
    with pytest.raises(FileError, match=" 1 more than"):
        rename_in_place(path, rename(f"^a={'x' * (1001 - short)}"))
    assert path.read_bytes() == raw
    planned = rename_in_place(path, rename(f"^a={'x' * (1000 - short)}"))
    assert planned.spare == 0
    assert list(ckpt_surgeon.load(path)) == ["x" * (1000 - short), "b"]


def test_the_size_of_the_file_makes_no_difference(tmp_path: Path) -> None:
    header = b'{"module.w":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % ((1 << 36,) * 2)
    path = tmp_path / "large.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + (1 << 36))  # 64 GiB of nothing: whoever reads or copies it will be noticed
    rename_in_place(path, STRIP)
    assert list(ckpt_surgeon.open(path)) == ["w"]
    assert path.stat().st_blocks * 512 < 1 << 20


# -- refusals


def save_module(_: object, folder: Path) -> Path:
    path = folder / "whole.pth"
    torch.save(nn.DataParallel(nn.Linear(2, 2)), path)
    return path


def save_same_dict_twice(state: object, folder: Path) -> Path:
    return save_zip({"model": {"net": state}, "also": [{"here": state}]}, folder)


def save_with_a_name_beside(state: object, folder: Path) -> Path:
    return save_zip({"module.epoch": ramp(1), "module.fc.weight": ramp(2), "epoch": 3}, folder)


def save_nested(state: object, folder: Path) -> Path:
    return save_zip({"body": {"fc.weight": ramp(2)}, "head": {"fc.bias": ramp(2)}}, folder)


def save_shard(state: object, folder: Path) -> Path:
    assert isinstance(state, dict)
    save_shards(state, folder, ".safetensors")
    return folder / "model-00001-of-00002.safetensors"


def save_linked(state: object, folder: Path) -> Path:
    path = save_zip(state, folder)
    os.link(path, folder / "other.pth")
    return path


REFUSED: dict[str, tuple[Callable[[dict[str, torch.Tensor], Path], Path], ckpt_surgeon.Step | Recipe, str]] = {
    "legacy": (save_legacy, STRIP, "is torch legacy: its keys cannot be changed where they lie"),
    "deflated": (save_deflated, STRIP, "its index is compressed"),
    "an index of shards": (lambda state, folder: save_shards(state, folder, ".bin"), STRIP, "is torch zip, 2 shards"),
    "a shard": (save_shard, STRIP, "is a shard, and two files, it and model.safetensors.index.json"),
    "a whole module": (save_module, STRIP, "a module saved whole"),
    "a dict that is said twice": (save_same_dict_twice, STRIP, "also.0.here in it has the same dict"),
    "a name that is taken": (save_with_a_name_beside, STRIP, "'module.epoch' and 'epoch' would both become 'epoch'"),
    "another nesting": (save_nested, step("strip_prefix", prefix="body"), "'fc.weight' without another nesting"),
    "a name that is a model's": (save_nested, rename("^head=net.head"), "'net.head' in it would be taken for"),
    "names that are models'": (save_nested, rename("head=model", "body=ema"), "it would be open which state_dict"),
    "a dropped key": (save_zip, step("drop", patterns=["*.bias"]), r"dropping keys \('module.fc.bias'\)"),
    "a cast": (save_zip, step("cast", dtype="bf16"), "only names can be changed"),
    "another name of the file": (save_linked, STRIP, r"has 2 names \(hard links\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_in_place_is_refused_with_a_reason(name: str, tmp_path: Path) -> None:
    save, edit, why = REFUSED[name]
    path = save({"module.fc.weight": ramp(2, 2), "module.fc.bias": ramp(2)}, tmp_path)
    before = {file: (tmp_path / file).read_bytes() for file in os.listdir(tmp_path)}
    with pytest.raises(FileError, match=why) as refused:
        rename_in_place(path, edit)
    assert refused.value.remedy == "write a new file instead: save(…, OUT)"
    assert {file: (tmp_path / file).read_bytes() for file in os.listdir(tmp_path)} == before


@pytest.mark.parametrize(
    ("edit", "kind", "why"),
    [
        (step("strip_prefix", prefix="backbone."), NothingMatched, "prefix 'backbone.' matches no key"),
        (rename("weight=bias"), KeyCollision, "all become 'module.fc.bias'"),
        (rename("nothing=something"), NothingMatched, "matches no key"),
    ],
)
def test_edits_are_refused_as_they_are_elsewhere(
    edit: ckpt_surgeon.Step, kind: type[EditError], why: str, tmp_path: Path
) -> None:
    path = save_zip({"module.fc.weight": ramp(2, 2), "module.fc.bias": ramp(2)}, tmp_path)
    with pytest.raises(kind, match=why):
        rename_in_place(path, edit)


def test_a_recipe_of_renames_is_one_step(tmp_path: Path) -> None:
    path = save_zip(parallel(), tmp_path)
    recipe = Recipe((STRIP, rename("head=fc"), add("m.")))
    planned = rename_in_place(path, recipe)
    assert list(torch.load(path)) == list(planned.change.result)
    assert "m.fc.weight" in planned.change.result


def test_no_name_changes_and_nothing_is_written(tmp_path: Path) -> None:
    path = save_zip({"fc.weight": ramp(2)}, tmp_path)
    before = path.stat()
    planned = rename_in_place(path, step("strip_prefix", allow_unmatched=True))
    assert planned.patches == ()
    assert path.stat().st_mtime_ns == before.st_mtime_ns


# -- the command


def test_the_command_says_what_it_did(ckpt: Run, tmp_path: Path) -> None:
    path = save_zip(training(), tmp_path)
    raw = path.read_bytes()
    ran = ckpt("strip-prefix", "--in-place", "--dry-run", path)
    assert (ran.status, ran.err) == (0, "")
    assert re.search(r"module\.head\.weight +→ +head\.weight", ran.out)
    assert re.search(
        r"would rewrite [\d.]+ kB of .*, \d+ bytes to spare; nothing was written \(--dry-run\)\n$", ran.out
    )
    assert path.read_bytes() == raw
    ran = ckpt("strip-prefix", "--in-place", path)
    assert re.fullmatch(rf"changed {path} in place: 16 of 16 keys renamed, [\d.]+ kB rewritten\n", ran.out)
    assert ckpt("add-prefix", path, "--prefix", "net", "--in-place", "--quiet").out == ""
    assert ckpt("rename", path, "head=fc", "--in-place", "^net=n").out.endswith("rewritten\n")
    assert ckpt("rename", "--in-place", path, "^n=m").status == 0
    assert "m.fc.weight" in ckpt_surgeon.open(path)
    ran = ckpt("strip-prefix", "--in-place", path, "--allow-unmatched")
    assert ran.out.startswith(f"{path}: no key changes, nothing was written\n")


def test_pairs_reach_rename_as_they_were_typed(ckpt: Run, tmp_path: Path) -> None:
    path = save_zip({"layers.7.weight": ramp(2)}, tmp_path)
    assert ckpt("rename", "--in-place", path, "layers.{n}=layers.{n//2}").status == 0
    assert list(torch.load(path)) == ["layers.3.weight"]
    rules = tmp_path / "rules.txt"
    rules.write_text("layers=l\nweight=w\n")
    assert ckpt("rename", "--in-place", path, "--from", rules).status == 0
    assert list(torch.load(path)) == ["l.3.w"]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["strip-prefix", "IN"], "Missing argument 'OUT'; give it, or --in-place."),
        (["rename", "IN"], "Missing argument 'OUT'; give it, or --in-place."),
        (["strip-prefix", "IN", "out.pth", "--in-place"], "give OUT or --in-place, not both"),
        (["rename", "IN", "out.pth", "a=b", "--in-place"], "give OUT or --in-place, not both"),
        (["strip-prefix", "IN", "--in-place", "--force"], "--in-place and --force exclude each other"),
        (["strip-prefix", "IN", "--in-place", "--salvage"], "--in-place and --salvage exclude each other"),
        (["rename", "IN", "a=b", "--in-place", "--max-shard-size", "1GB"], "--in-place and --max-shard-size exclude"),
        (["strip-prefix", "IN", "--in-place", "--threads", "2"], "--in-place and --threads exclude each other"),
        (["cast", "IN", "--in-place", "--dtype", "bf16"], "No such option '--in-place'"),
    ],
)  # fmt: skip
def test_words_that_do_not_go_together_are_usage_errors(words: list[str], why: str, ckpt: Run, tmp_path: Path) -> None:
    path = save_zip({"module.a": ramp(2)}, tmp_path)
    raw = path.read_bytes()
    ran = ckpt(*(path if word == "IN" else word for word in words))
    assert ran.status == 2
    assert why in ran.err
    assert path.read_bytes() == raw
    assert os.listdir(tmp_path) == [path.name]


def test_the_index_that_is_rewritten_is_as_long_as_before(tmp_path: Path) -> None:
    path = save_zip(parallel(), tmp_path)
    length = len(pickle_of(path))
    planned = rename_in_place(path, STRIP)
    made = pickle_of(path)
    assert len(made) == length
    assert made.endswith(b"." + bytes(planned.spare))
