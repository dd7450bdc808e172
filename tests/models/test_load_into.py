"""What a model computes after it was loaded is the proof: torch's own modules, and torchvision's models."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
import torchvision
from networks import CONVOLUTIONS, FCN32s, Regrouped
from torch import nn

import ckpt_surgeon
from ckpt_surgeon import load_into
from ckpt_surgeon.edits.recipe import Recipe, step
from ckpt_surgeon.errors import CheckpointError, EditError
from ckpt_surgeon.tensors.torch_bridge import from_torch

PICTURES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    gc.collect()


def save(path: Path, value: object, *, legacy: bool = False) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


def lively(model: nn.Module) -> nn.Module:
    """A model whose statistics are not those of a fresh one."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return model.eval()


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer, those that are not saved as well."""
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tensor.detach().clone() for name, tensor in tensors}


def same(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@torch.no_grad()
def gives(model: nn.Module, pictures: torch.Tensor = PICTURES) -> torch.Tensor:
    found: torch.Tensor = model.eval()(pictures)
    return found


# Scenarios A to E


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("to_meta", [False, True])
def test_a_nested_wrapped_checkpoint_is_loaded_by_one_call(tmp_path: Path, legacy: bool, to_meta: bool) -> None:
    source = lively(torchvision.models.resnet18())
    state = {f"module.{key}": value for key, value in source.state_dict().items()}
    path = save(tmp_path / "a.pth", {"state_dict": state, "epoch": 3}, legacy=legacy)
    with torch.device("meta" if to_meta else "cpu"):
        model = torchvision.models.resnet18()
    report = load_into(model, path)
    assert torch.equal(gives(model), gives(source))
    assert report.loaded == tuple(source.state_dict())
    assert (report.initialized, report.matched, report.assigned) == ((), 1.0, to_meta)
    assert "renamed" in str(report)


def test_a_checkpoint_from_another_gpu_is_placed_by_map_location(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pth", nn.Linear(3, 2).state_dict())
    for location in ("cpu", torch.device("cpu"), {"cuda:1": "cpu"}, lambda storage, _: storage):
        model = nn.Linear(3, 2)
        load_into(model, path, map_location=location)
        assert same(snapshot(model), torch.load(path))


def test_a_whole_saved_network_is_loaded_without_its_class(tmp_path: Path) -> None:
    source = lively(torchvision.models.resnet18())
    path = save(tmp_path / "b.pth", source)
    model = torchvision.models.resnet18()
    load_into(model, path)
    assert torch.equal(gives(model), gives(source))


def test_another_head_keeps_its_own_initialisation_where_that_is_asked_for(tmp_path: Path) -> None:
    source = lively(torchvision.models.resnet18(num_classes=20))
    path = save(tmp_path / "c.pth", source.state_dict())
    model = torchvision.models.resnet18(num_classes=10)
    own = snapshot(model)
    with pytest.raises(EditError, match=r"'fc.weight' has shape \[20, 512\]"):
        load_into(model, path)
    assert same(snapshot(model), own)
    report = load_into(model, path, on_mismatch="drop")
    assert report.initialized == ("fc.weight", "fc.bias")
    assert torch.equal(model.state_dict()["fc.weight"], own["fc.weight"])
    model.fc = source.fc
    assert torch.equal(gives(model), gives(source))


def test_a_head_is_cut_by_an_edit(tmp_path: Path) -> None:
    source = lively(torchvision.models.resnet18(num_classes=20))
    model = torchvision.models.resnet18(num_classes=10)
    adapt = Recipe((step("resize_rows", patterns="fc.*", rows=10),))
    load_into(model, save(tmp_path / "c.pth", source.state_dict()), adapt=adapt)
    torch.testing.assert_close(gives(model), gives(source)[:, :10])


@pytest.mark.slow
def test_a_regrouped_resnet_50_computes_what_the_original_does(tmp_path: Path) -> None:
    source = lively(torchvision.models.resnet50())
    path = save(tmp_path / "d.pth", source.state_dict())
    model = Regrouped()
    report = load_into(model, path, on_mismatch="drop", min_match=0.95)
    assert report.initialized == ("fc.weight", "fc.bias")
    source.fc = nn.Identity()
    regrouped = nn.Sequential(*model.convnet_1, *model.convnet_2, *model.convnet_3, *model.convnet_4, nn.Flatten())
    assert torch.equal(gives(regrouped), gives(source))


@pytest.mark.slow
def test_vgg_16_as_fcn32s_gives_the_same_features_through_convolutions() -> None:
    source = torchvision.models.vgg16().eval()
    with torch.device("meta"):
        model = FCN32s()
    # The new layers have values; the others get the file's memory.
    model.score_fr = nn.Conv2d(4096, 21, 1)
    model.upscore = nn.ConvTranspose2d(21, 21, 64, 32, bias=False)
    own = model.upscore.weight.detach().clone()
    report = load_into(model, from_torch(source.state_dict()), allow_missing=["score_fr.*", "upscore.*"])
    assert report.initialized == ("score_fr.weight", "score_fr.bias", "upscore.weight")
    assert torch.equal(model.upscore.weight, own)
    parts = dict(model.named_children())
    layers: list[nn.Module] = []
    for number, layer in enumerate(source.features):
        layers.append(parts[f"conv{CONVOLUTIONS[number]}"] if number in CONVOLUTIONS else layer)
    convolutional = nn.Sequential(*layers, model.fc6, nn.ReLU(), model.fc7, nn.ReLU(), nn.Flatten())
    linear = nn.Sequential(source.features, source.avgpool, nn.Flatten(), *source.classifier[:6])
    picture = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(gives(convolutional, picture), gives(linear, picture), rtol=1e-4, atol=1e-5)


# All or nothing


class Mixed(nn.Module):
    """Parameters, a tie, saved buffers and one that is not saved."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.fixed: torch.Tensor
        self.register_buffer("scale", torch.rand(width))
        self.register_buffer("fixed", torch.arange(3.0), persistent=False)


def broken(change: Callable[[dict[str, torch.Tensor]], object]) -> dict[str, torch.Tensor]:
    state = dict(Mixed().state_dict())
    change(state)
    return state


@pytest.mark.parametrize(
    ("state", "policies"),
    [
        (broken(lambda state: state.update({"norm.weight": torch.ones(4)})), {}),
        (broken(lambda state: state.pop("norm.bias")), {}),
        (broken(lambda state: state.pop("norm.bias")), {"allow_missing": ["head.*"]}),
        (
            broken(lambda state: state.update({"norm.weight": torch.ones(4)})),
            {"on_mismatch": "drop", "min_match": 0.99},
        ),
        ({"unrelated": torch.ones(9)}, {"allow_missing": ["*"]}),
        (broken(lambda state: None), {"on_mismatch": "guess"}),
    ],
)
def test_nothing_in_the_model_changes_after_a_refusal(
    state: dict[str, torch.Tensor], policies: dict[str, object], tmp_path: Path
) -> None:
    model = Mixed()
    before, parameters = snapshot(model), list(model.parameters())
    with pytest.raises(EditError):
        load_into(model, save(tmp_path / "broken.pth", state), **policies)  # type: ignore[arg-type]
    assert same(snapshot(model), before)
    assert all(one is two for one, two in zip(model.parameters(), parameters, strict=True))


def test_nothing_in_the_model_changes_when_the_file_is_truncated(tmp_path: Path) -> None:
    path = save(tmp_path / "cut.pth", Mixed().state_dict())
    path.write_bytes(path.read_bytes()[:-400])
    model = Mixed()
    before = snapshot(model)
    with pytest.raises(CheckpointError):
        load_into(model, path)
    assert same(snapshot(model), before)


# What stays the model's


@pytest.mark.parametrize("to_meta", [False, True])
@pytest.mark.parametrize("assign", [None, True])
def test_tied_parameters_stay_one(tmp_path: Path, to_meta: bool, assign: bool | None) -> None:
    source = Mixed()
    path = save(tmp_path / "tied.pth", source.state_dict())
    with torch.device("meta" if to_meta else "cpu"):
        model = Mixed()
    load_into(model, path, assign=assign)
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.head.weight, source.head.weight)
    assert len(list(model.parameters())) == 3


def test_a_file_with_one_name_of_a_tied_parameter_is_enough(tmp_path: Path) -> None:
    source = Mixed()
    for gone in ("head.weight", "embedding.weight"):
        state = {key: value for key, value in source.state_dict().items() if key != gone}
        for place in ("cpu", "meta"):
            with torch.device(place):
                model = Mixed()
            load_into(model, save(tmp_path / "one.pth", state))
            assert model.head.weight is model.embedding.weight
            assert torch.equal(model.head.weight, source.head.weight)


@pytest.mark.parametrize("assign", [None, True])
def test_parameters_keep_requires_grad_and_dtype(tmp_path: Path, assign: bool | None) -> None:
    source = nn.Linear(3, 2)
    model = nn.Linear(3, 2).half()
    model.weight.requires_grad_(False)
    load_into(model, save(tmp_path / "l.pth", source.state_dict()), assign=assign)
    assert [parameter.requires_grad for parameter in (model.weight, model.bias)] == [False, True]
    assert model.weight.dtype == model.bias.dtype == torch.float16
    assert isinstance(model.weight, nn.Parameter)
    assert torch.equal(model.weight, source.weight.half())


def test_parameters_are_copied_into_and_an_optimizer_goes_on_with_them(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    load_into(model, save(tmp_path / "l.pth", nn.Linear(3, 2).state_dict()))
    before = model.weight.detach().clone()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model.weight, before - 0.5)


def test_a_buffer_that_is_not_saved_stays_as_it_is(tmp_path: Path) -> None:
    model = Mixed()
    model.fixed.fill_(7)
    load_into(model, save(tmp_path / "m.pth", Mixed().state_dict()))
    assert torch.equal(model.fixed, torch.full((3,), 7.0))


def test_missing_keys_that_are_allowed_keep_the_values_of_a_trained_model(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    own = snapshot(model)
    state = {"0.weight": torch.ones(4, 3), "0.bias": torch.ones(4)}
    report = load_into(model, save(tmp_path / "half.pth", state), allow_missing=["1.*"])
    assert report.initialized == ("1.weight", "1.bias")
    assert torch.equal(model.state_dict()["1.weight"], own["1.weight"])
    assert torch.equal(model.state_dict()["0.weight"], torch.ones(4, 3))


# The meta device, and memory


def test_a_model_on_the_meta_device_gets_the_files_memory_without_a_copy(tmp_path: Path) -> None:
    path = save(tmp_path / "big.pth", nn.Linear(64, 64).state_dict())
    with torch.device("meta"):
        model = nn.Linear(64, 64)
    load_into(model, path)
    begin = model.weight.untyped_storage().data_ptr()
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in mapped]
    assert any(start <= begin < stop for start, stop in ranges)


def test_a_model_on_the_meta_device_can_be_trained_and_the_file_stays(tmp_path: Path) -> None:
    path = save(tmp_path / "l.pth", nn.Linear(3, 2).state_dict())
    raw = path.read_bytes()
    model = nn.Linear(3, 2, device="meta")
    load_into(model, path)
    model(torch.ones(1, 3)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    assert path.read_bytes() == raw
    assert not torch.equal(model.weight, torch.load(path)["weight"])


def test_what_is_missing_for_a_model_on_the_meta_device_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to("meta")
    state = from_torch({"0.weight": torch.ones(4, 3), "0.bias": torch.ones(4)})
    with pytest.raises(EditError, match=r"has no values for '1\.weight', '1\.bias'"):
        load_into(model, state, allow_missing=["1.*"])
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_counter_that_the_file_lacks_begins_at_zero_on_the_meta_device(tmp_path: Path) -> None:
    state = nn.BatchNorm1d(4).state_dict()
    del state["num_batches_tracked"]
    model = nn.BatchNorm1d(4, device="meta")
    load_into(model, save(tmp_path / "bn.pth", dict(state)))
    assert model.num_batches_tracked is not None
    assert model.num_batches_tracked.item() == 0
    assert not any(value.is_meta for value in model.state_dict().values())


# Wrappers


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, lambda model: torch.compile(nn.DataParallel(model))])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_a_wrapped_or_compiled_model_is_loaded_inside(
    tmp_path: Path, wrap: Callable[[nn.Module], nn.Module], prefix: str
) -> None:
    source, model = nn.Linear(3, 2), nn.Linear(3, 2)
    wrapped = wrap(model)
    path = save(tmp_path / "l.pth", {prefix + key: value for key, value in source.state_dict().items()})
    report = load_into(wrapped, path)
    assert report.loaded == ("weight", "bias")
    assert same(snapshot(model), snapshot(source))


def test_a_model_can_be_wrapped_after_it_was_loaded(tmp_path: Path) -> None:
    source, model = nn.Linear(3, 2), nn.Linear(3, 2, device="meta")
    load_into(model, save(tmp_path / "l.pth", source.state_dict()))
    features = torch.randn(4, 3)
    assert torch.equal(nn.DataParallel(model)(features), source(features))


# Recipes and reports


def test_a_recipe_says_what_goes_where(tmp_path: Path) -> None:
    path = save(tmp_path / "q.pth", {"a": torch.ones(2, 2), "b": torch.zeros(2, 2)})
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in ("left", "right")})
    with pytest.raises(EditError, match="open: 'a', 'b'"):
        load_into(model, path)
    recipe = Recipe((step("rename", pairs=["^a$=right.weight", "^b$=left.weight"]),))
    report = load_into(model, path, recipe=recipe)
    assert model.state_dict()["right.weight"].all()
    assert not model.state_dict()["left.weight"].any()
    assert [(one.key, one.how, one.source) for one in report.fit.outcomes] == [
        ("left.weight", "renamed", "b"),
        ("right.weight", "renamed", "a"),
    ]


def test_the_report_is_data_with_a_readable_text(tmp_path: Path) -> None:
    state = {**nn.Linear(3, 2).state_dict(), "queue": torch.zeros(5, 9)}
    report = load_into(nn.Linear(3, 2), save(tmp_path / "l.pth", state))
    assert (report.loaded, report.initialized, report.matched) == (("weight", "bias"), (), 1.0)
    assert [(one.key, one.numel) for one in report.fit.outcomes if one.how == "dropped"] == [("queue", 45)]
    assert [line.split()[:2] for line in str(report).splitlines()[1:3]] == [["as", "is"], ["dropped", "1"]]


def test_an_opened_and_edited_checkpoint_is_loaded_as_well(tmp_path: Path) -> None:
    source, model = nn.Linear(3, 2), nn.Linear(3, 2)
    path = save(tmp_path / "l.pth", {f"x.{key}": value for key, value in source.state_dict().items()})
    load_into(model, ckpt_surgeon.strip_prefix(ckpt_surgeon.open(path), "x."))
    assert same(snapshot(model), snapshot(source))


def test_two_values_for_one_tied_parameter_are_refused_and_nothing_changes(tmp_path: Path) -> None:
    one, two = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    two.weight = one.weight
    model = nn.ModuleDict({"a": one, "b": two})
    before = one.weight.detach().clone()
    torch.save({"a.weight": torch.zeros(3, 3), "b.weight": torch.ones(3, 3)}, tmp_path / "untied.pth")
    with pytest.raises(EditError, match="are one parameter in the model and differ in the checkpoint"):
        load_into(model, tmp_path / "untied.pth")
    assert torch.equal(one.weight, before)
