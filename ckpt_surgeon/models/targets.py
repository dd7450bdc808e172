"""What a model expects of a checkpoint: its keys in order, and the dtype and shape of each.

A target is spelled ``package.module:factory`` or ``path/file.py:factory``, with literal arguments in parentheses
where it needs some: ``torchvision.models:resnet18(num_classes=10)``.  Models of libraries have short spellings too
(:mod:`.short_spellings`).  Here, and only here, other people's code is imported and run, because the caller named it.
Models are built on torch's meta device wherever they allow it, so that a model too large for this machine costs
nothing.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypeAlias, cast

from ..errors import TargetError, listed, text_of
from ..reading.sources import is_module, state_dict_of
from ..tensors.dtypes import BY_NAME, EXTRA_STATE, DType
from ..tensors.extra_state import SUFFIX as EXTRA_STATE_SUFFIX
from ..tensors.extra_state import is_extra_state
from ..tensors.records import ExtraState, Shaped
from ..text import Shown
from . import short_spellings
from .spelling import DOTTED, NAME, SPELLING, Spelling, instead, parsed

if TYPE_CHECKING:
    import torch

    from ..reading.sources import Source

    Target: TypeAlias = Source | Mapping[str, Shaped]  # text may be a path, or the spelling of a model

_ENDINGS = {"pth", "pt", "pkl", "bin", "ckpt", "tar", "safetensors", "dcp", "zip"}  # of files, and no name of a model

NO_MODEL = "is no model; give a torch.nn.Module, or its spelling package.module:factory"

# Modules that files brought from their own folders: the next file may have others of the same names.
_siblings: set[str] = set()


@dataclass(frozen=True, slots=True, repr=False)
class Expected(Shown):
    """One entry of a model's state_dict, without its values."""

    dtype: DType  # EXTRA_STATE for a module's extra state, of which torch checks nothing but that it is there
    shape: tuple[int, ...]
    parameter: bool  # False for buffers
    lazy: bool = False  # whether the shape is open until the first forward pass or load

    @property
    def numel(self) -> int:
        """Elements; an extra state has none that count."""
        return 0 if self.dtype == EXTRA_STATE else prod(self.shape)


def is_model(target: str) -> bool:
    """Whether this is spelled as a model; the path of something that exists never is.

    >>> is_model("torchvision.models:resnet18(num_classes=10)"), is_model("nets/unet.py:UNet"), is_model("unet.pth")
    (True, True, False)
    >>> is_model("timm:resnet50"), is_model("hf:llama-3-8b"), is_model("hf://gpt2/model.safetensors")
    (True, True, False)
    """
    is_spelled = SPELLING.fullmatch(target) is not None or short_spellings.is_short(target)
    return is_spelled and not os.path.exists(target)


def resolve(target: str | torch.nn.Module) -> dict[str, Expected]:
    """Say what a model expects, which is given or spelled as ``package.module:factory``.  Raises TargetError.

    >>> {key: entry.shape for key, entry in resolve("torch.nn:Linear(3, 2)").items()}
    {'weight': (2, 3), 'bias': (2,)}
    """
    import torch

    if isinstance(target, torch.nn.Module):
        return expected(target)
    if not isinstance(target, str):
        raise TargetError(f"a {type(target).__name__}", NO_MODEL)
    built = build(target)
    if not isinstance(built, torch.nn.Module):
        return {
            key: Expected(EXTRA_STATE, (), False) if is_extra_state(key) else _described(value, parameter=True)
            for key, value in built.items()
        }
    with _running(target, "reading its state_dict"):
        return expected(built)


def target_of(target: object) -> torch.nn.Module | Mapping[str, Shaped]:
    """A target in whatever form it is given: a model, or its spelling; a path, a Checkpoint, a state_dict.

    Raises TargetError for a model that cannot be built, CheckpointError for what is no target.
    """
    if is_module(target):
        return target
    return build(target) if isinstance(target, str) and is_model(target) else state_dict_of(target)


def expected_of(target: object) -> Mapping[str, Shaped]:
    """The keys and shapes of a target in whatever form it is given; see :func:`target_of`."""
    found = target_of(target)
    return expected(found) if is_module(found) else with_shapes(cast(Mapping[str, Shaped], found))


def expected(model: torch.nn.Module, *, lazy: bool = False) -> dict[str, Expected]:
    """Say what a model expects, in the order of its state_dict.

    Of extra states (``_extra_state``) those count that a module takes (``set_extra_state``), whatever they hold, as
    torch counts them when it loads strictly.  Raises TargetError for a lazy module, whose shapes are open until its
    first forward pass; with ``lazy``, its entries are marked as such.

    >>> import torch
    >>> [key for key, entry in expected(torch.nn.BatchNorm1d(4)).items() if not entry.parameter]
    ['running_mean', 'running_var', 'num_batches_tracked']
    """
    import torch

    if not isinstance(model, torch.nn.Module):
        raise TargetError(f"a {type(model).__name__}", NO_MODEL)
    wanted = dict.fromkeys(extra_state_keys(model))
    found: dict[str, Expected] = {}
    # keep_vars leaves parameters what they are, whatever a hook renames them to; otherwise all are plain tensors.
    for key, value in model.state_dict(keep_vars=True).items():
        if key in wanted:
            found[key] = Expected(EXTRA_STATE, (), False)
        elif isinstance(value, torch.Tensor) and not is_extra_state(key):
            found[key] = _described(value, parameter=isinstance(value, torch.nn.Parameter))
    found |= {key: Expected(EXTRA_STATE, (), False) for key in wanted if key not in found}
    open_shapes = [key for key, entry in found.items() if entry.lazy]
    if open_shapes and not lazy:
        remedy = "run a forward pass first, in a factory of your own"
        raise TargetError(type(model).__name__, f"{listed(open_shapes)} have no shape yet", remedy=remedy)
    return found


def extra_state_keys(model: torch.nn.Module) -> Iterator[str]:
    """The keys of the extra states that a model takes: those of modules with a ``set_extra_state`` of their own.

    >>> import torch
    >>> list(extra_state_keys(torch.nn.Linear(2, 2)))
    []
    """
    import torch

    for path, module in model.named_modules(remove_duplicate=False):
        if type(module).set_extra_state is not torch.nn.Module.set_extra_state:
            yield f"{path}.{EXTRA_STATE_SUFFIX}" if path else EXTRA_STATE_SUFFIX


def with_shapes(state_dict: Mapping[str, Shaped]) -> Mapping[str, Shaped]:
    """A state_dict in which extra states, which have no shape, are :class:`Expected` ones.

    >>> with_shapes({"_extra_state": {"version": 3}})["_extra_state"].dtype.name
    'extra_state'
    """
    shapeless = [key for key, value in state_dict.items() if is_extra_state(key) and not isinstance(value, ExtraState)]
    if not shapeless:
        return state_dict
    return {**state_dict, **dict.fromkeys(shapeless, Expected(EXTRA_STATE, (), False))}


def _described(tensor: torch.Tensor, *, parameter: bool) -> Expected:
    import torch

    name = str(tensor.dtype).removeprefix("torch.")
    if torch.nn.parameter.is_lazy(tensor):
        return Expected(BY_NAME.get(name) or DType(name, 0), (), parameter, lazy=True)
    return Expected(BY_NAME.get(name) or DType(name, tensor.dtype.itemsize), tuple(tensor.shape), parameter)


def refuse_misspelled(target: str) -> None:
    """Raise TargetError for what is no file, and is a model with a dot where the colon belongs.

    Only a name whose first part is a package that can be imported is taken for a model; nothing is imported.

    >>> refuse_misspelled("model.pth")
    >>> refuse_misspelled("torch.nn.Linear(3, 2)")
    Traceback (most recent call last):
    ckpt_surgeon.errors.TargetError: torch.nn.Linear(3, 2): is no file; for the model, write torch.nn:Linear(3, 2)
    """
    found = re.fullmatch(rf"(?P<source>{DOTTED})\.(?P<path>{NAME})(?P<call>\s*\(.*)?", target, re.DOTALL)
    if found is None or os.path.exists(target) or found["path"] in _ENDINGS:
        return
    top = found["source"].partition(".")[0]
    try:
        is_package = importlib.util.find_spec(top) is not None
    except (ImportError, ValueError, AttributeError):
        is_package = False
    if is_package or os.path.exists(found["source"].replace(".", os.sep) + ".py"):
        spelled = f"{found['source']}:{found['path']}{found['call'] or ''}"
        raise TargetError(target, f"is no file; for the model, write {spelled}")


def build(target: str, *, with_values: bool = False) -> torch.nn.Module | Mapping[str, torch.Tensor]:
    """Import what ``target`` names and call it, unless it is a model or a dict of tensors already.

    The current directory can be imported from, and so can the folder of a ``file.py``.  The model is on the meta
    device, without values, unless it cannot be built there or is wanted ``with_values``.  What the code prints goes
    to stderr.  Raises TargetError, whatever the code raises.

    >>> build("torch.nn:Linear(3, 2)").weight.device
    device(type='meta')
    """
    with _running(target, "building it"):
        return _checked(target, called(target, with_values=with_values))


def called(target: str, *, with_values: bool = True) -> object:
    """Import what ``target`` names, call it if it can be called, and give back whatever it returns.

    Raises TargetError, whatever the code raises.

    >>> called("collections:Counter('aab')")
    Counter({'a': 2, 'b': 1})
    """
    import torch  # noqa: F401 - while the path is still ours: a random.py beside the file must not become torch's

    with _running(target, "building it"):
        short = short_spellings.model_of(target)
        if short is not None:
            return short.factory(*short.args, **short.kwargs) if with_values else _built(*short)
    spelling = parsed(target)
    with _importable(spelling.file):
        with _running(target, "importing it"):
            found = _found(target, _imported(target, spelling), spelling)
        with _running(target, "building it"):
            return _made(target, found, spelling, with_values)


@contextmanager
def _running(target: str, doing: str) -> Iterator[None]:
    """Run other people's code: nothing on stdout, which ``--json`` needs for itself, and only TargetErrors."""
    process = os.getpid()
    try:
        with redirect_stdout(sys.stderr):
            yield
    except (TargetError, KeyboardInterrupt):
        raise
    except BaseException as error:  # SystemExit, and whatever else such code may raise
        raise TargetError(target, f"{doing} failed: {text_of(error)}") from error
    finally:
        if os.getpid() != process:  # the code has forked: its child has no part in what comes next
            os._exit(0)


@contextmanager
def _importable(file: Path | None) -> Iterator[None]:
    """Let modules be imported from the current directory and from beside ``file`` for a while."""
    folders = [str(file.resolve().parent), ""] if file else [""]
    if file:
        _forget_siblings()
    before = set(sys.modules)
    sys.path[:0] = folders
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for folder in folders:
            if folder in sys.path:  # the code may have changed it too, so its old value is not put back
                sys.path.remove(folder)
        if file:
            _siblings.update(name for name in sys.modules.keys() - before if _is_directly_in(folders[0], name))


def _forget_siblings() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in _siblings]:
        del sys.modules[name]
    _siblings.clear()


def _is_directly_in(folder: str, name: str) -> bool:
    """Whether a top-level module or package of this name came from this very folder."""
    module = sys.modules[name]
    places = [Path(str(place)) for place in (*getattr(module, "__path__", ()), getattr(module, "__file__", None))]
    return any(place.parent == Path(folder) and place.name.partition(".")[0] == name for place in places)


def _imported(target: str, spelling: Spelling) -> ModuleType:
    try:
        if spelling.file:
            return _imported_file(target, spelling.file)
        return importlib.import_module(spelling.source)
    except ModuleNotFoundError as error:
        raise TargetError(target, _missing_module(spelling.source, error)) from error
    except ImportError as error:
        if "relative import" not in str(error):
            raise
        remedy = "spell it package.module:factory, in the folder that holds the package"
        raise TargetError(target, text_of(error), remedy=remedy) from error


def _imported_file(target: str, file: Path) -> ModuleType:
    """Run a Python file as a module of a name that no other file has."""
    path = file.resolve()
    if not path.is_file():
        there = sorted(found.name for found in path.parent.glob("*.py"))
        raise TargetError(target, f"there is no file {file}{instead(path.name, there)}")
    name = re.sub(r"\W", "_", str(path))
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TargetError(target, f"{file} cannot be imported")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _missing_module(source: str, error: ModuleNotFoundError) -> str:
    """Say which module is missing: the target's own, or one that it needs."""
    missing = error.name or str(error)
    top = missing.partition(".")[0]
    if source != missing and not source.startswith(f"{missing}."):
        return f"importing it needs {missing!r}, which is not there; pip install {top}"
    package, _, name = missing.rpartition(".")
    if package:
        there = [module.name for module in pkgutil.iter_modules(getattr(sys.modules.get(package), "__path__", []))]
        return f"there is no module {name!r} in {package}{instead(name, there)}"
    close = difflib.get_close_matches(name, [module.name for module in pkgutil.iter_modules()], n=1)
    if close:
        return f"there is no module {name!r}; did you mean {close[0]!r}?"
    return f"there is no module {name!r}; pip install {name}, or go to the folder that holds it"


def _found(target: str, module: ModuleType, spelling: Spelling) -> object:
    """Follow the dots after the colon."""
    value: object = module
    place = spelling.source
    for name in spelling.path.split("."):
        try:
            value = getattr(value, name)
        except AttributeError as error:
            problem = f"there is no {name!r} in {place}"
            if isinstance(value, ModuleType) and (deeper := _submodule_with(value, name)):
                raise TargetError(target, problem, remedy=f"it is in {deeper}: write {deeper}:{name}") from error
            there = [other for other in dir(value) if not other.startswith("_")]
            raise TargetError(target, problem + instead(name, there)) from error
        place = name
    return value


def _submodule_with(package: ModuleType, name: str) -> str:
    """The module of a package, imported with it, that has something of this name; "" where none has."""
    for path in getattr(package, "__path__", ()):
        for module in pkgutil.iter_modules([path]):
            found = sys.modules.get(f"{package.__name__}.{module.name}")
            if callable(getattr(found, name, None)):
                return f"{package.__name__}.{module.name}"
    return ""


def _made(target: str, found: object, spelling: Spelling, with_values: bool) -> object:
    """Call what was found, unless it is what is wanted already."""
    import torch

    is_made = isinstance(found, torch.nn.Module | Mapping)
    if is_made and not spelling.called:
        return found
    if is_made or not callable(found):
        hint = "leave out the parentheses" if is_made else "name a class, a function, a model or a dict of tensors"
        raise TargetError(target, f"{spelling.path} is {_article(found)} and cannot be called", remedy=hint)
    _refuse_without_config(target, found, spelling)
    if with_values:
        return found(*spelling.args, **(spelling.kwargs or {}))
    return _built(found, spelling.args, spelling.kwargs or {})


def _refuse_without_config(target: str, found: object, spelling: Spelling) -> None:
    """Raise TargetError for a class of transformers that is called without the config that it needs."""
    config = getattr(found, "config_class", None)
    if not isinstance(found, type) or not isinstance(config, type) or spelling.args or spelling.kwargs:
        return
    name, made = found.__name__, f"{found.__name__}({config.__name__}())"
    factory = f"from transformers import {name}, {config.__name__}; make = lambda: {made}"
    remedy = (
        f"write a file model.py: {factory} and name model.py:make; from_pretrained(…) has the config of a hub's model"
    )
    raise TargetError(target, f"{name} is built from a config, which no literal can be", remedy=remedy)


def _built(factory: Callable[..., object], args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
    """Call a factory where tensors cost nothing, or else (it may need their values) on the CPU."""
    import torch

    try:
        with torch.device("meta"):
            return factory(*args, **kwargs)
    except (Exception, SystemExit):
        pass  # what fails here may work below; what fails there too is reported from there
    with torch.device("cpu"):
        return factory(*args, **kwargs)


def _checked(target: str, made: object) -> torch.nn.Module | Mapping[str, torch.Tensor]:
    """Let a model pass, and a dict of tensors, with the extra states of modules."""
    import torch

    if isinstance(made, torch.nn.Module):
        return made
    if not isinstance(made, Mapping):
        raise TargetError(target, f"gives {_article(made)}, which is neither a model nor a dict of tensors")
    tensors = {key: value for key, value in made.items() if isinstance(value, torch.Tensor)}
    others = [str(key) for key in made if key not in tensors and not is_extra_state(str(key))]
    if others:
        raise TargetError(target, f"gives {_article(made)} with entries that are no tensors: {listed(others)}")
    if not tensors:
        raise TargetError(target, f"gives {_article(made)} without tensors")
    return made


def _article(value: object) -> str:
    """A value's type with its article.

    >>> _article(1), _article("")
    ('an int', 'a str')
    """
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"
