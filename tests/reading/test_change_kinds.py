"""What a change of values is called: made by torch on purpose, and named for what it is, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import Run

import ckpt_surgeon
from ckpt_surgeon import EditError, NothingMatched
from ckpt_surgeon.reading.comparing import Changed, compare
from ckpt_surgeon.report.values import layers


def changed(a: torch.Tensor, b: torch.Tensor, *, spectra: bool = False, key: str = "w") -> Changed:
    [found] = compare({key: a}, {key: b}, spectra=spectra).changed
    return found


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_is_named_in_both_directions(dtype: torch.dtype) -> None:
    w = drawn(20, 30)
    assert changed(w, w.to(dtype)).kind == "cast"
    assert changed(w.to(dtype), w).kind == "cast"
    assert changed(w, (w + drawn(30, 20).T * 0.1).to(dtype)).kind == "all"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [0.5, -2.0, 0.3])
def test_a_factor_is_named_where_it_explains_the_change(dtype: torch.dtype, factor: float) -> None:
    w = drawn(40, 40, dtype=dtype)
    kind = changed(w, w * factor).kind
    assert kind.startswith("scaled by ")
    assert float(kind.removeprefix("scaled by ")) == pytest.approx(factor, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3])
def test_small_noise_is_no_factor(dtype: torch.dtype, size: float) -> None:
    w = drawn(40, 40, dtype=torch.float32)
    noise = torch.randn(40, 40, generator=torch.Generator().manual_seed(1)) * size
    assert changed(w.to(dtype), (w + noise).to(dtype)).kind in ("all", "sparse, 1 of 1,600 elements")


def test_few_elements_are_counted() -> None:
    w = drawn(40, 40)
    other = w.clone()
    other[3, 4] += 1
    other[5, 6] -= 1
    assert changed(w, other).kind == "sparse, 2 of 1,600 elements"
    assert changed(w, w + 1).kind == "all"


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_the_rank_of_a_low_rank_change_is_named_on_request(rank: int) -> None:
    w, a, b = drawn(64, 48), drawn(64, rank), drawn(48, rank).flip(0)
    assert changed(w, w + a @ b.T).kind == "all"
    assert changed(w, w + a @ b.T, spectra=True).kind == f"low-rank, rank {rank}"
    conv = changed(w.reshape(64, 12, 2, 2), (w + a @ b.T).reshape(64, 12, 2, 2), spectra=True)
    assert conv.kind == f"low-rank, rank {rank}"


def test_a_change_of_full_rank_is_not_called_low() -> None:
    w = drawn(64, 48)
    assert changed(w, w + drawn(48, 64).T.contiguous() * 0.1, spectra=True).kind == "all"


def test_stable_and_effective_rank_are_those_of_torch_s_singular_values() -> None:
    w, gap = drawn(30, 20), drawn(20, 30).T.contiguous()
    found = changed(w.double(), w.double() + gap.double(), spectra=True).spectrum
    assert found is not None
    values = torch.linalg.svdvals(gap.double())
    shares = values / values.sum()
    assert found.values == pytest.approx(values[:8].tolist())
    assert found.stable == pytest.approx(float(values.square().sum() / values[0] ** 2))
    assert found.effective == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())))
    assert (found.rank, found.full) == (20, 20)


def test_vectors_and_what_is_not_finite_have_no_spectrum() -> None:
    assert changed(torch.ones(4), torch.ones(4) * 3, spectra=True).spectrum is None
    broken = torch.ones(4, 4)
    broken[0, 0] = float("nan")
    assert changed(torch.ones(4, 4), broken, spectra=True).spectrum is None


# -- buffers, order, tolerance, patterns


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small model before and after some steps."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 2, 1))
    torch.save(net.state_dict(), "before.pth")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(2, 3, 4, 4)).square().mean().backward()
        optimizer.step()
    torch.save(net.state_dict(), "after.pth")
    return tmp_path


def test_buffers_are_listed_apart_below_the_parameters(trained: Path, ckpt: Run) -> None:
    out = ckpt("diff", "before.pth", "after.pth", "--values").out
    above, apart, below = out.partition("buffers changed, the most first:")
    assert apart
    assert "num_batches_tracked" not in above
    assert all(name in below for name in ("1.num_batches_tracked", "1.running_mean", "1.running_var"))
    assert "0.weight" in above
    assert "█" in above


@pytest.mark.parametrize(("sort", "measure"), [("rel", "relative"), ("abs", "max_abs"), ("cos", "cosine")])
def test_the_order_is_the_one_that_was_asked_for(sort: str, measure: str, trained: Path, ckpt: Run) -> None:
    found = json.loads(ckpt("diff", "before.pth", "after.pth", "--values", "--sort", sort, "--json").out)["changed"]
    for buffers in (False, True):
        values = [one[measure] for one in found if one["buffer"] == buffers]
        finite = [value for value in values if value is not None]
        assert finite == sorted(finite, reverse=sort != "cos")
    assert [one["buffer"] for one in found] == sorted(one["buffer"] for one in found)


def test_layers_sum_up_what_torch_sums_up(trained: Path, ckpt: Run) -> None:
    before, after = torch.load("before.pth"), torch.load("after.pth")
    found = layers(one for one in compare("before.pth", "after.pth").changed if not one.is_buffer)
    for name in ("2",):
        a, b = (
            torch.cat([one[f"{name}.{leaf}"].flatten() for leaf in ("weight", "bias")]).double()
            for one in (before, after)
        )
        assert found[name].keys == 2
        assert found[name].relative == pytest.approx(float((a - b).norm() / a.norm()))
        assert found[name].cosine == pytest.approx(float(a @ b / a.norm() / b.norm()))
    out = ckpt("diff", "before.pth", "after.pth", "--values", "--by", "layer").out
    assert "changed, by layer:" in out


def test_patterns_choose_what_is_compared(trained: Path, ckpt: Run) -> None:
    found = json.loads(ckpt("diff", "before.pth", "after.pth", "2.*", "--values", "--json").out)
    assert {one["name"] for one in found["changed"]} == {"2.weight", "2.bias"}
    assert ckpt("diff", "before.pth", "after.pth", "head.*", "--values").status == 2
    with pytest.raises(NothingMatched):
        compare("before.pth", "after.pth", "head.*")


def test_a_relative_tolerance_is_of_the_norm(trained: Path, ckpt: Run) -> None:
    a = drawn(10, 10)
    relative = float(((a * 1.001) - a).norm() / a.norm())
    assert compare({"w": a}, {"w": a * 1.001}, relative_tolerance=relative * 1.01).same
    assert not compare({"w": a}, {"w": a * 1.001}, relative_tolerance=relative * 0.99).same
    assert ckpt("diff", "before.pth", "after.pth", "*.weight", "--values", "--relative-tolerance", "10").status == 0


def test_options_of_values_are_refused_without_values_and_a_bad_order_is_named(trained: Path, ckpt: Run) -> None:
    for words in (["--sort", "abs"], ["--by", "layer"], ["--spectrum"], ["--relative-tolerance", "1"], ["0.*"]):
        ran = ckpt("diff", "before.pth", "after.pth", *words)
        assert (ran.status, "go with --values" in ran.err) == (2, True)
    with pytest.raises(EditError, match="sort is rel, abs or cos, not 'size'"):
        ckpt_surgeon.compare("before.pth", "after.pth", sort="size")


def test_a_cast_is_shown_with_both_dtypes_in_one_column(tmp_path: Path, ckpt: Run) -> None:
    torch.save({"w": drawn(4, 4)}, tmp_path / "a.pth")
    torch.save({"w": drawn(4, 4).bfloat16()}, tmp_path / "b.pth")
    out = ckpt("diff", tmp_path / "a.pth", tmp_path / "b.pth", "--values").out
    assert "cast (float32 and bfloat16)" in out
    assert out.count("bfloat16") == 1
