"""Files fetched from the web, from S3 or from a folder: resumed, in parallel pieces, checked, whole or not at all.

Only what was checked gets the final name, and ``NAME.json`` beside it then records what it was: a file for which no
checksum is published is held against that record ever after.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self, TypeVar

from filelock import FileLock, Timeout
from tqdm import tqdm

from svip.data.errors import DataError
from svip.data.pieces import Partial, Patience, write_json
from svip.data.s3 import S3Source
from svip.data.sources import CHUNK, Changed, FileSource, HttpSource, Interrupted, Source, is_remote
from svip.data.store import sync

log = logging.getLogger(__name__)
T = TypeVar("T")

LOCK = ".lock"
FOUND = "found there"
"""Source of a file that was put into its place by other means."""


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
    connections: int = 4,
    patience: Patience | None = None,
    replace: bool = False,
) -> Record:
    """Fetch one file from the first of its addresses that has it, going on from what an earlier call left behind.

    ``room``: the disk needed, in sizes of the file: more than 1 where it is going to be unpacked. ``connections``
    at once, where the server can do ranges. A second process waits for the first. A ``target`` that is
    there already is checked once and then believed; with ``replace`` it is held for out of date, and stays until the
    new one is whole. DataError when no address gave the expected file: each is named with what happened.
    """
    target, expected, patience = target.resolve(), expected or Expected(), patience or Patience()
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target):
        known = None if replace else Record.read(target)
        if known and not expected.sha256:
            origin = f"as fetched {known.fetched}; if its owners changed it since, remove {Record.path(target)} too"
            expected = dataclasses.replace(expected, size=known.size, sha256=known.sha256, known_from=origin)
        if target.exists() and not replace:
            return _check_present(target, known, expected)
        part = Partial(target, expected.pieces)
        failures = []
        for address in sorted(addresses, key=lambda address: open_source(address).address != part.address):
            try:
                return _fetch(open_source(address), part, expected, room, connections, patience)
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
    try:
        found = _patiently(source.describe, Patience())
    except DataError as error:
        record = Record.read(target) if target.exists() else None
        if record is None:
            raise
        log.warning("%s; using the copy of %s", error, record.fetched)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target):
        record = Record.read(target) if target.exists() else None
        changed = record is not None and (record.size, record.version) != (found.size, found.version)
        if record and changed:
            log.warning("%s has changed since %s; fetching it again", source.address, record.fetched)
        download([uri], target, replace=changed)
    return target


def cache_folder() -> Path:
    """$SVIP_CACHE, else ~/.cache/svip."""
    return Path(os.environ.get("SVIP_CACHE") or Path.home() / ".cache" / "svip")


def read_bytes(address: str) -> bytes:
    """The whole content of a small file at an address; DataError when it can't be had."""
    source = open_source(address)
    return _patiently(lambda: b"".join(source.read(0, None, source.describe())), Patience())


@contextmanager
def locked(target: Path, *, inside: bool = False, wait: bool = True) -> Iterator[None]:
    """One process at a time works on ``target``; the others wait, and say so (``wait`` False: DataError).

    The lock lies beside ``target``; or ``inside`` that folder, which is made if need be, where no other may be written.
    """
    place = target.resolve()
    if inside:
        place.mkdir(parents=True, exist_ok=True)
    path = place / LOCK if inside else place.with_name(f".{target.name}{LOCK}")
    lock = FileLock(path, is_singleton=True)  # may be taken twice
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise DataError(
                f"another process is at work on {target}; wait until it has ended, or use another --out"
            ) from None
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
    source: Source,
    part: Partial,
    expected: Expected,
    room: float,
    connections: int,
    patience: Patience,
    renewals: int = 3,
) -> Record:
    """From one address to the final name; DataError where this address does not give the expected file."""
    found = _patiently(source.describe, patience)
    if found.size is not None and expected.size not in (None, found.size):
        raise DataError(f"{source.address}: has {found.size:,} bytes, expected {expected.size:,}: another file")
    part.begin(source.address, found, certain=bool(expected.sha256 or expected.md5))
    need_room(part.path.parent, int(room * (found.size or 0)) - part.received, "fetch and unpack")
    try:
        part.receive(source, found, connections, patience)
    except Changed as error:
        part.discard()
        if not renewals:
            raise
        log.warning("%s; starting anew", error)
        return _fetch(source, part, expected, room, connections, patience, renewals - 1)
    sha256 = _check(part.path, expected, part.discard)
    os.replace(part.path, part.target)
    sync(part.target.parent)
    part.discard()
    return _record(part.target, sha256, source.address, found.version)


class NoSpace(DataError):
    """The disk is too full, for every address alike."""


def need_room(folder: Path, needed: int, purpose: str) -> None:
    """NoSpace where the disk of ``folder`` has fewer than ``needed`` bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise NoSpace(f"{folder}: {needed:,} bytes needed to {purpose}, {free:,} free; make room")


def _check_present(target: Path, known: Record | None, expected: Expected) -> Record:
    state = target.stat()
    same = known and (known.size, known.modified) == (state.st_size, state.st_mtime_ns)
    if known and same and expected.sha256 in (None, known.sha256):
        return known
    log.info("%s is there already; checking it", target)
    sha256 = _check(target, expected)
    record = _record(target, sha256, known.source if known else FOUND, known.version if known else None)
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
