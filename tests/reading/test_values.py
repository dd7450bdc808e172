"""Values compared, hashed and summed up: against torch and numpy, and where other tools say the wrong thing."""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import Run
from hypothesis import given
from hypothesis import strategies as st
from tables import (
    DTYPES,
    NAMES,
    TABLE,
    StateDict,
    elements,
    in_safetensors,
    noise,
    ramp,
    rewritten,
    save_big_endian,
    save_deflated,
    save_legacy,
    save_safetensors,
    save_shards,
    save_zip,
)

import ckpt_surgeon
from ckpt_surgeon import Changed, EditError, ValueDiff, compare, from_torch, stats
from ckpt_surgeon import hash as hash_values

pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.filterwarnings("ignore:BComplex32 support is experimental"),
]

STORED_ONLY = [dtype for dtype in DTYPES if dtype.startswith(("bits", "float4", "bcomplex"))]
NUMBERS = [dtype for dtype in DTYPES if dtype not in STORED_ONLY]

SAVERS: dict[str, Callable[[StateDict, Path], Path]] = {
    "zip": save_zip,
    "legacy": save_legacy,
    "deflated": save_deflated,
    "big-endian": save_big_endian,
    "safetensors": save_safetensors,
    "shards of safetensors": lambda state, folder: save_shards(state, folder, ".safetensors"),
    "shards of pickles": lambda state, folder: save_shards(state, folder, ".bin"),
}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 1))


def compared(ours: StateDict, theirs: StateDict, *, tolerance: float = 0.0) -> ValueDiff:
    return compare(from_torch(ours), from_torch(theirs), tolerance=tolerance)


def only_change(ours: torch.Tensor, theirs: torch.Tensor) -> Changed:
    found = compared({"w": ours}, {"w": theirs})
    assert not found.same
    assert not found.identical
    (change,) = found.changed
    return change


# -- comparing


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_is_identical_to_itself_whatever_is_in_it(name: str) -> None:
    state = TABLE[name]()
    found = compared(state, TABLE[name]())
    assert found.same
    assert found.identical == tuple(state)
    assert not any((found.renamed, found.close, found.changed, found.only_ours, found.only_theirs))


@pytest.mark.parametrize("saver", SAVERS)
def test_the_container_makes_no_difference(saver: str, tmp_path: Path) -> None:
    state = {"w": random(30, 40), "t": random(7, 5).t(), "h": random(9).half(), "n": torch.arange(5)}
    there = SAVERS[saver](state, tmp_path)
    assert compare(ckpt_surgeon.open(there), from_torch(state)).identical == tuple(ckpt_surgeon.open(there))
    other = dict(state, w=state["w"] + 1)
    assert [one.key for one in compare(ckpt_surgeon.open(there), from_torch(other)).changed] == ["w"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_changed_bit_of_any_dtype_is_a_change(dtype: str) -> None:
    ours = noise(dtype, 3, 4)
    theirs = ours.clone()
    raw = theirs.view(torch.uint8)
    raw[1, 0] ^= 1
    change = only_change(ours, theirs)
    assert change.why == (
        f"dtype {dtype} and {dtype}, which torch does not compute with" if dtype in STORED_ONLY else ""
    )


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "float8_e5m2", "complex64", "int32"])
def test_the_measures_are_numpy_s(dtype: str) -> None:
    ours = (random(40, 30) * 10).to(getattr(torch, dtype))
    theirs = (random(40, 30) * 10 + random(40, 30, seed=1)).to(getattr(torch, dtype))
    if dtype == "complex64":
        ours, theirs = ours * (1 + 2j), theirs * (1 - 1j)
    change = only_change(ours, theirs)
    a, b = (torch.view_as_real(one) if one.is_complex() else one.double() for one in (ours, theirs))
    x, y = a.double().numpy().ravel(), b.double().numpy().ravel()
    assert change.max_abs == pytest.approx(np.abs(x - y).max(), rel=1e-12)
    assert change.relative == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-9)
    assert change.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-9)
    assert (change.nan, change.inf, change.why) == ((0, 0), (0, 0), "")


def test_large_and_strided_tensors_are_measured_as_a_whole(tmp_path: Path) -> None:
    ours = {"w": random(1100, 1001), "t": random(701, 600).t(), "h": random(2_100_001).half()}
    theirs = {key: (tensor + 0.5).to(tensor.dtype) for key, tensor in ours.items()}
    found = compare(ckpt_surgeon.open(save_zip(ours, tmp_path)), from_torch(theirs))
    assert len(found.changed) == 3
    for change in found.changed:
        x, y = (side[change.key].double().flatten() for side in (ours, theirs))
        assert change.max_abs == float((x - y).abs().max())
        assert change.relative == pytest.approx(float((x - y).norm() / x.norm()), rel=1e-9)
        assert change.cosine == pytest.approx(float(torch.cosine_similarity(x, y, dim=0)), rel=1e-9)


def test_nan_and_inf_are_counted_on_both_sides_and_left_out_of_the_measures() -> None:
    nan, inf = math.nan, math.inf
    change = only_change(torch.tensor([1.0, nan, inf, 2.0, 5.0]), torch.tensor([1.5, nan, 3.0, -inf, 5.0]))
    assert (change.nan, change.inf) == ((1, 1), (1, 1))
    assert change.max_abs == 0.5
    assert change.relative == pytest.approx(0.5 / math.sqrt(26))
    gone = only_change(torch.tensor([nan, nan]), torch.tensor([1.0, 2.0]))
    assert (gone.nan, gone.max_abs, gone.relative) == ((2, 0), 0.0, 0.0)
    same_nan = compared({"w": torch.tensor([nan, 1.0])}, {"w": torch.tensor([nan, 1.0])})
    assert same_nan.identical == ("w",)


def test_nothing_with_a_nan_or_an_inf_is_close_however_large_the_tolerance() -> None:
    for value in (math.nan, math.inf):
        found = compared({"w": torch.tensor([1.0, value])}, {"w": torch.tensor([1.5, value])}, tolerance=1e9)
        assert [one.key for one in found.changed] == ["w"]
        assert not found.same


def test_zeros_have_measures_too() -> None:
    zero, one = torch.zeros(3), torch.tensor([0.0, 3.0, 4.0])
    change = only_change(zero, one)
    assert (change.max_abs, change.relative, change.cosine) == (4.0, math.inf, 0.0)
    change = only_change(one, zero)
    assert (change.max_abs, change.relative, change.cosine) == (4.0, 1.0, 0.0)
    signed = compared({"w": zero}, {"w": -zero})
    assert ([one.key for one in signed.close], signed.same) == (["w"], True)


def test_differences_up_to_the_tolerance_are_close() -> None:
    ours = {"near": torch.tensor([1.0, 2.0]), "far": torch.tensor([1.0, 2.0]), "equal": ramp(2)}
    theirs = {"near": torch.tensor([1.0, 2.25]), "far": torch.tensor([1.0, 2.5]), "equal": ramp(2)}
    found = compared(ours, theirs, tolerance=0.25)
    assert (found.identical, [one.key for one in found.close]) == (("equal",), ["near"])
    assert [(one.key, one.max_abs) for one in found.changed] == [("far", 0.5)]
    assert compared(ours, theirs, tolerance=0.5).same
    assert len(compared(ours, theirs).changed) == 2


@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_integers_that_float64_takes_for_one_are_not_the_same(dtype: str) -> None:
    ours = torch.tensor([2**53, 5]).to(getattr(torch, dtype))
    change = only_change(ours, torch.tensor([2**53 + 1, 5]).to(ours.dtype))
    assert change.max_abs == 1.0


def test_what_changed_most_comes_first_and_what_cannot_be_measured_before_it() -> None:
    ours = {key: torch.ones(4) for key in ("little", "shape", "much", "dtype", "nan", "some")}
    theirs = {
        "little": torch.ones(4) * 1.001,
        "shape": torch.ones(5),
        "much": torch.ones(4) * 100,
        "dtype": torch.ones(4).half(),
        "nan": torch.tensor([1.0, 1.0, 1.0, math.nan]),
        "some": torch.ones(4) * 2,
    }
    found = compared(ours, theirs)
    assert {one.key for one in found.changed[:3]} == {"shape", "dtype", "nan"}
    assert [one.key for one in found.changed[3:]] == ["much", "some", "little"]
    why = {one.key: one.why for one in found.changed}
    assert why["shape"] == "shape [4] and [5]"
    assert why["dtype"] == "dtype float32 and float16"
    assert why["nan"] == why["much"] == ""


def test_equal_values_of_another_dtype_are_a_change_and_their_distance_is_told() -> None:
    ours = random(50)
    change = only_change(ours, ours.bfloat16())
    assert change.why == "dtype float32 and bfloat16"
    assert change.max_abs == float((ours.double() - ours.bfloat16().double()).abs().max())
    assert only_change(torch.ones(3), torch.ones(3).double()).max_abs == 0.0


def test_the_same_bytes_under_another_key_are_renamed_and_a_key_of_the_same_end_is_preferred() -> None:
    a, b = random(3, 2), random(4)
    ours = {"old.weight": a, "old.bias": b, "twin.bias": b, "stays": ramp(2), "gone": ramp(3), "half": a.half()}
    theirs = {"new.bias": b, "new.weight": a, "stays": ramp(2), "fresh": ramp(5), "t": a.t()}
    found = compared(ours, theirs)
    assert set(found.renamed) == {("old.weight", "new.weight"), ("old.bias", "new.bias")}
    assert found.only_ours == ("twin.bias", "gone", "half")
    assert found.only_theirs == ("fresh", "t")
    assert not found.same
    assert compared(ours, dict(reversed(ours.items()))).same  # the order of the keys says nothing


def test_a_tensor_that_is_more_than_its_elements_is_an_error() -> None:
    sparse = {"s": torch.eye(3).to_sparse(), "w": ramp(2)}
    with pytest.raises(EditError, match="'s' is a sparse_coo tensor"):
        compared(sparse, sparse)


@given(st.lists(st.floats(width=32), min_size=1, max_size=8), st.lists(st.floats(width=32), min_size=1, max_size=8))
def test_any_floats_are_compared_as_their_bytes_are(left: list[float], right: list[float]) -> None:
    ours, theirs = torch.tensor(left), torch.tensor(right)
    found = compared({"w": ours}, {"w": theirs})
    same_bits = ours.shape == theirs.shape and elements(ours) == elements(theirs)
    assert bool(found.identical) == same_bits
    if not same_bits and ours.shape == theirs.shape:
        (change,) = found.changed or found.close
        finite = torch.isfinite(ours) & torch.isfinite(theirs)
        gap = (ours.double() - theirs.double())[finite].abs()
        assert change.max_abs == (float(gap.max()) if len(gap) else 0.0)
        assert found.same == (bool(torch.isfinite(ours).all() and torch.isfinite(theirs).all()) and not gap.any())


# -- ckpt diff --values


def test_a_tensor_that_is_shifted_by_a_hundredth_differs_where_ckptkit_calls_it_identical(
    ckpt: Run, tmp_path: Path
) -> None:
    state = {"fc.weight": random(8, 8), "fc.bias": random(8)}
    (tmp_path / "b").mkdir()
    before, after = save_zip(state, tmp_path), save_zip({**state, "fc.bias": state["fc.bias"] + 0.01}, tmp_path / "b")
    ran = ckpt("diff", before, after, "--values")
    assert ran.status == 1
    assert "1 identical" in ran.out
    assert "1 changed" in ran.out
    assert "values differ" in ran.out
    assert [line.split()[:2] for line in ran.out.splitlines() if line.startswith("fc.")] == [["fc.bias", "0.01"]]
    assert ckpt("diff", before, after).status == 0  # keys and shapes are the same
    assert ckpt("diff", before, after, "--values", "--tolerance", "0.02").status == 0


def test_removed_tensors_and_float8_are_told_where_tensortracker_hides_them_and_aborts(
    ckpt: Run, tmp_path: Path
) -> None:
    state = {"a": noise("float8_e4m3fn", 4, 4), "b": noise("float8_e5m2", 3), "gone.weight": random(2)}
    (tmp_path / "b").mkdir()
    changed = state["a"].clone()
    changed[0, 0] = 0.0
    before = save_safetensors(state, tmp_path)
    after = save_safetensors({"a": changed, "b": state["b"], "new.weight": random(3)}, tmp_path / "b")
    ran = ckpt("diff", before, after, "--values")
    assert (ran.status, ran.err) == (1, "")
    lines = ran.out.splitlines()
    assert lines[0] == "1 identical, 0 identical under another key, 1 changed, 2 on one side only"
    assert "only in the first: 1 key" in lines
    assert "only in the second: 1 key" in lines
    assert any("gone.weight" in line for line in lines)
    assert any("new.weight" in line for line in lines)


def test_the_exit_status_tells_same_from_different_from_trouble(ckpt: Run, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    one, other = save_zip({"w": ramp(3)}, tmp_path), save_safetensors({"w": ramp(3)}, tmp_path / "b")
    ran = ckpt("diff", one, other, "--values")
    assert (ran.status, "same values" in ran.out) == (0, True)
    renamed = save_zip({"v": ramp(3)}, tmp_path / "b")
    ran = ckpt("diff", one, renamed, "--values")
    assert ran.status == 1
    assert ["w", "v"] in [line.split() for line in ran.out.splitlines()]
    assert ckpt("diff", one, tmp_path / "nowhere.pth", "--values").status == 2
    assert ckpt("diff", one, "torch.nn:Linear(1, 1)", "--values").status == 2
    sparse = tmp_path / "sparse.pth"
    torch.save({"w": torch.eye(3).to_sparse()}, sparse)
    assert ckpt("diff", sparse, sparse, "--values").status == 2


def test_a_prefix_can_be_taken_off_either_side(ckpt: Run, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    plain, wrapped = save_zip({"w": ramp(3)}, tmp_path), save_zip({"module.w": ramp(3)}, tmp_path / "b")
    for pair in ((plain, wrapped), (wrapped, plain), (wrapped, wrapped)):
        assert ckpt("diff", *pair, "--values", "--strip-prefix", "module.").status == 0
    assert ckpt("diff", plain, wrapped, "--values").status == 1
    ran = ckpt("diff", plain, plain, "--values", "--strip-prefix", "module.")
    assert ran.status == 2
    assert "'module.' matches no key" in ran.err


def refuse(word: str) -> float:
    raise AssertionError(f"{word} is no JSON")


def test_the_json_is_json_whatever_the_numbers(ckpt: Run, tmp_path: Path) -> None:
    ours = {
        "same": ramp(2), "zero": torch.zeros(2), "nan": torch.tensor([math.nan, math.inf]), "old": random(5),
        "shape": ramp(2), "gone": ramp(4), "near": torch.ones(2), "\x1b[31mred": ramp(3),
    }  # fmt: skip
    theirs = {
        "same": ramp(2), "zero": torch.ones(2), "nan": torch.tensor([1.0, 2.0]), "new": random(5),
        "shape": ramp(3), "fresh": ramp(6), "near": torch.ones(2) + 1e-6, "\x1b[31mred": ramp(3) * 2,
    }  # fmt: skip
    (tmp_path / "b").mkdir()
    left, right = save_zip(ours, tmp_path), save_zip(theirs, tmp_path / "b")
    ran = ckpt("diff", left, right, "--values", "--tolerance", "1e-5", "--json")
    assert ran.status == 1
    found = json.loads(ran.out, parse_constant=refuse)
    assert found["same"] is False
    assert found["identical"] == ["same"]
    assert found["renamed"] == [{"ours": "old", "theirs": "new"}]
    assert (found["only_ours"], found["only_theirs"]) == (["gone"], ["fresh"])
    assert [one["name"] for one in found["close"]] == ["near"]
    changed = {one["name"]: one for one in found["changed"]}
    assert set(changed) == {"zero", "nan", "shape", "\x1b[31mred"}
    assert (changed["zero"]["max_abs"], changed["zero"]["relative"]) == (1.0, None)
    assert (changed["nan"]["nan"], changed["nan"]["inf"]) == ([1, 0], [1, 0])
    assert (changed["shape"]["max_abs"], changed["shape"]["why"]) == (None, "shape [2] and [3]")
    text = ckpt("diff", left, right, "--values").out
    assert "\x1b" not in text
    ran = ckpt("diff", left, left, "--values", "--json")
    assert (ran.status, json.loads(ran.out, parse_constant=refuse)["same"]) == (0, True)


def test_a_long_list_is_cut_and_full_shows_it_all(ckpt: Run, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    left = save_zip({f"w{index}": ramp(2) for index in range(40)}, tmp_path)
    right = save_zip({f"w{index}": ramp(2) + index + 1 for index in range(40)}, tmp_path / "b")
    ran = ckpt("diff", left, right, "--values")
    assert "28 more (--full lists all)" in ran.out
    assert sum(line.startswith("w") for line in ran.out.splitlines()) == 12
    full = ckpt("diff", left, right, "--values", "--full").out
    assert [line.split()[0] for line in full.splitlines() if line.startswith("w")] == [
        f"w{n}" for n in range(39, -1, -1)
    ]


# -- hashing


def spelled_out(state: StateDict) -> dict[str, str]:
    """The digests as the documentation says that they are made."""
    return {
        key: hashlib.sha256(f"{str(tensor.dtype)[6:]} {list(tensor.shape)}\n".encode() + elements(tensor)).hexdigest()
        for key, tensor in state.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_hash_is_what_the_documentation_says(name: str, tmp_path: Path) -> None:
    state = TABLE[name]()
    wanted = spelled_out(state)
    found = hash_values(from_torch(state))
    assert found.tensors == wanted
    lines = "".join(f"{key}\0{wanted[key]}\n" for key in sorted(state))
    assert found.whole == hashlib.sha256(lines.encode()).hexdigest()
    assert hash_values(save_zip(state, tmp_path)) == found
    if in_safetensors(name):
        assert hash_values(save_safetensors(state, tmp_path)).whole == found.whole


@pytest.mark.parametrize("saver", SAVERS)
def test_a_hash_depends_on_no_container(saver: str, tmp_path: Path) -> None:
    state = {
        "w": random(601, 700), "t": random(7, 5).t(), "h": random(800_001).half(), "n": torch.arange(5),
        "x": ramp(0, 3),
    }  # fmt: skip
    wanted = hash_values(from_torch(state))
    found = hash_values(SAVERS[saver](state, tmp_path))
    assert found.whole == wanted.whole
    assert dict(found.tensors) == dict(wanted.tensors)


def test_a_hash_depends_on_no_order_and_no_strides_and_no_ties(tmp_path: Path) -> None:
    weight = random(6, 4)
    state = {"a": weight, "b": weight, "v": weight[:2], "c": ramp(3)}
    alike = {
        "reversed": dict(reversed(state.items())),
        "untied": {key: tensor.clone() for key, tensor in state.items()},
        "transposed": {**state, "a": weight.t().contiguous().t()},
        "stepped": {**state, "a": torch.stack([weight, weight], 2)[:, :, 0]},
    }
    wanted = hash_values(from_torch(state)).whole
    for other in alike.values():
        assert hash_values(from_torch(other)).whole == wanted
    (tmp_path / "z").mkdir()
    packed = rewritten(save_zip(state, tmp_path), tmp_path / "z" / "packed.pth", method=zipfile.ZIP_DEFLATED)
    assert hash_values(packed).whole == wanted


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {**state, "a": state["a"] + 1e-7},
        lambda state: {**state, "a": state["a"].double()},
        lambda state: {**state, "a": state["a"].view(torch.int32)},
        lambda state: {**state, "a": state["a"].reshape(3, 2)},
        lambda state: {**state, "a": state["a"].reshape(6)},
        lambda state: {**state, "n": torch.tensor([-0.0])},
        lambda state: {"A": state["a"], "b": state["b"], "n": state["n"]},
        lambda state: {"a": state["b"], "b": state["a"], "n": state["n"]},
        lambda state: {"a": state["a"], "b": state["b"]},
        lambda state: {**state, "more": torch.empty(0)},
        lambda state: {**state, "e": torch.empty(0, 3)},
    ],
)
def test_a_hash_differs_with_any_value_or_dtype_or_shape_or_key(change: Callable[[StateDict], StateDict]) -> None:
    state = {"a": ramp(2, 3), "b": ramp(2, 3) + 1, "n": torch.tensor([0.0])}
    before, after = hash_values(from_torch(state)), hash_values(from_torch(change(state)))
    assert before.whole != after.whole
    assert hash_values(from_torch({**state, "e": torch.empty(3, 0)})).whole != after.whole


def test_the_hash_command_prints_digests_and_keys(ckpt: Run, tmp_path: Path) -> None:
    state = {"b": ramp(2), "a\nline": ramp(3)}
    path = save_zip(state, tmp_path)
    wanted = hash_values(path)
    ran = ckpt("hash", path)
    assert ran.status == 0
    assert ran.out.splitlines() == [
        f"{wanted.tensors['b']}  b",
        f"{wanted.tensors['a' + chr(10) + 'line']}  a\\nline",
        f"{wanted.whole}  (whole)",
    ]
    assert ckpt("hash", path, "--quiet").out == f"{wanted.whole}\n"
    printed = json.loads(ckpt("hash", path, "--json").out)
    assert (printed["whole"], printed["tensors"]) == (wanted.whole, wanted.tensors)
    assert ckpt("hash", tmp_path / "nowhere.pth").status == 2


# -- summing up


@pytest.mark.parametrize("dtype", NUMBERS)
def test_sums_of_any_dtype_are_torch_s(dtype: str) -> None:
    tensor = (random(40, 30).abs() * 3 + 1).to(getattr(torch, dtype))
    tensor = tensor * (1 - 2j) if dtype in ("complex64", "complex128") else tensor
    found = stats(from_torch({"w": tensor})["w"])
    values = tensor.abs().double() if tensor.is_complex() else tensor.double()
    assert found.mean == pytest.approx(float(values.mean()), rel=1e-12)
    assert found.std == pytest.approx(float(values.std(correction=0)), rel=1e-9, abs=1e-12)
    assert (found.min, found.max) == (float(values.min()), float(values.max()))
    assert (found.nan, found.inf, found.all_zero) == (0, 0, False)


@pytest.mark.parametrize("saver", ["zip", "deflated", "safetensors"])
def test_sums_are_streamed_over_large_and_strided_tensors(saver: str, tmp_path: Path) -> None:
    state = {"w": random(1100, 1001) * 100 + 1e4, "t": random(701, 600).t(), "s": random(900, 700)[::2, ::3]}
    checkpoint = ckpt_surgeon.open(SAVERS[saver](state, tmp_path))
    for key, tensor in state.items():
        found, values = stats(checkpoint[key]), tensor.double()
        assert found.mean == pytest.approx(float(values.mean()), rel=1e-9, abs=1e-12)
        assert found.std == pytest.approx(float(values.std(correction=0)), rel=1e-9)
        assert (found.min, found.max) == (float(values.min()), float(values.max()))


@given(st.lists(st.floats(width=32), max_size=12))
def test_sums_of_any_floats_are_over_the_finite_ones(values: list[float]) -> None:
    found = stats(from_torch({"w": torch.tensor(values)})["w"])
    finite = [value for value in values if math.isfinite(value)]
    assert found.nan == sum(map(math.isnan, values))
    assert found.inf == sum(map(math.isinf, values))
    assert found.all_zero == (bool(values) and not any(values))
    if finite:
        assert (found.min, found.max) == (min(finite), max(finite))
        assert found.mean == pytest.approx(np.mean(finite), rel=1e-9, abs=1e-40)
        assert found.std == pytest.approx(np.std(finite), rel=1e-6, abs=max(map(abs, finite)) * 1e-7 + 1e-40)
    else:
        assert all(map(math.isnan, (found.mean, found.std, found.min, found.max)))


@pytest.mark.parametrize("dtype", STORED_ONLY)
def test_what_torch_does_not_compute_with_has_no_sums(dtype: str) -> None:
    found = stats(from_torch({"w": noise(dtype, 3, 4)})["w"])
    assert all(map(math.isnan, (found.mean, found.std, found.min, found.max)))


def test_ls_shows_the_sums_and_what_is_odd(ckpt: Run, tmp_path: Path) -> None:
    state = {
        "fc.weight": torch.tensor([[1.0, -2.0], [3.0, 6.0]]),
        "bad": torch.tensor([1.0, math.nan, math.inf, -math.inf]),
        "zero": torch.zeros(3, dtype=torch.int32),
        "none": torch.empty(0),
        "sparse": torch.eye(2).to_sparse(),
    }
    path = save_zip(state, tmp_path)
    ran = ckpt("ls", path, "--stats")
    assert ran.status == 0
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in ran.out.splitlines() if line}
    weight = state["fc.weight"]
    measures = [weight.mean(), weight.std(correction=0), weight.min(), weight.max()]
    assert rows["fc.weight"] == "float32 [2, 2] " + " ".join(f"{float(value):.4g}" for value in measures)
    assert rows["bad"] == "float32 [4] 1 0 1 1 1 NaN, 2 inf"
    assert rows["zero"] == "int32 [3] 0 0 0 0 all zero"
    assert rows["none"] == "float32 [0] nan nan nan nan"
    assert rows["sparse"].endswith("nan nan nan nan")
    found = json.loads(ckpt("ls", path, "--stats", "--json").out, parse_constant=refuse)
    by_name = {one["name"]: one["stats"] for one in found["tensors"]}
    assert by_name["fc.weight"]["mean"] == 2.0
    assert by_name["bad"] == {"mean": 1.0, "std": 0.0, "min": 1.0, "max": 1.0, "nan": 1, "inf": 2, "all_zero": False}
    assert by_name["none"]["mean"] is None
    assert by_name["zero"]["all_zero"] is True
