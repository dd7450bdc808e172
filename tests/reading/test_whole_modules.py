"""Modules that were saved whole give their own state_dict() and its _metadata, or say what is not known."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from command_line import Run
from torch import nn

import ckpt_surgeon
from ckpt_surgeon.errors import FileError


def _gives_its_own_state_dict(model: nn.Module, folder: Path) -> ckpt_surgeon.Checkpoint:
    """Convert a module that is saved whole, and compare what is written with its own state_dict."""
    saved, out = folder / "whole.pth", folder / "out.pth"
    torch.save(model, saved)
    ckpt_surgeon.convert(saved, out, force=True)
    theirs, ours = model.state_dict(), torch.load(out)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert list(getattr(ours, "_metadata").items()) == list(getattr(theirs, "_metadata").items())  # noqa: B009
    return ckpt_surgeon.open(saved)


LAYERS: list[Callable[[], nn.Module]] = [
    lambda: nn.Linear(2, 3),
    lambda: nn.Bilinear(2, 3, 2),
    lambda: nn.Conv1d(2, 2, 1),
    lambda: nn.ConvTranspose3d(2, 2, 1),
    lambda: nn.BatchNorm1d(2),
    lambda: nn.BatchNorm3d(2, affine=False),
    lambda: nn.SyncBatchNorm(2),
    lambda: nn.InstanceNorm2d(2, affine=True, track_running_stats=True),
    lambda: nn.GroupNorm(1, 2),
    lambda: nn.LayerNorm(2),
    lambda: nn.RMSNorm(2),
    lambda: nn.Embedding(3, 2),
    lambda: nn.EmbeddingBag(3, 2),
    lambda: nn.LSTM(2, 2, num_layers=2, bidirectional=True),
    lambda: nn.GRUCell(2, 2),
    lambda: nn.MultiheadAttention(2, 1),
    lambda: nn.TransformerEncoderLayer(2, 1, 2),
    lambda: nn.AdaptiveLogSoftmaxWithLoss(2, 6, [2, 4]),
    lambda: nn.PReLU(),
    lambda: nn.CrossEntropyLoss(weight=torch.ones(2)),
    lambda: nn.Sequential(nn.Linear(2, 2), nn.Identity(), nn.ModuleDict({"a": nn.BatchNorm1d(2)}), nn.ModuleList()),
    lambda: nn.ParameterList([torch.ones(2), torch.ones(3)]),
    lambda: nn.ParameterDict({"a": nn.Parameter(torch.ones(2))}),
    lambda: nn.DataParallel(nn.BatchNorm2d(2)),
    lambda: nn.utils.spectral_norm(nn.Linear(3, 3)),
    lambda: nn.utils.spectral_norm(nn.utils.spectral_norm(nn.Bilinear(2, 2, 2)), "bias"),
    lambda: nn.utils.weight_norm(nn.Linear(3, 3)),
    lambda: torch.optim.swa_utils.AveragedModel(nn.BatchNorm1d(2)),
    lambda: torch.ao.quantization.MinMaxObserver(),
    lambda: torch.ao.quantization.HistogramObserver(),
    lambda: torch.ao.nn.intrinsic.ConvBn2d(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)),
    lambda: torch.ao.nn.intrinsic.qat.ConvBn2d(2, 2, 1, qconfig=torch.ao.quantization.default_qat_qconfig),
    lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))),
    lambda: torchvision.ops.FrozenBatchNorm2d(2),
    lambda: torchvision.ops.FeaturePyramidNetwork([2, 4], 2),
    lambda: torchvision.models.detection.rpn.RPNHead(2, 1),
    lambda: torchvision.models.vision_transformer.MLPBlock(2, 4, 0.0),
    lambda: torchvision.models._utils.IntermediateLayerGetter(nn.Sequential(nn.Linear(2, 2)), {"0": "out"}),
    lambda: torchvision.models.mnasnet0_5(),
    lambda: torchvision.models.shufflenet_v2_x0_5(),
    lambda: torchvision.models.DenseNet(4, (1, 1), 4),
    lambda: timm.layers.BatchNormAct2d(2),
    lambda: timm.create_model("test_byobnet"),
    lambda: timm.create_model("test_vit"),
    lambda: timm.models.densenet.DenseNet(4, (1, 1)),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", LAYERS, ids=range(len(LAYERS)))
def test_a_whole_module_gives_the_state_dict_and_the_metadata_of_its_own(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    opened = _gives_its_own_state_dict(make(), tmp_path)
    assert not opened.notes
    assert not opened.part


def test_mnasnet_loads_strictly_from_the_converted_file(tmp_path: Path) -> None:
    model, fresh = torchvision.models.mnasnet0_5(), torchvision.models.mnasnet0_5()
    torch.save(model, tmp_path / "whole.pth")
    ckpt_surgeon.convert(tmp_path / "whole.pth", tmp_path / "out.pth")
    fresh.load_state_dict(torch.load(tmp_path / "out.pth"))
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_version_that_the_instance_carries_comes_first(tmp_path: Path) -> None:
    model = torchvision.models.mnasnet0_5()
    model._version = 1  # as MNASNet itself sets it when it has loaded a file of version 1
    _gives_its_own_state_dict(model, tmp_path)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(2, 2), nn.BatchNorm1d(2)


class Later(nn.Module):
    _version = 7


def test_classes_whose_version_is_not_known_are_named(ckpt: Run, tmp_path: Path) -> None:
    opened = _gives_its_own_state_dict(Net(), tmp_path)
    (note,) = opened.notes
    assert f"{Net.__module__}.Net" in note
    assert "BatchNorm" not in note
    assert note in ckpt_surgeon.ls(tmp_path / "whole.pth").notes
    done = ckpt("convert", tmp_path / "whole.pth", tmp_path / "again.pth")
    assert "the version in torch's _metadata" in done.out
    torch.save(nn.ModuleList([Later(), nn.Linear(1, 1)]), tmp_path / "later.pth")
    later = ckpt_surgeon.open(tmp_path / "later.pth")
    assert later.versions == {"": {"version": 1}, "0": {"version": 1}, "1": {"version": 1}}
    assert f"{Later.__module__}.Later" in later.notes[0]


def _rename(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, _: object) -> None:
    state[prefix + "renamed"] = state.pop(prefix + "weight")


def test_a_state_dict_hook_is_named_since_it_is_not_run(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0]._register_state_dict_hook(_rename)
    torch.save(model, tmp_path / "hooked.pth")
    (note,) = ckpt_surgeon.open(tmp_path / "hooked.pth").notes
    assert "state_dict hooks are not run" in note
    assert "'0'" in note


# -- modules whose state_dict cannot be had whole


def _dynamic() -> nn.Module:
    float_model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4), nn.GRUCell(4, 4), nn.Linear(4, 2))
    quantised: nn.Module = torch.ao.quantization.quantize_dynamic(float_model, {nn.Linear, nn.LSTM, nn.GRUCell})
    return quantised


def _rnn() -> nn.Module:
    quantised: nn.Module = torch.ao.quantization.quantize_dynamic(
        nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4)), {nn.Linear, nn.LSTM}
    )
    return quantised


def _static() -> nn.Module:
    layers = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 2)
    model = nn.Sequential(torch.ao.quantization.QuantStub(), *layers).eval()
    prepared = _prepared(model, torch.ao.quantization.get_default_qconfig())
    prepared(torch.randn(1, 3, 4, 4))
    quantised: nn.Module = torch.ao.quantization.convert(prepared)
    return quantised


def _prepared(model: nn.Module, config: object) -> nn.Module:
    vars(model)["qconfig"] = config
    prepared: nn.Module = torch.ao.quantization.prepare(model)
    return prepared


def _embedding() -> nn.Module:
    prepared = _prepared(nn.Sequential(nn.EmbeddingBag(4, 16)), torch.ao.quantization.float_qparams_weight_only_qconfig)
    quantised: nn.Module = torch.ao.quantization.convert(prepared)
    return quantised


def _root() -> nn.Module:
    return _static().get_submodule("1")


class Reduced(nn.Module):
    """A module that pickles in a way of its own."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def __reduce__(self) -> tuple[object, ...]:
        return Reduced, (2,)


def _reduced() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), Reduced(2))


def _lazy() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))


WITHOUT = [(_dynamic, "_packed_params"), (_static, "1 (Conv2d)"), (_embedding, "_packed_params"), (_root, "itself"),
           (_reduced, "1 (Reduced)"), (_lazy, "1.weight (UninitializedParameter)")]  # fmt: skip


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(("make", "named"), WITHOUT)
def test_a_module_whose_state_dict_cannot_be_had_whole_is_refused_by_all_that_writes(
    make: Callable[[], nn.Module], named: str, ckpt: Run, tmp_path: Path
) -> None:
    model, path, out = make(), tmp_path / "whole.pth", tmp_path / "out.pth"
    torch.save({"model": model, "epoch": 3}, path)
    opened = ckpt_surgeon.open(path)
    assert named in opened.part
    assert set(opened) < set(model.state_dict()) or not opened
    for save in (ckpt_surgeon.convert, ckpt_surgeon.save):
        with pytest.raises(FileError, match="allow_part=True"):
            save(opened, out)
    for command in ("convert", "strip-prefix"):
        refused = ckpt(command, path, out)
        assert (refused.status, out.exists()) == (2, False)
    with pytest.raises(FileError, match="no whole model"):
        ckpt_surgeon.load_into(nn.Linear(1, 1), path)
    found = ckpt_surgeon.diff(opened, dict(opened))
    assert not found.loadable
    assert any(opened.part in note for note in found.notes)
    assert any(opened.part in note for note in ckpt_surgeon.ls(path).notes)
    assert any(left.path.startswith("model") for left in opened.left_out)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("around", [{}, {"epoch": 3}])
@pytest.mark.parametrize("make", [_dynamic, _static, lambda: nn.Sequential(_static(), _dynamic())])
def test_the_state_dict_of_a_quantised_model_is_refused_for_what_is_no_tensor(
    make: Callable[[], nn.Module], around: dict[str, int], ckpt: Run, tmp_path: Path
) -> None:
    state, path = make().state_dict(), tmp_path / "state.pth"
    torch.save({"state_dict": state, **around} if around else state, path)
    opened = ckpt_surgeon.open(path)
    assert "_packed_params" in opened.part
    lacking = {left.path.removeprefix("state_dict.") for left in opened.left_out if left.path != "epoch"}
    assert set(state) - set(opened) == lacking
    assert ckpt("convert", path, tmp_path / "out.safetensors").status == 2
    assert ckpt("diff", path, path).status == 1


@pytest.mark.usefixtures("quiet")
def test_names_of_a_quantised_state_dict_are_not_changed_in_place_by_halves(ckpt: Run, tmp_path: Path) -> None:
    path = tmp_path / "state.pth"
    torch.save({f"module.{key}": value for key, value in _static().state_dict().items()}, path)
    before = path.read_bytes()
    refused = ckpt("strip-prefix", path, "--in-place")
    assert refused.status == 2
    assert "_packed_params" in refused.err
    assert path.read_bytes() == before


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("is_traced", [True, False])
def test_a_torchscript_archive_of_a_quantised_model_is_refused_for_what_it_packs(
    is_traced: bool, ckpt: Run, tmp_path: Path
) -> None:
    path, out = tmp_path / "scripted.pt", tmp_path / "out.pth"
    made = torch.jit.trace(_static(), torch.ones(1, 3, 4, 4)) if is_traced else torch.jit.script(_rnn())
    torch.jit.save(made, path)
    opened = ckpt_surgeon.open(path)
    assert opened.part
    assert list(opened) == list(torch.jit.load(path).state_dict())
    assert (ckpt("convert", path, out).status, out.exists()) == (2, False)
    assert any("_packed_params" in left.path or left.path == "1" for left in opened.left_out)


def test_a_torchscript_archive_of_a_plain_model_is_no_part(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))), tmp_path / "plain.pt")
    assert not ckpt_surgeon.open(tmp_path / "plain.pt").part


def test_what_there_is_of_a_quantised_module_is_written_where_a_part_is_allowed(ckpt: Run, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, path, out = _static(), tmp_path / "whole.pth", tmp_path / "out.pth"
        torch.save(model, path)
    assert ckpt("convert", path, out, "--allow-part").status == 0
    written, theirs = torch.load(out), model.state_dict()
    assert list(written) == [key for key in theirs if not key.startswith(("1.", "4."))]
    assert all(torch.equal(written[key], theirs[key]) for key in written)
