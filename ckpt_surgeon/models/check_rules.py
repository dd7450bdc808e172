"""Rules that a checkpoint has to keep, as a TOML file says them; :mod:`.checking` tries them.

[file]
format = 'safetensors'
max_bytes = '5GB'
plain_data = true

[keys]
forbidden = 'module.*'

[tensors]
finite = '*'
dtypes = { '*.num_batches_tracked' = 'int64', '*' = 'bfloat16' }
shapes = { 'fc.weight' = [10, '*'] }

[model]
loads_into = 'model.py:SmallNet(num_classes=10)'
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from glob import escape
from typing import Any

from ..edits.recipe import line_of, parsed_toml, toml_value
from ..errors import RecipeError
from ..files import small
from ..files.paths import AnyPath, FilePath, file_path
from ..tensors import dtypes
from ..tensors.records import Tensor
from ..text import Shown, size_of

# What a file can be, as the containers call themselves.
FORMATS = ("safetensors", "torch zip", "torch legacy", "torch tar", "pickle", "TorchScript", "torch.package",
           "torch.export", "torch distributed", "Megatron-Core", "DeepSpeed")  # fmt: skip
SHOWN = 100  # characters of a rule that a summary shows
ANY = "*"  # a size in a shape that may be any

Shape = tuple[int | None, ...]


@dataclass(frozen=True, slots=True, repr=False)
class CheckRules(Shown):
    """What :func:`ckpt_surgeon.check` tries, one field for each rule; a rule that is not asked for is None or empty.

    Patterns are globs on keys.  ``dtypes`` and ``shapes`` go by pattern, and the first pattern that matches a key
    counts; a size None in a shape may be any.  ``str()`` of the rules is the TOML that they are read from.

    >>> rules = CheckRules.loads('''
    ... [keys]
    ... forbidden = "module.*"
    ... [tensors]
    ... shapes = { "fc.weight" = [10, "*"] }
    ... ''')
    >>> rules.forbidden, rules.shapes
    (('module.*',), {'fc.weight': (10, None)})
    >>> CheckRules.loads(rules.dumps()) == rules
    True
    """

    format: tuple[str, ...] = ()
    max_bytes: int | None = None
    plain_data: bool = False
    checksums: bool = False
    metadata: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    forbidden: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    finite: tuple[str, ...] = ()
    dtypes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    max_tensor_bytes: int | None = None
    max_parameters: int | None = None
    untied: bool = False
    loads_into: str = ""

    @property
    def asked(self) -> tuple[str, ...]:
        """The rules that are asked for, as a file names them: ``keys.forbidden``."""
        return tuple(rule.name for rule in RULES if getattr(self, rule.field))

    def summary(self) -> Iterator[tuple[str, str]]:
        """The rules that are asked for, and what they ask; of many patterns, how many there are."""
        for rule in RULES:
            if value := getattr(self, rule.field):
                is_several = isinstance(value, (tuple, Mapping))
                text = str(dict(value) if isinstance(value, Mapping) else list(value) if is_several else value)
                yield rule.name, f"{len(value):,} patterns" if is_several and len(text) > SHOWN else text[:SHOWN]

    def dumps(self) -> str:
        """The rules as TOML."""
        tables: dict[str, list[str]] = {}
        for rule in RULES:
            if value := getattr(self, rule.field):
                table, _, entry = rule.name.partition(".")
                tables.setdefault(table, []).append(_entry(table, entry, value))
        return "\n".join(_table(name, entries) for name, entries in tables.items())

    @classmethod
    def loads(cls, text: str, *, path: str | FilePath = "rules") -> CheckRules:
        """Read rules from TOML.  Raises RecipeError with all problems and their line numbers."""
        problems: list[str] = []
        values: dict[str, Any] = {}
        for table, entries in parsed_toml(text, path).items():
            if table not in TABLES or not isinstance(entries, dict):
                problem = f"unknown entry {table!r}{_meant(table, [*TABLES, *(rule.name for rule in RULES)])}"
                problems.append(f"line {_line(text, table)}: {problem}; the tables are {', '.join(TABLES)}")
                continue
            for entry, value in entries.items():
                try:
                    rule = _rule(table, entry)
                    values[rule.field] = rule.read(value)
                except ValueError as error:
                    problems.append(f"line {_line(text, table, entry)}: {error}")
        if not problems and not any(values.values()):
            problems.append("asks for nothing; rules are such as keys.required, tensors.finite, model.loads_into")
        if problems:
            raise RecipeError(path, problems)
        return cls(**values)

    @classmethod
    def load(cls, path: AnyPath) -> CheckRules:
        """Read rules from a file.  Raises FileError, RecipeError."""
        where = file_path(path)
        return cls.loads(small.read_text(where), path=where)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], *, format: str = "") -> CheckRules:
        """Rules that a checkpoint keeps and that others of its model have to: its keys, shapes and dtypes, finite.

        >>> import torch
        >>> from ckpt_surgeon import from_torch
        >>> print(CheckRules.of(from_torch({"fc.bias": torch.ones(2)})).dumps())
        [file]
        plain_data = true
        <BLANKLINE>
        [keys]
        required = ['fc.bias']
        only = ['fc.bias']
        <BLANKLINE>
        [tensors]
        finite = ['*']
        <BLANKLINE>
        [tensors.dtypes]
        'fc.bias' = ['float32']
        <BLANKLINE>
        [tensors.shapes]
        'fc.bias' = [2]
        <BLANKLINE>
        """
        keys = tuple(escape(key) for key in tensors)
        return cls(
            format=(format,) if format else (),
            plain_data=True,
            required=keys,
            only=keys,
            finite=("*",),
            dtypes={escape(key): (tensor.dtype.name,) for key, tensor in tensors.items()},
            shapes={escape(key): tuple(tensor.shape) for key, tensor in tensors.items()},
        )


@dataclass(frozen=True, slots=True)
class _Rule:
    """One rule: its name in a file, the field that holds it, and what reads its value or raises ValueError."""

    name: str
    field: str
    read: Callable[[object], object]


def _patterns(value: object) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(one, str) and one for one in values):
        raise ValueError(f"is a pattern or a list of patterns, not {value!r}")
    return tuple(values)


def _formats(value: object) -> tuple[str, ...]:
    for one in _patterns(value):
        if one not in FORMATS:
            raise ValueError(f"is one of {', '.join(FORMATS)}, not {one!r}{_meant(one, FORMATS)}")
    return _patterns(value)


def _truth(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"is true or false, not {value!r}")
    return value


def _size(value: object) -> int:
    found = value if type(value) is int else size_of(value) if isinstance(value, str) else None
    if found is None or found < 1:
        raise ValueError(f"is a number of bytes such as '5GB', not {value!r}")
    return found


def _count(value: object) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"is a number above 0, not {value!r}")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"is a model or a checkpoint as ckpt diff takes it, not {value!r}")
    return value


def _dtypes(value: object) -> dict[str, tuple[str, ...]]:
    return {pattern: _dtype_names(names) for pattern, names in _by_pattern(value, "a dtype or several")}


def _dtype_names(value: object) -> tuple[str, ...]:
    found = []
    for name in _patterns(value):
        try:
            found.append(dtypes.parse(name).name)
        except Exception as error:  # its own message names every dtype
            raise ValueError(f"has no dtype {name!r}{_meant(name, dtypes.BY_NAME)}") from error
    return tuple(found)


def _shapes(value: object) -> dict[str, Shape]:
    found: dict[str, Shape] = {}
    for pattern, sizes in _by_pattern(value, "a shape"):
        if not isinstance(sizes, list) or not all((type(one) is int and one >= 0) or one == ANY for one in sizes):
            raise ValueError(f"has for {pattern!r} a list of sizes such as [10, '*'], not {sizes!r}")
        found[pattern] = tuple(None if one == ANY else one for one in sizes)
    return found


def _by_pattern(value: object, what: str) -> Iterator[tuple[str, object]]:
    if not isinstance(value, dict):
        raise ValueError(f"is a table with {what} for each pattern, not {value!r}")
    yield from value.items()


RULES = (
    _Rule("file.format", "format", _formats),
    _Rule("file.max_bytes", "max_bytes", _size),
    _Rule("file.plain_data", "plain_data", _truth),
    _Rule("file.checksums", "checksums", _truth),
    _Rule("file.metadata", "metadata", _patterns),
    _Rule("keys.required", "required", _patterns),
    _Rule("keys.forbidden", "forbidden", _patterns),
    _Rule("keys.only", "only", _patterns),
    _Rule("tensors.max_bytes", "max_tensor_bytes", _size),
    _Rule("tensors.max_parameters", "max_parameters", _count),
    _Rule("tensors.untied", "untied", _truth),
    _Rule("tensors.finite", "finite", _patterns),
    _Rule("tensors.dtypes", "dtypes", _dtypes),
    _Rule("tensors.shapes", "shapes", _shapes),
    _Rule("model.loads_into", "loads_into", _text),
)
TABLES = tuple(dict.fromkeys(rule.name.partition(".")[0] for rule in RULES))


def _rule(table: str, entry: str) -> _Rule:
    """The rule of this name, whose messages begin with it.  Raises ValueError."""
    name = f"{table}.{entry}"
    found = next((rule for rule in RULES if rule.name == name), None)
    if found is None:
        there = [rule.name for rule in RULES if rule.name.startswith(f"{table}.")]
        raise ValueError(
            f"unknown rule {name!r}{_meant(name, [rule.name for rule in RULES])}; there are {', '.join(there)}"
        )

    def read(value: object) -> object:
        try:
            return found.read(value)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None

    return _Rule(name, found.field, read)


def _meant(word: str, known: Any) -> str:
    close = get_close_matches(word, list(known), n=2)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def _line(text: str, table: str, entry: str = "") -> int:
    """The line of a table, or of an entry in it: within its braces, or below its heading."""
    lines = text.splitlines()
    heads = (f"[{table}]", f"[{table}.", f"{table}=", f"{table}.")
    starts = (number for number, line in enumerate(lines, 1) if line.replace(" ", "").startswith(heads))
    start = next(starts, 1)
    if not entry:
        return start
    below = "\n".join(lines[start:])
    inner = line_of(below, 0, entry)
    is_there = below and entry in below.splitlines()[inner - 1]
    return start + inner if is_there else start


def _table(name: str, entries: list[str]) -> str:
    """One table; those inside it come behind its own entries."""
    plain = [entry for entry in entries if not entry.startswith("[")]
    inner = [entry for entry in entries if entry.startswith("[")]
    head = [f"[{name}]\n" + "\n".join(plain) + "\n"] if plain else []
    return "\n".join([*head, *(f"{entry}\n" for entry in inner)])


def _entry(table: str, entry: str, value: object) -> str:
    if not isinstance(value, Mapping):
        return f"{entry} = {toml_value(list(value) if isinstance(value, tuple) else value)}"
    rows = [f"{toml_value(pattern)} = {toml_value([ANY if one is None else one for one in found])}"
            for pattern, found in value.items()]  # fmt: skip
    return "\n".join([f"[{table}.{entry}]", *rows])
