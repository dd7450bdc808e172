"""The index of shards that have none: which of them has each tensor, as the hub's libraries write it."""

from __future__ import annotations

from pathlib import Path

from ..errors import FileError, OutputExists
from ..files import small
from ..files.paths import AnyPath, FilePath, file_path
from ..formats import registry, shard_set, sharded
from ..formats.shard_names import ShardSet, set_in, sets_in
from ..tensors.extra_state import is_extra_state


def write_index(path: AnyPath, *, force: bool = False) -> Path:
    """Write the index of a set of shards, ``model.safetensors.index.json``, beside them; gives its path.

    ``path`` is their folder, or any one of the shards (``model-00001-of-00002.safetensors``).  The index has
    ``metadata.total_size`` (bytes of all tensors, ties once) and ``weight_map`` (key to file), keys sorted, as
    Hugging Face's hub has it.  Raises FileError where there are no shards or several sets, BrokenFile for a set that
    is not complete or has a key twice, OutputExists (without ``force``).

    >>> import json, ckpt_surgeon, safetensors.torch, torch
    >>> for number, key in ((1, "fc.bias"), (2, "fc.weight")):
    ...     safetensors.torch.save_file({key: torch.ones(2)}, f"model-0000{number}-of-00002.safetensors")
    >>> index = ckpt_surgeon.write_index(".")
    >>> index.name, json.loads(index.read_text())["metadata"]
    ('model.safetensors.index.json', {'total_size': 16})
    """
    shards = _shards_at(file_path(path))
    if shards.suffix == ".gguf":
        raise FileError(shards.first, "is a part of a split GGUF model, which needs no index", "read it as it is")
    index = sharded.index_name(shards.whole).local
    assert index is not None  # _shards_at takes no other
    if index.lexists() and not force:
        raise OutputExists(index)
    gathered = shard_set.gather(shards, registry.read_shard)
    root = shard_set.joined(shards, gathered)
    tensors = {str(key): tensor for key, tensor in root.items() if isinstance(tensor, sharded.TENSORS)}
    listed = [*tensors, *(str(key) for key in root if is_extra_state(str(key)) and str(key) not in tensors)]
    if not tensors:
        raise FileError(
            shards.first, "holds no tensor at its top, so no index can name any", "write new shards: convert"
        )
    homes = {str(key): name for name, held in gathered.roots.items() for key in held}
    total = sum({tensor.tie: tensor.nbytes for tensor in tensors.values()}.values())
    small.write_bytes(index, sharded.index_bytes({key: homes[key] for key in sorted(listed)}, total))
    return Path(index)


def _shards_at(path: FilePath) -> ShardSet:
    """The set that is meant by its folder or by one of its files, whether an index lists it or not."""
    if path.local is None:
        raise FileError(path, "is not on this machine, so no index can be written beside it", "copy it here first")
    try:
        return _found(path)
    except OSError as error:
        raise path.failure(error) from error


def _found(path: FilePath) -> ShardSet:
    folder = path if path.is_dir() else path.parent
    names = folder.names()
    sets = sets_in(folder, names)
    if not path.is_dir():
        for one in sets:
            if path.name in one.names.values():
                return one
        raise FileError(
            path, "is no shard, as model-00001-of-00002.safetensors is", "name a shard or a folder of shards"
        )
    if not sets:
        raise FileError(path, "has no shards, as model-00001-of-00002.safetensors is", "name a folder of shards")
    found = sets[0] if len(sets) == 1 else set_in(folder, names)
    if found is None:
        firsts = ", ".join(str(one.first) for one in sets[:4])
        raise FileError(path, f"has {len(sets):,} sets of shards", f"name a shard of one: {firsts}")
    return found
