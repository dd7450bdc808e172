"""Alignments are judged against renames written by hand, and against random ones that are known by construction."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from alignments import Shapes, aligned, flat, of, on_meta, one_rule, renamed, replaced, rules, shapes, tree
from command_line import Run
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import CONVOLUTIONS, FCN32s, Regrouped
from transformers import BertConfig, BertModel

import ckpt_surgeon
from ckpt_surgeon.edits.recipe import Recipe
from ckpt_surgeon.models.align import align
from ckpt_surgeon.models.align_recipe import alignment_recipe, commented

# Scenarios D and E


REGROUPED = (
    (r"^conv1\.", "convnet_1.0."), (r"^bn1\.", "convnet_1.1."), (r"^layer1\.", "convnet_2.0."),
    (r"^layer2\.", "convnet_2.1."), (r"^layer3\.", "convnet_3.0."), (r"^layer4\.", "convnet_3.1."),
)  # fmt: skip


def fcn_name(key: str) -> str:
    path, number, leaf = key.split(".")
    if path == "features":
        return f"conv{CONVOLUTIONS[int(number)]}.{leaf}"
    return {"0": "fc6", "3": "fc7"}[number] + f".{leaf}"


def test_a_regrouped_resnet_50_is_aligned_and_only_its_head_has_another_shape() -> None:
    source, target = on_meta(torchvision.models.resnet50), on_meta(Regrouped)
    found = aligned(source, target)
    assert found.pairs == {key: replaced(*REGROUPED)(key) for key in source}
    assert not found.ambiguous
    assert [one.new for one in found.proposals if one.certainty == "other shape"] == ["fc.weight", "fc.bias"]
    assert len(rules(alignment_recipe(found, source))) == 6


def test_vgg_16_is_aligned_to_fcn32s_with_its_linear_layers_as_convolutions() -> None:
    source, target = on_meta(torchvision.models.vgg16), on_meta(FCN32s)
    found = aligned(source, target)
    assert found.pairs == {key: fcn_name(key) for key in source if not key.startswith("classifier.6")}
    assert {one.new: one.reshape for one in found.proposals if one.reshape} == {
        "fc6.weight": (4096, 512, 7, 7),
        "fc7.weight": (4096, 4096, 1, 1),
    }
    assert found.missing == ("score_fr.weight", "score_fr.bias", "upscore.weight")
    assert found.unused == ("classifier.6.weight", "classifier.6.bias")
    assert len(rules(alignment_recipe(found, source))) <= 17


def test_vgg_16_is_aligned_to_fcn32s_from_a_file_that_sorts_its_keys() -> None:
    source, target = on_meta(torchvision.models.vgg16), on_meta(FCN32s)
    found = aligned({key: source[key] for key in sorted(source)}, target)
    assert found.pairs == {key: fcn_name(key) for key in sorted(source) if not key.startswith("classifier.6")}


# Other people's models


TIMM_VIT = replaced(
    (r"^class_token", "cls_token"), (r"^conv_proj", "patch_embed.proj"), (r"^encoder\.pos_embedding", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_", "blocks."), (r"ln_(\d)", r"norm\1"), ("self_attention.in_proj_", "attn.qkv."),
    ("self_attention.out_proj", "attn.proj"), (r"mlp\.0", "mlp.fc1"), (r"mlp\.3", "mlp.fc2"),
    (r"^encoder\.ln", "norm"), (r"^heads\.head", "head"),
)  # fmt: skip


def test_torchvisions_vit_becomes_timms_and_back() -> None:
    ours = on_meta(torchvision.models.vit_b_16)
    theirs = on_meta(lambda: timm.create_model("vit_base_patch16_224"))
    names = {key: TIMM_VIT(key) for key in ours}
    assert set(names.values()) == set(theirs)
    there, back = aligned(ours, theirs), aligned(theirs, ours)
    assert there.pairs == names
    assert back.pairs == {new: old for old, new in names.items()}
    assert there.complete
    assert back.complete
    assert len(rules(alignment_recipe(there, ours))) <= 12
    assert len(rules(alignment_recipe(back, theirs))) <= 12


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvisions_resnet_is_timms_already(name: str) -> None:
    ours = on_meta(getattr(torchvision.models, name))
    theirs = on_meta(lambda: timm.create_model(name))
    for source, target in ((ours, theirs), (theirs, ours)):
        found = aligned(source, target)
        assert found.pairs == {key: key for key in source}
        assert found.complete
        assert not alignment_recipe(found, source).steps


RESNET = on_meta(torchvision.models.resnet18)


@pytest.mark.parametrize(
    "prefix", ["model.", "net.", "model.net.", "module.model.", "module.encoder_q.", "state._orig_mod."]
)
def test_a_wrapped_model_loses_its_prefix_and_gets_it_back(prefix: str) -> None:
    wrapped, names = renamed(RESNET, lambda key: prefix + key)
    assert aligned(wrapped, RESNET).pairs == names
    assert aligned(RESNET, wrapped).pairs == {key: prefix + key for key in RESNET}
    assert len(rules(alignment_recipe(aligned(wrapped, RESNET), wrapped))) == 1
    assert len(rules(alignment_recipe(aligned(RESNET, wrapped), RESNET))) == 1


@pytest.mark.parametrize("with_queue", [True, False])
def test_of_mocos_two_encoders_the_query_encoder_is_taken_and_the_reason_says_so(with_queue: bool) -> None:
    query, names = renamed(RESNET, lambda key: f"module.encoder_q.{key}")
    key_encoder, _ = renamed(RESNET, lambda key: f"module.encoder_k.{key}")
    queue = of({"module.queue": (128, 65536), "module.queue_ptr": (1,)}) if with_queue else {}
    for source in ({**query, **key_encoder, **queue}, {**queue, **key_encoder, **query}):
        found = aligned(source, RESNET)
        assert found.pairs == names
        assert all("encoder_k is the momentum copy" in one.reason for one in found.proposals)
        assert set(found.unused) == {*key_encoder, *queue}


def test_mocos_projection_head_is_left_over_when_the_target_has_another() -> None:
    source, names = renamed(
        {key: RESNET[key] for key in RESNET if not key.startswith("fc")}, lambda key: f"encoder_q.{key}"
    )
    head = of({"encoder_q.fc.0.weight": (512, 512), "encoder_q.fc.0.bias": (512,), "encoder_q.fc.2.weight": (128, 512)})
    found = aligned({**source, **head}, RESNET)
    assert {old: new for old, new in found.pairs.items() if old in names} == names
    assert set(found.missing) <= {"fc.weight", "fc.bias"}


@pytest.mark.parametrize("name", ["blocks", "layers"])
@pytest.mark.parametrize("offset", [1, 3])
def test_layers_that_are_counted_from_elsewhere_are_moved_by_the_offset(name: str, offset: int) -> None:
    target = on_meta(lambda: timm.create_model("vit_tiny_patch16_224"))

    def rename(key: str) -> str:
        return re.sub(r"^blocks\.(\d+)", lambda found: f"{name}.{int(found[1]) + offset}", key)

    source, names = renamed(target, rename)
    found = aligned(source, target)
    assert found.pairs == names
    assert rules(alignment_recipe(found, source)) == [[f"^{name}.{{n}}", f"blocks.{{n-{offset}}}"]]
    assert aligned(target, source).pairs == {old: new for new, old in names.items()}


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_bert_with_gamma_and_beta_gets_its_names_of_today(prefix: str) -> None:
    config = BertConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, vocab_size=100
    )
    target = on_meta(lambda: BertModel(config))
    old = replaced((r"LayerNorm\.weight", "LayerNorm.gamma"), (r"LayerNorm\.bias", "LayerNorm.beta"))
    source, names = renamed(target, lambda key: prefix + old(key))
    found = aligned(source, target)
    assert found.pairs == names
    assert found.complete
    assert len(rules(alignment_recipe(found, source))) <= 8


# Nothing is guessed


def test_identical_blocks_in_another_order_are_ambiguous() -> None:
    source = shapes(left__weight=(4, 4), left__bias=(4,), right__weight=(4, 4), right__bias=(4,))
    target = shapes(b__weight=(4, 4), b__bias=(4,), a__weight=(4, 4), a__bias=(4,))
    found = aligned(source, target)
    assert not found.pairs
    assert {key for one in found.ambiguous for key in one.olds} >= {"left.weight", "right.weight"}
    assert {key for one in found.ambiguous for key in one.news} >= {"a.weight", "b.weight"}


def test_two_blocks_that_changed_places_go_by_their_names_and_not_by_their_places() -> None:
    source = shapes(a__weight=(4, 4), b__weight=(4, 4))
    target = shapes(b__weight=(4, 4), a__weight=(4, 4))
    assert aligned(source, target).pairs == {"a.weight": "a.weight", "b.weight": "b.weight"}


@pytest.mark.parametrize("order", [("query", "key", "value"), ("value", "key", "query")])
def test_q_k_and_v_of_one_shape_are_not_matched_to_query_key_and_value_by_place(order: tuple[str, ...]) -> None:
    source = of({f"attn.{name}.weight": (8, 8) for name in "qkv"})
    target = of({f"attention.{name}.weight": (8, 8) for name in order})
    found = aligned(source, target)
    assert not found.pairs
    assert {key for one in found.ambiguous for key in one.olds} == set(source)
    assert {key for one in found.ambiguous for key in one.news} == set(target)


@pytest.mark.parametrize("copies", [("teacher", "student"), ("student", "teacher"), ("model", "model_ema")])
def test_of_two_copies_of_a_model_none_is_taken(copies: tuple[str, str]) -> None:
    source = {f"{copy}.{key}": entry for copy in copies for key, entry in RESNET.items()}
    found = aligned(source, RESNET)
    assert not found.pairs
    (choice,) = found.ambiguous
    assert set(choice.olds) == set(source)
    assert list(choice.news) == list(RESNET)
    assert all(repr(f"{copy}.") in choice.reason for copy in copies)


def test_a_head_more_does_not_decide_between_a_teacher_and_a_student() -> None:
    student = {f"student.{key}": entry for key, entry in RESNET.items()}
    teacher = {f"teacher.{key}": entry for key, entry in RESNET.items() if not key.startswith("fc")}
    assert not aligned({**student, **teacher}, RESNET).pairs


def test_one_encoder_is_not_given_to_one_of_two_places() -> None:
    source = {f"encoder.{key}": entry for key, entry in RESNET.items()}
    target = {f"{side}.{key}": entry for side in ("left", "right") for key, entry in RESNET.items()}
    assert not aligned(source, target).pairs


def test_shifted_blocks_do_not_keep_the_names_that_they_share_with_the_target() -> None:
    """``layers.1`` of the one is ``layers.0`` of the other, for two families alike."""
    source = of({f"{side}.layers.{n}.weight": (4, 4) for side in ("left", "right") for n in (1, 2, 3)})
    target = of({f"{side}.layers.{n}.weight": (4, 4) for side in ("left", "right") for n in (0, 1, 2)})
    truth = {key: re.sub(r"\d", lambda found: str(int(found[0]) - 1), key) for key in source}
    found = aligned(source, target)
    assert all(truth[old] == new for old, new in found.pairs.items())


def test_a_key_that_stays_open_is_not_loaded_by_its_name() -> None:
    source = shapes(layers__1__weight=(4, 4), layers__x__weight=(4, 4))
    target = shapes(layers__0__weight=(4, 4), layers__1__weight=(4, 4))
    found = aligned(source, target)
    made = alignment_recipe(found, source).apply(dict.fromkeys(source))
    assert not set(made) & set(target) - set(found.pairs.values())


def test_keys_of_the_same_name_and_another_shape_are_mismatched_and_not_missing() -> None:
    source = of({f"layers.{n}.weight": (n + 2, 3) for n in range(3)})
    target = of({f"layers.{n}.weight": (n + 7, 3) for n in range(3)})
    found = aligned(source, target)
    assert found.pairs == {key: key for key in source}
    assert {one.certainty for one in found.proposals} == {"other shape"}
    assert not found.complete


def test_nothing_in_common_is_nothing_aligned() -> None:
    source, target = shapes(a__weight=(3, 4)), shapes(b__bias=(7,))
    found = aligned(source, target)
    assert (found.pairs, found.unused, found.missing) == ({}, ("a.weight",), ("b.bias",))
    assert aligned({}, target).missing == ("b.bias",)
    assert aligned(source, {}).unused == ("a.weight",)


# The recipe, and the command


def save(path: Path, state: Mapping[str, torch.Tensor]) -> Path:
    torch.save(dict(state), path)
    return path


def test_the_recipe_of_the_command_is_what_apply_runs(tmp_path: Path, ckpt: Run) -> None:
    state = torchvision.models.resnet18().state_dict()
    wrapped = save(tmp_path / "wrapped.pth", {f"net.{key}": value for key, value in state.items()})
    recipe, out = tmp_path / "recipe.toml", tmp_path / "out.pth"
    ran = ckpt("align", wrapped, "torchvision.models:resnet18", "-o", recipe)
    assert (ran.status, ran.err) == (0, "")
    assert "'net.' taken off" in ran.out
    assert "certain" in ran.out
    assert "# 122 keys aligned" in recipe.read_text()
    assert ckpt("apply", recipe, wrapped, out).status == 0
    written = torch.load(out)
    assert list(written) == list(state)
    assert all(torch.equal(written[key], state[key]) for key in state)
    torchvision.models.resnet18().load_state_dict(written, strict=True)


def test_an_open_choice_is_told_by_status_report_and_recipe(tmp_path: Path, ckpt: Run) -> None:
    source = save(tmp_path / "qkv.pth", {f"attn.{name}.weight": torch.zeros(8, 8) for name in "qkv"})
    other = {f"attention.{name}.weight": torch.zeros(8, 8) for name in ("query", "key", "value")}
    target = save(tmp_path / "target.pth", other)
    recipe = tmp_path / "recipe.toml"
    ran = ckpt("align", source, target, "-o", recipe)
    assert ran.status == 1
    assert "open: " in ran.out
    assert "# open: attn.q.weight" in recipe.read_text()
    assert ckpt("align", source, target, "-o", recipe).status == 2
    assert ckpt("align", source, target, "-o", recipe, "--force").status == 1


def test_the_reasons_in_front_of_a_recipe_are_few() -> None:
    source, target = on_meta(torchvision.models.vit_b_16), on_meta(lambda: timm.create_model("vit_base_patch16_224"))
    found = align(source, target)
    recipe = alignment_recipe(found, source)
    text = commented(recipe, found)
    assert Recipe.loads(text) == recipe
    assert len([line for line in text.splitlines() if line.startswith("#")]) < 10


def test_diff_offers_what_align_finds(tmp_path: Path, ckpt: Run) -> None:
    state = torchvision.models.resnet18().state_dict()
    wrapped = save(tmp_path / "wrapped.pth", {f"encoder_q.{key}": value for key, value in state.items()})
    ran = ckpt("diff", wrapped, "torchvision.models:resnet18")
    assert ran.status == 1
    assert "encoder_q." in ran.out


def test_align_is_the_library_call_of_the_same_name() -> None:
    assert ckpt_surgeon.align(RESNET, RESNET).pairs == {key: key for key in RESNET}


# Random trees under random renames


def random_pair(draw: random.Random) -> tuple[Shapes, Shapes, dict[str, str]]:
    """A model under two sets of names, and which is which."""
    found = flat(tree(draw, draw.randint(1, 4)))
    names = {key: key for key in found}
    for _ in range(draw.randint(1, 3)):
        rule = one_rule(draw, list(names.values()))
        changed = {old: rule(new) for old, new in names.items()}
        names = changed if len(set(changed.values())) == len(changed) else names
    ours, theirs = of(found), of({names[key]: shape for key, shape in found.items()})
    if draw.random() < 0.5:
        return ours, theirs, names
    return theirs, ours, {new: old for old, new in names.items()}


@given(st.integers(0, 2**32))
@settings(max_examples=400, derandomize=True)
def test_a_random_tree_under_random_renames_is_aligned_back_or_left_open_and_never_wrong(seed: int) -> None:
    source, target, names = random_pair(random.Random(seed))
    found = aligned(source, target)
    assert [one for one in found.proposals if names[one.old] != one.new] == []
    assert found.complete or found.ambiguous or found.unused


@given(st.integers(0, 2**32))
@settings(max_examples=400, derandomize=True)
def test_a_random_tree_whose_keys_come_in_another_order_is_never_aligned_wrong(seed: int) -> None:
    draw = random.Random(seed)
    source, target, names = random_pair(draw)
    keys = list(source)
    draw.shuffle(keys)
    found = aligned({key: source[key] for key in keys}, target)
    assert [one for one in found.proposals if names[one.old] != one.new] == []


def test_most_random_trees_are_aligned_completely() -> None:
    pairs = [random_pair(random.Random(seed)) for seed in range(200)]
    assert sum(align(source, target).complete for source, target, _ in pairs) > 170
