"""The arguments of edits: their types, and what each type is in Python, in a recipe and on a command line.

An edit declares an argument once, as a parameter ``name: Annotated[TYPE, "Help."] = DEFAULT``.  TYPE is one of
:data:`KINDS`, or a ``Literal`` of strings for one of several words.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from difflib import get_close_matches
from os import PathLike
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args, get_origin, get_type_hints

from .. import errors
from ..errors import Phrase
from ..tensors.dtypes import DType
from ..tensors.dtypes import parse as parse_dtype

Patterns = str | Iterable[str]
Pairs = Mapping[str, str] | Iterable[str] | Iterable[tuple[str, str]]
Numbers = Mapping[str, int] | Iterable[tuple[str, int]]

if TYPE_CHECKING:
    import numpy
    import torch

    DTypeLike = str | DType | torch.dtype | numpy.dtype | type
    Input = Mapping[str, Any] | str | PathLike[str] | torch.nn.Module
else:
    DTypeLike = str | DType | type  # those of torch and numpy are known by their names
    Input = Mapping[str, Any] | str | PathLike[str]


@dataclass(frozen=True, slots=True)
class Kind:
    """One type of arguments.

    ``plain`` is a Python value as a recipe file holds it, and raises TypeError for a value of another type, ValueError
    with the reason for one that cannot be.  ``from_text`` reads a command line's text.  ``normal`` is a plain value in
    the one spelling that equal arguments share.
    """

    title: str  # "a list of integers"
    plain: Callable[[object], object]
    from_text: Callable[[str], object] = str
    normal: Callable[[object], object] = lambda value: value
    metavar: str = "TEXT"
    choices: tuple[str, ...] = ()


def _scalar(value: object) -> object:
    """A scalar of numpy or torch as Python's own."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _exactly(*types: type) -> Callable[[object], object]:
    def plain(value: object) -> object:
        found = _scalar(value)
        if type(found) not in types:
            raise TypeError
        return found

    return plain


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return str(value)


def _items(value: object, item: Callable[[object], object]) -> list[object]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise TypeError
    made = [item(one) for one in value]
    return sorted(made, key=repr) if isinstance(value, Set) and not isinstance(value, Mapping) else made


def _patterns(value: object) -> object:
    return str(value) if isinstance(value, str) else _items(value, _text)


def _pair(value: object) -> object:
    if isinstance(value, str):
        return str(value)
    pair = _items(value, _text)
    if len(pair) != 2:
        raise TypeError
    return pair


def _pairs(value: object) -> object:
    if isinstance(value, str):
        return [str(value)]
    return _items(value.items() if isinstance(value, Mapping) else value, _pair)


def _numbered(value: object) -> object:
    pair = _items(value, _scalar)
    if len(pair) != 2 or not isinstance(pair[0], str) or type(pair[1]) is not int:
        raise TypeError
    return pair


def _dtype(value: object) -> str:
    found = parse_dtype(value)
    return value if isinstance(value, str) else found.name


def _integers_of(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{text!r} is no list of integers; write it like 64,3,7,7") from None


def _numbers_of(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{text!r} is no list of numbers; write it like 0.5,0.3,0.2") from None


def _truth_of(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(f"{text!r} is neither true nor false")
    return text == "true"


PATTERNS = Kind("a string or a list of strings", _patterns, normal=lambda value: [value] if isinstance(value, str)
                else value, metavar="GLOB")  # fmt: skip
PAIRS = Kind("a list of [old, new] pairs", _pairs, lambda text: [text], metavar="OLD=NEW")
NUMBERS = Kind(
    "a list of [regular expression, number] pairs",
    lambda value: _items(value.items() if isinstance(value, Mapping) else value, _numbered),
    metavar="REGEX N",
)
INPUT = Kind("the name of an input", _text, metavar="INPUT")  # in Python the checkpoint itself, or its path
INPUTS = Kind("names of inputs", lambda value: _items(value, _text), lambda text: text.split(","), metavar="INPUT,…")
TRUTH = Kind("true or false", _exactly(bool), _truth_of, metavar="true|false")

KINDS: dict[object, Kind] = {
    str: Kind("a string", _text),
    bool: TRUTH,
    int: Kind("an integer", _exactly(int), int, metavar="N"),
    float: Kind("a number", _exactly(int, float), float, normal=lambda value: float(str(value)), metavar="X"),
    Patterns: PATTERNS,
    Sequence[str]: Kind(
        "a list of strings", lambda value: _items(value, _text), lambda text: list(text.split(",")), metavar="KEY,KEY"
    ),
    Sequence[int]: Kind("a list of integers", lambda value: _items(value, _exactly(int)), _integers_of, metavar="N,N"),
    Sequence[float]: Kind("a list of numbers", lambda value: _items(value, _exactly(int, float)), _numbers_of,
                          normal=lambda value: [float(str(item)) for item in cast("list[object]", value)],
                          metavar="X,X"),
    Pairs: PAIRS,
    Numbers: NUMBERS,
    Input: INPUT,
    DTypeLike: Kind("a dtype (a name as bf16, torch.bfloat16, a numpy dtype)", _dtype, metavar="DTYPE"),
}  # fmt: skip


def _kind(hint: object) -> Kind:
    if get_origin(hint) is Literal:
        words = get_args(hint)
        return Kind(f"one of {', '.join(words)}", _text, choices=words, metavar="|".join(words))
    return KINDS[hint]


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of an edit, by the name that recipes use."""

    name: str
    kind: Kind
    help: str
    default: object
    hint: object  # the type, without the help

    @property
    def is_required(self) -> bool:
        """Whether there is no default."""
        return self.default is inspect.Parameter.empty

    @property
    def is_input(self) -> bool:
        """Whether it stands for other checkpoints."""
        return self.kind in (INPUT, INPUTS)

    def plain(self, value: object) -> object:
        """A value as a recipe holds it.  Raises ValueError with a message that names the argument."""
        try:
            made = self.kind.plain(value)
        except TypeError:
            raise ValueError(f"should be {self.kind.title}, not {value!r}") from None
        if self.kind.choices and made not in self.kind.choices:
            *others, last = self.kind.choices
            raise Unknown(Phrase(errors.Argument(self.name), f" is {', '.join(others)} or {last}, not {value!r}",
                                 _instead(str(made), self.kind.choices)))  # fmt: skip
        return made


def problem_of(edit: str, name: str, error: ValueError) -> str:
    """What is wrong with an argument of an edit, as an error says it."""
    if isinstance(error, Unknown):
        return error.sentence
    text = str(error)
    return f"{name} of {edit} {text}" if text.startswith("should be") else text


class Unknown(ValueError):
    """A word that is none of those that there are; ``sentence`` says which there are."""

    def __init__(self, sentence: Phrase) -> None:
        super().__init__(sentence)
        self.sentence = sentence


def _instead(word: str, known: Iterable[str]) -> str:
    close = get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def recipe_name(name: str) -> str:
    """The name of an argument in a recipe: without the underscore that keeps it from being Python's own word."""
    return name.removesuffix("_")


def declared(function: Callable[..., object]) -> dict[str, Argument]:
    """The arguments that an edit's function declares, the state_dict apart, by the names of its parameters."""
    hints = get_type_hints(function, include_extras=True)
    found = {}
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        hint, text = _parted(hints[parameter.name])
        name = recipe_name(parameter.name)
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:  # any number of other checkpoints
            found[parameter.name] = Argument(name, INPUTS, text, (), hint)
            continue
        found[parameter.name] = Argument(name, _kind(hint), text, parameter.default, hint)
    return found


def _parted(hint: object) -> tuple[object, str]:
    """A type and its help."""
    if get_origin(hint) is not Annotated:
        raise TypeError(f"{hint} has no help: write Annotated[TYPE, 'Help.']")
    plain, text, *_ = get_args(hint)
    return plain, text
