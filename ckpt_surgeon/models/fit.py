"""Makes a checkpoint strictly loadable into a target: renames it, settles every shape, fills what is allowed.

Every key ends up in one row of the outcome; nothing is settled in silence.  :func:`plan_fit` computes no value; the
values that only the target has (its own initialisation) are asked for by key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..edits.change import Change, matching
from ..edits.companions import missing_scales
from ..edits.keys import is_derivable
from ..edits.recipe import Recipe, step
from ..errors import Argument, Call, EditError, Phrase, joined, listed
from ..reading.parts import refuse_part
from ..reading.sources import checkpoint_of
from ..tensors.arithmetic import by_torch
from ..tensors.checkpoint import Checkpoint
from ..tensors.dtypes import EXTRA_STATE
from ..tensors.extra_state import SUFFIX as EXTRA_STATE_SUFFIX
from ..tensors.extra_state import is_extra_state, tensors_alone, without_extra_states
from ..tensors.records import ComputedTensor, Tensor
from ..text import Shown
from .adapting import with_sizes
from .align import Alignment, Proposal
from .align import align as find_alignment
from .align_recipe import alignment_recipe
from .targets import Expected

if TYPE_CHECKING:
    import torch

    from ..reading.sources import Source

# What may become of a key whose shape does not fit, beside an initialisation by name.
POLICIES = ("error", "drop")
INITIALISATIONS = (
    "zeros", "ones", "normal", "trunc_normal", "uniform", "xavier_normal", "xavier_uniform", "kaiming_normal",
    "kaiming_uniform", "orthogonal",
)  # fmt: skip
HOWS = ("as is", "renamed", "reshaped", "adapted", "initialised", "dropped")

Values = Callable[[list[str]], Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True, repr=False)
class Outcome(Shown):
    """What became of one key: ``how`` is one of :data:`HOWS`, ``source`` the old key ("" for none).

    ``reason`` and ``certainty`` say why the old key is this one, where the alignment found it.  ``possible`` is what
    might be this key and was not taken, since that was not sure enough.
    """

    key: str
    how: str
    source: str
    numel: int
    detail: str = ""
    reason: str = ""
    certainty: str = ""
    possible: Proposal | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Fit(Shown):
    """A checkpoint that fits: the result, what became of every key, the recipe that renamed it.

    ``matched`` is the share of the target's elements that come from the checkpoint, 0 to 1.
    """

    result: Checkpoint
    change: Change[Checkpoint]
    outcomes: tuple[Outcome, ...]
    recipe: Recipe
    alignment: Alignment | None
    target_numel: int

    @property
    def loaded(self) -> tuple[str, ...]:
        """The target's keys that get values of the checkpoint."""
        return tuple(one.key for one in self.outcomes if one.how in ("as is", "renamed", "reshaped", "adapted"))

    @property
    def initialized(self) -> tuple[str, ...]:
        """The target's keys that do not."""
        return tuple(one.key for one in self.outcomes if one.how == "initialised")

    @property
    def matched(self) -> float:
        taken = sum(one.numel for one in self.outcomes if one.how not in ("initialised", "dropped"))
        return taken / self.target_numel if self.target_numel else 1.0


def plan_fit(
    checkpoint: Checkpoint,
    target: Mapping[str, Expected],
    values: Values,
    *,
    recipe: Recipe | None = None,
    adapt: Recipe | None = None,
    align: bool = True,
    min_certainty: str = "certain",
    on_mismatch: str = "error",
    allow_missing: Iterable[str] = (),
    min_match: float = 0.0,
    seed: int = 0,
    ties: Iterable[Iterable[str]] = (),
    allow_codes: bool = False,
    prepare: Recipe | None = None,
) -> Fit:
    """Settle every key of a checkpoint against a target.

    Keys are renamed where that is at least as sure as ``min_certainty`` ("certain", "likely" or "possible"), never
    with ``align=False``, and by ``recipe`` where there is one; ``prepare`` is done before that (folding norms, say).
    ``adapt`` has edits for the shapes (see :mod:`ckpt_surgeon.edits.resize`), in the target's keys; sizes that it
    calls "auto" are read from the target (see :mod:`.adapting`).  Keys of another shape after that are an "error", or
    "drop"ped for the target's own initialisation, or initialised by name (:data:`INITIALISATIONS`).  Missing keys
    have to be allowed by pattern; buffers that models derive themselves always are.  ``values`` gives the target's
    own initialisation, ``ties`` the keys that are one parameter: files may hold only one of them.  Codes of
    quantised weights are an error where the target does not have their scales too, unless ``allow_codes`` takes them
    as numbers.  Raises EditError with all problems at once.
    """
    if on_mismatch not in (*POLICIES, *INITIALISATIONS):
        known = ", ".join((*POLICIES, *INITIALISATIONS))
        raise EditError(Phrase(Argument("on_mismatch"), f" is one of {known}, not {on_mismatch!r}"))
    refuse_part(checkpoint)
    alignment = None
    prepared = prepare.plan(checkpoint).result if prepare else checkpoint
    if recipe is None and align:
        alignment = find_alignment(tensors_alone(prepared), tensors_alone(target)).at_least(min_certainty)
        recipe = alignment_recipe(alignment, without_extra_states(prepared))
        recipe = _with_extra_states(recipe, prepared, target)
    recipe = Recipe((*(prepare.steps if prepare else ()), *(recipe.steps if recipe else ())))
    renamed = recipe.plan(checkpoint)
    adapted = with_sizes(adapt, renamed.result, target).plan(renamed.result) if adapt else None
    edited = adapted.result if adapted else renamed.result
    if not allow_codes:
        _refuse_codes(edited, target)
    mismatched = [key for key in target if key in edited and not _takes(target[key], edited[key])]
    twins = _twins(edited, target, ties)
    missing = [key for key in target if key not in edited and key not in twins]
    allowed = matching(target, allow_missing, allow_unmatched=True)
    refused = [key for key in missing if key not in allowed and not is_derivable(key)]
    _raise_unless_settled(edited, target, mismatched if on_mismatch == "error" else [], refused, alignment)
    fresh = _initialised(target, mismatched, on_mismatch, seed) if on_mismatch in INITIALISATIONS else {}
    own = values([key for key in (*missing, *mismatched) if key not in fresh])
    unfilled = {*missing, *mismatched}
    rows = [
        _filled(key, wanted, on_mismatch if key in fresh else "", key in edited)
        if key in unfilled
        else _taken(key, wanted, renamed, adapted, twins.get(key, ""))
        for key, wanted in target.items()
    ]
    rows = rows if alignment is None else _explained(rows, alignment)
    sources = {row.key: _olds(twins.get(row.key, row.key), renamed, adapted) for row in rows if row.source}
    used = {old for olds in sources.values() for old in olds}
    dropped = [Outcome(key, "dropped", key, tensor.numel) for key, tensor in checkpoint.items() if key not in used]
    supplied: dict[str, Tensor] = {**fresh, **own}
    given = {row.key: edited[twins.get(row.key, row.key)] for row in rows if row.source} | supplied
    tensors = {key: given[key] for key in target if key in given}
    result = edited.with_tensors(tensors, edited.versions)
    origins = {row.key: sources.get(row.key, ()) for row in rows if row.key in tensors}
    change = Change(checkpoint, result, origins, (*renamed.notes, *(adapted.notes if adapted else ())))
    numel = sum(wanted.numel for wanted in target.values())
    found = Fit(result, change, (*rows, *dropped), recipe, alignment, numel)
    if found.matched < min_match or not found.loaded:
        asked = f", less than the {min_match:.1%} asked for" if found.loaded else ": nothing matches"
        raise EditError([f"only {found.matched:.1%} of the target's parameters come from the checkpoint{asked}"])
    return found


def _explained(rows: Iterable[Outcome], alignment: Alignment) -> list[Outcome]:
    """The outcomes with what the alignment knows: why a key was renamed, and what was possible and not taken."""
    taken = {one.old: one for one in alignment.proposals}
    made = {one.new: one for one in alignment.made}
    left = {one.new: one for one in alignment.possible}
    found = []
    for row in rows:
        why = taken.get(row.source)
        if why is not None and row.source != row.key:
            row = replace(row, reason=why.reason, certainty=why.certainty)
        elif row.key in made and row.source:
            row = replace(row, reason=f"{made[row.key].how}; {made[row.key].reason}", certainty=made[row.key].certainty)
        found.append(replace(row, possible=left[row.key]) if not row.source and row.key in left else row)
    return found


def _filled(key: str, wanted: Expected, scheme: str, has_other_shape: bool) -> Outcome:
    how = scheme or ("derived by the model" if is_derivable(key) else "the model's own")
    why = "another shape in the checkpoint" if has_other_shape else "not in the checkpoint"
    return Outcome(key, "initialised", "", wanted.numel, f"{how}; {why}")


def _refuse_codes(edited: Checkpoint, target: Mapping[str, Expected]) -> None:
    """Codes in the place of weights would load and be wrong."""
    problems = [
        f"{one.keys[0]!r} is {one.label} ({listed(one.keys[1:], 2)}), which the target does not have"
        for one in missing_scales(edited, target)
    ]
    if problems:
        more = [f"and {len(problems) - 3:,} more like these"] if len(problems) > 3 else []
        codes = Phrase(" or take codes as numbers with ", Argument("allow_codes", True))
        raise EditError(problems[:3] + more, remedy=Phrase("dequantize first (", Call("dequantize"), ")", codes))


def _takes(theirs: Expected, ours: Tensor) -> bool:
    """Whether a shape fits; an extra state may be anything."""
    return theirs.dtype == EXTRA_STATE or ours.shape == theirs.shape


def _with_extra_states(recipe: Recipe, checkpoint: Checkpoint, target: Mapping[str, Expected]) -> Recipe:
    """A recipe that also renames the extra states of modules whose tensors it renames."""
    change = recipe.plan(checkpoint)
    modules: dict[str, set[str]] = {}
    for new, olds in change.origins.items():
        modules.setdefault(new.rpartition(".")[0], set()).update(old.rpartition(".")[0] for old in olds)
    now = {olds[0]: new for new, olds in change.origins.items() if is_extra_state(new)}
    pairs = []
    for key in target:
        if is_extra_state(key) and key not in change.result:
            paths = modules.get(key.removesuffix(EXTRA_STATE_SUFFIX).removesuffix("."), set())
            held = [now.get(f"{path}.{EXTRA_STATE_SUFFIX}" if path else EXTRA_STATE_SUFFIX, "") for path in paths]
            if len(held) == 1 and held[0] and held[0] not in target:
                pairs.append([f"^{held[0]}$", key])
    return Recipe((*recipe.steps, step("rename", pairs=pairs))) if pairs else recipe


def _twins(edited: Checkpoint, target: Mapping[str, Expected], ties: Iterable[Iterable[str]]) -> dict[str, str]:
    """The keys that are missing only because the file holds another name of the same parameter, and that name."""
    found: dict[str, str] = {}
    for names in ties:
        held = [name for name in names if name in edited and edited[name].shape == target[name].shape]
        found |= {name: held[0] for name in names if held and name in target and name not in edited}
    return found


def _olds(key: str, renamed: Change[Checkpoint], adapted: Change[Checkpoint] | None) -> tuple[str, ...]:
    """The keys of the checkpoint that a key of the result is made of."""
    middles = adapted.origins[key] if adapted else (key,)
    return tuple(dict.fromkeys(old for middle in middles for old in renamed.origins[middle]))


def _taken(
    key: str, wanted: Expected, renamed: Change[Checkpoint], adapted: Change[Checkpoint] | None, twin: str = ""
) -> Outcome:
    """Where a key's values come from, and how it came about."""
    held = twin or key
    middle = adapted.origins[held][0] if adapted else held
    olds = _olds(held, renamed, adapted)
    before, after = renamed.before[olds[0]], (adapted or renamed).result[held]
    if adapted and after is not renamed.result[middle]:
        how = "adapted"
    elif before.shape != after.shape:
        how = "reshaped"
    elif len(olds) > 1:
        how = "adapted"
    else:
        how = "as is" if olds == (key,) else "renamed"
    return Outcome(key, how, olds[0], wanted.numel, f"tied to {twin}" if twin else "")


def _raise_unless_settled(
    edited: Checkpoint,
    target: Mapping[str, Expected],
    mismatched: list[str],
    missing: list[str],
    alignment: Alignment | None,
) -> None:
    """Everything that no policy settles, in one error."""
    remedies: list[str] = []
    problems = [
        f"{key!r} has shape {list(edited[key].shape)}, the target wants {list(target[key].shape)}" for key in mismatched
    ]
    if mismatched:
        remedies.append(
            Phrase("settle shapes by ", Argument("on_mismatch"), " (drop, zeros …) or an edit that resizes them")
        )
    if missing:
        problems.append(f"{len(missing):,} keys of the target are missing: {listed(missing)}")
        remedies.append(Phrase("allow missing keys by pattern: ", Argument("allow_missing")))
    if problems and alignment is not None:
        left = [one for one in alignment.possible if one.new in missing]
        problems += [f"{one.certainty}: {one.old!r} to {one.new!r}: {one.reason}" for one in left[:3]]
        if left:
            remedies.append(Phrase("take what is not certain by ", Argument("min_certainty"), f" {left[0].certainty}"))
        problems += [
            f"open: {listed(one.olds, 3)} to {listed(one.news, 3)}: {one.reason}; say so in a recipe"
            for one in alignment.ambiguous[:3]
        ]
    if problems:
        raise EditError(problems, remedy=joined(remedies))


def _initialised(
    target: Mapping[str, Expected], keys: Iterable[str], scheme: str, seed: int
) -> dict[str, ComputedTensor]:
    """Tensors drawn by one of torch.nn.init's functions, each from its own seed."""

    def drawn(index: int, key: str) -> ComputedTensor:
        wanted = target[key]

        def values() -> torch.Tensor:
            import torch

            made = torch.empty(wanted.shape)
            generator = torch.Generator().manual_seed(seed + index)
            draw = getattr(torch.nn.init, f"{scheme}_")
            if scheme in ("zeros", "ones"):
                draw(made)
            elif made.dim() < 2 and scheme not in ("normal", "trunc_normal", "uniform"):
                torch.nn.init.zeros_(made)  # these schemes are for weights; a bias beside them starts at zero
            else:
                draw(made, generator=generator)
            return made

        return ComputedTensor(wanted.dtype, wanted.shape, (), lambda _: by_torch((), values, wanted.dtype))

    return {key: drawn(index, key) for index, key in enumerate(keys)}


def fit(
    source: Source,
    target: str | torch.nn.Module,
    *,
    select: str | None = None,
    recipe: Recipe | None = None,
    adapt: Recipe | None = None,
    align: bool = True,
    min_certainty: str = "certain",
    on_mismatch: str = "error",
    allow_missing: Iterable[str] = (),
    min_match: float = 0.0,
    seed: int = 0,
    allow_codes: bool = False,
    prepare: Recipe | None = None,
    allow_part: bool = False,
) -> Fit:
    """Fit a checkpoint to a model: find the renames, settle every shape, prove that it loads strictly.

    ``target`` is a model, or its spelling ``package.module:factory``; ``allow_part`` takes a part of a model (one
    rank's) for a whole.  See :func:`plan_fit` for the other arguments.
    The result is proven on a twin of the model without memory: torch's own ``load_state_dict`` takes it.  Raises
    EditError with all problems at once, TargetError, and what :func:`ckpt_surgeon.open` raises.

    >>> import ckpt_surgeon, torch
    >>> torch.save({"module.0.weight": torch.ones(2, 3), "module.0.bias": torch.ones(2)}, "wrapped.pth")
    >>> found = ckpt_surgeon.fit("wrapped.pth", torch.nn.Sequential(torch.nn.Linear(3, 2)))
    >>> list(found.result), found.matched
    (['0.weight', '0.bias'], 1.0)
    """
    from . import modules, targets

    checkpoint = checkpoint_of(source, select=select, allow_part=allow_part)
    model = targets.build(target) if isinstance(target, str) else target
    found = plan_fit(
        checkpoint,
        targets.resolve(target) if isinstance(target, str) else targets.expected(target),
        lambda keys: own_values(target, keys),
        recipe=recipe,
        adapt=adapt,
        align=align,
        min_certainty=min_certainty,
        on_mismatch=on_mismatch,
        allow_missing=allow_missing,
        min_match=min_match,
        seed=seed,
        allow_codes=allow_codes,
        prepare=prepare,
        ties=() if isinstance(model, Mapping) else modules.tied(model),
    )
    if isinstance(model, Mapping):
        return found
    proof = modules.verdict(model, found.result)
    if not proof.accepted:
        keys = listed((*proof.missing, *proof.unexpected))
        raise EditError([f"torch would not load the result strictly: {proof.refused or keys}"])
    return found


def own_values(target: str | torch.nn.Module, keys: list[str]) -> Mapping[str, Tensor]:
    """A model's own values for some keys, as it was initialised.  Raises EditError for a model without values."""
    if not keys:
        return {}
    import torch

    from ..tensors.torch_bridge import from_torch
    from . import targets

    model = targets.build(target, with_values=True) if isinstance(target, str) else target
    state = model if isinstance(model, Mapping) else model.state_dict()
    keys = [key for key in keys if key in state]  # a module may take an extra state and give none
    counters = {key: torch.zeros_like(state[key], device="cpu") for key in keys if _is_unused_counter(key, state[key])}
    empty = [key for key in keys if getattr(state[key], "is_meta", False) and key not in counters]
    if empty:
        raise EditError([f"the model is on the meta device and has no values for {listed(empty)}"])
    return from_torch({key: counters.get(key, state[key]) for key in keys}).tensors


def _is_unused_counter(key: str, value: torch.Tensor) -> bool:
    """Whether a buffer on the meta device is one that begins at zero in every model."""
    return getattr(value, "is_meta", False) and key.rpartition(".")[2] == "num_batches_tracked"
