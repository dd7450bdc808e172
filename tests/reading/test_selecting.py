"""Which dict of tensors in a file is the model: real training checkpoints, and files made to confuse."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from command_line import Run
from tables import assert_same, ramp, rewritten, save_zip

import ckpt_surgeon
from ckpt_surgeon import CheckpointError, FileError, NotACheckpoint, SelectionError


def weights(*, bias: float = 0.0) -> dict[str, torch.Tensor]:
    return {"fc.weight": ramp(3, 4), "fc.bias": ramp(3) + bias}


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model after a step of Adam, whose state is twice the size of the model."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


# -- one state_dict


@pytest.mark.parametrize(
    "name",
    [
        "state_dict", "model", "model_state_dict", "model_state", "module", "net", "network", "ema", "ema_state_dict",
        "weights", "params", "params_ema", "model_ema", "teacher", "student", "generator", "G", "netG", "net_g", "swa",
        "encoder", "anything",
    ],
)  # fmt: skip
def test_the_state_dict_in_a_training_checkpoint_is_found(name: str, tmp_path: Path) -> None:
    model, optimizer = trained()
    path = save_zip({"epoch": 3, "optimizer": optimizer.state_dict(), name: model.state_dict()}, tmp_path)
    opened = ckpt_surgeon.open(path)
    assert opened.selected == name
    assert_same(ckpt_surgeon.load(opened), model.state_dict())
    assert opened.versions == dict(model.state_dict()._metadata)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "path", ["model.state_dict", "state.model.module", "checkpoint.net.params", "a.b.c.d", "trainer.model"]
)
def test_a_nested_state_dict_is_found(path: str, tmp_path: Path) -> None:
    inner: object = weights()
    for name in reversed(path.split(".")):
        inner = {name: inner, "note": "training"}
    opened = ckpt_surgeon.open(save_zip(inner, tmp_path))
    assert opened.selected == path
    assert_same(ckpt_surgeon.load(opened), weights())


@pytest.mark.parametrize("name", ["optimizer", "optim", "optimizer_state_dict", "opt", "d_optimizer", "state", "x"])
def test_the_state_of_an_optimizer_is_never_taken_for_weights(name: str, tmp_path: Path) -> None:
    model, optimizer = trained()
    path = save_zip({name: optimizer.state_dict(), "weights": model.state_dict()}, tmp_path)
    assert_same(ckpt_surgeon.load(path), model.state_dict())


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_file_of_optimizer_state_alone_opens_and_has_no_weights(wrapped: bool, tmp_path: Path) -> None:
    _, optimizer = trained()
    state: object = optimizer.state_dict()
    path = save_zip({"optimizer": state, "epoch": 1} if wrapped else state, tmp_path)
    opened = ckpt_surgeon.open(path)
    assert opened.part.startswith("training state alone, the state of an optimizer")
    with pytest.raises(FileError, match="has no weights"):
        ckpt_surgeon.convert(opened, tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


def test_optimizer_states_without_param_groups_are_known_by_their_name(tmp_path: Path) -> None:
    state = {"optimizer": {0: {"exp_avg": ramp(4)}}, "lr_scheduler": {"last": ramp(2)}, "model": weights()}
    assert_same(ckpt_surgeon.load(save_zip(state, tmp_path)), weights())


def test_schedulers_scalers_and_random_states_are_left_out_and_named(tmp_path: Path) -> None:
    model, optimizer = trained()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": {"scale": torch.tensor(2.0)},
        "rng_state": torch.get_rng_state(),
        "random": {"torch": torch.get_rng_state()},
        "epoch": 12,
        "classes": ["cat", "dog"],
    }
    opened = ckpt_surgeon.open(save_zip(state, tmp_path))
    assert_same(ckpt_surgeon.load(opened), model.state_dict())
    assert [left.path for left in opened.left_out] == [key for key in state if key != "model"]
    told = {left.path: left.what for left in opened.left_out}
    assert told["epoch"] == "int 12"
    assert told["classes"] == "list of 2"
    assert told["optimizer"].startswith("training state")
    sizes = {left.path: left.nbytes for left in opened.left_out}
    assert sizes["optimizer"] > opened.nbytes


def test_numbers_kept_as_tensors_beside_the_model_are_no_weights(tmp_path: Path) -> None:
    state = {"best_acc": torch.tensor(0.9), "epoch": torch.tensor(7), "net": weights()}
    opened = ckpt_surgeon.open(save_zip(state, tmp_path))
    assert opened.selected == "net"
    assert list(opened) == list(weights())
    assert [left.path for left in opened.left_out] == ["best_acc", "epoch"]


def test_numbers_kept_as_tensors_beside_a_dict_of_any_name_are_no_weights(tmp_path: Path) -> None:
    opened = ckpt_surgeon.open(save_zip({"best_acc": torch.tensor(0.9), "resnet": weights()}, tmp_path))
    assert opened.selected == "resnet"


def test_tensors_with_elements_beside_a_dict_are_weights(tmp_path: Path) -> None:
    opened = ckpt_surgeon.open(save_zip({"pos_embed": ramp(2, 3), "blocks": weights()}, tmp_path))
    assert list(opened) == ["pos_embed", "blocks.fc.weight", "blocks.fc.bias"]


def test_a_state_dict_in_parts_is_one_with_dotted_keys(tmp_path: Path) -> None:
    state = {"backbone": {"conv": {"weight": ramp(2)}, "bn.bias": ramp(1)}, "head": weights(), "epoch": 3}
    opened = ckpt_surgeon.open(save_zip(state, tmp_path))
    assert opened.selected == ""
    assert list(opened) == ["backbone.conv.weight", "backbone.bn.bias", "head.fc.weight", "head.fc.bias"]


def test_the_versions_of_parts_get_the_names_of_the_parts(tmp_path: Path) -> None:
    model, _ = trained()
    opened = ckpt_surgeon.open(save_zip({"backbone": model.state_dict(), "head": weights()}, tmp_path))
    assert opened.versions is not None
    assert opened.versions["backbone.1"] == {"version": 2}
    assert "backbone" in opened.versions


def test_a_state_dict_whose_keys_begin_like_a_model_is_one_state_dict(tmp_path: Path) -> None:
    state = {"model.fc.weight": ramp(2), "ema.fc.weight": ramp(2), "optimizer.bias": ramp(1)}
    assert list(ckpt_surgeon.open(save_zip(state, tmp_path))) == list(state)


def test_a_list_of_tensors_has_their_numbers_for_keys(tmp_path: Path) -> None:
    assert_same(ckpt_surgeon.load(save_zip([ramp(2), ramp(3)], tmp_path)), {"0": ramp(2), "1": ramp(3)})


def test_keys_that_are_numbers_become_strings(tmp_path: Path) -> None:
    assert list(ckpt_surgeon.open(save_zip({0: ramp(2), 1: ramp(3)}, tmp_path))) == ["0", "1"]


def test_two_keys_that_become_one_string_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SelectionError, match="two tensors are called '1'"):
        ckpt_surgeon.open(save_zip({1: ramp(2), "1": ramp(3)}, tmp_path))


def test_a_bare_tensor_has_a_key(tmp_path: Path) -> None:
    assert_same(ckpt_surgeon.load(save_zip(ramp(2, 2).t(), tmp_path)), {"tensor": ramp(2, 2).t()}, strides=True)


def test_an_extra_state_is_a_key_like_any_other(tmp_path: Path) -> None:
    opened = ckpt_surgeon.open(save_zip({**weights(), "fc._extra_state": {"version": 2}}, tmp_path))
    assert list(opened) == [*weights(), "fc._extra_state"]
    assert opened.left_out == ()


# -- several


TWO: dict[str, Mapping[str, object]] = {
    "raw and EMA": {"model": weights(), "ema": weights(bias=1)},
    "generator and discriminator": {"netG": weights(), "netD": {"conv.weight": ramp(5)}, "epoch": 3},
    "by state_dict": {"G_state_dict": weights(), "D_state_dict": weights(bias=1)},
    "short": {"g_ema": weights(), "g": weights(bias=1), "d": weights(bias=2)},
    "nested": {"models": 3, "state": {"model": weights(), "model_ema": weights(bias=1)}},
}


@pytest.mark.parametrize("name", TWO)
def test_several_models_are_all_listed_under_their_full_paths(name: str, tmp_path: Path) -> None:
    path = save_zip(TWO[name], tmp_path)
    within, root = ("state.", TWO[name]["state"]) if name == "nested" else ("", TWO[name])
    assert isinstance(root, Mapping)
    expected = {
        f"{within}{part}.{key}": tensor
        for part, state in root.items()
        if isinstance(state, dict)
        for key, tensor in state.items()
    }
    assert list(ckpt_surgeon.ls(path).tensors) == list(expected)


@pytest.mark.parametrize("name", TWO)
def test_each_of_several_models_can_be_selected(name: str, tmp_path: Path) -> None:
    path = save_zip(TWO[name], tmp_path)
    with pytest.raises(SelectionError) as caught:
        ckpt_surgeon.open(path)
    assert len(caught.value.candidates) > 1
    for candidate in caught.value.candidates:
        chosen = candidate.removeprefix("select='").partition("'")[0]
        opened = ckpt_surgeon.open(path, select=chosen)
        assert opened.selected == chosen
        assert f"({len(opened):,} tensors, {opened.nbytes:,} bytes)" in candidate


def test_a_command_that_needs_one_model_stops_and_lists_them(ckpt: Run, tmp_path: Path) -> None:
    path = save_zip({"netG": weights(), "netD": {"conv.weight": ramp(5)}, "epoch": 3}, tmp_path)
    out = tmp_path / "out.pth"
    for words in (["strip-prefix", path, out], ["convert", path, out], ["diff", path, path]):
        ran = ckpt(*words)
        assert ran.status == 2
        assert ran.err == (
            f"ckpt: {path}: holds 2 state_dicts: choose one of "
            "--select netG (2 tensors, 60 bytes); --select netD (1 tensors, 20 bytes)\n"
        )
        assert not out.exists()


def test_a_selected_model_is_the_one_that_is_written(ckpt: Run, tmp_path: Path) -> None:
    path = save_zip({"model": weights(), "ema": {f"module.{key}": t for key, t in weights(bias=1).items()}}, tmp_path)
    out = tmp_path / "out.pth"
    assert ckpt("strip-prefix", path, out, "--select", "ema").status == 0
    assert_same(torch.load(out), weights(bias=1))


def test_ls_shows_the_selected_one_alone(ckpt: Run, tmp_path: Path) -> None:
    path = save_zip({"model": weights(), "ema": weights(bias=1)}, tmp_path)
    listed = json.loads(ckpt("ls", path, "--select", "ema", "--json").out)
    assert [tensor["name"] for tensor in listed["tensors"]] == list(weights())
    assert [part["path"] for part in listed["parts"]] == ["ema"]


def test_a_selection_may_be_anything_in_the_file_that_holds_tensors(tmp_path: Path) -> None:
    _, optimizer = trained()
    path = save_zip({"model": weights(), "optimizer": optimizer.state_dict(), "queue": ramp(2)}, tmp_path)
    assert "state.0.exp_avg" in ckpt_surgeon.open(path, select="optimizer")
    assert "exp_avg" in ckpt_surgeon.open(path, select="optimizer.state.0")
    assert list(ckpt_surgeon.open(path, select="queue")) == ["tensor"]


@pytest.mark.parametrize("wanted", ["nothing", "model.fc", "epoch.x"])
def test_a_selection_that_is_not_there_is_refused_with_those_that_are(wanted: str, tmp_path: Path) -> None:
    path = save_zip({"model": weights(), "ema": weights(), "epoch": 3}, tmp_path)
    with pytest.raises(SelectionError, match=r"has nothing at .*select='model' .*select='ema' "):
        ckpt_surgeon.open(path, select=wanted)


def test_a_selection_without_tensors_is_refused(tmp_path: Path) -> None:
    path = save_zip({"model": weights(), "config": {"lr": 0.1}}, tmp_path)
    with pytest.raises(SelectionError, match="has no tensor at 'config'"):
        ckpt_surgeon.open(path, select="config")


def test_one_dict_under_two_names_is_one_model(tmp_path: Path) -> None:
    state = weights()
    opened = ckpt_surgeon.open(save_zip({"state_dict": state, "model": state}, tmp_path))
    assert opened.selected == "state_dict"


def test_one_dict_in_two_parts_of_a_state_dict_is_there_twice(tmp_path: Path) -> None:
    state = weights()
    opened = ckpt_surgeon.open(save_zip({"left": state, "right": state}, tmp_path))
    assert list(opened) == ["left.fc.weight", "left.fc.bias", "right.fc.weight", "right.fc.bias"]
    assert opened["left.fc.bias"].tie == opened["right.fc.bias"].tie


# -- dicts and lists without end


def looping_dict(*, twice: bool) -> object:
    state: dict[str, object] = dict(weights())
    state["self"] = state
    if twice:
        state["again"] = state
    return state


def looping_list() -> object:
    items: list[object] = []
    items += [items, items]
    return items


def looping_models() -> object:
    state: dict[str, object] = {"epoch": 1}
    state |= {"model": state, "ema": state, "net": {"model": state, "weights": weights()}}
    return state


def doubling(leaf: object, name: str) -> object:
    """2 to the power of 60 paths to one leaf, in a small pickle."""
    for _ in range(60):
        leaf = {name: leaf, f"{name}2": leaf}
    return leaf


@pytest.mark.parametrize("twice", [False, True])
def test_a_state_dict_that_holds_itself_is_read_once(twice: bool, tmp_path: Path) -> None:
    assert_same(ckpt_surgeon.load(save_zip(looping_dict(twice=twice), tmp_path)), weights())


def test_models_that_hold_each_other_end(tmp_path: Path) -> None:
    assert_same(ckpt_surgeon.load(save_zip(looping_models(), tmp_path)), weights())


@pytest.mark.parametrize(
    "state",
    [
        looping_list(),
        doubling(weights(), "part"),
        doubling(weights(), "model"),
        doubling([], "part"),
        doubling({}, "net"),
    ],
    ids=["list in itself", "parts", "models", "lists without tensors", "dicts without tensors"],
)
def test_a_small_file_with_endless_paths_ends_in_an_answer_or_an_error(state: object, tmp_path: Path) -> None:
    path = save_zip(state, tmp_path)
    for command in (ckpt_surgeon.open, ckpt_surgeon.ls):
        with suppress(CheckpointError):
            command(path)


def test_endless_paths_beside_the_model_are_left_out(tmp_path: Path) -> None:
    path = save_zip({"model": weights(), "config": doubling([], "x"), "loop": looping_list()}, tmp_path)
    assert [left.path for left in ckpt_surgeon.open(path).left_out] == ["config", "loop"]


@pytest.mark.parametrize("depth", [10, 300])
def test_very_deep_nesting_ends(depth: int, tmp_path: Path) -> None:
    state: object = weights()
    for _ in range(depth):
        state = {"part": state}
    path = save_zip(state, tmp_path)
    if depth == 10:
        assert_same(ckpt_surgeon.load(path), weights())
    else:
        with pytest.raises(CheckpointError):
            ckpt_surgeon.open(path)


def test_dicts_too_deep_to_be_named_are_not_lost_in_silence(tmp_path: Path) -> None:
    deep: object = weights()
    for _ in range(60):
        deep = {"part": deep}
    with pytest.raises(SelectionError, match="has dicts in dicts without end"):
        ckpt_surgeon.open(save_zip({"fc.bias": ramp(2), "deep": deep}, tmp_path))


def test_a_pickle_of_a_hundred_thousand_nested_lists_ends(tmp_path: Path) -> None:
    path = save_zip({}, tmp_path)
    pickled = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
    deep = rewritten(path, tmp_path / "deep.pth", records={"data.pkl": pickled})
    with pytest.raises(NotACheckpoint):
        ckpt_surgeon.open(deep)
