"""Evidence of whole names: the same key, and another spelling of it that is known."""

from __future__ import annotations

from .shapes import reshapes
from .state import State


def same_names(state: State) -> None:
    """Settle the keys that both sides have in one shape, and those that only a known spelling tells apart."""
    for key in list(state.olds):
        if key in state.news and state.fits(key, key) and state.alike(key, key):
            state.settle(key, key, "same key", "certain")
    for key in list(state.olds):
        new = state.by_spelling.get(state.spelling[key])
        if new in state.news and state.alike(key, new) and (state.fits(key, new) or reshapes(*state.shapes(key, new))):
            state.settle(key, new, "another spelling of the same key", "certain")


def is_denied(state: State, old: str, new: str) -> bool:
    """Whether one side has a key of the other one's name that fits: a key is not given away by other evidence."""
    if state.spelling[old] == state.wanted_spelling[new]:
        return False
    own = state.by_spelling.get(state.spelling[old])
    if (own is not None and own != new and state.fits(old, own)) or (
        old in state.target and old != new and state.fits(old, old)
    ):
        return True
    return new in state.source and new != old and state.fits(new, new)
