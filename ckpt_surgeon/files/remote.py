"""One file behind a URL that fsspec knows: its name, its size, exact ranges of its bytes.

A :class:`RemotePath` answers :class:`~ckpt_surgeon.files.paths.FilePath`, as a local path does.  It asks for exactly
the bytes that are wanted: no block cache fetches more.  It keeps what it learned when it was first asked (size,
version, the first bytes), so that a reader costs few round trips.
fsspec is imported when the first URL is opened, never for local files.
"""

from __future__ import annotations

import mmap
import re
import time
from bisect import bisect_right, insort
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import TYPE_CHECKING, BinaryIO, TypeVar, cast

from ..errors import BrokenFile, FileError
from ..safe_text import secrets_of, url_without_secrets
from .failures import is_missing, may_pass, refused
from .fetched import RangeReader, fetched_mapping
from .patience import seconds, seconds_for, within
from .prefetch import Range, blocks, requests
from .web import DOWNLOAD, Unranged, Version, fetch_range

if TYPE_CHECKING:
    import fsspec

T = TypeVar("T")

INSTALL = "pip install 'ckpt_surgeon[remote]'"
HEAD = 4096  # bytes that tell a file's kind
WHOLE = 128 << 10  # a file up to this size is fetched with the first request
UNRANGED = 16 << 20  # a file up to this size is fetched whole where the server has no ranges
PAUSES = (0.2, 1.0)  # seconds before an HTTP request is made again; other file systems repeat their requests themselves
LISTING = 10  # times as long as one answer may take, a listing may: file systems ask for it page by page

_URL = r"(?:[A-Za-z][\w+.-]+::)*[A-Za-z][\w+.-]+://"  # patterns are compiled when they are needed: few runs do
_WEB = ("http", "https")
_INSTALLED_BY_EXTRA = ("fsspec", "s3fs", "aiohttp", "huggingface_hub")
_SIZED = ("hf",)  # file systems whose open() takes a size and then need not ask for it
_VERSIONS = ("ETag", "etag", "blob_id", "generation", "md5Hash", "Last-Modified", "LastModified", "mtime", "created")


def is_url(text: str) -> bool:
    """Whether a text names a file by URL.

    >>> is_url("s3://bucket/model.pth"), is_url("model.pth"), is_url("C:/model.pth")
    (True, False, False)
    """
    return "://" in text and re.match(_URL, text) is not None


class _Known:
    """What has been learned of a remote file, or is kept of it."""

    __slots__ = ("anew", "extents", "fs", "info", "lock", "path", "version", "whole")

    def __init__(self, *, anew: bool) -> None:
        self.anew = anew  # whether what the file system remembers from earlier may be old
        self.fs: fsspec.AbstractFileSystem | None = None
        self.path = ""  # as the file system spells it
        self.info: Mapping[str, object] | None = None
        self.version: Version | None = None  # what a web server's first answer with bytes of it said
        self.extents: list[tuple[int, bytes]] = []  # bytes that were fetched, by their start
        self.lock = Lock()
        self.whole = Lock()  # is held while a file without ranges is fetched


@dataclass(frozen=True, slots=True, repr=False)
class RemotePath:
    """A URL that fsspec knows, with the options of its file system (``anon``, ``endpoint_url`` …).

    ``str()`` of it, and so every message, leaves out passwords and signed queries.

    >>> path = RemotePath("s3://bucket/run/model.safetensors", {"anon": True})
    >>> path.name, str(path.parent / "config.json")
    ('model.safetensors', 's3://bucket/run/config.json')
    """

    url: str
    options: Mapping[str, object] = field(default_factory=dict, hash=False)
    _known: _Known = field(default_factory=lambda: _Known(anew=True), compare=False)

    def __post_init__(self) -> None:
        lower = re.sub(r"(?:^|(?<=::))[A-Za-z][\w+.-]+(?=://|::)", lambda scheme: scheme[0].lower(), self.url)
        object.__setattr__(self, "url", lower)  # schemes in capitals are the same ones; fsspec does not know them

    def __str__(self) -> str:
        return url_without_secrets(self.url)

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    # -- names

    @property
    def protocol(self) -> str:
        """The part before ``://``, of the outermost file system where several are chained."""
        return re.split("::|:", self.url, maxsplit=1)[0]

    @property
    def _cut(self) -> tuple[str, str, str]:
        """Everything up to the name, the name, the parameters of an HTTP address."""
        address, tail = self.url, ""
        if self.protocol in _WEB:
            address = re.split("[?#]", self.url, maxsplit=1)[0]
            folder, slash, name = address.rpartition("/")
            address = folder + slash + name.partition(";")[0]
            tail = self.url[len(address) :]
        folder, slash, name = address.rstrip("/").rpartition("/")
        return folder + slash, name, tail

    @property
    def name(self) -> str:
        return self._cut[1]

    @property
    def has_slash(self) -> bool:
        return self.url.endswith("/")

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem

    @property
    def parent(self) -> RemotePath:
        folder, _, query = self._cut
        return self._beside(folder + query)

    def with_name(self, name: str) -> RemotePath:
        """The file of another name in the same folder."""
        folder, _, query = self._cut
        return self._beside(folder + name + query)

    def __truediv__(self, name: str) -> RemotePath:
        folder, own, query = self._cut
        return self._beside(f"{folder}{own}/{name}{query}")

    def _beside(self, url: str) -> RemotePath:
        known = _Known(anew=False)
        fs = self._known.fs
        if fs is not None and "::" not in url:
            known.fs, known.path = fs, fs._strip_protocol(url)  # else each thread would make itself a connection
        return RemotePath(url, self.options, known)

    def afresh(self) -> RemotePath:
        """This path with nothing known of its file yet."""
        return RemotePath(self.url, self.options)

    @property
    def local(self) -> None:
        """None: see :class:`~ckpt_surgeon.files.paths.FilePath`, which this class answers."""

    @property
    def remote(self) -> RemotePath:
        return self

    @property
    def takes_parts(self) -> bool:
        """Whether a file can be streamed there and become visible only when it is complete."""
        return self.protocol in ("s3", "s3a")

    # -- what is there

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        """The file system.  Raises FileError, with the line that installs what is missing."""
        return self._connected()[0]

    def _connected(self) -> tuple[fsspec.AbstractFileSystem, str]:
        known = self._known
        if known.fs is None:
            try:
                from fsspec.core import url_to_fs

                options = {**(self._web_options() if self.protocol in _WEB else {}), **self.options}
                known.fs, known.path = url_to_fs(self.url, **options)
            except ImportError as error:
                package = self._package()
                raise FileError(
                    self,
                    f"needs {package}, which is not installed or too old",
                    INSTALL if package in _INSTALLED_BY_EXTRA else f"pip install {package}",
                ) from error
            except Exception as error:
                raise self.failure(error) from None  # a traceback would show the URL as it is
        return known.fs, known.path

    def _web_options(self) -> Mapping[str, object]:
        """What is asked of fsspec's HTTP: patience with slow lines, none with dead ones, and addresses left alone."""
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=seconds(), sock_read=seconds())
        is_spelled = {"encoded": True} if "%" in self.url else {}  # a signature holds for what was signed
        return {"client_kwargs": {"timeout": timeout}, **is_spelled}

    def _package(self) -> str:
        """The package that is missing: fsspec itself, or the one that it needs for the protocol."""
        try:
            from fsspec.registry import known_implementations
        except ImportError:
            return "fsspec"
        found = known_implementations.get(self.protocol, {}).get("class", "fsspec")
        return "aiohttp" if self.protocol in _WEB else str(found).partition(".")[0]

    def _info(self) -> Mapping[str, object]:
        """What the file system tells of the file, asked once."""
        known = self._known
        if known.info is None:
            fs, path = self._connected()
            if known.anew:
                self._forget_listing()
            known.info = self._asked(lambda: fs.info(path))
        return known.info

    def _forget_listing(self) -> None:
        fs, path = self._connected()
        self._asked(lambda: fs.invalidate_cache(path), limit=None)

    @property
    def size(self) -> int:
        """Bytes of the file.  Raises FileError when it is not there or its server does not say."""
        found = self._info().get("size")
        if not isinstance(found, int):
            raise FileError(self, "comes from a server that does not say its size", DOWNLOAD)
        return found

    def remember(self) -> None:
        """Ask which file this is, unless that is known."""
        self._info()

    def check_unchanged(self) -> None:
        """Raise BrokenFile when the file is another one than when it was opened, as far as its server tells."""
        fs, path = self._connected()
        self._forget_listing()
        before, now = _version(self._info()), _version(self._asked(lambda: fs.info(path)))
        if now != before:
            raise BrokenFile(self, f"changed while it was read (it was {before}, it is {now})", "do it again")

    def is_dir(self) -> bool:
        """Whether it is a folder; a URL that ends in a slash is one."""
        return self.url.partition("?")[0].endswith("/") or self._info().get("type") == "directory"

    @property
    def has_listing(self) -> bool:
        """Whether its folder can be listed; a web server may answer with a page of any kind."""
        return self.protocol not in _WEB

    def exists(self) -> bool:
        """Whether something is there now."""
        fs, path = self._connected()
        self._forget_listing()
        return bool(self._asked(lambda: fs.exists(path)))

    lexists = exists

    def is_file(self) -> bool:
        """Whether a file is there."""
        try:
            return self._info().get("type") != "directory"
        except FileError as error:
            if is_missing(error.__context__):
                return False
            raise

    def names(self) -> list[str]:
        """The names in this folder; none where there is none.  Raises FileError where it cannot be listed."""
        fs, path = self._connected()
        self._forget_listing()
        try:
            found = self._asked(lambda: fs.ls(path, detail=False), limit=LISTING * seconds())
        except FileError as error:
            if is_missing(error.__context__):
                return []
            raise
        return sorted({str(name).rstrip("/").rpartition("/")[2] for name in found})

    # -- bytes

    def head(self) -> bytes:
        """The first bytes; more of them are kept, but never so many that it shows in what is fetched altogether."""
        count = self.size if self.size <= WHOLE else self.reach
        self.fetch_ahead([(0, count)])
        return self.fetch(0, min(HEAD, count))

    def request_head(self) -> Callable[[], object]:
        """Ask for size and first bytes without waiting; the function that is returned waits for them."""
        return requests().submit(lambda: self.is_file() and self.head()).result

    def opened(self) -> BinaryIO:
        """The file as one that is open; exactly what is read is fetched."""
        return cast(BinaryIO, RangeReader(self))

    def blocks(self, start: int, stop: int, size: int) -> Iterator[bytes]:
        """Yield bytes in blocks of ``size``, reading ahead."""
        return blocks(self, start, stop, size)

    def mapped(self) -> AbstractContextManager[mmap.mmap]:
        """A mapping that has the bytes that were fetched: :class:`~ckpt_surgeon.files.fetched.Fetched`."""
        return fetched_mapping(self)

    @contextmanager
    def view(self, start: int, stop: int) -> Iterator[tuple[memoryview, Callable[[], None]]]:
        """Bytes fetched into memory, where they stay until the end."""
        raw = bytearray(stop - start)
        at = 0
        for block in self.blocks(start, stop, 1 << 20):
            raw[at : at + len(block)] = block
            at += len(block)
        yield memoryview(raw), lambda: None

    @property
    def reach(self) -> int:
        """Bytes at either end that may be fetched in the hope that they are needed: 1/400 of the file, 4 to 64 kB."""
        return min(max(self.size // 400, HEAD), 64 << 10)

    def fetch_ahead(self, ranges: Sequence[Range]) -> None:
        """Fetch ranges, all at a time, and keep them until :meth:`forget`; neighbours become one request."""
        missing = [one for one in coalesced(ranges, self.size // 512 // max(len(ranges), 1)) if not self._has(*one)]
        fetched = requests().map(lambda one: self._request(*one), missing) if len(missing) > 1 else None
        for start, stop in missing:
            self._keep(start, next(fetched) if fetched else self._request(start, stop))

    def forget(self) -> None:
        """Let go of kept bytes, unless they are the whole file."""
        self._known.extents[:] = [(at, raw) for at, raw in self._known.extents if len(raw) == self.size]

    def fetch(self, start: int, stop: int) -> bytes:
        """The bytes ``start`` to ``stop``, from what is kept and, for the rest, from the server.

        Raises BrokenFile when the file has become shorter, FileError when the server refuses or fails.
        """
        parts: list[bytes] = []
        while start < stop:
            parts.append(self._kept(start, stop) or self._request(start, min(stop, self._next_kept(start))))
            start += len(parts[-1])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.fetch(0, self.size).decode(encoding)

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        fs, path = self._connected()
        raw = text.encode(encoding)
        self._asked(lambda: fs.pipe_file(path, raw), "written", limit=seconds_for(len(raw)))

    def put(self, made: Path) -> None:
        """Send a local file here.  Raises FileError."""
        fs, path = self._connected()
        self._asked(lambda: fs.put_file(str(made), path), "written", limit=seconds_for(made.stat().st_size))

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the file.  Raises FileError."""
        fs, path = self._connected()
        try:
            self._asked(lambda: fs.rm_file(path), "removed")
        except FileError as error:
            if not (missing_ok and is_missing(error.__context__)):
                raise

    def _has(self, start: int, stop: int) -> bool:
        kept = self._kept(start, stop)
        return kept is not None and len(kept) == stop - start

    def _kept(self, start: int, stop: int) -> bytes | None:
        extents = self._known.extents
        index = bisect_right(extents, start, key=lambda one: one[0]) - 1
        if index < 0:
            return None
        at, raw = extents[index]
        return raw[start - at : stop - at] or None

    def _next_kept(self, start: int) -> int:
        extents = self._known.extents
        index = bisect_right(extents, start, key=lambda one: one[0])
        return extents[index][0] if index < len(extents) else self.size

    def _keep(self, start: int, raw: bytes) -> None:
        insort(self._known.extents, (start, raw), key=lambda one: one[0])

    def _request(self, start: int, stop: int) -> bytes:
        if start >= stop:
            raise BrokenFile(self, f"ends at byte {self.size:,}, before the data that it announces")
        try:
            raw = self._from_web(start, stop) if self.protocol in _WEB else self._from_other(start, stop)
        except Unranged:
            return self._unranged(start, stop)
        if len(raw) != stop - start:
            less = f"{len(raw):,} bytes came where {stop - start:,} were asked for"
            raise BrokenFile(self, f"became shorter while it was read ({less})", "do it again")
        return raw

    def _from_web(self, start: int, stop: int) -> bytes:
        """Exactly these bytes, of the same version as all before."""
        fs, path = self._connected()
        size = self.size
        raw, version = self._asked(lambda: fetch_range(fs, path, self, (start, stop), size), limit=None)
        with self._known.lock:
            first = self._known.version = self._known.version or version
        if odd := first.differs(version):
            raise BrokenFile(self, f"changed while it was read ({odd})", "do it again")
        return raw

    def _from_other(self, start: int, stop: int) -> bytes:
        """These bytes, by ``cat_file`` where the file system has one of its own, else by a plain open."""
        import fsspec

        fs, path = self._connected()
        plain = type(fs).cat_file is fsspec.AbstractFileSystem.cat_file and not fs.async_impl
        known = {"size": self.size} if self.protocol in _SIZED else {}

        def ask() -> bytes:
            if not plain:
                return bytes(fs.cat_file(path, start=start, end=stop))
            with fs.open(path, "rb", cache_type="none", **known) as file:
                file.seek(start)
                return bytes(file.read(stop - start))

        return self._asked(ask, limit=seconds_for(stop - start))

    def _unranged(self, start: int, stop: int) -> bytes:
        """What to do where the server sends files whole only."""
        if self.size > UNRANGED:
            raise FileError(self, "comes from a server that does not serve ranges", DOWNLOAD)
        with self._known.whole:
            if not self._has(0, self.size):
                self._known.extents[:] = [(0, self._from_web(0, self.size))]
        return self._kept(start, stop) or b""

    # -- failures

    def check_writable(self) -> None:
        """Raise FileError for a place that cannot be written to, or not with what is installed."""
        if self.protocol in _WEB:
            raise FileError(self, "is a web address, which cannot be written to", "write to a file, s3:// or the like")
        self._connected()  # what is missing shows now and not after an hour

    def failure(self, error: Exception, doing: str = "read") -> FileError:
        """What fsspec, or a library under it, raised."""
        return refused(self, error, doing, secrets=secrets_of(self.url, self.options))

    def _asked(self, ask: Callable[[], T], doing: str = "read", *, limit: float | None = 0) -> T:
        """Ask the file system, again where that may help.  Raises FileError.

        ``limit`` is the most seconds that it may take: 0 for those of a short answer, None where it has its own.
        """
        pauses = PAUSES if self.protocol in _WEB else ()
        for pause in (*pauses, None):
            try:
                return ask() if limit is None else within(limit or seconds(), ask)
            except (FileError, Unranged):
                raise
            except Exception as error:
                if pause is None or not may_pass(error):
                    raise self.failure(error, doing) from None
                time.sleep(pause)
        raise AssertionError


def _version(info: Mapping[str, object]) -> str:
    """What changes when a file does: its ETag, checksum or date, and its size."""
    said = next((f"{name} {info[name]}, " for name in _VERSIONS if info.get(name)), "")
    return f"{said}{info.get('size')} bytes"


def coalesced(ranges: Iterable[Range], gap: int) -> list[Range]:
    """Ranges in order of their place, those that are no more than ``gap`` bytes apart as one.

    >>> coalesced([(50, 60), (0, 10), (12, 20)], gap=4)
    [(0, 20), (50, 60)]
    """
    joined: list[Range] = []
    for start, stop in sorted(ranges):
        if joined and start <= joined[-1][1] + gap:
            joined[-1] = (joined[-1][0], max(joined[-1][1], stop))
        else:
            joined.append((start, stop))
    return joined
