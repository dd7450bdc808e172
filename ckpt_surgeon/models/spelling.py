"""How a target is written: ``package.module:factory`` or ``path/file.py:factory``, with literal arguments."""

from __future__ import annotations

import ast
import difflib
import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import TargetError, listed, text_of

NAME = r"[^\W\d]\w*"
DOTTED = rf"{NAME}(?:\.{NAME})*"
SPELLING = re.compile(rf"(?P<source>{DOTTED}|.+\.py):(?P<path>{DOTTED})(?P<call>\s*\(.*)?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Spelling:
    """A target taken apart; ``called`` tells ``f()`` from ``f``."""

    source: str
    path: str
    called: bool
    args: tuple[object, ...] = ()
    kwargs: Mapping[str, object] | None = None

    @property
    def file(self) -> Path | None:
        return Path(self.source) if self.source.endswith(".py") else None


def parsed(target: str) -> Spelling:
    """Take a target apart.  Raises TargetError for another spelling.

    >>> parsed("torch.nn:Linear(3, 2)").args
    (3, 2)
    """
    match = SPELLING.fullmatch(target)
    if match is None:
        problem = "is not spelled package.module:factory or path/file.py:factory, either with (arguments) or without"
        raise TargetError(target, problem)
    source, path, call = match["source"], match["path"], match["call"]
    if call is None:
        return Spelling(source, path, called=False)
    return Spelling(source, path, True, *arguments_of(target, call))


def arguments_of(target: str, call: str) -> tuple[tuple[object, ...], dict[str, object]]:
    """Read the arguments in ``call``, parentheses and all.  Raises TargetError for all but literals.

    >>> arguments_of("m:f(1, n=2)", "(1, n=2)")
    ((1,), {'n': 2})
    """
    text = f"f{call.strip()}"
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise TargetError(target, f"the arguments cannot be read: {text_of(error)}") from error
    if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name):
        raise TargetError(target, "nothing may follow the arguments")
    names = [keyword.arg for keyword in tree.keywords]
    twice = {name for name in names if name is not None and names.count(name) > 1}
    if twice:
        raise TargetError(target, f"the argument {listed(sorted(twice))} is given twice")
    args = tuple(_literal(target, text, argument) for argument in tree.args)
    return args, {str(keyword.arg): _literal(target, text, keyword) for keyword in tree.keywords}


def _literal(target: str, text: str, argument: ast.expr | ast.keyword) -> object:
    """The value of one argument."""
    node = argument.value if isinstance(argument, ast.keyword) else argument
    try:
        if isinstance(argument, ast.keyword) and argument.arg is None:
            raise ValueError("** is not a literal")
        value: object = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        spelled = textwrap.shorten(str(ast.get_source_segment(text, argument)), 80, placeholder="…")
        allowed = (
            "only literals are allowed: numbers, strings, True, False, None, and lists, tuples, dicts, sets of them"
        )
        problem = f"the argument {spelled} is not a literal; {allowed}; for more, write a factory in a file of your own"
        raise TargetError(target, problem) from error
    return value


def instead(name: str, there: Iterable[str]) -> str:
    """What to write instead of a name that is not there.

    >>> instead("resnet81", ["resnet18", "vgg16"]), instead("bert", ["resnet18", "vgg16"]), instead("bert", [])
    ("; did you mean 'resnet18'?", "; there are 'resnet18', 'vgg16'", '')
    """
    names = list(there)
    close = difflib.get_close_matches(name, names)
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    return f"; there are {listed(names)}" if names else ""
