"""The language of renames: path patterns with indices, and regular expressions, with arithmetic on both.

encoder=backbone            whole components, anywhere in a key
^model.encoder=encoder      at the beginning;  gamma$=weight  at the end
layers.{n}=blocks.{n+1}     an integer component, and arithmetic (+, -, *, // with one number) on it
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from ..errors import EditError
from . import search_limits
from .search_limits import endless_search, time_limit

Pair = tuple[str, str]

_INDEX = re.compile(r"\{([A-Za-z]\w*)\}")
_SUM = re.compile(r"\{([A-Za-z]\w*)\s*(?:(\+|-|\*|//)\s*([0-9]{1,18}))?\}")
_NOTHING = re.compile("")
_NUMBER = re.compile("[0-9]{1,18}")  # digits; Python refuses to compute with thousands of them


def parse_pairs(pairs: Mapping[str, str] | Iterable[str] | Iterable[Pair], *, regex: bool = False) -> list[Pair]:
    """Pairs of old and new from any spelling.  Raises EditError for one that is no pair.

    With ``regex`` a string is parted at its last ``=``: lookarounds have some of their own.

    >>> parse_pairs(["a=b", ("c", "d")])
    [('a', 'b'), ('c', 'd')]
    """
    if isinstance(pairs, str):
        pairs = [pairs]
    parsed: list[Pair] = []
    problems = []
    for pair in pairs.items() if isinstance(pairs, Mapping) else pairs:
        if isinstance(pair, str):
            old, equals, new = pair.rpartition("=") if regex else pair.partition("=")
            if not equals or not old:
                problems.append(f"rename {pair!r} is not of the form OLD=NEW")
            parsed.append((old, new))
        elif len(pair) == 2:
            parsed.append((pair[0], pair[1]))
        else:
            problems.append(f"rename {pair!r} is no pair of old and new")
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
        self._searching = (0, "")  # the rule and the key that are being tried
        problems = []
        self._exact: dict[str, int] = {}  # whole keys, which are many where a recipe was inverted
        self._patterns: dict[int, re.Pattern[str]] = {}
        for index, (old, new) in enumerate(pairs):
            try:
                exact = None if regex else _whole_key(old)
                pattern = _NOTHING if exact else re.compile(old if regex else _path_pattern(old))
                _check_template(pattern, new, regex=regex)
                if exact:
                    self._exact.setdefault(exact, index)
                else:
                    self._patterns[index] = pattern
            except (re.error, ValueError, IndexError) as error:
                problems.append(f"rename {index + 1} ({old!r} to {new!r}): {error}")
        if problems:
            raise EditError(problems)
        self._any = None if regex else _alternatives([pattern.pattern for pattern in self._patterns.values()])

    @property
    def unused(self) -> list[str]:
        """The old names that no key has answered to."""
        return [old for index, (old, _) in enumerate(self._pairs) if index not in self._used]

    def new_names(self, keys: Iterable[str]) -> dict[str, str]:
        """The new name of each key.  Raises EditError naming all keys that cannot have one."""
        new: dict[str, str] = {}
        problems: list[str] = []
        limit = search_limits.SECONDS * len(self._patterns) if self._regex else 0.0
        keys = list(keys) if limit else keys
        try:
            if limit and (found := endless_search([one.pattern for one in self._patterns.values()], keys, limit)):
                self._searching = (list(self._patterns)[found[0]], found[1])
                raise TimeoutError
            with time_limit(limit):
                for key in keys:
                    try:
                        new[key] = self.new_name(key)
                    except EditError as error:
                        problems += error.problems
        except TimeoutError:
            raise self._endless() from None
        if problems:
            raise EditError(problems)
        return new

    def _endless(self) -> EditError:
        """The error for rules whose search takes longer than it may."""
        index, key = self._searching
        problem = f"rename {index + 1} ({self._pairs[index][0]!r}) searches without end in the key {key[:80]!r}"
        return EditError([problem], remedy="write it without one repetition inside of another")

    def new_name(self, key: str) -> str:
        """The new name of a key; its own, where no rule fits."""
        if self._regex:
            for index, pattern in self._patterns.items():
                self._searching = (index, key)
                found = pattern.fullmatch(key)
                if found:
                    self._used.add(index)
                    return _expanded(found, self._pairs[index][1], regex=True)
            return key
        exact = self._exact.get(key)
        if exact is not None and not any(rule < exact and one.match(key) for rule, one in self._patterns.items()):
            self._used.add(exact)
            new = self._pairs[exact][1]
            if not new:
                raise _to_nothing(key)
            return new
        if self._any is None or not self._any.search(key):
            return key
        return self._replaced(key)

    def _replaced(self, key: str) -> str:
        """Replace from left to right; at each component the first rule that fits there wins."""
        pieces = []
        at = 0
        while at <= len(key):
            fitting = self._patterns.items() if self._any and self._any.match(key, at) else ()
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
            raise _to_nothing(key)
        return ".".join(pieces)


def _to_nothing(key: str) -> EditError:
    return EditError([f"{key!r} would be renamed to nothing"])


def _whole_key(old: str) -> str | None:
    """The one key that a path pattern names, where it is ``^`` and ``$`` around plain text."""
    if old.startswith("^") and old.endswith("$") and not _INDEX.search(old):
        return old[1:-1].strip(".")
    return None


def _alternatives(patterns: list[str]) -> re.Pattern[str] | None:
    """One search that tells quickly whether any rule can fit; group names would clash, so they go."""
    if not patterns:
        return None
    return re.compile("|".join(re.sub(r"\(\?P<\w+>", "(?:", re.sub(r"\(\?P=\w+\)", "[0-9]+", one)) for one in patterns))


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
        parts.append(f"(?P={name})" if name in seen else f"(?P<{name}>[0-9]+)")
        seen.add(name)
        at = found.end()
    parts.append(re.escape(body[at:]))
    return ("^" if start else r"(?<![^.])") + "".join(parts) + (r"\Z" if end else r"(?![^.])")


def _check_template(pattern: re.Pattern[str], new: str, *, regex: bool) -> None:
    """Raise ValueError for an index that the old name does not have or that is none, re.error for a bad group."""
    for text, index in _parts(new):
        if index and index[1] not in pattern.groupindex:
            raise ValueError(f"{index[0]} in the new name has no {{{index[1]}}} in the old one")
        if "{" in text or "}" in text:
            raise ValueError(f"{text!r} in the new name has a brace that is no index like {{n}} or {{n+1}}")
        if index and index[2] == "//" and not int(index[3]):
            raise ValueError(f"{index[0]} divides by zero")
        if regex:
            re._parser.parse_template(text, pattern)  # type: ignore[attr-defined]


def _parts(template: str) -> Iterator[tuple[str, re.Match[str] | None]]:
    """The plain texts of a new name, each with the index that follows it; the last has none."""
    at = 0
    for index in _SUM.finditer(template):
        yield template[at : index.start()], index
        at = index.end()
    yield template[at:], None


def _expanded(found: re.Match[str], template: str, *, regex: bool) -> str:
    if "{" not in template:
        return found.expand(template) if regex and "\\" in template else template
    texts = ((_expanded(found, text, regex=regex), index) for text, index in _parts(template))
    return "".join(text + (_computed(found, index) if index else "") for text, index in texts)


def _computed(found: re.Match[str], index: re.Match[str]) -> str:
    text = found[index[1]] or ""
    if not index[2]:
        return text
    if not _NUMBER.fullmatch(text):
        raise EditError([f"{found[0]!r}: {text!r} is no number to compute {index[0]} with"])
    value, number = int(text), int(index[3])
    result = {"+": value + number, "-": value - number, "*": value * number}.get(index[2])
    if result is None:
        result = value // number
    if result < 0:
        raise EditError([f"{found[0]!r}: {index[0]} gives {result}, and no component is negative"])
    return str(result)
