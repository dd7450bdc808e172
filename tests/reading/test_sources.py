"""Every public function takes a path, an opened checkpoint, a state_dict or a model alike."""

from __future__ import annotations

import argparse
import io
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckpt_surgeon

cs: Any = ckpt_surgeon  # what is given is of every type, right and wrong

Make = Callable[[Path, nn.Module], object]

FORMS: dict[str, Make] = {
    "text": lambda path, _: str(path),
    "Path": lambda path, _: path,
    "Checkpoint": lambda path, _: cs.open(path),
    "state_dict": lambda path, _: torch.load(path),
    "model": lambda _, model: model,
    "records": lambda path, _: dict(cs.open(path)),
}
WRONG = {"number": 5, "tensor": torch.zeros(2), "open file": io.BytesIO(b"abc"), "list": ["a.pth"], "None": None}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


@pytest.fixture(scope="module")
def path(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("sources") / "layers.pth"
    torch.save(model.state_dict(), made)
    return made


@pytest.fixture(params=FORMS)
def source(request: pytest.FixtureRequest, path: Path, model: nn.Module) -> object:
    return FORMS[request.param](path, model)


def test_diff_takes_every_form_on_both_sides(source: object, path: Path, model: nn.Module) -> None:
    assert cs.diff(source, model).loadable
    assert cs.diff(path, source).loadable


def test_diff_and_align_take_the_spelling_of_a_model(tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "linear.pth")
    assert cs.diff(str(tmp_path / "linear.pth"), "torch.nn:Linear(3, 2)").loadable
    assert cs.align(str(tmp_path / "linear.pth"), "torch.nn:Linear(3, 2)").complete
    assert cs.resolve(nn.Linear(3, 2)) == cs.resolve("torch.nn:Linear(3, 2)")


def test_align_takes_every_form_on_both_sides(source: object, path: Path) -> None:
    assert cs.align(source, path).complete
    assert cs.align(path, source).complete


def test_compare_and_hash_take_every_form_and_find_the_same_values(source: object, path: Path) -> None:
    assert cs.compare(source, path).same
    assert cs.compare(path, source).same
    assert cs.hash(source) == cs.hash(path)


def test_stats_take_every_form_and_a_single_tensor(source: object, model: nn.Module) -> None:
    found = cs.stats(source)
    assert found["0.weight"].max == pytest.approx(float(model.state_dict()["0.weight"].max()))
    assert cs.stats(model.state_dict()["0.weight"]) == found["0.weight"]


def test_load_and_load_into_take_every_form(source: object, model: nn.Module) -> None:
    loaded = cs.load(source)
    assert list(loaded) == list(model.state_dict())
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    cs.load_into(other, source)
    assert torch.equal(other.state_dict()["0.weight"], model.state_dict()["0.weight"])


def test_save_and_convert_take_every_form(source: object, model: nn.Module, tmp_path: Path) -> None:
    cs.save(source, tmp_path / "saved.pth")
    cs.convert(source, tmp_path / "converted.pth")
    for name in ("saved.pth", "converted.pth"):
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).load_state_dict(torch.load(tmp_path / name))


def test_ls_takes_every_form_and_lists_the_same_tensors(source: object, path: Path) -> None:
    found = cs.ls(source)
    assert list(found.tensors) == list(cs.ls(path).tensors)
    assert found.parts == cs.ls(path).parts


def test_an_edit_of_a_path_is_an_edit_of_what_it_holds(path: Path) -> None:
    for given in (path, str(path)):
        assert list(cs.add_prefix(given, "net.")) == [f"net.{key}" for key in cs.open(path)]
        assert cs.cast.plan(given, "float16").edited == 4
        recipe = cs.Recipe((cs.step("add_prefix", prefix="net."),))
        assert list(recipe.apply(given)) == [f"net.{key}" for key in cs.open(path)]


def test_an_edit_of_a_model_gives_a_state_dict_of_torch_tensors(model: nn.Module) -> None:
    edited = cs.drop(model, "1.*")
    assert isinstance(edited, OrderedDict)
    assert torch.equal(edited["0.bias"], model.state_dict()["0.bias"])


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_whatever_is_no_checkpoint_is_an_error_that_says_what_is_taken(wrong: object, model: nn.Module) -> None:
    calls: list[Callable[[], object]] = [
        lambda: cs.compare(wrong, {}),
        lambda: cs.diff(wrong, {}),
        lambda: cs.diff({}, wrong),
        lambda: cs.align(wrong, {}),
        lambda: cs.hash(wrong),
        lambda: cs.load(wrong),
        lambda: cs.fit(wrong, model),
        lambda: cs.load_into(model, wrong),
        lambda: cs.save(wrong, "never.pth"),
        lambda: cs.convert(wrong, "never.pth"),
        lambda: cs.ls(wrong),
        lambda: cs.strip_prefix(wrong),
    ]
    for call in calls:
        with pytest.raises(cs.CheckpointError, match="give a path or URL, an opened Checkpoint, a state_dict or a"):
            call()
    for function in (cs.open, cs.scan, cs.recover):
        with pytest.raises(cs.CheckpointError, match="names no file; give its path or URL as a str or a Path"):
            function(wrong)


def test_select_without_a_file_is_refused(path: Path) -> None:
    with pytest.raises(cs.CheckpointError, match="select='model' chooses in a file, not in a Checkpoint"):
        cs.hash(cs.open(path), select="model")


def test_functions_on_models_refuse_what_is_no_model(path: Path) -> None:
    for function in (cs.trainable, cs.freeze, cs.unfreeze, cs.snapshot):
        with pytest.raises(cs.CheckpointError, match=r"is no torch\.nn\.Module"):
            function(str(path))


# -- checkpoints merged


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_dict_of_two_checkpoints_is_written_from_file_to_file(suffix: str, tmp_path: Path) -> None:
    a, b = {"a.weight": torch.randn(3, 2)}, {"b.bias": torch.randn(5)}
    torch.save(a, tmp_path / "a.pth")
    torch.save(b, tmp_path / "b.pth")
    merged = {**cs.open(tmp_path / "a.pth"), **cs.open(tmp_path / "b.pth")}
    plan = cs.save(merged, tmp_path / f"both{suffix}")
    assert all(tensor.span is not None for tensor in plan.checkpoint.values())
    loaded = cs.load(tmp_path / f"both{suffix}")
    assert loaded.keys() == {*a, *b}
    assert all(torch.equal(loaded[key], {**a, **b}[key]) for key in loaded)


def test_records_and_torch_tensors_can_be_saved_together_in_their_order(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.ones(2, 2)}, tmp_path / "a.pth")
    mixed = {"new.bias": torch.zeros(3), **cs.open(tmp_path / "a.pth"), "last.bias": torch.zeros(1)}
    cs.save(mixed, tmp_path / "out.pth")
    assert list(torch.load(tmp_path / "out.pth")) == ["new.bias", "fc.weight", "last.bias"]


# -- single tensors, and values beside the weights


def test_a_tensor_of_a_checkpoint_is_the_one_that_torch_loads(path: Path) -> None:
    expected = torch.load(path)
    with cs.open(path) as checkpoint:
        for key, value in expected.items():
            assert torch.equal(checkpoint.tensor(key), value)
            assert torch.equal(checkpoint[key].load(), value)
        half = cs.cast(checkpoint, "float16")
        assert torch.equal(half.tensor("0.weight"), expected["0.weight"].half())
    with pytest.raises(cs.NothingMatched, match=r"key 'no\.such' matches no key"):
        checkpoint.tensor("no.such")


def test_values_beside_the_weights_are_read_and_nothing_is_imported(tmp_path: Path) -> None:
    model, rate = nn.Linear(2, 2), 0.125
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    args = argparse.Namespace(lr=rate, name="run", sizes=[1, (2, 3)], dtype=torch.float16, out=Path("runs"))
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 7, "args": args,
             "best": torch.tensor(0.5)}  # fmt: skip
    torch.save(saved, tmp_path / "run.pth")
    run = cs.open(tmp_path / "run.pth")
    assert run.value("epoch") == 7
    assert run.value("args.lr") == rate
    assert run.value("args.sizes") == [1, (2, 3)]
    assert run.value("args.dtype") == "torch.float16"
    assert run.value("optimizer.param_groups.0.momentum") == 0.9
    assert run.value("optimizer") == optimizer.state_dict()
    best = run.value("best")
    assert isinstance(best, cs.StoredTensor)
    assert best.load() == 0.5
    namespace = run.value("args")
    assert isinstance(namespace, cs.Inert)
    assert (namespace.class_name, namespace["name"]) == ("argparse.Namespace", "run")
    assert cs.strip_prefix(run, "no.", allow_unmatched=True).value("epoch") == 7
    with pytest.raises(cs.SelectionError, match=r"has nothing at 'args\.lrr'.*lr; name"):
        run.value("args.lrr")


def test_a_value_that_holds_itself_is_read_once(tmp_path: Path) -> None:
    loop: dict[str, object] = {"weights": {"fc.bias": torch.zeros(1)}}
    history: list[object] = [1]
    history.append(history)
    loop["history"] = history
    torch.save(loop, tmp_path / "loop.pth")
    found = cs.open(tmp_path / "loop.pth").value("history")
    assert isinstance(found, list)
    assert found[0] == 1
    assert found[1] is found


def test_a_file_of_tensors_alone_has_nothing_beside_them(path: Path) -> None:
    with pytest.raises(cs.SelectionError, match="has nothing at 'epoch'"):
        cs.open(path).value("epoch")
    with pytest.raises(cs.SelectionError, match="has nothing at 'epoch'"):
        cs.from_torch({"a": torch.zeros(1)}).value("epoch")
