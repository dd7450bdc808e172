"""Hashes that a safetensors header states of the bytes behind it, and when these bytes stay what they were.

``modelspec.hash_sha256`` (https://github.com/Stability-AI/ModelSpec) and kohya's ``sshs_model_hash`` are SHA-256
over all that stands behind the header; kohya's ``sshs_legacy_hash`` is over a part of a file with the same keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

from ..files.paths import FilePath
from ..tensors.records import Tensor
from ..tensors.stored import StoredTensor

LEGACY = "sshs_legacy_hash"  # depends on the length of the header too
HASHES = re.compile(rf"modelspec\.hash_\w+|sshs_model_hash|{LEGACY}")


def has_body_of(files: Sequence[Mapping[str, Tensor]]) -> FilePath | None:
    """The safetensors file whose bytes behind the header an output of these tensors would have, byte for byte.

    None where there is none: several files, values that are computed, tensors left out or in another order.

    >>> has_body_of([{}]) is None
    True
    """
    if len(files) != 1:
        return None
    spans = []
    for tensor in sorted(files[0].values(), key=lambda tensor: -tensor.dtype.itemsize):  # as the format writes them
        if tensor.nbytes:
            if not isinstance(tensor, StoredTensor) or tensor.span is None:
                return None
            spans.append(tensor.span)
    if not spans or any(one.stop != after.start or one.path != after.path for one, after in pairwise(spans)):
        return None
    path = spans[0].path
    with path.opened() as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
    return path if (spans[0].start, spans[-1].stop) == (begin, path.size) else None
