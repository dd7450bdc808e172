"""Libraries that know models by name: imported when one is named, and kept from the network."""

from __future__ import annotations

from contextlib import AbstractContextManager
from importlib import import_module
from types import ModuleType

from ..errors import TargetError


def library(target: str, name: str) -> ModuleType:
    """Import the library that a short spelling needs.  Raises TargetError where it is not installed.

    >>> library("timm:resnet50", "timm").__name__
    'timm'
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        problem = f"needs {missing}, which is not installed"
        raise TargetError(target, problem, remedy=f"pip install {missing.partition('.')[0]}") from error


def nothing_fetched() -> AbstractContextManager[object]:
    """Keep the hub's client from the network for a while: what a model's constructor asks it for is an error.

    >>> with nothing_fetched():
    ...     pass
    """
    from unittest.mock import patch

    try:
        constants = import_module("huggingface_hub.constants")
    except ImportError:
        return patch.dict({})
    return patch.object(constants, "HF_HUB_OFFLINE", True)
