"""NumPy's .npy and .npz, read and written; the oracle is numpy.load and numpy.savez, with ml_dtypes for bfloat16."""

from __future__ import annotations

import io
import os
import pickle
import resource
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from command_line import Run
from mutilated import cuts, damaged, examine
from tables import NAMES, TABLE, StateDict, assert_same, dtype_of, elements, ramp, save_zip

import ckpt_surgeon
from ckpt_surgeon import BrokenFile, EditError, NotACheckpoint

IN_NUMPY = {
    "float64", "float32", "float16", "bfloat16", "complex128", "complex64",
    "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool",
}  # fmt: skip
TABLES = [name for name in NAMES if dtype_of(name) is None or dtype_of(name) in IN_NUMPY]
SAVES: dict[str, Callable[..., object]] = {"stored": np.savez, "packed": np.savez_compressed}


def array(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as numpy has it, its strides kept where they can be."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    if plain.dtype == torch.bfloat16:
        return plain.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return plain.numpy()


def archive(state: StateDict, folder: Path, save: Callable[..., object] = np.savez) -> Path:
    path = folder / "model.npz"
    with open(path, "wb") as file:
        save(file, **{key: array(tensor) for key, tensor in state.items()})
    return path


# -- reading


@pytest.mark.parametrize("save", SAVES)
def test_what_numpy_saves_is_read_bit_for_bit(save: str, tmp_path: Path) -> None:
    for name in TABLES:
        if name != "large strided" or save == "stored":  # it takes long to pack
            state = TABLE[name]()
            path = archive(state, tmp_path, SAVES[save])
            assert_same(ckpt_surgeon.load(path), state)
            assert ckpt_surgeon.hash(path) == ckpt_surgeon.hash(state)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("code", [">f4", ">i8", ">c16", ">u2", "<f8", "|b1", "=i4"])
def test_byte_orders_and_fortran_s_order_are_read_as_numpy_reads_them(code: str, order: str, tmp_path: Path) -> None:
    wanted = np.array([[0, 1, 2], [3, 4, 0]], dtype=code, order=order)  # type: ignore[call-overload]
    np.save(tmp_path / "a.npy", wanted)
    for save in SAVES.values():
        save(tmp_path / "a.npz", w=wanted)
        assert np.array_equal(ckpt_surgeon.load(tmp_path / "a.npz")["w"].numpy(), wanted)
    assert np.array_equal(ckpt_surgeon.load(tmp_path / "a.npy")["tensor"].numpy(), wanted)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_all_versions_of_the_header_are_read(version: tuple[int, int], tmp_path: Path) -> None:
    with open(tmp_path / "a.npy", "wb") as file:
        np.lib.format.write_array(file, np.arange(6.0).reshape(2, 3), version=version)
    assert ckpt_surgeon.load(tmp_path / "a.npy")["tensor"].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    "text",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2L,), }",  # Python 2
        '{"shape":(2,),"descr":"<f4","fortran_order":False}',
        "{ 'fortran_order' : False , 'descr' : '<f4' , 'shape' : ( 2 , ) }",
    ],
)
def test_headers_that_other_writers_spell_otherwise_are_read(text: str, tmp_path: Path) -> None:
    path = written(tmp_path, text, struct.pack("<2f", 1, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on headers of Python 2
        assert np.load(path).tolist() == [1, 2]
    assert ckpt_surgeon.load(path)["tensor"].tolist() == [1, 2]


def test_positional_arrays_have_numpy_s_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", np.ones(2), np.zeros(3))
    assert list(ckpt_surgeon.open(tmp_path / "a.npz")) == ["arr_0", "arr_1"]


def test_stored_arrays_are_spans_of_the_file_with_a_checksum(tmp_path: Path) -> None:
    path = archive({"w": ramp(40, 30)}, tmp_path)
    span = ckpt_surgeon.open(path)["w"].span
    assert span is not None
    assert path.read_bytes()[span.start : span.stop] == elements(ramp(40, 30))
    raw = bytearray(path.read_bytes())
    raw[span.start + 100] ^= 1
    path.write_bytes(raw)
    with pytest.raises(BrokenFile, match="CRC"):
        ckpt_surgeon.convert(path, tmp_path / "out.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["model.npz"]


def test_keys_that_differ_in_capitals_alone_are_two(tmp_path: Path) -> None:
    state = {"W": ramp(2), "w": ramp(3)}
    path = archive(state, tmp_path)
    assert_same(ckpt_surgeon.load(path), state)
    ckpt_surgeon.convert(path, tmp_path / "out.npz")
    assert_same(ckpt_surgeon.load(tmp_path / "out.npz"), state)


def test_two_bytes_without_a_type_are_bfloat16_and_it_is_said(ckpt: Run, tmp_path: Path) -> None:
    path = archive({"w": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}, tmp_path)
    assert np.load(path)["w"].dtype == np.dtype("V2")
    assert_same(ckpt_surgeon.load(path), {"w": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)})
    assert "taken for bfloat16" in ckpt("ls", path).out


def test_arrays_that_are_no_numbers_are_listed_and_left_aside(ckpt: Run, tmp_path: Path) -> None:
    fields = np.zeros(2, dtype=[("a", "f4"), ("b", "i4")])
    eight = np.ones(2, ml_dtypes.float8_e4m3fn)
    np.savez(
        tmp_path / "a.npz", w=np.ones(2), text=np.array("x"), fields=fields, eight=eight, day=np.array("2020", "M8")
    )
    opened = ckpt_surgeon.open(tmp_path / "a.npz")
    assert list(opened) == ["w"]
    assert [left.path for left in opened.left_out] == ["text", "fields", "eight", "day"]
    shown = ckpt("ls", tmp_path / "a.npz", "--all").out
    for words in ("text (dtype 'U1')", "records of several fields", "float8 or int4", "dates (dtype 'M8[Y]')"):
        assert words in shown


@pytest.mark.parametrize("value", [np.array("x"), np.zeros(2, dtype=[("a", "f4")]), np.ones(2, ml_dtypes.int4)])
def test_a_file_of_one_array_that_is_no_numbers_is_refused_by_what_it_is(value: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", value)
    with pytest.raises(BrokenFile, match=r"text|several fields|V1"):
        ckpt_surgeon.open(tmp_path / "a.npy")


# -- arrays of objects


def test_an_array_of_objects_is_read_inertly(tmp_path: Path) -> None:
    layers = {"conv1": {"weights": np.arange(6.0).reshape(2, 3)}, "fc": {"biases": np.ones(2)}}
    np.save(tmp_path / "a.npy", layers, allow_pickle=True)  # type: ignore[arg-type]
    wanted = {"conv1.weights": torch.arange(6.0).double().reshape(2, 3), "fc.biases": torch.ones(2).double()}
    assert_same(ckpt_surgeon.load(tmp_path / "a.npy"), wanted)
    for save in SAVES.values():
        save(tmp_path / "a.npz", layers=np.array(layers, dtype=object))
        assert_same(ckpt_surgeon.load(tmp_path / "a.npz", select="layers"), wanted)


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("kind", ["npy", "stored", "packed"])
def test_no_pickle_in_an_array_is_run_and_scan_names_what_it_would_call(kind: str, tmp_path: Path) -> None:
    payload = np.array([Payload(tmp_path / "was run"), np.ones(2)], dtype=object)
    path = tmp_path / "a.npz"
    with open(path, "wb") as file:
        if kind == "npy":
            np.save(file, payload, allow_pickle=True)
        else:
            SAVES[kind](file, w=np.ones(2), o=payload)
    examine(path)
    assert not (tmp_path / "was run").exists()
    assert ckpt_surgeon.scan(path).suspects == ("posix.mkdir",)


# -- writing


@pytest.mark.parametrize("name", TABLES)
def test_what_is_written_is_what_numpy_reads(name: str, tmp_path: Path) -> None:
    state = TABLE[name]()
    ckpt_surgeon.convert(save_zip(state, tmp_path), tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as found:
        assert found.files == list(state)
        for key, tensor in state.items():
            wanted = array(tensor)
            loaded = found[key].view(ml_dtypes.bfloat16) if tensor.dtype == torch.bfloat16 else found[key]
            assert (loaded.dtype, loaded.shape) == (wanted.dtype, wanted.shape)
            assert np.ascontiguousarray(loaded).tobytes() == elements(tensor)
    with zipfile.ZipFile(tmp_path / "out.npz") as opened:
        assert opened.testzip() is None
    assert_same(ckpt_surgeon.load(tmp_path / "out.npz"), state)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e8m0fnu", "complex32", "float4_e2m1fn_x2", "bits16"])
def test_dtypes_that_numpy_cannot_be_told_are_refused_by_name(name: str, ckpt: Run, tmp_path: Path) -> None:
    path = save_zip(TABLE[name](), tmp_path)
    ran = ckpt("convert", path, tmp_path / "out.npz")
    assert (ran.status, ran.err.count("\n")) == (2, 1)
    assert f"'weight' ({name})" in ran.err
    assert "cast them" in ran.err
    assert os.listdir(tmp_path) == ["model.pth"]


def test_a_tensor_in_column_major_order_is_written_as_it_lies(tmp_path: Path) -> None:
    ckpt_surgeon.save({"w": ramp(300, 200).t()}, tmp_path / "a.npz")
    loaded = np.load(tmp_path / "a.npz")["w"]
    assert loaded.flags.f_contiguous
    assert np.array_equal(loaded, ramp(300, 200).t().numpy())
    ckpt_surgeon.convert(tmp_path / "a.npz", tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_elements_begin_on_a_boundary_and_outputs_are_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a.npz", "b.npz"):
        ckpt_surgeon.save({"a": ramp(3), "w": ramp(200, 200)}, tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    spans = [tensor.span for tensor in ckpt_surgeon.open(tmp_path / "a.npz").values()]
    assert all(span is not None and span.start % 64 == 0 for span in spans)


def test_shards_and_their_index_are_one_checkpoint(ckpt: Run, tmp_path: Path) -> None:
    state = {f"layer.{index}": ramp(50, 10) + index for index in range(4)}
    path = save_zip(state, tmp_path)
    (tmp_path / "out").mkdir()
    assert ckpt("convert", path, tmp_path / "out" / "model.npz", "--max-shard-size", "5kB").status == 0
    assert_same(ckpt_surgeon.load(tmp_path / "out"), state)
    (tmp_path / "out" / "model.npz.index.json").unlink()
    assert_same(ckpt_surgeon.load(tmp_path / "out"), state)


def test_ties_are_written_twice_and_notes_on_them_are_refused(tmp_path: Path) -> None:
    path = save_zip(TABLE["tied"](), tmp_path)
    ckpt_surgeon.convert(path, tmp_path / "out.npz")
    assert sorted(np.load(tmp_path / "out.npz").files) == sorted(TABLE["tied"]())
    with pytest.raises(EditError, match="has no notes"):
        ckpt_surgeon.convert(path, tmp_path / "again.npz", ties="alias")


def test_extra_states_are_left_out_and_named(ckpt: Run, tmp_path: Path) -> None:
    torch.save({"fc.weight": ramp(2), "fc._extra_state": {"amax": 1.0}}, tmp_path / "model.pth")
    ran = ckpt("convert", tmp_path / "model.pth", tmp_path / "out.npz")
    assert ran.status == 0
    assert "left out, as NumPy archive (.npz) holds tensors alone: 'fc._extra_state'" in ran.out


# -- what is broken


def written(folder: Path, text: str, body: bytes, *, version: int = 1) -> Path:
    raw = text.encode("latin-1")
    path = folder / "a.npy"
    path.write_bytes(b"\x93NUMPY" + bytes((version, 0)) + struct.pack("<H", len(raw)) + raw + body)
    return path


PLAIN = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }"
BROKEN: dict[str, tuple[str, bytes, str]] = {
    "cut elements": (PLAIN, bytes(7), "is truncated: its elements should end at byte 75 of 74"),
    "negative": (PLAIN.replace("2", "-2"), bytes(8), "none of numpy's"),
    "huge": (PLAIN.replace("2,", "9" * 19 + ", 9"), bytes(8), "more elements than can be counted"),
    "long numbers": (PLAIN.replace("2,", "9" * 30 + ","), bytes(8), "a shape that is none"),
    "a shape of many sizes": (PLAIN.replace("2,", "1," * 70), bytes(8), "a shape that is none"),
    "code in the header": (PLAIN.replace("False", "exit()"), bytes(8), "none of numpy's"),
    "no shape": ("{'descr': '<f4', 'fortran_order': False}", bytes(8), "none of numpy's"),
    "one key three times": ("{'descr': '<f4', 'descr': '<f4', 'descr': '<f4', }", bytes(8), "none of numpy's"),
    "deep": ("{'descr': '<f4', 'shape': " + "(" * 5000, bytes(8), "none of numpy's"),
    "long": (PLAIN + " " * 20_000, bytes(8), "a header of 20,057 bytes"),
    "objects without a pickle": (PLAIN.replace("<f4", "|O"), b"", "whose pickle is damaged or truncated"),
    "an unknown type": (PLAIN.replace("<f4", "<q9"), bytes(18), "elements (dtype 'q9')"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_wrong_with_an_array_is_said_in_one_line(kind: str, ckpt: Run, tmp_path: Path) -> None:
    text, body, words = BROKEN[kind]
    ran = ckpt("ls", written(tmp_path, text, body))
    assert (ran.status, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert words in ran.err


def test_a_version_that_is_not_known_is_told(tmp_path: Path) -> None:
    with pytest.raises(BrokenFile, match=r"format version 9\.0"):
        ckpt_surgeon.open(written(tmp_path, PLAIN, bytes(8), version=9))


@pytest.mark.parametrize(("place", "byte"), [(7, 39), (127, 0x1D), (127, 0xA0), (127, 0x85)])
def test_a_header_that_numpy_does_not_read_is_refused(place: int, byte: int, tmp_path: Path) -> None:
    path = tmp_path / "w.npy"
    np.save(path, np.ones(2))
    raw = bytearray(path.read_bytes())
    raw[place] = byte
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"format version|parse header|header"):
        np.load(path)
    with pytest.raises(ckpt_surgeon.CheckpointError):
        ckpt_surgeon.open(path)


def test_bytes_behind_an_array_are_noted(tmp_path: Path) -> None:
    assert "5 bytes behind the array" in ckpt_surgeon.open(written(tmp_path, PLAIN, bytes(13))).notes[0]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_member_whose_shape_lies_is_named(method: int, tmp_path: Path) -> None:
    raw = written(tmp_path, PLAIN.replace("2,", "3,"), bytes(8)).read_bytes()
    with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as made:
        made.writestr("fc.weight.npy", raw)
    with pytest.raises(
        BrokenFile, match=r"'fc.weight.npy' has 8 bytes of elements; its shape \[3\] of float32 needs 12"
    ):
        ckpt_surgeon.open(tmp_path / "a.npz")


def test_a_packed_member_whose_elements_begin_anywhere_is_read(tmp_path: Path) -> None:
    raw = written(tmp_path, PLAIN, struct.pack("<2f", 1, 2)).read_bytes()
    assert (len(raw) - 8) % 4
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("w.npy", raw)
    assert ckpt_surgeon.load(tmp_path / "a.npz")["w"].tolist() == [1, 2]


def test_members_that_are_no_arrays_are_noted(tmp_path: Path) -> None:
    path = archive({"w": ramp(2)}, tmp_path)
    with zipfile.ZipFile(path, "a") as made:
        made.writestr("readme.txt", "hello")
    assert "'readme.txt'" in ckpt_surgeon.open(path).notes[0]


def test_an_archive_without_any_tensor_is_none(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", text=np.array("x"))
    with pytest.raises(NotACheckpoint, match="no tensor"):
        ckpt_surgeon.open(tmp_path / "a.npz")


def test_what_is_whole_in_a_truncated_archive_is_salvaged(tmp_path: Path) -> None:
    state = {f"w{index}": ramp(100) + index for index in range(5)}
    path = archive(state, tmp_path)
    raw = path.read_bytes()
    path.write_bytes(raw[: raw.index(b"w4.npy") - 30])
    with pytest.raises(BrokenFile, match="truncated zip"):
        ckpt_surgeon.open(path)
    assert_same(ckpt_surgeon.load(ckpt_surgeon.open(path, salvage=True)), {key: state[key] for key in list(state)[:4]})


@pytest.mark.parametrize("kind", ["npy", "stored", "packed"])
def test_a_file_that_is_cut_anywhere_is_an_error_and_never_less_of_it(kind: str, tmp_path: Path) -> None:
    made = io.BytesIO()
    np.save(made, np.arange(50.0)) if kind == "npy" else SAVES[kind](made, a=np.arange(50.0), b=np.ones((3, 4)))
    path = tmp_path / "a.npz"
    for raw in cuts(made.getvalue(), 15):
        path.write_bytes(raw)
        assert examine(path)


@pytest.mark.parametrize("kind", ["npy", "stored", "packed", "objects"])
def test_damaged_bytes_never_give_more_than_an_error(kind: str, tmp_path: Path) -> None:
    made = io.BytesIO()
    if kind == "npy":
        np.save(made, np.arange(50.0))
    elif kind == "objects":
        np.save(made, {"a": np.ones(3), "b": [1, "x"]}, allow_pickle=True)  # type: ignore[arg-type]
    else:
        SAVES[kind](made, a=np.arange(50.0), b=np.ones((3, 4)), o=np.array([1, "x"], dtype=object))
    path = tmp_path / "a.npz"
    for raw in damaged(made.getvalue(), 50):
        path.write_bytes(raw)
        examine(path)


def test_a_packed_array_is_read_in_bounded_memory(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", w=np.zeros((6, 1 << 20)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ckpt_surgeon.convert(tmp_path / "a.npz", tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").stat().st_size > 6 << 23
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 24 << 10


def test_pickle_protocols_of_all_times_are_read_in_arrays_of_objects(tmp_path: Path) -> None:
    for protocol in (0, 2, 5):
        body = pickle.dumps(np.array({"a": np.ones(2)}, dtype=object), protocol=protocol)
        path = written(tmp_path, PLAIN.replace("<f4", "|O").replace("(2,)", "()"), body)
        assert ckpt_surgeon.load(path)["a"].tolist() == [1, 1]
