"""A folder as an output: model.safetensors in the layout of Hugging Face's hub, and the files that belong beside it.

A folder is what exists as one, or what is written with a slash at its end.  The names in it are those that
``save_pretrained`` gives: ``model.safetensors``, or shards and ``model.safetensors.index.json``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence

from ..errors import Argument, CheckpointError, EditError, FileError, Phrase, listed
from ..files.paths import FilePath
from ..formats import registry
from ..formats.dcp import metadata as dcp
from ..tensors.records import Tensor

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
_FLOATS = ("float32", "float16", "bfloat16")
LARGEST = 1 << 30  # bytes of a file that is copied beside weights: vocabularies have some ten million

# Files that hold tensors, or what goes with a training: never copied.
_TENSORS = re.compile(
    r".*\.(safetensors|bin|pth?|ckpt|pkl|h5|msgpack|onnx|onnx_data|gguf|ggml|npz|npy|tflite|pb|distcp|pdparams|nemo|tar"
    r"|gz|zip|dcp|keras|index\.json|lock|tmp|part|incomplete)",
    re.IGNORECASE,
)
_OTHER_WEIGHTS = re.compile(r"(pytorch_model|tf_model|flax_model|model)([-.].*)?\.(bin|h5|msgpack|safetensors)")


def is_model_folder(out: FilePath) -> bool:
    """Whether an output is a folder for model.safetensors, rather than a file or a container that is a folder.

    >>> from ckpt_surgeon.files.paths import file_path
    >>> [is_model_folder(file_path(text)) for text in ("llama/", "llama", "model.pth", "weights.dcp/")]
    [True, False, False, False]
    """
    return out.suffix.lower() not in registry.writers() and (out.has_slash or (out.local is not None and out.is_dir()))


def weights_in(out: FilePath) -> FilePath:
    """The file that an output means: in a folder for a model, model.safetensors; else the output itself.

    >>> from ckpt_surgeon.files.paths import file_path
    >>> weights_in(file_path("llama/"))
    LocalPath('llama/model.safetensors')
    """
    return out / WEIGHTS if is_model_folder(out) else out


def refuse_other(folder: FilePath) -> None:
    """Raise FileError for a folder that is a checkpoint of another kind, or a file where the folder should be."""
    local = folder.local
    if local is None or not local.lexists():
        return
    if not local.is_dir():
        raise FileError(folder, "is a file, and the slash behind it names a folder", "choose another name")
    distributed = [name for name in local.names() if name == dcp.METADATA or name.endswith(".distcp")]
    if distributed:
        problem = f"is a distributed checkpoint ({listed(distributed, 2)}), and {WEIGHTS} in it would be a second one"
        raise FileError(folder, problem, "write elsewhere")


def beside(source: FilePath | None) -> list[FilePath]:
    """The plain files beside a model's weights that are none: config, tokenizer, code; sorted by name.

    They are those of a folder with a config.json; other folders hold anything.  Hidden files count for nothing.
    """
    local = source.local if source is not None else None
    if local is None:
        return []
    folder = local if local.is_dir() else local.parent
    if not (folder / CONFIG).is_file():
        return []
    return [
        folder / name
        for name in folder.names()
        if not name.startswith(".") and not _TENSORS.fullmatch(name) and (folder / name).is_file()
    ]


def copied(source: FilePath | None) -> list[FilePath]:
    """The files that are copied beside an output.  Raises EditError where there are none, FileError for large ones."""
    found = beside(source)
    if not found:
        where = f"{source} has" if source is not None else "its input is no file and has"
        raise EditError([Phrase(f"{where} no {CONFIG} beside it, so no files that belong to a model: leave out ",
                                Argument("with_files", True))])  # fmt: skip
    for path in found:
        if path.size > LARGEST:
            raise FileError(path, f"is larger than {LARGEST >> 30} GiB, and no config", "copy it yourself")
    return found


def remarks(
    folder: FilePath, source: FilePath | None, written: Sequence[str], tensors: Mapping[str, Tensor]
) -> list[str]:
    """What is worth saying of a folder that was written: files that stay behind, other weights, another dtype."""
    local = folder.local
    found: list[str] = []
    here = os.path.realpath(local) if local is not None else ""
    names = local.names() if local is not None else []
    left = [path for path in beside(source) if path.name not in {*written, *names}]
    if left and os.path.realpath(str(left[0].parent)) != here:
        found.append(Phrase(f"left behind, beside {source}: {listed(path.name for path in left)}; copied by ",
                            Argument("with_files", True)))  # fmt: skip
    others = [name for name in names if _OTHER_WEIGHTS.fullmatch(name) and name not in written]
    if others:
        found.append(f"other weights are still in {folder}, and not changed: {listed(others)}")
    stated = _stated_dtype(folder) if CONFIG in names else ""
    dtypes = {tensor.dtype.name for tensor in tensors.values() if tensor.dtype.name in _FLOATS}
    if stated in _FLOATS and dtypes and stated not in dtypes:
        found.append(f"{CONFIG} says {stated}, and the weights are {', '.join(sorted(dtypes))}: loaded as it says")
    return found


def _stated_dtype(folder: FilePath) -> str:
    """The dtype that config.json names, "" where it names none."""
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
    except (OSError, ValueError, RecursionError, CheckpointError):
        return ""
    stated = config.get("dtype", config.get("torch_dtype")) if isinstance(config, dict) else None
    return stated if isinstance(stated, str) else ""
