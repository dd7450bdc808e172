"""Files made by hand that two readers could read in two ways: read as torch reads them, or refused with the reason."""

from __future__ import annotations

import io
import pickle
import pickle as op
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from broken_files.by_hand import legacy_of
from payloads import call, mkdir, named, text
from structures import (
    HOOKS,
    Record,
    checkpoint_records,
    dict_of,
    directory_of,
    integer,
    program,
    save,
    sizes,
    storage,
    tensor,
    zip_bytes_of,
)
from tables import assert_same, noise, ramp, save_big_endian, save_zip

import ckpt_surgeon
from ckpt_surgeon import BrokenFile, CheckpointError
from ckpt_surgeon.files.paths import file_path
from ckpt_surgeon.formats.zip import torch_zip
from ckpt_surgeon.formats.zip.archive import read_archive

ONES = np.ones(4, "<f4").tobytes()
SEVENS = np.full(4, 7, "<f4").tobytes()
PLAIN = program(dict_of({"w": tensor(storage())}))


def torch_load(path: Path) -> dict[str, torch.Tensor]:
    loaded = torch.load(path, weights_only=True)
    assert isinstance(loaded, dict)
    return dict(loaded)


def checkpoint(body: bytes, folder: Path, storages: dict[str, bytes] | None = None) -> Path:
    return save(zip_bytes_of(checkpoint_records(program(body), storages or {"0": ONES, "1": SEVENS})), folder)


# -- zips


def _two_directories(folder: Path) -> Path:
    """The zip64 record names the directory of sevens, the 32-bit one that of ones."""
    records = [*checkpoint_records(PLAIN, {"0": ONES}), Record("archive/data/0", SEVENS)]
    both = zip_bytes_of(records)
    start = both.index(b"PK\1\2")
    entries = []
    at = start
    while both[at : at + 4] == b"PK\1\2":
        end = at + 46 + sum(struct.unpack_from("<3H", both, at + 28))
        entries.append(both[at:end])
        at = end
    ones, sevens = entries[:4], [*entries[:2], entries[4], entries[3]]
    made = both[:start] + b"".join(sevens)
    wide = directory_of(sevens, start, wide=True)[len(b"".join(sevens)) : -22]
    second = start + len(b"".join(sevens)) + len(wide)
    made += wide[:56]
    locator = wide[56:]
    narrow = directory_of(ones, second - len(locator))
    return save(made + narrow[:-22] + locator + narrow[-22:], folder)


def test_the_zip64_directory_counts_wherever_a_locator_leads_to_it(tmp_path: Path) -> None:
    path = _two_directories(tmp_path)
    theirs = torch_load(path)
    assert_same(theirs, {"w": torch.full((4,), 7.0)})
    assert_same(ckpt_surgeon.load(path), theirs)


def _named(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        records = checkpoint_records(PLAIN, {"0": ONES})
        other = PLAIN if name.lower().endswith("pkl") else SEVENS
        return save(zip_bytes_of([*records, Record(f"archive/{name}", other)]), folder)

    return make


@pytest.mark.parametrize("name", ["DATA/0", "Data/0", "DATA.PKL", "ByteOrder", "VERSION"])
def test_names_that_are_equal_but_for_capitals_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(BrokenFile, match="one name for torch's zip reader"):
        ckpt_surgeon.open(_named(name)(tmp_path))


def test_names_that_differ_in_letters_beyond_ascii_are_two(tmp_path: Path) -> None:
    records = [*checkpoint_records(PLAIN, {"0": ONES}), Record("archive/É", b""), Record("archive/é", b"")]
    path = save(zip_bytes_of(records), tmp_path)
    assert_same(ckpt_surgeon.load(path), torch_load(path))


def test_a_byte_order_in_capitals_is_one(tmp_path: Path) -> None:
    records = checkpoint_records(PLAIN, {"0": np.full(4, 7, ">f4").tobytes()})
    records[1] = Record("archive/BYTEORDER", b"big")
    path = save(zip_bytes_of(records), tmp_path)
    theirs = torch_load(path)
    assert_same(theirs, {"w": torch.full((4,), 7.0)})
    assert_same(ckpt_surgeon.load(path), theirs)


@pytest.mark.parametrize("order", [b"middle", b"Big", b"", b"little\n"])
def test_a_byte_order_that_torch_refuses_is_refused(order: bytes, tmp_path: Path) -> None:
    records = checkpoint_records(PLAIN, {"0": ONES})
    records[1] = Record("archive/byteorder", order)
    path = save(zip_bytes_of(records), tmp_path)
    with pytest.raises(ValueError, match="endianness"):
        torch_load(path)
    with pytest.raises(BrokenFile, match="unknown byte order"):
        ckpt_surgeon.open(path)


@pytest.mark.parametrize("version", [b"0", b"99\n", b"x", b"-3"])
def test_a_format_version_that_torch_refuses_is_refused(version: bytes, tmp_path: Path) -> None:
    records = checkpoint_records(PLAIN, {"0": ONES})
    records[-1] = Record("archive/version", version)
    path = save(zip_bytes_of(records), tmp_path)
    with pytest.raises(RuntimeError):
        torch_load(path)
    with pytest.raises(BrokenFile, match="format version"):
        ckpt_surgeon.open(path)


MARKERS = {
    "torch.export": ["archive_format", "data/weights/model_weights_config.json"],
    "torch.package": [".data/extern_modules", ".DATA/extern_modules"],
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in MARKERS.items() for name in names])
def test_the_records_of_two_containers_in_one_zip_are_refused(kind: str, name: str, tmp_path: Path) -> None:
    config = b'{"config": {"w": {"path_name": "weight_0"}}}' if name.endswith("json") else b"pt2"
    records = [*checkpoint_records(PLAIN, {"0": ONES}), Record(f"archive/{name}", config)]
    with pytest.raises(BrokenFile, match=f"records of {kind}: it can be read in two ways"):
        ckpt_surgeon.open(save(zip_bytes_of(records), tmp_path))


def test_a_key_that_only_looks_like_a_marker_is_a_key(tmp_path: Path) -> None:
    body = dict_of({"w": tensor(storage(key=text("archive_format")))})
    path = checkpoint(body, tmp_path, {"archive_format": ONES})
    assert_same(ckpt_surgeon.load(path), torch_load(path))


HEADERS: dict[str, Record] = {
    "encrypted": Record("archive/data/0", SEVENS, flags=1),
    "strongly encrypted": Record("archive/data/0", SEVENS, flags=0x40),
    "a patch": Record("archive/data/0", SEVENS, flags=0x20),
    "masked": Record("archive/data/0", SEVENS, flags=0x2000),
    "on another disk": Record("archive/data/0", SEVENS, disk=7),
    "a folder": Record("archive/data/0", SEVENS, attributes=0x10),
    "zip64 without its field": Record("archive/data/0", SEVENS, size=0xFFFFFFFF, packed=0xFFFFFFFF),
    "zip64 with half a field": Record(
        "archive/data/0", SEVENS, size=0xFFFFFFFF, packed=0xFFFFFFFF, extra=struct.pack("<2HQ", 1, 8, 16)
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_record_that_torch_does_not_read_is_refused(name: str, tmp_path: Path) -> None:
    records = [HEADERS[name] if one.name == "archive/data/0" else one for one in checkpoint_records(PLAIN, {"0": ONES})]
    with pytest.raises(BrokenFile):
        ckpt_surgeon.open(save(zip_bytes_of(records), tmp_path))


def test_the_first_of_two_zip64_fields_counts(tmp_path: Path) -> None:
    first, second = struct.pack("<2H2Q", 1, 16, 16, 16), struct.pack("<2H2Q", 1, 16, 8, 8)
    record = Record("archive/data/0", SEVENS, size=0xFFFFFFFF, packed=0xFFFFFFFF, extra=first + second)
    records = [record if one.name == record.name else one for one in checkpoint_records(PLAIN, {"0": ONES})]
    path = save(zip_bytes_of(records), tmp_path)
    assert_same(ckpt_surgeon.load(path), torch_load(path))


# -- the folder in the archive is text


NAMES = [
    "best-{epoch:02d}", "{}", "{0}", "{key}", "{key!r}", "{:>2000000000}", "{{", "}", "%s", "epoch=3-step=100", "a b",
    "größe-重み", "last", "$HOME", "model_best", "checkpoint-199", "x" * 200,
]  # fmt: skip


@pytest.mark.parametrize("stem", NAMES)
@pytest.mark.parametrize("suffix", [".ckpt", ".pth.tar"])
def test_a_file_of_any_name_opens(stem: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"{stem}{suffix}"
    torch.save({"w": ramp(3)}, path)
    assert_same(ckpt_surgeon.load(path), torch.load(path))


# -- storages


def test_each_mention_of_an_empty_storage_has_its_own_dtype(tmp_path: Path) -> None:
    empty = torch.empty(0)
    for name, zipped in (("zip.pt", True), ("legacy.pt", False)):
        path = tmp_path / name
        torch.save({"a": empty, "b": empty.view(torch.int16)}, path, _use_new_zipfile_serialization=zipped)
        theirs = torch_load(path)
        assert theirs["b"].dtype == torch.int16
        assert_same(ckpt_surgeon.load(path), theirs)


def test_a_storage_has_the_dtype_of_its_first_mention(tmp_path: Path) -> None:
    ints = storage(4, cls=named("torch", "IntStorage"))
    path = checkpoint(dict_of({"a": tensor(storage()), "b": tensor(ints)}), tmp_path)
    assert_same(ckpt_surgeon.load(path), torch_load(path))


KEYS = {
    "number": integer(0), "bytes": b"C\x010", "None": op.NONE, "zero byte": text("0\0x"), "tuple": text("0") + b"\x85",
}  # fmt: skip


@pytest.mark.parametrize("name", KEYS)
def test_a_storage_key_that_torch_never_writes_is_refused(name: str, tmp_path: Path) -> None:
    path = checkpoint(dict_of({"w": tensor(storage(key=KEYS[name]))}), tmp_path)
    with pytest.raises(BrokenFile, match="no text that torch writes"):
        ckpt_surgeon.open(path)


PERSISTENT = {
    "another kind": op.MARK + text("weights") + text("0") + op.TUPLE + op.BINPERSID,
    "a package's": op.MARK + text("reduce_package") + integer(1) + op.NONE + op.TUPLE + op.BINPERSID,
    "four parts": op.MARK
    + text("storage")
    + named("torch", "FloatStorage")
    + text("0")
    + text("cpu")
    + op.TUPLE
    + b"Q",
    "a number": integer(3) + op.BINPERSID,
    "text": text("storage") + op.BINPERSID,
}


@pytest.mark.parametrize("name", PERSISTENT)
def test_a_persistent_id_that_torch_refuses_is_refused(name: str, tmp_path: Path) -> None:
    path = checkpoint(dict_of({"w": tensor(storage()), "x": PERSISTENT[name]}), tmp_path)
    with pytest.raises((AssertionError, ValueError, pickle.UnpicklingError)):
        torch_load(path)
    with pytest.raises(BrokenFile, match="persistent id"):
        ckpt_surgeon.open(path)


def test_a_big_endian_tensor_that_torch_does_not_swap_is_named_and_not_copied(tmp_path: Path) -> None:
    for dtype in ("uint16", "uint32", "uint64", "bits16"):
        folder = tmp_path / dtype
        folder.mkdir()
        path = save_big_endian({"w": noise(dtype, 3, 4), "fine": ramp(2)}, folder)
        opened = ckpt_surgeon.open(path)
        assert "big-endian" in opened["w"].kind  # type: ignore[union-attr]
        with pytest.raises(CheckpointError, match="big-endian"):
            ckpt_surgeon.convert(path, folder / "out.pth")
        fine = ckpt_surgeon.drop(opened, ["w"])
        assert b"".join(fine["fine"].blocks()) == ramp(2).numpy().tobytes()


# -- opcodes on finished tensors


STATE = op.MARK + storage(key=text("1")) + integer(0) + sizes([4]) + sizes([1]) + op.TUPLE
DATA = dict_of({"data": tensor(storage(key=text("1")))})
ON_TENSORS: dict[str, bytes] = {
    "BUILD of four": tensor(storage()) + STATE + op.BUILD,
    "BUILD of a dict": tensor(storage()) + DATA + op.BUILD,
    "BUILD on a parameter": (
        call("torch._utils", "_rebuild_parameter", tensor(storage()), op.NEWFALSE, HOOKS) + STATE + op.BUILD
    ),
    "SETITEM": tensor(storage()) + integer(0) + integer(7) + op.SETITEM,
    "SETITEMS": tensor(storage()) + op.MARK + integer(0) + integer(7) + op.SETITEMS,
    "APPEND": tensor(storage()) + integer(7) + op.APPEND,
    "APPENDS": tensor(storage()) + op.MARK + integer(7) + op.APPENDS,
    "ADDITEMS": tensor(storage()) + op.MARK + integer(7) + op.ADDITEMS,
    "state with data": call(
        "torch._utils", "_rebuild_parameter_with_state", tensor(storage()), op.NEWFALSE, HOOKS, DATA
    ),
    "type with data": call(
        "torch._tensor", "_rebuild_from_type_v2", named("torch._utils", "_rebuild_tensor_v2"), named("torch", "Tensor"),
        op.MARK + storage() + integer(0) + sizes([4]) + sizes([1]) + op.NEWFALSE + HOOKS + op.TUPLE, DATA,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ON_TENSORS)
def test_what_would_change_a_finished_tensor_is_refused(name: str, tmp_path: Path) -> None:
    path = checkpoint(dict_of({"w": ON_TENSORS[name]}), tmp_path)
    with pytest.raises(BrokenFile, match=r"data\.pkl is damaged"):
        ckpt_surgeon.open(path)


NEW = {
    "OrderedDict": named("collections", "OrderedDict"), "Counter": named("collections", "Counter"),
}  # fmt: skip


@pytest.mark.parametrize("name", NEW)
def test_a_new_dict_is_empty_whatever_it_is_given(name: str, tmp_path: Path) -> None:
    """NEWOBJ calls ``__new__`` only."""
    pairs = op.MARK + dict_of({"x": tensor(storage())}) + op.TUPLE
    made = NEW[name] + pairs + op.NEWOBJ
    path = checkpoint(made + text("w") + tensor(storage(key=text("1"))) + op.SETITEM, tmp_path)
    theirs = torch_load(path)
    assert_same(ckpt_surgeon.load(path), theirs)


def test_a_counter_is_a_dict(tmp_path: Path) -> None:
    path = checkpoint(call("collections", "Counter", dict_of({"w": tensor(storage())})), tmp_path)
    theirs = torch_load(path)
    assert_same(ckpt_surgeon.load(path), theirs)


def test_a_new_object_of_a_function_is_refused(tmp_path: Path) -> None:
    args = op.MARK + storage() + integer(0) + sizes([4]) + sizes([1]) + op.NEWFALSE + HOOKS + op.TUPLE
    path = checkpoint(dict_of({"w": named("torch._utils", "_rebuild_tensor_v2") + args + op.NEWOBJ}), tmp_path)
    with pytest.raises(Exception):  # noqa: B017, PT011 (torch raises a TypeError as it comes)
        torch_load(path)
    with pytest.raises(BrokenFile, match="which is a function"):
        ckpt_surgeon.open(path)


def test_a_tensor_that_its_class_would_make_is_named_and_not_left_out(tmp_path: Path) -> None:
    made = call("torch", "FloatTensor", op.EMPTY_LIST + op.MARK + integer(1) + integer(2) + op.APPENDS)
    path = checkpoint(dict_of({"w": tensor(storage()), "made": made}), tmp_path)
    theirs = torch_load(path)
    assert set(theirs) == {"w", "made"}
    assert list(ckpt_surgeon.open(path)) == ["w", "made"]
    with pytest.raises(CheckpointError, match="FloatTensor"):
        ckpt_surgeon.load(path)


# -- flags that are set by being there


@pytest.mark.parametrize("flag", ["conj", "neg"])
@pytest.mark.parametrize("value", [op.NEWFALSE, op.NEWTRUE])
def test_a_flag_counts_by_being_there(flag: str, value: bytes, tmp_path: Path) -> None:
    complex_storage = storage(2, cls=named("torch", "ComplexFloatStorage"))
    body = dict_of({"w": tensor(complex_storage, (2,), (1,), 0, dict_of({flag: value}))})
    path = checkpoint(body, tmp_path, {"0": np.array([1 + 2j, 3 - 4j], "<c8").tobytes()})
    theirs = torch_load(path)
    assert_same(ckpt_surgeon.load(path), theirs)


METADATA = {
    "conj on real numbers": dict_of({"conj": op.NEWFALSE}),
    "no dict": integer(5),
    "names that are numbers": op.EMPTY_DICT + integer(1) + op.NEWTRUE + op.SETITEM,
}


@pytest.mark.parametrize("name", METADATA)
def test_flags_that_torch_refuses_are_refused(name: str, tmp_path: Path) -> None:
    path = checkpoint(dict_of({"w": tensor(storage(), (4,), (1,), 0, METADATA[name])}), tmp_path)
    with pytest.raises((RuntimeError, AssertionError, TypeError)):
        torch_load(path)
    with pytest.raises(BrokenFile, match=r"data\.pkl is damaged"):
        ckpt_surgeon.open(path)


# -- keys


def test_a_key_that_is_a_tensor_is_refused(tmp_path: Path) -> None:
    body = op.EMPTY_DICT + tensor(storage()) + tensor(storage(key=text("1"))) + op.SETITEM
    with pytest.raises(CheckpointError, match="key"):
        ckpt_surgeon.open(checkpoint(body, tmp_path))


@pytest.mark.parametrize("key", [op.EMPTY_LIST, op.EMPTY_DICT, b"\x8f"])
def test_a_key_that_cannot_be_hashed_is_refused(key: bytes, tmp_path: Path) -> None:
    with pytest.raises(BrokenFile, match="cannot hash"):
        ckpt_surgeon.open(checkpoint(op.EMPTY_DICT + key + tensor(storage()) + op.SETITEM, tmp_path))


def test_a_name_of_python_2_is_that_of_python_3(tmp_path: Path) -> None:
    path = checkpoint(call("UserDict", "OrderedDict") + text("w") + tensor(storage()) + op.SETITEM, tmp_path)
    theirs = torch_load(path)
    assert_same(ckpt_surgeon.load(path), theirs)


# -- scan looks where a full load would


def _live(raw: bytes) -> bytes:
    return op.BINBYTES + struct.pack("<I", len(raw)) + raw


def _load_from(raw: bytes) -> bytes:
    return call("torch.storage", "_load_from_bytes", _live(raw))


def _legacy_with(payload: bytes) -> bytes:
    return legacy_of("PAYLOAD", {}).replace(text("PAYLOAD"), payload)


def _zip_with(payload: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", program(payload))
        archive.writestr("a/version", "3")
    return out.getvalue()


def _encoded(raw: bytes) -> bytes:
    return call("_codecs", "encode", text(raw.decode("latin-1")), text("latin1"))


PAYLOAD = mkdir("ran")
NESTED: dict[str, bytes] = {
    "legacy": _load_from(_legacy_with(PAYLOAD)),
    "a zip": _load_from(_zip_with(PAYLOAD)),
    "encoded": call("torch.storage", "_load_from_bytes", _encoded(_legacy_with(PAYLOAD))),
    "three deep": _load_from(_legacy_with(_load_from(_zip_with(_load_from(_legacy_with(PAYLOAD)))))),
    "through a type": call(
        "torch._tensor", "_rebuild_from_type_v2", named("torch.storage", "_load_from_bytes"), named("torch", "Tensor"),
        op.MARK + _live(_legacy_with(PAYLOAD)) + op.TUPLE, op.EMPTY_DICT,
    ),
    "pickle.loads": call("pickle", "loads", _live(program(PAYLOAD))),
}  # fmt: skip


@pytest.mark.parametrize("container", ["zip", "legacy", "pickle", "shard"])
@pytest.mark.parametrize("name", NESTED)
def test_scan_looks_into_bytes_that_would_be_loaded_again(name: str, container: str, tmp_path: Path) -> None:
    body = dict_of({"x": NESTED[name]})
    if container in ("zip", "shard"):
        path = checkpoint(dict_of({"w": tensor(storage()), "x": NESTED[name]}), tmp_path)
    elif container == "legacy":
        path = save(_legacy_with(body), tmp_path)
    else:
        path = save(program(body, 4), tmp_path, "plain.pkl")
    if container == "shard":
        path.rename(tmp_path / "model.bin")
        path = save(b'{"weight_map": {"w": "model.bin"}}', tmp_path, "model.bin.index.json")
    try:
        suspects = ckpt_surgeon.scan(path).suspects
    except BrokenFile:
        assert container == "pickle"  # storages in plain pickles are read, and these are none
        return
    assert "posix.mkdir" in suspects


def test_bytes_that_cannot_be_read_here_are_no_plain_data(tmp_path: Path) -> None:
    for raw in (b"", b"\x80\x02\xff.", b"PK\3\4 and more"):
        path = checkpoint(dict_of({"w": tensor(storage()), "x": _load_from(raw)}), tmp_path)
        assert any("cannot be read here" in name for name in ckpt_surgeon.scan(path).suspects)


def test_bytes_that_hold_plain_data_are_plain_data(tmp_path: Path) -> None:
    raw = io.BytesIO()
    torch.save(ramp(3), raw, _use_new_zipfile_serialization=False)
    path = checkpoint(dict_of({"w": tensor(storage()), "x": _load_from(raw.getvalue())}), tmp_path)
    assert ckpt_surgeon.scan(path).suspects == ()


def test_a_zip_packed_again_without_its_folder_is_read(tmp_path: Path) -> None:
    """torch refuses it; nothing in it can be read in two ways."""
    with zipfile.ZipFile(save_zip({"w": ramp(3)}, tmp_path)) as old:
        records = [Record(name.partition("/")[2], old.read(name)) for name in old.namelist()]
    path = save(zip_bytes_of(records), tmp_path, "flat.pt")
    assert_same(ckpt_surgeon.load(path), {"w": ramp(3)})


# -- safetensors


def _safetensors(folder: Path, header: str, nbytes: int) -> Path:
    raw = header.encode()
    return save(struct.pack("<Q", len(raw)) + raw + bytes(range(nbytes)), folder, "model.safetensors")


@pytest.mark.parametrize("front", ["", " ", "  \n\t"])
@pytest.mark.parametrize("metadata", ["", '"__metadata__": null, ', '"__metadata__": {"a": "b"}, '])
def test_a_header_behind_white_space_and_metadata_that_is_null_are_read(
    front: str, metadata: str, tmp_path: Path
) -> None:
    header = f'{front}{{{metadata}"w": {{"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}}}'
    path = _safetensors(tmp_path, header, 8)
    assert_same(ckpt_surgeon.load(path), safetensors.torch.load_file(path))


def test_a_dtype_of_six_bits_is_one_tensor_that_is_named(tmp_path: Path) -> None:
    entries = '"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
    header = f'{{{entries}, "six": {{"dtype": "F6_E2M3", "shape": [2, 4], "data_offsets": [8, 14]}}}}'
    path = _safetensors(tmp_path, header, 14)
    with safetensors.safe_open(path, "pt") as opened:
        assert sorted(opened.keys()) == ["six", "w"]
    ours = ckpt_surgeon.open(path)
    assert (sorted(ours), ours["six"].shape) == (["six", "w"], (2, 4))
    with pytest.raises(CheckpointError, match="F6_E2M3"):
        ckpt_surgeon.convert(path, tmp_path / "out.pth")
    ckpt_surgeon.save(ckpt_surgeon.drop(ours, ["six"]), tmp_path / "out.pth")
    assert list(torch.load(tmp_path / "out.pth")) == ["w"]


# -- tensors of devices that torch saves from the CPU


def test_an_xla_tensor_is_the_tensor_that_was_saved_for_it(tmp_path: Path) -> None:
    for name in ("_rebuild_device_tensor_from_cpu_tensor", "_rebuild_xla_tensor"):
        made = call("torch._utils", name, tensor(storage()), named("torch", "float32"), text("xla:0"), op.NEWFALSE)
        path = checkpoint(dict_of({"w": made}), tmp_path)
        assert_same(ckpt_surgeon.load(path), {"w": torch.ones(4)})


# -- a piece of a distributed checkpoint


def test_a_zip_without_its_pickle_is_broken(tmp_path: Path) -> None:
    records = [one for one in checkpoint_records(PLAIN, {"0": ONES}) if not one.name.endswith("pkl")]
    path = save(zip_bytes_of(records), tmp_path)
    with pytest.raises(BrokenFile, match=r"has no data\.pkl"):
        torch_zip.read(read_archive(file_path(path)))
