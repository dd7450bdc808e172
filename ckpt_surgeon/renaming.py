"""The language of renames: path patterns with indices, and regular expressions, with arithmetic on both.

encoder=backbone            whole components, anywhere in a key
^model.encoder=encoder      at the beginning;  gamma$=weight  at the end
layers.{n}=blocks.{n+1}     an integer component, and arithmetic (+, -, *, // with one number) on it
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from .errors import EditError

Pair = tuple[str, str]

_INDEX = re.compile(r"\{([A-Za-z]\w*)\}")
_SUM = re.compile(r"\{([A-Za-z]\w*)\s*(?:(\+|-|\*|//)\s*(\d+))?\}")


def parse_pairs(pairs: Mapping[str, str] | Iterable[str] | Iterable[Pair]) -> list[Pair]:
    """Pairs of old and new from any spelling.  Raises EditError for one that is no pair.

    >>> parse_pairs(["a=b", ("c", "d")])
    [('a', 'b'), ('c', 'd')]
    """
    if isinstance(pairs, str):
        pairs = [pairs]
    parsed: list[Pair] = []
    problems = []
    for pair in pairs.items() if isinstance(pairs, Mapping) else pairs:
        if isinstance(pair, str):
            old, equals, new = pair.partition("=")
            if not equals or not old:
                problems.append(f"rename {pair!r} is not of the form OLD=NEW")
            parsed.append((old, new))
        else:
            old, new = pair
            parsed.append((old, new))
    if problems:
        raise EditError(problems)
    return parsed


class Rules:
    """Several renames, done together: each part of a key is renamed once, so that two names can be swapped.

    >>> rules = Rules([("a", "b"), ("b", "a")])
    >>> rules.new_name("a.b.weight")
    'b.a.weight'
    """

    def __init__(self, pairs: list[Pair], *, regex: bool = False) -> None:
        self._pairs = pairs
        self._regex = regex
        self._used: set[int] = set()
        problems = []
        self._patterns = []
        for index, (old, new) in enumerate(pairs):
            try:
                pattern = re.compile(old if regex else _path_pattern(old))
                _check_template(pattern, new, regex=regex)
                self._patterns.append(pattern)
            except (re.error, ValueError, IndexError) as error:
                problems.append(f"rename {index + 1} ({old!r} to {new!r}): {error}")
        if problems:
            raise EditError(problems)
        self._any = None if regex else _alternatives([pattern.pattern for pattern in self._patterns])

    @property
    def unused(self) -> list[str]:
        """The old names that no key has answered to."""
        return [old for index, (old, _) in enumerate(self._pairs) if index not in self._used]

    def new_name(self, key: str) -> str:
        """The new name of a key; its own, where no rule fits."""
        if self._regex:
            for index, pattern in enumerate(self._patterns):
                found = pattern.fullmatch(key)
                if found:
                    self._used.add(index)
                    return _expanded(found, self._pairs[index][1], regex=True)
            return key
        if self._any is None or not self._any.search(key):
            return key
        return self._replaced(key)

    def _replaced(self, key: str) -> str:
        """Replace from left to right; at each component the first rule that fits there wins."""
        pieces = []
        at = 0
        while at <= len(key):
            fitting = enumerate(self._patterns) if self._any and self._any.match(key, at) else ()
            for index, pattern in fitting:
                found = pattern.match(key, at)
                if found:
                    self._used.add(index)
                    new = _expanded(found, self._pairs[index][1], regex=False)
                    pieces += [new] if new else []  # components renamed to nothing take their dot with them
                    at = found.end() + 1
                    break
            else:
                stop = key.find(".", at)
                stop = len(key) if stop < 0 else stop
                pieces.append(key[at:stop])
                at = stop + 1
        if not pieces:
            raise EditError([f"{key!r} would be renamed to nothing"])
        return ".".join(pieces)


def _alternatives(patterns: list[str]) -> re.Pattern[str] | None:
    """One search that tells quickly whether any rule can fit; group names would clash, so they go."""
    if not patterns:
        return None
    return re.compile("|".join(re.sub(r"\(\?P<\w+>", "(?:", re.sub(r"\(\?P=\w+\)", r"\\d+", one)) for one in patterns))


def _path_pattern(old: str) -> str:
    """The regular expression of a path pattern: whole components, ``{n}`` an integer."""
    start, end = old.startswith("^"), old.endswith("$")
    body = old.removeprefix("^").removesuffix("$").strip(".")
    if not body:
        raise ValueError("the old name is empty")
    seen: set[str] = set()
    parts = []
    at = 0
    for found in _INDEX.finditer(body):
        parts.append(re.escape(body[at : found.start()]))
        name = found[1]
        parts.append(f"(?P={name})" if name in seen else rf"(?P<{name}>\d+)")
        seen.add(name)
        at = found.end()
    parts.append(re.escape(body[at:]))
    return ("^" if start else r"(?<![^.])") + "".join(parts) + ("$" if end else r"(?![^.])")


def _check_template(pattern: re.Pattern[str], new: str, *, regex: bool) -> None:
    """Raise ValueError for an index that the old name does not have, re.error for a bad group."""
    for found in _SUM.finditer(new):
        if found[1] not in pattern.groupindex:
            raise ValueError(f"{found[0]} in the new name has no {{{found[1]}}} in the old one")
    if regex:
        re.compile(f"(?:{pattern.pattern})|")
        re._parser.parse_template(_SUM.sub("", new), pattern)  # type: ignore[attr-defined]


def _expanded(found: re.Match[str], template: str, *, regex: bool) -> str:
    if "{" in template:
        template = _SUM.sub(lambda index: _computed(found, index), template)
    if regex and "\\" in template:
        return found.expand(template)
    return template


def _computed(found: re.Match[str], index: re.Match[str]) -> str:
    value = int(found[index[1]])
    number = int(index[3] or 0)
    result = {"+": value + number, "-": value - number, "*": value * number}.get(index[2] or "+", 0)
    if index[2] == "//":
        if number == 0:
            raise EditError([f"{index[0]} divides by zero"])
        result = value // number
    if result < 0:
        raise EditError([f"{found[0]!r}: {index[0]} gives {result}, and no component is negative"])
    return str(result)
