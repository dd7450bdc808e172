"""The adapter_config.json that PEFT reads beside an adapter: written with an output that is called adapter_model."""

from __future__ import annotations

from ..errors import OutputExists
from ..files.paths import FilePath
from ..tensors.checkpoint import PEFT_CONFIG
from .destinations import Destination
from .leftovers import ADAPTER
from .plan import Plan


def check(planned: Plan) -> None:
    """Raise OutputExists where other settings are beside an output that is new."""
    beside = _beside(planned)
    if beside is None or not beside.lexists() or planned.in_the_way():
        return
    if beside.read_text("utf-8") != planned.checkpoint.metadata[PEFT_CONFIG]:
        raise OutputExists(beside)


def write(planned: Plan, where: Destination) -> None:
    """Have a destination write the settings that an adapter carries beside it."""
    if (beside := _beside(planned)) is not None:
        where.write_settings(beside, planned.checkpoint.metadata[PEFT_CONFIG].encode())


def _beside(planned: Plan) -> FilePath | None:
    """Where the settings go; None for an output that has none, or is not called as PEFT calls adapters."""
    if PEFT_CONFIG not in planned.checkpoint.metadata or planned.out.stem != ADAPTER or planned.is_folder:
        return None
    return planned.out.parent / PEFT_CONFIG
