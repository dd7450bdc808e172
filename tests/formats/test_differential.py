"""Files made by structure mean here what they mean to torch.load(weights_only=True) and to safetensors, or are refused.

The rule: where the oracle reads a file, this reader gives the same keys, dtypes, shapes and values, names a tensor
without giving it, or refuses.  Where the oracle refuses because the file is malformed, so does this reader; where it
refuses for safety, or for what says nothing of values (gradients, hooks, devices, a missing version), it may read.

``make fuzz`` searches for hours: CKPT_FUZZ_SECONDS is the time for each container, CKPT_FUZZ_SEED where it begins.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from differential import Maker, disagreement, ours, theirs

SECONDS = float(os.environ.get("CKPT_FUZZ_SECONDS", "0"))  # 0: as many files as FILES, always the same ones
FILES = 3000
FIRST = int(os.environ.get("CKPT_FUZZ_SEED", "0"))
SUFFIXES = {"zip": ".pt", "legacy": ".pt", "safetensors": ".safetensors"}


@pytest.mark.parametrize("container", SUFFIXES)
def test_no_file_means_one_thing_here_and_another_to_its_oracle(container: str, tmp_path: Path) -> None:
    path = tmp_path / f"made{SUFFIXES[container]}"
    end = time.monotonic() + SECONDS
    seed = FIRST
    while time.monotonic() < end if SECONDS else seed < FIRST + FILES:
        path.write_bytes(getattr(Maker(seed), container)())
        found = disagreement(path)
        assert not found, f"seed {seed}: {found}"
        seed += 1
    assert seed > FIRST + 20


@pytest.mark.parametrize("container", SUFFIXES)
def test_sound_files_are_read(container: str, tmp_path: Path) -> None:
    """The search is no search if all that it makes is refused."""
    path = tmp_path / f"made{SUFFIXES[container]}"
    read = total = 0
    for seed in range(200):
        maker = Maker(seed)
        if maker.odds:
            continue
        path.write_bytes(getattr(maker, container)())
        expected, _ = theirs(path)
        if expected:
            total += 1
            read += ours(path)[0] is not None
    assert total > 20
    assert read == total
