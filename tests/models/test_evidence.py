"""Certain is what names or values say; what fits by its shape alone stays open."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from alignments import Shapes, aligned, flat, of, one_rule, parents, shapes, tree
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ckpt_surgeon
from ckpt_surgeon.edits.recipe import Recipe, step
from ckpt_surgeon.errors import EditError
from ckpt_surgeon.models.align import align
from ckpt_surgeon.report.alignments import fit_json
from ckpt_surgeon.tensors.torch_bridge import from_torch

NEW = ("xray", "yankee", "zulu", "whiskey", "victor", "uniform", "tango", "sierra")


# A part that was replaced


def replaced_pair(draw: random.Random) -> tuple[Shapes, Shapes, dict[str, str], set[str]]:
    """A model, and the model with one part replaced by another of the same shapes under names of its own.

    Some have a prefix besides, or another rename.  The third is what is the same on both sides, the fourth the keys
    of the part that is gone.
    """
    found = flat(tree(draw, draw.randint(2, 4)))
    sizes = {path: sum(key.startswith(f"{path}.") for key in found) for path in parents(found)}
    part = draw.choice([path for path, size in sizes.items() if size < len(found)] or [""])
    gone = {key for key in found if part and key.startswith(f"{part}.")}
    has_its_names = draw.random() < 0.3 and 3 * len(gone) < len(found)
    fresh: dict[str, str] = {}
    home = part.rpartition(".")[0]
    new_part = f"{home}.{draw.choice(NEW)}" if home else draw.choice(NEW)

    def renamed(rest: str) -> str:
        *modules, leaf = rest.split(".")
        names = [
            one if has_its_names or one.isdecimal() else fresh.setdefault(one, f"{draw.choice(NEW)}{len(fresh)}")
            for one in modules
        ]
        return ".".join([new_part, *names, leaf])

    names = {key: renamed(key[len(part) + 1 :]) if key in gone else key for key in found}
    if not has_its_names and draw.random() < 0.5:
        rule = one_rule(draw, list(names.values()))
        changed = {old: rule(new) for old, new in names.items()}
        names = changed if len(set(changed.values())) == len(changed) else names
    target = of({names[key]: shape for key, shape in found.items()})
    return of(found), target, {old: new for old, new in names.items() if old not in gone}, gone


@given(st.integers(0, 2**32))
@settings(max_examples=400, derandomize=True, deadline=None)
def test_a_part_that_was_replaced_by_another_of_the_same_shapes_is_never_certain(seed: int) -> None:
    source, target, names, _ = replaced_pair(random.Random(seed))
    found = aligned(source, target)
    certain = {one.old: one.new for one in found.proposals if one.certainty == "certain"}
    assert {old: new for old, new in certain.items() if names.get(old) != new} == {}


def test_what_is_left_of_trees_with_a_replaced_part_is_mostly_certain() -> None:
    kept = certain = 0
    for seed in range(150):
        source, target, names, _ = replaced_pair(random.Random(seed))
        kept += len(names)
        certain += sum(one.certainty == "certain" for one in align(source, target).proposals)
    assert certain > 0.7 * kept


# Rivals


def test_every_open_module_of_the_same_shape_is_a_rival() -> None:
    source = shapes(stage__norm__weight=(8,), stage__norm__bias=(8,), ln__weight=(8,), ln__bias=(8,))
    target = shapes(stage__n__weight=(8,), stage__n__bias=(8,), norm__weight=(8,), norm__bias=(8,))
    found = aligned(source, target)
    assert not found.pairs
    assert {key for one in found.ambiguous for key in one.news} >= {"stage.n.weight", "norm.weight"}


def test_a_prefix_that_one_module_of_a_common_shape_bears_is_at_most_possible() -> None:
    body = {f"body.{n}.{name}.weight": (8, 8) for n in range(4) for name in ("query", "key", "value")}
    source = of({**body, "lm.dense.weight": (8, 8), "lm.dense.bias": (8,), "lm.decoder.weight": (30, 8)})
    target = of({**body, "pooler.dense.weight": (8, 8), "pooler.dense.bias": (8,)})
    found = aligned(source, target)
    assert found.missing == ("pooler.dense.weight", "pooler.dense.bias")
    assert {one.certainty for one in found.possible} == {"possible"}
    assert {one.new for one in found.possible} == {"pooler.dense.weight", "pooler.dense.bias"}


def test_a_deeper_model_gets_no_layer_from_the_head() -> None:
    def layers(count: int) -> dict[str, tuple[int, ...]]:
        return {
            f"encoder.layer.{n}.output.{part}": shape
            for n in range(count)
            for part, shape in (
                ("dense.weight", (8, 8)),
                ("dense.bias", (8,)),
                ("norm.weight", (8,)),
                ("norm.bias", (8,)),
            )
        }

    head = {"cls.dense.weight": (8, 8), "cls.dense.bias": (8,), "cls.norm.weight": (8,), "cls.norm.bias": (8,)}
    found = align(of({**layers(2), **head}), of(layers(3))).at_least("certain")
    assert all(key.startswith("encoder.layer.2.") for key in found.missing)
    assert len(found.missing) == 4


# Other names that say so


def test_layers_counted_from_elsewhere_are_certain_by_the_names_in_them() -> None:
    parts = {"attn.qkv.weight": (24, 8), "attn.proj.weight": (8, 8), "norm.weight": (8,)}
    source = of({f"layers.{n + 1}.{part}": shape for n in range(3) for part, shape in parts.items()})
    target = of({f"blocks.{n}.{part}": shape for n in range(3) for part, shape in parts.items()})
    found = aligned(source, target)
    assert {one.certainty for one in found.proposals} == {"certain"}
    assert found.complete


def test_kohyas_flat_names_are_dotted_ones_where_only_one_reads_so() -> None:
    target = of({
        "mid_block.attentions.0.proj_in.lora_A.weight": (4, 8), "mid_block.attentions.0.proj_in.lora_B.weight": (8, 4),
        "mid_block.attentions.1.proj_in.lora_A.weight": (4, 8), "a_b.c_d.lora_A.weight": (2, 2),
        "a.b_c.d.lora_A.weight": (2, 2),
    })  # fmt: skip
    flat = {
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": "mid_block.attentions.0.proj_in.lora_A.weight",
        "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": "mid_block.attentions.0.proj_in.lora_B.weight",
        "lora_unet_mid_block_attentions_1_proj_in.lora_down.weight": "mid_block.attentions.1.proj_in.lora_A.weight",
    }
    source = of(
        {**{old: tuple(target[new].shape) for old, new in flat.items()}, "lora_unet_a_b_c_d.lora_down.weight": (2, 2)}
    )
    for ours, theirs, pairs in ((source, target, flat), (target, source, {new: old for old, new in flat.items()})):
        found = align(ours, theirs)
        assert {one.old: one.new for one in found.proposals if one.certainty == "certain"} == pairs


def test_equal_values_are_certain_and_constants_say_nothing() -> None:
    draws = torch.Generator().manual_seed(0)
    names = ("q", "k", "v")
    values = {name: torch.randn(4, 4, generator=draws) for name in names}
    source = {f"attn.{name}.weight": value for name, value in values.items()} | {"a.bias": torch.zeros(4)}
    target = {f"x.{new}": values[name] for new, name in zip("fgh", reversed(names), strict=True)}
    target["y.c"] = torch.zeros(4)
    found = align(from_torch(source), dict(from_torch(target)))
    certain = {one.old: one.new for one in found.proposals if one.certainty == "certain"}
    assert certain == {"attn.v.weight": "x.f", "attn.k.weight": "x.g", "attn.q.weight": "x.h"}
    assert not {one.new for one in align(from_torch(source), dict(from_torch(target)), by_value=False).proposals} & {
        "x.f"
    }


# What acts, and what is said


def head_swap() -> tuple[nn.Module, nn.Module]:
    """A body with a head, and the same body with another head of one shape in common."""
    draws = torch.Generator().manual_seed(0)

    def made(**head: nn.Module) -> nn.Module:
        body = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(4)))
        return nn.ModuleDict({"body": body, **head})

    before = made(transform=nn.Linear(8, 8), decoder=nn.Linear(8, 30))
    for value in before.parameters():
        value.data.normal_(generator=draws)
    return before, made(pooler=nn.Linear(8, 8), classifier=nn.Linear(8, 2))


def test_load_into_acts_on_certain_alone_and_names_what_was_possible() -> None:
    before, after = head_swap()
    own = after.state_dict()["pooler.weight"].clone()
    report = ckpt_surgeon.load_into(after, from_torch(before.state_dict()), allow_missing=["*"])
    assert report.initialized == ("pooler.weight", "pooler.bias", "classifier.weight", "classifier.bias")
    assert torch.equal(after.state_dict()["pooler.weight"], own)
    assert "possible, and not taken" in str(report)
    assert "transform" in str(report)
    (found,) = [one.possible for one in report.fit.outcomes if one.key == "pooler.weight"]
    assert found is not None
    assert (found.old, found.certainty) == ("transform.weight", "possible")
    again = ckpt_surgeon.load_into(
        after, from_torch(before.state_dict()), allow_missing=["*"], min_certainty="possible"
    )
    assert again.initialized == ("classifier.weight", "classifier.bias")
    assert torch.equal(after.state_dict()["pooler.weight"], before.state_dict()["transform.weight"])


def test_missing_keys_are_refused_with_what_would_be_possible() -> None:
    before, after = head_swap()
    with pytest.raises(EditError, match=r"possible: 'transform.weight' to 'pooler.weight'"):
        ckpt_surgeon.fit(from_torch(before.state_dict()), after)
    with pytest.raises(EditError, match="a certainty is one of possible, likely, certain, proven"):
        ckpt_surgeon.fit(from_torch(before.state_dict()), after, min_certainty="sure")


def test_without_align_no_key_is_renamed() -> None:
    layer = nn.Linear(3, 2)
    wrapped = from_torch({f"module.{key}": value for key, value in layer.state_dict().items()})
    with pytest.raises(EditError, match="2 keys of the target are missing"):
        ckpt_surgeon.fit(wrapped, layer, align=False)
    assert ckpt_surgeon.fit(from_torch(layer.state_dict()), layer, align=False).matched == 1.0


def test_a_hint_counts_what_is_certain_alone() -> None:
    before, after = head_swap()
    wrapped = {f"net.{key}": value for key, value in before.state_dict().items()}
    hint = ckpt_surgeon.diff(wrapped, after.state_dict()).hint
    assert hint is not None
    assert hint.matched == 16
    assert ckpt_surgeon.diff(before.state_dict(), after.state_dict()).hint is None


def test_every_rename_is_in_the_report_with_its_reason() -> None:
    layer = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    found = ckpt_surgeon.fit(from_torch({f"net.{key}": value for key, value in layer.state_dict().items()}), layer)
    assert re.search(r"net\.\*\s+→\s+\*\s+4\s+certain\s+'net\.' taken off", str(found))
    rows = json.loads(fit_json(found))["outcomes"]
    assert {(row["source"], row["name"]) for row in rows} == {(f"net.{key}", key) for key in layer.state_dict()}
    assert {(row["reason"], row["certainty"]) for row in rows} == {("'net.' taken off", "certain")}


def test_a_key_of_another_shape_is_renamed_with_its_siblings_and_adapted_in_one_step() -> None:
    def vit(size: int) -> nn.Module:
        shape = {"img_size": size, "depth": 2, "num_classes": 5, "embed_dim": 32, "num_heads": 2}
        made: nn.Module = timm.create_model("vit_tiny_patch16_224", **shape)
        return made

    state = vit(64).state_dict()
    grid = Recipe((step("resize_grid", patterns="*pos_embed", grid="4x4:6x6", prefix_tokens=1),))
    for prefix in ("module.", "backbone."):
        found = ckpt_surgeon.fit(from_torch({prefix + key: value for key, value in state.items()}), vit(96), adapt=grid)
        assert sorted({one.how for one in found.outcomes}) == ["adapted", "renamed"]
        assert [one.key for one in found.outcomes if one.how == "adapted"] == ["pos_embed"]


# Time: twice to five times what is expected on an idle core, in CPU seconds


def llama(layers: int) -> tuple[Shapes, Shapes]:
    """Llama-70B's keys and shapes, as Meta names them and as transformers does."""
    wide, narrow, inner = 8192, 1024, 28672
    names = {
        "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj", "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    sizes: dict[str, tuple[int, ...]] = {
        "attention.wq": (wide, wide), "attention.wk": (narrow, wide), "attention.wv": (narrow, wide),
        "attention.wo": (wide, wide), "feed_forward.w1": (inner, wide), "feed_forward.w3": (inner, wide),
        "feed_forward.w2": (wide, inner), "attention_norm": (wide,), "ffn_norm": (wide,),
    }  # fmt: skip
    meta = {f"layers.{n}.{name}.weight": sizes[name] for n in range(layers) for name in sizes}
    theirs = {f"model.layers.{n}.{names[name]}.weight": sizes[name] for n in range(layers) for name in names}
    return of(meta), of(theirs)


def unrelated(count: int) -> tuple[Shapes, Shapes]:
    ours, theirs = ({f"{side}{n}.weight": (64, 64) for n in range(count)} for side in "ab")
    return of(ours), of(theirs)


@pytest.mark.parametrize(
    ("make", "seconds"),
    [(lambda: llama(80), 3.0), (lambda: llama(1112), 12.0), (lambda: unrelated(2000), 5.0)],
    ids=["720 keys under two names", "10,000 keys under two names", "2,000 unrelated keys of one shape"],
)
def test_the_time_that_a_comparison_takes_is_bounded(make: Callable[[], tuple[Shapes, Shapes]], seconds: float) -> None:
    source, target = make()
    start = time.process_time()
    found = ckpt_surgeon.diff(source, target)
    assert time.process_time() - start < seconds
    assert found.hint is None


def test_a_search_that_is_too_large_says_what_it_left_open() -> None:
    found = align(*llama(1112))
    assert any("too many to be compared by their order" in note for note in found.notes)


def test_where_one_prefix_explains_all_nothing_is_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("aligned")

    monkeypatch.setattr("ckpt_surgeon.models.diff.align", never)
    state = torchvision.models.densenet121().state_dict()
    hint = ckpt_surgeon.diff({f"module.{key}": value for key, value in state.items()}, state).hint
    assert hint is not None
    assert hint.command == ("strip-prefix",)
