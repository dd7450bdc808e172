"""What a lower folder asks of a higher one that it must not import.

The package's ``__init__`` names who answers; the answer's module is imported when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Callable

Answer = Callable[..., object]

_PROVIDERS: dict[str, Callable[[], Answer]] = {}


def provide(question: str, provider: Callable[[], Answer]) -> None:
    """Name what returns the function that answers a question.

    >>> provide("greeting", lambda: "hello {}".format)
    >>> answer("greeting")("you")
    'hello you'
    """
    _PROVIDERS[question] = provider


def answer(question: str) -> Answer:
    """The function that answers a question.  Raises KeyError where nobody does."""
    return _PROVIDERS[question]()
