"""Arithmetic: numpy's way and torch's give the same bits, and both are torch's own."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import DTYPES

from ckpt_surgeon import EditError, from_torch
from ckpt_surgeon.tensors import arithmetic, casts
from ckpt_surgeon.tensors.casts import cast_by_numpy, cast_by_torch
from ckpt_surgeon.tensors.dtypes import BY_NAME, DType

pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.filterwarnings("ignore:Casting complex values to real"),
]

NUMBERS = [name for name in DTYPES if BY_NAME[name].is_computable]
FLOATS = [name for name in NUMBERS if BY_NAME[name].is_floating]
COMPLEX = [name for name in NUMBERS if BY_NAME[name].is_complex]
INTEGERS = [name for name in NUMBERS if name not in FLOATS and name not in COMPLEX]
PARTS = {"complex32": "float16", "complex64": "float32", "complex128": "float64"}

# Where conversions go wrong: zeros, ties, the least and greatest numbers of each dtype and their neighbours.
EDGES = [
    0.0,
    -0.0,
    1.0,
    math.inf,
    -math.inf,
    math.nan,
    448.0,
    464.0,
    465.0,
    480.0,
    240.0,
    248.0,
    249.0,
    57344.0,
    61440.0,
]
EDGES += [65504.0, 65519.99, 65520.0, 2.0**-24, 2.0**-25, 1.5 * 2.0**-25, 2.0**-133, 2.0**-134, 3.3895e38, 3.3961e38]
EDGES += [2.0**-9, 2.0**-10, 1.5 * 2.0**-10, 2.0**-16, 2.0**-17, 2.0**-127, 2.0**-128, 1.0 + 2.0**-8, 1.0 + 2.0**-4]
EDGES += [1.0 + 2.0**-11 + 2.0**-40, 1.0 + 2.0**-8 + 2.0**-30, 1.0625 + 2.0**-50, 1e300, 5e-324, 2.0**63, 2.0**64, -1.0]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def every(dtype: str, seed: int = 0) -> torch.Tensor:
    """Numbers of a dtype: each of the short ones, else any bits and the edges."""
    kind = getattr(torch, dtype)
    if kind.itemsize <= 2 and dtype != "bool":
        codes = np.arange(1 << 8 * kind.itemsize, dtype=f"u{kind.itemsize}")
        return torch.from_numpy(codes.view(np.uint8)).view(kind)
    rng = np.random.default_rng(seed)
    if dtype == "bool":
        return torch.from_numpy(rng.integers(0, 2, 64).astype(bool))
    anything = torch.from_numpy(rng.integers(0, 256, 65536, dtype=np.uint8)).view(kind)
    if not (kind.is_floating_point or kind.is_complex):
        return anything
    part = getattr(torch, PARTS.get(dtype, dtype))
    usual = torch.from_numpy(rng.standard_normal(4096) * np.exp2(rng.integers(-30, 20, 4096))).to(part)
    edges = torch.tensor(EDGES * 2, dtype=torch.float64).to(part)
    return torch.cat([anything, torch.cat([usual, edges, -edges]).view(kind)])


def without_nan(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[~torch.isnan(wide(tensor))]


def wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.complex128) if tensor.is_complex() else tensor.double()


def by_numpy(tensor: torch.Tensor, target: str) -> bytes:
    return bytes(cast_by_numpy(bits(tensor), BY_NAME[str(tensor.dtype)[6:]], BY_NAME[target])[0])


def is_wider(source: DType, target: DType) -> bool:
    return target.is_complex or not source.is_complex


@pytest.mark.parametrize("source", NUMBERS)
def test_numpy_converts_every_number_to_the_bits_that_torch_gives(source: str) -> None:
    numbers = without_nan(every(source))
    for target in [*FLOATS, *COMPLEX]:
        if is_wider(BY_NAME[source], BY_NAME[target]) and source != target:
            assert by_numpy(numbers, target) == bits(numbers.to(getattr(torch, target))), target


@pytest.mark.parametrize("source", [*FLOATS, *COMPLEX])
def test_nan_stays_nan_with_the_bits_that_torch_s_vector_code_gives_it(source: str) -> None:
    every_nan = every(source)[torch.isnan(wide(every(source)))]
    numbers = every_nan.repeat(64)[: 64 * max(1, every_nan.numel() // 64)] if every_nan.numel() else every_nan
    is_x86 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    for target in [*FLOATS, *COMPLEX]:
        if is_wider(BY_NAME[source], BY_NAME[target]) and source != target:
            made = by_numpy(numbers, target)
            as_torch = numbers.to(getattr(torch, target))
            assert torch.isnan(wide(torch.frombuffer(bytearray(made), dtype=as_torch.dtype))).all() if made else True
            assert not is_x86 or made == bits(as_torch), target


def exactly(source: str, target: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of a dtype, and which of them an integer dtype holds exactly, told by Python's own integers."""
    numbers = every(source, 1)[-600:]
    info = None if target == "bool" else torch.iinfo(getattr(torch, target))
    low, high = (0, 1) if info is None else (info.min, info.max)
    values = [value.item() for value in numbers]
    return numbers, torch.tensor([math.isfinite(v) and v == int(v) and low <= int(v) <= high for v in values])


@pytest.mark.parametrize("source", [*FLOATS, *INTEGERS])
def test_numbers_that_an_integer_cannot_hold_are_counted_and_the_others_are_torch_s(source: str) -> None:
    for target in INTEGERS:
        numbers, fits = exactly(source, target)
        _, losses = cast_by_numpy(bits(numbers), BY_NAME[source], BY_NAME[target])
        assert source == target or losses.inexact == int((~fits).sum()), target
        assert by_numpy(numbers[fits], target) == bits(numbers[fits].to(getattr(torch, target))), target


@pytest.mark.parametrize("pair", sorted(casts._FASTER_BY_TORCH))
@given(seed=st.integers(0, 2**32 - 1), mixed=st.booleans())
@settings(max_examples=8, deadline=None)
def test_both_engines_give_the_same_bits_and_count_the_same_losses(
    pair: tuple[str, str], seed: int, mixed: bool
) -> None:
    source, target = map(BY_NAME.__getitem__, pair)
    numbers = every(source.name, seed)
    usual = numbers[numbers.double().abs() < 60000]  # no NaN and no inf: torch computes the block
    raw = bits(numbers if mixed else usual)
    ours, lost = cast_by_numpy(raw, source, target)
    theirs, other = cast_by_torch(raw, source, target)
    assert bytes(ours) == bytes(theirs)
    assert lost == other
    assert mixed or bytes(theirs) == bits(usual.to(getattr(torch, target.name)))


@pytest.mark.parametrize("target", [name for name in FLOATS if BY_NAME[name].itemsize < 4 and "e8m0" not in name])
@given(st.lists(st.floats(), min_size=1, max_size=40))
@settings(max_examples=30, deadline=None)
def test_what_gets_lost_is_counted_as_the_numbers_tell(target: str, values: list[float]) -> None:
    numbers = torch.tensor(values, dtype=torch.float32)
    _, losses = cast_by_numpy(bits(numbers), BY_NAME["float32"], BY_NAME[target])
    info = torch.finfo(getattr(torch, target))
    unit = info.eps * 2.0 ** math.floor(math.log2(info.max))  # between the greatest number and the one below
    is_even = (info.max / unit) % 2 == 0
    has_inf = BY_NAME[target].has_inf
    beyond = [abs(v) for v in numbers.tolist() if math.isfinite(v) or (not has_inf and not math.isnan(v))]
    assert losses.infinite == sum(v > info.max + unit / 2 or (v == info.max + unit / 2 and not is_even) for v in beyond)
    made = numbers.to(getattr(torch, target)).float()
    assert losses.flushed == int(((made == 0) & (numbers != 0)).sum())


@pytest.mark.parametrize("dtype", [*FLOATS, "complex64", "complex128"])
@given(factor=st.floats(width=32, allow_nan=False))
@settings(max_examples=6, deadline=None)
def test_a_product_is_torch_s_own(dtype: str, factor: float) -> None:
    numbers = without_nan(every(dtype))[:4000]
    if not numbers.dtype.is_complex:
        numbers = numbers[numbers.double().abs() < math.inf]
    else:
        numbers = numbers[torch.isfinite(numbers.to(torch.complex128))]
    short = numbers.float() if numbers.dtype.itemsize == 1 else numbers
    wanted = (short * factor).to(numbers.dtype)
    made = arithmetic._scaled_by_numpy(bits(numbers), BY_NAME[dtype], factor)
    ours = torch.frombuffer(bytearray(made), dtype=numbers.dtype)
    fine = ~torch.isnan(wide(wanted))
    assert bits(ours[fine]) == bits(wanted[fine])
    assert torch.isnan(wide(ours[~fine])).all()


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, 2.0, math.inf, math.nan, 1e6, -1.0, 3.0, 0.1])
def test_a_constant_is_the_one_that_torch_makes_or_an_error(value: float) -> None:
    for dtype in NUMBERS:
        check_constant(dtype, value)


def check_constant(dtype: str, value: float) -> None:
    kind = getattr(torch, dtype)
    wanted = torch.tensor([value] * 3, dtype=torch.float64).to(kind)
    back = wanted.double() if not kind.is_complex else torch.view_as_real(wanted.to(torch.complex128))[:, 0]
    is_same = bool((back[0] == value) or (math.isnan(value) and torch.isnan(back[0])))
    is_rounded = (kind.is_floating_point or kind.is_complex) and dtype != "float8_e8m0fnu"
    has_it = is_same or (is_rounded and math.isfinite(value) and abs(value) <= torch.finfo(kind).max)
    try:
        made = b"".join(arithmetic.filled(BY_NAME[dtype], 3, value))
    except EditError:
        assert not has_it
    else:
        assert has_it
        assert made == bits(wanted) or math.isnan(value)


def test_torch_is_asked_where_it_is_imported_or_where_the_work_pays_for_its_import(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert casts.torch_pays(1)
    monkeypatch.delitem(sys.modules, "torch")
    assert not casts.torch_pays(casts.TORCH_PAYS - 1)
    assert casts.torch_pays(casts.TORCH_PAYS)


def test_many_blocks_come_in_order() -> None:
    numbers = torch.arange(5_000_000, dtype=torch.int32)
    tensor = from_torch({"w": numbers})["w"]
    losses = casts.Losses()
    made = b"".join(casts.cast(tensor, BY_NAME["float64"], losses))
    assert made == bits(numbers.double())
    assert losses == casts.Losses()
