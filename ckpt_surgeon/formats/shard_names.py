"""Names of shards that belong together: ``model-00001-of-00003.safetensors`` and its siblings.

They are those that the hub's libraries give (``model-…``, ``pytorch_model-….bin``, ``diffusion_pytorch_model-…``);
``consolidated.00.pth`` and its kin are parts of each tensor, and no set of this kind.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..files.paths import FilePath

_SHARD = re.compile(
    r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.(?:safetensors|bin|pth|pt|ckpt|gguf|npz))"
)
DCP_METADATA = ".metadata"  # says what is in a folder of torch.distributed.checkpoint
KNOWN = ("model", "pytorch_model", "diffusion_pytorch_model", "adapter_model")  # stems, the first that is there counts


def is_shard(name: str) -> bool:
    """Whether a name is that of a shard.

    >>> is_shard("pytorch_model-00001-of-00002.bin"), is_shard("consolidated.00.pth")
    (True, False)
    """
    return _SHARD.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class ShardSet:
    """The shards of one checkpoint in a folder, by their number from 1; ``whole`` is the name of one file instead."""

    folder: FilePath
    stem: str
    suffix: str
    count: int
    names: Mapping[int, str]

    @property
    def whole(self) -> FilePath:
        """The name that one file with all of it would have."""
        return self.folder / f"{self.stem}{self.suffix}"

    @property
    def first(self) -> FilePath:
        """The first shard that is there."""
        return self.folder / self.names[min(self.names)]

    @property
    def missing(self) -> list[int]:
        """The numbers of the shards that are not there."""
        return [number for number in range(1, self.count + 1) if number not in self.names]


def sets_in(folder: FilePath, names: Iterable[str]) -> list[ShardSet]:
    """The sets of several shards among the names in a folder."""
    found: dict[tuple[str, int, str], dict[int, str]] = {}
    for name in names:
        match = _SHARD.fullmatch(name)
        if match is not None and 1 <= int(match["number"]) <= int(match["count"]):
            one = (match["stem"], int(match["count"]), match["suffix"])
            found.setdefault(one, {})[int(match["number"])] = name
    return [ShardSet(folder, stem, suffix, count, held) for (stem, count, suffix), held in found.items() if count > 1]


def set_in(folder: FilePath, names: Iterable[str]) -> ShardSet | None:
    """The one set in a folder that is meant by naming it: the only one, or that of a name that everybody uses."""
    checkpoints = list(names)
    found = sets_in(folder, checkpoints)
    for stem in KNOWN:
        for one in found:
            if one.stem == stem and (len(found) == 1 or one.suffix == ".safetensors"):
                return one
    inside = {name for one in found for name in one.names.values()}
    return found[0] if len(found) == 1 and inside == set(checkpoints) else None
