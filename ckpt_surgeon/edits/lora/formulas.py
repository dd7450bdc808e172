"""What the tensors of one layer of an adapter add to a weight: the formula of each kind, in float32.

================  ===================================================================================================
LoRA              ΔW = s · B A, transposed for Conv1D (arXiv 2106.09685; PEFT ``tuners/lora/layer.py`` Linear)
embedding         ΔW = s · (B A)ᵀ (PEFT ``tuners/lora/layer.py`` Embedding)
convolution       ΔW = s · the convolution of A by B (PEFT ``tuners/lora/layer.py`` _ConvNd; kohya sd-scripts
                  ``networks/lora.py`` merge_to)
with lora_mid     ΔW[p,q,…] = s · Σ up[p,i] mid[i,j,…] down[j,q] (LyCORIS ``functional/general.py`` rebuild_tucker)
LoHa              ΔW = s · (w1_a w1_b) ⊙ (w2_a w2_b), each rebuilt with t1, t2 where they are there (arXiv 2108.06098;
                  LyCORIS ``modules/loha.py``, PEFT ``tuners/loha/layer.py``)
LoKr              ΔW = s · w1 ⊗ w2, each the product of its a and b where it is not whole (arXiv 2309.14859; LyCORIS
                  ``modules/lokr.py``, PEFT ``tuners/lokr/layer.py``)
DoRA              W' = m ⊙ (W + ΔW) ÷ ‖W₀ + ΔW‖, W₀ being the base's weight (arXiv 2402.09353; PEFT
                  ``tuners/lora/dora.py``; LyCORIS ``apply_weight_decompose`` for ``dora_scale``)
================  ===================================================================================================

s is alpha ÷ rank, or alpha ÷ √rank for rsLoRA, times the scale that the caller gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from ...errors import EditError
from ...tensors.records import Tensor
from ...tensors.torch_bridge import whole
from .layers import Layer

if TYPE_CHECKING:
    import torch

    Values = Mapping[str, torch.Tensor]
    Formula = Callable[[Values], torch.Tensor]
    PartFormula = Callable[[Values, int, int], torch.Tensor]  # the first row, the one behind the last

Scaling = Callable[[int, float | None], float]  # of a rank and an alpha that a tensor beside the layer says

_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


@dataclass(frozen=True, slots=True)
class Addition:
    """What one layer of an adapter does to one tensor of a base: the values that it takes, and what it makes of them.

    ``delta`` is added; with ``magnitude`` the sum is scaled to it (DoRA), over what ``axis`` says: "rows" of a matrix,
    "columns" (also of an embedding), "filters" of a convolution; ``dora_scale`` is LyCORIS' magnitude.
    """

    roles: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    delta: Formula
    magnitude: str = ""
    axis: str = "rows"
    strength: float = 1.0  # the caller's scale, for LyCORIS' magnitudes
    rows: tuple[int, ...] = ()  # which ``delta`` gives anew, in place of adding
    keys: tuple[str, ...] = ()
    part: PartFormula | None = None  # some rows of the weight of what ``delta`` gives, where each is made by itself

    @property
    def is_by_rows(self) -> bool:
        """Whether each row of the weight can be made without the others."""
        return self.part is not None and not self.magnitude and not self.rows

    def values(self) -> dict[str, torch.Tensor]:
        """The tensors as float32 (float64 stays), by their roles."""
        import torch

        read = {role: whole(tensor) for role, tensor in zip(self.roles, self.tensors, strict=True)}
        return {role: value if value.dtype in (torch.float32, torch.float64) else value.float()
                for role, value in read.items()}  # fmt: skip

    def onto(self, base: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
        """The weight with this addition: ``base`` as it was in the file, ``current`` with earlier additions."""
        values = self.values()
        delta = self.delta(values)
        if self.rows:
            import torch

            return current.index_copy(0, torch.tensor(self.rows), delta.to(current.dtype))
        if not self.magnitude:
            return current + delta
        return _decomposed(self, base, current, delta, values[self.magnitude])


def addition(layer: Layer, shape: Sequence[int], scaling: Scaling, *, scale: float = 1.0,
             transposed: bool | None = None, rank: int = 0, by_peft: bool = False) -> Addition:  # fmt: skip
    """What a layer adds to a weight of this shape.

    ``scaling`` gives alpha ÷ rank; ``rank`` is the one that is stated, for kinds whose tensors do not tell it;
    ``transposed`` says that weights are stored as (inputs, outputs), None that shapes have to tell.  Raises EditError
    where parts are missing or do not fit.
    """
    makers = (("embedding_down", _embedding), ("down", _low_rank), ("up", _low_rank), ("hada_w1_a", _hadamard),
              ("lokr_w1", _kronecker), ("lokr_w1_a", _kronecker), ("lokr_w2", _kronecker),
              ("difference", _difference))  # fmt: skip
    for role, maker in makers:
        if role in layer.tensors:
            made = maker(layer, tuple(shape), scaling, scale, transposed, rank, by_peft)
            return _with_magnitude(made, layer, tuple(shape), scale)
    raise EditError([f"{layer.module!r} has {', '.join(layer.keys.values())}, which say no addition"])


def _of(layer: Layer, roles: Sequence[str], delta: Formula, axis: str = "rows") -> Addition:
    missing = [role for role in roles if role not in layer.tensors]
    if missing:
        there = ", ".join(layer.keys.values())
        raise EditError([f"{layer.module!r} has {there} without its {', '.join(missing)}"])
    more = [role for role in ("alpha",) if role in layer.tensors]
    used = (*roles, *more)
    return Addition(used, tuple(layer.tensors[role] for role in used), delta, axis=axis,
                    keys=tuple(layer.keys[role] for role in used))  # fmt: skip


def _alpha(values: Values) -> float | None:
    return float(values["alpha"]) if "alpha" in values else None


def _fits(layer: Layer, made: Sequence[int], shape: tuple[int, ...], *, reshaped: bool = False) -> None:
    """Raise EditError where a layer's addition has another shape than the weight."""
    if tuple(made) != shape and not (reshaped and prod(made) == prod(shape)):
        raise EditError([f"{layer.module!r} adds {list(made)}, and the base's weight is {list(shape)}"])


# -- LoRA


def _low_rank(layer: Layer, shape: tuple[int, ...], scaling: Scaling, scale: float, transposed: bool | None,
              rank: int, by_peft: bool) -> Addition:  # fmt: skip
    roles = ("down", "up", "mid") if "mid" in layer.tensors else ("down", "up")
    made = _of(layer, roles, lambda values: values["up"])
    down, up = layer.tensors["down"].shape, layer.tensors["up"].shape
    inner = layer.tensors["mid"].shape if "mid" in layer.tensors else (up[1:2] or (0,)) + down[:1]
    if len(down) < 2 or len(up) < 2 or inner[:2] != (up[1], down[0]) or prod(up[2:]) != 1:
        raise EditError([f"{layer.module!r}: {list(down)} and {list(up)} do not make a product"])
    if "mid" in roles:
        _fits(layer, (up[0], down[1], *inner[2:]), shape)
        formula = _tucker
    elif len(shape) == 2 or prod(down[2:]) == 1:
        flip = _is_flipped(layer, (up[0], down[1]), shape, transposed)
        _fits(layer, (down[1], up[0]) if flip else (up[0], down[1]), shape, reshaped=prod(shape[2:]) == 1)
        made = _of(layer, roles, made.delta, "columns" if flip else "rows" if len(shape) == 2 else "filters")
        is_plain = len(down) == 2 or tuple(shape[2:4]) == (1, 1) or len(shape) == 2
        formula = _flipped if flip else _product if is_plain else _convolved
    else:
        _fits(layer, (up[0], *down[1:]), shape)
        formula = _convolved
    axis = "filters" if len(shape) > 2 else made.axis

    def delta(values: Values) -> torch.Tensor:
        factor = scale * scaling(down[0], _alpha(values))
        return formula(values, factor).reshape(shape)

    def part(values: Values, start: int, stop: int) -> torch.Tensor:
        factor = scale * scaling(down[0], _alpha(values))
        return (values["up"].flatten(1)[start:stop] @ values["down"].flatten(1)) * factor

    whole_delta = _of(layer, roles, delta, axis)
    return replace(whole_delta, part=part) if formula is _product and len(shape) == 2 else whole_delta


def _is_flipped(layer: Layer, made: tuple[int, int], shape: tuple[int, ...], transposed: bool | None) -> bool:
    """Whether a weight is stored as (inputs, outputs): its shape tells where it can, the settings where not."""
    if len(shape) != 2 or made[0] == made[1]:
        return len(shape) == 2 and bool(transposed)
    return made != shape and made[::-1] == shape


def _product(values: Values, factor: float) -> torch.Tensor:
    return (values["up"].flatten(1) @ values["down"].flatten(1)) * factor


def _flipped(values: Values, factor: float) -> torch.Tensor:
    return (values["up"].flatten(1) @ values["down"].flatten(1)).T * factor


def _convolved(values: Values, factor: float) -> torch.Tensor:
    """The convolution of A by B, by the same operation as PEFT, so that the bits are the same."""
    from torch.nn import functional

    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[values["down"].dim() - 3]
    return convolve(values["down"].transpose(0, 1), values["up"]).transpose(0, 1) * factor


def _tucker(values: Values, factor: float) -> torch.Tensor:
    import torch

    up, down = values["up"].flatten(1), values["down"].flatten(1)
    return torch.einsum("i j ..., p i, j q -> p q ...", values["mid"], up, down) * factor


def _embedding(layer: Layer, shape: tuple[int, ...], scaling: Scaling, scale: float, transposed: bool | None,
               rank: int, by_peft: bool) -> Addition:  # fmt: skip
    made = _of(layer, ("embedding_down", "embedding_up"), lambda values: values["embedding_up"])
    down, up = (layer.tensors[role].shape for role in ("embedding_down", "embedding_up"))
    if len(down) != 2 or len(up) != 2 or down[0] != up[1]:
        raise EditError([f"{layer.module!r}: {list(down)} and {list(up)} do not make a product"])
    _fits(layer, (down[1], up[0]), shape)

    def delta(values: Values) -> torch.Tensor:
        factor = scale * scaling(down[0], _alpha(values))
        return (values["embedding_up"] @ values["embedding_down"]).T * factor

    return _of(layer, made.roles[:2], delta, "columns")


# -- LoHa, LoKr, differences


def _hadamard(layer: Layer, shape: tuple[int, ...], scaling: Scaling, scale: float, transposed: bool | None,
              rank: int, by_peft: bool) -> Addition:  # fmt: skip
    cores = ("hada_t1", "hada_t2") if "hada_t1" in layer.tensors else ()
    _of(layer, (*_HADA, *cores), lambda values: values["hada_w1_a"])
    first, second = layer.tensors["hada_w1_a"].shape, layer.tensors["hada_w1_b"].shape
    kernel = layer.tensors["hada_t1"].shape[2:] if cores else ()
    _fits(layer, (first[1 if cores else 0], second[1], *kernel), shape, reshaped=True)

    def delta(values: Values) -> torch.Tensor:
        import torch

        factor = scale * scaling(rank or second[0], _alpha(values))
        if cores:
            sides = [
                torch.einsum("i j k l, j r, i p -> p r k l", values[core], values[b], values[a])
                for core, a, b in (("hada_t1", *_HADA[:2]), ("hada_t2", *_HADA[2:]))
            ]
        else:
            sides = [values[a] @ values[b] for a, b in (_HADA[:2], _HADA[2:])]
        return (sides[0] * sides[1] * factor).reshape(shape)

    return _of(layer, (*_HADA, *cores), delta, "rows" if len(shape) == 2 else "filters")


def _kronecker(layer: Layer, shape: tuple[int, ...], scaling: Scaling, scale: float, transposed: bool | None,
               rank: int, by_peft: bool) -> Addition:  # fmt: skip
    halves = [(name,) if name in layer.tensors else (f"{name}_a", f"{name}_b") for name in ("lokr_w1", "lokr_w2")]
    core = ("lokr_t2",) if "lokr_t2" in layer.tensors else ()
    roles = (*halves[0], *halves[1], *core)
    _of(layer, roles, lambda values: values[roles[0]])
    told = next((layer.tensors[names[1]].shape[0] for names in halves if len(names) == 2), 0)

    def delta(values: Values) -> torch.Tensor:
        import torch

        found = rank or told
        factor = scale * (scaling(found, _alpha(values)) if found else 1.0)  # LyCORIS: whole factors are not scaled
        first = _factor(values, halves[0])
        if core:
            second = torch.einsum("i j k l, i p, j r -> p r k l", *(values[name] for name in (*core, *halves[1])))
        else:
            second = _factor(values, halves[1])
        missing = second.dim() - first.dim()
        if by_peft and second.dim() == 3:
            missing = 0  # PEFT leaves the factor as it is where it has three dimensions
        return (torch.kron(first[(...,) + (None,) * missing], second.contiguous()) * factor).reshape(shape)

    sizes = [_kron_size(layer, names, core if index else ()) for index, names in enumerate(halves)]
    _fits(layer, (sizes[0] * sizes[1],), (prod(shape),))
    return _of(layer, roles, delta, "rows" if len(shape) == 2 else "filters")


def _factor(values: Values, names: tuple[str, ...]) -> torch.Tensor:
    return values[names[0]] if len(names) == 1 else values[names[0]] @ values[names[1]]


def _kron_size(layer: Layer, names: tuple[str, ...], core: tuple[str, ...]) -> int:
    """How many elements one factor of a Kronecker product has."""
    shapes = [layer.tensors[name].shape for name in names]
    if len(shapes) == 1:
        return prod(shapes[0])
    rows = shapes[0][1] if core else shapes[0][0]
    return rows * prod(shapes[1][1:]) * (prod(layer.tensors[core[0]].shape[2:]) if core else 1)


def _difference(layer: Layer, shape: tuple[int, ...], scaling: Scaling, scale: float, transposed: bool | None,
                rank: int, by_peft: bool) -> Addition:  # fmt: skip
    _fits(layer, layer.tensors["difference"].shape, shape, reshaped=True)
    return Addition(("difference",), (layer.tensors["difference"],),
                    lambda values: values["difference"].reshape(shape) * scale,
                    keys=(layer.keys["difference"],))  # fmt: skip


# -- biases, rows


def bias_of(layer: Layer, scaling: Scaling, scale: float) -> Addition | None:
    """What a layer adds to its bias: s · the bias of B (PEFT ``lora_bias``), or a difference; None for nothing."""
    roles: list[str]
    if "up_bias" in layer.tensors:
        roles = [role for role in ("up_bias", "alpha") if role in layer.tensors]
        rank = layer.tensors["down"].shape[0] if "down" in layer.tensors else 1

        def delta(values: Values) -> torch.Tensor:
            return values["up_bias"] * (scale * scaling(rank, _alpha(values)))

        made = delta
    elif "bias_difference" in layer.tensors:
        roles, made = ["bias_difference"], lambda values: values["bias_difference"] * scale
    else:
        return None
    return Addition(tuple(roles), tuple(layer.tensors[role] for role in roles), made,
                    keys=tuple(layer.keys[role] for role in roles))  # fmt: skip


def rows_of(layer: Layer, shape: Sequence[int], rows: Sequence[int]) -> Addition:
    """The rows of an embedding that PEFT trained by themselves (``trainable_token_indices``): they are replaced."""
    held = layer.tensors["tokens"]
    if tuple(held.shape) != (len(rows), *shape[1:]) or not all(0 <= row < shape[0] for row in rows):
        key = layer.keys["tokens"]
        raise EditError(
            [f"{key!r} has {held.shape[:1]} rows, and the configuration names {len(rows):,} of {shape[0]:,}"]
        )
    return Addition(("tokens",), (held,), lambda values: values["tokens"], rows=tuple(rows),
                    keys=(layer.keys["tokens"],))  # fmt: skip


# -- DoRA


def _with_magnitude(made: Addition, layer: Layer, shape: tuple[int, ...], scale: float) -> Addition:
    role = next((role for role in ("magnitude", "dora_scale") if role in layer.tensors), "")
    if not role:
        return made
    axis = made.axis
    held = layer.tensors[role]
    if role == "dora_scale":
        axis = "filters" if held.shape[:1] == shape[:1] and prod(held.shape) == shape[0] else "inputs"
        wanted = shape[0] if axis == "filters" else shape[1]
    else:
        wanted = shape[1] if axis == "columns" else shape[0]
    if prod(held.shape) != wanted:
        problem = f"{layer.keys[role]!r} has {prod(held.shape)} magnitudes for a weight of {list(shape)}"
        raise EditError([problem])
    return Addition((*made.roles, role), (*made.tensors, held), made.delta, role, axis, scale,
                    keys=(*made.keys, layer.keys[role]))  # fmt: skip


def _decomposed(one: Addition, base: torch.Tensor, current: torch.Tensor, delta: torch.Tensor,
                magnitude: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """W' of DoRA, in the order of operations of PEFT, or of LyCORIS for its ``dora_scale``."""
    import torch

    if one.magnitude == "dora_scale":
        return _by_lycoris(one, current + delta, magnitude)
    norm: torch.Tensor
    if one.axis == "filters":
        norm = (base + delta).norm(p=2, dim=tuple(range(1, base.dim())), keepdim=True).transpose(1, 0)
        factor = (magnitude.view(norm.shape) / norm).view(-1, *(1,) * (base.dim() - 1))
    elif one.axis == "columns":
        norm = torch.linalg.norm(base.T + delta.T, dim=1)
        factor = (magnitude.flatten() / norm).view(1, -1)
    else:
        norm = torch.linalg.norm(base + delta, dim=1)
        factor = (magnitude.flatten() / norm).view(-1, 1)
    return factor * (current + delta)


def _by_lycoris(one: Addition, weight: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """LyCORIS' ``apply_weight_decompose``: norms of outputs, or of inputs in older files, as the shape says."""
    import torch

    dims = tuple(dim for dim in range(weight.dim()) if dim != (0 if one.axis == "filters" else 1))
    norm: torch.Tensor = weight.norm(dim=dims, keepdim=True) + torch.finfo(weight.dtype).eps
    factor = magnitude.reshape(norm.shape) / norm
    if one.strength != 1:
        factor = one.strength * (factor - 1) + 1
    return weight * factor
