"""Codes that share a byte or a word: what compressed-tensors and transformers themselves make of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command_line import Run

import ckpt_surgeon
from ckpt_surgeon.edits import quantised as module

quantization = pytest.importorskip("compressed_tensors.quantization")
compressors = pytest.importorskip("compressed_tensors.compressors")
GENERATOR = torch.Generator().manual_seed(5)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 1000)  # several blocks of rows in every test


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR)


def scheme(**arguments: object) -> object:
    return quantization.QuantizationScheme(targets=["Linear"], weights=quantization.QuantizationArgs(**arguments))


def compressor(name: str) -> type:
    from importlib import import_module

    folder, _, cls = name.partition(":")
    found = getattr(import_module(f"compressed_tensors.compressors.{folder}.base"), cls)
    assert isinstance(found, type)
    return found


INTEGERS = compressor("pack_quantized:PackedQuantizationCompressor")
NVFP4 = compressor("nvfp4:NVFP4PackedCompressor")
MXFP4 = compressor("mxfp4:MXFP4PackedCompressor")


def decompressed(cls: type, state: dict[str, torch.Tensor], how: object) -> torch.Tensor:
    found = cls.decompress(dict(state), how)["weight"]  # type: ignore[attr-defined]
    assert isinstance(found, torch.Tensor)
    return found


def under(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{name}": value for name, value in state.items()}


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """What is compared: bits, so that -0.0 is not 0.0."""
    return tensor.contiguous().view(torch.uint8)


def integers(
    bits: int, shape: tuple[int, int], group: int, dtype: torch.dtype, *, symmetric: bool
) -> tuple[dict[str, torch.Tensor], object]:
    """A random weight as compressed-tensors packs it, and its scheme."""
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    how = scheme(num_bits=bits, type="int", symmetric=symmetric, **strategy)
    groups = shape[1] // group if group else 1
    low = -(1 << (bits - 1))
    state = {
        "weight": noise(*shape).to(dtype),
        "weight_scale": (noise(shape[0], groups).abs() * 0.1 + 0.01).to(dtype),
    }
    if not symmetric:
        zeros = torch.randint(low, -low, (shape[0], groups), generator=GENERATOR)
        state["weight_zero_point"] = zeros.to(torch.int8)
    return INTEGERS.compress(state, how), how  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zeros"])
@pytest.mark.parametrize(("bits", "shape", "group"), [(4, (40, 128), 32), (8, (33, 64), 16), (4, (21, 100), 0)])
def test_packed_integers(bits: int, shape: tuple[int, int], group: int, symmetric: bool, dtype: torch.dtype) -> None:
    state, how = integers(bits, shape, group, dtype, symmetric=symmetric)
    made = ckpt_surgeon.dequantize(under("fc", state))
    assert list(made) == ["fc.weight"]
    theirs = decompressed(INTEGERS, state, how)
    assert made["fc.weight"].dtype == theirs.dtype == dtype
    assert torch.equal(bits_of(made["fc.weight"]), bits_of(theirs))


def test_inputs_that_were_reordered_have_the_scales_of_their_group() -> None:
    state, _ = integers(4, (16, 64), 16, torch.float16, symmetric=True)
    index = torch.randperm(64, generator=GENERATOR) // 16
    made = ckpt_surgeon.dequantize(under("fc", state | {"weight_g_idx": index.to(torch.int32)}))["fc.weight"]
    unpacked = compressors.pack_quantized.helpers.unpack_from_int32(state["weight_packed"], 4, torch.Size((16, 64)))
    assert torch.equal(made, unpacked.half() * state["weight_scale"][:, index])
    unset = ckpt_surgeon.dequantize(under("fc", state | {"weight_g_idx": torch.full((64,), -1, dtype=torch.int32)}))
    assert torch.equal(unset["fc.weight"], ckpt_surgeon.dequantize(under("fc", state))["fc.weight"])


def float4(cls: type, shape: tuple[int, int]) -> tuple[dict[str, torch.Tensor], object]:
    """Every code of a float4, with scales of many sizes."""
    group = 16 if cls is NVFP4 else 32
    state = {"weight_packed": torch.randint(0, 256, (shape[0], shape[1] // 2), generator=GENERATOR).to(torch.uint8)}
    if cls is NVFP4:
        state["weight_scale"] = (noise(shape[0], shape[1] // group).abs() * 100).to(torch.float8_e4m3fn)
        state["weight_global_scale"] = torch.tensor([1234.5])
        return state, scheme(num_bits=4, type="float", strategy="tensor_group", group_size=16)
    state["weight_scale"] = torch.randint(90, 160, (shape[0], shape[1] // group), generator=GENERATOR).to(torch.uint8)
    return state, scheme(num_bits=4, type="float", strategy="group", group_size=32)


@pytest.mark.parametrize("cls", [NVFP4, MXFP4], ids=["NVFP4", "MXFP4"])
@pytest.mark.parametrize("shape", [(16, 96), (37, 256)])
def test_float4_of_compressed_tensors(cls: type, shape: tuple[int, int]) -> None:
    state, how = float4(cls, shape)
    made = ckpt_surgeon.dequantize(under("fc", state | {"input_global_scale": torch.ones(1)}))
    theirs = decompressed(cls, state, how)
    assert list(made) == ["fc.weight"]
    assert made["fc.weight"].dtype == theirs.dtype == torch.bfloat16
    assert torch.equal(bits_of(made["fc.weight"]), bits_of(theirs))


def test_float4_of_modelopt_is_multiplied_by_its_second_scale() -> None:
    state, _ = float4(NVFP4, (16, 64))
    saved = {
        "fc.weight": state["weight_packed"],
        "fc.weight_scale": state["weight_scale"],
        "fc.weight_scale_2": torch.tensor(0.037),
        "fc.input_scale": torch.tensor(1.0),
    }
    values = compressors.nvfp4.helpers.unpack_fp4_from_uint8(state["weight_packed"], 16, 64, dtype=torch.float32)
    gains = (state["weight_scale"].float() * torch.tensor(0.037)).repeat_interleave(16, 1)
    made = ckpt_surgeon.dequantize(saved)
    assert list(made) == ["fc.weight"]
    assert torch.equal(made["fc.weight"], (values * gains).bfloat16())


def test_bytes_are_exponents_where_float8_codes_have_them_as_scales() -> None:
    cls = compressor("mxfp8:MXFP8QuantizationCompressor")
    how = scheme(num_bits=8, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8)
    state = {
        "weight": noise(20, 64).to(torch.float8_e4m3fn),
        "weight_scale": torch.randint(120, 132, (20, 2), generator=GENERATOR).to(torch.uint8),
    }
    made = ckpt_surgeon.dequantize(under("fc", state))["fc.weight"]
    assert torch.equal(made, decompressed(cls, state, how))


@pytest.mark.parametrize("low", [100, 0], ids=["usual", "all exponents"])
def test_blocks_of_gpt_oss_are_what_transformers_makes_of_them(low: int) -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    blocks = torch.randint(0, 256, (3, 40, 4, 16), generator=GENERATOR).to(torch.uint8)
    scales = torch.randint(low, 255 if not low else 150, (3, 40, 4), generator=GENERATOR).to(torch.uint8)
    state = {"experts.gate_up_proj_blocks": blocks, "experts.gate_up_proj_scales": scales, "norm.weight": torch.ones(3)}
    made = ckpt_surgeon.dequantize(state)
    theirs = mxfp4.convert_moe_packed_tensors(blocks, scales)
    assert list(made) == ["experts.gate_up_proj", "norm.weight"]
    assert made["experts.gate_up_proj"].shape == theirs.shape == (3, 128, 40)
    assert torch.equal(bits_of(made["experts.gate_up_proj"]), bits_of(theirs))


STATES = {
    "packed integer codes": lambda: integers(4, (32, 64), 32, torch.bfloat16, symmetric=False)[0],
    "NVFP4 codes": lambda: float4(NVFP4, (32, 64))[0],
    "MXFP4 codes": lambda: float4(MXFP4, (32, 64))[0],
}


@pytest.mark.parametrize("label", STATES)
def test_codes_are_named_and_never_touched_without_their_scales(label: str, tmp_path: Path, ckpt: Run) -> None:
    file, out = tmp_path / "q.safetensors", tmp_path / "out.safetensors"
    state = under("fc", STATES[label]())
    ckpt_surgeon.save(state, file)
    assert f"1 weight is {label}" in ckpt("ls", file).out
    sliced = ["slice", file, out, "*_packed", "--start", "0", "--stop", "8"]
    for words in (["cast", file, out, "--dtype", "fp16", "--integers"], sliced):
        refused = ckpt(*words)
        assert refused.status != 0
        assert "dequantize" in refused.err
        assert not out.exists()
    renamed = ckpt("add-prefix", file, out, "--prefix", "model.")
    assert renamed.status == 0
    assert ckpt("dequantize", out, tmp_path / "plain.safetensors").status == 0
    [key] = ckpt_surgeon.open(tmp_path / "plain.safetensors")
    assert key == "model.fc.weight"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"weight_scale": torch.ones(16, 5, dtype=torch.float8_e4m3fn)}, "not known"),
        ({"weight_scale": torch.ones(16, 4)}, "not known"),
        ({"weight_zero_point": torch.ones(16, 4)}, "not known"),
    ],
    ids=["groups that do not fit", "no second scale", "zeros"],
)
def test_what_has_no_formula_is_refused_with_the_way_on(change: dict[str, torch.Tensor], word: str) -> None:
    state, _ = float4(NVFP4, (16, 64))
    if "weight_scale" in change and change["weight_scale"].dtype == torch.float32:
        del state["weight_global_scale"]
    with pytest.raises(ckpt_surgeon.EditError, match=word) as refused:
        ckpt_surgeon.dequantize(under("fc", state | change))
    assert "the library that wrote it" in str(refused.value.remedy)


def test_words_whose_bits_are_open_are_refused() -> None:
    state = {
        "fc.weight_packed": torch.zeros(3, 5, dtype=torch.int32),
        "fc.weight_scale": torch.ones(3, 1),
        "fc.weight_shape": torch.tensor([3, 50]),
    }
    with pytest.raises(ckpt_surgeon.EditError, match=r"'fc\.weight'.*do not make"):
        ckpt_surgeon.dequantize(state)  # codes of three bits: some lie in two words
