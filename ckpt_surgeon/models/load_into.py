"""Loading into a model: all or nothing, with a report of every key."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import BrokenFile, EditError, listed
from ..files.prefetch import reading_ahead
from ..files.spans import ByteSpan
from ..reading.loading import check_storages, load
from ..reading.sources import checkpoint_of
from ..tensors.extra_state import is_extra_state
from ..tensors.records import Tensor, spans_of
from ..text import Shown
from .fit import Fit

if TYPE_CHECKING:
    import torch

    from ..edits.recipe import Recipe
    from ..reading.sources import Source
    from ..tensors.torch_bridge import MapLocation


def load_into(
    model: torch.nn.Module,
    source: Source,
    *,
    map_location: MapLocation = "cpu",
    select: str | None = None,
    recipe: Recipe | None = None,
    adapt: Recipe | None = None,
    align: bool = True,
    min_certainty: str = "certain",
    on_mismatch: str = "error",
    allow_missing: Iterable[str] = (),
    min_match: float = 0.0,
    assign: bool | None = None,
    seed: int = 0,
    allow_codes: bool = False,
    allow_part: bool = False,
    check: bool | None = None,
) -> LoadReport:
    """Load a checkpoint into a model, all or nothing, and report what became of every key.

    Keys are renamed where that is certain (``min_certainty``), shapes settled, missing keys and parts of a model
    allowed as in :func:`ckpt_surgeon.fit`; what is not loaded keeps the model's own values.  Parameters keep
    requires_grad, dtype and device.  ``assign`` puts the file's mapped memory in place of the parameters instead of
    copying into them; without it, that is done exactly for a model on the meta device.  Wrapped (DataParallel, DDP) and
    compiled models are loaded inside.  ``check`` compares the checksums that the container has before anything is
    loaded; without it, that is done exactly where values are copied.  A file that changes meanwhile is an error.
    Raises what ``fit`` raises, and then nothing in the model has changed; only where a local file changes just while
    its bytes are copied, the model has got some of both versions, and the error (BrokenFile) says so.

    >>> import ckpt_surgeon, torch
    >>> torch.save({"module.weight": torch.ones(2, 3), "module.bias": torch.ones(2)}, "layer.pth")
    >>> report = ckpt_surgeon.load_into(torch.nn.Linear(3, 2), "layer.pth")
    >>> report.loaded, report.matched
    (('weight', 'bias'), 1.0)
    """
    from . import modules
    from .fit import own_values, plan_fit
    from .targets import expected

    inner = modules.unwrapped(model)
    checkpoint = checkpoint_of(source, select=select, allow_part=allow_part)
    own = inner.state_dict()
    on_meta = {key for key, value in own.items() if getattr(value, "is_meta", False)}
    found = plan_fit(
        checkpoint, expected(inner), lambda keys: own_values(inner, [key for key in keys if key in on_meta]),
        recipe=recipe, adapt=adapt, align=align, min_certainty=min_certainty, on_mismatch=on_mismatch,
        allow_missing=allow_missing, min_match=min_match, seed=seed, allow_codes=allow_codes,
        ties=modules.tied(inner),
    )  # fmt: skip
    proof = None if modules.loads_plainly(inner) else modules.verdict(inner, {**expected(inner), **found.result})
    if proof is not None and not proof.accepted:
        raise EditError([f"torch would not load the result strictly: {proof.refused or listed(proof.missing)}"])
    _refuse_two_values(inner, found.result)
    assigning = bool(on_meta) if assign is None else assign
    if check or (check is None and not assigning):
        check_storages(found.result)
    values = load(found.result, map_location=map_location)  # fails where a file is another one by now
    with _changes_told(), reading_ahead(_mapped_spans(found.result)):
        _put(inner, values, assign=assigning)
    return LoadReport(found, assigning)


def _mapped_spans(tensors: Mapping[str, Tensor]) -> list[ByteSpan]:
    """The bytes that are read while they are copied into the model: what came from a server is in memory."""
    return [span for span in spans_of(tensors.values()) if span.path.local is not None]


@contextmanager
def _changes_told() -> Iterator[None]:
    """Say of a file that changed while its bytes were copied what became of the model."""
    try:
        yield
    except BrokenFile as error:
        problem = f"{error.problem}; the model's tensors were overwritten, with bytes of both"
        raise BrokenFile(error.path, problem, "load it again before the model is used") from error


def _refuse_two_values(model: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """A parameter of several names has one value; a checkpoint that has two is not this model's."""
    from ..reading.comparing import same_bytes
    from .modules import tied

    problems = []
    for names in tied(model):
        first, *others = [name for name in names if name in tensors] or [""]
        odd = [name for name in others if not same_bytes(tensors[first], tensors[name])]
        if odd:
            problems.append(f"{first!r} and {listed(odd)} are one parameter in the model and differ in the checkpoint")
    if problems:
        raise EditError(problems, remedy="drop one of them, or untie the model")


def _put(model: torch.nn.Module, values: Mapping[str, torch.Tensor], *, assign: bool) -> None:
    """Load what was proven to fit; devices, dtypes, ties and requires_grad stay the model's."""
    from . import modules
    from .targets import extra_state_keys

    state = model.state_dict()
    ties = modules.tied(model)
    wanted = set(extra_state_keys(model))
    own = {key: value for key, value in state.items() if not is_extra_state(key) or key in wanted}
    strict = wanted <= own.keys() | values.keys()  # a module may take an extra state that it never gave
    if assign:
        placed = {key: value if is_extra_state(key) else _as_in(state[key], value) for key, value in values.items()}
        model.load_state_dict({**own, **placed}, strict=strict, assign=True)
        modules.tie_again(model, ties)
    else:
        model.load_state_dict({**own, **values}, strict=strict)


def _as_in(own: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A value on the device and in the dtype of the model's own."""
    return value.to(value.device if own.is_meta else own.device, own.dtype)


@dataclass(frozen=True, slots=True, repr=False)
class LoadReport(Shown):
    """What :func:`load_into` did; ``str()`` of it is the table that ``ckpt fit`` prints."""

    fit: Fit
    assigned: bool

    @property
    def loaded(self) -> tuple[str, ...]:
        """The model's keys that have values of the checkpoint now."""
        return self.fit.loaded

    @property
    def initialized(self) -> tuple[str, ...]:
        """The model's keys that kept their own values, or got fresh ones by name."""
        return self.fit.initialized

    @property
    def matched(self) -> float:
        """The share of the model's elements that were loaded, 0 to 1."""
        return self.fit.matched
