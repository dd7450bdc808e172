"""Evidence of siblings: where a module's keys went, its other keys go too."""

from __future__ import annotations

from .parts import parent
from .results import CERTAINTIES
from .state import State


def siblings(state: State) -> None:
    """Settle the open keys of a module that others of its keys settled, if all of those agree.

    They are as sure as the least sure of these.
    """
    homes: dict[str, set[str]] = {}
    sure: dict[str, int] = {}
    for one in state.settled.values():
        if one.certainty in CERTAINTIES:
            module = parent(state.spelling[one.old])
            homes.setdefault(module, set()).add(parent(state.wanted_spelling[one.new]))
            sure[module] = min(sure.get(module, len(CERTAINTIES)), CERTAINTIES.index(one.certainty))
    open_keys = {key for one in state.ambiguous for key in one.olds}
    for old in list(state.olds):
        module, _, leaf = state.spelling[old].rpartition(".")
        found = homes.get(module, set())
        if old in open_keys or len(found) != 1:
            continue
        home = next(iter(found))
        new = state.by_spelling.get(f"{home}{'.' if home else ''}{leaf}")
        if new in state.news and state.fits(old, new):
            state.settle(old, new, "goes with its module", CERTAINTIES[sure[module]])
