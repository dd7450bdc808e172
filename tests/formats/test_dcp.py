"""Distributed checkpoints: read as torch reads them, written so that torch reads them, and never run."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise, product
from pathlib import Path

import dcp_worker
import pytest
import torch
from command_line import Run
from hypothesis import assume, given
from hypothesis import strategies as st
from loaded import loaded_by
from payloads import PAYLOADS, PROTO, STOP
from tables import NAMES, TABLE, StateDict, assert_same, dtype_of, ramp, save_zip
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load

import ckpt_surgeon
from ckpt_surgeon import CheckpointError
from ckpt_surgeon.errors import BrokenFile, FileError, OutputExists
from ckpt_surgeon.files import swap
from ckpt_surgeon.files.local import LocalPath
from ckpt_surgeon.files.spans import ByteSpan
from ckpt_surgeon.formats.dcp import pieces, torch_io
from ckpt_surgeon.formats.dcp.pieces import Piece, Pieced
from ckpt_surgeon.tensors.dtypes import BY_NAME

WORKER = Path(dcp_worker.__file__)


# -- what processes wrote


@pytest.fixture(scope="session")
def by_four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four processes have saved: more than some tensors have rows, so that some hold no part."""
    folder = tmp_path_factory.mktemp("by4")
    done = subprocess.run([sys.executable, str(WORKER), str(folder), "4"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def torchs_own(folder: Path, out: Path) -> Mapping[str, object]:
    """The whole state_dict, as torch's own converter reads it."""
    dcp_to_torch_save(folder, out)
    loaded: dict[str, object] = torch.load(out, weights_only=False)
    return loaded


@pytest.mark.parametrize(("name", "model"), [("training", "model"), ("fsdp1", "state_dict"), ("dtypes", "")])
@pytest.mark.filterwarnings("ignore:.*support is experimental")
def test_the_model_is_what_torch_reads_bit_for_bit(name: str, model: str, by_four: Path, tmp_path: Path) -> None:
    theirs = torchs_own(by_four / name, tmp_path / "theirs.pth")
    opened = ckpt_surgeon.open(by_four / name)
    assert opened.selected == model
    ours = ckpt_surgeon.load(opened)
    wanted = theirs[model] if model else theirs
    assert isinstance(wanted, dict)
    assert_same(ours, wanted, order=False)
    assert_same(ours, torch.load(by_four / f"{name}.pth"))  # in the model's own order, which torch has lost


def test_the_training_state_is_named_and_left_out(by_four: Path, ckpt: Run, tmp_path: Path) -> None:
    beside = {one.path: one for one in ckpt_surgeon.open(by_four / "training").left_out}
    assert list(beside) == ["optimizer", "step", "args", "history"]
    assert beside["optimizer"].what.startswith("training state of 2 ('state', 'param_groups')")
    assert beside["optimizer"].tensors == 24
    assert beside["step"].what.startswith("pickle of 1,")
    assert beside["args"].what == "dict of 2 ('lr', 'names')"
    assert (beside["history"].what, beside["history"].tensors) == ("list of 2", 2)
    ran = ckpt("convert", by_four / "training", tmp_path / "out.safetensors")
    assert ran.status == 0
    assert "left out, beside the weights: optimizer, step, args" in ran.out
    chosen = ckpt_surgeon.load(by_four / "training", select="history.1")
    assert_same(chosen, {"loss": torch.zeros(3)})


@pytest.mark.parametrize("limit", [None, 16, 64])
def test_tensors_cut_along_two_dimensions_are_whole_again(
    limit: int | None, by_four: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if limit is not None:
        monkeypatch.setattr(torch_io, "slabs", partial(pieces.slabs, limit=limit))
    wanted = torch.load(by_four / "grid.pth")
    assert_same(ckpt_surgeon.load(by_four / "grid"), wanted)
    for index, name in enumerate(["even", "uneven"]):
        assert_same(ckpt_surgeon.load(by_four / "grid", select=f"list.{index}"), {"a": wanted[name]})


def test_the_metadata_can_be_given_itself(by_four: Path, ckpt: Run) -> None:
    given, folder = (ckpt_surgeon.open(by_four / "grid" / name) for name in (".metadata", "."))
    assert (given.path, list(given)) == (folder.path, list(folder))
    assert ckpt("diff", by_four / "grid" / ".metadata", by_four / "grid.pth", "--values").status == 0


# -- listing


def test_listing_reads_the_metadata_alone(by_four: Path, ckpt_process: Run, tmp_path: Path) -> None:
    folder = tmp_path / "hollow"
    shutil.copytree(by_four / "training", folder)
    said = ckpt_process("ls", folder)
    for path in folder.glob("*.distcp"):
        size = path.stat().st_size
        path.unlink()
        with open(path, "wb") as file:
            file.truncate(size)
    assert ckpt_process("ls", folder) == said
    assert (said.status, said.err) == (0, "")
    opened: set[str] = set()
    sys.addaudithook(lambda event, args: opened.add(os.path.basename(str(args[0]))) if event == "open" else None)
    ckpt_surgeon.ls(folder)
    assert ".metadata" in opened
    assert not any(name.endswith(".distcp") for name in opened)


@pytest.mark.parametrize("words", [["ls"], ["ls", "--json"], ["ls", "--all"], ["scan"]], ids=" ".join)
def test_listing_does_not_import_torch(words: list[str], by_four: Path) -> None:
    assert loaded_by(*words, by_four / "training") == set()


def test_everything_can_be_asked_of_one(by_four: Path, ckpt: Run, tmp_path: Path) -> None:
    folder, plain = by_four / "training", by_four / "training.pth"
    assert ckpt("hash", folder, "--quiet").out == ckpt("hash", plain, "--quiet").out
    ran = ckpt("diff", folder, plain, "--values")
    assert (ran.status, ran.out.splitlines()[-1]) == (0, "same values")
    for words in (["--stats"], ["--fold"]):
        ours, theirs = (ckpt("ls", path, *words).out.partition("\n\n")[2] for path in (folder, plain))
        assert ours == theirs
    checked = ckpt("ls", folder, "--check")
    assert "checked: 336 bytes read, no damage found" in checked.out
    listing = json.loads(ckpt("ls", folder, "--json").out)
    assert listing["container"] == "torch distributed, 4 files"
    assert listing["file_bytes"] == sum(path.stat().st_size for path in folder.glob("*.distcp"))
    scanned = ckpt("scan", folder)
    assert (scanned.status, "plainly data" in scanned.out) == (0, True)


# -- edits


EDITS: dict[str, Callable[..., object]] = {
    "add-prefix": lambda state: ckpt_surgeon.add_prefix(state, "module."),
    "cast": lambda state: ckpt_surgeon.cast(state, dtype="bfloat16"),
    "slice": lambda state: ckpt_surgeon.slice_(state, ["0.weight"], start=1, stop=4),
    "transpose": lambda state: ckpt_surgeon.transpose(state, ["0.weight"]),
    "concat": lambda state: ckpt_surgeon.concat(state, ["1.weight", "1.bias"], "1.both"),
    "split": lambda state: ckpt_surgeon.split(state, "0.weight", ["a", "b"], sizes=[2, 3]),
    "drop": lambda state: ckpt_surgeon.drop(state, ["2.*"]),
}


@pytest.mark.parametrize("suffix", [".pth", ".dcp"])
@pytest.mark.parametrize("name", EDITS)
def test_an_edit_gives_what_it_gives_of_one_file(name: str, suffix: str, by_four: Path, tmp_path: Path) -> None:
    ours = EDITS[name](ckpt_surgeon.open(by_four / "training"))
    theirs = EDITS[name](torch.load(by_four / "training.pth"))
    assert isinstance(ours, ckpt_surgeon.Checkpoint)
    assert isinstance(theirs, dict)
    ckpt_surgeon.save(ours, tmp_path / f"out{suffix}")
    assert_same(ckpt_surgeon.load(tmp_path / f"out{suffix}"), theirs)


def test_it_loads_into_a_model_and_fits_one(by_four: Path, tmp_path: Path) -> None:
    model = torch.nn.Sequential(*dcp_worker.network().children())
    wanted = torch.load(by_four / "training.pth")
    report = ckpt_surgeon.load_into(model, by_four / "training")
    assert report.matched == 1.0
    assert_same(dict(model.state_dict()), wanted)
    found = ckpt_surgeon.fit(ckpt_surgeon.open(by_four / "fsdp1"), model)
    assert found.matched == 1.0


# -- the safetensors variant


def test_pieces_in_safetensors_are_whole_again(by_four: Path, ckpt: Run, tmp_path: Path) -> None:
    wanted = torch.load(by_four / "hf.pth")
    assert_same(ckpt_surgeon.load(by_four / "hf"), wanted, order=False)
    ckpt_surgeon.convert(by_four / "hf", tmp_path / "out.safetensors")
    assert_same(ckpt_surgeon.load(tmp_path / "out.safetensors"), wanted, order=False)
    listed = ckpt("ls", tmp_path / "out.safetensors")
    assert "DCP" not in listed.out
    assert "note:" not in listed.out
    processes = len(list((by_four / "hf").iterdir()))
    assert f"hf: torch distributed safetensors, {processes} files" in ckpt("ls", by_four / "hf").out


def test_the_consolidated_tensors_are_taken_and_the_pieces_named(by_four: Path) -> None:
    opened = ckpt_surgeon.open(by_four / "consolidated")
    assert opened.notes == (f"{by_four / 'consolidated' / 'sharded'} has the same tensors in pieces, not read",)
    assert_same(ckpt_surgeon.load(opened), torch.load(by_four / "consolidated.pth"), order=False)
    assert_same(ckpt_surgeon.load(by_four / "consolidated" / "sharded"), ckpt_surgeon.load(opened), order=False)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_share_of_one_process_says_that_it_is_one(rank: int, by_four: Path) -> None:
    path = sorted((by_four / "hf").iterdir())[rank]
    assert any("give the folder for whole ones" in note for note in ckpt_surgeon.open(path).notes)


def test_a_missing_share_leaves_gaps(by_four: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(by_four / "hf", folder)
    sorted(folder.iterdir())[1].unlink()
    with pytest.raises(BrokenFile, match="leave gaps"):
        ckpt_surgeon.open(folder)


# -- writing


def weights_of(name: str) -> StateDict:
    return {key: tensor.detach() for key, tensor in TABLE[name]().items()}


@pytest.mark.filterwarnings("ignore:.*support is experimental", "ignore:torch.distributed is .*uninitialized")
@pytest.mark.parametrize("name", [name for name in NAMES if not (dtype_of(name) or "").startswith("bits")])
def test_torch_reads_what_is_written(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_io, "SLAB", 64)  # so that tensors of this table are cut too
    state, out = weights_of(name), tmp_path / "out.dcp"
    ckpt_surgeon.save(state, out)
    assert_same(ckpt_surgeon.load(out), state)
    assert_same(torchs_own(out, tmp_path / "theirs.pth"), state)  # type: ignore[arg-type]
    empty = {key: torch.zeros_like(tensor.resolve_conj().contiguous()) for key, tensor in state.items()}
    load(empty, storage_reader=FileSystemReader(out), no_dist=True)
    assert_same(empty, state)


def test_bits_that_torch_cannot_write_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot hold 'weight' \(bits8\).*write a \.pth"):
        ckpt_surgeon.save({"weight": TABLE["bits8"]()["weight"]}, tmp_path / "out.dcp")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("limit", "files"), [(None, 1), (1200, 3), (100, 30)])
def test_a_limit_makes_several_files(limit: int | None, files: int, tmp_path: Path) -> None:
    state = {f"{index}": ramp(10, 10) for index in range(6)} | {"large": ramp(60, 10)}
    out = tmp_path / "out.dcp"
    ckpt_surgeon.save(state, out, max_shard_size=limit)
    assert len(list(out.glob("__*_0.distcp"))) >= files
    assert_same(ckpt_surgeon.load(out), state)
    assert_same(torchs_own(out, tmp_path / "theirs.pth"), state)  # type: ignore[arg-type]


def test_one_checkpoint_is_always_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.dcp", "b.dcp"):
        ckpt_surgeon.save(TABLE["dense"](), tmp_path / name, max_shard_size=40)
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("a.dcp", "b.dcp")
    )
    assert first == second
    assert str(tmp_path).encode() not in first[".metadata"]


def test_there_and_back_is_the_same(by_four: Path, ckpt: Run, tmp_path: Path) -> None:
    steps = [by_four / "training", *(tmp_path / name for name in ("a.dcp", "b.safetensors", "c.dcp", "d.pth"))]
    for source, out in pairwise(steps):
        assert ckpt("convert", source, out).status == 0
    assert_same(torch.load(steps[-1]), torch.load(by_four / "training.pth"))


# -- replacing


def test_it_is_replaced_with_force_alone_and_whole(ckpt: Run, tmp_path: Path) -> None:
    out = tmp_path / "out.dcp"
    ckpt_surgeon.save(TABLE["dense"](), out, max_shard_size=16)
    with pytest.raises(OutputExists):
        ckpt_surgeon.save(TABLE["tied"](), out)
    ran = ckpt("convert", save_zip(TABLE["tied"](), tmp_path), out, "--force", "--dry-run")
    assert (ran.status, "would write" in ran.out) == (0, True)
    assert list(ckpt_surgeon.open(out)) == ["fc.weight", "fc.bias"]
    ckpt_surgeon.save(TABLE["tied"](), out, force=True)
    assert sorted(os.listdir(out)) == [".metadata", "__0_0.distcp"]
    assert_same(ckpt_surgeon.load(out), TABLE["tied"]())
    assert sorted(os.listdir(tmp_path)) == ["model.pth", "out.dcp"]


def test_it_can_be_edited_in_place_and_through_a_link(tmp_path: Path, ckpt: Run) -> None:
    out, link = tmp_path / "out.dcp", tmp_path / "link.dcp"
    ckpt_surgeon.save(TABLE["dense"](), out)
    link.symlink_to(out)
    assert ckpt("add-prefix", link, link, "--prefix", "x.", "--force").status == 0
    assert link.is_symlink()
    assert_same(ckpt_surgeon.load(out), {f"x.{key}": tensor for key, tensor in TABLE["dense"]().items()})
    assert sorted(os.listdir(tmp_path)) == ["link.dcp", "out.dcp"]


def test_a_folder_of_other_things_is_never_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out.dcp"
    ckpt_surgeon.save(TABLE["dense"](), out)
    (out / "config.json").write_text("{}")
    with pytest.raises(FileError, match=r"more than a distributed checkpoint in it \('config.json'\)"):
        ckpt_surgeon.save(TABLE["tied"](), out, force=True)
    assert len(list(out.iterdir())) == 3


def test_a_file_of_that_name_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out.dcp"
    out.write_bytes(b"old")
    ckpt_surgeon.save(TABLE["dense"](), out, force=True)
    assert_same(ckpt_surgeon.load(out), TABLE["dense"]())
    assert os.listdir(tmp_path) == ["out.dcp"]


def test_without_an_exchange_the_old_folder_is_renamed_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swap, "_exchanged", lambda one, other: False)
    out = tmp_path / "out.dcp"
    ckpt_surgeon.save(TABLE["dense"](), out)
    ckpt_surgeon.save(TABLE["tied"](), out, force=True)
    assert_same(ckpt_surgeon.load(out), TABLE["tied"]())
    rename = os.rename

    def refusing(source: Path, target: Path) -> None:
        if target == out and source.suffix == ".tmp":
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refusing)
    with pytest.raises(FileError):
        ckpt_surgeon.save(TABLE["dense"](), out, force=True)
    assert_same(ckpt_surgeon.load(out), TABLE["tied"]())
    assert os.listdir(tmp_path) == ["out.dcp"]


SLOWLY = textwrap.dedent(
    """
    import sys, time
    from ckpt_surgeon.writing import write as writing
    from ckpt_surgeon.cli import main
    write = writing.write
    def slowly(planned, *, progress=None, **others):
        def step(count):
            print("step", flush=True)
            time.sleep(0.01)
        return write(planned, progress=step, **others)
    writing.write = slowly
    main()
    """
)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_kill_leaves_the_old_one_whole(number: int, status: int, tmp_path: Path) -> None:
    source = save_zip({f"{index}": torch.zeros(4 << 20, dtype=torch.uint8) for index in range(20)}, tmp_path)
    out = tmp_path / "out" / "model.dcp"
    out.parent.mkdir()
    ckpt_surgeon.save(TABLE["dense"](), out)
    words = [sys.executable, "-c", SLOWLY, "convert", str(source), str(out), "--force"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(random.randint(2, 60)):
            assert process.stdout.readline() == "step\n"
        process.send_signal(number)
        process.communicate()
    assert process.returncode == status
    assert_same(ckpt_surgeon.load(out), TABLE["dense"]())
    left = [name for name in os.listdir(out.parent) if name != out.name]
    assert len(left) == (number == signal.SIGKILL)
    assert all(name.startswith(".model.dcp.") and name.endswith(".tmp") for name in left)


@pytest.mark.parametrize("tensors", [1, 1000])
def test_a_disk_that_is_full_leaves_nothing(tensors: int, tmp_path: Path) -> None:
    source = save_zip({f"{index}": ramp(1_000_000 // tensors) for index in range(tensors)}, tmp_path)
    script = textwrap.dedent(
        """
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        from ckpt_surgeon.cli import main
        main()
        """
    )
    out = tmp_path / "out.dcp"
    done = subprocess.run([sys.executable, "-c", script, "convert", source, out], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"ckpt: {out}: could not be written (File too large), nothing was replaced; write elsewhere\n"
    assert os.listdir(tmp_path) == ["model.pth"]


# -- memory


@pytest.mark.parametrize("suffix", [".safetensors", ".dcp"])
def test_memory_is_that_of_a_slab_and_a_piece(suffix: str, tmp_path: Path) -> None:
    """512 MiB, half of it one tensor in pieces of 64 MiB; the old way would take them all."""
    source = tmp_path / "source.dcp"
    script = textwrap.dedent(
        """
        import resource, sys, torch, ckpt_surgeon
        import torch.distributed.checkpoint.hf_storage
        from ckpt_surgeon.formats.dcp import torch_io
        source, out, step = sys.argv[1:]
        if step == "make":
            torch_io.SLAB = 64 << 20
            large = torch.arange(64 << 20, dtype=torch.int32).view(torch.float32).view(-1, 1024)
            small = {f"{index}.weight": large[index : index + 4096] for index in range(16)}
            ckpt_surgeon.save({"large": large, **small}, source)
            sys.exit()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        ckpt_surgeon.convert(source, out)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
        """
    )
    said = ""
    for step in ("make", "convert"):
        words = [sys.executable, "-c", script, str(source), str(tmp_path / f"out{suffix}"), step]
        said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert int(said) < 200  # MiB above that of import torch


# -- pieces


def covers(shape: tuple[int, ...], boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Whether every element is in exactly one box, counted one by one."""
    counts = torch.zeros(shape, dtype=torch.int64)
    for offsets, sizes in boxes:
        if any(start + size > whole for start, size, whole in zip(offsets, sizes, shape, strict=True)):
            return False
        counts[tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))] += 1
    return bool((counts == 1).all())


small = st.integers(0, 4)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """A shape and boxes: a grid that covers it, some of which are moved, doubled or left out."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    cuts = [sorted({0, whole, *draw(st.lists(st.integers(0, whole), max_size=2))}) for whole in shape]
    boxes = [
        (tuple(low for low, _ in box), tuple(high - low for low, high in box)) for box in product(*map(pairwise, cuts))
    ]
    for _ in range(draw(st.integers(0, 2))):
        index = draw(st.integers(0, len(boxes) - 1))
        other = tuple(draw(small) for _ in shape), tuple(draw(small) for _ in shape)
        boxes[index] = draw(st.sampled_from([boxes[-1], other, boxes[index]]))
    return shape, boxes


@given(layouts())
def test_corners_and_volumes_tell_whether_boxes_make_up_a_whole(
    layout: tuple[tuple[int, ...], list[tuple[tuple[int, ...], tuple[int, ...]]]],
) -> None:
    shape, boxes = layout
    assert (pieces.flaw(shape, boxes) == "") == covers(shape, boxes)


def pieced(shape: tuple[int, ...], boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> Pieced:
    place = ByteSpan(LocalPath("__0_0.distcp"), 0, 1)
    return Pieced("w", BY_NAME["uint8"], shape, tuple(Piece(offsets, sizes, place) for offsets, sizes in boxes))


@given(layouts(), st.integers(1, 40))
def test_slabs_follow_one_another_and_read_no_piece_too_often(
    layout: tuple[tuple[int, ...], list[tuple[tuple[int, ...], tuple[int, ...]]]], limit: int
) -> None:
    shape, boxes = layout
    assume(not pieces.flaw(shape, boxes))
    whole = pieced(shape, boxes)
    found = pieces.slabs(whole, limit)
    assert [row for start, stop in found for row in range(start, stop)] == list(range(shape[0]))
    for offsets, sizes in boxes:
        first, last = offsets[0], offsets[0] + sizes[0]
        assert sum(start < last and first < stop for start, stop in found) <= pieces.READINGS * max(sizes[0], 1)


def test_slabs_end_where_pieces_end() -> None:
    rows = pieced((100, 10), [((start, 0), (25, 10)) for start in range(0, 100, 25)])
    assert pieces.slabs(rows, 1000) == [(0, 100)]
    assert pieces.slabs(rows, 600) == [(0, 50), (50, 100)]
    assert pieces.slabs(rows, 300) == [(0, 25), (25, 50), (50, 75), (75, 100)]
    columns = pieced((100, 10), [((0, start), (100, 5)) for start in (0, 5)])
    assert pieces.slabs(columns, 10) == [(0, 50), (50, 100)]  # no smaller than the pieces
    assert pieces.slabs(pieced((100, 10), [((0, 0), (100, 10))]), 10) == [(0, 100)]


# -- hostile and damaged


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small checkpoint of three files, 'w' in two pieces, with a number beside."""
    path = tmp_path / "run"
    path.mkdir()
    ckpt_surgeon.save({"w": ramp(4, 3), "b": ramp(3)}, path / "made.dcp", max_shard_size=24)
    for part in (path / "made.dcp").iterdir():
        part.rename(path / part.name)
    (path / "made.dcp").rmdir()
    beside = io.BytesIO()
    torch.save(7, beside)
    add_entry(path, "step", beside.getvalue())
    return path


def add_entry(folder: Path, key: str, raw: bytes) -> None:
    """Put an entry that is no tensor into a checkpoint."""
    (folder / f"__{key}_0.distcp").write_bytes(raw)

    def change(metadata: Metadata) -> None:
        metadata.state_dict_metadata[key] = BytesStorageMetadata()
        some = next(iter(metadata.storage_data.values()))
        metadata.storage_data[MetadataIndex(key)] = type(some)(f"__{key}_0.distcp", 0, len(raw))

    change_metadata(folder, change)


def change_metadata(folder: Path, change: Callable[[Metadata], object]) -> None:
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_pickle_in_place_of_the_metadata_is_not_run(name: str, folder: Path, ckpt: Run, tmp_path: Path) -> None:
    make, suspect = PAYLOADS[name]
    marker = tmp_path / "ran"
    payload = make(str(marker))
    whole = (folder / ".metadata").read_bytes()
    for raw in (PROTO + payload + STOP, PROTO + payload + b"0" + whole[2:]):  # alone, and before the real one
        (folder / ".metadata").write_bytes(raw)
        for words in (["ls", folder], ["ls", folder, "--all"], ["scan", folder], ["hash", folder],
                      ["convert", folder, tmp_path / "out.pth", "--force"]):  # fmt: skip
            assert ckpt(*words).status in (0, 1, 2)
        scanned = ckpt("scan", folder)
        assert suspect in scanned.out or scanned.status == 2
    assert not marker.exists()


@pytest.mark.parametrize("name", PAYLOADS)
def test_an_entry_that_is_no_tensor_is_named_by_scan_and_never_run(
    name: str, folder: Path, ckpt: Run, tmp_path: Path
) -> None:
    make, suspect = PAYLOADS[name]
    marker = tmp_path / "ran"
    raw = PROTO + make(str(marker)) + STOP
    other = io.BytesIO()
    torch.save({}, other)
    for hidden in (raw, zipped(other.getvalue(), raw)):
        add_entry(folder, "args", hidden)
        scanned = ckpt("scan", folder)
        assert (scanned.status, scanned.err) == (1, "")
        assert suspect in scanned.out
        assert "args: pickle of" in ckpt("ls", folder, "--check").out
        assert_same(ckpt_surgeon.load(folder), {"w": ramp(4, 3), "b": ramp(3)})
    assert not marker.exists()


def zipped(whole: bytes, payload: bytes) -> bytes:
    """A save of torch's with another pickle in it."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(made, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, payload if info.filename.endswith("data.pkl") else old.read(info))
    return made.getvalue()


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_piece_that_is_no_tensor_is_refused_before_torch_sees_it(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "ran"
    path = folder / "__0_0.distcp"
    raw = zipped(path.read_bytes(), PROTO + PAYLOADS[name][0](str(marker)) + STOP)
    path.write_bytes(raw)

    def longer(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            info.length = len(raw) if info.relative_path == path.name else info.length

    change_metadata(folder, longer)
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(BrokenFile, match=r"__0_0\.distcp"):
        ckpt_surgeon.hash(folder)
    assert not marker.exists()


def _chunks(metadata: Metadata) -> list[ChunkStorageMetadata]:
    return _described(metadata).chunks


def _first(metadata: Metadata) -> object:
    return metadata.storage_data[MetadataIndex("w", (0, 0))]


def _described(metadata: Metadata, key: str = "w") -> TensorStorageMetadata:
    described = metadata.state_dict_metadata[key]
    assert isinstance(described, TensorStorageMetadata)
    return described


DAMAGED: dict[str, tuple[Callable[[Metadata], object], str]] = {
    "a piece outside": (
        lambda metadata: _chunks(metadata).append(ChunkStorageMetadata(torch.Size([3, 0]), torch.Size([2, 3]))),
        r"'w': a piece at \[3, 0\] of sizes \[2, 3\] reaches outside of \[4, 3\]",
    ),
    "a negative piece": (
        lambda metadata: _chunks(metadata).append(ChunkStorageMetadata(torch.Size([-1, 0]), torch.Size([1, 3]))),
        "no tuple of at most 64 numbers",
    ),
    "a piece of other dimensions": (
        lambda metadata: _chunks(metadata).append(ChunkStorageMetadata(torch.Size([0]), torch.Size([3]))),
        "in a shape of 2 dimensions",
    ),
    "pieces that overlap": (lambda metadata: _chunks(metadata).append(_chunks(metadata)[0]), "its pieces overlap"),
    "a piece missing": (lambda metadata: _chunks(metadata).pop(), "its pieces leave gaps"),
    "overlapping where another is missing": (
        lambda metadata: _chunks(metadata).__setitem__(1, _chunks(metadata)[0]),
        "its pieces overlap and leave gaps",
    ),
    "no place for a piece": (
        lambda metadata: metadata.storage_data.pop(MetadataIndex("w", (0, 0))),
        r"'w': its piece at \[0, 0\] is in no file",
    ),
    "no place for an entry": (
        lambda metadata: metadata.storage_data.pop(MetadataIndex("step")), "'step': it is in no file"
    ),
    "a file that is missing": (
        lambda metadata: setattr(_first(metadata), "relative_path", "__7_0.distcp"), "missing files: '__7_0.distcp'"
    ),
    "a file that is too short": (
        lambda metadata: setattr(_first(metadata), "length", 1 << 20), r"'__0_0.distcp' is truncated: .* byte 1,048,576"
    ),
    "a negative offset": (lambda metadata: setattr(_first(metadata), "offset", -1), "an offset or a length of -1"),
    "a path out of the folder": (
        lambda metadata: setattr(_first(metadata), "relative_path", "../../etc/passwd"), "outside of the folder"
    ),
    "an absolute path": (
        lambda metadata: setattr(_first(metadata), "relative_path", "/etc/passwd"), "outside of the folder"
    ),
    "too few bytes for a piece": (lambda metadata: setattr(_first(metadata), "length", 7), "has 7 bytes, fewer than"),
    "a dtype that is none": (
        lambda metadata: setattr(_described(metadata).properties, "dtype", torch.strided), "no dtype|strided"
    ),
    "a size of many digits": (
        lambda metadata: setattr(_described(metadata), "size", (1 << (1 << 20), 3)),
        "no tuple of at most 64 numbers",
    ),
    "a negative shape": (
        lambda metadata: setattr(_described(metadata), "size", torch.Size([-4, 3])),
        "no tuple of at most 64 numbers",
    ),
    "an immense shape": (
        lambda metadata: setattr(_described(metadata), "size", torch.Size([1 << 62, 1 << 62])), "no tensor has"
    ),
    "no pieces": (lambda metadata: setattr(_described(metadata), "chunks", None), "no list of its pieces"),
    "another class": (
        lambda metadata: metadata.state_dict_metadata.__setitem__("w", torch.Size([1])),  # type: ignore[assignment]
        "where a TensorStorageMetadata should be",
    ),
    "no entries": (lambda metadata: setattr(metadata, "state_dict_metadata", None), "no state_dict_metadata"),
    "no places": (lambda metadata: setattr(metadata, "storage_data", None), "no storage_data"),
    "a path of odd steps": (
        lambda metadata: metadata.planner_data.__setitem__("w", (None,)), "no proper path for 'w'"
    ),
    "an endless path": (lambda metadata: metadata.planner_data.__setitem__("w", ("x",) * 1000), "no proper path"),
    "two entries in one place": (
        lambda metadata: metadata.planner_data.__setitem__("w", ("b",)), "two entries at the place"
    ),
    "an entry within another": (
        lambda metadata: metadata.planner_data.__setitem__("b", ("w", "b")), "inside of something that is no dict"
    ),
    "a key that is no string": (
        lambda metadata: metadata.state_dict_metadata.__setitem__(3, BytesStorageMetadata()),  # type: ignore[index]
        "no string",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_metadata_that_contradicts_itself_is_refused_in_one_line(
    name: str, folder: Path, ckpt: Run, tmp_path: Path
) -> None:
    change, words = DAMAGED[name]
    change_metadata(folder, change)
    with pytest.raises(BrokenFile, match=words) as caught:
        ckpt_surgeon.open(folder)
    for command in (["ls", folder], ["convert", folder, tmp_path / "out.pth"]):
        ran = ckpt(*command)
        assert (ran.status, ran.out, ran.err) == (2, "", f"ckpt: {caught.value}\n")


def test_an_index_of_a_list_may_be_anything_and_costs_nothing(folder: Path) -> None:
    change_metadata(folder, lambda metadata: metadata.planner_data.__setitem__("w", ("list", 1 << 60)))
    assert_same(ckpt_surgeon.load(folder, select=f"list.{1 << 60}"), {"tensor": ramp(4, 3)})


@pytest.mark.parametrize("cut", [0, 1, 60, 300, -1])
def test_truncated_metadata_is_told(cut: int, folder: Path) -> None:
    path = folder / ".metadata"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(BrokenFile, match=r"\.metadata: is (empty|truncated or damaged)"):
        ckpt_surgeon.open(folder)


def test_a_flipped_bit_is_found(folder: Path, ckpt: Run, tmp_path: Path) -> None:
    path = folder / "__0_0.distcp"
    raw = path.read_bytes()
    at = raw.index(ramp(2, 3).numpy().tobytes())
    path.write_bytes(raw[: at + 8] + bytes([raw[at + 8] ^ 1]) + raw[at + 9 :])
    assert ckpt("ls", folder).status == 0
    for words in (["ls", folder, "--check"], ["convert", folder, tmp_path / "out.pth"]):
        ran = ckpt(*words)
        assert (ran.status, ran.err.count("\n")) == (2, 1)
        assert "__0_0.distcp" in ran.err
        assert "the CRC of bytes" in ran.err
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize("other", [ramp(2, 4), ramp(2, 3).double(), torch.zeros(2, 3).to_sparse(), {"a": ramp(2, 3)}])
def test_a_piece_of_another_kind_is_refused(other: object, folder: Path) -> None:
    path = folder / "__0_0.distcp"
    torch.save(other, path)
    change_metadata(folder, lambda metadata: setattr(_first(metadata), "length", path.stat().st_size))
    with pytest.raises(BrokenFile, match=r"__0_0.distcp: has .* where a piece of 'w' should be, float32 \[2, 3\]"):
        ckpt_surgeon.hash(folder)


def test_what_is_whole_can_be_salvaged(folder: Path) -> None:
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(BrokenFile, match=r"missing files: '__0_0\.distcp'"):
        ckpt_surgeon.open(folder)
    opened = ckpt_surgeon.open(folder, salvage=True)
    assert opened.notes == ("lost, cut off or missing: 1 of 2 tensors ('w')",)
    assert_same(ckpt_surgeon.load(opened), {"b": ramp(3)})


def test_files_that_the_metadata_does_not_name_are_told(folder: Path) -> None:
    (folder / "__5_0.distcp").write_bytes(b"")
    assert ckpt_surgeon.open(folder).notes == ("not named in .metadata, not read: '__5_0.distcp'",)


def test_what_only_torch_can_unpack_is_named(folder: Path, ckpt: Run) -> None:
    change_metadata(folder, lambda metadata: setattr(_first(metadata), "transform_descriptors", ["stream.zstd"]))
    layout = torch.sparse_coo
    change_metadata(folder, lambda metadata: setattr(_described(metadata, "b").properties, "layout", layout))
    listed = ckpt("ls", folder).out
    assert "(packed by stream.zstd)" in listed
    assert "(sparse_coo)" in listed


# -- other folders


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["zero_pp_rank_0_mp_rank_00_optim_states.pt"], ["DeepSpeed", "…_model_states.pt"]),
        (["latest", "zero_to_fp32.py"], ["DeepSpeed", "global_step"]),
        (["mp_rank_00/", "mp_rank_01/"], ["has no model_optim_rng.pt"]),
        (["iter_0001000/", "latest_checkpointed_iteration.txt"], ["names '', which is not there", "iter_0001000"]),
        (["rank0.pt", "rank1.pt"], ["a file of each process"]),
        (["__0_0.distcp", "__1_0.distcp"], ["without its .metadata", "ls -a"]),
        (["__0.metadata", "__0_0.distcp", "__1.metadata", "__1_0.distcp"], ["each for itself"]),
    ],
)  # fmt: skip
def test_the_layouts_of_other_tools_are_named(names: list[str], words: list[str], ckpt: Run, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    ran = ckpt("ls", tmp_path)
    assert (ran.status, ran.out, ran.err.count("\n")) == (2, "", 1)
    for word in words:
        assert word in ran.err


def test_a_folder_with_a_file_beside_asks_for_one(folder: Path) -> None:
    save_zip({"w": ramp(2)}, folder)
    with pytest.raises(
        CheckpointError, match=r"holds a distributed checkpoint \(\.metadata\) and 'model.pth'; name one"
    ):
        ckpt_surgeon.open(folder)
    assert list(ckpt_surgeon.open(folder / ".metadata")) == ["w", "b"]


def test_the_sizes_that_are_planned_are_about_right(tmp_path: Path) -> None:
    state = {f"layers.{index}.weight": ramp(index) for index in range(50)}
    plan = ckpt_surgeon.save(state, tmp_path / "out.dcp")
    real = swap.nbytes(LocalPath(tmp_path) / "out.dcp")
    assert real * 0.8 < plan.nbytes < real * 1.3
