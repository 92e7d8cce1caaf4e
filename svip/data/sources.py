"""Where bytes come from: an address can be described once and read by ranges, whatever its kind.

Every answer is checked here (status, range, length, same file as described), so that what comes out of ``read`` is what
was asked for or an error: Interrupted (try again), Changed (start anew), or a plain DataError (no use trying again).
"""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

import requests
import urllib3

from svip.data.errors import DataError

CHUNK = 1 << 18
"""Bytes that a source hands out at a time, at most."""
CONNECT, STALL = 10.0, 30.0
"""Seconds to wait for a connection, and for the next bytes of an answer."""


class Interrupted(DataError):
    """Worth another try; ``wait``: the seconds that the server asked for."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


class Changed(DataError):
    """The file at an address is no longer the one that was described."""


@dataclass(frozen=True)
class Description:
    size: int | None
    """Bytes; None where the server does not say."""
    version: str | None
    """ETag or time of change, which tells another file under the same address; None where the server gives none."""
    ranges: bool
    """Whether any range of it can be read."""


class Source(Protocol):
    address: str
    """For messages: without user, password and query, which may hold secrets."""

    def describe(self) -> Description: ...

    def read(self, start: int, stop: int | None, of: Description) -> Iterator[bytes]:
        """Bytes start..stop of the file that ``of`` describes (``stop`` None: to its end), exactly."""
        ...


def is_remote(address: str) -> bool:
    return address.startswith(("http://", "https://", "s3://"))


def shown(address: str) -> str:
    """The address as messages may have it: without user, password and query. A path is shown as it is."""
    if not is_remote(address):
        return address
    scheme, _, rest = re.split("[?#]", address, maxsplit=1)[0].partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def exactly(chunks: Iterable[bytes], expected: int | None, address: str) -> Iterator[bytes]:
    """The chunks; Interrupted where they are fewer or more bytes than expected."""
    total = 0
    for chunk in chunks:
        total += len(chunk)
        if expected is not None and total > expected:
            raise Interrupted(f"{address}: more than the {expected:,} bytes that were announced")
        yield chunk
    if expected is not None and total < expected:
        raise Interrupted(f"{address}: the connection was cut after {total:,} of {expected:,} bytes")


class FileSource:
    """A file that this machine can open: a path or a file:// address."""

    def __init__(self, address: str) -> None:
        self._path = Path(unquote(urlsplit(address).path) if address.startswith("file://") else address)
        self.address = str(self._path)

    def describe(self) -> Description:
        with self._explained():
            if not self._path.is_file():
                raise DataError(f"{self.address}: there is no such file")
            state = self._path.stat()
        return Description(state.st_size, str(state.st_mtime_ns), ranges=True)

    def read(self, start: int, stop: int | None, of: Description) -> Iterator[bytes]:
        if self.describe() != of:
            raise Changed(f"{self.address} was changed")
        with self._explained(), open(self._path, "rb") as file:
            file.seek(start)
            left = (of.size or 0) - start if stop is None else stop - start
            while chunk := file.read(min(CHUNK, left)):
                left -= len(chunk)
                yield chunk
        if left:
            raise Changed(f"{self.address} became shorter")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """An address that can't be read is not the fault of the disk that is written to."""
        try:
            yield
        except OSError as error:
            raise DataError(f"{self.address}: can't be read ({error.strerror})") from error


class HttpSource:
    """A file on a web server. Ranges are probed, not believed: only 206 with the right Content-Range counts."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._session = requests.Session()  # keeps connections open between pieces
        self.address = shown(url)

    def describe(self) -> Description:
        with self._get({"Range": "bytes=0-0"}) as answer:
            version = _version(answer.headers)
            span = answer.headers.get("Content-Range", "")
            if answer.status_code == 206 and span.startswith("bytes 0-0/") and span[10:].isdigit():
                return Description(int(span[10:]), version, ranges=True)
            if answer.status_code == 416 and span == "bytes */0":
                return Description(0, version, ranges=False)
            if answer.status_code != 200:
                raise Interrupted(f"{self.address}: {answer.status_code} with Content-Range {span!r} to bytes=0-0")
            length = answer.headers.get("Content-Length", "")
            return Description(int(length) if length.isdigit() else None, version, ranges=False)

    def read(self, start: int, stop: int | None, of: Description) -> Iterator[bytes]:
        headers = {}
        if of.ranges:
            stop = of.size if stop is None else stop
            headers["Range"] = f"bytes={start}-{(stop or 0) - 1}"
            if of.version:
                headers["If-Range"] = of.version
        with self._get(headers) as answer:
            version = _version(answer.headers)
            if version and of.version and version != of.version:
                raise Changed(f"{self.address} was changed while it was being fetched")
            if of.ranges:
                wanted = f"bytes {start}-{(stop or 0) - 1}/{of.size}"
                found = answer.headers.get("Content-Range")
                if answer.status_code != 206 or found != wanted:
                    raise Interrupted(f"{self.address}: asked for {wanted}, answered {answer.status_code} {found}")
                yield from exactly(self._body(answer), (stop or 0) - start, self.address)
                return
            # no ranges: the whole file comes, and what is there already is passed over
            if answer.status_code != 200:
                raise Interrupted(f"{self.address}: answered {answer.status_code} to a plain request")
            skip = start
            for chunk in exactly(self._body(answer), of.size, self.address):
                if len(chunk) > skip:
                    yield chunk[skip:]
                skip = max(skip - len(chunk), 0)

    def _get(self, headers: Mapping[str, str]) -> requests.Response:
        try:
            # identity: a compressed answer has neither the ranges nor the length of the file
            headers = {"Accept-Encoding": "identity", **headers}
            answer = self._session.get(self._url, headers=headers, stream=True, timeout=(CONNECT, STALL))
        except requests.RequestException as error:
            raise Interrupted(f"{self.address}: {_plain(error)}") from None  # its own text holds the query
        status = answer.status_code
        if status >= 500 or status in (408, 425, 429):
            answer.close()
            raise Interrupted(
                f"{self.address}: answered {status}", seconds_asked(answer.headers.get("Retry-After", ""))
            )
        if status >= 400 and status != 416:
            answer.close()
            raise DataError(f"{self.address}: answered {status} ({answer.reason})")
        if answer.headers.get("Content-Type", "").startswith("text/html"):
            answer.close()
            raise DataError(f"{self.address}: answers with a web page; the file has moved")
        return answer

    def _body(self, answer: requests.Response) -> Iterator[bytes]:
        try:
            # the raw stream: some servers label a .tar.gz as a compressed .tar, and requests would unpack it
            yield from answer.raw.stream(CHUNK, decode_content=False)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise Interrupted(f"{self.address}: {_plain(error)}") from None


def _version(headers: Mapping[str, str]) -> str | None:
    """What If-Range takes: a strong ETag, else the time of change."""
    etag = headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")


def seconds_asked(retry_after: str) -> float:
    """Seconds from now that a header Retry-After asks for, which holds a number or a date; 0 if it holds neither."""
    if retry_after.isdigit():
        return float(retry_after)
    try:
        return max(email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        return 0.0


def _plain(error: Exception) -> str:
    text = f"{type(error).__name__} {error}"
    if "NameResolution" in text:
        return "the host's name is unknown"
    if "ConnectTimeout" in text:
        return f"no connection within {CONNECT:g} s"
    if "timed out" in text or "ReadTimeout" in text:
        return f"nothing came for {STALL:g} s"
    if "SSL" in text or "certificate" in text:
        return "no secure connection (certificate or protocol)"
    if "refused" in text:
        return "the connection was refused"
    return f"the connection failed or was cut ({type(error).__name__})"
