"""Servers for the tests of remote files: HTTP with ranges, counted and made to fail at will; S3, by moto."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


@dataclass
class Server:
    """A web server for one folder; its switches may be turned at any time."""

    folder: Path
    url: str = ""
    latency: float = 0.0  # seconds before each answer
    ranges: bool = True
    sizes: bool = True
    heads: bool = True  # whether HEAD is allowed
    status: Callable[[int], int] = lambda _number: 0  # what to answer to the n-th GET instead of the file (0: nothing)
    cut: Callable[[int], int] = lambda _number: 0  # how many bytes of the n-th GET's answer are missing
    etag: str = ""
    sent: int = 0
    gets: int = 0
    waiting: int = 0  # requests that wait for their answer now
    at_once: list[int] = field(default_factory=list)  # of each request, how many waited with it when it came
    asked: list[str] = field(default_factory=list)  # "GET /model.pth bytes=0-99"
    lock: threading.Lock = field(default_factory=threading.Lock)

    def reset(self) -> None:
        """Count from here."""
        self.sent = self.gets = 0
        self.asked.clear()
        self.at_once.clear()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Web

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        site = self.server.site
        with site.lock:
            site.asked.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
            site.gets += with_body
            number = site.gets
            site.waiting += 1
            site.at_once.append(site.waiting)
        time.sleep(site.latency)
        with site.lock:
            site.waiting -= 1
        address = unquote(self.path.partition("?")[0])
        if address.startswith("/api/"):
            self._say(200, _hub(site.folder, address), with_body)
            return
        path = site.folder / address.replace("/org/net/resolve/main", "").lstrip("/")
        status = (site.status(number) if with_body else 0) or (0 if site.heads or with_body else 403)
        if status or not path.is_file():
            self._say(status or 404, b"", with_body)
            return
        size = path.stat().st_size
        start, stop, partial = 0, size, False
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if found and site.ranges:
            start, stop, partial = int(found[1]), min(int(found[2]) + 1, size), True
            if start >= size:
                self._say(416, b"", with_body)
                return
        self.send_response(206 if partial else 200)
        if site.sizes:
            self.send_header("Content-Length", str(stop - start))
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        if partial:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("ETag", f'"{site.etag or path.stat().st_mtime_ns}"')
        self.end_headers()
        if with_body:
            self._send(path, start, stop - site.cut(number))
            self.close_connection |= site.cut(number) > 0

    def _send(self, path: Path, start: int, stop: int) -> None:
        site = self.server.site
        try:
            with open(path, "rb") as file:
                file.seek(start)
                while start < stop and (block := file.read(min(stop - start, 1 << 20))):
                    with site.lock:
                        site.sent += len(block)
                    self.wfile.write(block)
                    start += len(block)
        except OSError:  # who asked has seen enough
            self.close_connection = True

    def _say(self, status: int, body: bytes, with_body: bool) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)


def _hub(folder: Path, address: str) -> bytes:
    """What Hugging Face's hub says of a model ``org/net`` that holds the files of a folder."""
    if "/tree/" not in address:
        return json.dumps({"id": "org/net", "sha": "0" * 40, "siblings": []}).encode()
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    said = [{"type": "file", "oid": "1" * 40, "size": path.stat().st_size, "path": path.name} for path in files]
    return json.dumps(said).encode()


class _Web(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    site: Server


@contextmanager
def web(folder: Path) -> Iterator[Server]:
    """Serve a folder by HTTP."""
    server = _Web(("127.0.0.1", 0), _Handler)
    server.site = Server(folder, f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def s3() -> Iterator[str]:
    """An S3 server; yields its address."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()
