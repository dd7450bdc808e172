"""Prefixes on and off: on random keys, on real models, and where other tools lose tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar, cast

import pytest
import torch
import torchvision
from command_line import Run
from hypothesis import assume, given
from hypothesis import strategies as st
from tables import assert_same, ramp, save_zip
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.optim.swa_utils import AveragedModel

import ckpt_surgeon
from ckpt_surgeon import EditError, KeyCollision, NothingMatched, add_prefix, strip_prefix
from ckpt_surgeon.key_patterns import WRAPPERS

Kind = TypeVar("Kind", bound=Mapping[str, object])

WORDS = ["module", "submodule", "module_a", "modules", "a", "b", "layers", "0", "weight", "größe", *WRAPPERS[1:3]]
NAMES = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map(".".join)
KEYS = st.lists(NAMES, unique=True, max_size=12)
PREFIXES = st.lists(st.sampled_from(WORDS), min_size=1, max_size=2).map(lambda words: ".".join(words) + ".")


def numbered(keys: list[str]) -> dict[str, int]:
    return {key: index for index, key in enumerate(keys)}


def tried(edit: Callable[[Kind], Kind], state: Kind) -> Kind | KeyCollision:
    try:
        return edit(state)
    except KeyCollision as error:
        return error


def peeled(key: str) -> str:
    """What stripping ``module.`` means: leading components of that name, but never the last component."""
    parts = key.split(".")
    while len(parts) > 1 and parts[0] == "module":
        del parts[0]
    return ".".join(parts)


# -- on random keys


@given(KEYS, PREFIXES)
def test_a_prefix_that_is_added_can_be_stripped_again(keys: list[str], prefix: str) -> None:
    assume(keys)
    assume(not any(key.startswith(prefix) for key in keys))
    state = numbered(keys)
    added = add_prefix(state, prefix)
    assert list(added) == [prefix + key for key in keys]
    back = strip_prefix(added, prefix)
    assert list(back.items()) == list(state.items())


@given(KEYS)
def test_stripping_takes_leading_components_and_nothing_else(keys: list[str]) -> None:
    state = numbered(keys)
    result = tried(lambda state: strip_prefix(state, allow_unmatched=True), state)
    wanted = [peeled(key) for key in keys]
    if isinstance(result, KeyCollision):
        assert len(set(wanted)) < len(wanted)
    else:
        assert list(result.items()) == list(zip(wanted, state.values(), strict=True))


@given(KEYS, PREFIXES, st.booleans())
def test_nothing_is_ever_lost(keys: list[str], prefix: str, wrappers: bool) -> None:
    state = numbered(keys)
    result = tried(lambda state: strip_prefix(state, prefix, wrappers=wrappers, allow_unmatched=True), state)
    if isinstance(result, KeyCollision):
        for olds in result.collisions.values():
            assert len(olds) > 1
            assert set(olds) <= set(keys)
    else:
        assert list(result.values()) == list(state.values())
    assert state == numbered(keys)


@given(KEYS, PREFIXES, st.booleans())
def test_stripping_twice_is_stripping_once(keys: list[str], prefix: str, wrappers: bool) -> None:
    once = tried(lambda state: strip_prefix(state, prefix, wrappers=wrappers, allow_unmatched=True), numbered(keys))
    if not isinstance(once, KeyCollision):
        assert strip_prefix(once, prefix, wrappers=wrappers, allow_unmatched=True) == once


@given(KEYS)
def test_wrappers_go_wherever_they_stand_but_a_leaf_stays(keys: list[str]) -> None:
    wanted = [
        ".".join([*(part for part in key.split(".")[:-1] if part not in WRAPPERS), key.split(".")[-1]]) for key in keys
    ]
    result = tried(lambda state: strip_prefix(state, wrappers=True, allow_unmatched=True), numbered(keys))
    if isinstance(result, KeyCollision):
        assert len(set(wanted)) < len(wanted)
    else:
        assert list(result) == wanted


@given(KEYS, PREFIXES)
def test_a_prefix_that_no_key_carries_is_an_error(keys: list[str], prefix: str) -> None:
    carried = any(key.startswith(prefix) and len(key) > len(prefix) for key in keys)
    if not carried:
        with pytest.raises(NothingMatched) as caught:
            strip_prefix(numbered(keys), prefix)
        assert caught.value.patterns == (prefix,)
        assert repr(prefix) in str(caught.value)


@given(KEYS, PREFIXES, st.booleans())
def test_a_checkpoint_and_a_dict_of_tensors_agree(keys: list[str], prefix: str, wrappers: bool) -> None:
    state = {key: torch.tensor(index) for index, key in enumerate(keys)}
    checkpoint = ckpt_surgeon.from_torch(state)

    def edit(mapping: Kind) -> Kind:
        return strip_prefix(add_prefix(mapping, "x."), ["x", prefix], wrappers=wrappers, allow_unmatched=True)

    ours, plain = tried(edit, checkpoint), tried(edit, state)
    if isinstance(ours, KeyCollision) or isinstance(plain, KeyCollision):
        assert str(ours) == str(plain)
    else:
        assert list(ours) == list(plain)
        assert_same(ckpt_surgeon.load(ours), plain)


# -- what other tools get wrong


def test_two_keys_that_would_become_one_are_an_error_that_names_both(ckpt: Run, tmp_path: Path) -> None:
    state = {"module.a": ramp(2), "b": ramp(1), "a": ramp(3)}
    with pytest.raises(KeyCollision) as caught:
        strip_prefix(state)
    assert caught.value.collisions == {"a": ("module.a", "a")}
    path = save_zip(state, tmp_path)
    ran = ckpt("strip-prefix", path, tmp_path / "out.pth")
    assert (ran.status, ran.out) == (2, "")
    assert ran.err == "ckpt: 'module.a', 'a' all become 'a'; choose with --on-collision first or last\n"
    assert not (tmp_path / "out.pth").exists()


def test_all_collisions_are_named_at_once() -> None:
    state = numbered(["module.a", "a", "module.module.b", "module.b", "c"])
    with pytest.raises(KeyCollision, match=r"'module.a', 'a' all become 'a'; 'module.module.b', 'module.b' all become"):
        strip_prefix(state)


def test_keys_that_begin_alike_are_no_prefix() -> None:
    with pytest.raises(NothingMatched, match=r"prefix 'module\.' matches no key \(the keys are 'module_a.weight'"):
        strip_prefix(numbered(["module_a.weight", "head.weight"]))


def test_nested_wrappers_are_peeled_whole() -> None:
    state = numbered(["_orig_mod.module.x", "module._orig_mod.y.weight", "_orig_mod._orig_mod.z"])
    assert list(strip_prefix(state, wrappers=True)) == ["x", "y.weight", "z"]
    assert list(strip_prefix(state, ["_orig_mod.", "module."])) == ["x", "y.weight", "z"]


def test_a_submodule_is_never_touched() -> None:
    state = numbered(["encoder.submodule.weight", "module.encoder.weight", "submodule.bias", "encoder.module.bias"])
    assert list(strip_prefix(state)) == [
        "encoder.submodule.weight",
        "encoder.weight",
        "submodule.bias",
        "encoder.module.bias",
    ]


def test_wrappers_of_inner_modules_are_peeled() -> None:
    keys = [
        "layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.attn.weight",
        "layers.1._checkpoint_wrapped_module._orig_mod.attn.weight",
        "_fpw_module.head.weight",
    ]
    assert list(strip_prefix(numbered(keys), wrappers=True)) == [
        "layers.0.attn.weight",
        "layers.1.attn.weight",
        "head.weight",
    ]


def test_a_tensor_that_is_called_like_a_wrapper_keeps_its_name() -> None:
    assert list(strip_prefix(numbered(["module.module", "module.a.module"]))) == ["module", "a.module"]
    assert list(strip_prefix(numbered(["module.module", "a.module.module"]), wrappers=True)) == ["module", "a.module"]


# -- how a prefix may be given


@pytest.mark.parametrize("prefix", ["module", "module.", ["module"], ("module.", "model")])
def test_a_prefix_may_be_given_with_its_dot_or_without(prefix: str | list[str]) -> None:
    state = numbered(["module.model.a", "model.b"] if len(prefix) == 2 else ["module.a", "module.b"])
    assert list(strip_prefix(state, prefix)) == ["a", "b"]


def test_one_of_several_prefixes_that_no_key_carries_is_an_error() -> None:
    with pytest.raises(NothingMatched) as caught:
        strip_prefix(numbered(["module.a"]), ["module.", "model", "net."])
    assert caught.value.patterns == ("model.", "net.")


def test_a_prefix_of_several_components_is_taken_as_one() -> None:
    state = numbered(["model.encoder.model.encoder.a", "model.b"])
    assert list(strip_prefix(state, "model.encoder")) == ["a", "model.b"]


@pytest.mark.parametrize("prefix", ["", "."])
def test_nothing_is_no_prefix(prefix: str) -> None:
    with pytest.raises(EditError):
        add_prefix({"a": 1}, prefix)
    with pytest.raises(NothingMatched):
        strip_prefix({"a": 1}, prefix)


def test_keys_without_the_prefix_stay_and_are_counted(ckpt: Run, tmp_path: Path) -> None:
    path = save_zip({"module.a": ramp(2), "n_averaged": torch.tensor(3), "b": ramp(1)}, tmp_path)
    ran = ckpt("strip-prefix", path, tmp_path / "out.pth")
    assert ran.status == 0
    assert "note: 2 of 3 keys had no prefix and stay as they are" in ran.out
    assert list(torch.load(tmp_path / "out.pth")) == ["a", "n_averaged", "b"]


def test_prefixes_can_be_repeated_on_the_command_line(ckpt: Run, tmp_path: Path) -> None:
    path = save_zip({"model.net.a": ramp(2), "net.model.b": ramp(1)}, tmp_path)
    assert ckpt("strip-prefix", path, tmp_path / "out.pth", "--prefix", "net", "--prefix", "model.").status == 0
    assert list(torch.load(tmp_path / "out.pth")) == ["a", "b"]


# -- the result


def test_the_result_is_of_the_same_kind_and_the_input_is_as_it_was() -> None:
    ordered = OrderedDict({"module.b": 1, "module.a": 2})
    assert type(strip_prefix(ordered)) is OrderedDict
    assert type(strip_prefix(dict(ordered))) is dict
    assert list(ordered) == ["module.b", "module.a"]
    assert list(strip_prefix(ordered)) == ["b", "a"]
    assert not hasattr(strip_prefix(ordered), "_metadata")


def test_the_tensors_are_the_very_same() -> None:
    weight = nn.Parameter(ramp(2))
    assert strip_prefix({"module.a": weight})["a"] is weight


def test_editing_a_checkpoint_reads_nothing(tmp_path: Path) -> None:
    path = save_zip({"module.a": ramp(2)}, tmp_path)
    opened = ckpt_surgeon.open(path)
    path.unlink()
    assert list(strip_prefix(opened)) == ["a"]


# -- the versions of modules (torch's _metadata)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Sequential(nn.BatchNorm2d(2), nn.Dropout())
    )


class Compiled(nn.Module):
    """Names its module as torch.compile does, and may stand around another of its kind."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "convolutional": convolutional,
    "batch norm alone": lambda: nn.BatchNorm1d(3),
    "with a module called module": lambda: nn.ModuleDict({"module": convolutional(), "submodule": nn.BatchNorm1d(2)}),
    "shufflenet": lambda: torchvision.models.shufflenet_v2_x0_5(),
}


def metadata(state: object) -> dict[str, object]:
    return dict(state._metadata)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["convolutional", "batch norm alone", "shufflenet"])
def test_versions_are_renamed_as_torch_renames_them(name: str) -> None:
    state = nn.DataParallel(MODELS[name]()).state_dict()
    ours = strip_prefix(state)
    assert metadata(state)["module"] is not None
    consume_prefix_in_state_dict_if_present(state, "module.")
    assert list(ours) == list(state)
    assert metadata(ours) == metadata(state)


def compiled(model: nn.Module) -> nn.Module:
    return cast(nn.Module, torch.compile(model))


@pytest.mark.parametrize("name", ["convolutional", "batch norm alone", "shufflenet"])
@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        lambda model: nn.DataParallel(nn.DataParallel(model)),
        compiled,
        lambda model: nn.DataParallel(compiled(model)),
    ],
    ids=["DataParallel", "twice", "compile", "both"],
)
def test_a_wrapped_model_becomes_the_model(wrap: Callable[[nn.Module], nn.Module], name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    stripped = strip_prefix(wrap(model).state_dict(), wrappers=True)
    assert list(stripped) == list(model.state_dict())
    assert metadata(stripped) == metadata(model.state_dict())
    path = tmp_path / "clean.pth"
    ckpt_surgeon.save(stripped, path)
    fresh = MODELS[name]()
    fresh.load_state_dict(torch.load(path), strict=True)
    assert_same(fresh.state_dict(), model.state_dict())


def test_wrappers_inside_a_model_are_peeled_with_their_versions() -> None:
    wrapped = nn.Sequential(nn.DataParallel(convolutional()), nn.ReLU(), Compiled(nn.BatchNorm1d(3)))
    plain = nn.Sequential(convolutional(), nn.ReLU(), nn.BatchNorm1d(3))
    stripped = strip_prefix(wrapped.state_dict(), wrappers=True)
    assert metadata(stripped) == metadata(plain.state_dict())
    plain.load_state_dict(stripped, strict=True)


@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("versioned", [True, False])
def test_stripping_does_not_change_whether_batch_norms_load_strictly(tracked: bool, versioned: bool) -> None:
    wrapped = nn.DataParallel(convolutional())
    state = wrapped.state_dict()
    if not tracked:
        for key in [key for key in state if key.endswith("num_batches_tracked")]:
            del state[key]
    given = state if versioned else dict(state)
    loads = tracked or not versioned  # a BatchNorm of version 2 must have its counter; an older one gets it
    for model, candidate in ((wrapped, given), (convolutional(), strip_prefix(given))):
        if loads:
            model.load_state_dict(candidate, strict=True)
        else:
            with pytest.raises(RuntimeError, match="num_batches_tracked"):
                model.load_state_dict(candidate, strict=True)


def test_an_averaged_model_becomes_the_model_once_its_counter_is_gone() -> None:
    model = convolutional()
    state = AveragedModel(model).state_dict()
    del state["n_averaged"]
    stripped = strip_prefix(state)
    assert metadata(stripped) == metadata(model.state_dict())
    model.load_state_dict(stripped, strict=True)


def test_versions_go_with_a_prefix_that_is_added() -> None:
    model = convolutional()
    state = add_prefix(model.state_dict(), "backbone")
    assert metadata(state)["backbone.1"] == {"version": 2}
    nn.ModuleDict({"backbone": convolutional()}).load_state_dict(state, strict=True)
    nn.DataParallel(convolutional()).load_state_dict(add_prefix(model.state_dict(), "module."), strict=True)


@pytest.mark.parametrize("name", MODELS)
def test_versions_survive_there_and_back(name: str) -> None:
    state = MODELS[name]().state_dict()
    back = strip_prefix(add_prefix(state, "teacher.model"), "teacher.model")
    assert list(back) == list(state)
    assert metadata(back) == metadata(state)


def test_a_checkpoint_s_versions_are_renamed_like_a_state_dict_s(tmp_path: Path) -> None:
    state = nn.DataParallel(convolutional()).state_dict()
    opened = ckpt_surgeon.open(save_zip(state, tmp_path))
    assert strip_prefix(opened).versions == metadata(strip_prefix(state))


TREES: st.SearchStrategy[object] = st.recursive(
    st.sampled_from(["linear", "norm", "relu"]),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3), st.tuples(st.sampled_from([nn.DataParallel, Compiled]), inner)
    ),
    max_leaves=8,
)


def grown(tree: object, *, wrapped: bool) -> nn.Module:
    if isinstance(tree, list):
        return nn.Sequential(*(grown(branch, wrapped=wrapped) for branch in tree))
    if isinstance(tree, tuple):
        wrapper, inner = tree
        model = grown(inner, wrapped=wrapped)
        return wrapper(model) if wrapped else model
    return {"linear": lambda: nn.Linear(2, 2), "norm": lambda: nn.BatchNorm1d(2), "relu": nn.ReLU}[str(tree)]()  # type: ignore[no-untyped-call]


@given(TREES)
def test_any_wrapped_model_loads_strictly_once_it_is_peeled(tree: object) -> None:
    state = grown(tree, wrapped=True).state_dict()
    plain = grown(tree, wrapped=False)
    stripped = strip_prefix(state, wrappers=True, allow_unmatched=True)
    assert list(stripped) == list(plain.state_dict())
    with_keys = {key.rpartition(".")[0] for key in stripped}
    for path, version in metadata(plain.state_dict()).items():
        if path in with_keys:
            assert metadata(stripped)[path] == version
    plain.load_state_dict(stripped, strict=True)
