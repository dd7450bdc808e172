"""What a file of the module says of its parameters, and the tensors that no optimizer has: buffers, frozen ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

from ...errors import BrokenFile
from ...files.paths import FilePath
from ...tensors.casts import Losses, cast
from ...tensors.dtypes import BY_NAME, DType
from ...tensors.records import ComputedTensor, OpaqueTensor, Tensor
from ...tensors.stored import StoredTensor
from ..contents import Contents
from ..flat import flat, joined
from ..pickle.values import Ordered, Value, spelled

AGAIN = "fetch the folder again"

Shape: TypeAlias = tuple[int, ...]
Shapes: TypeAlias = dict[str, Shape]


@dataclass(frozen=True, slots=True)
class Model:
    """What the files of the module say: its entries, the parameters of each group, those that are frozen or tied."""

    path: FilePath
    root: Mapping[Value, Value]
    module: Mapping[Value, Value]
    groups: list[Shapes]
    frozen: Shapes
    shared: dict[str, str]

    @property
    def shapes(self) -> Shapes:
        """The parameters of all groups."""
        return {name: shape for group in self.groups for name, shape in group.items()}

    @property
    def group_of(self) -> dict[str, int]:
        """The group of each parameter."""
        return {name: number for number, group in enumerate(self.groups) for name in group}


def model_of(contents: Contents) -> Model:
    """What a file of the module says.  Raises BrokenFile where it says nothing of its parameters."""
    root = contents.root if isinstance(contents.root, dict) else {}
    shapes = root.get("param_shapes")
    groups = shapes if isinstance(shapes, list) else [shapes]
    module = root.get("module")
    if not all(isinstance(group, dict) for group in groups):
        raise BrokenFile(contents.path, "has no param_shapes, which say how the parts of the ranks fit", AGAIN)
    shared = root.get("shared_params")
    return Model(
        contents.path,
        root,
        module if isinstance(module, dict) else {},
        [shapes_of(contents.path, group) for group in groups],
        shapes_of(contents.path, root.get("frozen_param_shapes")),
        {spelled(name): spelled(of) for name, of in shared.items()} if isinstance(shared, dict) else {},
    )


def shapes_of(path: FilePath, group: Value) -> Shapes:
    found: Shapes = {}
    for name, shape in group.items() if isinstance(group, dict) else ():
        sizes = tuple(shape) if isinstance(shape, (tuple, list)) else None
        if type(name) is not str or sizes is None or not all(type(size) is int and size >= 0 for size in sizes):
            raise BrokenFile(path, f"its param_shapes have no proper shape for {spelled(name)!r}", AGAIN)
        found[name] = sizes
    return found


# -- what is not trained, and how it all is ordered


def buffers(model: Model) -> dict[str, Tensor]:
    """Buffers, floating ones as float32."""
    names = model.root.get("buffer_names")
    found = {spelled(name): model.module.get(name) for name in (names if isinstance(names, (list, tuple)) else ())}
    return {name: _cast(value, BY_NAME["float32"]) for name, value in found.items() if isinstance(value, StoredTensor)}


def frozen_parameters(model: Model, models: Mapping[int, Contents], ranks: int) -> dict[str, Tensor]:
    """Frozen parameters in the dtype that they have: whole in ZeRO 1 and 2, cut over the ranks in ZeRO 3."""
    trained = model.shapes
    if ranks == 1 and not model.frozen:
        names = model.root.get("buffer_names")
        buffers = set(names) if isinstance(names, (list, tuple)) else set()
        return {
            spelled(name): value for name, value in model.module.items()
            if isinstance(value, StoredTensor) and name not in trained and name not in buffers
            and name not in model.shared
        }  # fmt: skip
    made: dict[str, Tensor] = {}
    roots = [models[rank].root for rank in sorted(models)][:ranks]
    for name, shape in model.frozen.items():
        kept = [root.get("frozen_param_fragments") if isinstance(root, dict) else None for root in roots]
        parts = [one.get(name) if isinstance(one, dict) else None for one in kept]
        try:
            made[name] = _unpadded(parts, shape)
        except ValueError as error:
            raise BrokenFile(model.path, f"its frozen {name!r} is not whole: {error}", AGAIN) from None
    return made


def _unpadded(parts: Sequence[Value], shape: Shape) -> Tensor:
    """A frozen parameter out of the parts of all ranks, or the one that is whole."""
    if len(parts) == 1 and isinstance(parts[0], StoredTensor) and parts[0].shape == shape:
        return parts[0]
    vector = flat(parts)
    if vector.numel < prod(shape):
        raise ValueError(f"{vector.numel:,} of {prod(shape):,} elements")
    return joined(list(vector.taken(0, prod(shape))), vector.dtype, shape)


def in_order(model: Model, found: Mapping[str, Tensor]) -> Ordered:
    """The tensors in the order of the module, tied keys with the tensor that they share."""
    names = [spelled(name) for name in model.module]
    made = Ordered({name: found[name] for name in names if name in found})
    made.update({name: tensor for name, tensor in found.items() if name not in made})
    tie(made, model)
    ordered = Ordered({name: made[name] for name in names if name in made})
    ordered.update({name: tensor for name, tensor in made.items() if name not in ordered})
    if isinstance(model.module, Ordered):
        ordered.attributes = model.module.attributes
    return ordered


def tie(made: Value, model: Model) -> None:
    if isinstance(made, dict):
        made.update({name: made[of] for name, of in model.shared.items() if of in made})


def as_trained(tensor: Value, placeholder: Value) -> Value:
    """A weight in the dtype that the module has it in: DeepSpeed makes that one of it after each step."""
    if isinstance(placeholder, (StoredTensor, OpaqueTensor)) and isinstance(tensor, StoredTensor):
        return _cast(tensor, placeholder.dtype)
    return tensor


def _cast(tensor: StoredTensor, dtype: DType) -> StoredTensor:
    if tensor.dtype == dtype or not (tensor.dtype.is_floating and dtype.is_floating):
        return tensor
    return ComputedTensor(
        dtype, tensor.shape, (tensor,), lambda inputs: cast(inputs[0], dtype, Losses()), files=()
    ).stored()
