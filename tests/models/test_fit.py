"""A fit is proven by torch: what it makes is loaded strictly into the real model, and computes what it should."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from command_line import Run
from torch import nn
from torch.nn.functional import interpolate
from torch.nn.utils.parametrizations import weight_norm

import ckpt_surgeon
from ckpt_surgeon.edits.recipe import Recipe, step
from ckpt_surgeon.errors import CheckpointError, EditError
from ckpt_surgeon.models.fit import HOWS, INITIALISATIONS, Fit, fit
from ckpt_surgeon.tensors.torch_bridge import from_torch

FACTORIES = """
from torch import nn
def two(): return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
def embedding(): return nn.Embedding(6, 3)
def conv(): return nn.Conv2d(1, 4, 3)
"""


def two(classes: int = 2) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, classes))


def fitted(state: Mapping[str, torch.Tensor], model: nn.Module, **policies: object) -> dict[str, torch.Tensor]:
    """What a fit makes of a state_dict; torch has taken it strictly."""
    return taken(fit(from_torch(dict(state)), model, **policies), model)  # type: ignore[arg-type]


def taken(found: Fit, model: nn.Module) -> dict[str, torch.Tensor]:
    made = dict(ckpt_surgeon.load(found.result))
    model.load_state_dict(made, strict=True)
    adds_up(found, model)
    return made


def adds_up(found: Fit, model: nn.Module) -> None:
    """Every key of the target is in one row, and the rows have all its parameters."""
    rows = [one for one in found.outcomes if one.how != "dropped"]
    state = model.state_dict()
    assert sorted(one.key for one in rows) == sorted(state)
    assert sum(one.numel for one in rows) == sum(value.numel() for value in state.values()) == found.target_numel
    assert {one.how for one in found.outcomes} <= set(HOWS)
    assert sorted((*found.loaded, *found.initialized)) == sorted(state)


def refusal(state: Mapping[str, torch.Tensor], model: nn.Module, **policies: object) -> str:
    with pytest.raises(EditError) as caught:
        fit(from_torch(dict(state)), model, **policies)  # type: ignore[arg-type]
    return str(caught.value)


# Keys of another shape


def test_another_shape_is_an_error_that_names_both_shapes_and_what_to_do() -> None:
    said = refusal(two(7).state_dict(), two())
    assert "'1.weight' has shape [7, 4], the target wants [2, 4]" in said
    assert "'1.bias'" in said
    assert "on_mismatch" in said


def test_a_dropped_shape_keeps_the_models_own_initialisation() -> None:
    state, model = two(7).state_dict(), two()
    own = {key: value.clone() for key, value in model.state_dict().items()}
    made = fitted(state, model, on_mismatch="drop")
    assert torch.equal(made["0.weight"], state["0.weight"])
    assert torch.equal(made["1.weight"], own["1.weight"])
    assert torch.equal(made["1.bias"], own["1.bias"])


@pytest.mark.parametrize("scheme", INITIALISATIONS)
def test_another_shape_is_initialised_by_name_and_by_seed(scheme: str) -> None:
    state = two(7).state_dict()
    made = fitted(state, two(), on_mismatch=scheme, seed=3)
    again = fitted(state, two(), on_mismatch=scheme, seed=3)
    assert torch.equal(made["1.weight"], again["1.weight"])
    if scheme in ("zeros", "ones"):
        assert torch.equal(made["1.weight"], torch.full((2, 4), float(scheme == "ones")))
        return
    other = fitted(state, two(), on_mismatch=scheme, seed=4)
    assert not torch.equal(made["1.weight"], other["1.weight"])
    assert made["1.weight"].isfinite().all()


def test_an_initialisation_is_torchs_own() -> None:
    made = fitted(two(7).state_dict(), two(), on_mismatch="kaiming_normal")
    wanted = torch.empty(2, 4)
    nn.init.kaiming_normal_(wanted, generator=torch.Generator().manual_seed(0))
    assert torch.equal(made["1.weight"], wanted)


def test_a_policy_of_no_name_is_refused() -> None:
    assert "on_mismatch is one of" in refusal(two().state_dict(), two(), on_mismatch="guess")


# Keys that are missing or too many


def test_missing_keys_are_an_error_unless_a_pattern_allows_them() -> None:
    state = {"0.weight": torch.ones(4, 3), "0.bias": torch.ones(4)}
    assert "2 keys of the target are missing: '1.weight', '1.bias'" in refusal(state, two())
    assert "'1.bias'" in refusal(state, two(), allow_missing=["*.weight"])
    model = two()
    own = model.state_dict()["1.weight"].clone()
    assert torch.equal(fitted(state, model, allow_missing=["1.*"])["1.weight"], own)


def test_buffers_that_models_derive_are_filled_with_a_note() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

    state = make().state_dict()
    del state["1.num_batches_tracked"]
    model = make()
    found = fit(from_torch(state), model)
    assert taken(found, model)["1.num_batches_tracked"] == 0
    (row,) = [one for one in found.outcomes if one.how == "initialised"]
    assert (row.key, row.detail) == ("1.num_batches_tracked", "derived by the model; not in the checkpoint")
    taken(fit(from_torch(state), make().to("meta")), make())


def test_unused_keys_are_dropped_with_their_counts() -> None:
    state = {**two().state_dict(), "queue": torch.zeros(5, 9)}
    found = fit(from_torch(state), two())
    assert [(one.key, one.numel) for one in found.outcomes if one.how == "dropped"] == [("queue", 45)]
    assert "queue" not in found.result
    assert found.matched == 1.0


def test_too_poor_a_match_is_an_error() -> None:
    state = two(7).state_dict()
    assert fit(from_torch(state), two(), on_mismatch="drop").matched == 16 / 26
    said = refusal(state, two(), on_mismatch="drop", min_match=0.95)
    assert "61.5%" in said
    assert "95.0%" in said
    assert fit(from_torch(state), two(), on_mismatch="drop", min_match=0.6).loaded == ("0.weight", "0.bias")


def test_nothing_matched_is_an_error_whatever_is_allowed() -> None:
    said = refusal({"x": torch.ones(9)}, two(), allow_missing=["*"], on_mismatch="drop")
    assert "nothing matches" in said


def test_all_problems_come_in_one_error() -> None:
    state = {"0.weight": torch.ones(4, 3), "1.weight": torch.ones(7, 4), "1.bias": torch.ones(7)}
    with pytest.raises(EditError) as caught:
        fit(from_torch(state), two())
    said = str(caught.value)
    assert all(f"'{key}'" in said for key in ("1.weight", "1.bias", "0.bias"))


def test_an_open_choice_is_told_with_the_keys_that_it_leaves_missing() -> None:
    said = refusal({"a.weight": torch.ones(4, 4), "b.weight": torch.ones(4, 4)}, Named("left", "right"))
    assert "open: 'a.weight', 'b.weight'" in said


class Named(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(4, 4, bias=False))


def test_a_recipe_takes_the_place_of_the_alignment() -> None:
    state = {"a.weight": torch.full((4, 4), 1.0), "b.weight": torch.full((4, 4), 2.0)}
    recipe = Recipe((step("rename", pairs=["a=right", "b=left"]),))
    found = fit(from_torch(state), Named("left", "right"), recipe=recipe)
    made = taken(found, Named("left", "right"))
    assert [made[key][0, 0].item() for key in ("left.weight", "right.weight")] == [2, 1]
    assert found.alignment is None
    assert {one.how for one in found.outcomes} == {"renamed"}


def test_a_file_with_one_of_two_tied_keys_fits_a_model_that_ties_them() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embedding.weight

    found = fit(from_torch({"embedding.weight": torch.ones(5, 3)}), Tied())
    made = taken(found, Tied())
    assert torch.equal(made["head.weight"], torch.ones(5, 3))
    assert [one.detail for one in found.outcomes] == ["", "tied to embedding.weight"]


# Shapes by pattern


def adapted(
    state: Mapping[str, torch.Tensor], model: nn.Module, edit: str, **arguments: object
) -> dict[str, torch.Tensor]:
    found = fit(from_torch(dict(state)), model, adapt=Recipe((step(edit, **arguments),)))
    assert "adapted" in {one.how for one in found.outcomes}
    return taken(found, model)


@pytest.mark.parametrize("fill", ["zero", "mean", "normal"])
def test_vocabulary_rows_are_added(fill: str) -> None:
    old = torch.randn(4, 3)
    made = adapted({"weight": old}, nn.Embedding(6, 3), "resize_rows", patterns="weight", rows=6, fill=fill)["weight"]
    assert torch.equal(made[:4], old)
    if fill == "zero":
        assert not made[4:].any()
    if fill == "mean":
        torch.testing.assert_close(made[4:], old.mean(0, keepdim=True).expand(2, 3))


def test_vocabulary_rows_are_cut_and_never_added_without_a_fill() -> None:
    old = torch.randn(8, 3)
    made = adapted({"weight": old}, nn.Embedding(6, 3), "resize_rows", patterns="weight", rows=6)
    assert torch.equal(made["weight"], old[:6])
    with pytest.raises(EditError, match="need a fill"):
        adapted({"weight": old}, nn.Embedding(9, 3), "resize_rows", patterns="weight", rows=9)
    with pytest.raises(EditError, match="has 8 rows, not 7"):
        adapted({"weight": old}, nn.Embedding(6, 3), "resize_rows", patterns="weight", rows=6, old=7)


def test_a_class_head_is_mapped_by_class_name() -> None:
    head = nn.Linear(4, 3)
    model = nn.Linear(4, 2)
    arguments = {"patterns": ["weight", "bias"], "old": ["cat", "dog", "emu"], "new": ["emu", "cat"]}
    made = adapted(head.state_dict(), model, "map_classes", **arguments)
    features = torch.randn(5, 4)
    torch.testing.assert_close(model(features), head(features)[:, [2, 0]])
    assert torch.equal(made["bias"], head.bias[[2, 0]].detach())


@pytest.mark.parametrize(
    ("mode", "before", "after"), [("sum", 3, 1), ("sum", 4, 2), ("repeat", 3, 6), ("repeat", 3, 4)]
)
def test_input_channels_keep_the_scale_of_what_the_convolution_gives(mode: str, before: int, after: int) -> None:
    old, new = nn.Conv2d(before, 5, 3), nn.Conv2d(after, 5, 3)
    with torch.no_grad():  # of equal channels, so that four of three give exactly what three gave
        old.weight.copy_(old.weight[:, :1].expand_as(old.weight).clone())
    adapted(old.state_dict(), new, "resize_channels", patterns="weight", channels=after, mode=mode)
    ours, theirs = (layer(torch.full((1, channels, 6, 6), 2.0)) for layer, channels in ((old, before), (new, after)))
    torch.testing.assert_close(theirs, ours)


def test_grey_pictures_give_what_the_same_pictures_gave_in_colour() -> None:
    old, new = nn.Conv2d(3, 5, 3), nn.Conv2d(1, 5, 3)
    adapted(old.state_dict(), new, "resize_channels", patterns="weight", channels=1, mode="sum")
    grey = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(new(grey), old(grey.expand(2, 3, 8, 8)))


def test_copied_channels_ignore_the_new_ones() -> None:
    old, new = nn.Conv2d(3, 5, 3), nn.Conv2d(4, 5, 3)
    adapted(old.state_dict(), new, "resize_channels", patterns="weight", channels=4, mode="copy")
    pictures = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(new(pictures), old(pictures[:, :3]))


class Positions(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(shape))


@pytest.mark.parametrize("tokens", [0, 1, 2])
@pytest.mark.parametrize(("before", "after"), [((4, 4), (6, 6)), ((2, 6), (3, 8)), ((6, 4), (3, 2))])
def test_position_embeddings_are_interpolated_as_torch_does_it(
    tokens: int, before: tuple[int, int], after: tuple[int, int]
) -> None:
    old = torch.randn(1, tokens + before[0] * before[1], 8)
    model = Positions(1, tokens + after[0] * after[1], 8)
    grid = f"{before[0]}x{before[1]}:{after[0]}x{after[1]}"
    made = adapted({"pos_embed": old}, model, "resize_grid", patterns="pos_embed", grid=grid, prefix_tokens=tokens)[
        "pos_embed"
    ]
    picture = old[:, tokens:].reshape(1, *before, 8).permute(0, 3, 1, 2)
    wanted = interpolate(picture, after, mode="bicubic", align_corners=False, antialias=after[0] < before[0])
    assert torch.equal(made[:, :tokens], old[:, :tokens])
    torch.testing.assert_close(made[:, tokens:], wanted.flatten(2).transpose(1, 2))


def test_a_grid_is_never_guessed() -> None:
    state = {"pos_embed": torch.randn(1, 12, 8)}
    assert "shape [1, 12, 8]" in refusal(state, Positions(1, 48, 8))
    with pytest.raises(EditError, match="no 4x4 grid"):
        adapted(state, Positions(1, 48, 8), "resize_grid", patterns="pos_embed", grid="4x4:6x8")


def test_relative_position_tables_are_interpolated_as_torch_does_it() -> None:
    class Table(nn.Module):
        def __init__(self, rows: int) -> None:
            super().__init__()
            self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, 4))

    key = "relative_position_bias_table"
    old = torch.randn(25, 4)
    made = adapted({key: old}, Table(49), "resize_bias_table", patterns=key, window="3x3:4x4")[key]
    wanted = interpolate(old.T.reshape(1, 4, 5, 5), (7, 7), mode="bicubic", align_corners=False)
    torch.testing.assert_close(made, wanted.reshape(4, 49).T)


@pytest.mark.parametrize("size", [1, 3])
def test_a_linear_layer_becomes_a_convolution_and_back(size: int) -> None:
    linear, convolution = nn.Linear(2 * size * size, 5), nn.Conv2d(2, 5, size)
    found = fit(from_torch(linear.state_dict()), convolution)
    taken(found, convolution)
    assert Counter(one.how for one in found.outcomes) == {"reshaped": 1, "as is": 1}
    pictures = torch.randn(3, 2, size, size)
    torch.testing.assert_close(convolution(pictures).flatten(1), linear(pictures.flatten(1)))
    back = nn.Linear(2 * size * size, 5)
    taken(fit(from_torch(convolution.state_dict()), back), back)
    assert torch.equal(back.weight, linear.weight)


def test_squeezed_dimensions_are_put_back() -> None:
    old = torch.randn(7, 8)
    assert torch.equal(fitted({"pos_embed": old}, Positions(1, 7, 8))["pos_embed"], old[None])


# What torch rewrites on load


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("old_first", [True, False])
def test_weight_norm_of_both_kinds_matches_as_torch_loads_it(old_first: bool) -> None:
    def old() -> nn.Module:
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2))

    def new() -> nn.Module:
        return nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2))

    source, target = (old(), new()) if old_first else (new(), old())
    found = fit(from_torch(source.state_dict()), target)
    assert found.matched == 1.0
    taken(found, target)
    features = torch.randn(6, 3)
    assert torch.equal(target(features), source(features))


# The command


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.py").write_text(FACTORIES)
    torch.save(two().state_dict(), tmp_path / "fits.pth")
    torch.save({f"module.{key}": value for key, value in two(7).state_dict().items()}, tmp_path / "head.pth")
    return tmp_path


def test_the_command_writes_what_torch_loads_and_prints_the_outcome(place: Path, ckpt: Run) -> None:
    ran = ckpt("fit", "head.pth", "models.py:two", "out.pth", "--on-mismatch", "drop")
    assert (ran.status, ran.err) == (0, "")
    assert "renamed" in ran.out
    assert "another shape in the checkpoint" in ran.out
    assert "61.5 % of the target's parameters" in ran.out
    model = two()
    model.load_state_dict(torch.load("out.pth"), strict=True)
    assert torch.equal(model.state_dict()["0.weight"], torch.load("head.pth")["module.0.weight"])


@pytest.mark.parametrize("more", [(), ("--on-mismatch", "drop", "--min-match", "0.95")])
def test_a_refused_fit_writes_nothing(place: Path, ckpt: Run, more: tuple[str, ...]) -> None:
    before = sorted(place.iterdir())
    ran = ckpt("fit", "head.pth", "models.py:two", "out.pth", *more)
    assert ran.status == 2
    assert ran.err
    assert [path for path in sorted(place.iterdir()) if path.name != "__pycache__"] == before


def test_a_dry_run_prints_the_outcome_and_writes_nothing(place: Path, ckpt: Run) -> None:
    ran = ckpt("fit", "fits.pth", "models.py:two", "out.pth", "--dry-run")
    assert ran.status == 0
    assert "as is" in ran.out
    assert not (place / "out.pth").exists()


def test_the_outcome_as_json_has_every_key(place: Path, ckpt: Run) -> None:
    ran = ckpt("fit", "head.pth", "models.py:two", "out.pth", "--on-mismatch", "zeros", "--json")
    found = json.loads(ran.out)
    assert {one["name"]: one["how"] for one in found["outcomes"] if one["how"] != "dropped"} == {
        "0.weight": "renamed", "0.bias": "renamed", "1.weight": "initialised", "1.bias": "initialised",
    }  # fmt: skip
    assert "strip" in found["recipe"] or "rename" in found["recipe"]
    assert found["matched"] == 16 / 26


def test_dropped_keys_are_listed_on_request(place: Path, ckpt: Run) -> None:
    torch.save({**two().state_dict(), "queue": torch.zeros(5)}, "more.pth")
    assert "queue" not in ckpt("fit", "more.pth", "models.py:two", "a.pth").out
    assert "queue" in ckpt("fit", "more.pth", "models.py:two", "b.pth", "--full").out


def test_rows_classes_and_channels_are_options(place: Path, ckpt: Run) -> None:
    torch.save({"weight": torch.ones(4, 3)}, "words.pth")
    words = ("fit", "words.pth", "models.py:embedding", "words_out.pth", "--rows", "weight")
    assert ckpt(*words, "4:6", "--fill", "mean").status == 0
    assert torch.equal(torch.load("words_out.pth")["weight"], torch.ones(6, 3))
    assert ckpt(*words, "5:6", "--fill", "mean", "--force").status == 2
    assert ckpt(*words, "six", "--fill", "mean", "--force").status == 2
    torch.save(nn.Conv2d(3, 4, 3).state_dict(), "colour.pth")
    channels = ("fit", "colour.pth", "models.py:conv", "grey.pth", "--channels", "weight", "1", "--mode", "sum")
    assert ckpt(*channels).status == 0
    torch.testing.assert_close(
        torch.load("grey.pth")["weight"], torch.load("colour.pth")["weight"].sum(1, keepdim=True)
    )
    Path("old.txt").write_text("\n".join("abcdefg"))
    Path("new.txt").write_text("g\nb\n")
    assert ckpt("fit", "head.pth", "models.py:two", "mapped.pth", "--class-map", "1.*", "old.txt:new.txt").status == 0
    head = torch.load("head.pth")["module.1.weight"]
    assert torch.equal(torch.load("mapped.pth")["1.weight"], head[[6, 1]])


def test_a_file_that_is_not_there_is_one_line(place: Path, ckpt: Run) -> None:
    ran = ckpt("fit", "none.pth", "models.py:two", "out.pth")
    assert ran.status == 2
    assert ran.err.count("\n") == 1


def test_every_refusal_is_one_of_ours() -> None:
    with pytest.raises(CheckpointError):
        fit("none.pth", two())
