"""How deep each parameter of a model lies, layer by layer, for a learning rate that decays towards the input."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import EditError, listed
from .selectors import Anatomy, Selector, above, chosen, has_parameters


def depths_of(parts: Anatomy, layers: Sequence[Selector]) -> tuple[dict[str, int], int]:
    """How deep each parameter lies, from 0 at the input, and the depth of the last layer."""
    if layers:
        sets = [chosen(parts, layer) for layer in layers]
        depths = {key: depth for depth, keys in reversed(list(enumerate(sets))) for key in keys}
        if left := [key for key in parts.parameters if key not in depths]:
            raise EditError([f"{listed(left)} are in none of the {len(sets)} layers; layers has to cover the model"])
        return depths, len(sets) - 1
    units = _blocks(parts)
    if not units:
        raise EditError(["the model has no list or Sequential of blocks; name its layers, input first: layers=[…]"])
    depth_of = {path: depth for depth, path in enumerate(units, 1)}
    inside = {key: depth_of[path] for key in parts.parameters for path in above(key) if path in depth_of}
    ahead = len(inside)
    depths, reached = {}, 0
    for key in parts.parameters:
        reached = inside.get(key, reached)
        ahead -= key in inside
        depths[key] = reached if ahead or key in inside else len(units) + 1
    bottom, top = min(depths.values()), max(depths.values())
    return {key: depth - bottom for key, depth in depths.items()}, top - bottom


def _blocks(parts: Anatomy) -> list[str]:
    """The paths of the blocks: the children, with parameters, of the outermost lists and Sequentials of several."""
    from torch import nn

    found: list[str] = []
    for path, module in parts.modules.items():
        if any(path.startswith(f"{unit}.") for unit in found) or not isinstance(module, (nn.Sequential, nn.ModuleList)):
            continue
        below = [f"{path}.{name}".removeprefix(".") for name, child in module.named_children() if has_parameters(child)]
        if len(below) > 1:
            found += below
    return found
