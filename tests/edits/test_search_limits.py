"""Regular expressions that search without end are stopped: in the main thread, in any other, beside another timer."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import ckpt_surgeon
from ckpt_surgeon import EditError
from ckpt_surgeon.edits import search_limits
from ckpt_surgeon.edits.lora import merging

KEYS = {"fc.weight": torch.ones(1), "a" * 60: torch.ones(1)}


def in_this_thread(do: Callable[[], object]) -> object:
    return do()


def in_another_thread(do: Callable[[], object]) -> object:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(do).result()


def beside_another_timer(do: Callable[[], object]) -> object:
    signal.setitimer(signal.ITIMER_REAL, 1000)
    try:
        return do()
    finally:
        assert signal.setitimer(signal.ITIMER_REAL, 0)[0] > 900


WAYS = [in_this_thread, in_another_thread, beside_another_timer]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_limits, "SECONDS", 0.5)
    monkeypatch.setattr(merging, "SECONDS", 1.0)


@pytest.mark.parametrize("way", WAYS)
def test_a_rename_without_end_is_stopped_and_named(way: Callable[[Callable[[], object]], object]) -> None:
    began = time.monotonic()
    with pytest.raises(EditError, match=r"rename 2 \('\(a\+\)\+b'\) searches without end in the key 'aaaa"):
        way(lambda: ckpt_surgeon.rename(KEYS, [("fc", "x"), ("(a+)+b", "c")], regex=True))
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("way", WAYS)
def test_a_rename_with_an_end_is_the_same_everywhere(way: Callable[[Callable[[], object]], object]) -> None:
    made = way(lambda: ckpt_surgeon.rename(KEYS, [(r"fc\.(.*)", r"head.\1"), ("(a+)", r"b.\1")], regex=True))
    assert isinstance(made, dict)
    assert list(made) == ["head.weight", "b." + "a" * 60]


@pytest.mark.parametrize("way", WAYS)
def test_a_bad_expression_is_the_same_error_everywhere(way: Callable[[Callable[[], object]], object]) -> None:
    with pytest.raises(EditError, match=r"rename 1 \('\('"):
        way(lambda: ckpt_surgeon.rename(KEYS, [("(", "c")], regex=True))


def test_other_threads_go_on_while_a_search_is_waited_for() -> None:
    counted = [0]
    ends = threading.Event()

    def count() -> None:
        while not ends.wait(0.01):
            counted[0] += 1

    counting = threading.Thread(target=count)
    counting.start()
    with pytest.raises(EditError, match="without end"):
        in_another_thread(lambda: ckpt_surgeon.rename(KEYS, [("(a+)+b", "c")], regex=True))
    ends.set()
    counting.join()
    assert counted[0] > 10


@pytest.mark.parametrize("way", WAYS)
def test_a_pattern_without_end_in_an_adapter_is_stopped(
    way: Callable[[Callable[[], object]], object], tmp_path: Path
) -> None:
    base = {f"{'a' * 60}.weight": torch.ones(2, 2)}
    lora = {f"base_model.model.{'a' * 60}.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}
    ckpt_surgeon.save(lora, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "rank_pattern": {"(a+)+b": 4}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(EditError, match=r"a pattern in the configuration of .* searches without end"):
        way(lambda: ckpt_surgeon.merge_lora(ckpt_surgeon.from_torch(base), tmp_path))
