"""The suite itself: what its modules share is in tests/support, and every test can be run alone."""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).parent


def test_no_module_of_tests_imports_another_one() -> None:
    names = {path.stem for path in TESTS.rglob("test_*.py")} | {"tests"}
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                imported = {(node.module or "").partition(".")[0]}
            elif isinstance(node, ast.Import):
                imported = {name.name.partition(".")[0] for name in node.names}
            else:
                continue
            assert imported.isdisjoint(names), f"{path.relative_to(TESTS)}: what tests share belongs into tests/support"
