"""Rename, keep, drop and select: by components, indices and expressions, and where other tools lose tensors."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import pytest
import safetensors.torch
import torch
import torchvision
from command_line import Run
from hypothesis import assume, given
from hypothesis import strategies as st
from tables import assert_same, groups, ramp, save_safetensors, save_zip
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

import ckpt_surgeon
from ckpt_surgeon import EditError, KeyCollision, NothingMatched, drop, keep, rename, select
from ckpt_surgeon.edits.keys import DERIVABLE

Kind = TypeVar("Kind", bound=Mapping)  # type: ignore[type-arg]

WORDS = ["a", "b", "ab", "layers", "weight", "0", "1", "12", "größe", "module"]
COMPONENTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5)
KEYS = st.lists(COMPONENTS.map(".".join), unique=True, min_size=1, max_size=12)


def numbered(keys: list[str]) -> dict[str, int]:
    return {key: index for index, key in enumerate(keys)}


def renamed(keys: list[str], *pairs: str, regex: bool = False) -> list[str]:
    """The new names, in order; the values have to follow their keys."""
    result = rename(numbered(keys), pairs, regex=regex)
    assert list(result.values()) == list(range(len(keys)))
    return list(result)


def tried(state: Kind, pairs: list[tuple[str, str]]) -> tuple[Kind, tuple[str, ...]]:
    """The renamed state, or the state and what is wrong with renaming it."""
    try:
        return rename(state, pairs), ()
    except EditError as error:
        return state, error.problems


# -- whole components


@pytest.mark.parametrize(
    ("pair", "key", "wanted"),
    [
        ("fc=head", "fc.weight", "head.weight"),
        ("fc=head", "net.fc.weight", "net.head.weight"),
        ("fc=head", "fc", "head"),
        ("fc.weight=head.kernel", "fc.weight", "head.kernel"),
        ("gamma=weight", "norm.gamma", "norm.weight"),
        ("encoder.layers=blocks", "model.encoder.layers.0.bias", "model.blocks.0.bias"),
        ("fc=head.fc", "fc.weight", "head.fc.weight"),
        ("model.=", "model.fc.weight", "fc.weight"),
        ("model=", "model.fc.weight", "fc.weight"),
        ("weight=", "fc.weight", "fc"),
        ("a=b", "a.a.weight", "b.b.weight"),
        ("a.a=b", "a.a.a.weight", "b.a.weight"),
        ("c++=cpp", "c++.weight", "cpp.weight"),
        ("größe=size", "größe.weight", "size.weight"),
        ("two words=one", "two words.weight", "one.weight"),
        ("a=b=c", "a.weight", "b=c.weight"),
    ],
)
def test_an_old_name_is_whole_components_anywhere(pair: str, key: str, wanted: str) -> None:
    assert renamed([key], pair) == [wanted]


@pytest.mark.parametrize("key", ["module_a.weight", "submodule.weight", "modules.weight", "a.module1", "mod.ule"])
def test_a_part_of_a_component_is_never_touched(key: str) -> None:
    with pytest.raises(NothingMatched):
        rename({key: 1}, ["module=x"])


def test_a_circumflex_binds_to_the_beginning_and_a_dollar_to_the_end() -> None:
    keys = ["model.fc.model", "fc.model.x", "model", "x.model"]
    assert renamed(keys, "^model=net") == ["net.fc.model", "fc.model.x", "net", "x.model"]
    assert renamed(keys, "model$=net") == ["model.fc.net", "fc.model.x", "net", "x.net"]
    assert renamed(keys, "^model$=net") == ["model.fc.model", "fc.model.x", "net", "x.model"]


def test_a_dollar_is_the_end_and_not_the_line_break_before_it() -> None:
    assert renamed(["a.gamma\n", "b.gamma"], "gamma$=weight") == ["a.gamma\n", "b.weight"]


def test_at_each_component_the_first_pair_that_fits_wins() -> None:
    assert renamed(["a.b.c", "b.c"], "a.b=x", "b=y", "c=z") == ["x.z", "y.z"]
    assert renamed(["a.v", "a.w"], "^a.w$=whole", "a=x") == ["x.v", "whole"]
    assert renamed(["a.v", "a.w", "b"], "^a.v$=v", "a=x", "^b$=a.w") == ["v", "x.w", "a.w"]
    with pytest.raises(NothingMatched, match=re.escape("'^a.w$'")):
        rename({"a.v": 1, "a.w": 2}, ["a=x", "^a.w$=never"])


def test_names_can_be_swapped() -> None:
    assert renamed(["a.w", "b.w"], "a=b", "b=a") == ["b.w", "a.w"]
    assert renamed(["q.k", "k.q"], "^q.k$=k.q", "^k.q$=q.k") == ["k.q", "q.k"]
    assert renamed(["a", "b", "c"], "a=b", "b=c", "c=a") == ["b", "c", "a"]


def test_several_pairs_rename_several_parts_of_one_key() -> None:
    key = "model.encoder.layers.3.self_attn.gamma"
    pairs = ["^model=", "encoder.layers.{n}=blocks.{n+1}", "self_attn=attn", "gamma$=weight"]
    assert renamed([key], *pairs) == ["blocks.4.attn.weight"]


def test_pairs_may_be_a_mapping_or_tuples_or_one_string() -> None:
    state = {"a=b.w": 1, "c.w": 2}
    assert rename(state, {"a=b": "x"}) == {"x.w": 1, "c.w": 2}
    assert rename(state, [("a=b", "x"), ("c", "y")]) == {"x.w": 1, "y.w": 2}
    assert rename(state, "c=y") == {"a=b.w": 1, "y.w": 2}


# -- indices


@pytest.mark.parametrize(
    ("pair", "key", "wanted"),
    [
        ("layers.{n}=blocks.{n}", "layers.11.w", "blocks.11.w"),
        ("layers.{n}=blocks.{n+1}", "layers.9.w", "blocks.10.w"),
        ("layers.{n}=blocks.{n-1}", "net.layers.10.w", "net.blocks.9.w"),
        ("layers.{n}=blocks.{n*2}", "layers.3.w", "blocks.6.w"),
        ("layers.{n}=blocks.{n//2}", "layers.7.w", "blocks.3.w"),
        ("layers.{n}=blocks.{n + 1}", "layers.9.w", "blocks.10.w"),
        ("layer{n}=blocks.{n-1}", "layer1.0.w", "blocks.0.0.w"),
        ("{a}.{b}={b}.{a}", "x.1.2.w", "x.2.1.w"),
        ("stages.{s}.blocks.{b}=layers.{b}.{s+1}", "stages.0.blocks.5.w", "layers.5.1.w"),
        ("{n}.x.{n}=same.{n}", "3.x.3.w", "same.3.w"),
        ("layers.{n}=blocks.{n}.{n+1}", "layers.1.w", "blocks.1.2.w"),
        ("layers.{n}=blocks.{n}", "layers.007.w", "blocks.007.w"),
        ("layers.{n}=blocks.{n+1}", "layers.007.w", "blocks.8.w"),
        ("layers.{n}$=blocks.{n}", "layers.1", "blocks.1"),
    ],
)
def test_an_index_stands_for_an_integer_and_can_be_computed_with(pair: str, key: str, wanted: str) -> None:
    assert renamed([key], pair) == [wanted]


@pytest.mark.parametrize("key", ["layers.x.w", "layers.1a.w", "layers.-1.w", "layers.1.5x", "layers.٣.w", "layers..w"])
def test_only_digits_are_an_index(key: str) -> None:
    with pytest.raises(NothingMatched):
        rename({key: 1}, ["layers.{n}.w=w.{n}"])


def test_one_index_twice_is_one_number() -> None:
    assert renamed(["1.x.1", "1.x.2"], "{n}.x.{n}=both.{n}") == ["both.1", "1.x.2"]


def test_an_index_below_zero_is_an_error_that_names_every_key() -> None:
    with pytest.raises(EditError) as raised:
        rename({"layers.0.w": 1, "layers.1.w": 2, "layers.0.b": 3}, ["layers.{n}=blocks.{n-1}"])
    assert len(raised.value.problems) == 2
    assert "no component is negative" in str(raised.value)


def test_a_number_of_thousands_of_digits_is_refused_where_it_would_be_computed_with() -> None:
    key = f"layers.{'9' * 5000}.w"
    assert renamed([key], "layers.{n}=blocks.{n}") == [key.replace("layers", "blocks")]
    with pytest.raises(EditError, match="no number to compute"):
        rename({key: 1}, ["layers.{n}=blocks.{n+1}"])


def test_indices_can_be_shifted_within_one_name() -> None:
    keys = [f"layers.{index}.w" for index in range(12)]
    assert renamed(keys, "layers.{n}=layers.{n+1}") == [f"layers.{index}.w" for index in range(1, 13)]


# -- regular expressions


@pytest.mark.parametrize(
    ("pair", "key", "wanted"),
    [
        (r"(.*)\.gamma=\1.weight", "norm.gamma", "norm.weight"),
        (r"(?P<head>.*)\.attn\.(\w+)=\g<head>.attention.\2", "b.0.attn.qkv", "b.0.attention.qkv"),
        (r"layers\.(?P<n>\d+)\.(.*)=blocks.{n+1}.\2", "layers.9.w", "blocks.10.w"),
        (r"(layers\.)(?P<n>\d+)(.*)=\1{n+1}\3", "layers.9.w", "layers.10.w"),
        (r"(layers\.)(?P<n>\d+)(.*)=\1{n}0\3", "layers.9.w", "layers.90.w"),
        (r"(x)?(.*)=\1\2y", "abc", "abcy"),
        (r"a(?=b)(.*)=x\1", "abc", "xbc"),
        (r"(?P<q>.)(?P=q)(.*)=\2", "aab", "b"),
        (r"(?P<path>.*)\\(.*)={path}/\2", r"a\1\b", r"a\1/b"),
    ],
)
def test_an_expression_matches_whole_keys_and_gives_groups(pair: str, key: str, wanted: str) -> None:
    assert renamed([key], pair, regex=True) == [wanted]


def test_an_expression_that_fits_only_a_part_of_a_key_does_not_fit() -> None:
    with pytest.raises(NothingMatched):
        rename({"net.fc.weight": 1}, {"fc": "head"}, regex=True)


def test_a_key_is_renamed_by_the_first_expression_that_fits_it() -> None:
    assert renamed(["a.w", "b.w"], r"a\.(.*)=b.\1", r"b\.(.*)=a.\1", regex=True) == ["b.w", "a.w"]
    with pytest.raises(NothingMatched):
        rename({"a.w": 1}, [r".*=x", r"a\.w=y"], regex=True)


@given(KEYS, st.sampled_from([r"(\w+)\.(.*)", r"(.*)\.(\w+)", r"(a)(.*)", r"(?P<x>[^.]*)\.(\d+)"]))
def test_an_expression_does_what_python_s_own_matching_does(keys: list[str], pattern: str) -> None:
    template = r"new.\2.\1"
    wanted = [found.expand(template) if (found := re.fullmatch(pattern, key)) else key for key in keys]
    assume(wanted != keys)
    if len(set(wanted)) < len(wanted):
        with pytest.raises(KeyCollision):
            rename(numbered(keys), {pattern: template}, regex=True)
    else:
        assert list(rename(numbered(keys), {pattern: template}, regex=True)) == wanted


def test_a_group_that_is_no_number_cannot_be_computed_with() -> None:
    for pattern in (r"a(?P<n>.*)", r"(?P<n>\d)?a.*"):
        with pytest.raises(EditError, match=r"no number to compute \{n\+1\} with"):
            rename({"abc": 1}, [(pattern, "{n+1}")], regex=True)


# -- what is not well formed, and what does not fit


@pytest.mark.parametrize(
    ("old", "new", "regex", "problem"),
    [
        ("layers.{n}", "blocks.{m}", False, "has no {m} in the old one"),
        ("layers.{n}", "blocks.{n/2}", False, "a brace that is no index"),
        ("layers.{n}", "blocks.{n+}", False, "a brace that is no index"),
        ("layers.{n}", "blocks.{n", False, "a brace that is no index"),
        ("layers.{n}", "blocks.{n+1.5}", False, "a brace that is no index"),
        ("layers.{n}", "blocks.{n//0}", False, "divides by zero"),
        ("", "x", False, "is empty"),
        ("^", "x", False, "is empty"),
        (".", "x", False, "is empty"),
        ("(", "x", True, "unterminated"),
        ("(.*)", r"\2", True, "group"),
        ("(.*)", r"\q", True, "escape"),
        ("(.*)", r"\g<name>", True, "name"),
        (r"(\d+)", "{n+1}", True, "has no {n}"),
        (r"(?P<n>\d+)", "{n!r}", True, "a brace that is no index"),
    ],
)
def test_a_pair_that_is_not_well_formed_is_an_error(old: str, new: str, regex: bool, problem: str) -> None:
    with pytest.raises(EditError, match=re.escape(problem)) as raised:
        rename({"layers.1.w": 1}, [(old, new)], regex=regex)
    assert not isinstance(raised.value, NothingMatched)


def test_all_pairs_that_are_not_well_formed_are_named_at_once() -> None:
    with pytest.raises(EditError) as raised:
        rename({"a": 1}, [("(", "x"), ("a", "b"), ("[", "y")], regex=True)
    assert len(raised.value.problems) == 2
    with pytest.raises(EditError) as raised:
        rename({"a": 1}, ["a", "=b", "c=d"])
    assert len(raised.value.problems) == 2


@pytest.mark.parametrize("pairs", [["a"], ["=b"], [("a",)], [("a", "b", "c")]])
def test_what_is_no_pair_is_an_error(pairs: list[tuple[str, str]]) -> None:
    with pytest.raises(EditError):
        rename({"a": 1}, pairs)


def test_a_key_cannot_be_renamed_to_nothing() -> None:
    for pair in ("a=", "^a$=", "^b.c$="):
        with pytest.raises(EditError, match="renamed to nothing"):
            rename({"a": 1, "b.c": 2}, [pair])


def test_all_pairs_that_no_key_answers_to_are_named_at_once() -> None:
    with pytest.raises(NothingMatched) as raised:
        rename({"fc.weight": 1}, ["fc=head", "conv=stem", "^weight=kernel"])
    assert raised.value.patterns == ("conv", "^weight")
    assert renamed(["fc.weight"], "fc=head")
    assert rename({"fc.weight": 1}, ["conv=stem"], allow_unmatched=True) == {"fc.weight": 1}


def test_two_keys_that_would_become_one_are_an_error_and_all_are_named() -> None:
    state = {"a.w": 1, "b.w": 2, "a.b": 3, "b.b": 4, "c": 5}
    with pytest.raises(KeyCollision) as raised:
        rename(state, ["^a=b"])
    assert raised.value.collisions == {"b.w": ("a.w", "b.w"), "b.b": ("a.b", "b.b")}


def test_on_collision_says_which_key_stays_and_the_others_are_counted() -> None:
    state = {"a.w": 1, "b.w": 2, "c": 3}
    assert rename(state, ["a=b"], on_collision="first") == {"b.w": 1, "c": 3}
    assert rename(state, ["a=b"], on_collision="last") == {"b.w": 2, "c": 3}
    change = rename.plan(state, ["a=b"], on_collision="last")
    assert change.dropped == ("a.w",)
    assert change.notes == ("1 collisions: the last key stays",)
    with pytest.raises(EditError, match="error, first or last"):
        rename(state, ["a=b"], on_collision="both")  # type: ignore[arg-type]


# -- on random keys and rules


OLDS = st.lists(st.sampled_from([*WORDS, "{n}"]), min_size=1, max_size=3)
NEWS = st.lists(st.sampled_from(["new", "a", "layers", "{n}", "{n+1}", "{n*2}"]), max_size=3)


@st.composite
def rules(draw: st.DrawFn) -> tuple[str, str]:
    old = draw(OLDS)
    new = [word if "{n}" in old or "{" not in word else "fixed" for word in draw(NEWS)]
    start, end = draw(st.sampled_from(["", "^"])), draw(st.sampled_from(["", "$"]))
    return f"{start}{'.'.join(old)}{end}", ".".join(new)


def fits(old: str, parts: list[str], at: int) -> tuple[int, str] | None:
    """How many components a rule takes at a place, and its index: the rule's meaning, spelled out."""
    wanted = old.removeprefix("^").removesuffix("$").split(".")
    here = parts[at : at + len(wanted)]
    if len(here) < len(wanted) or (old[0] == "^" and at) or (old[-1] == "$" and at + len(wanted) < len(parts)):
        return None
    indices = {part for part, word in zip(here, wanted, strict=True) if word == "{n}"}
    plain = all(part == word for part, word in zip(here, wanted, strict=True) if word != "{n}")
    if not plain or len(indices) > 1 or not all(index.isdigit() for index in indices):
        return None
    return len(wanted), indices.pop() if indices else ""


def spelled_out(key: str, pairs: list[tuple[str, str]]) -> str:
    parts, made, at = key.split("."), [], 0
    while at < len(parts):
        for old, new in pairs:
            found = fits(old, parts, at)
            if found is not None:
                count, n = found
                values = {"{n}": n, "{n+1}": str(int(n or 0) + 1), "{n*2}": str(int(n or 0) * 2)}
                made += [values.get(word, word) for word in new.split(".") if word]
                at += count
                break
        else:
            made.append(parts[at])
            at += 1
    return ".".join(made)


@given(KEYS, st.lists(rules(), min_size=1, max_size=4))
def test_rules_mean_what_they_say_and_nothing_is_lost_without_an_error(
    keys: list[str], pairs: list[tuple[str, str]]
) -> None:
    wanted = [spelled_out(key, pairs) for key in keys]
    state = numbered(keys)
    if "" in wanted:
        with pytest.raises(EditError, match="renamed to nothing"):
            rename(state, pairs, allow_unmatched=True)
    elif len(set(wanted)) < len(wanted):
        with pytest.raises(KeyCollision) as raised:
            rename(state, pairs, allow_unmatched=True)
        lost = {new: tuple(old for old, name in zip(keys, wanted, strict=True) if name == new) for new in wanted}
        assert raised.value.collisions == {new: olds for new, olds in lost.items() if len(olds) > 1}
    else:
        assert list(rename(state, pairs, allow_unmatched=True).items()) == list(
            zip(wanted, state.values(), strict=True)
        )


@given(KEYS, st.lists(rules(), min_size=1, max_size=4))
def test_a_rule_without_a_key_is_an_error_whatever_the_others_do(keys: list[str], pairs: list[tuple[str, str]]) -> None:
    with pytest.raises(EditError):
        rename(numbered(keys), [*pairs, ("nowhere", "x")])


@given(KEYS, st.lists(rules(), min_size=1, max_size=3))
def test_renaming_a_file_and_a_dict_of_tensors_agree(keys: list[str], pairs: list[tuple[str, str]]) -> None:
    state = {key: torch.tensor(index) for index, key in enumerate(keys)}
    checkpoint = ckpt_surgeon.from_torch(state)
    wanted, problems = tried(state, pairs)
    made, same_problems = tried(checkpoint, pairs)
    assert problems == same_problems
    if not problems:
        assert_same(ckpt_surgeon.load(made), wanted)
        assert all(wanted[new] is state[old] for old, new in zip(state, wanted, strict=True))


# -- keep, drop, select


STATE = numbered(["conv.weight", "conv.bias", "fc.weight", "fc.bias", "bn.num_batches_tracked", "fc2.weight"])


@pytest.mark.parametrize(
    ("patterns", "kept"),
    [
        ("fc.*", ["fc.weight", "fc.bias"]),
        (["fc*", "conv.bias"], ["conv.bias", "fc.weight", "fc.bias", "fc2.weight"]),
        ("*.weight", ["conv.weight", "fc.weight", "fc2.weight"]),
        ("fc?.weight", ["fc2.weight"]),
        ("[cb]*", ["conv.weight", "conv.bias", "bn.num_batches_tracked"]),
        ("*", list(STATE)),
        ("fc.weight", ["fc.weight"]),
    ],
)
def test_keep_and_drop_take_globs_on_whole_keys(patterns: str | list[str], kept: list[str]) -> None:
    assert list(keep(STATE, patterns)) == kept
    assert list(drop(STATE, patterns)) == [key for key in STATE if key not in kept]
    assert drop.plan(STATE, patterns).dropped == tuple(kept)


@pytest.mark.parametrize("edit", [keep, drop])
def test_globs_that_no_key_matches_are_all_named(edit: Callable[..., Mapping[str, int]]) -> None:
    with pytest.raises(NothingMatched) as raised:
        edit(STATE, ["fc", "conv.*", "FC.*", "fc.weight.*"])
    assert raised.value.patterns == ("fc", "FC.*", "fc.weight.*")
    assert edit(STATE, ["fc", "conv.*"], allow_unmatched=True) == edit(STATE, "conv.*")


def test_drop_without_a_pattern_is_an_error() -> None:
    with pytest.raises(EditError, match="needs patterns"):
        drop(STATE)


def test_derivable_buffers_are_dropped_as_a_class() -> None:
    keys = ["bn.weight", *(f"layers.0.{name}" for name in DERIVABLE), DERIVABLE[0], "position_ids.weight"]
    assert list(drop(numbered(keys), derivable=True)) == ["bn.weight", "position_ids.weight"]
    assert list(drop(numbered(keys), "bn.*", derivable=True)) == ["position_ids.weight"]
    with pytest.raises(NothingMatched, match="num_batches_tracked"):
        drop({"fc.weight": 1}, derivable=True)
    assert drop({"fc.weight": 1}, derivable=True, allow_unmatched=True) == {"fc.weight": 1}


def test_what_is_derivable_is_made_by_the_model_itself() -> None:
    model = torchvision.models.resnet18(num_classes=2)
    lean = drop(model.state_dict(), derivable=True)
    found = torchvision.models.resnet18(num_classes=2).load_state_dict(lean, strict=False)
    assert len(found.missing_keys) == 20
    assert all(key.endswith("num_batches_tracked") for key in found.missing_keys)
    assert not found.unexpected_keys


def test_a_sub_tree_is_selected_and_the_others_are_counted() -> None:
    backbone, head = nn.Linear(3, 2), nn.Linear(2, 2)
    state = {f"encoder_q.{key}": value for key, value in backbone.state_dict().items()}
    state |= {f"encoder_k.{key}": value for key, value in head.state_dict().items()} | {"queue": ramp(4)}
    for prefix in ("encoder_q", "encoder_q."):
        change = select.plan(state, prefix)
        nn.Linear(3, 2).load_state_dict(change.result, strict=True)
        assert_same(change.result, backbone.state_dict())
        assert change.notes == ("3 keys outside 'encoder_q.' left out",)
        assert change.dropped == ("encoder_k.weight", "encoder_k.bias", "queue")
    for prefix in ("encoder", "queue", ""):
        with pytest.raises(NothingMatched):
            select(state, prefix)


# -- where other tools lose tensors


def test_stripping_by_renaming_does_not_lose_a_tensor_as_timm_and_mmengine_and_torch_do() -> None:
    theirs = {"module.a": 1, "a": 2}
    consume_prefix_in_state_dict_if_present(theirs, "module.")
    assert theirs == {"a": 1}  # the defect
    with pytest.raises(KeyCollision) as raised:
        rename({"module.a": 1, "a": 2}, ["^module="])
    assert raised.value.collisions == {"a": ("module.a", "a")}


def test_names_that_begin_alike_are_not_cut_as_open_clip_does() -> None:
    state = {"module_a.weight": 1, "head.weight": 2}
    theirs = {key[len("module.") :]: value for key, value in state.items()}  # its rule, once the first key says module
    assert list(theirs) == ["a.weight", "ight"]  # the defect
    with pytest.raises(NothingMatched):
        rename(state, ["^module="])


def test_a_mapping_that_sends_two_keys_to_one_name_is_an_error_and_not_a_loss_as_in_transformers() -> None:
    mapping = {r"^.*\.(query|key)$": "attn.qk"}
    state = {"attn.query": 1, "attn.key": 2}
    theirs = {re.sub(old, new, key): value for key, value in state.items() for old, new in mapping.items()}
    assert theirs == {"attn.qk": 2}  # the defect
    with pytest.raises(KeyCollision):
        rename(state, mapping, regex=True)


def test_a_dropped_layer_is_gone_and_a_name_that_drops_nothing_is_an_error(ckpt: Run, tmp_path: Path) -> None:
    source = save_zip(nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 2, 3), fc=nn.Linear(2, 2))).state_dict(), tmp_path)
    ran = ckpt("drop", source, tmp_path / "out.pth", "fc")  # checkpoint-tools --ignore-key fc leaves it in
    assert ran.status == 2
    assert "'fc' matches no key" in ran.err
    assert not (tmp_path / "out.pth").exists()
    assert ckpt("drop", source, tmp_path / "out.pth", "fc.*").status == 0
    assert list(torch.load(tmp_path / "out.pth")) == ["conv.weight", "conv.bias"]


def test_order_and_versions_are_kept_where_graftr_reverses_and_drops_them(ckpt: Run, tmp_path: Path) -> None:
    old = nn.Sequential(OrderedDict(stem=nn.Conv2d(1, 2, 3), norm=nn.BatchNorm2d(2)))
    new = nn.Sequential(OrderedDict(conv1=nn.Conv2d(1, 2, 3), bn1=nn.BatchNorm2d(2)))
    source, out = save_zip(old.state_dict(), tmp_path), tmp_path / "out.pth"
    assert ckpt("rename", source, out, "stem=conv1", "norm=bn1").status == 0
    made = torch.load(out)
    assert list(made) == list(new.state_dict())
    assert made._metadata == new.state_dict()._metadata  # type: ignore[attr-defined]
    new.load_state_dict(made, strict=True)
    assert_same(new.state_dict(), rename(old.state_dict(), ["stem=conv1", "norm=bn1"]))


def test_a_tie_survives_a_rename(tmp_path: Path) -> None:
    weight = ramp(6, 4)
    source = save_zip({"wte.weight": weight, "lm_head.weight": weight, "rows": weight[:2]}, tmp_path)
    ckpt_surgeon.save(rename(ckpt_surgeon.open(source), ["wte=embed"]), tmp_path / "out.pth")
    made = torch.load(tmp_path / "out.pth")
    assert groups(made) == {frozenset({"embed.weight", "lm_head.weight"})}
    assert made["rows"].untyped_storage().nbytes() == 2 * 4 * 4


# -- on the command line


def test_rules_can_come_from_a_file_with_comments(ckpt: Run, tmp_path: Path) -> None:
    source = save_zip({"layers.0.gamma": ramp(2), "layers.1.gamma": ramp(3), "fc.weight": ramp(4)}, tmp_path)
    rules = tmp_path / "rules.txt"
    rules.write_text("# the old names\n\nlayers.{n}=blocks.{n+1}\n  gamma=weight  \n", encoding="utf-8")
    assert ckpt("rename", source, tmp_path / "a.pth", "fc=head", "--from", rules).status == 0
    assert list(torch.load(tmp_path / "a.pth")) == ["blocks.1.weight", "blocks.2.weight", "head.weight"]
    rules.write_text("layers.*\nnone.*\n", encoding="utf-8")
    ran = ckpt("drop", source, tmp_path / "b.pth", "--from", rules)
    assert ran.status == 2
    assert "'none.*' matches no key" in ran.err
    assert ckpt("drop", source, tmp_path / "b.pth", "--from", rules, "--allow-unmatched").status == 0
    assert list(torch.load(tmp_path / "b.pth")) == ["fc.weight"]
    assert ckpt("keep", source, tmp_path / "c.pth", "--from", rules, "fc.*", "--allow-unmatched").status == 0
    assert len(torch.load(tmp_path / "c.pth")) == 3
    assert ckpt("keep", source, tmp_path / "d.pth", "--from", tmp_path / "nowhere.txt").status == 2


def test_expressions_and_collisions_on_the_command_line(ckpt: Run, tmp_path: Path) -> None:
    source, out = save_safetensors({"a.q": ramp(2), "a.k": ramp(3)}, tmp_path), tmp_path / "out.safetensors"
    rule = r"(.*)\.(q|k)=\1.qk"
    ran = ckpt("rename", source, out, "--regex", rule)
    assert (ran.status, out.exists()) == (2, False)
    assert "'a.k', 'a.q' all become 'a.qk'" in ran.err or "'a.q', 'a.k' all become 'a.qk'" in ran.err
    ran = ckpt("rename", source, out, "--regex", rule, "--on-collision", "first")
    assert ran.status == 0
    assert "1 collisions: the first key stays" in ran.out
    first = next(iter(ckpt_surgeon.open(source)))
    assert_same(safetensors.torch.load_file(out), {"a.qk": safetensors.torch.load_file(source)[first]})


def test_a_dry_run_shows_every_key_and_writes_nothing(ckpt: Run, tmp_path: Path) -> None:
    keys = [f"layers.{index}.weight" for index in range(30)]
    source = save_zip({key: ramp(2) for key in keys}, tmp_path)
    ran = ckpt("rename", source, tmp_path / "out.pth", "layers.{n}=blocks.{n+1}", "--dry-run")
    assert ran.status == 0
    rows = [line.split() for line in ran.out.splitlines()]
    for index, key in enumerate(keys):
        assert [key, "→", f"blocks.{index + 1}.weight", "float32", "[2]", "8"] in rows
    assert not (tmp_path / "out.pth").exists()


def test_a_selected_sub_tree_loads_strictly(ckpt: Run, tmp_path: Path) -> None:
    model = torchvision.models.resnet18(num_classes=2)
    state = {f"encoder_q.{key}": value for key, value in model.state_dict().items()} | {"queue": ramp(8)}
    source, out = save_zip({"state_dict": state, "epoch": 200}, tmp_path), tmp_path / "encoder.safetensors"
    ran = ckpt("select", source, out, "--prefix", "encoder_q.")
    assert ran.status == 0
    assert "1 keys outside 'encoder_q.' left out" in ran.out
    made = safetensors.torch.load_file(out)
    torchvision.models.resnet18(num_classes=2).load_state_dict(made, strict=True)
    assert_same(made, model.state_dict(), order=False)
