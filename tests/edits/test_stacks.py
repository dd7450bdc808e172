"""Stacks of tensors by pattern (experts), and joining all that a number tells apart, against torch and transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from command_line import Run
from hypothesis import given
from hypothesis import strategies as st
from tables import StateDict, assert_same, ramp, save_safetensors, save_zip

import ckpt_surgeon
from ckpt_surgeon import Checkpoint, EditError, KeyCollision, Recipe, concat, split, stack, step, unstack
from ckpt_surgeon.tensors.records import sequence_of
from ckpt_surgeon.tensors.stored import StoredTensor

EXPERTS = "l.{n}.experts.{e}.w"
STACKED = "l.{n}.experts.w"


def experts(layers: int = 2, count: int = 12, *shape: int) -> StateDict:
    """Keys in the order of their text, so that 10 stands before 2."""
    names = sorted(f"l.{n}.experts.{e}.w" for n in range(layers) for e in range(count))
    return {name: ramp(*(shape or (3, 2))) + 100 * index for index, name in enumerate(names)}


def of_layer(state: StateDict, n: int, count: int = 12) -> list[torch.Tensor]:
    return [state[f"l.{n}.experts.{e}.w"] for e in range(count)]


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
@pytest.mark.parametrize("save", [save_zip, save_safetensors])
def test_experts_are_stacked_in_the_order_of_their_numbers_at_any_dimension(
    tmp_path: Path, save: object, dim: int
) -> None:
    state = experts()
    wanted = {f"l.{n}.experts.w": torch.stack(of_layer(state, n), dim) for n in range(2)}
    assert_same(stack(state, [EXPERTS], STACKED, dim=dim), wanted)
    opened = ckpt_surgeon.open(save(state, tmp_path))  # type: ignore[operator]
    made = stack(opened, [EXPERTS], STACKED, dim=dim)
    for suffix, load in ((".pth", torch.load), (".safetensors", safetensors.torch.load_file)):
        ckpt_surgeon.save(made, tmp_path / f"out{suffix}")
        assert_same(load(tmp_path / f"out{suffix}"), wanted, order=False)
    assert_same(ckpt_surgeon.load(unstack(made, STACKED, [EXPERTS], dim=dim)), state, order=False)


def test_a_stack_of_stored_tensors_is_their_spans_and_a_part_of_one_is_a_view(tmp_path: Path) -> None:
    opened = ckpt_surgeon.open(save_safetensors(experts(1, 4), tmp_path))
    made = stack(opened, [EXPERTS], STACKED)
    parts = list(sequence_of(made["l.0.experts.w"]))
    assert [part.span for part in parts] == [opened[f"l.0.experts.{e}.w"].span for e in range(4)]
    ckpt_surgeon.save(made, tmp_path / "stacked.safetensors")
    back = unstack(ckpt_surgeon.open(tmp_path / "stacked.safetensors"), STACKED, [EXPERTS])
    assert all(isinstance(tensor, StoredTensor) and tensor.span for tensor in back.values())
    assert_same(ckpt_surgeon.load(back), experts(1, 4), order=False)


@st.composite
def stacks(draw: st.DrawFn) -> tuple[list[torch.Tensor], int]:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    dim = draw(st.integers(-len(shape) - 1, len(shape)))
    tensors = [ramp(*shape) + index for index in range(draw(st.integers(1, 4)))]
    return [tensor.t() if len(shape) == 2 else tensor for tensor in tensors], dim


@given(stacks())
def test_stacking_is_torch_stack_and_unstacking_is_torch_unbind(case: tuple[list[torch.Tensor], int]) -> None:
    tensors, dim = case
    state = {f"w{index}": tensor for index, tensor in enumerate(tensors)}
    for given_state in (state, ckpt_surgeon.from_torch(state)):
        made = stack(given_state, ["w{e}"], "all", dim=dim)
        loaded = ckpt_surgeon.load(made) if isinstance(made, Checkpoint) else made
        assert torch.equal(loaded["all"], torch.stack(tensors, dim))
        back = unstack(made, "all", ["w{e}"], dim=dim)
        loaded = ckpt_surgeon.load(back) if isinstance(back, Checkpoint) else back
        assert all(map(torch.equal, loaded.values(), torch.unbind(torch.stack(tensors, dim), dim)))


def test_a_stack_along_an_inner_dimension_of_narrow_rows_is_torch_s() -> None:
    state = {f"w{e}": ramp(500, 3).half() + e for e in range(5)}
    opened = ckpt_surgeon.from_torch(state)
    for dim in (1, 2):
        made = ckpt_surgeon.load(stack(opened, ["w{e}"], "w", dim=dim))
        assert torch.equal(made["w"], torch.stack(list(state.values()), dim))


@pytest.mark.parametrize("dim", [0, 1])
def test_a_number_that_the_result_does_not_have_means_all_of_them(tmp_path: Path, dim: int) -> None:
    state = experts()
    wanted = {f"l.{n}.experts.w": torch.cat(of_layer(state, n), dim) for n in range(2)}
    assert_same(concat(state, [EXPERTS], STACKED, dim=dim), wanted)
    ckpt_surgeon.save(concat(ckpt_surgeon.open(save_zip(state, tmp_path)), [EXPERTS], STACKED, dim=dim),
                      tmp_path / "out.pth")  # fmt: skip
    assert_same(torch.load(tmp_path / "out.pth"), wanted)
    back = split(wanted, STACKED, [EXPERTS], dim=dim, parts=12)
    assert_same(back, state, order=False)


def test_parts_of_stated_sizes_are_numbered() -> None:
    made = split({"w": ramp(6)}, "w", ["w.{i}"], sizes=[1, 2, 3])
    assert_same(made, {"w.0": ramp(6)[:1], "w.1": ramp(6)[1:3], "w.2": ramp(6)[3:]})
    made = split({"ab": ramp(4)}, "ab", ["a.{i}", "b.{i}"], parts=2)
    assert list(made) == ["a.0", "a.1", "b.0", "b.1"]
    assert_same(concat(made, ["a.{i}", "b.{i}"], "ab"), {"ab": ramp(4)})


def test_several_templates_come_one_after_the_other() -> None:
    state = {"shared.w": ramp(1, 2), "e.1.w": ramp(1, 2) + 1, "e.0.w": ramp(1, 2) + 2}
    made = concat(state, ["shared.w", "e.{e}.w"], "all.w")
    assert_same(made, {"all.w": torch.cat([state["shared.w"], state["e.0.w"], state["e.1.w"]])})


def test_names_with_leading_zeros_and_two_numbers_are_put_in_order() -> None:
    state = {f"b.{a:02d}.{b}.w": torch.tensor([a, b]) for a in (1, 0) for b in (2, 1, 0)}
    made = stack(state, ["b.{a}.{b}.w"], "w")
    assert made["w"].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


def test_gaps_shapes_and_dtypes_are_named_all_at_once() -> None:
    state = experts(3, 4)
    del state["l.0.experts.2.w"], state["l.1.experts.3.w"]
    with pytest.raises(EditError) as raised:
        stack(state, [EXPERTS], STACKED)
    assert raised.value.problems == (
        "'l.0.experts.2.w', wanted beside 'l.0.experts.0.w', is not there",
        "'l.1.experts.3.w', wanted beside 'l.1.experts.0.w', is not there",
    )
    state = experts(2, 3)
    state["l.0.experts.1.w"] = ramp(2, 3)
    state["l.1.experts.2.w"] = ramp(3, 2).half()
    with pytest.raises(EditError) as raised:
        stack(state, [EXPERTS], STACKED)
    text = str(raised.value)
    assert "'l.0.experts.1.w' (float32 [2, 3]) does not stack with 'l.0.experts.0.w' (float32 [3, 2])" in text
    assert "'l.1.experts.2.w' (float16 [3, 2])" in text
    with pytest.raises(EditError, match="have one number"):
        stack({"e.1.w": ramp(2), "e.01.w": ramp(2)}, ["e.{e}.w"], "w")


def test_what_cannot_be_stacked_or_taken_apart_is_refused() -> None:
    with pytest.raises(EditError, match="no new dimension 3"):
        stack({"w.0": ramp(2, 2)}, ["w.{e}"], "w", dim=3)
    with pytest.raises(KeyCollision):
        stack({"w.0": ramp(2), "w": ramp(3)}, ["w.{e}"], "w")
    with pytest.raises(EditError, match="is split is open: give parts"):
        split({"w": ramp(4)}, "w", ["w.{e}"])
    with pytest.raises(EditError, match="3 parts of 'w', but 2 new keys"):
        split({"w": ramp(4)}, "w", ["a", "b"], parts=3)
    with pytest.raises(EditError, match="has 4 indices in dimension 0, but 3 new keys"):
        unstack({"w": ramp(4)}, "w", ["a", "b", "c"])
    with pytest.raises(EditError, match="has no dimension 0"):
        unstack({"w": torch.tensor(1.0)}, "w", ["w.{e}"])
    sparse = torch.eye(2).to_sparse()
    with pytest.raises(EditError, match="no plain tensor"):
        stack({"w.0": sparse, "w.1": sparse}, ["w.{e}"], "w")


def test_tied_experts_and_versions_follow() -> None:
    layers = torch.nn.ModuleDict({"experts": torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))})
    made = stack(layers.state_dict(), ["experts.{e}.*"], "experts.*")
    assert list(made) == ["experts.weight", "experts.bias"]
    assert sorted(made._metadata) == ["", "experts"]  # type: ignore[attr-defined]


def test_the_experts_of_mixtral_become_those_that_transformers_stacks(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(**sizes, num_key_value_heads=1, num_local_experts=11, vocab_size=10)
    model = MixtralForCausalLM(config)
    model.save_pretrained(tmp_path / "published")  # under the names of the published files, a key for each expert
    [file] = (tmp_path / "published").glob("*.safetensors")
    moe = "model.layers.{n}.block_sparse_moe.experts.{e}"
    experts = "model.layers.{n}.mlp.experts"
    recipe = Recipe(
        (
            step("concat", sources=[f"{moe}.w1.weight", f"{moe}.w3.weight"], into=f"{moe}.w13.weight"),
            step("stack", sources=[f"{moe}.w13.weight"], into=f"{experts}.gate_up_proj"),
            step("stack", sources=[f"{moe}.w2.weight"], into=f"{experts}.down_proj"),
            step("rename", pairs=["block_sparse_moe=mlp"]),
        )
    )
    wanted = dict(model.state_dict())
    assert_same(ckpt_surgeon.load(recipe.apply(ckpt_surgeon.open(file))), wanted, order=False)


def test_the_command_stacks_and_takes_apart(ckpt: Run, tmp_path: Path) -> None:
    state = experts()
    path, stacked, back = tmp_path / "model.pth", tmp_path / "stacked.safetensors", tmp_path / "back.pth"
    torch.save(state, path)
    ran = ckpt("stack", path, stacked, "--sources", EXPERTS, "--into", STACKED, "--dim", "1")
    assert ran.status == 0, ran.err
    assert safetensors.torch.load_file(stacked)["l.0.experts.w"].shape == (3, 12, 2)
    ran = ckpt("edit", stacked, back, "--unstack", f"{STACKED}={EXPERTS} dim=1")
    assert ran.status == 0, ran.err
    assert_same(torch.load(back), state, order=False)
    ran = ckpt("split", stacked, back, "-f", "--source", STACKED, "--into", "l.{n}.experts.{e}.w", "--dim", "1")
    assert ran.status == 2
    assert "give --parts" in ran.err


def test_an_optimizer_follows_a_stack(ckpt: Run, tmp_path: Path) -> None:
    net = torch.nn.ModuleDict({"e": torch.nn.ModuleList(torch.nn.Linear(2, 2, bias=False) for _ in range(3))})
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    sum(layer(torch.ones(2)).sum() for layer in net["e"]).backward()  # type: ignore[attr-defined]
    optimizer.step()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 1}, tmp_path / "run.pth")
    ran = ckpt("stack", tmp_path / "run.pth", tmp_path / "out.pth", "--sources", "e.{e}.weight", "--into", "e.weight",
               "--whole")  # fmt: skip
    assert ran.status == 0, ran.err
    made = torch.load(tmp_path / "out.pth")
    moments = [state["exp_avg"] for state in optimizer.state_dict()["state"].values()]
    assert torch.equal(made["optimizer"]["state"][0]["exp_avg"], torch.stack(moments))
    assert json.dumps(made["optimizer"]["param_groups"][0]["params"]) == "[0]"


def test_a_stack_that_begins_late_is_made_and_says_so() -> None:
    change = stack.plan({f"e.{e}.w": ramp(2) for e in (64, 65)}, ["e.{e}.w"], "w")
    assert change.result["w"].shape == (2, 2)
    assert change.notes == ("e.{e}.w: the least {e} is 64; those before it are not in this checkpoint",)
    assert stack.plan({f"e.{e}.w": ramp(2) for e in (1, 2)}, ["e.{e}.w"], "w").notes == ()
