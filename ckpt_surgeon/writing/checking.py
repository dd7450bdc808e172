"""Checksums of what the kernel copies: compared by a thread beside the copy, so that damage does not travel.

What passes through this process's memory is compared where it passes.  A copy by the kernel shows its bytes to nobody,
so they are read once more; they lie in the page cache then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Event, Thread

from ..tensors.storage import Storage
from ..tensors.stored import StoredTensor
from .plan import Plan


@contextmanager
def compared(planned: Plan, numbers: Iterable[int]) -> Iterator[None]:
    """Compare the checksums of local storages behind some files of a plan while the body makes the files.

    Raises BrokenFile after the body, where one does not match.
    """
    storages = _storages(planned, numbers)
    stop, failed = Event(), list[Exception]()

    def compare() -> None:
        try:
            for storage, used in storages.values():
                if stop.is_set():
                    return
                storage.check(used)
        except Exception as error:  # raised again by the thread that waits
            failed.append(error)

    thread = Thread(target=compare, name="checking", daemon=True)
    if storages:
        thread.start()
    try:
        yield
    except BaseException:
        stop.set()
        raise
    finally:
        if storages:
            thread.join()
    if failed:
        raise failed[0]


def _storages(planned: Plan, numbers: Iterable[int]) -> dict[int, tuple[Storage, int]]:
    """The storages that have a checksum, by identity, each with the bytes of the largest tensor in it."""
    found: dict[int, tuple[Storage, int]] = {}
    for number in numbers:
        for tensor in planned.files[number].tensors.values():
            storage = tensor.storage if isinstance(tensor, StoredTensor) else None
            if storage is None or storage.crc32 is None or storage.span is None or storage.span.path.local is None:
                continue
            used = max(tensor.nbytes, found.get(id(storage), (storage, 0))[1])
            found[id(storage)] = (storage, used)
    return found
