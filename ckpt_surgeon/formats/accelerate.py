"""accelerate's folder of a sharded FSDP training: the model is a distributed checkpoint in a folder of its own.

``Accelerator.save_state`` leaves ``pytorch_model_fsdp_0`` (weights), ``optimizer_0``, ``scheduler.bin`` and
``random_states_R.pkl`` (``accelerate/utils/fsdp_utils.py``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..errors import NotACheckpoint, listed
from ..files.paths import FilePath

_MODEL = re.compile(r"pytorch_model_fsdp_\d+")


def model_folder(folder: FilePath, names: Sequence[str]) -> FilePath | None:
    """The folder of the model in such a folder; None where there is none.

    Raises NotACheckpoint where there are several models, naming them.
    """
    found = [name for name in names if _MODEL.fullmatch(name) and (folder / name).is_dir()]
    if len(found) > 1:
        raise NotACheckpoint(folder, f"has {len(found):,} models of accelerate's", f"name one: {listed(found, 3)}")
    return folder / found[0] if found else None
