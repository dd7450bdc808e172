"""A checkpoint against a model: the oracle is load_state_dict(strict=True)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from command_line import Run
from hypothesis import given
from hypothesis import strategies as st
from tables import ramp, save_safetensors, save_zip
from torch import nn

import ckpt_surgeon
from ckpt_surgeon import Diff, Mismatch, diff

State = dict[str, torch.Tensor]


def resnet(classes: int = 10) -> State:
    """The keys and shapes of a resnet18, without its values."""
    with torch.device("meta"):
        state: State = torchvision.models.resnet18(num_classes=classes).state_dict()
    return state


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: tensor for key, tensor in state.items()}


def strictly_loads(model: nn.Module, state: State) -> bool:
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError:
        return False
    return True


# -- a real model


def test_a_model_s_own_state_dict_matches_whole() -> None:
    found = diff(resnet(), resnet())
    assert found.loadable
    assert (len(found.matched), found.target_keys, found.share) == (122, 122, 1.0)
    assert found.matched == tuple(resnet())
    assert found.matched_numel == found.target_numel == sum(tensor.numel() for tensor in resnet().values())
    assert (found.missing, found.unused, found.mismatched, found.dtypes, found.hint) == ((), (), (), (), None)


def test_another_head_is_two_mismatches_with_both_shapes() -> None:
    found = diff(resnet(1000), resnet(10))
    assert not found.loadable
    assert found.mismatched == (
        Mismatch("fc.weight", "[1000, 512]", "[10, 512]"),
        Mismatch("fc.bias", "[1000]", "[10]"),
    )
    assert (found.missing, found.unused, len(found.matched)) == ((), (), 120)
    assert found.share == 1 - (512 * 10 + 10) / found.target_numel


def test_a_model_without_its_head_misses_it() -> None:
    state = {key: tensor for key, tensor in resnet().items() if not key.startswith("fc.")}
    found = diff(state, resnet())
    assert (found.missing, found.unused) == (("fc.weight", "fc.bias"), ())
    found = diff(resnet(), state)
    assert (found.missing, found.unused) == ((), ("fc.weight", "fc.bias"))
    assert found.share == 1.0
    assert not found.loadable


def test_another_dtype_is_told_and_loads() -> None:
    state = {key: tensor.half() for key, tensor in resnet().items()}
    found = diff(state, resnet())
    assert found.loadable
    assert len(found.dtypes) == 122
    assert found.dtypes[0] == Mismatch("conv1.weight", "float16", "float32")
    model = nn.Linear(2, 3)
    assert strictly_loads(model, {key: tensor.half() for key, tensor in model.state_dict().items()})


def test_checkpoints_models_and_dicts_of_tensors_can_be_compared(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    opened = ckpt_surgeon.open(save_zip(model.state_dict(), tmp_path))
    expected = ckpt_surgeon.resolve("torch.nn:Linear(4, 3)")
    assert diff(opened, expected) == diff(opened, model.state_dict()) == diff(opened, opened)
    assert diff(model.state_dict(), expected).loadable


def test_an_empty_target_is_matched_by_nothing_but_an_empty_checkpoint() -> None:
    assert diff({}, {}).loadable
    assert diff({}, {}).share == 1.0
    assert not diff(resnet(), {}).loadable
    assert diff({}, resnet()).share == 0.0


# -- hints


HINTS: dict[str, tuple[Callable[[State], State], Callable[[State], State], str, tuple[str, ...]]] = {
    "DataParallel": (
        lambda state: prefixed(state, "module."),
        dict,
        "stripping 'module.' makes all 122 match",
        ("strip-prefix",),
    ),
    "compiled": (
        lambda state: prefixed(state, "_orig_mod."),
        dict,
        "stripping '_orig_mod.' makes all 122 match",
        ("strip-prefix", "--prefix", "_orig_mod."),
    ),
    "two wrappers": (
        lambda state: prefixed(state, "module._orig_mod."),
        dict,
        "stripping 'module._orig_mod.' makes all 122 match",
        ("strip-prefix", "--prefix", "module._orig_mod."),
    ),
    "repeated": (
        lambda state: prefixed(state, "module.module."),
        dict,
        "stripping 'module.' makes all 122 match",
        ("strip-prefix",),
    ),
    "inner wrappers": (
        lambda state: {key.replace("layer1.0.", "layer1.0._fsdp_wrapped_module."): t for key, t in state.items()},
        dict,
        "peeling all wrappers makes all 122 match",
        ("strip-prefix", "--wrappers"),
    ),
    "a backbone": (
        lambda state: prefixed(state, "backbone.body."),
        dict,
        "stripping 'backbone.body.' makes all 122 match",
        ("strip-prefix", "--prefix", "backbone.body."),
    ),
    "a larger model": (
        dict,
        lambda state: prefixed(state, "encoder."),
        "adding 'encoder.' makes all 122 match",
        ("add-prefix", "--prefix", "encoder."),
    ),
    "a counter beside": (
        lambda state: {"n_averaged": torch.tensor(1), **prefixed(state, "module.")},
        dict,
        "taking 'module.' alone makes all 122 match",
        ("select", "--prefix", "module."),
    ),
    "another head": (
        lambda state: prefixed(resnet(1000), "module."),
        dict,
        "stripping 'module.' makes 120 of 122 match",
        ("strip-prefix",),
    ),
}


@pytest.mark.parametrize("case", HINTS)
def test_the_prefix_that_explains_it_is_said_with_the_command(case: str) -> None:
    ours, theirs, said, command = HINTS[case]
    hint = diff(ours(resnet()), theirs(resnet())).hint
    assert hint is not None
    assert (hint.said, hint.command) == (said, command)


@pytest.mark.parametrize("case", [case for case in HINTS if case not in ("another head", "inner wrappers")])
def test_the_command_of_a_hint_does_what_it_says(case: str, ckpt: Run, tmp_path: Path) -> None:
    small = {key: torch.zeros(tensor.shape) for key, tensor in nn.Sequential(nn.Linear(2, 3)).state_dict().items()}
    change, expect, _, _ = HINTS[case]
    ours, theirs = change(small), expect(small)
    hint = diff(ours, theirs).hint
    assert hint is not None
    source, out = save_zip(ours, tmp_path), tmp_path / "clean.pth"
    name, *options = hint.command
    assert ckpt(name, source, out, *options).status == 0
    assert len(diff(ckpt_surgeon.open(out), theirs).matched) == hint.matched == 2


def test_nothing_is_suggested_where_nothing_helps() -> None:
    with torch.device("meta"):
        other = torchvision.models.vgg11(num_classes=10).state_dict()
    assert diff(other, resnet()).hint is None
    assert diff(resnet(), resnet()).hint is None
    assert diff(resnet(1000), resnet()).hint is None


def test_an_edit_that_would_be_refused_is_not_suggested() -> None:
    ours = {"module.a": ramp(2), "a": ramp(2), "module.b": ramp(3)}
    found = diff(ours, {"a": ramp(2), "b": ramp(3)})
    assert found.missing == ("b",)
    assert found.hint is not None
    assert found.hint.command == ("align",)  # stripping would make two keys one; renaming one of them does not


# -- the command


MODEL = "torchvision.models:resnet18(num_classes=10)"


@pytest.fixture
def parallel(tmp_path: Path) -> Path:
    """A resnet18 saved from DataParallel; its values are of no matter, so they are one expanded zero."""
    state = {key: torch.zeros((), dtype=t.dtype).expand(t.shape) for key, t in resnet().items()}
    return save_zip(prefixed(state, "module."), tmp_path)


def test_a_parallel_file_is_explained_stripped_and_then_matches(
    parallel: Path, ckpt: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(parallel.parent)
    ran = ckpt("diff", parallel.name, MODEL)
    assert ran.status == 1
    assert ran.out.startswith("NOTHING MATCHES: none of the 122 keys that ")
    assert "matched 0 of 122 keys, 0 % of the parameters" in ran.out
    assert "only): 102 keys" in ran.out
    assert "missing, buffers that models make themselves: 20 keys" in ran.out
    assert "stripping 'module.' makes all 122 match:\n  ckpt strip-prefix model.pth clean.pth\n" in ran.out
    assert "NOT strictly loadable" in ran.out
    assert len(ran.out.splitlines()) < 50
    assert ckpt("strip-prefix", "model.pth", "clean.pth").status == 0
    ran = ckpt("diff", "clean.pth", MODEL)
    assert ran.status == 0
    assert ran.out.startswith("matched 122 of 122 keys, 100 % of the parameters")
    assert "strictly loadable" in ran.out
    assert "NOT" not in ran.out
    torchvision.models.resnet18(num_classes=10).load_state_dict(torch.load("clean.pth"), strict=True)


def test_long_lists_are_folded_unless_all_is_asked_for(parallel: Path, ckpt: Run) -> None:
    assert "module.layer{1..4}" in ckpt("diff", parallel, MODEL).out
    assert "fc.weight" not in ckpt("diff", parallel, MODEL).out


def test_a_percentage_is_a_hundred_only_when_it_is_all(ckpt: Run, tmp_path: Path) -> None:
    ours = save_zip({"a": torch.zeros(100_000)}, tmp_path)
    theirs = save_safetensors({"a": torch.zeros(100_000), "b": torch.zeros(1)}, tmp_path)
    assert "matched 1 of 2 keys, 99.9 % of the parameters" in ckpt("diff", ours, theirs).out


def test_json_has_every_difference(ckpt: Run, tmp_path: Path) -> None:
    ours = save_zip(
        {"same": ramp(2), "ours": ramp(7), "shape": ramp(2, 3), "dtype": ramp(2).half(), "scalar": torch.tensor(1.0)},
        tmp_path,
    )
    theirs = save_safetensors(
        {"same": ramp(2), "theirs": ramp(3), "shape": ramp(3, 2), "dtype": ramp(2), "scalar": torch.tensor(1.0)},
        tmp_path,
    )
    ran = ckpt("diff", ours, theirs, "--json")
    assert ran.status == 1
    found = json.loads(ran.out)
    assert {key: found[key] for key in ("loadable", "missing", "unused", "mismatched", "dtypes", "hint")} == {
        "loadable": False,
        "missing": ["theirs"],
        "unused": ["ours"],
        "mismatched": [{"name": "shape", "shape": [2, 3], "expected": [3, 2]}],
        "dtypes": [{"name": "dtype", "dtype": "float16", "expected": "float32"}],
        "hint": None,
    }
    assert sorted(found["matched"]) == ["dtype", "same", "scalar"]
    assert (found["matched_parameters"], found["target_parameters"]) == (5, 14)


def test_json_has_the_hint_and_its_command(parallel: Path, ckpt: Run) -> None:
    found = json.loads(ckpt("diff", parallel, MODEL, "--json").out)
    assert found["hint"]["text"] == "stripping 'module.' makes all 122 match"
    assert found["hint"]["command"] == f"ckpt strip-prefix {parallel} clean.pth"
    assert (found["loadable"], len(found["missing"]), len(found["unused"])) == (False, 122, 122)


def test_the_command_of_a_hint_selects_what_the_diff_did(ckpt: Run, tmp_path: Path) -> None:
    path = save_zip({"model": {"module.a.b": ramp(2)}, "ema": {"module.a.b": ramp(2)}}, tmp_path)
    target = save_safetensors({"a.b": ramp(2)}, tmp_path)
    found = json.loads(ckpt("diff", path, target, "--select", "ema", "--json").out)
    assert found["hint"]["command"].endswith(" --select ema")


@pytest.mark.parametrize(
    ("ours", "theirs", "status"),
    [
        ({"a": ramp(2)}, {"a": ramp(2)}, 0),
        ({"a": ramp(2).double()}, {"a": ramp(2)}, 0),
        ({"a": ramp(2)}, {"a": ramp(3)}, 1),
        ({"a": ramp(2)}, {"b": ramp(2)}, 1),
        ({"a": ramp(2), "b": ramp(2)}, {"a": ramp(2)}, 1),
        ({"a": ramp(2)}, {"a": ramp(2), "b": ramp(2)}, 1),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_the_exit_status_says_whether_it_loads_strictly(
    ours: State, theirs: State, status: int, as_json: bool, ckpt: Run, tmp_path: Path
) -> None:
    words = [save_zip(ours, tmp_path), save_safetensors(theirs, tmp_path), *(["--json"] if as_json else [])]
    ran = ckpt("diff", *words)
    assert (ran.status, ran.err) == (status, "")
    if as_json:
        assert json.loads(ran.out)["loadable"] == (status == 0)


@pytest.mark.parametrize(
    "target", ["gone.pth", "torch.nn:Gone", "no_such_module:Net", "torch.nn:Linear(1", "torch.nn:Linear()"]
)
def test_a_target_that_is_not_there_is_trouble(target: str, ckpt: Run, tmp_path: Path) -> None:
    ran = ckpt("diff", save_zip({"a": ramp(2)}, tmp_path), target)
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.startswith("ckpt: ")
    assert ran.err.count("\n") == 1


# -- random modules


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(2, 3),
    "bare linear": lambda: nn.Linear(3, 2, bias=False),
    "norm": lambda: nn.BatchNorm1d(2),
    "untracked norm": lambda: nn.BatchNorm1d(2, track_running_stats=False),
    "embedding": lambda: nn.Embedding(3, 2),
    "convolution": lambda: nn.Conv1d(1, 2, 3),
    "recurrent": lambda: nn.LSTM(2, 2),
    "attention": lambda: nn.MultiheadAttention(2, 1),
    "nothing": nn.Identity,
}
TREES = st.recursive(
    st.sampled_from(list(LAYERS)),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)


def grown(tree: object) -> nn.Module:
    if isinstance(tree, dict):
        return nn.ModuleDict({name: grown(branch) for name, branch in tree.items()})
    return LAYERS[str(tree)]()


@given(TREES, st.data())
def test_loadable_is_what_a_strict_load_says(tree: object, data: st.DataObject) -> None:
    model = grown(tree)
    state = model.state_dict()
    for _ in range(data.draw(st.integers(0, 2))):
        key = data.draw(st.sampled_from(["new", *state]))
        change = data.draw(st.sampled_from(["drop", "add", "rename", "shape", "transpose", "dtype", "same"]))
        tensor = state.get(key, ramp(2))
        if change == "drop":
            state.pop(key, None)
        elif change == "add":
            state[f"{key}.more"] = ramp(1)
        elif change == "rename" and key in state:
            state[data.draw(st.sampled_from(["new", f"{key}2", *state]))] = state.pop(key)
        elif change == "shape" and key in state:
            # torch takes a vector of one element for a scalar, as it did before 0.4: not a case that is asked for
            state[key] = torch.zeros(2, *tensor.shape)
        elif change == "transpose" and key in state:
            state[key] = tensor.t().clone() if tensor.dim() == 2 else tensor
        elif change == "dtype" and key in state:
            state[key] = tensor.double()
    found: Diff = diff(state, model.state_dict())
    assert found.loadable == strictly_loads(model, state)
    assert set(found.matched) | set(found.missing) | {one.key for one in found.mismatched} == set(model.state_dict())
    assert set(found.matched) | set(found.unused) | {one.key for one in found.mismatched} == set(state)
