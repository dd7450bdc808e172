"""Files that are cut off or have bytes changed, and what may come of reading them: only errors of the package's own."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import ckpt_surgeon
from ckpt_surgeon import CheckpointError
from ckpt_surgeon.text import visible


def cuts(raw: bytes, count: int = 40) -> Iterator[bytes]:
    """The beginnings of a file, of lengths spread over all of it."""
    lengths = sorted({*range(0, len(raw), max(len(raw) // count, 1)), *range(min(24, len(raw))), len(raw) - 1})
    return (raw[:length] for length in lengths)


def damaged(raw: bytes, count: int, *, within: int | None = None) -> Iterator[bytes]:
    """Copies of a file with bytes changed, cut out, repeated or put in, in its first bytes above all; each the same
    at every call."""
    chance = random.Random(len(raw))
    for number in range(count):
        made = bytearray(raw)
        for _ in range(chance.randint(1, 4)):
            reach = min(within or len(made), len(made)) if number % 3 else len(made)
            at = chance.randrange(max(reach, 1))
            kind = chance.randrange(5)
            if kind < 2:
                made[at : at + 1] = bytes([chance.randrange(256)])
            elif kind == 2:
                made[at : at + 4] = chance.choice([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\x80\0\0\0"])
            elif kind == 3:
                del made[at : at + chance.randint(1, 16)]
            else:
                made[at:at] = made[max(at - 8, 0) : at] * chance.randint(1, 4)
        yield bytes(made)


def examine(path: Path) -> str:
    """Use a file in every way that reads; returns the error of the last use, which is one line, or ""."""
    problem = ""
    for use in (_list, _salvage, _hash, _scan):
        try:
            use(path)
        except CheckpointError as error:
            problem = visible(str(error))
            assert "\n" not in problem
    return problem


def _list(path: Path) -> None:
    from ckpt_surgeon.report import listings

    listing = ckpt_surgeon.ls(path, all=True, check=True)
    assert listings.listing_text(listing)
    json.loads(listings.listing_json(listing))


def _salvage(path: Path) -> None:
    ckpt_surgeon.ls(path, all=True, salvage=True)


def _hash(path: Path) -> None:
    ckpt_surgeon.hash(path)


def _scan(path: Path) -> None:
    ckpt_surgeon.scan(path)
