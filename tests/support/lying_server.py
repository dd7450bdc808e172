"""A web server that answers with other bytes than were asked for, from the n-th request for bytes on."""

from __future__ import annotations

import gzip
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Answer:
    """What is about to be sent; a lie changes it."""

    status: int
    headers: dict[str, str]
    body: bytes
    drip: float = 0.0  # seconds before each byte
    cut: bool = False  # whether the body is shorter than its Content-Length


Lie = Callable[["Answer", bytes, int, int], None]  # the answer, the file, start and stop of what was asked for


@dataclass
class Liar:
    """A server of one file."""

    raw: bytes
    lie: Lie
    after: int = 0  # how many answers to GET are honest
    url: str = ""
    asked: list[str] = field(default_factory=list)
    gets: int = 0
    lies_to_head: bool = False


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Web

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        site, size = self.server.site, len(self.server.site.raw)
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = (int(found[1]), int(found[2]) + 1) if found else (0, size)
        if self.path == "/other":
            answer = Answer(206, {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}, b"x" * (stop - start))
        else:
            answer = Answer(200, {"ETag": '"one"'}, site.raw[start:stop])
            if found:
                answer.status, answer.headers["Content-Range"] = 206, f"bytes {start}-{stop - 1}/{size}"
            site.asked.append(f"{self.command} {self.headers.get('Range', '')}".strip())
            site.gets += self.command == "GET"
            if site.gets > site.after if self.command == "GET" else site.lies_to_head:
                site.lie(answer, site.raw, start, stop)
        self.send_response(answer.status)
        answer.headers.setdefault("Content-Length", str(len(answer.body)))
        for name, value in answer.headers.items():
            if value:
                self.send_header(name, value)
        self.close_connection = answer.cut or not answer.headers["Content-Length"]
        self.end_headers()
        try:
            if self.command == "GET" and not answer.drip:
                self.wfile.write(answer.body)
            for at in range(len(answer.body) if self.command == "GET" and answer.drip else 0):
                self.wfile.write(answer.body[at : at + 1])
                time.sleep(answer.drip)
        except OSError:  # who asked has seen enough
            self.close_connection = True


class _Web(ThreadingHTTPServer):
    daemon_threads = True
    site: Liar

    def handle_error(self, request: object, client_address: object) -> None:
        """Whoever asked has seen enough and closed the connection."""


@contextmanager
def lying(raw: bytes, lie: Lie, *, after: int = 0, lies_to_head: bool = False) -> Iterator[Liar]:
    """Serve some bytes as a file, and lie about them."""
    server = _Web(("127.0.0.1", 0), _Handler)
    server.site = Liar(raw, lie, after, f"http://127.0.0.1:{server.server_port}/model.pth", lies_to_head=lies_to_head)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# -- lies


def another_range(answer: Answer, raw: bytes, start: int, stop: int) -> None:
    answer.body = raw[: stop - start]
    answer.headers["Content-Range"] = f"bytes 0-{stop - start - 1}/{len(raw)}"


def a_shorter_range(answer: Answer, raw: bytes, start: int, stop: int) -> None:
    answer.body = raw[start : stop - 1]
    answer.headers["Content-Range"] = f"bytes {start}-{stop - 2}/{len(raw)}"


def no_word_of_the_range(answer: Answer, raw: bytes, start: int, stop: int) -> None:
    answer.headers["Content-Range"] = ""


def several_ranges(answer: Answer, raw: bytes, start: int, stop: int) -> None:
    answer.headers["Content-Range"] = ""
    answer.headers["Content-Type"] = "multipart/byteranges; boundary=x"


def another_length(answer: Answer, raw: bytes, start: int, stop: int) -> None:
    answer.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(raw) + 64}"


def a_shorter_file(answer: Answer, raw: bytes, start: int, stop: int) -> None:
    answer.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(raw) - 64}"


def nothing_there(answer: Answer, raw: bytes, start: int, stop: int) -> None:
    answer.status, answer.body = 416, b""
    answer.headers["Content-Range"] = f"bytes */{start}"


def a_longer_body(answer: Answer, raw: bytes, start: int, stop: int) -> None:
    answer.body += b"x"


def a_longer_body_of_no_length(answer: Answer, raw: bytes, start: int, stop: int) -> None:
    answer.body += b"x" * 100_000
    answer.headers["Content-Length"] = ""


def a_shorter_body(answer: Answer, raw: bytes, start: int, stop: int) -> None:
    answer.body = answer.body[:-1]


def a_shorter_body_of_no_length(answer: Answer, raw: bytes, start: int, stop: int) -> None:
    answer.body = answer.body[:-1]
    answer.headers["Content-Length"] = ""


def a_body_that_is_cut(answer: Answer, raw: bytes, start: int, stop: int) -> None:
    answer.headers["Content-Length"] = str(len(answer.body))
    answer.body, answer.cut = answer.body[:-1], True


def another_etag(answer: Answer, raw: bytes, start: int, stop: int) -> None:
    answer.headers["ETag"] = '"two"'


def packed_bytes(answer: Answer, raw: bytes, start: int, stop: int) -> None:
    answer.body = gzip.compress(answer.body)
    answer.headers["Content-Encoding"] = "gzip"


def a_login_page(answer: Answer, raw: bytes, start: int, stop: int) -> None:
    answer.status, answer.body = 200, b"<!doctype html><title>Log in</title>"
    answer.headers.update({"Content-Type": "text/html; charset=utf-8", "Content-Range": "", "ETag": ""})


def a_login_page_of_no_length(answer: Answer, raw: bytes, start: int, stop: int) -> None:
    a_login_page(answer, raw, start, stop)
    answer.headers["Content-Length"] = ""


def another_file(answer: Answer, raw: bytes, start: int, stop: int) -> None:
    answer.status, answer.body = 200, b"{}"
    answer.headers.update({"Content-Type": "application/json", "Content-Range": ""})


def no_content(answer: Answer, raw: bytes, start: int, stop: int) -> None:
    answer.status, answer.body = 203, answer.body
    answer.headers["Content-Range"] = ""


def a_redirection(answer: Answer, raw: bytes, start: int, stop: int) -> None:
    answer.status, answer.body = 302, b""
    answer.headers.update({"Location": "/other", "Content-Range": "", "ETag": ""})


def damage(answer: Answer, raw: bytes, start: int, stop: int) -> None:
    """One wrong byte in the largest record, wherever it is asked for."""
    place = 2 * len(raw) // 3
    if start <= place < stop:
        body = bytearray(answer.body)
        body[place - start] ^= 0x10
        answer.body = bytes(body)


def a_byte_now_and_then(answer: Answer, raw: bytes, start: int, stop: int) -> None:
    answer.drip = 0.05


def honest(answer: Answer, raw: bytes, start: int, stop: int) -> None:
    pass


def sent_in_chunks(answer: Answer, raw: bytes, start: int, stop: int) -> None:
    """What S3 may say of an object for good, because it was sent there so."""
    answer.headers["Content-Encoding"] = "aws-chunked"


def the_whole_file(answer: Answer, raw: bytes, start: int, stop: int) -> None:
    answer.status, answer.body = 200, raw
    answer.headers["Content-Range"] = ""


def the_whole_file_of_no_length(answer: Answer, raw: bytes, start: int, stop: int) -> None:
    the_whole_file(answer, raw, start, stop)
    answer.headers["Content-Length"] = ""
