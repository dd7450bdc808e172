"""What a framework's way of saving means for a run that is edited, where it is not what a reader expects."""

from __future__ import annotations

from collections.abc import Callable

from ..formats.pickle.values import Value
from .state import entry, pairs_of

MMENGINE = (
    "mmengine's EMAHook swaps the two when it saves: state_dict has the averaged weights, ema_state_dict those that "
    "the optimizer trains; both are edited"
)
ULTRALYTICS = (
    "ultralytics halves weights and optimizer state when it saves, so that resuming from this file never was exact; "
    "what it resumes from stays as it is here"
)


def remarks(root: Value) -> tuple[str, ...]:
    """What is worth saying of the layout of a run.

    >>> from ckpt_surgeon.formats.pickle.graph import DictNode
    >>> remarks(DictNode([("model", DictNode()), ("epoch", 3)]))
    ()
    """
    return tuple(text for text, holds in _KNOWN.items() if holds(root))


def _is_mmengine_with_ema(root: Value) -> bool:
    """``mmengine/hooks/ema_hook.py``: the averaged model counts its ``steps``."""
    return (
        pairs_of(entry(root, "meta")) is not None
        and pairs_of(entry(root, "state_dict")) is not None
        and entry(entry(root, "ema_state_dict"), "steps") is not None
    )


def _is_ultralytics(root: Value) -> bool:
    """``ultralytics/engine/trainer.py``, save_model."""
    names = {key for key, _ in pairs_of(root) or ()}
    return {"model", "ema", "updates", "optimizer", "train_args"} <= names


_KNOWN: dict[str, Callable[[Value], bool]] = {MMENGINE: _is_mmengine_with_ema, ULTRALYTICS: _is_ultralytics}
