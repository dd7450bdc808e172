"""What a checkpoint's pickles name: a reader's report, not a malware scanner's.

This package never imports or calls any of these names.  A full ``torch.load(weights_only=False)`` imports them all
and calls most; here they are told apart by an allow-list of what is plainly data, and everything else is named.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..files.paths import AnyPath, FilePath
from ..formats.dcp import metadata
from ..formats.pickle import numpy_objects, torch_objects
from ..formats.pickle.values import Global
from ..tensors.dtypes import BY_NAME, BY_STORAGE
from ..text import Shown
from .opening import read

_BUILTINS = ("bytearray", "bytes", "str", "bool", "int", "float", "complex", "tuple", "range", "slice", "object",
             "long", "unicode", "xrange")  # fmt: skip
_DATA = (
    set(torch_objects.CONSTRUCTORS)
    | set(numpy_objects.CONSTRUCTORS)
    | set(metadata.CONSTRUCTORS)
    | {("torch", name) for name in BY_NAME}
    | {(module, name) for module in ("torch", "torch.cuda", "torch.storage") for name in BY_STORAGE}
    | {(module, name.replace("Storage", "Tensor")) for module in ("torch", "torch.cuda") for name in BY_STORAGE}
    | {("torch.storage", "UntypedStorage"), ("torch.storage", "TypedStorage"), ("torch.storage", "_load_from_bytes")}
    | {("torch", "UntypedStorage"), ("torch", "device"), ("torch", "Tensor"), ("torch", "Generator")}
    | {("torch.nn.parameter", "Parameter"), ("torch.nn.parameter", "Buffer"), ("torch.serialization", "_get_layout")}
    | {("numpy", "ndarray"), ("argparse", "Namespace"), ("collections", "Counter"), ("collections", "deque")}
    | {(builtins, name) for builtins in ("builtins", "__builtin__") for name in _BUILTINS}
    | {("datetime", name) for name in ("datetime", "date", "time", "timedelta", "timezone")}
    | {
        ("pathlib", name)
        for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
    }
    | {("pathlib._local", name) for name in ("PosixPath", "WindowsPath")}
    | {("decimal", "Decimal"), ("fractions", "Fraction"), ("uuid", "UUID")}
)


@dataclass(frozen=True, slots=True, repr=False)
class Name(Shown):
    """One name in a pickle; ``verdict`` completes "a full torch.load would …"."""

    name: str
    is_data: bool

    @property
    def verdict(self) -> str:
        return "build plain data" if self.is_data else "import it, and may run it"


@dataclass(frozen=True, slots=True, repr=False)
class Scan(Shown):
    """Every name that a checkpoint's pickles mention, in order."""

    path: FilePath
    container: str
    names: tuple[Name, ...]

    @property
    def suspects(self) -> tuple[str, ...]:
        """The names that are not plainly data."""
        return tuple(one.name for one in self.names if not one.is_data)


def scan(path: AnyPath) -> Scan:
    """List the names in a checkpoint's pickles; ``path`` names its file.

    Raises what :func:`ckpt_surgeon.open` raises for broken files.

    >>> import ckpt_surgeon, torch
    >>> torch.save(torch.nn.Linear(2, 2), "whole.pt")
    >>> ckpt_surgeon.scan("whole.pt").suspects
    ('torch.nn.modules.linear.Linear',)
    """
    contents = read(path)
    found = dict.fromkeys((*contents.globals, *contents.globals_inside()))
    names = tuple(Name(str(one), _is_data(one)) for one in found)
    return Scan(contents.path, contents.container, names)


def _is_data(one: Global) -> bool:
    return (one.module, one.name) in _DATA
