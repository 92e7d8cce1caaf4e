"""Files fetched from the web, from S3 or from a folder: resumed, in parallel parts, checked, whole or not at all.

Bytes go to ``.NAME.part`` beside the target; ``.NAME.part.json`` says which of them are there, and of which file. Only
what was checked gets the final name, and ``NAME.json`` beside it then records what it was: a file for which no checksum
is published is held against that record ever after.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, TypeVar

from filelock import FileLock, Timeout
from tqdm import tqdm

from svip.data.bundle import DataError
from svip.data.s3 import S3Source
from svip.data.sources import CHUNK, Changed, Description, FileSource, HttpSource, Interrupted, Source, is_remote

log = logging.getLogger(__name__)
T = TypeVar("T")

PIECE = 8 << 20
"""Bytes that one request asks for; a mirror's checksums are of pieces of this size."""
SAVED_EVERY = 4 << 20
"""Bytes between two notes of what is there, and so what a killed process may lose at most, times its connections."""
LONGEST_WAIT = 60.0
"""Seconds that a server's Retry-After is honoured for, at most."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What is known of a file before it is fetched."""

    size: int | None = None
    md5: str | None = None
    sha256: str | None = None
    pieces: tuple[str, ...] = ()
    """sha256 of each PIECE of it, where a mirror gives them."""
    known_from: str = "as published"


@dataclass(frozen=True, kw_only=True)
class Patience:
    """When to give up. An attempt that brought bytes is no failure: only those in a row that brought none count."""

    attempts: int = 8
    probes: int = 4
    """Attempts to learn of what size a file is, before the next address is tried."""
    first: float = 0.5
    """Seconds: the bound of the first pause, doubled after each further failure."""
    longest: float = 30.0

    def pause(self, failures: int, asked: float) -> float:
        """Seconds: random between 0 and the bound, so that many clients do not come back at once."""
        own = random.uniform(0, min(self.longest, self.first * 2 ** (failures - 1)))
        return own + min(asked, LONGEST_WAIT)


@dataclass(frozen=True, kw_only=True)
class Record:
    """What NAME.json says of a file that was fetched and checked."""

    size: int
    sha256: str
    source: str
    version: str | None
    fetched: str
    modified: int
    """Time of change (ns) of the file when it was checked: with another one it is checked again."""
    extracted: list[str] | None = None
    """Entries that it was unpacked to."""

    @staticmethod
    def path(target: Path) -> Path:
        return target.with_name(f"{target.name}.json")

    @classmethod
    def read(cls, target: Path) -> Self | None:
        """The record of ``target``, None where there is none; DataError when it can't be read."""
        path = cls.path(target)
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise DataError(f"{path} is not a record of a download ({error}); remove it") from error

    def write(self, target: Path) -> None:
        write_json(self.path(target), asdict(self))


def open_source(address: str) -> Source:
    """The source behind a path or an address with http(s)://, s3:// or file://."""
    if address.startswith("s3://"):
        return S3Source(address)
    return HttpSource(address) if is_remote(address) else FileSource(address)


def download(
    addresses: Sequence[str],
    target: Path,
    expected: Expected | None = None,
    *,
    room: float = 1.0,
    parts: int = 4,
    patience: Patience | None = None,
) -> Record:
    """Fetch one file from the first of its addresses that has it, going on from what an earlier call left behind.

    ``room``: the disk needed, in sizes of the file: more than 1 where it is going to be unpacked. ``parts``:
    connections at once, where the server can do ranges. A second process waits for the first. A ``target`` that is
    there already is checked once and then believed. DataError when no address gave the expected file: each is named
    with what happened.
    """
    target, expected, patience = target.resolve(), expected or Expected(), patience or Patience()
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target):
        known = Record.read(target)
        if known and not expected.sha256:
            origin = f"as fetched {known.fetched}; if its owners changed it since, remove {Record.path(target)} too"
            expected = dataclasses.replace(expected, size=known.size, sha256=known.sha256, known_from=origin)
        if target.exists():
            return _check_present(target, known, expected)
        part = _Part(target, expected)
        failures = []
        for address in sorted(addresses, key=lambda address: open_source(address).address != part.address):
            try:
                return _fetch(open_source(address), part, expected, room, parts, patience)
            except NoSpace:
                raise
            except DataError as error:
                failures.append(str(error))
            except OSError as error:
                raise DataError(
                    f"{part.path}: {error.strerror}; what came is kept: the same command goes on"
                ) from error
        kept = f" ({part.received:,} bytes are kept: the same command goes on from there)" if part.received else ""
        raise DataError(f"{target.name} could not be fetched{kept}:" + "".join(f"\n  {each}" for each in failures))


def local_copy(uri: str, cache: Path | None = None) -> Path:
    """A file on this machine with the content of ``uri``; a path is returned as it is.

    What http(s):// and s3:// name is downloaded to ``cache`` ($SVIP_CACHE, else ~/.cache/svip), once: again only when
    size or version (ETag) there have changed. Where the address can't be reached, a copy that is there is used, with a
    warning. DataError when there is none.
    """
    if not is_remote(uri):
        return Path(uri)
    source = open_source(uri)
    name = re.sub(r"[^\w.+-]", "_", source.address.rstrip("/").rpartition("/")[2])
    target = (cache or cache_folder()) / hashlib.sha256(uri.encode()).hexdigest()[:12] / name
    record = Record.read(target) if target.exists() else None
    try:
        found = _patiently(source.describe, Patience())
    except DataError as error:
        if record is None:
            raise
        log.warning("%s; using the copy of %s", error, record.fetched)
        return target
    if record and (record.size, record.version) != (found.size, found.version):
        log.warning("%s has changed since %s; fetching it again", source.address, record.fetched)
        Record.path(target).unlink()
        target.unlink()
    download([uri], target)
    return target


def cache_folder() -> Path:
    """$SVIP_CACHE, else ~/.cache/svip."""
    return Path(os.environ.get("SVIP_CACHE") or Path.home() / ".cache" / "svip")


def read_bytes(address: str) -> bytes:
    """The whole content of a small file at an address; DataError when it can't be had."""
    source = open_source(address)
    return _patiently(lambda: b"".join(source.read(0, None, source.describe())), Patience())


def piece_digests(path: Path) -> list[str]:
    """sha256 of each PIECE of a file."""
    with open(path, "rb") as file:
        return [hashlib.sha256(piece).hexdigest() for piece in iter(lambda: file.read(PIECE), b"")]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write it whole or not at all."""
    draft = path.with_name(f".{path.name.lstrip('.')}.draft")
    draft.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(draft, path)


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """One process at a time works on ``target``; the others wait, and say so."""
    lock = FileLock(target.resolve().with_name(f".{target.name}.lock"), is_singleton=True)  # may be taken twice
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("another process is at work on %s; waiting for it", target)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _patiently(action: Callable[[], T], patience: Patience) -> T:
    failures = 0
    while True:
        try:
            return action()
        except Interrupted as error:
            failures += 1
            if failures == patience.probes:
                raise
            time.sleep(patience.pause(failures, error.wait))


def _fetch(
    source: Source, part: _Part, expected: Expected, room: float, parts: int, patience: Patience, renewals: int = 3
) -> Record:
    """From one address to the final name; DataError where this address does not give the expected file."""
    found = _patiently(source.describe, patience)
    if found.size is not None and expected.size not in (None, found.size):
        raise DataError(f"{source.address}: has {found.size:,} bytes, expected {expected.size:,}: another file")
    part.begin(source.address, found)
    needed, free = int(room * (found.size or 0)) - part.received, shutil.disk_usage(part.path.parent).free
    if needed > free:
        raise NoSpace(f"{part.path.parent}: {needed:,} bytes needed to fetch and unpack, {free:,} free; make room")
    try:
        part.receive(source, found, parts, patience)
    except Changed as error:
        part.discard()
        if not renewals:
            raise
        log.warning("%s; starting anew", error)
        return _fetch(source, part, expected, room, parts, patience, renewals - 1)
    sha256 = _check(part.path, expected, part.discard)
    os.replace(part.path, part.target)
    _sync_folder(part.target.parent)
    part.discard()
    return _record(part.target, sha256, source.address, found.version)


class NoSpace(DataError):
    """The disk is too full, for every address alike."""


class _Part:
    """The bytes of ``target`` that came so far, and the note of which those are."""

    def __init__(self, target: Path, expected: Expected) -> None:
        self.target = target
        self.path = target.with_name(f".{target.name}.part")
        self._note = target.with_name(f".{target.name}.part.json")
        self._expected = expected
        self._lock = threading.Lock()
        self._unsaved = 0
        self._had: list[int] = []
        """Of each piece, the bytes from its beginning on that are there."""
        self._of: dict[str, Any] = {}
        """Address, size and version of the file that the bytes are of."""
        try:
            note = json.loads(self._note.read_text(encoding="utf-8"))
            if self.path.exists():
                self._of, self._had = note["of"], note["had"]
        except (FileNotFoundError, ValueError, KeyError):
            pass

    @property
    def address(self) -> str:
        return str(self._of.get("address", ""))

    @property
    def received(self) -> int:
        return sum(self._had)

    def begin(self, address: str, found: Description) -> None:
        """Keep what is there if it is of this file at this address; otherwise start empty."""
        of = {"address": address, "size": found.size, "version": found.version}
        certain = found.version or self._expected.sha256 or self._expected.md5
        if of == self._of and certain and found.size is not None:
            self._drop_wrong_pieces()
            log.info("%s: going on at %s of %s bytes", self.target.name, f"{self.received:,}", f"{found.size:,}")
            return
        if self.received:
            log.warning("%s: the file at %s is another than the one begun; starting anew", self.target.name, address)
        self.discard()
        pieces = -(-found.size // PIECE) if found.size and found.ranges else 1
        self._of, self._had = of, [0] * pieces
        with open(self.path, "wb") as file:
            file.truncate(found.size or 0)

    def receive(self, source: Source, found: Description, parts: int, patience: Patience) -> None:
        """Fetch all that is missing, each piece by itself."""
        stop = threading.Event()
        bar = tqdm(
            total=found.size, initial=self.received, desc=self.target.name, unit="B", unit_scale=True, disable=None
        )
        with open(self.path, "r+b") as file, bar, ThreadPoolExecutor(parts) as pool:
            jobs = [
                pool.submit(self._receive_piece, file.fileno(), piece, source, found, patience, stop, bar.update)
                for piece in range(len(self._had))
            ]
            try:
                for job in as_completed(jobs):
                    job.result()
            finally:
                stop.set()
                for job in jobs:
                    job.cancel()
                self._save(file.fileno())

    def discard(self) -> None:
        self._of, self._had = {}, []
        self._note.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def _receive_piece(
        self,
        file: int,
        piece: int,
        source: Source,
        found: Description,
        patience: Patience,
        stop: threading.Event,
        advance: Callable[[int], Any],
    ) -> None:
        begin, end = self._span(piece, found.size)
        failures = wrong = 0
        while end is None or begin + self._had[piece] < end:
            before = self._had[piece]
            try:
                for chunk in source.read(begin + before, end, found):
                    self._put(file, piece, begin, chunk)
                    advance(len(chunk))
                    if stop.is_set():
                        return
            except Interrupted as error:
                failures = 1 if self._had[piece] > before else failures + 1
                if failures == patience.attempts:
                    raise
                log.debug("%s; trying again", error)
                if stop.wait(patience.pause(failures, error.wait)):
                    return
                continue
            if self._is_wrong(piece):
                wrong += 1
                if wrong == 3:
                    raise DataError(f"{source.address}: piece {piece} came three times with the wrong bytes")
                log.warning("%s: wrong bytes in piece %d; fetching it again", source.address, piece)
                advance(-self._had[piece])
                self._had[piece] = 0
            elif end is None:
                return

    def _put(self, file: int, piece: int, begin: int, chunk: bytes) -> None:
        os.pwrite(file, chunk, begin + self._had[piece])
        with self._lock:
            self._had[piece] += len(chunk)
            self._unsaved += len(chunk)
            if self._unsaved >= SAVED_EVERY:
                self._save(file)

    def _save(self, file: int) -> None:
        """The bytes reach the disk before the note that says so."""
        had = list(self._had)
        os.fdatasync(file)
        write_json(self._note, {"of": self._of, "had": had})
        self._unsaved = 0

    def _span(self, piece: int, size: int | None) -> tuple[int, int | None]:
        if len(self._had) == 1:
            return 0, size
        return piece * PIECE, min((piece + 1) * PIECE, size or 0)

    def _is_wrong(self, piece: int) -> bool:
        """Whether a mirror's checksum says so, of a piece that is there in full."""
        if len(self._had) != len(self._expected.pieces):
            return False
        with open(self.path, "rb") as file:
            file.seek(piece * PIECE)
            return hashlib.sha256(file.read(PIECE)).hexdigest() != self._expected.pieces[piece]

    def _drop_wrong_pieces(self) -> None:
        for piece, had in enumerate(self._had):
            begin, end = self._span(piece, self._of["size"])
            if end is not None and had == end - begin and self._is_wrong(piece):
                self._had[piece] = 0


def _check_present(target: Path, known: Record | None, expected: Expected) -> Record:
    state = target.stat()
    same = known and (known.size, known.modified) == (state.st_size, state.st_mtime_ns)
    if known and same and expected.sha256 in (None, known.sha256):
        return known
    log.info("%s is there already; checking it", target)
    sha256 = _check(target, expected)
    record = _record(target, sha256, known.source if known else "found there", known.version if known else None)
    if known:
        record = dataclasses.replace(record, extracted=known.extracted)
        record.write(target)
    return record


def _check(path: Path, expected: Expected, discard: Callable[[], None] | None = None) -> str:
    """The file's sha256; DataError where size or a checksum is not the expected one (the bytes are then discarded)."""
    size = path.stat().st_size
    digests = {"sha256": hashlib.sha256(), "md5": hashlib.md5(usedforsecurity=False)}
    if expected.md5 is None:
        del digests["md5"]
    with open(path, "rb") as file, tqdm(total=size, desc="checking", unit="B", unit_scale=True, disable=None) as bar:
        while chunk := file.read(CHUNK):
            for digest in digests.values():
                digest.update(chunk)
            bar.update(len(chunk))
    found = {"size": size, **{name: digest.hexdigest() for name, digest in digests.items()}}
    for name, value in found.items():
        wanted = getattr(expected, name)
        if wanted not in (None, value):
            if discard:
                discard()
            remedy = "what came is removed, fetch it again" if discard else "remove it and run the same command again"
            raise DataError(f"{path}: {name} is {value}, expected {wanted} ({expected.known_from}); {remedy}")
    return str(found["sha256"])


def _record(target: Path, sha256: str, source: str, version: str | None) -> Record:
    state = target.stat()
    record = Record(
        size=state.st_size,
        sha256=sha256,
        source=source,
        version=version,
        fetched=datetime.now(UTC).isoformat(timespec="seconds"),
        modified=state.st_mtime_ns,
    )
    record.write(target)
    return record


def _sync_folder(folder: Path) -> None:
    """The new name reaches the disk too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
