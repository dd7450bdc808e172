"""A model of transformers from a folder with its config.json: ``hf:FOLDER``, with weights beside it or without.

The class is the first of ``architectures``, or the one behind ``#``: ``hf:FOLDER#LlamaForSequenceClassification``.
Arguments in parentheses change the config: ``hf:FOLDER(num_labels=7)``.  Code that lies in the folder is never run,
and nothing is fetched.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Protocol, cast

from ..errors import TargetError, listed
from .libraries import library, nothing_fetched
from .spelling import arguments_of, instead

CONFIG = "config.json"
LARGEST = 16 << 20  # bytes of a config.json that are read
_SPELLED = re.compile(r"(?P<folder>.+?)(?:#(?P<name>[^\W\d]\w*))?(?P<call>\s*\(.*)?", re.DOTALL)
_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")  # the name of a model on the hub

Json = Mapping[str, object]
Maker = Callable[..., object]


class Config(Protocol):
    """What is needed of transformers' config classes."""

    @staticmethod
    def from_dict(raw: dict[str, object], **kwargs: object) -> tuple[object, Mapping[str, object]]: ...


def model_of_folder(target: str, text: str) -> tuple[Callable[..., object], tuple[object, ...], Json]:
    """What makes the model of ``text``, which is FOLDER, FOLDER#Class or either with arguments; and its arguments.

    Raises TargetError for a folder that does not say which model it holds, or whose model needs code of its own.
    """
    folder, name, changes = _taken_apart(target, text)
    raw = _config(target, folder)
    _refuse_other_libraries(target, folder, raw)
    transformers = library(target, "transformers")
    with nothing_fetched():
        config_class = _config_class(target, transformers, folder, raw)
        config, unused = config_class.from_dict(dict(raw), return_unused_kwargs=True, **changes)
        if wrong := [key for key in changes if key in unused]:
            there = [key for key in vars(config) if not key.startswith("_")]
            raise TargetError(target, f"{config_class.__name__} has no {wrong[0]!r}{instead(wrong[0], there)}")
        if getattr(config, "use_pretrained_backbone", False):
            vars(config)["use_pretrained_backbone"] = False  # its weights would be fetched
        make = _maker(target, transformers, folder, raw, name or _architecture(target, config, raw))

    def built() -> object:
        with nothing_fetched():
            return make(config, attn_implementation="eager")  # the parameters are the same, and every model has it

    return built, (), {}


def folders(begun: str) -> list[str]:
    """The folders with a config.json whose path begins so, and those on the way to such folders, with a slash.

    >>> folders("no/such/folder")
    []
    """
    parent, _, start = begun.rpartition("/")
    here = Path(parent or ("/" if begun.startswith("/") else ".")).expanduser()
    if not here.is_dir():
        return []
    inside = sorted(one for one in here.iterdir() if one.name.startswith(start) and one.is_dir())
    shown = begun[: len(begun) - len(start)]
    return [f"{shown}{one.name}" if (one / CONFIG).is_file() else f"{shown}{one.name}/" for one in inside]


def _taken_apart(target: str, text: str) -> tuple[Path, str | None, Json]:
    """The folder, the name of a class if one is given, and what changes in the config."""
    found = _SPELLED.fullmatch(text)
    if found is None:
        raise TargetError(target, "names no folder", remedy="write hf:FOLDER, for a folder with a config.json")
    if Path(text).expanduser().exists():
        return _folder(target, Path(text).expanduser()), None, {}
    folder = _folder(target, Path(found["folder"]).expanduser())
    args, changes = arguments_of(target, found["call"] or "()")
    if args:
        raise TargetError(target, "arguments change the config by name", remedy=f"write hf:{folder}(num_labels=7)")
    return folder, found["name"], changes


def _folder(target: str, path: Path) -> Path:
    """The folder with the config: of the hub's cache, the snapshot that was fetched last.  Raises TargetError."""
    if path.is_file() and path.name == CONFIG:
        return path.parent
    if not path.exists():
        raise _no_folder(target, path)
    if not path.is_dir():
        raise TargetError(target, f"{path} is a file", remedy=f"name the folder that has its {CONFIG}: hf:FOLDER")
    snapshots = path / "snapshots"
    if (path / CONFIG).exists() or not snapshots.is_dir():
        return path
    main = path / "refs" / "main"
    names = sorted(os.listdir(snapshots))
    wanted = main.read_text("utf-8", "replace").strip() if main.is_file() else ""
    if wanted not in names and len(names) != 1:
        raise TargetError(target, f"has {len(names)} snapshots", remedy=f"name one: hf:{snapshots}/…")
    return snapshots / (wanted if wanted in names else names[0])


def _no_folder(target: str, path: Path) -> TargetError:
    """The error for a folder that is not here; it may be the name of a model on the hub."""
    problem = f"there is no folder {path}, and nothing is fetched"
    name = str(path)
    try:
        beside = [one.name for one in path.parent.iterdir() if (one / CONFIG).is_file()]
    except OSError:
        beside = []
    close = instead(path.name, beside)
    if close.startswith("; did you mean"):
        return TargetError(target, problem + close)
    if not _HUB.fullmatch(name) or path.parent.name in (".", "..") or path.is_absolute():
        return TargetError(target, problem, remedy=f"name a folder that has a {CONFIG}")
    cached = _cache() / f"models--{name.replace('/', '--')}"
    if cached.is_dir():
        return TargetError(target, problem, remedy=f"it is in the hub's cache: hf:{cached}")
    return TargetError(target, problem, remedy=f"run: hf download {name} {CONFIG} --local-dir {name}")


def _cache() -> Path:
    """The folder in which the hub's client keeps what it fetched."""
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()


def _config(target: str, folder: Path) -> Json:
    """What config.json says.  Raises TargetError where it is none, or not one of a model."""
    path = folder / CONFIG
    if not path.is_file():
        raise _no_config(target, folder)
    try:
        with open(path, "rb") as file:
            raw = file.read(LARGEST + 1)
        config = json.loads(raw) if len(raw) <= LARGEST else None
    except (OSError, ValueError, RecursionError) as error:
        raise TargetError(target, f"{path} cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise TargetError(target, f"{path} is no config: it is no JSON object of at most {LARGEST >> 20} MiB")
    return config


def _no_config(target: str, folder: Path) -> TargetError:
    names = set(os.listdir(folder))
    if "adapter_config.json" in names:
        remedy = "give the base model's folder, or the adapter to ckpt merge-lora"
        return TargetError(target, f"{folder} is the folder of an adapter, which is no model by itself", remedy=remedy)
    if "model_index.json" in names:
        parts = sorted(name for name in names if (folder / name / CONFIG).is_file())
        remedy = f"name the folder of one: {listed(parts)}"
        return TargetError(target, f"{folder} is a pipeline of diffusers, which has several models", remedy=remedy)
    inside = sorted(name for name in names if (folder / name / CONFIG).is_file())
    remedy = f"name the folder that has it{instead(folder.name, inside).replace('; there are', ':')}"
    return TargetError(target, f"{folder} has no {CONFIG}", remedy=remedy)


def _refuse_other_libraries(target: str, folder: Path, raw: Json) -> None:
    """Raise TargetError for a config.json that another library than transformers wrote."""
    if "model_type" in raw:
        return
    if isinstance(name := raw.get("_class_name"), str):
        factory = (
            f"from diffusers import {name}; make = lambda: {name}.from_config({name}.load_config({str(folder)!r}))"
        )
        remedy = f"write a file model.py: {factory} and name model.py:make"
        raise TargetError(target, f"{folder}/{CONFIG} is of diffusers' {name}", remedy=remedy)
    if isinstance(name := raw.get("architecture"), str):
        classes = raw.get("num_classes")
        spelled = f"timm:{name}(num_classes={classes})" if isinstance(classes, int) else f"timm:{name}"
        raise TargetError(target, f"{folder}/{CONFIG} is of timm's {name}", remedy=f"write {spelled}")


def _config_class(target: str, transformers: ModuleType, folder: Path, raw: Json) -> type[Config]:
    """The class of the config that ``model_type`` names."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = raw.get("model_type")
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        return cast(type[Config], CONFIG_MAPPING[kind])
    if "auto_map" in raw:
        raise _custom_code(target, folder, raw)
    if kind is None:
        raise TargetError(target, f"{folder}/{CONFIG} has no model_type: it does not say which model it is of")
    version = transformers.__version__
    close = instead(str(kind), list(CONFIG_MAPPING.keys())) if isinstance(kind, str) else ""
    close = close if close.startswith("; did you mean") else ""
    problem = f"transformers {version} has no model_type {kind!r}{close}"
    raise TargetError(target, problem, remedy="pip install -U transformers, if a later one has it")


def _custom_code(target: str, folder: Path, raw: Json) -> TargetError:
    """The error for a model whose code lies in the folder: it is not run."""
    table = raw.get("auto_map")
    automatic = (
        next((key for key in table if key.startswith("AutoModel")), "AutoModel")
        if isinstance(table, dict)
        else "AutoModel"
    )
    factory = (
        f"from transformers import AutoConfig, {automatic}; make = lambda: {automatic}.from_config("
        f"AutoConfig.from_pretrained({str(folder)!r}, trust_remote_code=True), trust_remote_code=True)"
    )
    problem = f"{folder}/{CONFIG} names code of its own (auto_map), which is not run"
    remedy = f"read that code; if you trust it, write a file model.py: {factory} and name model.py:make"
    return TargetError(target, problem, remedy=remedy)


def _architecture(target: str, config: object, raw: Json) -> str:
    """The name of the class that the config says.  Raises TargetError where it says none."""
    names = raw.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        return names[0]
    there = _classes_for(config)
    shown = f": {', '.join('#' + name for name in there)}" if there else ""
    problem = f"its {CONFIG} names no architecture"
    raise TargetError(target, problem, remedy=f"write #CLASS behind the folder, a class of transformers{shown}")


def _classes_for(config: object) -> list[str]:
    """The names of the classes of transformers that are built from a config of this type."""
    from transformers.models.auto import modeling_auto

    found: dict[str, None] = {}
    for name in dir(modeling_auto):
        if name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES"):
            classes = getattr(modeling_auto, name).get(getattr(config, "model_type", None), ())
            found |= dict.fromkeys([classes] if isinstance(classes, str) else classes)
    return list(found)


def _maker(target: str, transformers: ModuleType, folder: Path, raw: Json, name: str) -> Maker:
    """What makes a model of a config: of the class of this name, which may be one of transformers' automatic ones."""
    found = getattr(transformers, name, None)
    if isinstance(found, type) and found is not transformers.PreTrainedModel:
        if issubclass(found, transformers.PreTrainedModel):
            return cast(Maker, getattr(found, "_from_config"))  # noqa: B009 - a class that mypy does not know
        if name.startswith("AutoModel"):
            return cast(Maker, getattr(found, "from_config"))  # noqa: B009
    if found is None and "auto_map" in raw:
        raise _custom_code(target, folder, raw)
    if found is not None:
        raise TargetError(target, f"{name} of transformers is no model", remedy="name a class such as LlamaForCausalLM")
    problem = f"transformers {transformers.__version__} has no class {name!r}"
    classes = (one for one in dir(transformers) if "For" in one or one.endswith("Model"))
    raise TargetError(target, problem + _like(name, classes))


def _like(name: str, there: Iterable[str]) -> str:
    close = instead(name, there)
    return close if close.startswith("; did you mean") else "; pip install -U transformers, if a later one has it"
