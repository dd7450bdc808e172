"""Dequantized weights equal each scheme's reference formula, and bitsandbytes' and compressed-tensors' own code."""

from pathlib import Path

import pytest
import torch
from command_line import Run

import ckpt_surgeon
from ckpt_surgeon.edits import quantised as module

GENERATOR = torch.Generator().manual_seed(3)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 1000)  # several blocks of rows in every test


def by_blocks(weight: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of blocks, computed block by block."""
    high, wide = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
    scale, codes = torch.zeros(high, wide), torch.zeros(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(high):
        for j in range(wide):
            part = weight[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            scale[i, j] = part.abs().max() / 448
            codes[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] = (part / scale[i, j]).to(codes.dtype)
    return codes, scale


def of_blocks(codes: torch.Tensor, scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """DeepSeek-V3's weight_dequant: y = x.to(float32) * s, block by block."""
    made = torch.zeros(codes.shape)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            at = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            made[at] = codes[at].float() * scale[i, j]
    return made


@pytest.mark.parametrize("shape", [(256, 256), (300, 130), (7, 200), (129, 128)])
def test_float8_with_block_scales_whose_edges_are_no_multiple_of_the_block(shape: tuple[int, int]) -> None:
    codes, scale = by_blocks(noise(*shape), 128, 128)
    state = {"proj.weight": codes, "proj.weight_scale_inv": scale, "norm.weight": torch.ones(3)}
    made = ckpt_surgeon.dequantize(state)
    assert list(made) == ["proj.weight", "norm.weight"]
    assert torch.equal(made["proj.weight"], of_blocks(codes, scale, 128, 128).bfloat16())
    assert made["norm.weight"] is state["norm.weight"]


def test_the_size_of_a_block_is_asked_for_where_shapes_leave_it_open() -> None:
    codes, scale = by_blocks(noise(100, 100), 48, 48)
    state = {"w.weight": codes, "w.weight_scale_inv": scale}
    with pytest.raises(ckpt_surgeon.EditError, match="block"):
        ckpt_surgeon.dequantize(state)
    made = ckpt_surgeon.dequantize(state, dtype="fp32", block=[48, 48])
    assert torch.equal(made["w.weight"], of_blocks(codes, scale, 48, 48))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(40, 1), (40,), (1,), ()])
def test_float8_with_channel_scales_is_what_compressed_tensors_makes(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    codes = noise(40, 96).to(torch.float8_e4m3fn)
    scale = (noise(*shape).abs() + 0.1).to(dtype)
    column = scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(1)
    strategy = "channel" if scale.numel() > 1 else "tensor"
    args = pytest.importorskip("compressed_tensors.quantization").QuantizationArgs(
        num_bits=8, type="float", strategy=strategy
    )
    theirs = forward.dequantize(codes, column, args=args)
    made = ckpt_surgeon.dequantize({"fc.weight": codes, "fc.weight_scale": scale}, dtype=str(dtype))
    assert torch.equal(made["fc.weight"], theirs.to(dtype))


def test_powers_of_two_are_scales_too() -> None:
    codes, scale = noise(8, 64).to(torch.float8_e4m3fn), torch.tensor([[0.5, 4.0]] * 8).to(torch.float8_e8m0fnu)
    made = ckpt_surgeon.dequantize({"w": codes, "w_scale": scale}, dtype="fp32")
    assert torch.equal(made["w"], codes.float() * scale.float().repeat_interleave(32, 1))


def test_a_stack_of_experts_has_blocks_in_its_last_two_dimensions() -> None:
    parts = [by_blocks(noise(150, 140), 128, 128) for _ in range(3)]
    codes, scale = torch.stack([one for one, _ in parts]), torch.stack([one for _, one in parts])
    made = ckpt_surgeon.dequantize({"e.w": codes, "e.w_scale_inv": scale}, dtype="fp32")["e.w"]
    assert torch.equal(made, torch.stack([of_blocks(*one, 128, 128) for one in parts]))


def test_bitsandbytes_int8_rows() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, scale, _ = functional.int8_vectorwise_quant(noise(37, 64).half())
    state = {"fc.weight": codes, "fc.SCB": scale, "fc.weight_format": torch.tensor(0, dtype=torch.uint8)}
    made = ckpt_surgeon.dequantize(state)
    assert list(made) == ["fc.weight"]
    assert torch.equal(made["fc.weight"], functional.int8_vectorwise_dequant(codes, scale).half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(64, 96), (33, 41), (130, 128)])
def test_bitsandbytes_four_bits(shape: tuple[int, int], kind: str, nested: bool, dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, state = functional.quantize_4bit(noise(*shape).to(dtype), quant_type=kind, compress_statistics=nested)
    saved = {"fc.weight": codes} | {f"fc.weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    made = ckpt_surgeon.dequantize(saved)
    assert list(made) == ["fc.weight"]
    theirs = functional.dequantize_4bit(codes, state)
    assert made["fc.weight"].dtype == theirs.dtype == dtype
    assert torch.equal(made["fc.weight"], theirs)


def packed(numbers: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """Numbers [n, 8 k] of four bits as [n, k] of 32, number ``order[i]`` of each eight in the i-th place."""
    made = torch.zeros(numbers.shape[0], numbers.shape[1] // 8, dtype=torch.int64)
    for place, which in enumerate(order):
        made |= numbers[:, which::8].long() << (4 * place)
    return torch.where(made >= 1 << 31, made - (1 << 32), made).to(torch.int32)


def four_bits(*shape: int) -> torch.Tensor:
    return torch.randint(0, 16, shape, generator=GENERATOR)


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("ordered", ["in groups", "by activation", "no index"])
def test_gptq_is_its_formula(ordered: str, v2: bool) -> None:
    inputs, outputs, size = 64, 48, 16
    codes, scales = four_bits(inputs, outputs), noise(inputs // size, outputs).half()
    zeros = torch.randint(1, 16, (inputs // size, outputs), generator=GENERATOR)
    index = torch.arange(inputs) // size
    if ordered == "by activation":
        index = index[torch.randperm(inputs, generator=GENERATOR)]
    along = tuple(range(8))
    state = {
        "q.qweight": packed(codes.t().contiguous(), along).t().contiguous(),
        "q.qzeros": packed(zeros if v2 else zeros - 1, along),
        "q.scales": scales,
    }
    if ordered != "no index":
        state["q.g_idx"] = index.to(torch.int32)
    made = ckpt_surgeon.dequantize(state, gptq_v2=v2)
    wanted = torch.zeros(outputs, inputs, dtype=torch.float16)
    for i in range(inputs):
        wanted[:, i] = scales[index[i]] * (codes[i] - zeros[index[i]]).half()
    assert list(made) == ["q.weight"]
    assert torch.equal(made["q.weight"], wanted)


def test_awq_is_its_formula() -> None:
    inputs, outputs, size = 64, 48, 32
    codes, scales, zeros = four_bits(inputs, outputs), noise(2, outputs).half(), four_bits(2, outputs)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    state = {"q.qweight": packed(codes, order), "q.qzeros": packed(zeros, order), "q.scales": scales}
    wanted = torch.stack([scales[i // size] * (codes[i] - zeros[i // size]).half() for i in range(inputs)], 1)
    assert torch.equal(ckpt_surgeon.dequantize(state)["q.weight"], wanted)


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    codes, scale = by_blocks(noise(256, 130), 128, 128)
    path = tmp_path / "fp8.safetensors"
    ckpt_surgeon.save({"proj.weight": codes, "proj.weight_scale_inv": scale, "bias": torch.ones(4)}, path)
    return path


def test_the_command_the_step_and_the_function_do_the_same(fp8: Path, tmp_path: Path, ckpt: Run) -> None:
    assert ckpt("dequantize", fp8, tmp_path / "o.safetensors").status == 0
    assert ckpt("edit", fp8, tmp_path / "p.safetensors", "--dequantize").status == 0
    opened = ckpt_surgeon.open(fp8)
    recipe = ckpt_surgeon.Recipe((ckpt_surgeon.step("dequantize"),))
    made = [ckpt_surgeon.dequantize(opened), recipe.apply(opened)]
    written = [ckpt_surgeon.open(tmp_path / name) for name in ("o.safetensors", "p.safetensors")]
    hashes = {ckpt_surgeon.hash(one).whole for one in [*made, *written]}
    assert len(hashes) == 1
    assert list(ckpt_surgeon.open(tmp_path / "o.safetensors")) == ["proj.weight", "bias"]


def test_parts_that_do_not_fit_are_named() -> None:
    codes = torch.zeros(8, 8, dtype=torch.float8_e4m3fn)
    with pytest.raises(ckpt_surgeon.EditError, match=r"'a\.weight'"):
        ckpt_surgeon.dequantize({"a.weight": codes, "a.weight_scale": torch.ones(3, 8)})
    with pytest.raises(ckpt_surgeon.NothingMatched):
        ckpt_surgeon.dequantize({"a.weight": torch.ones(2)})
