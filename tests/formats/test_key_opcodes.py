"""Keys said anew in a pickle: Python's own unpickler finds them, and everything else as it was."""

from __future__ import annotations

import pickle
import pickletools
import tracemalloc
from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_surgeon.formats.pickle.key_opcodes import KeyUnpickler
from ckpt_surgeon.formats.pickle.values import Ordered

POOL = [
    "",
    "0",
    "weight",
    "module.fc.weight",
    "größe.重み",
    "line\nbreak \\u0041",
    "x" * 255,
    "y" * 256,
    "\udc80",
]
NEW = [*POOL, "n", "fc.weight", "a much longer name than there was", "ß" * 200]


def fresh(word: str) -> str:
    """Another object with the same characters: the pickler says it anew instead of fetching it from its memo."""
    return "".join([word[:1], word[1:]]) if len(word) > 1 else word


WORDS = st.sampled_from(POOL) | st.sampled_from(POOL).map(fresh)
DICTS = st.dictionaries(WORDS, WORDS | st.integers(), max_size=6)


def renamed(raw: bytes, path: str, names: dict[str, str], *, lean: bool = False) -> bytes:
    """The pickle with other keys in the dict at ``path``."""
    unpickler = KeyUnpickler(raw)
    root = unpickler.load()
    assert isinstance(root, dict)
    node = root[path]
    assert isinstance(node, dict)
    texts = {place: names[key] for key in node for place in unpickler.places(node, str(key))}
    return unpickler.rewritten(texts, lean=lean)


@given(
    first=DICTS,
    model=DICTS,
    last=DICTS,
    listed=st.lists(WORDS, max_size=5),
    protocol=st.integers(0, 5),
    lean=st.booleans(),
    data=st.data(),
)
def test_only_the_keys_of_one_dict_change(
    first: dict[str, object],
    model: dict[str, object],
    last: dict[str, object],
    listed: list[str],
    protocol: int,
    lean: bool,
    data: st.DataObject,
) -> None:
    new = data.draw(st.lists(st.sampled_from(NEW), min_size=len(model), max_size=len(model), unique=True))
    names = dict(zip(model, new, strict=True))
    root = {"first": first, "names": listed, "model": model, "again": listed, "last": last}
    made = renamed(pickle.dumps(root, protocol), "model", names, lean=lean)
    found = pickle.loads(made)
    renamed_model = {names[key]: value for key, value in model.items()}
    assert found == {**root, "model": renamed_model}
    assert list(found["model"].items()) == list(renamed_model.items())
    assert list(map(list, (found["first"], found["last"]))) == list(map(list, (first, last)))
    assert found["names"] is found["again"]


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_without_other_names_stays_as_it_is_but_for_its_frames(protocol: int) -> None:
    raw = pickle.dumps({"model": {"a": 1, "b": {"a": "b"}}, "list": list(range(1000))}, protocol)
    unpickler = KeyUnpickler(raw)
    unpickler.load()
    frames = [at for op, _, at in pickletools.genops(raw) if op.name == "FRAME" and at is not None]
    assert bool(frames) == (protocol >= 4)
    for at in reversed(frames):
        raw = raw[:at] + raw[at + 9 :]
    assert unpickler.rewritten({}) == raw


@pytest.mark.parametrize("protocol", range(4))
def test_what_the_memo_does_not_need_makes_room(protocol: int) -> None:
    shared = "said twice".replace(" ", "_")
    root = {"model": {shared: [1], "b": (2, 3)}, "names": [shared]}
    raw = pickle.dumps(root, protocol)
    made = renamed(raw, "model", {shared: shared, "b": "b"}, lean=True)
    assert pickle.loads(made) == root
    puts = [op.name for op, _, _ in pickletools.genops(made) if op.name in ("PUT", "BINPUT", "LONG_BINPUT")]
    assert len(puts) == 1, "the one that is fetched"
    assert len(made) < len(raw)


# Made by hand, as no pickler of today writes them: the pickle, and the same with "old" called "new".
ODD: dict[str, tuple[bytes, dict[str, object]]] = {
    "a key that is set again": (b"\x80\x02}X\x03\0\0\0oldK\x01sX\x03\0\0\0oldK\x02s.", {"new": 2}),
    "a memo number used again": (
        b"\x80\x02}(X\x03\0\0\0oldq\x01h\x01X\x01\0\0\0aq\x01h\x01u.",
        {"new": "old", "a": "a"},
    ),
    "a fetched string kept under another number": (
        b"\x80\x02}(X\x01\0\0\0aX\x03\0\0\0oldq\x01h\x01q\x02h\x02u.",
        {"a": "old", "new": "old"},
    ),
    "a dict from a mark": (b"(S'old'\nI1\nS'b'\nV old\nd.", {"new": 1, "b": " old"}),
    "a short string of Python 2": (b"\x80\x02}U\x03oldK\x01s.", {"new": 1}),
    "a long string of Python 2": (b"\x80\x02}T\x03\0\0\0oldK\x01s.", {"new": 1}),
    "eight bytes of length": (b"\x80\x04}\x8d\x03\0\0\0\0\0\0\0oldK\x01s.", {"new": 1}),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("lean", [False, True])
def test_odd_pickles_are_said_anew(name: str, lean: bool) -> None:
    raw, wanted = ODD[name]
    unpickler = KeyUnpickler(raw)
    node = unpickler.load()
    made = unpickler.rewritten(dict.fromkeys(unpickler.places(node, "old"), "new"), lean=lean)
    assert list(pickle.loads(made).items()) == list(wanted.items())


def test_one_opcode_that_says_two_keys_is_in_no_place_of_either() -> None:
    unpickler = KeyUnpickler(b"\x80\x02}(X\x03\0\0\0old2u.")
    assert unpickler.places(unpickler.load(), "old") == []


def test_a_long_string_that_is_fetched_often_is_there_once() -> None:
    long = "x" * (1 << 20)
    raw = pickle.dumps({"model": {long: 1}, "names": [long] * 10_000}, 2)
    tracemalloc.start()
    try:
        KeyUnpickler(raw).load()
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_bytes_are_no_names() -> None:
    unpickler = KeyUnpickler(pickle.dumps({"model": {b"old": 1}}, 4))
    root = unpickler.load()
    assert isinstance(root, dict)
    assert unpickler.places(root["model"], "old") == []


def test_an_ordered_dict_and_its_attributes_are_told_apart() -> None:
    state: OrderedDict[str, int] = OrderedDict(old=1)
    state._metadata = {"old": 2}  # type: ignore[attr-defined]
    unpickler = KeyUnpickler(pickle.dumps(state, 2), constructors={("collections", "OrderedDict"): Ordered})
    node = unpickler.load()
    made = unpickler.rewritten(dict.fromkeys(unpickler.places(node, "old"), "new"))
    found = pickle.loads(made)
    assert (found, found._metadata) == ({"new": 1}, {"old": 2})
