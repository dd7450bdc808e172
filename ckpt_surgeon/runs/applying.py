"""Edits of a run: a step, a recipe, or fitting its weights to a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from glob import escape
from typing import TYPE_CHECKING, TypeAlias

from ..edits.change import Change
from ..edits.recipe import Recipe, Step
from ..tensors.checkpoint import Checkpoint
from .folder import RunFolder
from .run import Run

if TYPE_CHECKING:
    from ..models.fit import Fit

AnyRun: TypeAlias = Run | RunFolder


def applied(
    run: AnyRun,
    edit: Step | Recipe,
    *,
    others: Iterable[Mapping[str, object]] = (),
    moments: str = "zero",
    reset: Iterable[str] = (),
) -> tuple[AnyRun, Change[Checkpoint]]:
    """The run after a step or a recipe, and the change of its weights.

    ``moments`` is what an optimizer's moments get where a parameter gets new elements: "zero", or the "mean" of the
    others; ``reset`` are globs on the new keys of parameters whose state is given up.  ``others`` are the further
    checkpoints that a recipe takes.  Raises EditError.

    >>> import ckpt_surgeon, torch
    >>> from ckpt_surgeon.runs.opening import open_run_file
    >>> torch.save({"model": {"module.fc.bias": torch.ones(3)}, "epoch": 3}, "last.ckpt")
    >>> run, change = applied(open_run_file("last.ckpt"), ckpt_surgeon.step("strip_prefix"))
    >>> list(run.weights), run.proof
    (['fc.bias'], 'same run')
    """
    given = tuple(others)
    recipe = edit if isinstance(edit, Recipe) else Recipe((edit,))
    again = recipe.for_moments(moments)
    return run.edited(
        lambda weights: recipe.plan(weights, *given), computes=recipe.computes,
        replay=lambda tensors: again.plan(tensors, *given), reset=reset, moments=moments,
    )  # fmt: skip


def fitted(run: AnyRun, found: Fit, *, moments: str = "zero", reset: Iterable[str] = ()) -> AnyRun:
    """The run after its weights were fitted to a model: a parameter of another shape starts afresh under its id.

    ``found`` is what :func:`ckpt_surgeon.fit` made of ``run.weights``.  Raises EditError.

    >>> import ckpt_surgeon, torch
    >>> def build(classes):
    ...     return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, classes))
    >>> model = build(2)
    >>> optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    >>> torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "last.ckpt")
    >>> run = ckpt_surgeon.open_run("last.ckpt")
    >>> fitted(run, ckpt_surgeon.fit(run.weights, build(3), on_mismatch="drop")).proof
    'kept part'
    """
    again = found.recipe.for_moments(moments).plan
    renamed = found.recipe.plan(run.weights)
    origins = {new: olds or renamed.origins.get(new, ()) for new, olds in found.change.origins.items()}
    afresh: list[str] = [escape(new) for new, olds in found.change.origins.items() if not olds]
    change = replace(found.change, origins=origins)
    if isinstance(run, Run) and run.twins:
        left = ", ".join(".".join(twin.path) for twin in run.twins)
        run = replace(run, twins=(), notes=(*run.notes, f"{left} has the same keys and was not fitted"))
    made, _ = run.edited(
        lambda _: change, computes=found.recipe.computes, replay=again, reset=[*reset, *afresh], moments=moments
    )
    return made
