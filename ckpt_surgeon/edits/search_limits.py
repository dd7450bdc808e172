"""A time limit for regular expressions: some search without end, and Python's ``re`` has no limit of its own.

``re`` looks for signals while it searches, so a timer stops it in the main thread.  No other thread hears of signals,
and ``re`` lets no other thread go on meanwhile: there, and on Windows, the same search is made in a process of its own
first, which can be stopped.  Only where no process can be started is there no limit.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

SECONDS = 10.0  # that one regular expression may take for all texts together

# Match texts with patterns until one fits, as the caller will; the last line says which search goes on.
_SEARCH = """
import json, os, re, signal, sys
patterns, texts, seconds = json.load(sys.stdin)
if hasattr(signal, "alarm"):
    signal.alarm(int(seconds) + 10)  # whoever asked may be gone by then
patterns = [re.compile(one) for one in patterns]
os.write(1, b"begun\\n")
for number, text in enumerate(texts):
    for index, pattern in enumerate(patterns):
        os.write(1, b"%d %d\\n" % (index, number))
        if pattern.fullmatch(text):
            break
"""


def _is_timed() -> bool:
    """Whether a timer can stop a search here: the caller has none, and signals are heard."""
    is_main = threading.current_thread() is threading.main_thread()
    return is_main and hasattr(signal, "setitimer") and not signal.getitimer(signal.ITIMER_REAL)[0]


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in a block that takes longer (0: without a limit), where a timer can stop it.

    Elsewhere, :func:`endless_search` finds out before.

    >>> with time_limit(10):
    ...     print("done")
    done
    """
    if not seconds or not _is_timed():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def endless_search(patterns: Sequence[str], texts: Iterable[str], seconds: float) -> tuple[int, str] | None:
    """The pattern (its index) and the text with which ``fullmatch`` takes longer than it may; None where none does.

    Only asked where no timer can stop the search: elsewhere it is None at once, as :func:`time_limit` sees to it.

    >>> endless_search(["a+"], ["aaa"], 10.0) is None
    True
    """
    if _is_timed() or not sys.executable or not patterns:
        return None
    import json
    import subprocess

    texts = list(texts)
    command = [sys.executable, "-I", "-S", "-c", _SEARCH]
    try:
        subprocess.run(
            command, input=json.dumps([patterns, texts, seconds]).encode(), capture_output=True, timeout=seconds
        )
    except subprocess.TimeoutExpired as expired:
        lines = (expired.stdout or b"").split(b"\n")[:-1]
        if len(lines) < 2:  # another program, or a machine on which nothing starts
            return None
        index, number = map(int, lines[-1].split())
        return index, texts[number]
    except OSError:
        return None
    return None
