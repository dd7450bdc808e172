"""Universal checkpoints: a folder for each parameter, in which its weight and each slot of the optimizer is a file.

``deepspeed/checkpoint/ds_to_universal.py`` writes them: ``zero/KEY/fp32.pt``, ``exp_avg.pt``, ``exp_avg_sq.pt`` and
``step.pt``, each a tensor or a dict with it under ``param``; that of a ZeRO-3 training is flat, its shape is in
``param_shapes``.  ``zero/optimizer_state.pt`` has the options of the groups, ``…_model_states.pt`` beside ``zero`` the
module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod

from ...errors import BrokenFile, listed
from ...files.paths import FilePath
from ...tensors.stored import StoredTensor
from ...tensors.strides import row_major
from ...text import plural
from ..contents import Contents
from ..pickle.values import Ordered, Value
from ..sharded import Reader
from .files import holds as holds_zero
from .files import is_model_file
from .model import Model, Shape, as_trained, buffers, frozen_parameters, in_order, model_of, tie
from .optimizer import is_scalar, param_groups, slots_of
from .zero import gathered

CONTAINER = "DeepSpeed universal"
FOLDER = "zero"
WEIGHT = "fp32.pt"
OPTIONS = "optimizer_state.pt"


def holds(names: Iterable[str]) -> bool:
    """Whether a folder with these names is a universal checkpoint.

    >>> holds(["zero", "mp_rank_00_model_states.pt"]), holds(["zero", "model.pth"])
    (True, False)
    """
    known = list(names)
    return FOLDER in known and (holds_zero(known) or any(map(is_model_file, known)))


def read(folder: FilePath, names: Sequence[str], read_file: Reader, *, salvage: bool = False) -> Contents:
    """Read a universal checkpoint: ``module``, ``fp32`` and ``optimizer``, by the parameters' names.

    Raises BrokenFile where a parameter's weight is missing, or is of another size than its shape.
    """
    by_key = folder / FOLDER
    models = [read_file(folder / name, salvage=salvage) for name in names if is_model_file(name)]
    model = model_of(models[0])
    keys = [name for name in by_key.names() if (by_key / name).is_dir()]
    missing = [name for name in model.shapes if name not in keys]
    if missing:
        raise BrokenFile(by_key, f"lacks {plural(len(missing), 'parameter')}: {listed(missing, 3)}", "convert it again")
    every = list(models)
    fp32: dict[str, StoredTensor] = {}
    state: dict[Value, Value] = {}
    for key in keys:
        slots = _parameter(by_key / key, model.shapes.get(key), read_file, every, salvage=salvage)
        if isinstance(weight := slots.pop("fp32", None), StoredTensor):
            fp32[key] = weight
        if slots:
            state[key] = slots
    frozen = frozen_parameters(model, dict(enumerate(models)), len(models))
    whole = in_order(model, {**fp32, **buffers(model), **frozen})
    module = Ordered({name: as_trained(whole.get(name, tensor), tensor) for name, tensor in model.module.items()})
    tie(module, model)
    groups = _options(by_key, read_file, model, state, every)
    root: dict[Value, Value] = {"module": module if _is_empty(model) else model.module, "fp32": whole}
    root["optimizer"] = {"state": state, "param_groups": groups}
    return gathered(folder, f"{CONTAINER}, {plural(len(fp32), 'parameter')}", root, model, every)


def _is_empty(model: Model) -> bool:
    """Whether the module has no element of its parameters, as in ZeRO 3."""
    tensors = [model.module.get(name) for name in model.shapes]
    return any(isinstance(one, StoredTensor) and not one.numel and prod(model.shapes[name])
               for name, one in zip(model.shapes, tensors, strict=True))  # fmt: skip


def _parameter(
    folder: FilePath, shape: Shape | None, read_file: Reader, every: list[Contents], *, salvage: bool
) -> dict[Value, Value]:
    """The weight and the slots of one parameter.  Raises BrokenFile."""
    names = [name for name in folder.names() if name.endswith(".pt")]
    if WEIGHT not in names:
        raise BrokenFile(folder, f"has no {WEIGHT}", "convert it again")
    found: dict[Value, Value] = {}
    for name in names:
        contents = read_file(folder / name, salvage=salvage)
        every.append(contents)
        root = contents.root.get("param") if isinstance(contents.root, dict) else contents.root
        if is_scalar(root):
            found[name.removesuffix(".pt")] = root
        elif isinstance(root, StoredTensor):
            found[name.removesuffix(".pt")] = _shaped(contents.path, root, shape)
    return found


def _shaped(path: FilePath, tensor: StoredTensor, shape: Shape | None) -> StoredTensor:
    """A tensor in the shape of its parameter, where it is flat."""
    if shape is None or tensor.shape == shape or len(tensor.shape) != 1:
        return tensor
    if tensor.numel != prod(shape) or not tensor.is_contiguous:
        raise BrokenFile(path, f"has {tensor.numel:,} elements, and its parameter is {list(shape)}", "convert it again")
    return StoredTensor(tensor.dtype, shape, row_major(shape), tensor.offset, tensor.storage)


def _options(
    by_key: FilePath, read_file: Reader, model: Model, state: dict[Value, Value], every: list[Contents]
) -> list[Value]:
    """The groups with their options; slots that are one number for a group go to each of its parameters."""
    path = by_key / OPTIONS
    if not path.is_file():
        return param_groups(None, model)
    contents = read_file(path)
    every.append(contents)
    root = contents.root if isinstance(contents.root, dict) else {}
    base = root.get("optimizer_state_dict") or root.get("base_optimizer_state")
    for name, group in model.group_of.items():
        kept = state.get(name)
        scalars = {slot: value for slot, value in slots_of(base).get(group, {}).items() if is_scalar(value)}
        if isinstance(kept, dict):
            state[name] = {**scalars, **kept}
    return param_groups(base if isinstance(base, Mapping) and "param_groups" in base else root, model)
