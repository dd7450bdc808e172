"""The tables of module classes are those of the packages that are installed."""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from collections.abc import Iterator

import pytest
import torch

from ckpt_surgeon.reading.module_classes import KNOWN, OWN_STATE, VERSIONS, has_own_state, is_known, version_of

# Where classes are defined that have a version or a state_dict of their own, in packages that are not walked whole.
PACKAGES = ("torch.nn", "torch.ao.nn", "torch.ao.quantization", "torch.ao.pruning", "torchvision.models")
MODULES = (
    "timm",
    "torchvision.ops",
    "torch.distributed.nn.api.remote_module",
    "transformers.models.phi3.modeling_phi3",
    "transformers.models.phi4_multimodal.modeling_phi4_multimodal",
)

# Classes with a _save_to_state_dict of their own that gives what torch.nn.Module's gives: parameters and buffers.
AS_TORCH = ("torch.nn.modules.lazy.LazyModuleMixin", "torch.ao.quantization.observer.HistogramObserver",
            "torch.ao.quantization.fake_quantize.FakeQuantize")  # fmt: skip
OWN = ("_save_to_state_dict", "state_dict", "get_extra_state")


def _classes() -> Iterator[type[torch.nn.Module]]:
    waiting, seen = [torch.nn.Module], set()
    while waiting:
        for cls in type.__subclasses__(waiting.pop()):
            if cls not in seen:
                seen.add(cls)
                waiting.append(cls)
                if cls.__module__.partition(".")[0] in KNOWN and "<locals>" not in cls.__qualname__:
                    yield cls


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _definer(cls: type, method: str) -> str:
    """The class that defines a method, for one that inherits it."""
    return _name(next(base for base in cls.__mro__ if method in vars(base)))


@pytest.fixture(scope="module")
def classes() -> list[type[torch.nn.Module]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for package in PACKAGES:
            for found in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
                importlib.import_module(found.name)
        for module in MODULES:
            importlib.import_module(module)
    return list(_classes())


@pytest.mark.slow
def test_the_versions_are_those_of_the_installed_classes(classes: list[type[torch.nn.Module]]) -> None:
    theirs = {_name(cls): cls._version for cls in classes if cls._version != 1}
    ours = {_name(cls): version_of(_name(cls)) for cls in classes if version_of(_name(cls)) != 1}
    assert ours == theirs == VERSIONS


@pytest.mark.slow
def test_the_classes_with_a_state_of_their_own_are_those_that_override_torch(
    classes: list[type[torch.nn.Module]],
) -> None:
    theirs = set()
    for cls in classes:
        overriding = [name for name in OWN if getattr(cls, name) is not getattr(torch.nn.Module, name)]
        if any(_definer(cls, name) not in AS_TORCH for name in overriding):
            theirs.add(_name(cls))
    assert theirs == OWN_STATE


def test_classes_have_their_state_under_their_names_of_before_they_moved() -> None:
    assert version_of("torch.nn.quantized.modules.linear.Linear") == 3
    assert version_of("timm.models.layers.norm_act.BatchNormAct2d") == 2
    assert has_own_state("torch.nn.intrinsic.quantized.modules.conv_relu.ConvReLU2d")
    assert not has_own_state("torch.nn.modules.linear.Linear")
    assert not is_known("torchaudio.models.Wav2Vec2Model")
