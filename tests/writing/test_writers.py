"""Every state_dict of the table through every writer, read back by torch and safetensors; and data that is not lost."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import signal
import struct
import subprocess
import sys
import textwrap
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from command_line import Run
from tables import (
    NAMES,
    TABLE,
    StateDict,
    assert_same,
    elements,
    groups,
    in_safetensors,
    noise,
    ramp,
    rewritten,
    save_big_endian,
    save_deflated,
    save_from,
    save_legacy,
    save_safetensors,
    save_shards,
    save_without_checksums,
    save_zip,
)

import ckpt_surgeon
from ckpt_surgeon import BrokenFile, ByteSpan, Checkpoint, EditError, FileError, OutputExists, Storage, StoredTensor
from ckpt_surgeon.files.local import LocalPath
from ckpt_surgeon.files.paths import FilePath
from ckpt_surgeon.formats import safetensors as safetensors_format
from ckpt_surgeon.formats.zip import archive as zip_archive
from ckpt_surgeon.formats.zip import torch_zip
from ckpt_surgeon.tensors.dtypes import BY_NAME
from ckpt_surgeon.writing.plan import plan
from ckpt_surgeon.writing.write import write

pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.filterwarnings("ignore:BComplex32 support is experimental"),
]

Source = Callable[[StateDict, Path], "Checkpoint | StateDict"]

SOURCES: dict[str, Source] = {
    "file": lambda state, folder: ckpt_surgeon.open(save_zip(state, folder)),
    "memory": lambda state, folder: state,
}
CONTAINERS: dict[str, Callable[[StateDict, Path], Path]] = {
    "legacy": save_legacy,
    "deflated": save_deflated,
    "big-endian": save_big_endian,
    "without checksums": save_without_checksums,
    "safetensors": save_safetensors,
    "shards": lambda state, folder: save_shards(state, folder, ".bin"),
}
SUITABLE = [name for name in NAMES if in_safetensors(name)]
PACKED = "float4_e2m1fn_x2"  # safetensors takes it in shapes that fill its bytes; it has a test of its own
UNSUITABLE = [name for name in NAMES if not in_safetensors(name) and not name.startswith(PACKED)]
TYPICAL = ["dense", "transposed", "step 2", "expanded", "channels last", "tied", "first rows", "0-d", "empty",
           "conjugate", "negative", "odd keys", "large strided", "complex64", "bfloat16", "uint16 stepped"]  # fmt: skip


def skip_unswapped(name: str, container: str) -> None:
    """torch does not swap these when it reads a file of the other byte order, so their tensors are named only."""
    if container == "big-endian" and name.startswith("uint16"):
        pytest.skip("its tensors are named and not copied")


def written(state: Checkpoint | StateDict, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    ckpt_surgeon.save(state, path)
    return path


def header_of(path: Path) -> tuple[dict[str, dict[str, object]], int]:
    """The header of a safetensors file, and where its data begins."""
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        return json.loads(file.read(length)), 8 + length


def debris(folder: Path, *expected: str) -> list[str]:
    return sorted(set(os.listdir(folder)) - set(expected))


# -- the table


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", NAMES)
def test_a_pth_is_read_back_by_torch_mapped_or_not(name: str, source: str, tmp_path: Path) -> None:
    state = TABLE[name]()
    out = written(SOURCES[source](state, tmp_path), tmp_path / "out" / "model.pth")
    for mapped in (False, True):
        theirs = torch.load(out, mmap=mapped)
        assert_same(theirs, state)
        assert getattr(theirs, "_metadata", None) == getattr(state, "_metadata", None)
    with zipfile.ZipFile(out) as archive:
        assert archive.testzip() is None


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", SUITABLE)
def test_a_safetensors_file_is_read_back_by_its_own_package(name: str, source: str, tmp_path: Path) -> None:
    state = TABLE[name]()
    out = written(SOURCES[source](state, tmp_path), tmp_path / "out" / "model.safetensors")
    assert_same(safetensors.torch.load_file(out), state, order=False)
    assert list(ckpt_surgeon.open(out)) == list(state)


def test_two_numbers_a_byte_are_counted_as_safetensors_counts_them(tmp_path: Path) -> None:
    state = {"packed": torch.arange(24, dtype=torch.uint8).reshape(4, 6).view(getattr(torch, PACKED))}
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    safetensors.torch.save_file(state, theirs, {"format": "pt"})
    ckpt_surgeon.save(ckpt_surgeon.open(theirs), ours)
    assert ours.read_bytes() == theirs.read_bytes()
    assert_same(safetensors.torch.load_file(ours), state)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", UNSUITABLE)
def test_what_safetensors_cannot_hold_is_refused_by_name(name: str, source: str, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    given = SOURCES[source](TABLE[name](), tmp_path)
    with pytest.raises(EditError, match=f"safetensors cannot hold 'weight' \\({name.split()[0]}\\)"):
        ckpt_surgeon.save(given, out)
    assert debris(tmp_path, "model.pth") == []


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", [name for name in NAMES if len(TABLE[name]()) > 1])
def test_shards_of_pth_are_read_back_by_torch(name: str, source: str, tmp_path: Path) -> None:
    state = TABLE[name]()
    given = SOURCES[source](state, tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    planned = ckpt_surgeon.save(given, out / "model.bin", max_shard_size=1)
    read: StateDict = {}
    for file in planned.files:
        read |= torch.load(str(file.path), mmap=True)
    assert_same(read, state, order=False)
    assert_index(planned.index, read)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", [name for name in SUITABLE if len(TABLE[name]()) > 1])
def test_shards_of_safetensors_are_read_back_by_their_own_package(name: str, source: str, tmp_path: Path) -> None:
    state = TABLE[name]()
    given = SOURCES[source](state, tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    planned = ckpt_surgeon.save(given, out / "model.safetensors", max_shard_size=1)
    read: StateDict = {}
    for file in planned.files:
        read |= safetensors.torch.load_file(str(file.path))
    assert_same(read, state, order=False)
    assert_index(planned.index, read)


def assert_index(index: FilePath | None, state: StateDict) -> None:
    """A set of shards has an index that lists every key, in order; a single file has none."""
    if index is None:
        return
    path = Path(str(index))
    content = json.loads(path.read_text("utf-8"))
    assert sorted(content["weight_map"]) == sorted(state)
    assert content["metadata"]["total_size"] == sum(tensor.numel() * tensor.itemsize for tensor in state.values())
    assert all((path.parent / name).is_file() for name in content["weight_map"].values())
    assert len(debris(path.parent, path.name, *content["weight_map"].values())) == 0


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", TYPICAL)
def test_every_container_becomes_every_other(name: str, container: str, suffix: str, tmp_path: Path) -> None:
    skip_unswapped(name, container)
    state = TABLE[name]()
    source = CONTAINERS[container](state, tmp_path)
    out = tmp_path / "out" / f"model{suffix}"
    out.parent.mkdir()
    ckpt_surgeon.convert(source, out)
    if suffix == ".pth":
        assert_same(torch.load(out, mmap=True), state, order=container != "safetensors")
        with zipfile.ZipFile(out) as archive:
            assert archive.testzip() is None
    else:
        assert_same(safetensors.torch.load_file(out), state, order=False)


# -- how a .pth is written


@pytest.mark.parametrize("source", [*SOURCES, "deflated", "big-endian", "legacy"])
@pytest.mark.parametrize("name", [*TYPICAL, "permuted", "diagonal", "ranks", "reshaped tie"])
def test_tensors_that_are_dense_in_any_order_keep_their_strides(name: str, source: str, tmp_path: Path) -> None:
    skip_unswapped(name, source)
    state = TABLE[name]()
    if source in SOURCES:
        given = SOURCES[source](state, tmp_path)
    else:
        given = ckpt_surgeon.open(CONTAINERS[source](state, tmp_path))
    loaded = torch.load(written(given, tmp_path / "out" / "model.pth"))
    assert_same(loaded, state)
    for key, tensor in loaded.items():
        if tensor.numel():
            assert (key, tensor.stride()) == (key, torch.empty_like(state[key]).stride())


@pytest.mark.parametrize("source", SOURCES)
def test_ties_share_their_storage_and_views_do_not(source: str, tmp_path: Path) -> None:
    state = {**TABLE["tied"](), **TABLE["first rows"](), **TABLE["reshaped tie"]()}
    out = written(SOURCES[source](state, tmp_path), tmp_path / "out" / "model.pth")
    assert groups(torch.load(out)) == {frozenset({"embed.weight", "head.weight"})}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", ["conjugate", "negative"])
def test_a_conjugate_is_not_taken_for_the_tensor_it_shares_its_storage_with(
    name: str, source: str, tmp_path: Path
) -> None:
    state = TABLE[name]()
    out = written(SOURCES[source](state, tmp_path), tmp_path / "out" / "model.safetensors")
    assert_same(safetensors.torch.load_file(out), state, order=False)


def test_tied_conjugates_stay_tied(tmp_path: Path) -> None:
    weight = torch.complex(ramp(3), ramp(3)).conj()
    out = written({"a": weight, "b": weight}, tmp_path / "model.pth")
    assert groups(torch.load(out)) == {frozenset({"a", "b"})}


def test_tensors_that_begin_at_one_address_with_storages_of_two_sizes_are_both_whole(tmp_path: Path) -> None:
    array = np.arange(8, dtype=np.float32)
    state = {"some": torch.from_numpy(array[:2]), "all": torch.from_numpy(array)}
    assert_same(torch.load(written(state, tmp_path / "model.pth")), state)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_views_are_written_compactly(suffix: str, source: str, tmp_path: Path) -> None:
    table = ramp(100_000, 4)
    given = SOURCES[source]({"rows": table[:2], "column": table[:5, 1], "row": table[50_000]}, tmp_path)
    assert written(given, tmp_path / "out" / f"model{suffix}").stat().st_size < 4_000


def test_everything_says_cpu_whatever_device_it_was_saved_from(tmp_path: Path) -> None:
    path = save_from("cuda:0", TABLE["tied"](), tmp_path)
    out = written(ckpt_surgeon.open(path), tmp_path / "out" / "model.pth")
    assert_same(torch.load(out), TABLE["tied"](), ties=True)
    assert {tensor.device for tensor in ckpt_surgeon.open(out).values()} == {"cpu"}


@pytest.mark.parametrize("source", ["zip", "unaligned zip", "legacy", "safetensors", "memory"])
@pytest.mark.parametrize("count", [3, 20_001])
def test_every_record_is_aligned_so_that_it_can_be_mapped(count: int, source: str, tmp_path: Path) -> None:
    state = {
        "bytes": noise("uint8", count),
        **{key: noise(key, count) for key in ("float64", "complex128", "bfloat16")},
    }
    given: Checkpoint | StateDict = state
    if source == "zip":
        given = ckpt_surgeon.open(save_zip(state, tmp_path))
    elif source == "unaligned zip":
        given = ckpt_surgeon.open(rewritten(save_zip(state, tmp_path), tmp_path / "odd.pth"))
    elif source == "legacy":
        given = ckpt_surgeon.open(save_legacy(state, tmp_path))
    elif source == "safetensors":
        del state["complex128"]
        given = ckpt_surgeon.open(save_safetensors(state, tmp_path))
    out = written(given, tmp_path / "out" / "model.pth")
    for key, tensor in ckpt_surgeon.open(out).items():
        assert tensor.span is not None
        assert (key, tensor.span.start % 64) == (key, 0)
    for tensor in torch.load(out, mmap=True).values():
        assert tensor.data_ptr() % tensor.itemsize == 0


def test_an_output_does_not_depend_on_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ckpt_surgeon.open(save_zip(TABLE["versioned"](), tmp_path))
    first = written(source, tmp_path / "a" / "model.pth").read_bytes()
    monkeypatch.setattr("time.time", lambda: 2e9)
    assert written(source, tmp_path / "b" / "model.pth").read_bytes() == first


def test_more_tensors_than_a_plain_zip_can_count_are_written(tmp_path: Path) -> None:
    one = ramp(66_000)
    out = written({str(index): one[index] for index in range(66_000)}, tmp_path / "model.pth")
    with zipfile.ZipFile(out) as archive:
        assert len(archive.namelist()) == 66_003
        assert archive.read("archive/data/65999") == elements(one[65_999])
    reader = torch._C.PyTorchFileReader(str(out))
    assert reader.get_record("data/65998") == elements(one[65_998])
    assert b"".join(ckpt_surgeon.open(out)["65997"].blocks()) == elements(one[65_997])


class SeekingSink:
    """Leaves holes where large records would be copied, so that the layout of huge files can be seen in small."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    @property
    def position(self) -> int:
        return self.file.tell()

    def literal(self, raw: bytes | memoryview) -> None:
        self.file.write(raw)

    def copy(self, span: ByteSpan) -> None:
        if len(span) > 1 << 30:
            self.file.seek(len(span), os.SEEK_CUR)
        else:
            self.file.writelines(span.blocks())

    def stream(self, blocks: Iterable[bytes | memoryview], nbytes: int, *, checksum: bool = False) -> int:
        raise AssertionError("everything is one span here")

    can_patch = True

    def patch(self, position: int, raw: bytes) -> None:
        raise AssertionError("every checksum is known here")


def test_records_over_four_gigabytes_and_what_follows_them_are_found_by_torch(tmp_path: Path) -> None:
    size = 5 << 30
    path = tmp_path / "source"
    path.write_bytes(elements(ramp(4)))
    try:
        os.truncate(path, size)
    except OSError:
        pytest.skip("this file system has no files of that size")
    crc32 = zlib.crc32(elements(ramp(4)))
    huge = Storage(ByteSpan(LocalPath(path), 0, size), size, crc32=0)
    small = Storage(ByteSpan(LocalPath(path), 0, 16), 16, crc32=crc32)
    tensors = {
        "before": StoredTensor(BY_NAME["float32"], (4,), (1,), 0, small),
        "huge": StoredTensor(BY_NAME["uint8"], (size,), (1,), 0, huge),
        "after": StoredTensor(BY_NAME["float32"], (2, 2), (1, 2), 0, Storage(small.span, 16, crc32=crc32)),
    }
    out = tmp_path / "model.pth"
    with open(out, "wb") as file:
        torch_zip.write(SeekingSink(file), tensors)
    with zipfile.ZipFile(out) as archive:
        sizes = {info.filename: (info.file_size, info.compress_size) for info in archive.infolist()}
        assert sizes["archive/data/1"] == (size, size)
        assert archive.getinfo("archive/data/2").header_offset > size
    loaded = torch.load(out, mmap=True)
    assert loaded["huge"].shape == (size,)
    assert_same({"before": loaded["before"], "after": loaded["after"]}, {"before": ramp(4), "after": ramp(2, 2).t()})
    opened = ckpt_surgeon.open(out)
    assert opened["huge"].nbytes == size
    assert b"".join(opened["after"].blocks()) == elements(ramp(2, 2).t())


@pytest.mark.parametrize("size", [0xFFFFFFFE, 0xFFFFFFFF, 0x100000000])
@pytest.mark.parametrize("position", [0, 0xFFFFFFFE, 0xFFFFFFFF, 0x100000000])
def test_sizes_and_places_around_four_gigabytes_are_read_back(size: int, position: int, tmp_path: Path) -> None:
    path = tmp_path / "sparse.zip"
    directory = zip_archive.Directory()
    with open(path, "wb") as file:
        file.seek(position)
        file.write(directory.local("a", size, 1, position))
        start = file.tell()
        file.seek(size, os.SEEK_CUR)
        second = file.tell()
        file.write(directory.local("b", 3, 2, second) + b"xyz")
        file.write(directory.finish(file.tell()))
    members = zip_archive.read_archive(LocalPath(path)).members
    assert (members["a"].start, members["a"].size, members["a"].header) == (start, size, position)
    assert start % 64 == 0
    with zipfile.ZipFile(path) as archive:
        infos = {info.filename: (info.file_size, info.header_offset) for info in archive.infolist()}
    assert infos == {"a": (size, position), "b": (3, second)}


# -- how a safetensors file is written


def test_every_tensor_is_aligned_to_its_own_item_size(tmp_path: Path) -> None:
    state = {"a": noise("uint8", 3), "b": noise("float64", 1), "c": noise("bool", 5), "d": noise("bfloat16", 3)}
    state |= {"e": noise("complex64", 1), "f": noise("int32", 3), "größe": noise("uint8", 1), "g": noise("float16", 1)}
    for count in range(2, len(state) + 1):
        some = dict(list(state.items())[:count])
        out = written(some, tmp_path / str(count) / "model.safetensors")
        header, start = header_of(out)
        assert start % 8 == 0
        for key, tensor in some.items():
            offsets = header[key]["data_offsets"]
            assert isinstance(offsets, list)
            assert (start + offsets[0]) % tensor.itemsize == 0
        assert_same(safetensors.torch.load_file(out), some, order=False)


@pytest.mark.parametrize("source", SOURCES)
def test_the_header_says_that_the_tensors_are_torch_s(source: str, tmp_path: Path) -> None:
    out = written(SOURCES[source](TABLE["dense"](), tmp_path), tmp_path / "out" / "model.safetensors")
    with safetensors.safe_open(out, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_the_metadata_of_the_source_and_of_the_call_are_kept(tmp_path: Path) -> None:
    source = tmp_path / "source.safetensors"
    safetensors.torch.save_file({"a": ramp(2)}, source, metadata={"licence": "MIT", "step": "1"})
    out = tmp_path / "out.safetensors"
    ckpt_surgeon.save(ckpt_surgeon.open(source), out, metadata={"step": "2"})
    with safetensors.safe_open(out, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "licence": "MIT", "step": "2"}


def test_ties_are_kept_as_all_their_keys(tmp_path: Path) -> None:
    out = written(TABLE["tied"](), tmp_path / "model.safetensors")
    assert_same(safetensors.torch.load_file(out), TABLE["tied"](), order=False)


def test_a_large_record_lies_at_the_same_place_in_a_page_as_in_its_source(tmp_path: Path) -> None:
    source = ckpt_surgeon.open(save_zip({"weight": ramp(50_000), "bias": ramp(3)}, tmp_path))
    for suffix in (".pth", ".safetensors"):
        opened = ckpt_surgeon.open(written(source, tmp_path / "out" / f"model{suffix}"))
        starts = [span.start % 4096 for span in (source["weight"].span, opened["weight"].span) if span is not None]
        assert starts == [starts[0]] * 2


# -- shards


def test_shards_hold_no_more_than_they_may_unless_one_tensor_does(tmp_path: Path) -> None:
    state = {f"layer{index}": ramp(100) for index in range(7)} | {"large": ramp(1000), "last": ramp(10)}
    planned = ckpt_surgeon.save(state, tmp_path / "model.safetensors", max_shard_size=900)
    sizes = [[tensor.nbytes for tensor in file.tensors.values()] for file in planned.files]
    assert sizes == [[400, 400], [400, 400], [400, 400], [400], [4000], [40]]
    assert [file.path.name for file in planned.files][:2] == [
        "model-00001-of-00006.safetensors",
        "model-00002-of-00006.safetensors",
    ]
    assert_same(ckpt_surgeon.load(tmp_path), state)


def test_ties_stay_in_one_shard(tmp_path: Path) -> None:
    state = TABLE["tied"]()
    planned = ckpt_surgeon.save(state, tmp_path / "model.pth", max_shard_size=1)
    assert [list(file.tensors) for file in planned.files] == [["embed.weight", "head.weight"], ["other.weight"]]
    assert groups(torch.load(str(planned.files[0].path))) == {frozenset({"embed.weight", "head.weight"})}
    assert list(ckpt_surgeon.open(tmp_path)) == list(state)


def test_what_fits_into_one_shard_is_one_file(tmp_path: Path) -> None:
    planned = ckpt_surgeon.save(TABLE["dense"](), tmp_path / "model.safetensors", max_shard_size=10_000)
    assert planned.index is None
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_shards_carry_the_versions_of_their_modules(tmp_path: Path) -> None:
    state = TABLE["versioned"]()
    ckpt_surgeon.save(state, tmp_path / "model.pth", max_shard_size=1)
    assert ckpt_surgeon.open(tmp_path).versions == dict(state._metadata)  # type: ignore[attr-defined]


def test_shards_that_a_new_index_does_not_list_go_only_when_replacing_is_allowed(tmp_path: Path) -> None:
    state = {"a": ramp(10), "b": ramp(10), "c": ramp(10)}
    out = tmp_path / "model.safetensors"
    ckpt_surgeon.save(state, out, max_shard_size=40)
    (tmp_path / "model.safetensors.index.json").unlink()
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(OutputExists):
        ckpt_surgeon.save(state, out, max_shard_size=80)
    assert sorted(os.listdir(tmp_path)) == before
    ckpt_surgeon.save(state, out, max_shard_size=80, force=True)
    assert debris(tmp_path) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert_same(ckpt_surgeon.load(tmp_path), state)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_shards_may_be_made_anew_in_their_place(suffix: str, tmp_path: Path) -> None:
    state = {f"module.{key}": ramp(10) + index for index, key in enumerate("abcd")}
    out = tmp_path / f"model{suffix}"
    ckpt_surgeon.save(state, out, max_shard_size=40)
    stripped = ckpt_surgeon.strip_prefix(ckpt_surgeon.open(tmp_path))
    ckpt_surgeon.save(stripped, out, max_shard_size=40, force=True)
    assert_same(ckpt_surgeon.load(tmp_path), {key.removeprefix("module."): t for key, t in state.items()})


def test_an_existing_shard_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"mine")
    with pytest.raises(OutputExists, match=r"model-00002-of-00002\.safetensors: exists already"):
        ckpt_surgeon.save({"a": ramp(2), "b": ramp(2)}, tmp_path / "model.safetensors", max_shard_size=8)
    assert os.listdir(tmp_path) == ["model-00002-of-00002.safetensors"]


# -- the place of an output


def test_an_existing_output_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "model.pth"
    out.write_bytes(b"mine")
    with pytest.raises(OutputExists, match="exists already, nothing was written; use force=True"):
        ckpt_surgeon.save(TABLE["dense"](), out)
    assert out.read_bytes() == b"mine"


def test_a_link_to_nowhere_is_an_existing_output(tmp_path: Path) -> None:
    (tmp_path / "model.pth").symlink_to("gone.pth")
    with pytest.raises(OutputExists):
        ckpt_surgeon.save(TABLE["dense"](), tmp_path / "model.pth")


IN_PLACE = {"zip": save_zip, "legacy": save_legacy, "safetensors": save_safetensors, "deflated": save_deflated}


@pytest.mark.parametrize("container", IN_PLACE)
@pytest.mark.parametrize("name", ["dense", "large strided", "tied"])
def test_a_file_can_be_replaced_by_its_own_edit(name: str, container: str, ckpt: Run, tmp_path: Path) -> None:
    state = TABLE[name]()
    path = IN_PLACE[container]({f"module.{key}": tensor for key, tensor in state.items()}, tmp_path)
    others = set(os.listdir(tmp_path)) - {path.name}
    assert ckpt("strip-prefix", path, path).status == 2
    assert ckpt("strip-prefix", path, path, "--force").status == 0
    read = safetensors.torch.load_file(path) if path.suffix == ".safetensors" else torch.load(path)
    assert_same(read, state, order=container != "safetensors")
    assert debris(tmp_path, path.name, *others) == []


def test_a_linked_output_keeps_its_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    real = tmp_path / "disk" / "real.pth"
    real.write_bytes(b"old")
    link = tmp_path / "link.pth"
    link.symlink_to("disk/real.pth")
    ckpt_surgeon.save(TABLE["dense"](), link, force=True)
    assert link.is_symlink()
    assert_same(torch.load(real), TABLE["dense"]())
    assert debris(tmp_path / "disk", "real.pth") == []
    assert debris(tmp_path, "disk", "link.pth") == []


def test_a_file_may_be_replaced_through_a_link_to_itself(tmp_path: Path) -> None:
    real = save_zip({"module.a": ramp(5)}, tmp_path)
    link = tmp_path / "link.pth"
    link.symlink_to(real)
    ckpt_surgeon.save(ckpt_surgeon.strip_prefix(ckpt_surgeon.open(link)), link, force=True)
    assert_same(torch.load(real), {"a": ramp(5)})


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_mode_of_an_output_follows_the_umask(
    suffix: str, mask: int, mode: int, umask: Callable[[int], int], tmp_path: Path
) -> None:
    umask(mask)
    planned = ckpt_surgeon.save(TABLE["dense"](), tmp_path / f"model{suffix}", max_shard_size=16)
    paths = [Path(str(path)) for path in (*(file.path for file in planned.files), planned.index) if path]
    assert len(paths) == 3
    assert [path.stat().st_mode & 0o777 for path in paths] == [mode] * 3


def test_a_relative_output_is_written_where_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ckpt_surgeon.save(TABLE["dense"](), "model.safetensors", max_shard_size=16)
    assert len(os.listdir(tmp_path)) == 3


def test_progress_counts_every_byte_of_the_tensors(tmp_path: Path) -> None:
    source = ckpt_surgeon.open(save_zip({**TABLE["large strided"](), **TABLE["0-d"](), "big": ramp(50_000)}, tmp_path))
    told: list[int] = []
    ckpt_surgeon.save(source, tmp_path / "out.safetensors", progress=told.append)
    assert sum(told) == sum(tensor.nbytes for tensor in source.values())
    assert len(told) > 3


def test_a_dry_run_writes_nothing(ckpt: Run, tmp_path: Path) -> None:
    path = save_zip({"module.a": ramp(2), "b": ramp(2)}, tmp_path)
    for words in (["convert"], ["strip-prefix"], ["strip-prefix", "--max-shard-size", "8B"], ["convert", "--force"]):
        ran = ckpt(*words, path, tmp_path / "out.safetensors", "--dry-run")
        assert ran.status == 0
        assert "nothing was written" in ran.out
        assert debris(tmp_path, "model.pth") == []


# -- the ways to copy


def no_such_call(*_: object) -> int:
    raise OSError(errno.ENOSYS, "Function not implemented")


def other_device(*_: object) -> int:
    raise OSError(errno.EXDEV, "Invalid cross-device link")


def in_small_bites(real: Callable[..., int], place: int) -> Callable[..., int]:
    """A kernel call that copies less than it was asked to."""

    def call(*arguments: int) -> int:
        cut = [min(value, 777) if index == place else value for index, value in enumerate(arguments)]
        return real(*cut)

    return call


@pytest.mark.parametrize("way", ["as here", "no calls", "no sendfile", "not implemented", "other device", "bites"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_every_way_to_copy_has_the_same_result(
    way: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"a": noise("float32", 30_000), "b": noise("int64", 5), "c": noise("float16", 100_001)}
    source = ckpt_surgeon.open(save_zip(state, tmp_path))
    wanted = written(source, tmp_path / "plain" / f"model{suffix}").read_bytes()
    if way == "no calls":
        monkeypatch.delattr(os, "sendfile")
        monkeypatch.delattr(os, "copy_file_range")
    elif way == "no sendfile":
        monkeypatch.delattr(os, "sendfile")
    elif way == "not implemented":
        monkeypatch.setattr(os, "sendfile", no_such_call)
        monkeypatch.setattr(os, "copy_file_range", no_such_call)
    elif way == "other device":
        monkeypatch.setattr(os, "copy_file_range", other_device)
    elif way == "bites":
        monkeypatch.setattr(os, "sendfile", in_small_bites(os.sendfile, 3))
        monkeypatch.setattr(os, "copy_file_range", in_small_bites(os.copy_file_range, 2))
    out = written(source, tmp_path / "other" / f"model{suffix}")
    assert out.read_bytes() == wanted
    read = torch.load(out) if suffix == ".pth" else safetensors.torch.load_file(out)
    assert_same(read, state, order=False)


# -- checksums


def test_the_checksums_of_records_that_are_copied_are_carried_over(tmp_path: Path) -> None:
    path = save_zip({"weight": ramp(50_000), "bias": ramp(3)}, tmp_path)
    out = written(ckpt_surgeon.open(path), tmp_path / "out" / "model.pth")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out) as new:
        assert old.getinfo("model/data/0").CRC == new.getinfo("archive/data/0").CRC
        assert new.testzip() is None


def damaged(state: StateDict, key: str, folder: Path) -> Path:
    """A file in which one bit of one tensor is wrong."""
    path = save_zip(state, folder)
    span = ckpt_surgeon.open(path)[key].span
    assert span is not None
    raw = bytearray(path.read_bytes())
    raw[(span.start + span.stop) // 2] ^= 4
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("count", [3, 50_000])
def test_ls_check_names_the_tensor_that_is_damaged(count: int, ckpt: Run, tmp_path: Path) -> None:
    path = damaged({"good": ramp(5), "bad.weight": ramp(count), "also": ramp(2)}, "bad.weight", tmp_path)
    assert ckpt("ls", path).status == 0
    ran = ckpt("ls", path, "--check")
    assert ran.status == 2
    assert ran.err.startswith(f"ckpt: {path}: tensor 'bad.weight': is damaged: the CRC of")
    assert ran.err.count("\n") == 1


def test_ls_check_says_how_much_it_read(ckpt: Run, tmp_path: Path) -> None:
    path = save_zip(TABLE["tied"](), tmp_path)
    assert "checked: 104 bytes read, no damage found" in ckpt("ls", path, "--check").out


def test_damage_in_a_source_is_refused_and_still_told_of_a_copy_that_was_not_checked(ckpt: Run, tmp_path: Path) -> None:
    path = damaged({"weight": ramp(50_000), "bias": ramp(3)}, "weight", tmp_path)
    out = tmp_path / "out.pth"
    ran = ckpt("convert", path, out)
    assert (ran.status, ran.out) == (2, "")
    assert "is damaged" in ran.err
    assert not out.exists()
    assert ckpt("convert", path, out, "--no-check").status == 0
    assert "tensor 'weight': is damaged" in ckpt("ls", out, "--check").err
    with zipfile.ZipFile(out) as archive:
        assert archive.testzip() == "archive/data/0"


def test_damage_in_bytes_that_are_read_is_an_error(ckpt: Run, tmp_path: Path) -> None:
    path = save_deflated({"weight": ramp(50_000)}, tmp_path)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)
    out = tmp_path / "out.pth"
    ran = ckpt("convert", path, out)
    assert (ran.status, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert debris(tmp_path, "model.pth", "deflated.pth") == []


# -- what was written is read back


def spoiled(spoil: Callable[[dict[str, object]], dict[str, object]], module: object) -> Callable[..., None]:
    real: Callable[..., None] = module.write  # type: ignore[attr-defined]

    def write(sink: object, tensors: dict[str, object], *rest: object) -> None:
        real(sink, spoil(dict(tensors)), *rest)

    return write


SPOILS: dict[str, Callable[[dict[str, object]], dict[str, object]]] = {
    "a tensor is dropped": lambda tensors: dict(list(tensors.items())[1:]),
    "the last one is dropped": lambda tensors: dict(list(tensors.items())[:-1]),
    "a key is another": lambda tensors: {f"{key}x": tensor for key, tensor in tensors.items()},
    "two are swapped": lambda tensors: dict(zip(tensors, reversed(tensors.values()), strict=True)),
    "the order is another": lambda tensors: dict(reversed(tensors.items())),
}


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_writer_that_does_not_write_what_was_planned_changes_nothing(
    spoil: str, suffix: str, existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = torch_zip if suffix == ".pth" else safetensors_format
    monkeypatch.setattr(module, "write", spoiled(SPOILS[spoil], module))
    out = tmp_path / f"model{suffix}"
    if existing:
        out.write_bytes(b"old")
    with pytest.raises(BrokenFile, match="did not read back as planned"):
        ckpt_surgeon.save({"a": ramp(2), "b": ramp(3), "c": noise("int32", 2)}, out, force=True)
    assert os.listdir(tmp_path) == ([out.name] if existing else [])
    assert not existing or out.read_bytes() == b"old"


def test_a_tensor_that_makes_fewer_bytes_than_it_has_is_refused(tmp_path: Path) -> None:
    short = ckpt_surgeon.ComputedTensor(BY_NAME["float32"], (4,), (), lambda _: iter([b"only this"]))
    for suffix in (".pth", ".safetensors"):
        with pytest.raises(EditError, match="a tensor of 16 bytes made 9"):
            ckpt_surgeon.save(Checkpoint({"short": short}), tmp_path / f"model{suffix}")
    assert os.listdir(tmp_path) == []


# -- failures


@pytest.mark.parametrize("kept", [0.5, 0.9, 0.0])
@pytest.mark.parametrize("name", ["large strided", "dense rows"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_source_that_becomes_shorter_leaves_the_old_file_whole(
    suffix: str, name: str, kept: float, tmp_path: Path
) -> None:
    state = TABLE[name]() if name in TABLE else {str(index): ramp(30_000) for index in range(5)}
    path = save_zip(state, tmp_path)
    opened = ckpt_surgeon.open(path)
    os.truncate(path, int(path.stat().st_size * kept))
    out = tmp_path / f"out{suffix}"
    out.write_bytes(b"old")
    with pytest.raises(BrokenFile, match=r"model\.pth: (ends|became shorter)"):
        ckpt_surgeon.save(opened, out, force=True)
    assert out.read_bytes() == b"old"
    assert debris(tmp_path, "model.pth", out.name) == []


def test_a_source_that_is_gone_is_named(tmp_path: Path) -> None:
    path = save_zip(TABLE["dense"](), tmp_path)
    opened = ckpt_surgeon.open(path)
    path.unlink()
    with pytest.raises(FileError, match=r"model\.pth"):
        ckpt_surgeon.save(opened, tmp_path / "out.pth")
    assert os.listdir(tmp_path) == []


def test_a_failure_in_the_last_shard_leaves_none(tmp_path: Path) -> None:
    def fail(_: object) -> Iterator[bytes]:
        raise OSError(errno.EIO, "Input/output error")

    state = {key: ckpt_surgeon.from_torch({key: ramp(4)})[key] for key in "abc"}
    state["d"] = ckpt_surgeon.ComputedTensor(BY_NAME["float32"], (4,), (), fail)
    with pytest.raises(FileError):
        ckpt_surgeon.save(Checkpoint(state), tmp_path / "model.safetensors", max_shard_size=16)
    assert os.listdir(tmp_path) == []


def test_an_interrupt_leaves_no_debris(tmp_path: Path) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "model.pth"
    out.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        ckpt_surgeon.save(TABLE["dense"](), out, force=True, progress=interrupt)
    assert os.listdir(tmp_path) == ["model.pth"]
    assert out.read_bytes() == b"old"


def test_planning_touches_nothing(tmp_path: Path) -> None:
    planned = plan(ckpt_surgeon.from_torch(TABLE["dense"]()), tmp_path / "model.pth")
    assert os.listdir(tmp_path) == []
    assert planned.nbytes >= 60
    write(planned)
    assert math.isclose(planned.nbytes, (tmp_path / "model.pth").stat().st_size, rel_tol=0.5)


def test_nothing_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(EditError, match="no tensor is left to write"):
        ckpt_surgeon.save({}, tmp_path / "model.pth")


def test_what_is_no_tensor_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(EditError, match="'epoch' is a int, not a tensor"):
        ckpt_surgeon.save({"a": ramp(2), "epoch": 3}, tmp_path / "model.pth")


@pytest.mark.parametrize("kind", ["sparse", "quantized", "meta"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.filterwarnings("ignore:.*[Qq]uantiz")
def test_tensors_that_are_more_than_elements_are_refused_by_name(kind: str, suffix: str, tmp_path: Path) -> None:
    odd = {
        "sparse": lambda: torch.eye(3).to_sparse(),
        "quantized": lambda: torch.quantize_per_tensor(ramp(3), 0.1, 0, torch.qint8),
        "meta": lambda: torch.empty(3, device="meta"),
    }[kind]()
    with pytest.raises(EditError, match=f"'odd' \\({kind}"):
        ckpt_surgeon.save({"plain": ramp(2), "odd": odd}, tmp_path / f"model{suffix}")
    assert os.listdir(tmp_path) == []


# -- signals and full disks, in a process of its own


# Copies in small steps and tells each: the test sends its signal at one of them.
STEPWISE = textwrap.dedent("""
    import sys, time
    from ckpt_surgeon import cli
    from ckpt_surgeon.files import sinks

    sinks.CHUNK = 4 << 20
    real = sinks.FileSink._copy_some

    def copy_some(self, source, at, count):
        print("step", flush=True)
        time.sleep(0.01)
        return real(self, source, at, count)

    sinks.FileSink._copy_some = copy_some
    sys.argv = ["ckpt", *sys.argv[1:]]
    cli.main()
""")
STEPS = 50  # of 4 MiB


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """A file of 200 MiB, most of it a hole."""
    size = STEPS * (4 << 20)
    entry = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    header = json.dumps({"module.weight": entry}).encode()
    path = tmp_path / "big.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + size)
    return path


def signalled(source: Path, out: Path, number: int, step: int) -> int:
    """Send a signal to a command at one of its steps; returns its exit status."""
    words = [sys.executable, "-c", STEPWISE, "strip-prefix", str(source), str(out), "--force"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(step):
            assert process.stdout.readline() == "step\n"
        process.send_signal(number)
        process.communicate()
        return process.returncode


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_kill_at_any_moment_leaves_the_old_file_whole(suffix: str, big: Path, tmp_path: Path) -> None:
    if suffix == ".pth":  # a source with checksums, so that the copy is the kernel's
        big = written({"module.weight": torch.zeros(STEPS * (4 << 20), dtype=torch.uint8)}, tmp_path / "big.pth")
    folder = tmp_path / "out"
    folder.mkdir()
    out = folder / f"model{suffix}"
    ckpt_surgeon.save(TABLE["dense"](), out)
    before = out.read_bytes()
    assert signalled(big, out, signal.SIGKILL, random.randint(1, STEPS - 10)) == -signal.SIGKILL
    assert out.read_bytes() == before
    (left,) = debris(folder, out.name)
    assert left.startswith(f".{out.name}.")
    assert left.endswith(".tmp")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_that_can_be_caught_leaves_no_debris(number: int, status: int, big: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    out.write_bytes(b"old")
    assert signalled(big, out, number, 3) == status
    assert out.read_bytes() == b"old"
    assert debris(tmp_path, big.name, out.name) == []


def limited(words: list[str], nbytes: int) -> subprocess.CompletedProcess[str]:
    """Run a command that may write no file of more than so many bytes."""
    script = textwrap.dedent(f"""
        import resource, sys
        resource.setrlimit(resource.RLIMIT_FSIZE, ({nbytes}, {nbytes}))
        from ckpt_surgeon.cli import main
        sys.argv = ["ckpt", *sys.argv[1:]]
        main()
    """)
    return subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)


def full_disk_sources(folder: Path) -> dict[str, Path]:
    """A source whose bytes the kernel copies, one whose bytes are gathered, and one of many small tensors."""
    folder.mkdir()
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    (folder / "c").mkdir()
    return {
        "copied": save_zip({"module.weight": ramp(1_000_000)}, folder / "a"),
        "gathered": save_zip({"module.weight": ramp(1000, 1000).t()[:-1]}, folder / "b"),
        "small": save_zip({f"module.{index}": ramp(1000) for index in range(1000)}, folder / "c"),
    }


@pytest.mark.parametrize("kind", ["copied", "gathered", "small"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_may_not_grow_leaves_the_old_one_whole(kind: str, suffix: str, tmp_path: Path) -> None:
    source = full_disk_sources(tmp_path / "in")[kind]
    folder = tmp_path / "out"
    folder.mkdir()
    out = folder / f"model{suffix}"
    out.write_bytes(b"old")
    ran = limited(["strip-prefix", str(source), str(out), "--force"], 2 << 20)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == (
        f"ckpt: {out}: could not be written (File too large), nothing was replaced; write elsewhere\n"
    )
    assert os.listdir(folder) == [out.name]
    assert out.read_bytes() == b"old"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(words, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("no disk can be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("kind", ["copied", "gathered", "small"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_full_disk_leaves_the_old_file_whole(
    kind: str, suffix: str, small_disk: Path, ckpt: Run, tmp_path: Path
) -> None:
    source = full_disk_sources(tmp_path / "in")[kind]
    out = small_disk / f"model{suffix}"
    out.write_bytes(b"old")
    ran = ckpt("strip-prefix", source, out, "--force")
    assert (ran.status, ran.out) == (2, "")
    assert ran.err == (
        f"ckpt: {out}: no space is left on its disk, nothing was replaced; free some or write elsewhere\n"
    )
    assert os.listdir(small_disk) == [out.name]
    assert out.read_bytes() == b"old"


def test_a_full_disk_is_told_without_a_disk(ckpt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    source = save_zip({"module.weight": ramp(100_000)}, tmp_path)
    monkeypatch.setattr(os, "sendfile", full)
    monkeypatch.setattr(os, "copy_file_range", full)
    ran = ckpt("strip-prefix", source, tmp_path / "out.pth")
    assert ran.status == 2
    assert "no space is left on its disk, nothing was replaced" in ran.err
    assert debris(tmp_path, "model.pth") == []
