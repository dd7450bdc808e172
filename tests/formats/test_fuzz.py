"""Any bytes, and small valid files with parts of them changed, to each reader: only errors of the package's own.

``CKPT_FUZZ_EXAMPLES=20000`` (the number for each test) makes it search for longer than the minute that it takes.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import struct
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from broken_files import Part, counted, legacy_of, pickled, safetensors_of, tar_of, written, zip_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tables import pickle_of, ramp, rewritten, save_legacy, save_safetensors, save_zip
from unusual_files import TarOf01, TensorKey, build

import ckpt_surgeon
from ckpt_surgeon import CheckpointError
from ckpt_surgeon.formats.pickle import numpy_objects, torch_objects
from ckpt_surgeon.reading import scanning
from ckpt_surgeon.report import listings
from ckpt_surgeon.text import visible

EXAMPLES = int(os.environ.get("CKPT_FUZZ_EXAMPLES", "250"))
SECONDS = 15.0  # of processor time that one file may take, on a slow machine
MEMORY = 400_000  # KiB that the whole run may add

fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A place for the files; afterwards, the memory that all of them took."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield tmp_path_factory.mktemp("fuzz")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY


def examine(path: Path) -> None:
    """Use a file in every way that reads; whatever is wrong with it is an error of the package's own."""
    began = time.process_time()
    for use in (_list, _salvage, _open, _scan):
        try:
            use(path)
        except CheckpointError as error:
            assert "\n" not in visible(str(error))  # noqa: PT017 (any of the uses may raise)
    assert time.process_time() - began < SECONDS


def _list(path: Path) -> None:
    listing = ckpt_surgeon.ls(path, all=True, check=True)
    assert listings.listing_text(listing)
    json.loads(listings.listing_json(listing))


def _salvage(path: Path) -> None:
    assert listings.listing_text(ckpt_surgeon.ls(path, all=True, salvage=True))


def _open(path: Path) -> None:
    opened = ckpt_surgeon.open(path)
    assert repr(opened)
    for tensor in opened.values():
        if tensor.nbytes < 1 << 20 and not hasattr(tensor, "kind"):
            assert sum(map(len, tensor.blocks())) == tensor.nbytes


def _scan(path: Path) -> None:
    listings.scan_text(scanning.scan(path))


# -- changes


NUMBERS = [
    0,
    1,
    2,
    127,
    128,
    255,
    256,
    65_535,
    65_536,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    (1 << 63) - 1,
    (1 << 64) - 1,
]
Edit = tuple[str, float, float, bytes, int]
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "delete", "insert", "repeat", "number", "splice", "zero"]),
        st.floats(0, 1, exclude_max=True),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=12),
        st.sampled_from(NUMBERS),
    ),
    min_size=1,
    max_size=5,
)


def changed(raw: bytes, edits: list[Edit]) -> bytes:
    """The bytes with some edits made, each at a place given as a share of the length."""
    for kind, first, second, piece, number in edits:
        at, length = int(first * len(raw)), int(second * 40) + 1
        raw = raw[:at] + _replacement(raw, kind, at, length, piece, number)
    return raw


def _replacement(raw: bytes, kind: str, at: int, length: int, piece: bytes, number: int) -> bytes:
    """What comes from ``at`` on."""
    match kind:
        case "cut":
            return b""
        case "delete":
            return raw[at + length :]
        case "insert":
            return piece + raw[at:]
        case "repeat":
            return raw[at : at + length] * 3 + raw[at + length :]
        case "zero":
            return bytes(length) + raw[at + length :]
        case "splice":
            return raw[max(at - 7 * length, 0) : at] + raw[at + length :]
        case "number":
            form = "<" + "BHIQ"[length % 4]
            new = struct.pack(form, number % (1 << 8 * struct.calcsize(form)))
            return new + raw[at + len(new) :]
        case _:
            return piece + raw[at + len(piece) :]


# -- small valid files, one or more of each family


def _state() -> dict[str, torch.Tensor]:
    return {"a.weight": ramp(3, 4), "b": ramp(4, 2).t(), "c": torch.tensor(3)}


def _training() -> object:
    return {"epoch": 3, "model": _state(), "rng": np.arange(3.0), "lr": np.float64(0.5), "names": ["x", "y"] * 20}


def _tar(folder: Path) -> Path:
    tar = TarOf01()
    tar.storages = {1: ("FloatStorage", ramp(12))}
    tar.views = [(3, 1, 2, 4)]
    tar.tensors = {2: (1, "FloatTensor", (3, 4), (4, 1), 0), 4: (3, "FloatTensor", (2,), (1,), 1)}
    return tar.write(folder / "old.pth", {"w": TensorKey(2), "v": TensorKey(4)})


def _plain(protocol: int) -> Callable[[Path], Path]:
    return lambda folder: written(pickle.dumps({"w": np.ones((2, 3), "f4"), "t": ramp(2)}, protocol), "a.pkl", folder)


def _module(folder: Path) -> Path:
    return save_zip(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)), folder)


SEEDS: dict[str, Callable[[Path], Path]] = {
    "zip": lambda folder: save_zip(_state(), folder),
    "zip of a training": lambda folder: save_zip(_training(), folder),
    "packed zip": lambda folder: rewritten(save_zip(_state(), folder), folder / "p.pth", method=zipfile.ZIP_DEFLATED),
    "legacy": lambda folder: save_legacy(_state(), folder),
    "legacy by hand": lambda folder: written(legacy_of({"w": Part()}, {"0": counted(12, 48)}), "l.pth", folder),
    "safetensors": lambda folder: save_safetensors(_state(), folder),
    "tar": _tar,
    **{f"pickle, protocol {protocol}": _plain(protocol) for protocol in (0, 2, 5)},
    "Python 2": lambda folder: build("Python 2", "arrays, protocol 1", folder).path,
    "TorchScript": lambda folder: build("TorchScript", "script", folder).path,
    "torch.package": lambda folder: build("torch.package", "state_dict", folder).path,
    "torch.export": lambda folder: build("torch.export", "pt2", folder).path,
}


@cache
def seed(name: str, folder: Path) -> bytes:
    inner = folder / name
    inner.mkdir()
    with warnings.catch_warnings(action="ignore"):
        return SEEDS[name](inner).read_bytes()


@pytest.mark.parametrize("name", SEEDS)
def test_a_file_with_parts_of_it_changed(name: str, folder: Path) -> None:
    raw = seed(name, folder)

    @fuzzed
    @given(EDITS)
    def run(edits: list[Edit]) -> None:
        examine(written(changed(raw, edits), "changed", folder))

    run()


# -- the same behind checksums and lengths that are right


@pytest.mark.parametrize("name", ["zip", "zip of a training", "module"])
def test_a_zip_whose_pickle_is_changed_under_a_right_checksum(name: str, folder: Path) -> None:
    inner = folder / f"inner {name}"
    inner.mkdir()
    raw = pickle_of(_module(inner) if name == "module" else SEEDS[name](inner))

    @fuzzed
    @given(EDITS)
    def run(edits: list[Edit]) -> None:
        examine(zip_of(folder, changed(raw, edits), {"0": bytes(48), "1": bytes(32), "2": bytes(8)}))

    run()


@pytest.mark.parametrize("record", [".py", "data.pkl", "weights_config.json", "extern_modules"])
def test_a_zip_of_another_kind_one_record_of_which_is_changed(record: str, folder: Path) -> None:
    name = {"weights_config.json": "torch.export", "extern_modules": "torch.package"}.get(record, "TorchScript")
    raw = seed(name, folder)
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    wanted = "model.pkl" if record == "extern_modules" else record
    key = next(one for one in records if one.endswith(wanted))

    @fuzzed
    @given(EDITS)
    def run(edits: list[Edit]) -> None:
        path = folder / "other.pt"
        with zipfile.ZipFile(path, "w") as archive:
            for one, content in records.items():
                archive.writestr(one, changed(content, edits) if one == key else content)
        examine(path)

    run()


@fuzzed
@given(EDITS)
def test_a_safetensors_header_that_is_changed_under_a_right_length(folder: Path, edits: list[Edit]) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "a": entry, "b": {**entry, "data_offsets": [8, 16]}})
    examine(written(safetensors_of(changed(header.encode(), edits)), "h.safetensors", folder))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["F32", "U8", "x", "a.bin", "../x", ""]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["dtype", "shape", "data_offsets", "a", "b", "__metadata__", "weight_map", "metadata"]),
            inner,
        )
    ),
    max_leaves=12,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "F4", "BOOL", "F64"]) | JSON,
        "shape": st.lists(st.integers(-1, 5) | st.sampled_from(NUMBERS), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 40) | st.sampled_from(NUMBERS), min_size=2, max_size=2) | JSON,
    }
)


@fuzzed
@given(st.dictionaries(st.text(max_size=3), ENTRY | JSON, max_size=4) | JSON)
def test_a_safetensors_header_of_any_JSON(folder: Path, header: object) -> None:  # noqa: N802
    examine(written(safetensors_of(header), "j.safetensors", folder))


@fuzzed
@given(
    st.fixed_dictionaries({"weight_map": st.dictionaries(st.text(max_size=3), JSON | st.just("s.safetensors")) | JSON})
    | JSON.filter(lambda value: isinstance(value, dict))
)
def test_an_index_of_any_JSON(folder: Path, index: object) -> None:  # noqa: N802
    written(safetensors_of({"a": {"dtype": "U8", "shape": [16], "data_offsets": [0, 16]}}), "s.safetensors", folder)
    examine(written(json.dumps(index).encode(), "model.safetensors.index.json", folder))


# -- bytes of any kind, behind each magic


MAGICS = {
    "nothing": b"",
    "zip": b"PK\x03\x04",
    "empty zip": b"PK\x05\x06",
    "safetensors": b"\x10\x00\x00\x00\x00\x00\x00\x00{",
    "legacy": pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2),
    "pickle": b"\x80\x02",
    "old pickle": b"(dp0\n",
    "tar": b"storages\0".ljust(257, b"\0") + b"ustar\x0000",
    "JSON": b"{",
    "git-lfs": b"version https://git-lfs",
}


@fuzzed
@given(st.sampled_from(sorted(MAGICS)), st.binary(max_size=600))
def test_any_bytes_behind_a_magic(folder: Path, magic: str, raw: bytes) -> None:
    examine(written(MAGICS[magic] + raw, "any", folder))


# -- programs of pickle's opcodes


def _named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


KNOWN = sorted({**torch_objects.CONSTRUCTORS, **numpy_objects.CONSTRUCTORS})
OPCODES: list[bytes] = [
    *(_named(*one) for one in KNOWN),
    *(_named(*one) for one in (("torch", "FloatStorage"), ("torch", "float32"), ("torch.storage", "_load_from_bytes"))),
    *(_named(*one) for one in (("m", "Net"), ("torch.serialization", "_get_layout"), ("torch", "QInt8Storage"))),
    *(b"X" + struct.pack("<I", len(word)) + word for word in (
        b"", b"storage", b"module", b"0", b"cpu", b"f4", b"i8", b"O", b"<", b"w", b"_parameters", b"_modules",
        b"_buffers", b"_metadata", b"state_dict", b"param_groups", b"state", b"latin1", b"version", b"\xed\xa0\x80",
    )),
    *(b"h" + bytes((index,)) for index in range(4)), *(b"q" + bytes((index,)) for index in range(4)),
    b"K\x00", b"K\x01", b"K\x0c", b"J\xff\xff\xff\xff", b"\x8a\x09" + b"\xff" * 8 + b"\x00", b"G" + bytes(8),
    b"N", b"\x88", b"\x89", b"(", b")", b"t", b"\x85", b"\x86", b"\x87", b"}", b"]", b"\x8f", b"R", b"R", b"R", b"b",
    b"b", b"s", b"u", b"a", b"e", b"\x90", b"\x91", b"Q", b"2", b"0", b"1", b"l", b"d", b"o", b"\x81", b"\x92", b"\x93",
    b"\x94", b"C\x04abcd", b"U\x030.5", b"im\nNet\n", b"P0\n", b"I01\n", b"F1e9\n", b"\x82\x01",
    TENSOR := pickled(Part())[2:-1],
    b"}" + b"X\x01\x00\x00\x00w" + TENSOR + b"s",
]  # fmt: skip
PROGRAMS = st.lists(st.sampled_from(OPCODES), max_size=40).map(b"".join)


@pytest.mark.parametrize("container", ["zip", "salvaged zip", "TorchScript", "legacy", "pickle", "tar"])
def test_any_program_of_opcodes(container: str, folder: Path) -> None:
    @fuzzed
    @given(PROGRAMS)
    def run(program: bytes) -> None:
        examine(_holding(container, b"\x80\x02" + program + b".", folder))

    run()


def _holding(container: str, program: bytes, folder: Path) -> Path:
    match container:
        case "zip":
            return zip_of(folder, program, {"0": bytes(48)}, "program.pth")
        case "salvaged zip":
            path = zip_of(folder, program, {}, "program.pth")
            return written(path.read_bytes()[:-30], "program.pth", folder)
        case "TorchScript":
            path = zip_of(folder, program, {"0": bytes(48)}, "program.pth")
            with zipfile.ZipFile(path, "a") as archive:
                archive.writestr("archive/constants.pkl", b"\x80\x02).")
                archive.writestr("archive/code/m.py", 'class Net(Module):\n  __parameters__ = ["w", ]\n')
            return path
        case "legacy":
            raw = legacy_of("PROGRAM", {"0": counted(12, 48)})
            whole = pickle.dumps("PROGRAM", 2)
            return written(raw.replace(whole, program), "program.pth", folder)
        case "tar":
            tar = TarOf01()
            members = {**tar.members({}), "pickle": program, "storages": program + pickle.dumps([], 2)}
            return tar_of(members, "program.tar", folder)
        case _:
            return written(program, "program.pkl", folder)
