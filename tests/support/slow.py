"""Which tests ``make quick`` leaves out: those that start processes or servers, fuzz, or read real checkpoints."""

from __future__ import annotations

import inspect
from types import CodeType, FunctionType

import pytest

# Fixtures that start processes or servers.
FIXTURES = frozenset({"ckpt_process", "limited", "site", "bucket", "s3_endpoint", "by_four", "saved_dtensors"})
# What a test, or a function of its module that it calls, starts processes with.
STARTERS = frozenset({"subprocess", "multiprocessing", "loaded_by", "loaded_by_all", "loaded_after"})


def is_slow(item: pytest.Item) -> bool:
    """Whether a test does more than compute in this process."""
    if item.get_closest_marker("real") or FIXTURES & set(getattr(item, "fixturenames", ())):
        return True
    test = getattr(item, "function", None)
    if getattr(test, "is_hypothesis_test", False):
        return True
    return isinstance(test, FunctionType) and starts_a_process(inspect.unwrap(test))


def starts_a_process(function: FunctionType) -> bool:
    """Whether a function, or one of the same module that it names, names what starts a process."""
    names = function.__globals__
    waiting, seen = [function], set[str]()
    while waiting:
        used = names_in(waiting.pop().__code__)
        if used & STARTERS:
            return True
        called = (names.get(name) for name in used - seen)
        waiting += [one for one in called if isinstance(one, FunctionType) and one.__globals__ is names]
        seen |= used
    return False


def names_in(code: CodeType) -> set[str]:
    """The names that a function uses, and those of the functions inside it."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(names_in, inner))
