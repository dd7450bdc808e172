"""Proposes the renames that turn a checkpoint's keys into a target's, and says where it does not know.

Evidence is taken in this order, the strongest first, each kind in its own module; what one settles the next build on:

1. *numbering*: numbered parts that are the same but for where the numbers begin;
2. *names*: the same key, and known spellings of it (``conventions``), *flattened* paths too; *stacks* of keys that a
   number tells apart; then *prefixes*: the same keys behind another path; *values*: the same bytes under another
   name, where both sides have values;
3. *order*: the longest sequence of equal shapes that runs through both sides, where names or numbers tell apart what
   could change places;
4. *siblings*: when the weight of a module is settled, so are its bias and statistics;
5. *shapes*: two keys that are the only ones of their shape, and one name with two shapes.

*structure* then says how sure the third to fifth kinds are.  The result is data: :class:`Alignment`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ...errors import TargetError
from ...reading.sources import is_module, state_dict_of
from ...tensors.records import Shaped
from ..targets import expected_of, is_model
from .flattened import flattened
from .names import same_names
from .numbering import renumbered
from .order import sequence
from .prefixes import prefixes, unwrapped
from .results import CERTAINTIES, OTHER_SHAPE, Alignment, Ambiguity, Made, Proposal
from .running import by_running, with_proof
from .shapes import only_ones, other_shapes
from .siblings import siblings
from .stacks import stacks
from .state import State
from .structure import judged
from .values import same_values

if TYPE_CHECKING:
    import torch

    from ...reading.sources import Source
    from ..targets import Target

__all__ = ["CERTAINTIES", "OTHER_SHAPE", "Alignment", "Ambiguity", "Made", "Proposal", "align"]


def align(
    source: Source | Mapping[str, Shaped],
    target: Target,
    *,
    by_value: bool = True,
    source_model: str | torch.nn.Module | None = None,
    target_model: str | torch.nn.Module | None = None,
    example: torch.Tensor | None = None,
) -> Alignment:
    """Propose which key of ``source`` becomes which of ``target``.

    Both are paths or URLs, opened Checkpoints, state_dicts, models, or mappings from keys to anything with a shape;
    ``target`` may be the spelling of a model too.  Where both hold values and names leave keys open, these values
    are read and compared, unless ``by_value`` is False.

    With ``source_model``, the model that the source was saved from (or its spelling), both models are run on the same
    random input, or on ``example``: keys are ``proven`` where the target, filled with the source's values, gives the
    same output (see :mod:`ckpt_surgeon.models.execution`).  ``target_model`` is needed where ``target`` is no model.
    Raises TargetError for models that cannot be built or run.

    >>> from ckpt_surgeon.tensors.dtypes import parse
    >>> from ckpt_surgeon.models.targets import Expected
    >>> def tensors(**shapes): return {key: Expected(parse("float32"), shape, True) for key, shape in shapes.items()}
    >>> found = align(tensors(a=(3, 2), b=(3,)), tensors(weight=(3, 2), bias=(3,)))
    >>> found.pairs
    {'a': 'weight', 'b': 'bias'}
    """
    state = State.of(state_dict_of(source), expected_of(target))
    if source_model is None:
        return _by_evidence(state, by_value)
    model = target_model if target_model is not None else target
    if not (is_module(model) or (isinstance(model, str) and is_model(model))):
        raise TargetError("the target", "is no model that could be run", remedy="give the model with target_model=")
    proven, made = by_running(state, source_model, model, example)
    return with_proof(_by_evidence(state, by_value), proven, made)


def _by_evidence(state: State, by_value: bool) -> Alignment:
    """What names, values, order and shapes say of the keys that are open."""
    renumbered(state)
    same_names(state)
    unwrapped(state)
    made = stacks(state)
    flattened(state)
    prefixes(state)
    if by_value:
        same_values(state)
    siblings(state)
    # A bias goes with its weight, where there is one; twice, for the parts that come in another order.
    for kinds in (("weight", ""), ("weight", ""), ("weight", "", "bias")):
        sequence(state, kinds)
        siblings(state)
    only_ones(state)
    other_shapes(state)
    return replace(judged(state), made=made)
