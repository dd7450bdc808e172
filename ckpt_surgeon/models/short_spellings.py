"""Short spellings of models that libraries know by name: ``timm:NAME``, ``torchvision:NAME`` and ``hf:FOLDER``.

Nothing is fetched: models are built without the weights that a library would download, and ``hf:`` takes a folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

from ..errors import TargetError
from .libraries import library, nothing_fetched
from .spelling import arguments_of, instead

HF = "hf:"  # hf:// is a URL, and no model
_NAMED = re.compile(r"(?P<library>timm|torchvision):(?P<name>\w[\w.-]*)(?P<call>\s*\(.*)?", re.DOTALL)
_VALUES = {  # arguments with which the libraries fetch weights, or read them
    "timm": ("pretrained", "checkpoint_path"),
    "torchvision": ("weights", "weights_backbone"),
}


class Factory(NamedTuple):
    """What makes a model, and what it is called with."""

    factory: Callable[..., object]
    args: tuple[object, ...]
    kwargs: Mapping[str, object]


def is_short(target: str) -> bool:
    """Whether a target is spelled in one of these ways.

    >>> is_short("timm:resnet50"), is_short("hf:models/llama"), is_short("torchvision.models:resnet18")
    (True, True, False)
    """
    return (target.startswith(HF) and not target.startswith("hf://")) or _NAMED.fullmatch(target) is not None


def model_of(target: str) -> Factory | None:
    """What makes the model that a short spelling names, None for a target that is spelled in another way.

    What else a library has at its top is no model: ``timm:create_model('resnet50')`` is spelled in the usual way.
    Raises TargetError for a name that the library does not have, for a library that is not installed, and for
    arguments with which weights would be fetched.

    >>> model_of("torchvision:resnet18(num_classes=7)").kwargs["num_classes"]
    7
    >>> model_of("torchvision:resnet81")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ckpt_surgeon.errors.TargetError: torchvision:resnet81: torchvision has no model 'resnet81'; did you mean ...
    """
    if not is_short(target):
        return None
    if target.startswith(HF):
        from .hf_folder import model_of_folder

        return Factory(*model_of_folder(target, target.removeprefix(HF)))
    found = _NAMED.fullmatch(target)
    assert found is not None
    name = found["name"]
    package = library(target, found["library"])
    known = names_of(found["library"])
    if name.partition(".")[0] not in known:
        if hasattr(package, name.partition(".")[0]):
            return None
        raise TargetError(target, f"{found['library']} has no model {name!r}{_meant(name, known)}")
    args, kwargs = arguments_of(target, found["call"] or "()")
    _refuse_values(target, found["library"], kwargs)
    make = _of_timm if found["library"] == "timm" else _of_torchvision
    return make(target, package, name, args, kwargs)


def names_of(library: str) -> list[str]:
    """The names of all models of timm or torchvision, where it is installed.

    >>> "resnet50" in names_of("torchvision")
    True
    """
    package = import_module("torchvision.models" if library == "torchvision" else "timm")
    names: list[str] = package.list_models()
    return names


def _meant(name: str, known: list[str]) -> str:
    """What a name was probably to be: likeness, or else what begins or goes on as it does; nothing for no idea."""
    close = instead(name, known)
    if close.startswith("; did you mean"):
        return close
    alike = sorted((one for one in known if name.lower() in one), key=len)
    return instead(alike[0], alike) if alike else f"; it has {len(known):,} others, ckpt completes their names"


def _refuse_values(target: str, library: str, kwargs: Mapping[str, object]) -> None:
    for name in _VALUES[library]:
        if kwargs.get(name) not in (None, False, ""):
            problem = f"{name}={kwargs[name]!r} asks for weights, and nothing is fetched for a model to compare with"
            raise TargetError(target, problem, remedy="leave it out, or write a factory in a file of your own")


def _of_timm(
    target: str, timm: ModuleType, name: str, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> Factory:
    if args:
        raise TargetError(target, "arguments of timm's models have names", remedy=f"write timm:{name}(num_classes=10)")
    architecture, _, tag = name.partition(".")
    tags = [one.partition(".")[2] for one in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise TargetError(target, f"timm has no weights {tag!r} of {architecture}{instead(tag, tags)}")
    return Factory(_without_network(timm.create_model), (name,), kwargs)


def _of_torchvision(
    target: str, torchvision: ModuleType, name: str, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> Factory:
    from inspect import signature

    if "." in name or args:
        problem = f"models of torchvision are one name, their arguments have names, unlike {name!r}"
        raise TargetError(target, problem, remedy=f"write torchvision:{name.partition('.')[0]}(num_classes=10)")
    builder = import_module("torchvision.models").get_model_builder(name)
    unset = {key: None for key in _VALUES["torchvision"] if key in signature(builder).parameters}
    return Factory(builder, (), {**unset, **kwargs})


def _without_network(make: Callable[..., object]) -> Callable[..., object]:
    def made(*args: object, **kwargs: object) -> object:
        with nothing_fetched():
            return make(*args, **kwargs)

    return made
