"""Every state_dict of the table through every reader; the oracles are torch.load and safetensors."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tables import (
    NAMES,
    TABLE,
    WITHOUT_STORAGE_CLASS,
    StateDict,
    assert_same,
    dtype_of,
    elements,
    in_safetensors,
    noise,
    pickle_of,
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
from ckpt_surgeon import BrokenFile

pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.filterwarnings("ignore:BComplex32 support is experimental"),
]

Save = Callable[[StateDict, Path], Path]

TORCH: dict[str, Save] = {
    "zip": save_zip,
    "legacy": save_legacy,
    "deflated": save_deflated,
    "without checksums": save_without_checksums,
    "big-endian": save_big_endian,
}


def torch_reads(name: str, container: str) -> bool:
    """Whether torch reads back, right, what it wrote: of dtypes without a storage class, not everywhere."""
    return dtype_of(name) not in WITHOUT_STORAGE_CLASS or container not in ("legacy", "big-endian")


def torch_misreads(name: str, container: str) -> bool:
    """Whether torch gives numbers in the wrong byte order, so that their tensors are named only."""
    dtype = dtype_of(name)
    wide = dtype in WITHOUT_STORAGE_CLASS and getattr(torch, dtype).itemsize > 1
    return container == "big-endian" and wide


PAIRS = [(name, container) for container in TORCH for name in NAMES if not torch_misreads(name, container)]


# -- torch's containers


@pytest.mark.parametrize(("name", "container"), PAIRS)
def test_load_gives_what_torch_load_gives(name: str, container: str, tmp_path: Path) -> None:
    state = TABLE[name]()
    path = TORCH[container](state, tmp_path)
    loaded = ckpt_surgeon.load(path)
    assert_same(loaded, state, strides=True, ties=True)
    if torch_reads(name, container):
        theirs = torch.load(path, weights_only=True)
        assert_same(loaded, theirs, strides=True, ties=True)
        assert getattr(loaded, "_metadata", None) == getattr(theirs, "_metadata", None)


@pytest.mark.parametrize(("name", "container"), PAIRS)
def test_the_blocks_of_a_tensor_are_its_elements_in_order(name: str, container: str, tmp_path: Path) -> None:
    state = TABLE[name]()
    opened = ckpt_surgeon.open(TORCH[container](state, tmp_path))
    assert list(opened) == list(state)
    for key, tensor in state.items():
        ours = opened[key]
        assert (f"torch.{ours.dtype}", ours.shape) == (str(tensor.dtype), tuple(tensor.shape))
        assert b"".join(ours.blocks()) == elements(tensor), key


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_says_it_is_one_span_exactly_when_those_are_its_bytes(name: str, tmp_path: Path) -> None:
    state = TABLE[name]()
    path = save_zip(state, tmp_path)
    raw = path.read_bytes()
    for key, tensor in ckpt_surgeon.open(path).items():
        plain = state[key].is_contiguous() and not state[key].is_conj() and not state[key].is_neg()
        assert (tensor.span is not None) == plain, key
        if tensor.span is not None:
            assert raw[tensor.span.start : tensor.span.stop] == elements(state[key])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("legacy", [False, True])
def test_every_pickle_protocol_is_read(protocol: int, legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    state = {**TABLE["tied"](), **TABLE["transposed"](), **TABLE["odd keys"]()}
    torch.save(state, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    assert_same(ckpt_surgeon.load(path), torch.load(path, weights_only=False), strides=True, ties=True)


def test_a_parameter_with_attributes_is_its_tensor(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(ramp(2, 2))
    weight.group = "decay"  # type: ignore[attr-defined]
    path = save_zip({"weight": weight}, tmp_path)
    assert b"_rebuild_parameter_with_state" in pickle_of(path)
    assert_same(ckpt_surgeon.load(path), {"weight": weight})


def test_the_versions_of_modules_are_kept(tmp_path: Path) -> None:
    state = TABLE["versioned"]()
    opened = ckpt_surgeon.open(save_zip(state, tmp_path))
    assert opened.versions == dict(state._metadata)  # type: ignore[attr-defined]
    assert opened.versions is not None
    assert opened.versions["1"] == {"version": 2}


def test_a_plain_dict_has_no_versions(tmp_path: Path) -> None:
    assert ckpt_surgeon.open(save_zip(TABLE["dense"](), tmp_path)).versions is None


def test_ties_are_told_from_views(tmp_path: Path) -> None:
    opened = ckpt_surgeon.open(save_zip({**TABLE["tied"](), **TABLE["first rows"]()}, tmp_path))
    assert opened["embed.weight"].tie == opened["head.weight"].tie
    assert opened["table"].tie != opened["first"].tie
    assert opened.nbytes == (24 + 2 + 40 + 12) * 4


def test_a_zip_without_a_byte_order_is_little_endian(tmp_path: Path) -> None:
    state = TABLE["dense"]()
    source = save_zip(state, tmp_path)
    path = tmp_path / "old.pth"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            if not info.filename.endswith("byteorder"):
                new.writestr(info.filename, old.read(info))
    assert_same(ckpt_surgeon.load(path), torch.load(path))


def test_a_legacy_file_of_a_big_endian_machine_is_little_endian_as_all_are(tmp_path: Path) -> None:
    raw = save_legacy(TABLE["dense"](), tmp_path).read_bytes()
    flag = raw.index(b"\x88", raw.index(b"little_endian"))
    path = tmp_path / "big.pth"
    path.write_bytes(raw[:flag] + b"\x89" + raw[flag + 1 :])
    assert_same(ckpt_surgeon.load(path), torch.load(path))


def test_files_without_checksums_say_that_damage_cannot_be_told(tmp_path: Path) -> None:
    listing = ckpt_surgeon.ls(save_without_checksums(TABLE["dense"](), tmp_path), check=True)
    assert listing.notes == ("saved without checksums: damage cannot be told",)


def test_a_packed_record_that_unpacks_to_more_than_it_says_is_refused(tmp_path: Path) -> None:
    path = save_zip({"weight": torch.zeros(100)}, tmp_path)
    longer = rewritten(path, tmp_path / "bomb.pth", method=zipfile.ZIP_DEFLATED, records={"data/0": bytes(40_000)})
    longer.write_bytes(longer.read_bytes().replace(struct.pack("<I", 40_000), struct.pack("<I", 400)))
    with pytest.raises(BrokenFile, match="unpacks to more than its 400 bytes"):
        list(ckpt_surgeon.open(longer)["weight"].blocks())


# -- the pickles of torch 0.1 to 0.3, which had views of storages and another way to rebuild a tensor


class OldTensor:
    """Pickled as torch 0.3 pickled a tensor in a storage."""

    def __init__(self, storage: OldStorage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.parts = (storage, offset, size, stride)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return torch._utils._rebuild_tensor, self.parts


class OldStorage:
    def __init__(self, key: str, size: int, view: tuple[str, int, int] | None = None) -> None:
        self.saved = ("storage", torch.FloatStorage, key, "cpu", size, view)


class OldPickler(pickle.Pickler):
    def persistent_id(self, value: object) -> object:
        return value.saved if isinstance(value, OldStorage) else None


def save_as_torch_0_3(state: object, storages: dict[str, torch.Tensor], path: Path) -> Path:
    out = BytesIO()
    for header in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}):
        pickle.dump(header, out, protocol=2)
    OldPickler(out, protocol=2).dump(state)
    pickle.dump(list(storages), out, protocol=2)
    for tensor in storages.values():
        out.write(struct.pack("<q", tensor.numel()) + elements(tensor))
    path.write_bytes(out.getvalue())
    return path


def test_a_tensor_of_torch_0_3_is_read(tmp_path: Path) -> None:
    state = {"weight": OldTensor(OldStorage("17", 12), 4, (2, 3), (1, 2))}
    path = save_as_torch_0_3(state, {"17": ramp(12)}, tmp_path / "old.pth")
    assert_same(ckpt_surgeon.load(path), torch.load(path), strides=True)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_a_view_of_a_storage_in_an_old_file_begins_where_it_says(tmp_path: Path) -> None:
    state = {
        "all": OldTensor(OldStorage("1", 12), 0, (12,), (1,)),
        "some": OldTensor(OldStorage("1", 12, ("2", 5, 6)), 1, (2, 2), (2, 1)),
    }
    path = save_as_torch_0_3(state, {"1": ramp(12)}, tmp_path / "old.pth")
    assert_same(ckpt_surgeon.load(path), torch.load(path), strides=True)


# -- safetensors and shards


@pytest.mark.parametrize("name", [name for name in NAMES if in_safetensors(name)])
def test_safetensors_are_read_as_their_own_package_reads_them(name: str, tmp_path: Path) -> None:
    state = TABLE[name]()
    path = save_safetensors(state, tmp_path)
    opened = ckpt_surgeon.open(path)
    assert_same(ckpt_surgeon.load(opened), safetensors.torch.load_file(path), order=False)
    assert_same(ckpt_surgeon.load(opened), state, order=False)
    header = json.loads(path.read_bytes()[8 : 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]])
    assert list(opened) == [key for key in header if key != "__metadata__"]
    for key, tensor in state.items():
        assert b"".join(opened[key].blocks()) == elements(tensor)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("name", [name for name in NAMES if in_safetensors(name)])
@pytest.mark.parametrize("named", ["index", "directory"])
def test_shards_are_read_as_one(named: str, name: str, suffix: str, tmp_path: Path) -> None:
    state = TABLE[name]()
    index = save_shards(state, tmp_path, suffix)
    shards = sorted(tmp_path.glob(f"*{suffix}"))
    theirs: StateDict = {}
    for shard in shards:
        theirs |= safetensors.torch.load_file(shard) if suffix == ".safetensors" else torch.load(shard)
    loaded = ckpt_surgeon.load(index if named == "index" else tmp_path)
    assert_same(loaded, theirs, order=False, strides=suffix == ".bin")
    assert list(loaded) == list(state)


def test_the_metadata_of_safetensors_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": ramp(2)}, path, metadata={"format": "pt", "licence": "MIT"})
    assert dict(ckpt_surgeon.open(path).metadata) == {"format": "pt", "licence": "MIT"}


def test_index_and_shards_that_disagree_are_refused_with_all_that_is_wrong(tmp_path: Path) -> None:
    state = {"a": ramp(2), "b": ramp(2), "c": ramp(2), "d": ramp(2)}
    index = save_shards(state, tmp_path, ".safetensors")
    content = json.loads(index.read_text())
    shards = sorted(set(content["weight_map"].values()))
    del content["weight_map"]["a"]
    content["weight_map"] |= {"c": shards[0], "e": "gone.safetensors"}
    index.write_text(json.dumps(content))
    with pytest.raises(BrokenFile) as caught:
        ckpt_surgeon.open(index)
    for words in ("'gone.safetensors' is missing", "'c' is not in shard", "has 'a' that the index does not list"):
        assert words in str(caught.value)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/../../b.safetensors"])
def test_an_index_may_not_name_files_elsewhere(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(BrokenFile, match="outside its directory"):
        ckpt_surgeon.open(path)


# -- lazy and inert


def test_a_file_of_half_a_terabyte_opens(tmp_path: Path) -> None:
    count = 125_000_000_000
    header = json.dumps({"weight": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}).encode()
    path = tmp_path / "huge.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    try:
        os.truncate(path, 8 + len(header) + 4 * count)
    except OSError:
        pytest.skip("this file system has no files of that size")
    assert ckpt_surgeon.open(path).nbytes == 500_000_000_000


class Payload:
    """Runs code when Python's own pickle loads it."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("save", [save_zip, save_legacy])
def test_nothing_in_a_file_is_run(save: Callable[[object, Path], Path], tmp_path: Path) -> None:
    path = save({"state_dict": TABLE["dense"](), "run": Payload(tmp_path / "was run")}, tmp_path)
    assert_same(ckpt_surgeon.load(path), TABLE["dense"]())
    assert not (tmp_path / "was run").exists()
    assert ("run", "object of class posix.mkdir") in [(left.path, left.what) for left in ckpt_surgeon.ls(path).beside]


def test_a_tensor_that_is_more_than_its_elements_is_named_and_not_loaded(tmp_path: Path) -> None:
    path = save_zip({"dense": ramp(2), "sparse": torch.eye(3).to_sparse()}, tmp_path)
    opened = ckpt_surgeon.open(path)
    assert opened["sparse"].shape == (3, 3)
    with pytest.raises(ckpt_surgeon.EditError, match="'sparse' is a sparse_coo tensor"):
        ckpt_surgeon.load(opened)


# -- map_location


def keep(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
    return storage


def nothing(storage: torch.UntypedStorage, location: str) -> None:
    return None


LOCATIONS: dict[str, object] = {
    "string": "cpu",
    "device": torch.device("cpu"),
    "meta": "meta",
    "dict": {"cuda:0": "cpu"},
    "callable": keep,
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("location", LOCATIONS)
def test_tensors_saved_on_a_gpu_go_where_torch_load_puts_them(location: str, legacy: bool, tmp_path: Path) -> None:
    path = save_from("cuda:0", TABLE["tied"](), tmp_path, legacy=legacy)
    theirs = torch.load(path, map_location=LOCATIONS[location])  # type: ignore[arg-type]
    ours = ckpt_surgeon.load(path, map_location=LOCATIONS[location])  # type: ignore[arg-type]
    assert [(key, tensor.device) for key, tensor in ours.items()] == [(key, t.device) for key, t in theirs.items()]
    if location != "meta":
        assert_same(ours, theirs, strides=True, ties=True)


@pytest.mark.parametrize("location", [None, {"cuda:1": "cpu"}, nothing, "cuda:7"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_is_not_there_is_torch_s_own_error(location: object, tmp_path: Path) -> None:
    path = save_from("cuda:0", TABLE["dense"](), tmp_path)
    with pytest.raises(RuntimeError) as theirs:
        torch.load(path, map_location=location)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError) as ours:
        ckpt_surgeon.load(path, map_location=location)  # type: ignore[arg-type]
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("location", [None, nothing, {}, {"cuda:0": "meta"}])
def test_tensors_saved_on_the_cpu_stay_there(location: object, tmp_path: Path) -> None:
    path = save_zip(TABLE["tied"](), tmp_path)
    assert_same(ckpt_surgeon.load(path, map_location=location), torch.load(path, map_location=location), ties=True)  # type: ignore[arg-type]


def test_a_callable_is_asked_once_for_each_storage_with_its_location(tmp_path: Path) -> None:
    path = save_from("cuda:0", TABLE["tied"](), tmp_path)
    asked: list[tuple[str, int]] = []

    def place(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        asked.append((location, storage.nbytes()))
        return storage

    ckpt_surgeon.load(path, map_location=place)
    assert asked == [("cuda:0", 96), ("cuda:0", 8)]
    torch.load(path, map_location=place)  # type: ignore[arg-type]
    assert asked[2:] == asked[:2]


def test_the_device_that_a_tensor_was_saved_from_is_told(tmp_path: Path) -> None:
    path = save_from("cuda:0", TABLE["dense"](), tmp_path)
    assert {tensor.device for tensor in ckpt_surgeon.open(path).values()} == {"cuda:0"}
    assert ckpt_surgeon.ls(path).devices == ("cuda:0",)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA here")
@pytest.mark.parametrize("location", [None, "cuda", "cuda:0", torch.device("cuda", 0), {"cpu": "cuda:0"}])
def test_tensors_go_to_a_real_gpu(location: object, tmp_path: Path) -> None:
    path = save_zip({key: tensor.cuda() for key, tensor in TABLE["dense"]().items()}, tmp_path)
    ours = ckpt_surgeon.load(path, map_location=location)  # type: ignore[arg-type]
    theirs = torch.load(path, map_location=location)  # type: ignore[arg-type]
    assert [tensor.device for tensor in ours.values()] == [tensor.device for tensor in theirs.values()]
    assert_same(ours, theirs, strides=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA here")
def test_ties_on_a_gpu_are_kept_when_they_are_written(tmp_path: Path) -> None:
    weight = ramp(3, 4).cuda()
    ckpt_surgeon.save({"a": weight, "b": weight, "view": weight[:1]}, tmp_path / "model.pth")
    assert_same(torch.load(tmp_path / "model.pth"), {"a": weight, "b": weight, "view": weight[:1]}, order=True)
    assert ckpt_surgeon.open(tmp_path / "model.pth").nbytes == 64


# -- what is loaded


def test_loaded_tensors_can_be_changed_without_changing_the_file(tmp_path: Path) -> None:
    path = save_zip({"weight": ramp(4)}, tmp_path)
    before = path.read_bytes()
    ckpt_surgeon.load(path)["weight"].fill_(7)
    assert path.read_bytes() == before


def test_loaded_tensors_outlive_a_file_that_is_replaced(tmp_path: Path) -> None:
    path = save_zip({"weight": ramp(5000)}, tmp_path)
    loaded = ckpt_surgeon.load(path)
    ckpt_surgeon.save({"weight": torch.zeros(5000)}, path, force=True)
    assert_same(loaded, {"weight": ramp(5000)})


def test_an_edited_checkpoint_can_be_loaded(tmp_path: Path) -> None:
    path = save_zip({"module.a": ramp(4), "module.b": ramp(6)[::2]}, tmp_path)
    loaded = ckpt_surgeon.load(ckpt_surgeon.strip_prefix(ckpt_surgeon.open(path)))
    assert_same(loaded, {"a": ramp(4), "b": ramp(6)[::2]}, strides=True)


def test_a_checkpoint_in_memory_can_be_loaded() -> None:
    state = {**TABLE["tied"](), **TABLE["conjugate"](), **TABLE["expanded"]()}
    assert_same(ckpt_surgeon.load(ckpt_surgeon.from_torch(state)), state, strides=True, ties=True)


def test_a_legacy_storage_that_is_not_aligned_is_loaded_right(tmp_path: Path) -> None:
    state = {"odd": noise("uint8", 3), "wide": noise("complex128", 2), "double": noise("float64", 2)}
    path = save_legacy(state, tmp_path)
    spans = [tensor.span for tensor in ckpt_surgeon.open(path).values()]
    assert any(span is not None and span.start % 8 for span in spans)
    assert_same(ckpt_surgeon.load(path), torch.load(path))
