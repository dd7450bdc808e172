"""Valid files that few people meet, family by family, each with what its oracle reads; special tensors; empty files."""

from __future__ import annotations

from unusual_files import modules, pickles, programs, python2, structures, tars, training, zips
from unusual_files.programs import SILERO
from unusual_files.registry import UNUSUAL, UnusualFile, build, save
from unusual_files.special import EMPTY, SPECIAL
from unusual_files.tars import TarOf01, TensorKey
from unusual_files.vanished import vanishing

FAMILIES = (modules, training, programs, tars, pickles, python2, zips, structures)  # each registers its files

__all__ = [
    "EMPTY",
    "FAMILIES",
    "SILERO",
    "SPECIAL",
    "UNUSUAL",
    "TarOf01",
    "TensorKey",
    "UnusualFile",
    "build",
    "save",
    "vanishing",
]
