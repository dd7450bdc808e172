"""The settings that PEFT keeps beside an adapter: adapter_config.json becomes part of the adapter's metadata."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ..errors import CheckpointError
from ..files.paths import FilePath
from ..formats.contents import Contents
from ..tensors.checkpoint import PEFT_CONFIG

MARKS = ("lora_", "hada_", "lokr_", "token_adapter")  # in the name of a tensor of each kind of adapter
LIMIT = 1 << 20  # bytes; PEFT's own have some hundred


def with_adapter_config(contents: Contents) -> Contents:
    """What an adapter's file holds, with the adapter_config.json beside it as ``metadata["adapter_config.json"]``.

    Files that hold no adapter, and adapters that carry their settings themselves, come back as they are.
    """
    root = contents.root
    if PEFT_CONFIG in contents.metadata or not isinstance(root, dict) or not _is_adapter(root):
        return contents
    beside = contents.path.parent / PEFT_CONFIG
    text = _text(beside)
    return replace(contents, metadata={**contents.metadata, PEFT_CONFIG: text}) if text else contents


def _is_adapter(keys: Iterable[object]) -> bool:
    return any(isinstance(key, str) and any(mark in key for mark in MARKS) for key in keys)


def _text(path: FilePath) -> str:
    """The text of a small file, "" where there is none."""
    try:
        if not path.is_file() or path.size > LIMIT:
            return ""
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError, CheckpointError):  # an adapter is opened without them, too
        return ""
