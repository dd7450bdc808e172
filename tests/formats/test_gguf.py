"""GGUF, read and written: the package gguf writes the files, and its reader and its decoders are the oracle."""

from __future__ import annotations

import random
import struct
import sys
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from command_line import Run
from gguf import GGMLQuantizationType as Kind

import ckpt_surgeon
from ckpt_surgeon.errors import BrokenFile, CheckpointError, EditError, NotACheckpoint
from ckpt_surgeon.tensors import ggml

Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
RECIPES = Path(__file__).parents[2] / "docs" / "recipes"
ROWS = 3  # of 256 numbers: one block of every type


def numbers(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def written(path: Path, fill: Callable[[gguf.GGUFWriter], object], architecture: str = "llama") -> Path:
    """A file that the package has written."""
    writer = gguf.GGUFWriter(path, architecture)
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def fill(writer: gguf.GGUFWriter) -> None:
    """Metadata of every type, tensors of the usual ones."""
    writer.add_block_count(2)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_float32("some.largest", 3.4028234663852886e38)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_int64("some.int64", -5)
    writer.add_float64("some.float64", 0.1)
    writer.add_string("tokenizer.chat_template", "{{ bos }}\n")
    writer.add_array("tokenizer.ggml.tokens", [f"tok{index}" for index in range(100)])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5])
    writer.add_tensor("norm.weight", numbers(256, seed=1))
    writer.add_tensor("half.weight", numbers(ROWS, 256, seed=2).astype(np.float16))
    bf16 = gguf.quants.quantize(numbers(ROWS, 256, seed=3), Kind.BF16)
    writer.add_tensor("bf16.weight", bf16, raw_dtype=Kind.BF16)
    writer.add_tensor("codes.weight", gguf.quants.quantize(numbers(ROWS, 256), Kind.Q8_0), raw_dtype=Kind.Q8_0)
    writer.add_tensor("ids", np.arange(6, dtype=np.int32).reshape(2, 3))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return written(tmp_path / "model.gguf", fill)


def oracle(path: Path) -> dict[str, Array]:
    """What the package reads: numbers in float32 or as they are."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        plain = tensor.tensor_type in (Kind.I8, Kind.I16, Kind.I32, Kind.I64, Kind.F64)
        made = tensor.data if plain else gguf.quants.dequantize(np.array(tensor.data), tensor.tensor_type)
        found[tensor.name] = np.array(made).reshape(tuple(reversed(tensor.shape.tolist())))
    return found


def fields(path: Path) -> dict[str, object]:
    reader = gguf.GGUFReader(path)
    return {name: one.contents() for name, one in reader.fields.items() if not name.startswith("GGUF.")}


def assert_same(path: Path) -> None:
    """What is read is what the package reads, bit for bit."""
    ours, theirs = ckpt_surgeon.open(path), oracle(path)
    assert list(ours) == list(theirs)
    for key, tensor in ours.items():
        assert tensor.shape == theirs[key].shape
        values = tensor.load()
        read = values.float().numpy() if values.is_floating_point() else values.numpy()
        assert read.astype(theirs[key].dtype).tobytes() == theirs[key].tobytes(), key


# -- reading


def test_a_file_is_what_the_package_reads(model: Path) -> None:
    assert_same(model)
    found = ckpt_surgeon.open(model)
    assert {key: tensor.dtype.name for key, tensor in found.items()} == {
        "norm.weight": "float32", "half.weight": "float16", "bf16.weight": "bfloat16", "codes.weight": "float32",
        "ids": "int32",
    }  # fmt: skip
    assert [key for key, tensor in found.items() if tensor.span is None] == ["codes.weight"]  # the others are copied


@pytest.mark.parametrize("coding", [one for one in ggml.CODINGS.values() if one.is_decoded], ids=lambda one: one.name)
def test_codes_of_every_type_are_decoded_as_the_package_decodes_them(coding: ggml.Coding, tmp_path: Path) -> None:
    kind = Kind(coding.number)
    assert kind.name.lower() == coding.name
    assert gguf.GGML_QUANT_SIZES[kind] == (coding.numbers, coding.nbytes)
    raw = np.random.default_rng(0).integers(0, 100, (ROWS, 256 // coding.numbers * coding.nbytes), np.uint8)
    path = written(tmp_path / "x.gguf", lambda writer: writer.add_tensor("w", raw, raw_dtype=kind))
    assert_same(path)


def test_metadata_is_shown(model: Path, ckpt: Run) -> None:
    out = ckpt("ls", model).out
    for text in (
        "general.architecture = llama",
        "llama.block_count = 2",
        "llama.rope.freq_base = 10000",
        "some.largest = 3.4028235e+38",
        "tokenizer.ggml.add_bos_token = true",
        "some.int64 = -5",
        "tokenizer.ggml.tokens = [100 items: 'tok0', 'tok1', 'tok2', …]",
        "tensors of codes, read as float32: 1 of q8_0",
    ):
        assert text in out
    assert "codes.weight" in out


def test_codes_are_decoded_in_bounded_memory(tmp_path: Path) -> None:
    codes = np.zeros((4096, 4096 // 32 * 18), np.uint8)  # 64 MiB of numbers
    path = written(tmp_path / "x.gguf", lambda writer: writer.add_tensor("w", codes, raw_dtype=Kind.Q4_0))
    tensor = ckpt_surgeon.open(path)["w"]
    tracemalloc.start()
    assert sum(len(block) for block in tensor.blocks()) == 4096 * 4096 * 4
    assert tracemalloc.get_traced_memory()[1] < 24 << 20
    tracemalloc.stop()


def test_the_parts_of_a_split_model_are_read_as_one(tmp_path: Path) -> None:
    for number, names in enumerate((["a", "b"], ["c"])):

        def part(writer: gguf.GGUFWriter, number: int = number, names: list[str] = names) -> None:
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", 2)
            for name in names:
                writer.add_tensor(name, numbers(2, 3))

        written(tmp_path / f"model-{number + 1:05d}-of-00002.gguf", part)
    assert list(ckpt_surgeon.open(tmp_path / "model-00001-of-00002.gguf")) == ["a", "b", "c"]
    assert list(ckpt_surgeon.open(tmp_path)) == ["a", "b", "c"]
    ckpt_surgeon.convert(tmp_path, tmp_path / "one.gguf")
    assert "split.count" not in fields(tmp_path / "one.gguf")
    assert list(oracle(tmp_path / "one.gguf")) == ["a", "b", "c"]
    (tmp_path / "model-00002-of-00002.gguf").unlink()
    with pytest.raises(BrokenFile, match="number 2 is missing"):
        ckpt_surgeon.open(tmp_path / "model-00001-of-00002.gguf")


# -- broken files


def head(*, version: int = 3, tensors: int = 0, values: int = 0, rest: bytes = b"") -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", version, tensors, values) + rest


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def info(name: bytes = b"w", shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def entry(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"GGUF", "is truncated: its version should end at byte 8 of 4"),
        (head()[:20], "is truncated: its counts should end"),
        (head(tensors=1 << 60), "announces 1,152,921,504,606,846,976 tensors, and 0 bytes are left"),
        (head(values=1 << 60), "announces 1,152,921,504,606,846,976 entries of metadata"),
        (head(tensors=1, rest=struct.pack("<Q", 1 << 62) + bytes(99)), "the limit is 65,536"),
        (head(tensors=1, rest=info(b"\xff")), "that is no UTF-8"),
        (head(tensors=1, rest=info(shape=(1,) * 5)), "has 5 dimensions, the limit is 4"),
        (head(tensors=1, rest=info(kind=99)), "has type 99, which is not known"),
        (head(tensors=1, rest=info(kind=4)), "has type 4, which is not known"),
        (head(tensors=1, rest=info(shape=(1 << 40, 1 << 40))), "has more elements than can be counted"),
        (head(tensors=1, rest=info(shape=(31,), kind=8)), "has rows of 31, and q8_0 has blocks of 32"),
        (head(tensors=1, rest=info(shape=(), kind=8)), "has no rows, and q8_0"),
        (head(tensors=1, rest=info(offset=7) + bytes(99)), "begins at data byte 7, not at a multiple of 32"),
        (head(tensors=1, rest=info(offset=1 << 40) + bytes(99)), "is truncated: tensor 'w' should end at byte"),
        (head(tensors=1, rest=info(shape=(1 << 30,)) + bytes(99)), "is truncated: tensor 'w' should end at byte"),
        (head(tensors=2, rest=info() + info() + bytes(199)), "has the tensor 'w' twice"),
        (head(tensors=2, rest=info() + info(b"v") + bytes(199)), "tensors 'w' and 'v' overlap"),
        (head(values=1, rest=entry(b"k", 13, bytes(9))), "has the metadata 'k' of type 13"),
        (head(values=2, rest=entry(b"k", 4, bytes(4)) * 2), "has the metadata 'k' twice"),
        (head(values=1, rest=entry(b"k", 8, struct.pack("<Q", 1 << 62))), "is truncated: the value of 'k' should end"),
        (head(values=1, rest=entry(b"k", 9, struct.pack("<IQ", 4, 1 << 61))), "items of 'k', and"),
        (head(values=1, rest=entry(b"k", 9, struct.pack("<IQ", 9, 1) * 6)), "has arrays in arrays in 'k'"),
        (head(values=1, rest=entry(b"k", 9, struct.pack("<IQQ", 8, 1, 1 << 62))), "is truncated: the value of 'k'"),
        (head(values=1, rest=entry(b"general.alignment", 4, struct.pack("<I", 24))), "which is no power of two"),
        (head(values=1, rest=entry(b"general.alignment", 4, bytes(4))), "which is no power of two"),
        (head(values=1, rest=entry(b"general.alignment", 8, text(b"x" * 99))), "which is no power of two"),
    ],
)  # fmt: skip
def test_a_broken_file_is_an_error_that_says_how(raw: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(raw)
    with pytest.raises(BrokenFile) as caught:
        ckpt_surgeon.open(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("version", "said"), [(1, "is a GGUF file of version 1"), (3 << 24, "is a big-endian GGUF file")]
)
def test_other_versions_are_named(version: int, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(head(version=version))
    with pytest.raises(NotACheckpoint, match=said):
        ckpt_surgeon.open(tmp_path / "x.gguf")


def test_a_file_that_is_cut_anywhere_is_truncated(model: Path, tmp_path: Path) -> None:
    raw, cut = model.read_bytes(), tmp_path / "cut.gguf"
    for size in [*range(4, len(raw) - 64, 37), len(raw) - 40]:
        cut.write_bytes(raw[:size])
        with pytest.raises(BrokenFile, match=r"is truncated|are left at byte"):
            ckpt_surgeon.open(cut)
    found = ckpt_surgeon.open(cut, salvage=True)
    assert torch.equal(found["norm.weight"].load(), ckpt_surgeon.open(model)["norm.weight"].load())


def test_damage_is_an_error_of_ours_or_none(model: Path, tmp_path: Path) -> None:
    raw, damaged = model.read_bytes(), tmp_path / "x.gguf"
    chance = random.Random(0)
    for _ in range(400):
        made = bytearray(raw)
        for _ in range(chance.randint(1, 4)):
            made[chance.randrange(4, 2600)] = chance.choice((0, 1, 127, 128, 255, chance.randrange(256)))
        damaged.write_bytes(made)
        with suppress(CheckpointError):
            for tensor in ckpt_surgeon.open(damaged).values():
                for _ in tensor.blocks():
                    pass


def test_a_text_of_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    with open(path, "wb") as file:
        file.write(head(values=1, rest=entry(b"k", 8, struct.pack("<Q", 1 << 30))))
        file.truncate(file.tell() + (1 << 30))
    tracemalloc.start()
    (listed,) = ckpt_surgeon.ls(path, all=True).metadata.values()
    assert listed == "[a text of 1,073,741,824 bytes]"
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


# -- writing


def test_what_is_written_is_what_was_read(model: Path, tmp_path: Path) -> None:
    ckpt_surgeon.convert(model, tmp_path / "copy.gguf")
    found = fields(tmp_path / "copy.gguf")
    added = {"general.file_type", "general.quantization_version"}
    assert {name: value for name, value in found.items() if name not in added} == fields(model)
    assert added <= found.keys()
    before, after = (gguf.GGUFReader(path).tensors for path in (model, tmp_path / "copy.gguf"))
    assert [(one.name, one.tensor_type, one.shape.tolist(), one.data.tobytes()) for one in before] == [
        (one.name, one.tensor_type, one.shape.tolist(), one.data.tobytes()) for one in after
    ]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_quantised_weights_are_the_packages_codes(dtype: str, model: Path, tmp_path: Path, ckpt: Run) -> None:
    assert ckpt("cast", model, tmp_path / "cast.gguf", "--dtype", dtype).status == 0
    ran = ckpt("quantize", tmp_path / "cast.gguf", tmp_path / "q8.gguf", "--dtype", "q8_0")
    assert ran.status == 0, ran.err
    numbers = oracle(tmp_path / "cast.gguf")
    found = {one.name: one for one in gguf.GGUFReader(tmp_path / "q8.gguf").tensors}
    assert fields(tmp_path / "q8.gguf")["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    for key in ("half.weight", "bf16.weight", "codes.weight"):
        assert found[key].tensor_type == Kind.Q8_0
        assert found[key].data.tobytes() == gguf.quants.quantize(numbers[key], Kind.Q8_0).tobytes()
    assert found["norm.weight"].tensor_type != Kind.Q8_0
    assert_same(tmp_path / "q8.gguf")


def test_codes_in_another_container_are_the_numbers_that_they_stand_for(model: Path, tmp_path: Path) -> None:
    weights = ckpt_surgeon.quantize(ckpt_surgeon.open(model), "q8_0", only="half.*")
    ckpt_surgeon.save(weights, tmp_path / "x.pth")
    half = oracle(model)["half.weight"]
    rounded = gguf.quants.dequantize(gguf.quants.quantize(half, Kind.Q8_0), Kind.Q8_0)
    assert torch.equal(torch.load(tmp_path / "x.pth")["half.weight"], torch.from_numpy(rounded))


def test_codes_of_a_large_tensor_are_made_in_steps(model: Path, tmp_path: Path) -> None:
    wide = numbers(700, 1024)
    source = written(tmp_path / "wide.gguf", lambda writer: writer.add_tensor("w", wide))
    ckpt_surgeon.save(ckpt_surgeon.quantize(ckpt_surgeon.open(source), "q8_0"), tmp_path / "q8.gguf")
    [tensor] = gguf.GGUFReader(tmp_path / "q8.gguf").tensors
    assert tensor.data.tobytes() == gguf.quants.quantize(wide, Kind.Q8_0).tobytes()


def test_alignment_is_kept(tmp_path: Path) -> None:
    def aligned(writer: gguf.GGUFWriter) -> None:
        writer.add_custom_alignment(64)
        for name in "abc":
            writer.add_tensor(name, numbers(3))

    path = written(tmp_path / "x.gguf", aligned)
    ckpt_surgeon.convert(path, tmp_path / "copy.gguf")
    assert all(one.data_offset % 64 == 0 for one in gguf.GGUFReader(tmp_path / "copy.gguf").tensors)
    assert_same(tmp_path / "copy.gguf")


def test_what_gguf_cannot_hold_is_refused_before_anything_is_written(model: Path, tmp_path: Path, ckpt: Run) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "x.pth")
    with pytest.raises(
        EditError, match=r"the input has none of a GGUF file; graft it into a GGUF .* convert_hf_to_gguf"
    ):
        ckpt_surgeon.convert(tmp_path / "x.pth", tmp_path / "out.gguf")
    weights = ckpt_surgeon.open(model)
    for odd, said in ((torch.ones(2, dtype=torch.bool), "bool"), (torch.ones((1,) * 5), "5 dimensions")):
        with pytest.raises(EditError, match=said):
            ckpt_surgeon.save(weights.with_tensors({**weights, **ckpt_surgeon.from_torch({"x": odd})}, None),
                              tmp_path / "out.gguf")  # fmt: skip
    ran = ckpt("rename", model, tmp_path / "out.gguf", f"half.weight={'x' * 70}")
    assert "a name of more than 63 bytes" in ran.err
    with pytest.raises(EditError, match="is written as one file"):
        ckpt_surgeon.convert(model, tmp_path / "out.gguf", max_shard_size=1000)
    assert not (tmp_path / "out.gguf").exists()


# -- rotary embeddings, and the names of llama.cpp


def test_the_rows_of_heads_are_turned_as_llama_cpp_turns_them(tmp_path: Path) -> None:
    weight = torch.arange(16 * 3, dtype=torch.float32).reshape(16, 3)
    heads = 2
    permuted = weight.reshape(heads, 2, 16 // heads // 2, 3).swapaxes(1, 2).reshape(weight.shape)  # its `permute`
    assert torch.equal(ckpt_surgeon.rotary({"q": weight}, "q", to="pairs", head_dim=8)["q"], permuted)
    assert torch.equal(ckpt_surgeon.rotary({"q": permuted}, "q", to="halves", head_dim=8)["q"], weight)
    with pytest.raises(EditError, match="is not made of heads of 10 rows"):
        ckpt_surgeon.rotary({"q": weight}, "q", to="pairs", head_dim=10)
    with pytest.raises(EditError, match="does not say how many rows a head has; give head_dim=128"):
        ckpt_surgeon.rotary({"q": weight}, "q", to="pairs")
    path = written(tmp_path / "x.gguf", lambda writer: writer.add_tensor("q", weight.numpy()), architecture="qwen2")
    with pytest.raises(
        EditError, match=r"of llama.cpp's architecture 'qwen2', whose rows may stand as in transformers"
    ):
        ckpt_surgeon.rotary(ckpt_surgeon.open(path), "q", to="halves")


SIZES = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, transformers.LlamaForCausalLM]:
    """A model of transformers as llama.cpp converts it: names by the package, rows turned by its `permute`."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2)
    model = transformers.LlamaForCausalLM(config).eval()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)

    def converted(writer: gguf.GGUFWriter) -> None:
        writer.add_embedding_length(32)
        writer.add_block_count(2)
        writer.add_head_count(4)
        writer.add_head_count_kv(2)
        writer.add_tensor("rope_freqs.weight", numbers(4))
        for key, tensor in model.state_dict().items():
            values, heads = tensor.numpy(), 4 if "q_proj" in key else 2
            if "q_proj" in key or "k_proj" in key:
                turned = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:]).swapaxes(1, 2)
                values = np.ascontiguousarray(turned.reshape(values.shape))
            writer.add_tensor(names.get_name(key, (".weight", ".bias")), values)

    return written(tmp_path / "llama.gguf", converted), model


def test_a_recipe_gives_a_llama_the_names_and_rows_of_transformers(
    llama: tuple[Path, transformers.LlamaForCausalLM], tmp_path: Path, ckpt: Run
) -> None:
    path, model = llama
    ran = ckpt("apply", RECIPES / "gguf_llama_to_hf.toml", path, tmp_path / "hf.pth")
    assert ran.status == 0, ran.err
    theirs, ours = model.state_dict(), torch.load(tmp_path / "hf.pth")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


def test_a_recipe_puts_a_llama_of_transformers_into_a_gguf_file(
    llama: tuple[Path, transformers.LlamaForCausalLM], tmp_path: Path, ckpt: Run
) -> None:
    path, model = llama
    torch.save({key: 2 * value for key, value in model.state_dict().items()}, tmp_path / "trained.pth")
    ran = ckpt("apply", RECIPES / "hf_llama_into_gguf.toml", path, tmp_path / "trained.pth", tmp_path / "out.gguf")
    assert ran.status == 0, ran.err
    before, after = oracle(path), oracle(tmp_path / "out.gguf")
    assert before.keys() == after.keys()
    assert all(np.array_equal(after[key], before[key] * (1 if "rope" in key else 2)) for key in before)
    assert fields(tmp_path / "out.gguf").items() >= fields(path).items()


def test_the_package_is_named_where_it_is_missing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    weights = ckpt_surgeon.open(model)
    assert weights["half.weight"].load().shape == (ROWS, 256)
    with pytest.raises(EditError, match="codes of q8_0 need the package gguf; pip install gguf"):
        ckpt_surgeon.save(weights, tmp_path / "out.pth")
    ckpt_surgeon.convert(model, tmp_path / "copy.gguf")  # codes stay codes
