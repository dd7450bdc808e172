"""``.pt2`` archives of torch.export: weights as plain records beside a JSON that names them.

The JSON is ``data/weights/model_weights_config.json``; dtypes are numbers of ``ScalarType`` in
torch/_export/serde/schema.py.
"""

from __future__ import annotations

import json

from ...errors import BrokenFile
from ...tensors.dtypes import BY_NAME, DType
from ...tensors.records import OpaqueTensor
from ...tensors.stored import StoredTensor
from ..contents import Contents
from ..pickle.values import Ordered, Value
from .archive import Archive

CONTAINER = "torch.export"
CONFIG = "_weights_config.json"

_SCALAR_TYPES = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64",
    9: "complex32", 10: "complex64", 11: "complex128", 12: "bool", 13: "bfloat16", 28: "uint16",
    29: "float8_e4m3fn", 30: "float8_e5m2", 31: "float8_e4m3fnuz", 32: "float8_e5m2fnuz", 33: "float8_e8m0fnu",
    34: "uint32", 35: "uint64",
}  # fmt: skip


def holds(archive: Archive) -> bool:
    """Whether a zip is a torch.export archive."""
    return archive.find(archive.folder + "archive_format") is not None or any(map(_is_config, archive.members))


def _is_config(name: str) -> bool:
    return name.endswith(CONFIG) and "data/weights/" in name


def read(archive: Archive, *, salvage: bool = False) -> Contents:
    """Read the weights of an exported program; pickled ones (subclasses) are named only.  Raises BrokenFile."""
    root = Ordered()
    configs = [name for name in archive.members if _is_config(name)]
    if not configs:
        raise BrokenFile(archive.path, "is a torch.export archive without plain weights", "save it with torch >= 2.8")
    try:
        for name in configs:
            folder = name.rpartition("/")[0]
            for key, entry in json.loads(archive.read(name))["config"].items():
                root[key] = _weight(archive, f"{folder}/{entry['path_name']}", entry)
    except (LookupError, AttributeError, TypeError, ValueError, RecursionError, OverflowError) as error:
        raise BrokenFile(archive.path, f"has a weights config that is damaged ({error!r})") from error
    return Contents(archive.path, CONTAINER, root)


def _weight(archive: Archive, record: str, entry: dict[str, Value]) -> StoredTensor | OpaqueTensor:
    meta = entry["tensor_meta"]
    if not isinstance(meta, dict):
        raise TypeError("tensor_meta is no object")
    dtype: DType = BY_NAME[_SCALAR_TYPES[meta["dtype"]]]
    shape, stride = _integers(meta["sizes"]), _integers(meta["strides"])
    if entry.get("use_pickle"):
        return OpaqueTensor("pickled subclass", dtype, shape)
    offset = _integers([meta["storage_offset"]])[0]
    device = meta.get("device", {}).get("type", "cpu")
    return StoredTensor(dtype, shape, stride, offset, archive.members[record].storage(archive.path, str(device)))


def _integers(values: Value) -> tuple[int, ...]:
    """Sizes that are plain; a symbolic one is no weight's."""
    if not isinstance(values, list):
        raise TypeError("sizes that are no list")
    return tuple(int(value["as_int"]) for value in values)
