"""Edits of several checkpoints: how inputs are named, join, graft, and recipes that name their inputs."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Run
from safetensors.torch import load_file, save_file

import ckpt_surgeon
from ckpt_surgeon import Checkpoint, EditError, KeyCollision, NothingMatched, Recipe, RecipeError
from ckpt_surgeon.edits.inputs import union
from ckpt_surgeon.errors import CheckpointError

StateDict = dict[str, torch.Tensor]


def state(*keys: str, value: float = 1.0) -> StateDict:
    return {key: torch.full((2, 3), value) for key in keys}


def saved(path: Path, state_dict: object) -> Path:
    torch.save(state_dict, path)
    return path


# -- the grammar


def test_a_key_of_another_input_has_its_name_in_front() -> None:
    whole = union(ckpt_surgeon.from_torch(state("w")), {"donor": ckpt_surgeon.from_torch(state("w", "fc.w"))})
    assert list(whole) == ["w", "donor::w", "donor::fc.w"]


def test_a_key_that_looks_like_one_of_another_input_is_refused() -> None:
    with pytest.raises(EditError, match=r"'donor::w' looks like a key of another input"):
        ckpt_surgeon.graft(state("donor::w"), state("w"), "*")


def test_colons_in_keys_stay_what_they_are_where_no_input_has_that_name() -> None:
    assert list(ckpt_surgeon.join(state("at::w"), state("b"))) == ["at::w", "b"]
    assert list(Recipe((ckpt_surgeon.step("drop", patterns="at::w"),)).apply(state("at::w", "b"))) == ["b"]


# -- join


def test_join_is_the_union_and_untouched_tensors_are_the_same_objects() -> None:
    first, second, third = state("a"), state("b"), state("c")
    made = ckpt_surgeon.join(first, second, third)
    assert list(made) == ["a", "b", "c"]
    assert made["a"] is first["a"]
    assert made["c"] is third["c"]


def test_a_key_that_two_files_have_is_an_error_that_names_both(tmp_path: Path, ckpt: Run) -> None:
    one, two = saved(tmp_path / "one.pth", state("w")), saved(tmp_path / "two.pth", state("w", value=2))
    ran = ckpt("join", one, two, tmp_path / "out.pth")
    assert ran.status == 2
    assert f"w of {one}" in ran.err
    assert f"w of {two}" in ran.err
    assert "--on-collision" in ran.err
    for word, value in (("first", 1), ("last", 2)):
        assert ckpt("join", one, two, tmp_path / f"{word}.pth", "--on-collision", word).status == 0
        assert torch.load(tmp_path / f"{word}.pth")["w"][0, 0] == value
    with pytest.raises(KeyCollision):
        ckpt_surgeon.join(ckpt_surgeon.open(one), two)


def test_each_input_is_chosen_stripped_and_prefixed_by_itself(tmp_path: Path, ckpt: Run) -> None:
    one = saved(tmp_path / "one.pth", state("module.w", "module.skip"))
    two = saved(tmp_path / "two.pth", state("net.w", "net.skip"))
    out = tmp_path / "out.pth"
    words = ["--take", "1::module.w", "--take", "2::net.*", "--strip", "module.", "--strip", "2::net."]
    ran = ckpt("join", one, two, out, *words, "--prefixes", "unet.,")
    assert ran.status == 0, ran.err
    assert list(torch.load(out)) == ["unet.w", "w", "skip"]
    assert f"not taken of {one}: 1 key" in ran.out


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--strip", "2::module."], "prefix '2::module.' matches no key"),
        (["--take", "nothing.*"], "pattern 'nothing.*' matches no key"),
        (["--prefixes", "a."], "2 checkpoints need 2 prefixes, given were 1"),
    ],
)
def test_what_chooses_nothing_is_an_error(options: list[str], problem: str, tmp_path: Path, ckpt: Run) -> None:
    one, two = saved(tmp_path / "one.pth", state("module.a")), saved(tmp_path / "two.pth", state("b"))
    ran = ckpt("join", one, two, tmp_path / "out.pth", *options)
    assert ran.status == 2
    assert problem in ran.err


def test_versions_of_modules_come_along_from_every_input() -> None:
    first = torch.nn.Sequential(OrderedDict(conv=torch.nn.Conv2d(1, 1, 1), norm=torch.nn.BatchNorm2d(1)))
    second = torch.nn.ModuleDict({"module": torch.nn.Sequential(OrderedDict(bn=torch.nn.BatchNorm1d(2)))})
    made: Any = ckpt_surgeon.join(first.state_dict(), second.state_dict(), strip="module.")
    assert made._metadata["norm"] == {"version": 2}
    assert made._metadata["bn"] == {"version": 2}
    assert not [path for path in made._metadata if "::" in path]


def test_ranks_are_joined_by_rule_and_replicas_are_compared(tmp_path: Path, ckpt: Run) -> None:
    whole = {"embed": torch.randn(8, 4), "l.up": torch.randn(6, 4), "l.down": torch.randn(4, 6), "norm": torch.randn(4)}
    padded = torch.cat([whole["embed"], torch.zeros(2, 4)])
    ranks = [
        {"embed": padded[5 * rank : 5 * rank + 5].clone(), "l.up": whole["l.up"][3 * rank : 3 * rank + 3].clone(),
         "l.down": whole["l.down"][:, 3 * rank : 3 * rank + 3].clone(), "norm": whole["norm"].clone()}
        for rank in range(2)
    ]  # fmt: skip
    one, two = (saved(tmp_path / f"rank{index}.pth", rank) for index, rank in enumerate(ranks))
    rules = ["--concat", "embed", 0, "--concat", r".*\.up", 0, "--concat", r".*\.down", 1, "--rows", "embed", 8]
    assert ckpt("join", one, two, tmp_path / "out.pth", *rules).status == 0
    made = torch.load(tmp_path / "out.pth")
    assert list(made) == list(whole)
    assert all(torch.equal(made[key], whole[key]) for key in whole)
    ranks[1]["norm"][2] += 1
    saved(two, ranks[1])
    ran = ckpt("join", one, two, tmp_path / "other.pth", *rules)
    assert ran.status == 2
    assert "'norm' is not the same in all ranks" in ran.err
    assert not (tmp_path / "other.pth").exists()
    ran = ckpt("join", one, two, tmp_path / "other.pth", "--concat", "embed", 0, "--concat", "nothing", 0)
    assert ran.status == 2
    assert "'nothing' matches no key" in ran.err


def test_a_union_reads_and_writes_lazily(tmp_path: Path) -> None:
    save_file(state("a"), tmp_path / "a.safetensors")
    save_file(state("b"), tmp_path / "b.safetensors")
    made = ckpt_surgeon.join(ckpt_surgeon.open(tmp_path / "a.safetensors"), tmp_path / "b.safetensors")
    assert isinstance(made, Checkpoint)
    assert all(tensor.span is not None for tensor in made.values())  # bytes that are copied, not read
    ckpt_surgeon.save(made, tmp_path / "out.safetensors")
    assert list(load_file(tmp_path / "out.safetensors")) == ["a", "b"]


# -- graft


def test_a_graft_replaces_what_is_there_and_adds_what_is_not() -> None:
    model, donor = state("conv.w", "fc.w"), state("head.w", "head.extra", value=7)
    change = ckpt_surgeon.graft.plan(model, donor, "head.*", as_={"head": "fc"})
    assert list(change.result) == ["conv.w", "fc.w", "fc.extra"]
    assert change.result["fc.w"] is donor["head.w"]
    assert change.origins["fc.w"] == ("donor::head.w",)
    assert change.dropped == ("fc.w",)
    assert change.taken == 2
    assert "of input donor: 2 keys, 1 in place of others, 1 new" in change.notes


def test_another_shape_is_refused_with_both_shapes_and_the_way_on() -> None:
    model, donor = state("fc.w"), {"fc.w": torch.zeros(5, 3)}
    with pytest.raises(EditError, match=r"'fc.w' is \[2, 3\] here and \[5, 3\] in input donor.*any_shape"):
        ckpt_surgeon.graft(model, donor, "fc.*")
    assert ckpt_surgeon.graft(model, donor, "fc.*", any_shape=True)["fc.w"].shape == (5, 3)


def test_a_graft_says_when_it_unties() -> None:
    weight = torch.zeros(2, 3)
    change = ckpt_surgeon.graft.plan({"embed.w": weight, "head.w": weight}, state("head.w"), "head.w")
    assert any("no longer tied" in note and "embed.w" in note for note in change.notes)


def test_codes_are_not_grafted_without_their_scales() -> None:
    donor = {"fc.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "fc.weight_scale_inv": torch.ones(1, 1)}
    change = ckpt_surgeon.graft.plan({"fc.weight": torch.zeros(4, 4)}, donor, "fc.*")
    assert set(change.result) == {"fc.weight", "fc.weight_scale_inv"}
    alone = ckpt_surgeon.graft.plan({"fc.weight": torch.zeros(4, 4)}, donor, "fc.weight")
    assert any("scales are no longer beside them" in note for note in alone.notes)


def test_a_pattern_or_a_rename_that_takes_nothing_is_an_error() -> None:
    with pytest.raises(NothingMatched, match=r"pattern 'x\.\*'"):
        ckpt_surgeon.graft(state("w"), state("w"), "x.*")
    with pytest.raises(NothingMatched, match="rename"):
        ckpt_surgeon.graft(state("w"), state("w"), "w", as_=["x=y"])


@pytest.mark.parametrize("kind", ["path", "checkpoint", "state_dict", "module"])
def test_another_checkpoint_is_whatever_holds_one(kind: str, tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    path = saved(tmp_path / "donor.pth", module.state_dict())
    donors: dict[str, Any] = {
        "path": path, "checkpoint": ckpt_surgeon.open(path), "state_dict": module.state_dict(), "module": module,
    }  # fmt: skip
    made = ckpt_surgeon.graft(state("weight"), donors[kind], "weight")["weight"]
    assert torch.equal(made, module.weight)
    record: Any = ckpt_surgeon.graft(ckpt_surgeon.from_torch(state("weight")), donors[kind], "weight")["weight"]
    assert torch.equal(record.load(), module.weight)
    with pytest.raises(CheckpointError, match="int is no checkpoint"):
        ckpt_surgeon.graft(state("weight"), 3, "weight")  # type: ignore[arg-type]


def test_what_is_grafted_into_a_whole_run_starts_without_state_and_the_rest_goes_on(tmp_path: Path, ckpt: Run) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    loss: torch.Tensor = model(torch.randn(2, 3)).sum()
    loss.backward()
    optimizer.step()
    last = saved(tmp_path / "last.ckpt", {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3})
    donor = saved(tmp_path / "donor.pth", {"fc.weight": torch.zeros(2, 4), "fc.bias": torch.zeros(2)})
    out = tmp_path / "out.ckpt"
    ran = ckpt("graft", last, donor, out, "--take", "fc.*", "--as", "fc=1", "--whole")
    assert ran.status == 0, ran.err
    made = torch.load(out, weights_only=False)
    assert made["epoch"] == 3
    other = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    other.load_state_dict(made["model"])
    assert torch.equal(made["model"]["1.weight"], torch.zeros(2, 4))
    again = torch.optim.AdamW(other.parameters(), lr=0.1)
    again.load_state_dict(made["optimizer"])
    kept = list(other[0].parameters())
    assert all(torch.equal(again.state[mine]["exp_avg"], optimizer.state[was]["exp_avg"])
               for mine, was in zip(kept, model[0].parameters(), strict=True))  # fmt: skip
    assert not any(again.state.get(new) for new in other[1].parameters())


# -- recipes


NAMED = """
inputs = ['base', 'donor']

[[edit]]
do = 'strip-prefix'
prefix = 'donor::module.'

[[edit]]
do = 'graft'
donor = 'donor'
take = 'fc.*'

[[edit]]
do = 'add-prefix'
prefix = 'model.'
"""


def test_a_recipe_names_its_inputs_and_its_steps_say_which_they_edit(tmp_path: Path, ckpt: Run) -> None:
    base, donor = state("conv.w", "fc.w"), state("module.fc.w", value=3)
    recipe = Recipe.loads(NAMED)
    assert Recipe.loads(recipe.dumps()) == recipe
    change = recipe.plan(base, donor)
    assert list(change.result) == ["model.conv.w", "model.fc.w"]
    assert change.origins == {"model.conv.w": ("conv.w",), "model.fc.w": ("donor::module.fc.w",)}
    assert change.result["model.fc.w"] is donor["module.fc.w"]
    (tmp_path / "recipe.toml").write_text(NAMED)
    one, two = saved(tmp_path / "base.pth", base), saved(tmp_path / "donor.pth", donor)
    ran = ckpt("apply", tmp_path / "recipe.toml", one, two, tmp_path / "out.pth")
    assert ran.status == 0, ran.err
    assert torch.load(tmp_path / "out.pth")["model.fc.w"][0, 0] == 3
    ran = ckpt("apply", tmp_path / "recipe.toml", one, tmp_path / "out2.pth")
    assert ran.status == 2
    assert "the recipe takes 2 checkpoints (base, donor), given were 1" in ran.err


def test_numbers_name_the_inputs_of_a_command(tmp_path: Path, ckpt: Run) -> None:
    one = saved(tmp_path / "base.pth", state("conv.w", "fc.w"))
    two = saved(tmp_path / "donor.pth", {"ema": state("module.fc.w", value=3), "net": state("module.fc.w", value=4)})
    words = ["--select", "2::ema", "--strip-prefix", "2::module.", "--graft", "fc.*"]
    ran = ckpt("edit", one, two, tmp_path / "out.pth", *words)
    assert ran.status == 0, ran.err
    assert torch.load(tmp_path / "out.pth")["fc.w"][0, 0] == 3


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("inputs = 'base'", "line 1: inputs is a list of names"),
        ("inputs = ['a', 'a']", "line 1: two inputs have one name"),
        ("inputs = ['a b']", "line 1: inputs is a list of names"),
    ],
)
def test_names_of_inputs_that_cannot_be_are_an_error_with_the_line(text: str, problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        Recipe.loads(text)


def test_a_step_that_names_keys_of_two_inputs_or_an_unknown_input_is_refused() -> None:
    two = Recipe.loads("inputs = ['a', 'b', 'c']\n[[edit]]\ndo = 'drop'\npatterns = ['b::x', 'c::y']")
    with pytest.raises(EditError, match="b and c are two inputs"):
        two.plan(state("w"), state("x"), state("y"))
    unknown = Recipe.loads("inputs = ['a', 'b']\n[[edit]]\ndo = 'graft'\ndonor = 'd'\ntake = '*'")
    with pytest.raises(EditError, match="graft names the input 'd'"):
        unknown.plan(state("w"), state("x"))
