"""Files that are damaged or something else, family by family, and what is to be said of each."""

from __future__ import annotations

from broken_files import indexes, legacy, old_files, other, safetensors_files, zip_pickles, zips
from broken_files.by_hand import Part, counted, legacy_of, pickled, safetensors_of, tar_of, zip_of
from broken_files.registry import BROKEN, state, written
from broken_files.salvage import ALL, SALVAGE

FAMILIES = (zips, zip_pickles, legacy, safetensors_files, old_files, indexes, other)  # each registers its files

__all__ = [
    "ALL",
    "BROKEN",
    "FAMILIES",
    "SALVAGE",
    "Part",
    "counted",
    "legacy_of",
    "pickled",
    "safetensors_of",
    "state",
    "tar_of",
    "written",
    "zip_of",
]
