"""Averages, differences and merges: equal to timm's, torch's, peft's and mergekit's definitions, rounded once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Run
from hypothesis import given
from hypothesis import strategies as st

import ckpt_surgeon
from ckpt_surgeon import EditError
from ckpt_surgeon.tensors.combining import rounded
from ckpt_surgeon.tensors.conversion import widened
from ckpt_surgeon.tensors.dtypes import BY_NAME

StateDict = dict[str, torch.Tensor]
SHORT = ["float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e5m2"]


def drawn(seed: int, dtype: torch.dtype = torch.float32, size: int = 300_000) -> StateDict:
    """Random tensors, one of them of several blocks."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "big": torch.randn(size, generator=generator).to(dtype),
        "fc.weight": torch.randn(7, 5, generator=generator).to(dtype),
    }


def saved(path: Path, state_dict: object) -> Path:
    torch.save(state_dict, path)
    return path


def same(mine: Any, theirs: Any) -> None:
    assert list(mine) == list(theirs)
    for key in mine:
        assert mine[key].dtype == theirs[key].dtype
        assert torch.equal(mine[key], theirs[key]), key


# -- rounding


@given(st.lists(st.floats(width=64), min_size=1, max_size=50), st.sampled_from(SHORT))
def test_float64_is_rounded_once_to_the_nearest(values: list[float], name: str) -> None:
    exact = np.array(values, np.float64)
    made, _ = rounded(exact.copy(), BY_NAME[name])
    dtype = getattr(torch, name)
    codes = torch.arange(1 << 16 if dtype.itemsize == 2 else 1 << 8, dtype=torch.int32)
    if name == "float32":
        with np.errstate(over="ignore"):
            assert np.array_equal(made, exact.astype(np.float32), equal_nan=True)
        return
    every = (codes.to(torch.uint16) if dtype.itemsize == 2 else codes.to(torch.uint8)).view(dtype).double()
    finite = np.unique(every[torch.isfinite(every)].numpy())
    for before, after in zip(exact, widened(made, BY_NAME[name]).astype(np.float64), strict=True):
        if not math.isfinite(before) or abs(before) > finite[-1]:
            continue
        place = min(int(np.searchsorted(finite, before)), len(finite) - 1)
        near = [finite[place], finite[max(place - 1, 0)]]
        best = min(abs(Fraction(one) - Fraction(before)) for one in near)
        assert abs(Fraction(after) - Fraction(before)) == best


def test_random_rounding_keeps_the_mean_and_only_takes_neighbours() -> None:
    state = {"w": torch.full((200_000,), 1.0 + 2**-10, dtype=torch.float64)}
    made = ckpt_surgeon.average(state, state, dtype="bf16", rounding="stochastic", seed=3)["w"].double()
    assert set(made.tolist()) == {1.0, 1.0078125}
    assert abs(float(made.mean()) - (1 + 2**-10)) < 1e-4
    again = ckpt_surgeon.average(state, state, dtype="bf16", rounding="stochastic", seed=3)["w"].double()
    assert torch.equal(made, again)
    other = ckpt_surgeon.average(state, state, dtype="bf16", rounding="stochastic", seed=4)["w"].double()
    assert not torch.equal(made, other)


# -- averages


def timm_average(states: list[StateDict]) -> StateDict:
    """What timm's avg_checkpoints.py does: sums in float64, divided by the count, as float32."""
    sums = {key: sum(state[key].to(torch.float64) for state in states) for key in states[0]}
    return {key: (total / len(states)).float() for key, total in sums.items()}  # type: ignore[union-attr]


def test_an_average_is_that_of_timm_bit_for_bit(tmp_path: Path, ckpt: Run) -> None:
    states = [drawn(seed) for seed in range(3)]
    paths = [saved(tmp_path / f"{index}.pth", state) for index, state in enumerate(states)]
    assert ckpt("average", *paths, tmp_path / "out.pth").status == 0
    same(torch.load(tmp_path / "out.pth"), timm_average(states))


def test_weights_count_by_their_share() -> None:
    one, two = drawn(0, torch.float64), drawn(1, torch.float64)
    wanted = {key: (3 * one[key] + two[key]) / 4 for key in one}
    same(ckpt_surgeon.average(one, two, weights=[3, 1]), wanted)


def test_an_average_with_decay_is_that_of_torch() -> None:
    states = [drawn(seed, torch.float64) for seed in range(4)]
    update: Callable[..., None] = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    wanted = {key: value.clone() for key, value in states[0].items()}
    for state in states[1:]:
        update(list(wanted.values()), [state[key] for key in wanted], 1)
    made = ckpt_surgeon.ema(states[0], *states[1:], decay=0.9)
    assert all(torch.allclose(made[key], wanted[key], rtol=1e-15, atol=1e-15) for key in wanted)


def test_lerp_is_that_of_torch_and_its_ends_are_the_inputs() -> None:
    one, two = drawn(0), drawn(1)
    made = ckpt_surgeon.lerp(one, two, 0.3)
    wanted = {key: torch.lerp(one[key].double(), two[key].double(), 0.3) for key in one}
    assert all(torch.allclose(made[key].double(), wanted[key], rtol=1e-7) for key in made)
    same(ckpt_surgeon.lerp(one, two, 0.0), one)
    same(ckpt_surgeon.lerp(one, two, 1.0), two)


def test_slerp_is_that_of_mergekit() -> None:
    one, two = drawn(0, torch.float64), drawn(1, torch.float64)
    two["fc.weight"] = one["fc.weight"] * 1.001  # nearly in line: lerp
    made = ckpt_surgeon.slerp(one, two, 0.25)
    a, b = one["big"], two["big"]
    angle = torch.acos((a / a.norm() * (b / b.norm())).sum())
    wanted = torch.sin(0.75 * angle) / torch.sin(angle) * a + torch.sin(0.25 * angle) / torch.sin(angle) * b
    assert torch.allclose(made["big"], wanted, rtol=1e-12)
    assert torch.allclose(made["fc.weight"], torch.lerp(one["fc.weight"], two["fc.weight"], 0.25), rtol=1e-14)


def test_a_short_dtype_is_rounded_once_and_keeps_its_name() -> None:
    one, two = drawn(0, torch.bfloat16), drawn(1, torch.bfloat16)
    made = ckpt_surgeon.average(one, two)
    exact = (one["big"].double() + two["big"].double()) / 2
    assert made["big"].dtype == torch.bfloat16
    assert torch.equal(made["big"], exact.float().to(torch.bfloat16))  # a sum of two bfloat16 is exact in float32
    assert ckpt_surgeon.average(one, two, dtype="fp32")["big"].dtype == torch.float32


# -- what has no average


def test_counters_become_the_largest_and_other_integers_have_to_be_equal() -> None:
    one = {"bn.num_batches_tracked": torch.tensor(5), "ids": torch.arange(3), "bn.running_var": torch.ones(2)}
    two = {"bn.num_batches_tracked": torch.tensor(9), "ids": torch.arange(3), "bn.running_var": torch.ones(2) * 3}
    change = ckpt_surgeon.average.plan(one, two)
    assert change.result["bn.num_batches_tracked"] == 9
    assert torch.equal(change.result["ids"], torch.arange(3))
    assert any("update_bn" in note for note in change.notes)
    two["ids"] = torch.arange(3) + 1
    with pytest.raises(EditError, match=r"'ids' \(int64\) is not the same in all inputs; say which counts: integers"):
        ckpt_surgeon.average(one, two)
    assert torch.equal(ckpt_surgeon.average(one, two, integers="largest")["ids"], torch.arange(3) + 1)
    assert torch.equal(ckpt_surgeon.average(one, two, integers="first")["ids"], torch.arange(3))


def test_a_key_that_one_lacks_or_has_with_another_shape_is_refused(tmp_path: Path, ckpt: Run) -> None:
    one = saved(tmp_path / "one.pth", {"a": torch.zeros(2), "b": torch.zeros(2)})
    two = saved(tmp_path / "two.pth", {"b": torch.ones(2), "c": torch.ones(2)})
    ran = ckpt("average", one, two, tmp_path / "out.pth")
    assert ran.status == 2
    assert f"{two} lacks 1 key: 'a'" in ran.err
    assert f"{one} lacks 1 key: 'c'" in ran.err
    assert "--common" in ran.err
    ran = ckpt("average", one, two, tmp_path / "out.pth", "--common")
    assert ran.status == 0
    assert "left out" in ran.out
    same(torch.load(tmp_path / "out.pth"), {"b": torch.full((2,), 0.5)})
    with pytest.raises(EditError, match=r"'a' is \[2\] and \[3\]"):
        ckpt_surgeon.average({"a": torch.zeros(2)}, {"a": torch.zeros(3)})


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0], [1.0, -1.0], [math.inf, 1.0]])
def test_weights_that_cannot_be_are_refused(weights: list[float]) -> None:
    with pytest.raises(EditError, match="weights"):
        ckpt_surgeon.average(drawn(0), drawn(1), weights=weights)


def test_ties_that_all_inputs_have_survive() -> None:
    def tied(value: float) -> StateDict:
        weight = torch.full((3, 2), float(value))
        return {"embed.weight": weight, "lm_head.weight": weight}

    made = ckpt_surgeon.average(tied(1), tied(3))
    assert made["embed.weight"].data_ptr() == made["lm_head.weight"].data_ptr()
    apart = {key: value.clone() for key, value in tied(3).items()}
    assert any("tied" in note for note in ckpt_surgeon.average.plan(tied(1), apart).notes)


def test_extra_states_are_those_of_the_first_input_and_that_is_said() -> None:
    class Scaled(torch.nn.Linear):
        def __init__(self, amax: float) -> None:
            super().__init__(2, 2)
            self.amax = amax

        def get_extra_state(self) -> dict[str, float]:
            return {"amax": self.amax}

    change = ckpt_surgeon.average.plan(Scaled(1.0).state_dict(), Scaled(2.0).state_dict())
    assert change.result["_extra_state"] == {"amax": 1.0}
    assert "extra states are those of the first input, as they are: '_extra_state'" in change.notes


def test_codes_are_not_averaged() -> None:
    codes = {"fc.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "fc.weight_scale_inv": torch.ones(1, 1)}
    with pytest.raises(EditError, match="dequantize"):
        ckpt_surgeon.average(codes, codes)


# -- differences


def test_a_difference_added_again_gives_the_fine_tuning(tmp_path: Path, ckpt: Run) -> None:
    base, tuned = drawn(0), drawn(1)
    base["steps"], tuned["steps"] = torch.tensor(1), torch.tensor(2)
    one, two = saved(tmp_path / "base.pth", base), saved(tmp_path / "tuned.pth", tuned)
    ran = ckpt("subtract", two, one, tmp_path / "delta.safetensors", "--dtype", "float64")
    assert ran.status == 0, ran.err
    assert "in no difference, being integers or bools: 'steps'" in ran.out
    ran = ckpt("add", one, tmp_path / "delta.safetensors", tmp_path / "again.pth")
    assert ran.status == 0, ran.err
    assert "keeps cos 1.0000" in ran.out
    same(torch.load(tmp_path / "again.pth"), {**tuned, "steps": torch.tensor(1)})


def test_what_a_checkpoint_lacks_is_not_added() -> None:
    with pytest.raises(EditError, match="'x', which is not in the checkpoint"):
        ckpt_surgeon.add(drawn(0), {"x": torch.ones(2)})


@pytest.mark.parametrize(("relative", "cosine"), [(1e-3, 0.64), (3e-4, 0.37)])
def test_what_rounding_leaves_of_a_small_change_is_said(relative: float, cosine: float) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(1_000_000, generator=generator).to(torch.bfloat16)}
    delta = {"w": torch.randn(1_000_000, generator=generator) * relative}
    change = ckpt_surgeon.add.plan(base, delta)
    [note] = [note for note in change.notes if "of the change" in note]
    kept = change.result["w"].double() - base["w"].double()
    measured = float(torch.nn.functional.cosine_similarity(kept, delta["w"].double(), dim=0))
    assert abs(measured - cosine) < 0.06
    assert f"keeps cos {measured:.4f}" in note
    assert note.startswith("warning: ")
    full = ckpt_surgeon.add.plan(base, delta, dtype="fp32")
    assert any("float32 keeps cos 1.0000" in note and "warning" not in note for note in full.notes)


# -- merges


def tuned_of(base: StateDict, count: int, dtype: torch.dtype) -> list[StateDict]:
    made = []
    for seed in range(1, count + 1):
        generator = torch.Generator().manual_seed(seed)
        made.append(
            {key: value + torch.randn(value.shape, generator=generator).to(dtype) for key, value in base.items()}
        )
    return made


@pytest.mark.parametrize("density", [1.0, 0.4])
@pytest.mark.parametrize("method", ["task-arithmetic", "ties-peft"])
def test_a_merge_is_that_of_peft(method: str, density: float) -> None:
    from peft.utils import merge_utils

    base = drawn(0, torch.float64, size=90_000)
    tuned = tuned_of(base, 3, torch.float64)
    weights = [0.5, 0.3, 0.9]
    made = ckpt_surgeon.merge(base, *tuned, method=method, weights=weights, density=density)  # type: ignore[arg-type]
    for key in base:
        deltas = [one[key] - base[key] for one in tuned]
        given = torch.tensor(weights, dtype=torch.float64)
        if method == "ties-peft":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that a density of 1 prunes nothing
                mixed = merge_utils.ties(deltas, given, density=density)
        else:
            mixed = merge_utils.task_arithmetic(deltas, given)
        assert torch.allclose(made[key], base[key] + mixed, rtol=1e-12, atol=1e-12), key


def mergekit_ties(deltas: list[torch.Tensor], weights: list[float], density: float) -> torch.Tensor:
    """mergekit's definition: largest magnitudes, the sign of the weighted sum, divided by the weights that agree."""
    sparse = []
    for delta in deltas:
        count = int(density * delta.numel())
        kept = torch.zeros(delta.numel(), dtype=torch.bool)
        kept[delta.abs().reshape(-1).argsort(descending=True)[:count]] = True
        sparse.append(delta * kept.view_as(delta))
    weighted = torch.stack([delta * weight for delta, weight in zip(sparse, weights, strict=True)])
    agree = weighted.sign() == torch.where(weighted.sum(0) >= 0, 1, -1)
    divisor = (torch.tensor(weights, dtype=torch.float64).view(-1, *[1] * deltas[0].dim()) * agree).sum(0)
    return (weighted * agree).sum(0) / torch.where(divisor == 0, 1.0, divisor)


@pytest.mark.parametrize("density", [1.0, 0.3])
def test_a_merge_is_that_of_mergekit(density: float) -> None:
    base = drawn(0, torch.float64, size=90_000)
    tuned = tuned_of(base, 3, torch.float64)
    weights = [0.5, 0.3, 0.9]
    made = ckpt_surgeon.merge(base, *tuned, method="ties-mergekit", weights=weights, density=density)
    for key in base:
        mixed = mergekit_ties([one[key] - base[key] for one in tuned], weights, density)
        assert torch.allclose(made[key], base[key] + mixed, rtol=1e-12, atol=1e-12), key


@pytest.mark.parametrize("method", ["dare", "dare-ties-peft", "dare-ties-mergekit"])
def test_dare_keeps_a_seeded_random_part_and_the_mean(method: Any) -> None:
    base = {"w": torch.zeros(400_000), "v": torch.zeros(400_000)}
    tuned = {key: torch.ones(400_000) for key in base}
    made = ckpt_surgeon.merge(base, tuned, method=method, density=0.25, seed=7)
    assert set(made["w"].tolist()) == {0.0, 4.0}
    assert abs(float(made["w"].mean()) - 1) < 0.02
    assert not torch.equal(made["w"], made["v"])  # each tensor has its own
    same(ckpt_surgeon.merge(base, tuned, method=method, density=0.25, seed=7), made)


def test_the_output_does_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = drawn(0, size=3_000_000), drawn(1, size=3_000_000)
    many = ckpt_surgeon.merge(base, tuned, method="dare", density=0.5)
    monkeypatch.setattr("ckpt_surgeon.tensors.blocks._cores", lambda: range(1))
    same(ckpt_surgeon.merge(base, tuned, method="dare", density=0.5), many)


# -- whole runs, recipes


def test_an_average_of_a_run_needs_its_state_to_be_given_up(tmp_path: Path, ckpt: Run) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loss: torch.Tensor = model(torch.ones(1, 2)).sum()
    loss.backward()
    optimizer.step()
    last = saved(tmp_path / "last.ckpt", {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3})
    ran = ckpt("average", last, last, tmp_path / "out.ckpt", "--whole")
    assert ran.status == 2
    assert "no state fits" in ran.err
    ran = ckpt("average", last, last, tmp_path / "out.ckpt", "--whole", "--reset", "*")
    assert ran.status == 0, ran.err
    made = torch.load(tmp_path / "out.ckpt", weights_only=False)
    assert made["epoch"] == 3
    same(made["model"], model.state_dict())


def test_a_recipe_averages_all_of_its_inputs() -> None:
    recipe = ckpt_surgeon.Recipe.loads("inputs = ['a', 'b', 'c']\n[[edit]]\ndo = 'average'\nweights = [1, 1, 2]")
    states = [{"w": torch.full((2,), float(value))} for value in (0, 4, 2)]
    change = recipe.plan(*states)
    assert change.result["w"].tolist() == [2.0, 2.0]
    assert change.origins == {"w": ("w", "b::w", "c::w")}
