"""Folding keys: every pattern is expanded again and must give back exactly the keys it stands for."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from itertools import chain, product

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st

from ckpt_surgeon.key_patterns import Folded, fold

NORM = "{weight,bias,running_mean,running_var,num_batches_tracked}"


def expand(pattern: str) -> list[str]:
    """Expand a pattern as a shell would; the oracle of this file."""
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices = [[piece] if index % 2 == 0 else list(alternatives(piece)) for index, piece in enumerate(pieces)]
    return ["".join(chosen) for chosen in product(*choices)]


def alternatives(inside: str) -> Iterator[str]:
    for item in inside.split(","):
        ends = re.fullmatch(r"(\d+)\.\.(\d+)", item)
        if ends is None:
            yield item
        else:
            first, last = ends.groups()
            yield from (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))


def patterns(keys: list[str], *, limit: int | None = 12) -> list[str]:
    return [folded.pattern for folded in fold(keys, limit=limit)]


def matched(pattern: str, keys: list[str]) -> int:
    """Count the keys that a pattern with stars stands for at most."""
    spellings = [re.escape(one).replace(r"\*", r"\d+") for one in expand(pattern)]
    return sum(any(re.fullmatch(spelling, key) for spelling in spellings) for key in keys)


def bert(layers: int = 12) -> list[str]:
    """The names of BERT's parameters, in the order of its state_dict."""
    embeddings = [f"embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")]
    inside = [f"attention.self.{name}" for name in ("query", "key", "value")]
    inside += [f"{part}.{name}" for part in ("attention.output", "output") for name in ("dense", "LayerNorm")]
    inside += ["intermediate.dense"]
    linears = ["embeddings.LayerNorm", *(f"encoder.layer.{i}.{name}" for i in range(layers) for name in inside)]
    return embeddings + [f"{name}.{leaf}" for name in [*linears, "pooler.dense"] for leaf in ("weight", "bias")]


@pytest.fixture(scope="module")
def resnet50() -> list[str]:
    with torch.device("meta"):
        return list(torchvision.models.resnet50().state_dict())


# Few words and many keys, so that merges happen; numbers with and without padding; empty components.
WORDS = st.sampled_from(["0", "1", "2", "3", "10", "03", "a", "b1", "b2", "b3", "b10", "b02", "weight", "bias", ""])
KEYS = st.lists(WORDS, min_size=1, max_size=4).map(".".join)
GRIDS = st.lists(st.lists(WORDS, min_size=1, max_size=5, unique=True), min_size=1, max_size=4).map(
    lambda grid: [".".join(words) for words in product(*grid)]
)
LISTS = st.lists(GRIDS, max_size=4).map(lambda grids: list(chain.from_iterable(grids))) | st.lists(KEYS, max_size=60)


@given(LISTS)
def test_patterns_without_stars_expand_to_exactly_the_keys(keys: list[str]) -> None:
    expanded = [key for folded in fold(keys, limit=None) for key in expand(folded.pattern)]
    assert sorted(expanded) == sorted(set(keys))


@given(LISTS)
def test_each_count_is_the_number_of_keys_its_pattern_expands_to(keys: list[str]) -> None:
    for folded in fold(keys, limit=None):
        assert folded.count == len(expand(folded.pattern))


@given(LISTS)
def test_each_pattern_points_at_the_first_key_it_covers_and_they_are_in_that_order(keys: list[str]) -> None:
    result = fold(keys, limit=None)
    for folded in result:
        assert folded.first == min(keys.index(key) for key in expand(folded.pattern))
    assert [folded.first for folded in result] == sorted(folded.first for folded in result)


@given(LISTS)
def test_no_two_exact_patterns_could_still_be_merged(keys: list[str]) -> None:
    grids = [
        [frozenset(part) for part in zip(*(key.split(".") for key in expand(p)), strict=True)]
        for p in patterns(keys, limit=None)
    ]
    for index, one in enumerate(grids):
        for other in grids[:index]:
            assert len(one) != len(other) or sum(a != b for a, b in zip(one, other, strict=True)) != 1


@given(LISTS, st.integers(0, 5))
def test_counts_add_up_to_the_number_of_distinct_keys_with_stars_too(keys: list[str], limit: int) -> None:
    assert sum(folded.count for folded in fold(keys, limit=limit)) == len(set(keys))


@given(LISTS, st.integers(0, 5))
def test_with_stars_every_pattern_covers_its_first_key_and_no_more_keys_than_there_are(
    keys: list[str], limit: int
) -> None:
    distinct = list(dict.fromkeys(keys))
    for folded in fold(keys, limit=limit):
        assert matched(folded.pattern, [keys[folded.first]]) == 1
        assert folded.count <= matched(folded.pattern, distinct)


@given(LISTS)
def test_a_pattern_that_needed_no_star_is_exact_though_others_have_stars(keys: list[str]) -> None:
    for folded in fold(keys, limit=0):
        if "*" not in folded.pattern:
            assert folded.count == len(expand(folded.pattern))
            assert set(expand(folded.pattern)) <= set(keys)


@given(LISTS, st.integers(0, 5))
def test_stars_never_make_more_patterns(keys: list[str], limit: int) -> None:
    assert len(fold(keys, limit=limit)) <= len(fold(keys, limit=None))


@given(st.lists(st.text(alphabet=st.characters() | st.sampled_from("..{},*019²٣"))))
def test_keys_can_contain_anything(keys: list[str]) -> None:
    assert sum(folded.count for folded in fold(keys, limit=1)) == len(set(keys))


def test_no_keys_are_no_patterns() -> None:
    assert fold([]) == []


def test_one_key_is_shown_as_it_is() -> None:
    assert fold(["a.{b}..*"]) == [Folded("a.{b}..*", 1, 0)]


def test_keys_given_twice_count_once_and_keep_their_first_place() -> None:
    assert fold(["x", "y.0", "x", "y.1"]) == [Folded("x", 1, 0), Folded("y.{0,1}", 2, 1)]


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("0 1 2 3 4 5", "{0..5}"),
        ("5 4 3 2 1 0", "{0..5}"),
        ("0 1 2 5", "{0..2,5}"),
        ("0 1", "{0,1}"),
        ("0 2 4 5 6 8 9", "{0,2,4..6,8,9}"),
        ("8 9 10 11", "{8..11}"),
        ("08 09 10 11", "{08..11}"),
        ("8 09 10", "{8,09,10}"),
        ("layer1 layer2 layer3 layer4", "layer{1..4}"),
        ("bn1 bn2", "bn{1,2}"),
        ("encoder_layer_9 encoder_layer_10 encoder_layer_11", "encoder_layer_{9..11}"),
        ("weight bias", "{weight,bias}"),
        ("bias weight", "{bias,weight}"),
        ("conv1 conv2 bn1", "{conv1,conv2,bn1}"),
        ("conv conv1 conv2", "{conv,conv1,conv2}"),
        ("0 1 weight", "{0,1,weight}"),
        ("² ³", "{²,³}"),
    ],
)
def test_alternatives_are_spelled_as_numbers_where_they_are_numbers(words: str, shown: str) -> None:
    assert patterns([f"x.{word}.y" for word in words.split()]) == [f"x.{shown}.y"]


def test_numbers_too_long_to_be_numbers_are_text() -> None:
    long = ["9" * 5000, "8" * 5000]
    assert patterns(long) == [f"{{{','.join(long)}}}"]


def test_keys_of_different_depth_are_never_merged() -> None:
    assert patterns(["a.w", "a.b.w", "b.w"]) == ["{a,b}.w", "a.b.w"]


def test_a_missing_key_splits_the_pattern_rather_than_be_covered() -> None:
    keys = [f"h.{i}.{leaf}" for i in range(4) for leaf in ("weight", "bias") if (i, leaf) != (2, "bias")]
    assert fold(keys) == [Folded("h.{0,1,3}.{weight,bias}", 6, 0), Folded("h.2.weight", 1, 4)]


def test_resnet50_folds_to_eleven_exact_lines(resnet50: list[str]) -> None:
    shown = patterns(resnet50)
    assert shown[:4] == [
        "conv1.weight",
        f"bn1.{NORM}",
        "layer{1,4}.{0..2}.conv{1..3}.weight",
        f"layer{{1,4}}.{{0..2}}.bn{{1..3}}.{NORM}",
    ]
    assert len(shown) == 11
    assert sorted(chain.from_iterable(map(expand, shown))) == sorted(resnet50)


def test_resnet50_folds_to_six_lines_with_stars(resnet50: list[str]) -> None:
    assert fold(resnet50, limit=10) == [
        Folded("conv1.weight", 1, 0),
        Folded(f"bn1.{NORM}", 5, 1),
        Folded("layer{1..4}.*.conv{1..3}.weight", 48, 6),
        Folded(f"layer{{1..4}}.*.bn{{1..3}}.{NORM}", 240, 7),
        Folded(f"layer{{1..4}}.0.downsample.*.{NORM}", 24, 24),
        Folded("fc.{weight,bias}", 2, 318),
    ]


def test_bert_folds_to_seven_lines() -> None:
    assert fold(bert()) == [
        Folded("embeddings.{word_embeddings,position_embeddings,token_type_embeddings}.weight", 3, 0),
        Folded("embeddings.LayerNorm.{weight,bias}", 2, 3),
        Folded("encoder.layer.{0..11}.attention.self.{query,key,value}.{weight,bias}", 72, 5),
        Folded("encoder.layer.{0..11}.attention.output.{dense,LayerNorm}.{weight,bias}", 48, 11),
        Folded("encoder.layer.{0..11}.output.{dense,LayerNorm}.{weight,bias}", 48, 15),
        Folded("encoder.layer.{0..11}.intermediate.dense.{weight,bias}", 24, 19),
        Folded("pooler.dense.{weight,bias}", 2, 197),
    ]


def test_a_star_stands_only_where_the_joined_patterns_differ() -> None:
    keys = [*(f"a.{i}.fc.{j}.w" for i in (0, 1) for j in (0, 1)), "a.0.bn.5.w", *(f"b.{i}.w" for i in range(3))]
    assert patterns(keys, limit=2) == ["a.*.{fc,bn}.*.w", "b.{0..2}.w"]


def test_a_star_may_stand_among_words() -> None:
    keys = ["x.0.a.w", "x.0.b.w", "x.1.a.w", "x.2.b.w", "x.head.a.w", "x.head.b.w"]
    assert fold(keys, limit=1) == [Folded("x.{*,head}.{a,b}.w", 6, 0)]


def test_more_patterns_than_the_limit_are_left_to_the_caller() -> None:
    keys = [f"{letter}{'.x' * depth}" for depth, letter in enumerate("abcdef")]
    assert patterns(keys, limit=2) == keys


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda i: f"model.layers.{i // 1800}.mlp.experts.{i // 3 % 600}.{('gate', 'up', 'down')[i % 3]}_proj.weight",
        lambda i: f"model.{i * 7919 % 100_003}.{i % 97}.weight",
        lambda i: f"{'.' * 60}{i}",
        lambda i: f"p{i}",
    ],
    ids=["experts", "scattered", "deep", "flat"],
)
def test_a_hundred_thousand_keys_fold_in_about_a_second(make: Callable[[int], str]) -> None:
    keys = [make(index) for index in range(100_000)]
    start = time.process_time()
    fold(keys)
    assert time.process_time() - start < 6  # a loaded machine is slower; comparing pairs would take hours
