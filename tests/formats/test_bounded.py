"""What small files may cost: memory, output and time are bounded by the file and a stated factor."""

from __future__ import annotations

import pickle as op
import resource
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from payloads import get, number, put, text
from structures import Record, checkpoint_records, dict_of, program, save, storage, tensor, zip_bytes_of
from tables import assert_same, ramp, rewritten, save_zip

import ckpt_surgeon
from ckpt_surgeon import BrokenFile, CheckpointError
from ckpt_surgeon.edits import search_limits
from ckpt_surgeon.report import listings

MEMORY = 200_000  # KiB that none of these adds


def memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def checkpoint(body: bytes, folder: Path, **records: bytes) -> Path:
    return save(zip_bytes_of(checkpoint_records(program(body), records or {"0": bytes(16)})), folder)


def test_one_long_key_among_thousands_costs_what_it_is_long(tmp_path: Path) -> None:
    state = {f"layer.{index}.w": ramp(1) for index in range(4000)} | {"x" * 1_000_000: ramp(1)}
    path = save_zip(state, tmp_path)
    before = memory()
    shown = listings.listing_text(ckpt_surgeon.ls(path))
    assert len(shown) < 4_000_000
    assert memory() - before < MEMORY


def with_metadata(value: bytes) -> bytes:
    """A state_dict whose ``_metadata`` has one module with this value."""
    body = named_ordered() + text("w") + tensor(storage()) + op.SETITEM
    return body + op.EMPTY_DICT + text("_metadata") + dict_of({"m": dict_of({"x": value})}) + op.SETITEM + op.BUILD


def named_ordered() -> bytes:
    return op.GLOBAL + b"collections\nOrderedDict\n" + op.EMPTY_TUPLE + op.REDUCE


def halves(depth: int, *, tuples: bool) -> bytes:
    """A list of twice the list of twice the list …"""
    body = op.EMPTY_LIST + put(100)
    for index in range(depth):
        if tuples:
            body += get(100 + index) + get(100 + index) + op.TUPLE2 + put(101 + index)
        else:
            inner = op.MARK + get(100 + index) + get(100 + index) + op.APPENDS
            body += op.EMPTY_LIST + put(101 + index) + inner
    return op.MARK + body + op.LIST


@pytest.mark.parametrize("tuples", [False, True])
def test_metadata_that_shares_its_halves_is_written_as_shared(tuples: bool, tmp_path: Path) -> None:
    path = checkpoint(with_metadata(halves(40, tuples=tuples)), tmp_path)
    ckpt_surgeon.convert(path, tmp_path / "out.pth")
    assert (tmp_path / "out.pth").stat().st_size < 4 * path.stat().st_size
    loaded = torch.load(tmp_path / "out.pth", weights_only=True)
    found = loaded._metadata["m"]["x"][-1]
    assert found[0] is found[1]


def test_metadata_in_itself_is_written_in_itself(tmp_path: Path) -> None:
    cyclic = op.EMPTY_LIST + put(100) + get(100) + op.APPEND
    path = checkpoint(with_metadata(cyclic), tmp_path)
    ckpt_surgeon.convert(path, tmp_path / "out.pth")
    found = torch.load(tmp_path / "out.pth", weights_only=True)._metadata["m"]["x"]
    assert found[0] is found


@pytest.mark.parametrize("what", ["deep", "an integer of 300 bytes"])
def test_metadata_that_torch_would_not_take_is_an_error(what: str, tmp_path: Path) -> None:
    value = op.EMPTY_TUPLE + op.TUPLE1 * 5000 if what == "deep" else number(1 << 2400)
    path = checkpoint(with_metadata(value), tmp_path)
    with pytest.raises(CheckpointError, match=r"nested too deeply|integer of 301 bytes"):
        ckpt_surgeon.convert(path, tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()
    ckpt_surgeon.convert(path, tmp_path / "out.safetensors")


def test_a_tensor_of_2_to_the_40_over_one_element_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "expanded.pth"
    torch.save({"w": torch.zeros(1).expand(1 << 20, 1 << 20)}, path)
    with pytest.raises(CheckpointError, match="would make 4,398,046,511,104 bytes"):
        ckpt_surgeon.hash(path)
    for name in ("out.pth", "out.safetensors"):
        with pytest.raises(CheckpointError):
            ckpt_surgeon.convert(path, tmp_path / name)
    assert ckpt_surgeon.load(path)["w"].shape == (1 << 20, 1 << 20)


def test_a_tensor_that_is_expanded_within_reason_is_written(tmp_path: Path) -> None:
    path = save_zip({"w": ramp(5).expand(1000, 5)}, tmp_path)
    ckpt_surgeon.convert(path, tmp_path / "out.safetensors")
    assert_same(ckpt_surgeon.load(tmp_path / "out.safetensors"), {"w": ramp(5).expand(1000, 5).contiguous()})


def test_a_packed_record_far_larger_than_its_tensor_costs_no_memory(tmp_path: Path) -> None:
    count = 1 << 26
    body = dict_of({
        "few": tensor(storage(count)), "last": tensor(storage(count), (4,), (1,), count - 4),
        "apart": tensor(storage(count), (2,), (4,), 8),
        "scattered": tensor(storage(count), (2,), (count - 1,)),
    })  # fmt: skip
    values = np.zeros(count, "<f4")
    values[[0, 8, 12, -1]] = [1, 2, 3, 4]
    records = [Record(one.name, one.raw, deflated=True) for one in checkpoint_records(program(body), {"0": b""})]
    records[2] = Record("archive/data/0", values.tobytes(), deflated=True)
    path = save(zip_bytes_of(records), tmp_path)
    del values, records
    opened = ckpt_surgeon.open(path)
    before = memory()
    found = {key: np.frombuffer(b"".join(opened[key].blocks()), "<f4").tolist() for key in ("few", "last", "apart")}
    assert found == {"few": [1, 0, 0, 0], "last": [0, 0, 0, 4], "apart": [2, 3]}
    assert b"".join(opened["scattered"].blocks()) == np.array([1, 4], "<f4").tobytes()
    assert memory() - before < 400_000


def test_a_regular_expression_without_end_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_limits, "SECONDS", 0.3)
    path = save_zip({"a" * 60: ramp(1)}, tmp_path)
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="searches without end"):
        ckpt_surgeon.rename(ckpt_surgeon.open(path), [("(a+)+b", "c")], regex=True)
    assert time.monotonic() - began < 10


# -- damage is told wherever bytes pass through memory


def damaged(folder: Path) -> Path:
    path = save_zip(OrderedDict(w=ramp(64, 8), t=ramp(16, 16).t(), rows=ramp(100, 4)[10:90]), folder)
    with zipfile.ZipFile(path) as archive:
        infos = {info.filename.rpartition("/")[2]: info for info in archive.infolist() if "/data/" in info.filename}
    raw = bytearray(path.read_bytes())
    for info in infos.values():
        start = info.header_offset + 30 + int.from_bytes(raw[info.header_offset + 26 :][:2], "little")
        start += int.from_bytes(raw[info.header_offset + 28 :][:2], "little")
        raw[start + info.file_size // 2] ^= 0x10
    return save(bytes(raw), folder, "damaged.pth")


@pytest.mark.parametrize("key", ["w", "t", "rows"])
def test_a_flipped_bit_is_told_where_values_are_read(key: str, tmp_path: Path) -> None:
    from ckpt_surgeon.reading import comparing

    path = damaged(tmp_path)
    for use in (comparing.stats, comparing.tensor_hash, lambda one: b"".join(one.blocks())):
        tensor_of = ckpt_surgeon.open(path)[key]
        with pytest.raises(BrokenFile, match="CRC"):
            use(tensor_of)
    other = save(path.read_bytes(), tmp_path, "copy.pth")
    with pytest.raises(BrokenFile, match="CRC"):
        comparing.same_bytes(ckpt_surgeon.open(path)[key], ckpt_surgeon.open(other)[key])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_the_kernel_copies_is_compared_beside_it_and_damage_does_not_travel(suffix: str, tmp_path: Path) -> None:
    path, out = damaged(tmp_path), tmp_path / f"out{suffix}"
    before = set(tmp_path.iterdir())
    with pytest.raises(BrokenFile, match="CRC"):
        ckpt_surgeon.save(ckpt_surgeon.keep(ckpt_surgeon.open(path), ["w"]), out)
    assert not out.exists()
    assert set(tmp_path.iterdir()) == before


def test_what_is_copied_unchecked_keeps_its_checksum_so_that_damage_shows(tmp_path: Path) -> None:
    path = damaged(tmp_path)
    ckpt_surgeon.save(ckpt_surgeon.keep(ckpt_surgeon.open(path), ["w"]), tmp_path / "out.pth", check=False)
    with pytest.raises(BrokenFile, match="CRC"):
        ckpt_surgeon.ls(tmp_path / "out.pth", check=True)


def test_a_record_that_is_rewritten_with_its_checksum_is_sound(tmp_path: Path) -> None:
    path = save_zip({"w": ramp(4)}, tmp_path)
    made = rewritten(path, tmp_path / "made.pth", records={"data/0": bytes(16)})
    assert_same(ckpt_surgeon.load(made), {"w": torch.zeros(4)})
