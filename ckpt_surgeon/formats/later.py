"""Modules that are imported when something of them is asked for: a file is read by one reader of many."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


class Later:
    """Stands for a module of this package until an attribute of it is asked for.

    >>> Later(".torch_legacy").CONTAINER
    'torch legacy'
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> object:
        found: object = getattr(self.module(), attribute)
        return found

    def module(self) -> ModuleType:
        """The module itself."""
        return import_module(self._name, __package__)
