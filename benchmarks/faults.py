"""A web server with faults, in front of a folder or of another server (an S3 one, say), seeded and counted."""

from __future__ import annotations

import http.client
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

BLOCK = 1 << 16
SMALL = 1 << 16
"""Answers up to this size (errors, listings, probes) are refused at times, but not spoilt."""


@dataclass(frozen=True, kw_only=True)
class Faults:
    """The share of requests that each fault strikes; the first that does is the only one."""

    unavailable: float = 0.0
    """503 in place of an answer."""
    retry_after: str = ""
    """What that 503 says in its header Retry-After."""
    cut: float = 0.0
    """The connection ends at a random byte: of the answer, or of what is being uploaded."""
    stall: float = 0.0
    """Nothing more comes from a random byte on, though the connection stays open."""
    wrong_range: float = 0.0
    """Content-Range is that of another range."""
    other_bytes: float = 0.0
    """The right Content-Range over bytes that are all others."""
    ignore_range: float = 0.0
    """200 and the whole file (of a server behind, whose signatures cover the request: 200 and no Content-Range)."""
    wrong_byte: float = 0.0
    """One byte is another."""


class FaultyServer(ThreadingHTTPServer):
    """Serves the folder ``behind`` (with ranges and ETags), or passes on to the server at that address."""

    daemon_threads = True

    def __init__(self, behind: Path | str, faults: Faults, seed: int = 0, stalled: float = 5.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind, self.faults, self.stalled = behind, faults, stalled
        self.requests = self.sent = self.received = self.struck = 0
        self.at_bytes: tuple[int, Callable[[], None]] | None = None
        """What to do once so many bytes were sent, such as changing the file; nothing is sent meanwhile."""
        self._random, self._lock = random.Random(seed), threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def draw(self, names: tuple[str, ...]) -> tuple[str, float]:
        """One of these faults or "", and where it strikes (0..1)."""
        with self._lock:
            self.requests += 1
            place = self._random.random()
            for name in names:
                if self._random.random() < getattr(self.faults, name):
                    self.struck += 1
                    return name, place
            return "", place

    def count(self, sent: int = 0, received: int = 0) -> None:
        with self._lock:
            self.sent += sent
            self.received += received
            if self.at_bytes and self.sent >= self.at_bytes[0]:
                action, self.at_bytes = self.at_bytes[1], None
                action()

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients hang up: that is what is being tried here."""


@contextmanager
def serving(server: FaultyServer) -> Iterator[FaultyServer]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def setup(self) -> None:
        # what waits in a buffer when a client hangs up counts as sent: let it be little
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BLOCK)
        super().setup()

    def do_GET(self) -> None:
        self.close_connection = True
        fault, place = self.server.draw(
            ("unavailable", "cut", "stall", "wrong_range", "other_bytes", "ignore_range", "wrong_byte")
        )
        if fault == "unavailable":
            self._refuse()
            return
        asked = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        if fault == "ignore_range" and isinstance(self.server.behind, Path):
            asked.pop("Range", None)
        status, headers, body, length = self._answer(asked)
        if fault == "ignore_range" and status == 206:
            status = 200
            headers.pop("Content-Range")
        if fault == "wrong_range" and status == 206:
            first, last, size = re.findall(r"\d+", headers["Content-Range"])
            headers["Content-Range"] = f"bytes {int(first) + 1}-{int(last) + 1}/{size}"
        self._send(status, headers, body, length, fault if length > SMALL else "", int(place * length))

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        self.close_connection = True
        fault, place = self.server.draw(("unavailable", "cut"))
        length = int(self.headers.get("Content-Length", 0))
        if fault == "cut" and length > SMALL:
            self.server.count(received=len(self.rfile.read(int(place * length))))
            return
        body = self.rfile.read(length)
        self.server.count(received=length)
        if fault == "unavailable":
            self._refuse()
            return
        status, headers, answer, size = self._pass_on(dict(self.headers.items()), body)
        self._send(status, headers, answer, size, "", 0)

    do_POST = do_DELETE = do_PUT

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def _refuse(self) -> None:
        self.send_response(503)
        if self.server.faults.retry_after:
            self.send_header("Retry-After", self.server.faults.retry_after)
        self.send_header("Content-Length", "0")
        self.send_header("Connection", "close")
        self.end_headers()

    def _answer(self, asked: dict[str, str]) -> tuple[int, dict[str, str], Iterator[bytes], int]:
        return self._pass_on(asked, b"") if isinstance(self.server.behind, str) else self._file(asked)

    def _pass_on(self, asked: dict[str, str], body: bytes) -> tuple[int, dict[str, str], Iterator[bytes], int]:
        connection = http.client.HTTPConnection(urlsplit(str(self.server.behind)).netloc, timeout=60)
        asked.pop("Expect", None)
        connection.request(self.command, self.path, body or None, asked)  # Host as it was: S3 signatures cover it
        answer = connection.getresponse()
        headers = {
            name: value
            for name, value in answer.getheaders()
            if name.lower() not in ("connection", "transfer-encoding", "keep-alive", "content-length")
        }
        length = int(answer.headers.get("Content-Length") or 0)
        if self.command != "HEAD" and answer.headers.get("Content-Length") is None:
            whole = answer.read()
            return answer.status, headers, iter([whole]), len(whole)
        return answer.status, headers, iter(lambda: answer.read(BLOCK), b""), length

    def _file(self, asked: dict[str, str]) -> tuple[int, dict[str, str], Iterator[bytes], int]:
        file = Path(self.server.behind) / unquote(urlsplit(self.path).path).lstrip("/")
        if not file.is_file():
            return 404, {}, iter([]), 0
        state = file.stat()
        headers = {"ETag": f'"{state.st_mtime_ns:x}-{state.st_size:x}"', "Content-Type": "application/octet-stream"}
        first, last = 0, state.st_size - 1
        span = asked.get("Range", "").removeprefix("bytes=").partition("-")
        partial = bool(span[0]) and asked.get("If-Range") in (None, headers["ETag"])
        if partial:
            first, last = int(span[0]), min(int(span[2] or last), last)
            headers["Content-Range"] = f"bytes {first}-{last}/{state.st_size}"
        return (206 if partial else 200), headers, _blocks(file, first, last + 1), last + 1 - first

    def _send(
        self, status: int, headers: dict[str, str], body: Iterator[bytes], length: int, fault: str, place: int
    ) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.send_header("Connection", "close")
        self.end_headers()
        done = 0
        for block in body if self.command != "HEAD" else ():
            if fault == "wrong_byte" and done <= place < done + len(block):
                at = place - done
                block = block[:at] + bytes([block[at] ^ 1]) + block[at + 1 :]
            if fault == "other_bytes":
                block = bytes(byte ^ 1 for byte in block)
            if fault in ("cut", "stall") and done + len(block) > place:
                block = block[: place - done]
            self.wfile.write(block)
            self.server.count(sent=len(block))
            done += len(block)
            if fault in ("cut", "stall") and done == place:
                self.wfile.flush()
                time.sleep(self.server.stalled if fault == "stall" else 0)
                return


def _blocks(file: Path, start: int, stop: int) -> Iterator[bytes]:
    with open(file, "rb") as opened:
        opened.seek(start)
        while start < stop and (block := opened.read(min(BLOCK, stop - start))):
            start += len(block)
            yield block
