"""Ranges of a file at a web server: what its answers have to say before their bytes are taken.

Servers, proxies and login pages answer with other bytes than were asked for: another range, the whole file, a packed
one, a page in HTML, another version.  fsspec takes what comes, so ranges are asked for here, in fsspec's own session,
and compared with what was asked for (RFC 9110, sections 14 and 15.3.7) and with the first answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import BrokenFile, FileError, Location
from ..safe_text import visible
from . import patience

if TYPE_CHECKING:
    import aiohttp
    from fsspec.implementations.http import HTTPFileSystem

DOWNLOAD = "download the file first"
_RANGE = r"\s*bytes\s+([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)\s*"


class Unranged(Exception):
    """The server sends files whole only."""


@dataclass(frozen=True, slots=True)
class Version:
    """What an answer says of the file that its bytes are from."""

    etag: str
    modified: str
    address: str  # where redirects led, without the signature

    def differs(self, other: Version) -> str:
        """How another answer's version differs; "" where it does not, as far as both tell."""
        for name, mine, its in (
            ("ETag", self.etag, other.etag),
            ("Last-Modified", self.modified, other.modified),
            ("address", self.address, other.address),
        ):
            if mine and its:
                return "" if mine == its else f"{name} {mine}, then {its}"
        return ""


def fetch_range(
    fs: HTTPFileSystem, url: str, path: Location, wanted: tuple[int, int], size: int
) -> tuple[bytes, Version]:
    """Exactly the bytes ``wanted`` (start, stop) of a file of ``size`` bytes, and the version that they are of.

    Raises Unranged where the server has no ranges, BrokenFile when it has another file than before, FileError for
    another answer than was asked for, TimeoutError when too little comes, and what aiohttp raises.
    """
    from fsspec.asyn import sync

    found: tuple[bytes, Version] = sync(fs.loop, _fetch, fs, url, path, wanted, size)
    return found


async def _fetch(
    fs: HTTPFileSystem, url: str, path: Location, wanted: tuple[int, int], size: int
) -> tuple[bytes, Version]:
    import asyncio

    start, stop = wanted
    session = await fs.set_session()
    headers = {**fs.kwargs.get("headers", {}), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    async with asyncio.timeout(patience.seconds()):
        answer = await session.get(fs.encode_url(url), **{**fs.kwargs, "headers": headers})
    async with answer:
        _check(answer, path, wanted, size)
        return await _body(answer, path, stop - start), _version(answer)


def _check(answer: aiohttp.ClientResponse, path: Location, wanted: tuple[int, int], size: int) -> None:
    """Raise an error unless the answer announces exactly the bytes that were asked for."""
    start = wanted[0]
    if answer.status == 416:
        problem = f"became shorter while it was read (its server has no bytes from {start:,} on)"
        raise BrokenFile(path, problem, "do it again")
    answer.raise_for_status()
    packed = answer.headers.get("Content-Encoding", "").strip().lower()
    if packed not in ("", "identity", "aws-chunked"):  # the last is how it was sent to S3, which may keep the word
        problem = f"comes packed ({visible(packed[:40])}) from its server, which was asked for the bytes themselves"
        raise FileError(path, problem, "download and unpack the file first")
    if answer.status == 206:
        _check_range(answer.headers.get("Content-Range", ""), path, wanted, size)
    elif answer.status == 200:
        _check_whole(answer.headers, path, wanted, size)
    else:
        problem = f"cannot be read: its server answers with status {answer.status} where bytes were asked for"
        raise FileError(path, problem, "check the address")


def _check_range(said: str, path: Location, wanted: tuple[int, int], size: int) -> None:
    start, stop = wanted
    asked = f"bytes {start} to {stop - 1} were asked for"
    found = re.fullmatch(_RANGE, said)
    if found is None:
        raise FileError(path, f"comes from a server that does not say which bytes it sends ({asked})", DOWNLOAD)
    first, last, total = found.groups()
    if total not in ("*", str(size)):
        became = "became shorter" if int(total) < size else "changed"
        problem = f"{became} while it was read (it had {size:,} bytes, it has {int(total):,})"
        raise BrokenFile(path, problem, "do it again")
    if (int(first), int(last)) != (start, stop - 1):
        raise FileError(path, f"comes from a server that sends bytes {first} to {last} where {asked}", DOWNLOAD)


def _check_whole(headers: Mapping[str, str], path: Location, wanted: tuple[int, int], size: int) -> None:
    """A server without ranges sends the whole file, whose length is known; others send a page that says something."""
    length = headers.get("Content-Length")
    if length != str(size):
        if headers.get("Content-Type", "").partition(";")[0].strip().lower() in ("text/html", "application/xhtml+xml"):
            problem = "cannot be read: its server answers with a web page where bytes were asked for"
            raise FileError(path, problem, "check your credentials and the address, or download the file first")
        if length is not None:
            problem = f"changed while it was read (it had {size:,} bytes, its server sends {visible(length[:20])})"
            raise BrokenFile(path, problem, "do it again")
    if wanted != (0, size):
        raise Unranged


async def _body(answer: aiohttp.ClientResponse, path: Location, nbytes: int) -> bytes:
    """The body of an answer, which has to be as long as this.  Raises TimeoutError where too little comes."""
    import asyncio

    raw = bytearray()
    clock = asyncio.get_running_loop().time
    limit = patience.seconds()
    before, end = 0, clock() + limit
    while True:
        try:
            async with asyncio.timeout_at(end):
                block = await answer.content.readany()
        except TimeoutError:
            if len(raw) - before < patience.LEAST:
                raise
            before, end = len(raw), clock() + limit
            continue
        raw += block
        if not block or len(raw) > nbytes:
            break
    if len(raw) != nbytes:
        came = f"more than {nbytes:,}" if len(raw) > nbytes else f"{len(raw):,}"
        problem = f"comes from a server that sends {came} bytes where {nbytes:,} were asked for"
        raise BrokenFile(path, problem, "try again, or download the file first")
    return bytes(raw)


def _version(answer: aiohttp.ClientResponse) -> Version:
    etag, modified = (visible(answer.headers.get(name, "")[:200]) for name in ("ETag", "Last-Modified"))
    return Version(
        etag.removeprefix("W/"), modified, str(answer.url.with_query(None).with_fragment(None).with_user(None))
    )
