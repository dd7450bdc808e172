"""The examples in the docstrings do what they show."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import ckpt_surgeon


def examples() -> list[doctest.DocTest]:
    """Every docstring with an example, of every module of the package."""
    found = pkgutil.walk_packages(ckpt_surgeon.__path__, "ckpt_surgeon.")
    names = ["ckpt_surgeon", *(module.name for module in found if not module.name.endswith("__main__"))]
    finder = doctest.DocTestFinder(exclude_empty=True)
    tests = [test for name in names for test in finder.find(importlib.import_module(name))]
    return [test for test in tests if test.examples]


@pytest.mark.parametrize("example", [pytest.param(one, id=one.name) for one in examples()])
def test_an_example_does_what_it_shows(
    example: doctest.DocTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # examples write files
    said: list[str] = []
    outcome = doctest.DocTestRunner(verbose=False).run(example, out=said.append)
    assert outcome.failed == 0, "".join(said)
    assert outcome.attempted > 0


@pytest.mark.parametrize("name", ["open", "load", "strip_prefix", "diff", "save", "convert", "ls"])
def test_the_main_functions_have_an_example(name: str) -> None:
    assert ">>>" in (getattr(ckpt_surgeon, name).__doc__ or "")
