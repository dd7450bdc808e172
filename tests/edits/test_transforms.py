"""Edits of values against torch, bit for bit: on files of both containers and on plain dicts of torch tensors."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import pytest
import safetensors.torch
import torch
from command_line import Run
from hypothesis import given
from hypothesis import strategies as st
from tables import (
    NOT_IN_SAFETENSORS,
    StateDict,
    assert_same,
    elements,
    groups,
    noise,
    ramp,
    rewritten,
    save_big_endian,
    save_deflated,
    save_safetensors,
    save_zip,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import ckpt_surgeon
from ckpt_surgeon import (
    Checkpoint,
    EditError,
    KeyCollision,
    NothingMatched,
    Recipe,
    cast,
    concat,
    fold,
    pad,
    reshape,
    scale,
    slice_,
    split,
    step,
    transpose,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Casting complex values to real"),
]

Kind = TypeVar("Kind", bound=Mapping)  # type: ignore[type-arg]
Made = TypeVar("Made")

FLOATS = ["float64", "float32", "float16", "bfloat16"]
FLOATS8 = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]
INTEGERS = ["int64", "int32", "int16", "int8", "uint8", "bool", "uint16", "uint32", "uint64"]

READERS: dict[str, Callable[[Path], Mapping[str, torch.Tensor]]] = {
    ".pth": torch.load,
    ".safetensors": safetensors.torch.load_file,
}


def random(*shape: int, dtype: str = "float32", seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(*shape, generator=generator).to(getattr(torch, dtype))


class Edited:
    """An edit as it comes out of a dict and of both containers, and in both containers; all of them agree."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, state: StateDict, *steps: tuple[str, Mapping[str, object]]) -> StateDict:
        recipe = Recipe(tuple(step(name, **arguments) for name, arguments in steps))
        before = {key: elements(tensor) for key, tensor in state.items()}
        made = recipe.apply(state)
        assert {key: elements(tensor) for key, tensor in state.items()} == before
        has_code = all(
            str(tensor.dtype)[6:] not in NOT_IN_SAFETENSORS for one in (state, made) for tensor in one.values()
        )
        savers = [save_zip, save_safetensors] if has_code else [save_zip]
        for save in savers:
            edited = recipe.apply(ckpt_surgeon.open(save(state, self._folder)))
            planned = {key: (tensor.dtype.name, tensor.shape) for key, tensor in edited.items()}
            assert planned == {key: (str(tensor.dtype)[6:], tensor.shape) for key, tensor in made.items()}
            assert_same(ckpt_surgeon.load(edited), made, order=save is save_zip)
            for suffix in [".pth", ".safetensors"] if has_code else [".pth"]:
                out = self._folder / f"out{suffix}"
                ckpt_surgeon.save(edited, out, force=True)
                assert_same(READERS[suffix](out), made, order=False)
        return made


@pytest.fixture
def edited(tmp_path: Path) -> Edited:
    return Edited(tmp_path)


# -- cast


@pytest.mark.parametrize("wanted", [*FLOATS, *FLOATS8])
@pytest.mark.parametrize("given_dtype", [*FLOATS, *FLOATS8])
def test_a_cast_is_torch_s(edited: Edited, given_dtype: str, wanted: str) -> None:
    weight = random(7, 5, dtype=given_dtype)
    state = {"w": weight, "steps": torch.arange(4), "mask": torch.tensor([True, False]), "one": weight[0, 0]}
    made = edited(state, ("cast", {"dtype": wanted}))
    dtype = getattr(torch, wanted)
    assert_same(
        made, {"w": weight.to(dtype), "steps": state["steps"], "mask": state["mask"], "one": weight[0, 0].to(dtype)}
    )


@pytest.mark.parametrize("spelling", ["bf16", "bfloat16", "torch.bfloat16"])
def test_a_dtype_may_be_spelled_in_several_ways(spelling: str) -> None:
    assert cast({"w": torch.ones(2)}, spelling)["w"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["fp12", "", "float", "half"])
def test_a_dtype_that_does_not_exist_is_an_error(dtype: str) -> None:
    if dtype in ("float", "half"):
        assert cast({"w": torch.ones(2)}, dtype)["w"].dtype == getattr(torch, dtype)
    else:
        with pytest.raises(EditError, match="no dtype is called"):
            cast({"w": torch.ones(2)}, dtype)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_are_left_alone_unless_asked_for(edited: Edited, dtype: str) -> None:
    state = {"steps": torch.tensor([0, 1, 1]).to(getattr(torch, dtype)), "w": random(3)}
    assert_same(edited(state, ("cast", {"dtype": "bf16"})), {"steps": state["steps"], "w": state["w"].bfloat16()})
    made = edited(state, ("cast", {"dtype": "bf16", "integers": True}))
    assert_same(made, {key: tensor.bfloat16() for key, tensor in state.items()})
    assert cast.plan(state, "bf16").notes == ("1 integer or bool tensors keep their dtype",)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_floats_become_integers_only_where_they_are_exact(edited: Edited, dtype: str) -> None:
    wanted = getattr(torch, dtype)
    exact = torch.tensor([0.0, 1.0, 1.0])
    assert_same(edited({"w": exact}, ("cast", {"dtype": dtype})), {"w": exact.to(wanted)})
    for value in (0.5, float("nan"), float("inf"), 1e30):
        with pytest.raises(EditError, match=f"'w': 1 values are not exact in {dtype}"):
            cast({"w": torch.tensor([1.0, value])}, dtype)


def test_only_and_except_are_globs_on_keys(edited: Edited) -> None:
    state = {key: random(3) for key in ("a.weight", "a.bias", "norm.weight", "norm.bias")}
    made = edited(state, ("cast", {"dtype": "bf16", "only": ["*.weight", "a.*"], "except": "norm*"}))
    assert {key for key, tensor in made.items() if tensor.dtype == torch.bfloat16} == {"a.weight", "a.bias"}
    assert cast(state, "bf16", only="a.weight")["a.bias"] is state["a.bias"]
    for arguments in ({"only": "fc.*"}, {"except_": ["a.*", "fc.*"]}):
        with pytest.raises(NothingMatched, match=r"fc\.\*"):
            cast(state, "bf16", **arguments)
    assert cast(state, "bf16", only="fc.*", allow_unmatched=True) == state


def test_running_statistics_stay_float32_in_a_float16_checkpoint_unless_asked_for(edited: Edited) -> None:
    model = nn.BatchNorm2d(3)
    state = dict(model.state_dict())
    made = edited(state, ("cast", {"dtype": "fp16"}))
    assert {key: tensor.dtype for key, tensor in made.items()} == {
        "weight": torch.float16,
        "bias": torch.float16,
        "running_mean": torch.float32,
        "running_var": torch.float32,
        "num_batches_tracked": torch.int64,
    }
    assert "2 normalisation statistics keep their dtype" in cast.plan(state, "fp16").notes
    assert cast(state, "fp16", statistics=True)["running_var"].dtype == torch.float16
    assert cast(state, "bf16")["running_var"].dtype == torch.bfloat16


SMALL = {  # for each dtype: a number that is too large for it, and one that is too small
    "float16": (65520.0, 1e-8),
    "bfloat16": (3.4e38, 1e-41),
    "float8_e4m3fn": (480.0, 1e-4),
    "float8_e5m2": (61440.0, 1e-6),
    "float8_e4m3fnuz": (256.0, 1e-4),
    "float8_e5m2fnuz": (61440.0, 1e-6),
}


@pytest.mark.parametrize("dtype", SMALL)
def test_values_that_do_not_fit_are_an_error_that_names_all_tensors(dtype: str, ckpt: Run, tmp_path: Path) -> None:
    large, small = SMALL[dtype]
    state = {
        "fine": torch.tensor([1.0, -2.0, 0.0]),
        "large": torch.tensor([1.0, large, -large, large * 8]),
        "small": torch.tensor([small, -small, 0.0, 1.0]),
        "worse": torch.tensor([3e38, 1.0]) if dtype != "bfloat16" else torch.tensor([3.4e38, 1.0]),
    }
    with pytest.raises(EditError) as raised:
        cast(state, dtype)
    assert [problem.split(":")[0] for problem in raised.value.problems] == ["'large'", "'worse'"]
    count = 2 if dtype == "bfloat16" else 3
    source, out = save_zip(state, tmp_path), tmp_path / "out.pth"
    ran = ckpt("cast", source, out, "--dtype", dtype)
    assert ran.status == 2
    assert f"'large': {count} values" in ran.err
    assert "'worse': 1 values" in ran.err
    assert "--allow-inf" in ran.err
    assert sorted(os.listdir(tmp_path)) == ["model.pth"]
    ran = ckpt("cast", source, out, "--dtype", dtype, "--allow-inf")
    assert ran.status == 0
    assert f"note: large: {count} values" in ran.out
    assert "note: small: 2 flushed to zero" in ran.out
    assert "fine:" not in ran.out
    assert_same(torch.load(out), {key: tensor.to(getattr(torch, dtype)) for key, tensor in state.items()})
    assert any("2 flushed to zero" in note for note in cast.plan(state, dtype, allow_inf=True).notes)


def test_nan_and_inf_that_were_there_are_no_error() -> None:
    state = {"w": torch.tensor([float("inf"), float("-inf"), float("nan"), 1.0])}
    for dtype in ("fp16", "bf16", "float64", "float8_e5m2"):
        change = cast.plan(state, dtype)
        assert_same(change.result, {"w": state["w"].to(change.result["w"].dtype)})
        assert change.notes == ()
    with pytest.raises(EditError, match="2 values were too large for float8_e4m3fn"):
        cast(state, "float8_e4m3fn")  # a dtype without inf


def test_integers_and_complex_numbers_overflow_no_more_silently_than_floats() -> None:
    with pytest.raises(EditError, match="'w': 1 values became inf in float16"):
        cast({"w": torch.tensor([70_000, 1])}, "fp16", integers=True)
    with pytest.raises(EditError, match="'w': 2 values became inf in complex64"):
        cast({"w": torch.tensor([1e300 + 1j, 1e300j, 1 + 1j], dtype=torch.complex128)}, "complex64")


def test_complex_numbers_stay_complex(edited: Edited) -> None:
    state = {"w": torch.complex(random(3, 4), random(3, 4, seed=1)), "x": random(3)}
    made = edited(state, ("cast", {"dtype": "complex128"}))
    assert_same(made, {key: tensor.to(torch.complex128) for key, tensor in state.items()})
    with pytest.raises(EditError, match="would lose its imaginary part"):
        cast(state, "fp16")
    assert cast(state, "fp16", except_="w")["x"].dtype == torch.float16


def test_scales_of_float8_e8m0fnu_are_powers_of_two(edited: Edited) -> None:
    state = {"scale": torch.tensor([1.0, 0.5, 4.0, 2.0**-100])}
    made = edited(state, ("cast", {"dtype": "float8_e8m0fnu"}))
    assert_same(made, {"scale": state["scale"].to(torch.float8_e8m0fnu)})
    for value in (3.0, -1.0, 0.0):
        with pytest.raises(EditError, match="not exact in float8_e8m0fnu"):
            cast({"scale": torch.tensor([1.0, value])}, "float8_e8m0fnu")


@pytest.mark.parametrize("dtype", ["bits8", "float4_e2m1fn_x2", "quint8", "int4", "bcomplex32"])
def test_a_dtype_that_torch_only_stores_is_an_error_that_names_the_keys(dtype: str) -> None:
    with pytest.raises(EditError, match=f"'b': torch does not compute with {dtype}") as raised:
        cast({"a": torch.ones(2), "b": torch.ones(2)}, dtype)
    assert len(raised.value.problems) == 2
    packed = noise("float4_e2m1fn_x2", 2, 2)
    with pytest.raises(EditError, match="'w': torch does not compute with float4"):
        cast({"w": packed}, "bf16")
    assert cast({"w": packed, "x": torch.ones(2)}, "bf16", except_="w")["w"] is packed


def test_a_cast_to_the_dtype_it_has_leaves_the_very_tensor(tmp_path: Path) -> None:
    state = {"w": random(4, 3)}
    assert cast(state, "fp32")["w"] is state["w"]
    checkpoint = ckpt_surgeon.open(save_zip(state, tmp_path))
    assert cast(checkpoint, "fp32")["w"] is checkpoint["w"]


def test_large_tensors_are_cast_piece_by_piece(edited: Edited) -> None:
    state = {"w": random(1501, 1001), "t": random(1203, 1001, seed=1).t(), "h": random(2_100_001, dtype="float16")}
    made = edited(state, ("cast", {"dtype": "bf16"}))
    assert_same(made, {key: tensor.bfloat16() for key, tensor in state.items()})


@pytest.mark.parametrize("save", [save_deflated, save_big_endian])
def test_packed_and_big_endian_storages_are_cast_like_any_other(
    save: Callable[[StateDict, Path], Path], tmp_path: Path
) -> None:
    state = {"w": random(701, 1001), "h": random(1_300_001, dtype="float16"), "d": random(9, dtype="float64")}
    checkpoint = ckpt_surgeon.open(save(state, tmp_path))
    wanted = {key: tensor.bfloat16() for key, tensor in state.items()}
    assert_same(ckpt_surgeon.load(cast(checkpoint, "bf16")), wanted)
    ckpt_surgeon.save(scale(checkpoint, "*", 2.0), tmp_path / "out.safetensors")
    doubled = {key: tensor * 2 for key, tensor in state.items()}
    assert_same(safetensors.torch.load_file(tmp_path / "out.safetensors"), doubled, order=False)


def test_a_storage_that_is_both_packed_and_big_endian_is_read(tmp_path: Path) -> None:
    state = {"w": random(701, 1001), "x": random(5)}
    big = save_big_endian(state, tmp_path)
    packed = rewritten(big, tmp_path / "packed.pth", method=zipfile.ZIP_DEFLATED)
    ckpt_surgeon.save(ckpt_surgeon.open(packed), tmp_path / "out.safetensors")
    assert_same(safetensors.torch.load_file(tmp_path / "out.safetensors"), state, order=False)
    assert_same(ckpt_surgeon.load(cast(ckpt_surgeon.open(packed), "fp64")), {k: v.double() for k, v in state.items()})


# -- one tensor at a time

STRIDED: dict[str, Callable[[], torch.Tensor]] = {
    "dense": lambda: random(4, 6),
    "transposed": lambda: random(6, 4).t(),
    "stepped": lambda: random(8, 12)[::2, ::2],
    "expanded": lambda: random(4, 1).expand(4, 6),
    "offset": lambda: random(6, 8)[1:5, 2:],
    "conjugate": lambda: torch.complex(random(4, 6), random(4, 6, seed=1)).conj(),
    "negative": lambda: torch._neg_view(random(4, 6)),
    "bfloat16": lambda: random(4, 6, dtype="bfloat16"),
    "float8": lambda: random(4, 6, dtype="float8_e4m3fn"),
    "integers": lambda: torch.arange(24).reshape(4, 6),
    "bool": lambda: torch.arange(24).reshape(4, 6) % 3 == 0,
    "complex128": lambda: torch.complex(random(4, 6).double(), random(4, 6, seed=1).double()),
}


def plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.resolve_conj().resolve_neg()


@pytest.mark.parametrize("name", STRIDED)
def test_other_shapes_orders_and_parts_are_torch_s_whatever_the_strides(edited: Edited, name: str) -> None:
    tensor = STRIDED[name]()
    state = {"w": tensor, "x": random(2)}
    value = plain(tensor)
    for arguments, wanted in (
        (("reshape", {"patterns": "w", "shape": [2, 3, -1]}), value.reshape(2, 3, 4)),
        (("reshape", {"patterns": "w", "shape": [24]}), value.reshape(24)),
        (("transpose", {"patterns": "w"}), value.t()),
        (("slice", {"patterns": "w", "start": 1, "stop": 4}), value[1:4]),
        (("slice", {"patterns": "w", "start": 0, "stop": 5, "dim": 1, "step": 2}), value[:, 0:5:2]),
        (("slice", {"patterns": "w", "start": 1, "stop": 4, "dim": -2, "step": 3}), value[1:4:3]),
        (("slice", {"patterns": "w", "start": 2, "stop": 2}), value[2:2]),
    ):
        assert_same(edited(state, arguments), {"w": wanted, "x": state["x"]})


@pytest.mark.parametrize("name", STRIDED)
def test_padding_is_torch_s_whatever_the_strides(edited: Edited, name: str) -> None:
    tensor = STRIDED[name]()
    value = plain(tensor)
    row, column = torch.ones(1, 6).to(value.dtype), torch.ones(4, 1).to(value.dtype)
    for arguments, wanted in (
        ({"before": 1, "after": 2, "value": 1.0}, [row, value, row, row]),
        ({"after": 1, "value": 1}, [value, row]),
        ({}, [value]),
    ):
        made = edited({"w": tensor}, ("pad", {"patterns": "w", **arguments}))
        assert elements(made["w"]) == b"".join(map(elements, wanted))
        assert made["w"].shape == (sum(len(part) for part in wanted), 6)
    made = edited({"w": tensor}, ("pad", {"patterns": "w", "before": 1, "dim": -1, "value": 1}))
    wide = value.float() if value.dtype.itemsize == 1 else value
    assert_same(made, {"w": torch.cat([column.to(wide.dtype), wide], 1).to(value.dtype)})
    zeros = edited({"w": tensor}, ("pad", {"patterns": "w", "before": 2, "dim": 1}))["w"]
    assert not any(elements(zeros[:, :2]))


@pytest.mark.parametrize("dtype", FLOATS)
def test_scaling_is_torch_s_own_product(edited: Edited, dtype: str) -> None:
    state = {"w": random(5, 3, dtype=dtype), "t": random(5, 3, dtype=dtype).t(), "x": random(2, dtype=dtype)}
    made = edited(state, ("scale", {"patterns": ["w", "t"], "factor": 0.3}))
    assert_same(made, {"w": state["w"] * 0.3, "t": state["t"] * 0.3, "x": state["x"]})


@pytest.mark.parametrize("dtype", FLOATS8)
def test_8_bit_floats_are_scaled_in_float32(edited: Edited, dtype: str) -> None:
    state = {"w": random(5, 3, dtype=dtype)}
    made = edited(state, ("scale", {"patterns": "*", "factor": 2}))
    assert_same(made, {"w": (state["w"].float() * 2).to(state["w"].dtype)})


def test_integers_are_not_scaled() -> None:
    state = {"w": random(2), "steps": torch.tensor(3), "mask": torch.tensor([True])}
    with pytest.raises(EditError) as raised:
        scale(state, "*", 2.0)
    assert len(raised.value.problems) == 2


def test_a_linear_becomes_a_convolution_and_back(edited: Edited) -> None:
    linear, conv = nn.Linear(2 * 3 * 3, 8), nn.Conv2d(2, 8, 3)
    made = edited(dict(linear.state_dict()), ("reshape", {"patterns": "weight", "shape": [8, 2, 3, 3]}))
    conv.load_state_dict(made, strict=True)
    picture = random(1, 2, 3, 3)
    torch.testing.assert_close(conv(picture).flatten(1), linear(picture.flatten(1)))
    back = edited(made, ("reshape", {"patterns": "weight", "shape": [8, -1]}))
    assert_same(back, linear.state_dict())


@pytest.mark.parametrize("dims", [(0, 1, 2, 3), (3, 2, 1, 0), (0, 2, 3, 1), (1, 0, 3, 2)])
def test_dimensions_are_permuted_as_torch_does(edited: Edited, dims: tuple[int, ...]) -> None:
    state = {"w": random(2, 3, 4, 5), "last": random(2, 3, 4, 5).to(memory_format=torch.channels_last)}
    made = edited(state, ("transpose", {"patterns": "*", "dims": dims}))
    assert_same(made, {key: tensor.permute(dims) for key, tensor in state.items()})


def test_tensors_without_dimensions_or_elements_are_edited_like_others(edited: Edited) -> None:
    state = {"scalar": torch.tensor(2.5), "none": torch.empty(0, 3), "columns": torch.empty(3, 0)}
    assert_same(edited(state, ("cast", {"dtype": "fp16"})), {key: tensor.half() for key, tensor in state.items()})
    assert_same(edited(state, ("scale", {"patterns": "*", "factor": 2})), {k: v * 2 for k, v in state.items()})
    made = edited(state, ("reshape", {"patterns": "scalar", "shape": [1, 1]}))
    assert made["scalar"].shape == (1, 1)
    assert edited(made, ("reshape", {"patterns": "scalar", "shape": []}))["scalar"].shape == ()
    assert edited(state, ("reshape", {"patterns": "none", "shape": [5, 0]}))["none"].shape == (5, 0)
    assert edited(state, ("transpose", {"patterns": ["none", "columns"]}))["none"].shape == (3, 0)
    assert_same(edited(state, ("pad", {"patterns": "none"})), state)
    made = edited(state, ("pad", {"patterns": "none", "after": 2, "value": 1}))
    assert_same(made, {**state, "none": torch.ones(2, 3)})
    made = edited(state, ("pad", {"patterns": "columns", "after": 2, "value": 1, "dim": 1}))
    assert_same(made, {**state, "columns": torch.ones(3, 2)})
    made = edited(state, ("concat", {"sources": ["none", "none"], "into": "both"}))
    assert made["both"].shape == (0, 3)
    assert edited(state, ("slice", {"patterns": "none", "start": 0, "stop": 0}))["none"].shape == (0, 3)


@pytest.mark.parametrize(
    ("edit", "count"),
    [
        (lambda state: reshape(state, "*", [2, 5]), 3),
        (lambda state: reshape(state, "*", [-1, -1]), 4),
        (lambda state: reshape(state, "m*", [-2, -6]), 2),
        (lambda state: reshape(state, "m*", [0, -1]), 2),
        (lambda state: transpose(state, "*"), 1),
        (lambda state: transpose(state, "*", [1, 0, 2]), 4),
        (lambda state: transpose(state, "*", [0, 0]), 4),
        (lambda state: slice_(state, "*", 0, 1, dim=1), 2),
        (lambda state: slice_(state, "*", 0, 5), 3),
        (lambda state: slice_(state, "*", 2, 1), 4),
        (lambda state: slice_(state, "*", -1, 1), 4),
        (lambda state: slice_(state, "m*", 0, 1, step=0), 2),
        (lambda state: pad(state, "*", after=1, dim=1), 2),
        (lambda state: pad(state, "m*", before=-1), 2),
        (lambda state: split(state, "*", ["*.a", "*.b"], sizes=[1, 2]), 4),
        (lambda state: split(state, "*", ["*.a", "*.a"], sizes=[2, 2]), 4),
    ],
)
def test_all_tensors_that_do_not_fit_are_named_at_once(edit: Callable[[StateDict], object], count: int) -> None:
    state = {"matrix": random(4, 3), "more": random(4, 3), "vector": random(10), "scalar": torch.tensor(1.0)}
    with pytest.raises(EditError) as raised:
        edit(state)
    assert not isinstance(raised.value, NothingMatched)
    assert len(raised.value.problems) == count
    with pytest.raises(EditError) as again:
        edit(ckpt_surgeon.from_torch(state))  # type: ignore[arg-type]
    assert again.value.problems == raised.value.problems


def test_a_pattern_that_no_key_matches_is_an_error_of_every_edit() -> None:
    state = {"w": random(2, 2)}
    edits: list[Callable[[], StateDict]] = [
        lambda: scale(state, ["w", "x.*"], 2.0),
        lambda: reshape(state, "x.*", [4]),
        lambda: transpose(state, "x.*"),
        lambda: slice_(state, "x.*", 0, 1),
        lambda: pad(state, "x.*"),
        lambda: concat(state, ["x.{n}"], "y"),
        lambda: split(state, "x.{n}", ["y"]),
        lambda: fold(state, "x.*"),
        lambda: fold(state),
    ]
    for edit in edits:
        with pytest.raises(NothingMatched):
            edit()
    assert fold(state, allow_unmatched=True) == state


@pytest.mark.parametrize("value", [0.5, float("nan"), float("inf"), 300.0, -129.0])
def test_integers_are_not_padded_with_what_they_cannot_hold(value: float) -> None:
    with pytest.raises(EditError):
        pad({"w": torch.arange(3, dtype=torch.int8)}, "w", after=1, value=value)


# -- several tensors that belong together


def test_tensors_are_joined_for_every_index_in_the_place_of_the_first(edited: Edited) -> None:
    state = {
        f"l.{n}.{part}.weight": random(2 + index, 3, seed=n) for n in (0, 1, 10) for index, part in enumerate("qkv")
    }
    state = {"first": random(1), **state, "last": random(1)}
    made = edited(state, ("concat", {"sources": [f"l.{{n}}.{part}.*" for part in "qkv"], "into": "l.{n}.qkv.*"}))
    assert list(made) == ["first", "l.0.qkv.weight", "l.1.qkv.weight", "l.10.qkv.weight", "last"]
    for n in (0, 1, 10):
        wanted = torch.cat([state[f"l.{n}.{part}.weight"] for part in "qkv"])
        assert_same({"w": made[f"l.{n}.qkv.weight"]}, {"w": wanted})


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_tensors_are_joined_along_any_dimension(edited: Edited, dim: int) -> None:
    shapes = [[2, 3, 4] for _ in range(3)]
    for index, shape in enumerate(shapes):
        shape[dim] += index
    state = {f"p{index}": random(*shape, seed=index) for index, shape in enumerate(shapes)}
    state["p1"] = state["p1"].transpose(0, 2).contiguous().transpose(0, 2)
    made = edited(state, ("concat", {"sources": ["p0", "p1", "p2"], "into": "all", "dim": dim}))
    assert_same(made, {"all": torch.cat(list(state.values()), dim)})
    sizes = [shape[dim] for shape in shapes]
    back = edited(made, ("split", {"source": "all", "into": ["p0", "p1", "p2"], "dim": dim, "sizes": sizes}))
    assert_same(back, state)
    assert_same(back, dict(zip(state, torch.split(made["all"], sizes, dim), strict=True)))


HEADS, WIDTH, HIDDEN = 4, 3, 5


def test_a_fused_projection_is_taken_apart_per_head_as_gpt_neox_is(edited: Edited) -> None:
    fused = {
        "layers.0.qkv.weight": random(HEADS * 3 * WIDTH, HIDDEN),
        "layers.0.qkv.bias": random(HEADS * 3 * WIDTH, seed=1),
    }
    into = [f"layers.{{n}}.{part}_proj.*" for part in "qkv"]
    made = edited(fused, ("split", {"source": "layers.{n}.qkv.*", "into": into, "groups": HEADS}))
    wanted = {}
    for leaf in ("weight", "bias"):
        by_head = fused[f"layers.0.qkv.{leaf}"].view(HEADS, 3, WIDTH, -1)
        for index, part in enumerate("qkv"):
            value = by_head[:, index].reshape(HEADS * WIDTH, -1)
            wanted[f"layers.0.{part}_proj.{leaf}"] = value if leaf == "weight" else value.flatten()
    assert_same(made, wanted)
    back = edited(made, ("concat", {"sources": into, "into": "layers.{n}.qkv.*", "groups": HEADS}))
    assert_same(back, fused)
    blocks = edited(fused, ("split", {"source": "layers.{n}.qkv.*", "into": into}))  # not interleaved: other values
    assert elements(blocks["layers.0.q_proj.weight"]) != elements(made["layers.0.q_proj.weight"])


def test_grouped_queries_are_taken_apart_with_sizes_as_megatron_fuses_them(edited: Edited) -> None:
    queries, key_groups = 6, 2  # each group: three queries, a key, a value
    fused = {"qkv": random((queries + 2 * key_groups) * WIDTH, HIDDEN)}
    sizes = [queries * WIDTH, key_groups * WIDTH, key_groups * WIDTH]
    made = edited(fused, ("split", {"source": "qkv", "into": ["q", "k", "v"], "sizes": sizes, "groups": key_groups}))
    by_group = fused["qkv"].view(key_groups, queries // key_groups + 2, WIDTH, HIDDEN)
    wanted = {"q": by_group[:, :-2], "k": by_group[:, -2], "v": by_group[:, -1]}
    assert_same(made, {key: tensor.reshape(-1, HIDDEN) for key, tensor in wanted.items()})


def test_the_transposed_projection_of_gpt2_is_split_along_its_second_dimension(edited: Edited) -> None:
    fused = {"h.0.attn.c_attn.weight": random(HIDDEN, 3 * HIDDEN)}
    made = edited(
        fused,
        ("split", {"source": "h.{n}.attn.c_attn.*", "into": [f"h.{{n}}.attn.{part}.*" for part in "qkv"], "dim": 1}),
        ("transpose", {"patterns": "*.weight"}),
    )
    parts = fused["h.0.attn.c_attn.weight"].chunk(3, dim=1)
    assert_same(made, {f"h.0.attn.{name}.weight": part.t() for name, part in zip("qkv", parts, strict=True)})


@st.composite
def fused(draw: st.DrawFn) -> tuple[torch.Tensor, list[int], int, int]:
    """A tensor of any strides, the sizes of its parts along a dimension, the dimension, and in how many groups."""
    groups_ = draw(st.integers(1, 3))
    sizes = [size * groups_ for size in draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))]
    shape = draw(st.lists(st.integers(1, 3), max_size=2))
    dim = draw(st.integers(0, len(shape)))
    shape.insert(dim, sum(sizes))
    order = draw(st.permutations(range(len(shape))))
    made = ramp(*(shape[axis] for axis in order))
    return made.permute([order.index(axis) for axis in range(len(shape))]), sizes, dim, groups_


@given(fused())
def test_splitting_and_joining_undo_each_other(case: tuple[torch.Tensor, list[int], int, int]) -> None:
    tensor, sizes, dim, count = case
    names = [f"p{index}" for index in range(len(sizes))]
    for state in ({"w": tensor}, ckpt_surgeon.from_torch({"w": tensor})):
        parts = split(state, "w", names, dim=dim, sizes=sizes, groups=count)
        assert [tuple(part.shape)[dim] for part in parts.values()] == sizes
        back = concat(parts, names, "w", dim=dim, groups=count)
        assert torch.equal(ckpt_surgeon.load(back)["w"] if isinstance(back, Checkpoint) else back["w"], tensor)
    if count == 1:
        ours = split({"w": tensor}, "w", names, dim=dim, sizes=sizes)
        assert all(map(torch.equal, ours.values(), torch.split(tensor, sizes, dim)))


def test_all_that_does_not_join_is_named_at_once() -> None:
    state = {
        "l.0.q": random(4, 3), "l.0.k": random(4, 3).half(), "l.0.v": random(4, 2),
        "l.1.q": random(4, 3), "l.1.k": random(4), "l.2.q": random(3, 3), "l.2.k": random(4, 3),
    }  # fmt: skip
    with pytest.raises(EditError) as raised:
        concat(state, ["l.{n}.q", "l.{n}.k", "l.{n}.v"], "l.{n}.qkv", groups=2)
    text = str(raised.value)
    for wanted in ("'l.0.k' (float16", "'l.0.v' (float32 [4, 2])", "'l.1.v', wanted beside", "'l.2.v', wanted beside"):
        assert wanted in text
    with pytest.raises(EditError) as raised:
        concat(state, ["l.{n}.q", "l.{n}.k"], "l.{n}.qk", groups=2)
    for wanted in ("'l.0.k' (float16", "'l.1.k' (float32 [4])", "'l.2.q' has 3 indices"):
        assert wanted in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"into": ["a"], "sizes": [2, 2]}, "2 sizes for 1 parts"),
        ({"into": [], "sizes": []}, "0 sizes for 0 parts"),
        ({"into": ["a", "b", "c"]}, "not 1 + 1 + 1"),
        ({"into": ["a", "b"], "sizes": [5, -1]}, "not 5 + -1"),
        ({"into": ["a", "b"], "groups": 3}, "not 2 + 2 in 3 groups"),
        ({"into": ["a", "b"], "groups": 0}, "in 0 groups"),
        ({"into": ["a", "b"], "dim": 2}, "no dimension 2"),
        ({"into": ["a", "b", "a"], "sizes": [1, 1, 2]}, "parts of one name"),
        ({"into": ["a.{n}", "b"]}, "placeholders that the first template does not have"),
        ({"into": ["a.*", "b"]}, "placeholders that the first template does not have"),
    ],
)
def test_a_split_that_cannot_be_is_an_error(arguments: dict[str, object], problem: str) -> None:
    with pytest.raises(EditError, match=re.escape(problem)):
        split({"w": random(4, 3)}, "w", **arguments)  # type: ignore[arg-type]


def test_parts_and_joined_tensors_take_no_name_that_is_taken() -> None:
    state = {"l.0.q": random(2), "l.1.q": random(2), "qkv": random(3)}
    with pytest.raises(KeyCollision):
        concat(state, ["*.q"], "same")
    with pytest.raises(KeyCollision):
        concat(state, ["l.{n}.q"], "qkv")
    with pytest.raises(KeyCollision):
        split(state, "qkv", ["l.0.q", "k", "v"])
    assert list(split(state, "qkv", ["q", "qkv", "v"])) == ["l.0.q", "l.1.q", "q", "qkv", "v"]
    assert list(concat(state, ["l.{n}.q"], "l.{n}.q")) == list(state)


def test_versions_follow_tensors_that_are_joined() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2), nn.BatchNorm1d(4))
    made = concat(model.state_dict(), ["0.*", "1.*"], "fc.*")
    assert list(made)[:2] == ["fc.weight", "fc.bias"]
    versions = getattr(made, "_metadata")  # noqa: B009
    assert (versions["2"], versions["fc"]) == ({"version": 2}, {"version": 1})


# -- folding


def grown(layer: nn.Module, count: int = 3) -> nn.Module:
    """A layer that was trained a little, so that no two numbers are what they were made as."""
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for index in range(count):
        optimizer.zero_grad()
        flat, one = isinstance(layer, nn.Linear), isinstance(layer, (nn.Conv1d, nn.ConvTranspose1d))
        layer(random(2, 6, *([] if flat else [9] if one else [7, 7]), seed=index)).square().mean().backward()
        optimizer.step()
    return layer.eval()


def old_weight_norm(layer: nn.Module, dim: int | None = 0) -> nn.Module:
    return torch.nn.utils.weight_norm(layer, dim=dim)  # type: ignore[arg-type]


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(6, 4),
    "Linear, square": lambda: nn.Linear(6, 6),
    "Linear, one output": lambda: nn.Linear(6, 1),
    "Conv1d": lambda: nn.Conv1d(6, 4, 3),
    "Conv2d": lambda: nn.Conv2d(6, 4, 3),
    "Conv2d, square": lambda: nn.Conv2d(6, 6, 3),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(6, 4, 3),
    "ConvTranspose2d, square": lambda: nn.ConvTranspose2d(6, 6, 3),
    "ConvTranspose2d, kernel of its width": lambda: nn.ConvTranspose2d(6, 3, 3),
}


def removed(layer: nn.Module) -> nn.Module:
    return parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


def whole_weight_norm(layer: nn.Module) -> nn.Module:
    return parametrizations.weight_norm(layer, dim=None)  # type: ignore[arg-type,no-any-return]


REPARAMETRISED: dict[str, tuple[Callable[[nn.Module], nn.Module], Callable[[nn.Module], nn.Module]]] = {
    "weight norm": (old_weight_norm, torch.nn.utils.remove_weight_norm),
    "weight norm of the whole": (lambda layer: old_weight_norm(layer, None), torch.nn.utils.remove_weight_norm),
    "weight norm, parametrized": (parametrizations.weight_norm, removed),
    "weight norm of the whole, parametrized": (whole_weight_norm, removed),
    "spectral norm": (torch.nn.utils.spectral_norm, torch.nn.utils.remove_spectral_norm),
    "spectral norm, parametrized": (parametrizations.spectral_norm, removed),
    "pruned": (lambda layer: pruned(layer), lambda layer: prune.remove(layer, "weight")),
}


def pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", amount=0.5)  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", REPARAMETRISED)
def test_a_folded_weight_is_what_torch_makes_of_it(edited: Edited, kind: str, name: str) -> None:
    torch.manual_seed(3)
    reparametrise, remove = REPARAMETRISED[kind]
    layer = grown(reparametrise(LAYERS[name]()))
    state = {f"net.{key}": value.detach().clone() for key, value in layer.state_dict().items()}
    made = edited(state, ("fold", {}))
    wanted = remove(layer).state_dict()
    assert_same(made, {f"net.{key}": value for key, value in wanted.items()}, order=False)
    fresh = nn.ModuleDict({"net": LAYERS[name]()})
    fresh.load_state_dict(made, strict=True)


def test_every_weight_norm_of_a_model_is_folded(edited: Edited) -> None:
    lstm = nn.LSTM(3, 4)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        lstm = torch.nn.utils.weight_norm(lstm, name)
    made = edited(dict(lstm.state_dict()), ("fold", {}))
    for name in ("weight_ih_l0", "weight_hh_l0"):
        torch.nn.utils.remove_weight_norm(lstm, name)
    assert_same(made, lstm.state_dict(), order=False)
    nn.LSTM(3, 4).load_state_dict(made, strict=True)


def test_several_kinds_are_folded_in_one_go_and_patterns_choose_among_them() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(3, 4)),
        parametrizations.spectral_norm(nn.Linear(4, 3)),
        pruned(nn.Linear(3, 3)),
        parametrizations.orthogonal(nn.Linear(3, 3)),
    ).eval()
    state = model.state_dict()
    with pytest.raises(EditError, match=r"'3\.parametrizations\.weight\.original': the formula .* is not in the"):
        fold(state)
    made = fold(state, ["0.*", "1.*", "2.*"])
    assert {key for key in made if key[0] != "3"} == {f"{n}.{leaf}" for n in range(3) for leaf in ("weight", "bias")}
    for index in range(3):
        weight = getattr(model[index], "weight")  # noqa: B009
        assert elements(made[f"{index}.weight"]) == elements(weight)
    only = fold(state, "0.weight")
    assert set(only) - set(state) == {"0.weight"}


def test_names_that_only_look_reparametrised_are_an_error_or_stay() -> None:
    state = {"time_g": random(3, 4), "time_v": random(5, 4), "x_orig": random(2), "weight_g": random(2)}
    with pytest.raises(EditError, match="are no weight norm"):
        fold(state)
    assert fold(state, allow_unmatched=True, patterns="nothing.*") == state
    with pytest.raises(NothingMatched, match="reparametrised weight"):
        fold({"x_orig": random(2), "weight_g": random(2)})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_folding_keeps_the_dtype(edited: Edited, dtype: str) -> None:
    layer = parametrizations.weight_norm(nn.Linear(6, 4)).to(getattr(torch, dtype))
    made = edited(dict(layer.state_dict()), ("fold", {}))
    assert_same(made, removed(layer).state_dict(), order=False)


def test_tied_reparametrised_weights_stay_tied(tmp_path: Path) -> None:
    layer = parametrizations.weight_norm(nn.Linear(3, 4))
    state = nn.ModuleDict({"a": layer, "b": layer}).state_dict()
    ckpt_surgeon.save(fold(ckpt_surgeon.open(save_zip(state, tmp_path))), tmp_path / "out.pth")
    made = torch.load(tmp_path / "out.pth")
    assert groups(made) == {frozenset({"a.weight", "b.weight"}), frozenset({"a.bias", "b.bias"})}
    assert elements(made["a.weight"]) == elements(layer.weight)


# -- chains


def test_edits_of_edits_are_computed_in_order(edited: Edited) -> None:
    state = {"w": random(6, 4), "x": random(6, 4, seed=1), "y": random(6, 2, seed=2)}
    made = edited(
        state,
        ("cast", {"dtype": "bf16", "only": "w"}),
        ("transpose", {"patterns": "w"}),
        ("slice", {"patterns": "w", "start": 1, "stop": 4, "step": 2}),
        ("concat", {"sources": ["x", "y"], "into": "xy", "dim": 1}),
        ("cast", {"dtype": "fp16", "only": "xy"}),
        ("pad", {"patterns": "xy", "after": 1, "value": 2.0}),
        ("scale", {"patterns": "xy", "factor": 3}),
        ("reshape", {"patterns": "w", "shape": [3, 4]}),
        ("rename", {"pairs": ["xy=z"]}),
    )
    z = torch.cat([state["x"], state["y"]], 1).half()
    assert_same(
        made,
        {
            "w": state["w"].bfloat16().t()[1:4:2].reshape(3, 4),
            "z": torch.cat([z, torch.full((1, 6), 2.0).half()]) * 3,
        },
    )


STEPS: list[tuple[tuple[str, dict[str, object]], Callable[[torch.Tensor], torch.Tensor]]] = [
    (("transpose", {"patterns": "w"}), lambda w: w.t()),
    (("slice", {"patterns": "w", "start": 1, "stop": 3}), lambda w: w[1:3]),
    (("slice", {"patterns": "w", "start": 0, "stop": 2, "dim": 1}), lambda w: w[:, :2]),
    (("pad", {"patterns": "w", "after": 2}), lambda w: torch.cat([w, torch.zeros(2, w.shape[1], dtype=w.dtype)])),
    (("pad", {"patterns": "w", "before": 1, "dim": 1}), lambda w: torch.cat([w.new_zeros(len(w), 1), w], 1)),
    (("cast", {"dtype": "bf16"}), lambda w: w.bfloat16()),
    (("cast", {"dtype": "fp64"}), lambda w: w.double()),
    (("scale", {"patterns": "w", "factor": 0.5}), lambda w: w * 0.5),
    (("concat", {"sources": ["w", "w"], "into": "w"}), lambda w: torch.cat([w, w])),
    (("concat", {"sources": ["w", "w"], "into": "w", "dim": 1}), lambda w: torch.cat([w, w], 1)),
]


@given(st.lists(st.sampled_from(STEPS), min_size=1, max_size=6))
def test_any_chain_of_edits_is_torch_s(
    chain: list[tuple[tuple[str, dict[str, object]], Callable[..., torch.Tensor]]],
) -> None:
    state = {"w": random(4, 4)}
    recipe = Recipe(tuple(step(name, **arguments) for (name, arguments), _ in chain))
    wanted = state["w"]
    try:
        made = recipe.apply(state)
    except EditError:
        assert any(name == "slice" for (name, _), _ in chain)  # nothing else can go wrong
        return
    for _, formula in chain:
        wanted = formula(wanted)
    assert_same(made, {"w": wanted})
    assert_same(ckpt_surgeon.load(recipe.apply(ckpt_surgeon.from_torch(state))), {"w": wanted})


def test_a_problem_in_the_middle_of_a_chain_stops_it(tmp_path: Path) -> None:
    state = {"w": torch.tensor([[1e6, 1.0], [2.0, 3.0]]), "v": torch.tensor([1e7, 1.0])}
    source, out = save_zip(state, tmp_path), tmp_path / "out.pth"
    recipe = Recipe(
        (step("cast", dtype="fp16"), step("transpose", patterns="w"), step("concat", sources=["v"], into="x"))
    )
    with pytest.raises(EditError) as raised:
        ckpt_surgeon.save(recipe.apply(ckpt_surgeon.open(source)), out)
    assert sorted(problem.split(":")[0] for problem in raised.value.problems) == ["'v'", "'w'"]
    assert sorted(os.listdir(tmp_path)) == ["model.pth"]
    with pytest.raises(EditError):
        recipe.apply(state)


# -- ties and views

ON_TIED: dict[str, Callable[[Checkpoint, Sequence[str]], Checkpoint]] = {
    "cast": lambda state, keys: cast(state, "bf16", only=keys),
    "scale": lambda state, keys: scale(state, keys, 2.0),
    "reshape": lambda state, keys: reshape(state, keys, [4, 6]),
    "transpose": lambda state, keys: transpose(state, keys),
    "slice": lambda state, keys: slice_(state, keys, 1, 5, step=2),
    "pad": lambda state, keys: pad(state, keys, after=1),
    "concat": lambda state, keys: concat(state, ["*.weight", "*.weight"], "*.weight"),
    "split": lambda state, keys: split(state, "*.weight", ["*.one", "*.two"]),
}


def tied() -> StateDict:
    weight = random(6, 4)
    return {"wte.weight": weight, "head.weight": weight, "first": weight[:2], "other": random(3)}


@pytest.mark.parametrize("name", ON_TIED)
def test_ties_stay_ties_and_a_view_is_written_compactly(name: str, tmp_path: Path) -> None:
    checkpoint = ckpt_surgeon.open(save_zip(tied(), tmp_path))
    edited = ON_TIED[name](checkpoint, ["wte.weight", "head.weight"])
    ckpt_surgeon.save(edited, tmp_path / "out.pth")
    made = torch.load(tmp_path / "out.pth")
    leaves = ["one", "two"] if name == "split" else ["weight"]
    assert groups(made) == {frozenset({f"wte.{leaf}", f"head.{leaf}"}) for leaf in leaves}
    for tensor in made.values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert_same({key: made[key] for key in ("first", "other")}, {key: tied()[key] for key in ("first", "other")})


@pytest.mark.parametrize("name", ON_TIED)
def test_ties_of_a_dict_stay_ties(name: str) -> None:
    state = tied()
    made: StateDict = ON_TIED[name](state, ["wte.weight", "head.weight"])  # type: ignore[arg-type,assignment]
    leaves = ["one", "two"] if name == "split" else ["weight"]
    for leaf in leaves:
        ours, theirs = made[f"wte.{leaf}"], made[f"head.{leaf}"]
        assert (ours.data_ptr(), ours.stride()) == (theirs.data_ptr(), theirs.stride())
    assert made["first"] is state["first"]


def test_a_scaled_tensor_scales_neither_its_twin_nor_a_view_of_it_as_in_brainsurgery(ckpt: Run, tmp_path: Path) -> None:
    state = tied()
    source, out = save_zip(state, tmp_path), tmp_path / "out.pth"
    ran = ckpt("scale", source, out, "wte.weight", "--factor", "2")
    assert ran.status == 0
    assert "no longer tied to one that was edited: head.weight" in ran.out
    assert_same(torch.load(out), {**state, "wte.weight": state["wte.weight"] * 2})
    made = scale(state, "wte.weight", 2.0)
    assert_same(made, torch.load(out))
    assert made["head.weight"] is state["head.weight"]


@pytest.mark.parametrize("name", [name for name in ON_TIED if name not in ("concat", "split")])
def test_a_twin_that_is_not_edited_is_told_of_by_every_edit(name: str) -> None:
    checkpoint = ckpt_surgeon.from_torch(tied())
    recipe = {
        "cast": step("cast", dtype="bf16", only="wte.*"),
        "scale": step("scale", patterns="wte.*", factor=2),
        "reshape": step("reshape", patterns="wte.*", shape=[24]),
        "transpose": step("transpose", patterns="wte.*"),
        "slice": step("slice", patterns="wte.*", start=0, stop=1),
        "pad": step("pad", patterns="wte.*", after=1),
    }[name]
    notes = recipe.plan(checkpoint).notes
    assert notes == ("1 keys are no longer tied to one that was edited: head.weight",)
    assert cast.plan(checkpoint, "fp32", only="wte.*").notes == ()  # nothing changes, the tie stays


def test_a_view_of_ten_numbers_does_not_keep_eight_megabytes_as_in_brainsurgery(ckpt: Run, tmp_path: Path) -> None:
    source = save_zip({"view": torch.zeros(2_000_000)[:10]}, tmp_path)
    assert source.stat().st_size > 8_000_000
    assert ckpt("scale", source, tmp_path / "out.pth", "view", "--factor", "2").status == 0
    assert (tmp_path / "out.pth").stat().st_size < 4_000


# -- on the command line


def test_the_commands_do_what_the_functions_do(ckpt: Run, tmp_path: Path) -> None:
    state = {"w": random(6, 4), "l.0.q": random(2, 2), "l.0.k": random(2, 2, seed=1), "c": random(2, 3, 4)}
    source, out = save_safetensors(state, tmp_path), tmp_path / "out.safetensors"
    wanted: list[tuple[list[object], StateDict]] = [
        (["cast", "--dtype", "bf16", "--only", "w", "--only", "c", "--except", "c"], cast(state, "bf16", only="w")),
        (["reshape", "w", "--shape", "-1,8"], reshape(state, "w", [-1, 8])),
        (["transpose", "c", "--dims", "2,0,1"], transpose(state, "c", [2, 0, 1])),
        (["slice", "w", "c", "--start", 0, "--stop", 2, "--step", 2], slice_(state, ["w", "c"], 0, 2, step=2)),
        (["pad", "w", "--before", 1, "--dim", 1, "--value", -2.5], pad(state, "w", before=1, dim=1, value=-2.5)),
        (
            ["concat", "--sources", "l.{n}.q,l.{n}.k", "--into", "l.{n}.qk", "--groups", 2],
            concat(state, ["l.{n}.q", "l.{n}.k"], "l.{n}.qk", groups=2),
        ),
        (["split", "--source", "w", "--into", "a,b", "--sizes", "4,2"], split(state, "w", ["a", "b"], sizes=[4, 2])),
        (["scale", "w", "l.*", "--factor", "0.5"], scale(state, ["w", "l.*"], 0.5)),
        (["fold", "--allow-unmatched"], state),
    ]
    for words, expected in wanted:
        ran = ckpt(words[0], source, out, *words[1:], "--force")
        assert ran.status == 0, ran.err
        assert_same(safetensors.torch.load_file(out), expected, order=False)
    for wrong in (["reshape", "w", "--shape", "a,b"], ["reshape", "w"], ["scale", "w", "--factor", "x"], ["cast"]):
        assert ckpt(wrong[0], source, out, *wrong[1:], "--force").status == 2


def test_a_dry_run_shows_dtypes_shapes_and_bytes_and_computes_nothing(ckpt: Run, tmp_path: Path) -> None:
    state = {"a.w": torch.full((4, 6), 1e6), "b.w": random(4, 6), "steps": torch.tensor(3)}
    source = save_zip(state, tmp_path)
    ran = ckpt("cast", source, tmp_path / "out.pth", "--dtype", "fp16", "--dry-run")
    assert ran.status == 0  # what becomes inf is known once it is computed
    rows = [line.split() for line in ran.out.splitlines()]
    assert ["a.w", "=", "float32", "→", "float16", "[4,", "6]", "48"] in rows
    assert ["steps", "=", "int64", "[]", "8"] in rows
    ran = ckpt("split", source, tmp_path / "out.pth", "--source", "b.w", "--into", "b.x,b.y", "--dry-run")
    rows = [line.split() for line in ran.out.splitlines()]
    assert ["b.w", "→", "b.x", "float32", "[4,", "6]", "→", "[2,", "6]", "48"] in rows
    assert os.listdir(tmp_path) == ["model.pth"]
