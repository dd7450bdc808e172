"""Folders of engines whose pickles were changed at random are read or refused in one line."""

from __future__ import annotations

import random
import shutil
import zipfile
from pathlib import Path

import pytest
from tables import rewritten

import ckpt_surgeon
from ckpt_surgeon.errors import CheckpointError

MADE = Path(__file__).parents[2] / "fixtures"
FOLDERS = ["deepspeed/zero1", "deepspeed/zero2", "deepspeed/zero3", "deepspeed/zero3_universal", "megatron/llama",
           "libraries/speechbrain"]  # fmt: skip
ROUNDS = 8


@pytest.mark.parametrize("name", FOLDERS)
def test_changed_pickles_are_read_or_refused(name: str, tmp_path: Path) -> None:
    chance = random.Random(name)
    folder = Path(shutil.copytree(MADE / name, tmp_path / "folder"))
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and zipfile.is_zipfile(path)]
    refused = 0
    for _ in range(ROUNDS):
        path = chance.choice(files)
        source = MADE / name / path.relative_to(folder)
        _change(source, path, chance)
        refused += sum(_is_refused(folder, select) for select in (None, "fp32", "optimizer"))
        shutil.copy(source, path)
    assert refused


def _is_refused(folder: Path, select: str | None) -> bool:
    try:
        ckpt_surgeon.load(ckpt_surgeon.open(folder, select=select))
    except CheckpointError as error:
        return "\n" not in error.problems[0]
    return False


def _change(source: Path, target: Path, chance: random.Random) -> None:
    """A file of torch.save with some bytes of its pickle changed, under the right checksum."""
    with zipfile.ZipFile(source) as file:
        record = next(name for name in file.namelist() if name.endswith("data.pkl"))
        raw = bytearray(file.read(record))
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(raw))
        raw[at] = chance.choice([raw[at] ^ 1 << chance.randrange(8), chance.randrange(256), raw[at] + 1 & 255])
    rewritten(source, target, records={record.partition("/")[2]: bytes(raw)})
