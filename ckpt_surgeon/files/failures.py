"""What fsspec and the libraries under it raise, told as this package tells troubles: in one line, without secrets.

None of those libraries is imported here: errors are told apart by what they carry and what they are called.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..errors import FileError, Location
from ..safe_text import without_these

_UNREACHABLE = ("ClientConnect", "ConnectionRefused", "EndpointConnection", "ConnectError", "NameResolution")


def refused(path: Location, error: Exception, doing: str = "read", *, secrets: Sequence[str] = ()) -> FileError:
    """The error for what fsspec, or a library under it, raised; ``secrets`` are left out of what it says."""
    status, kinds = status_of(error), [type(one).__name__ for one in _chain(error)]
    if status in (401, 403) or isinstance(error, PermissionError):
        said = f"{status}" if status else "access denied"
        return FileError(path, f"may not be {doing} by you ({said})", "check your credentials and the address")
    if is_missing(error):
        problem = "cannot be written: its bucket or folder is not there" if doing == "written" else "does not exist"
        return FileError(path, problem, "check the address")
    if status is not None:
        return FileError(path, f"cannot be {doing}: its server answers with status {status}", "try again later")
    if not {"NoCredentialsError", "PartialCredentialsError"}.isdisjoint(kinds):
        return FileError(path, f"cannot be {doing}: there are no credentials for it", "set them up, or anon=True")
    if any(isinstance(one, TimeoutError) for one in _chain(error)):
        waiting = "try again later, or set CKPT_TIMEOUT to more seconds"
        return FileError(path, f"cannot be {doing}: its server does not answer in time", waiting)
    if any(kind.startswith(_UNREACHABLE) for kind in kinds):
        return FileError(path, f"cannot be {doing}: its server cannot be reached", "check the address")
    if "Protocol not known" in str(error):
        return FileError(
            path, f"has a protocol that fsspec does not know ({str(path).partition('://')[0]})", "check the address"
        )
    innermost = list(_chain(error))[-1]
    said = " ".join(f"{type(innermost).__name__}: {str(innermost)[:10_000]}".split())
    said = without_these(said, secrets)[:300]
    return FileError(path, f"cannot be {doing} ({said})", "try again, or download the file first")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what caused it, what caused that …"""
    while error is not None:
        yield error
        error = error.__cause__


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error, or what caused it, tells."""
    for one in _chain(error):
        for found in (getattr(one, "status", None), getattr(getattr(one, "response", None), "status_code", None)):
            if isinstance(found, int):
                return found
    return None


def is_missing(error: BaseException | None) -> bool:
    """Whether an error says that there is no such file; fsspec says so of web servers that merely fail, too."""
    if error is None or status_of(error) is not None:
        return error is not None and status_of(error) in (404, 410)
    failed = [one for one in _chain(error) if not isinstance(one, FileNotFoundError)]
    of_network = any(isinstance(one, OSError) or type(one).__module__.startswith("aiohttp") for one in failed)
    return isinstance(error, FileNotFoundError) and not of_network


def may_pass(error: Exception) -> bool:
    """Whether the same request may succeed a moment later."""
    status = status_of(error)
    if status is not None:
        return status >= 500 or status in (408, 429)
    return not (is_missing(error) or isinstance(error, (PermissionError, ValueError, NotImplementedError)))
