"""Which of several processes this is, where torchrun started them as ``-m ckpt_surgeon``.

A ``ckpt`` that a training script runs inherits torchrun's variables too, and stays one process by itself.
"""

from __future__ import annotations

import os

_takes_part = False


def take_part() -> None:
    """Look at torchrun's variables from now on."""
    global _takes_part
    _takes_part = True


def count() -> int:
    """How many processes write one output together, 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if _takes_part and "RANK" in os.environ else 1


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def is_first_here() -> bool:
    """Whether this process is the first on its machine: it prints the problems that all processes have."""
    return count() == 1 or os.environ.get("LOCAL_RANK", "0") == "0"
