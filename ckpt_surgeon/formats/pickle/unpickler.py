"""The inert unpickler: the machine with the handlers of all opcodes of protocols 0 to 5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from . import call_opcodes, container_opcodes, memo_opcodes, scalar_opcodes, tensor_run
from .machine import Handler, Machine

HANDLERS: Mapping[int, Handler] = {
    **memo_opcodes.HANDLERS,
    **scalar_opcodes.HANDLERS,
    **container_opcodes.HANDLERS,
    **call_opcodes.HANDLERS,
    **tensor_run.HANDLERS,
}


class Unpickler(Machine):
    """Reads one pickle out of ``data``; see :class:`.machine.Machine` for what it takes and keeps.

    >>> Unpickler(b"cos\\nsystem\\n(S'echo hi'\\ntR.").load().class_name
    'os.system'
    """

    handlers: ClassVar[Mapping[int, Handler]] = HANDLERS
    sizes_by_opcodes: ClassVar[type[dict[bytes, tuple[int, ...]]]] = tensor_run.Sizes
