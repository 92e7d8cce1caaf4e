"""A file that is coming in: in pieces, over several connections, with a note of what is there already.

Bytes go to ``.NAME.part`` beside the file's own place; ``.NAME.part.json`` says which of them are there, and of what.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from svip.data.errors import DataError
from svip.data.sources import Description, Interrupted, Source

log = logging.getLogger(__name__)

PIECE = 8 << 20
"""Bytes that one request asks for; a mirror's checksums are of pieces of this size."""
SAVED_EVERY = 4 << 20
"""Bytes after which the note of what is there is renewed; what came since the last one is lost in a killed process."""
LOOKED_EVERY = 0.01
"""Seconds between two looks at whether so much came."""
LONGEST_WAIT = 60.0
"""Seconds that a server's Retry-After is honoured for, at most."""


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


class Partial:
    """The bytes of ``target`` that came so far, and the note of which those are."""

    def __init__(self, target: Path, digests: Sequence[str] = ()) -> None:
        """``digests``: the sha256 of each PIECE of the whole, where they are known."""
        self.target = target
        self.path = target.with_name(f".{target.name}.part")
        self._note = target.with_name(f".{target.name}.part.json")
        self._digests = digests
        self._had: list[int] = []
        """Of each piece, the bytes from its beginning on that are there; one thread writes a piece."""
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

    def begin(self, address: str, found: Description, *, certain: bool) -> None:
        """Keep what is there if it is of this file at this address; otherwise start empty.

        ``certain``: a checksum of the whole is known, so that even a file without a version can be gone on with.
        """
        of = {"address": address, "size": found.size, "version": found.version, "ranges": found.ranges}
        if of == self._of and (certain or found.version) and found.size is not None:
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

    def receive(self, source: Source, found: Description, connections: int, patience: Patience) -> None:
        """Fetch all that is missing, each piece by itself."""
        stop = threading.Event()
        bar = tqdm(
            total=found.size, initial=self.received, desc=self.target.name, unit="B", unit_scale=True, disable=None
        )
        with open(self.path, "r+b") as file, bar:
            try:
                with ThreadPoolExecutor(connections) as pool:
                    waiting = {
                        pool.submit(
                            self._receive_piece, file.fileno(), piece, source, found, patience, stop, bar.update
                        )
                        for piece in range(len(self._had))
                    }
                    saved = self.received
                    try:
                        while waiting:
                            done, waiting = wait(waiting, LOOKED_EVERY, FIRST_EXCEPTION)
                            for job in done:
                                job.result()
                            if waiting and self.received >= saved + SAVED_EVERY:
                                saved = self.received
                                self._save(file.fileno())  # by this thread alone: no connection waits for the disk
                    finally:
                        stop.set()
                        for job in waiting:
                            job.cancel()
            finally:
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
        left = memoryview(chunk)
        while left:  # a disk that fills up takes a part of it first
            written = os.pwrite(file, left, begin + self._had[piece])
            self._had[piece] += written
            left = left[written:]

    def _save(self, file: int) -> None:
        """The bytes reach the disk before the note that says so."""
        had = list(self._had)
        os.fdatasync(file)
        write_json(self._note, {"of": self._of, "had": had})

    def _span(self, piece: int, size: int | None) -> tuple[int, int | None]:
        if len(self._had) == 1:
            return 0, size
        return piece * PIECE, min((piece + 1) * PIECE, size or 0)

    def _is_wrong(self, piece: int) -> bool:
        """Whether a mirror's checksum says so, of a piece that is there in full."""
        if len(self._had) != len(self._digests):
            return False
        with open(self.path, "rb") as file:
            file.seek(piece * PIECE)
            return hashlib.sha256(file.read(PIECE)).hexdigest() != self._digests[piece]

    def _drop_wrong_pieces(self) -> None:
        for piece, had in enumerate(self._had):
            begin, end = self._span(piece, self._of["size"])
            if end is not None and had == end - begin and self._is_wrong(piece):
                self._had[piece] = 0


def piece_digests(path: Path) -> list[str]:
    """sha256 of each PIECE of a file."""
    with open(path, "rb") as file:
        return [hashlib.sha256(piece).hexdigest() for piece in iter(lambda: file.read(PIECE), b"")]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write it whole or not at all."""
    draft = path.with_name(f".{path.name.lstrip('.')}.draft")
    draft.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(draft, path)
