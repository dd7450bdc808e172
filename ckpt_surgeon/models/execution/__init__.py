"""Pairs the parameters of two models by running both, and proves it: the copied model gives the same output.

``elements`` numbers every element of a model's parameters, ``tracing`` follows them through a forward pass, ``pairing``
finds for each of the target's operations the source's that was given the same, ``decoding`` says what that means key
by key, and ``examples`` finds an input.  The values are random: names, shapes and trained values play no part.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...text import Shown
from .decoding import RunPair, decoded
from .elements import EPS, Numbered
from .examples import example_for, heads_of, reaching, turns_rows
from .pairing import Search
from .proving import Proof, proof

if TYPE_CHECKING:
    import torch

__all__ = ["EPS", "TOLERANCE", "RunPair", "RunPairs", "pairs_by_running"]

TOLERANCE = 1e-8  # of the outputs' largest value, in float64
SECONDS = 120.0


@dataclass(frozen=True, slots=True, repr=False)
class RunPairs(Shown):
    """What running showed: ``pairs`` are proven; ``unproven`` are keys of the target that are not, with the reason.

    ``difference`` is the outputs' largest one, as a share of their largest value; None where no two are comparable.
    Models with different heads have no equal outputs: ``cut`` names the target's module up to which they are the
    same, and what of the source its input is equal to.  ``eps`` is what all normalisations of both added; None where
    each added its own.
    """

    pairs: tuple[RunPair, ...]
    unproven: Mapping[str, str]
    difference: float | None
    example: tuple[int, ...]
    notes: tuple[str, ...] = ()
    cut: tuple[str, str] | None = None
    eps: float | None = EPS

    @property
    def reason(self) -> str:
        """The proof in one line."""
        shape = "×".join(map(str, self.example))
        what = "gave the same output"
        if self.cut is not None:
            what = f"computed the same up to {self.cut[0] or 'the output'} (in the source: {self.cut[1]})"
        eps = f"eps {self.eps:g} in both" if self.eps is not None else "each with its own eps"
        return f"both models {what} on a random {shape} input (within {TOLERANCE:g}, {eps})"


def pairs_by_running(
    source: torch.nn.Module,
    target: torch.nn.Module,
    example: torch.Tensor | None = None,
    *,
    seconds: float = SECONDS,
) -> RunPairs:
    """Pair the parameters and buffers of two models by what they do in a forward pass.

    Copies of both run in float64 with random weights, statistics and biases, with the same eps in all normalisations,
    on ``example`` or on a random input that both take.  A pair is in the result only if the target, filled with
    the source's values as the pairs say, gives the source's output within :data:`TOLERANCE`, and if the key has an
    influence on that output.  The search for pairs ends after about ``seconds``.

    Raises TargetError for models on the meta device, and where no input is found that both take.

    >>> import torch
    >>> one = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> two = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> found = pairs_by_running(one, two)
    >>> [(pair.olds[0], pair.new) for pair in found.pairs]
    [('0.weight', '1.weight'), ('0.bias', '1.bias'), ('2.weight', '3.weight'), ('2.bias', '3.bias')]
    """
    end = time.monotonic() + seconds
    found = _found(source, target, example, seconds, EPS)
    if found.pairs and (found.cut is None or 10 * len(found.unproven) < len(found.pairs)):
        return found
    # Some models add a number of their own in places that no setting reaches.
    again = _found(source, target, example, max(end - time.monotonic(), 1.0), None)
    return again if len(again.pairs) > len(found.pairs) else found


def _found(
    source: torch.nn.Module, target: torch.nn.Module, example: torch.Tensor | None, seconds: float, eps: float | None
) -> RunPairs:
    """One search and its proof, with the same eps in all normalisations, or with each one's own."""
    ours, theirs = Numbered.of(source, seed=1, eps=eps), Numbered.of(target, seed=2, eps=eps)
    given = example_for(ours.model, theirs.model) if example is None else example.detach().cpu()
    given = given.double() if given.is_floating_point() else given
    search = Search(ours, theirs, given, seconds, heads_of(source, target), turns_rows(source, target))
    origin = search.origins()
    found = {key: pair for key in theirs.shapes if (pair := decoded(ours, theirs, origin, key)) is not None}
    tables = [pair.rows for pair in found.values() if not pair.is_whole]
    if tables and example is None:
        given = reaching(ours.model, theirs.model, given, tables)
    shown = proof(ours, theirs, found, given, search.groups, TOLERANCE)
    unproven = {key: _why(key, found, shown) for key in theirs.shapes if key not in shown.pairs}
    notes = ("the search for pairs was ended: there were too many choices",) if search.ended else ()
    proven = tuple(shown.pairs[key] for key in theirs.shapes if key in shown.pairs)
    cut = (shown.cut.module, shown.cut.seen) if shown.cut.seen else None
    return RunPairs(proven, unproven, shown.difference, tuple(given.shape), notes, cut, eps)


def _why(key: str, found: Mapping[str, RunPair], shown: Proof) -> str:
    if key not in found:
        return "nothing in the source is given the same in a forward pass"
    if shown.cut.seen:
        return f"the models are the same up to {shown.cut.module or 'the output'} only"
    if shown.difference is None:
        return "the two models give no outputs of one shape"
    if shown.difference > TOLERANCE:
        return f"the outputs differ by {shown.difference:.1g} of their largest value"
    return "it has no influence on the output"
