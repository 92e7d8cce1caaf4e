"""What is on its way to MLflow: a file a run, in which each record is kept until the server has acknowledged it.

A journal is a file of JSON lines that only ever grows. Its first line says which run and server it belongs to, then
come the records in the order in which they were logged, and among them notes of how far they were acknowledged. A
process that is killed at any moment leaves at worst a last line without its end, which is not a record yet.

The folder is ``$SVIP_OUTBOX``, else ``.svip-outbox`` of the current one: like the default store it lies where the user
works, which in a container is the folder that is mounted and may be written to.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from svip.tracking.store import TrackingError

log = logging.getLogger(__name__)

FORMAT = 1
LOCAL = "local-"
"""How ids begin of runs that MLflow doesn't know yet."""
COPIED = 64 * 2**20
"""Bytes: an artifact up to this size is copied into the outbox, as its file may change; a larger one is referred to."""


class Busy(TrackingError):
    """A journal that a running process is writing to."""


@dataclass(frozen=True)
class Record:
    """One line that MLflow is to receive."""

    kind: str
    content: Mapping[str, Any]
    end: int
    """Where its line ends in the journal, in bytes."""


def outbox_folder() -> Path:
    """The outbox; where it can't be made, one in the temporary folder, as no run ends for it."""
    folder = Path(os.environ.get("SVIP_OUTBOX") or ".svip-outbox").absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if there.is_dir() and os.access(there, os.W_OK):
        return folder
    instead = Path(tempfile.gettempdir()) / f"svip-outbox-{os.getuid()}"
    log.warning("%s can't be written to: what is on its way to MLflow is kept in %s; set SVIP_OUTBOX", folder, instead)
    return instead


def new_local_id() -> str:
    return f"{LOCAL}{uuid.uuid4().hex}"


def is_local(run_id: str) -> bool:
    return run_id.startswith(LOCAL)


def now() -> int:
    """Milliseconds since 1970, as MLflow counts time."""
    return int(time.time() * 1000)


class Journal:
    """A run's journal, locked for this process. Made by ``create``, ``open`` or ``find``, ended by ``close``."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.files = path.with_suffix(".files")
        """Folder of the copied artifacts."""
        self.sent = 0
        """Bytes up to which all is acknowledged."""
        self.ahead: set[int] = set()
        """Ends of records that are acknowledged although others before them are not."""
        self.run_id = ""
        """The run's id in MLflow, once there is one."""
        self.unended = False
        """Whether a process that was to end the run has not done so."""
        self.last_time = 0
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self.header = self._recover()

    @classmethod
    def create(cls, folder: Path, run_id: str, uri: str) -> Self:
        """A journal of its own for a run (or a local id); ``uri``: the server, without a password."""
        header = {"kind": "outbox", "format": FORMAT, "id": run_id, "uri": uri, "time": now()}
        path = folder / f"{run_id}.jsonl"
        while path.exists():
            path = folder / f"{run_id}.{uuid.uuid4().hex[:6]}.jsonl"
        part = path.with_suffix(".part")
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # another process has just removed the folder as empty
                descriptor = os.open(part, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
                break
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # before it has a name under which others look for it
        os.write(descriptor, _line(header))
        part.rename(path)
        return cls(path, descriptor)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Go on with a journal. Raises Busy, FileNotFoundError, or TrackingError where the file isn't one."""
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(descriptor).st_nlink:
                raise FileNotFoundError(path)  # its owner has sent all and removed it
            return cls(path, descriptor)
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise Busy(f"{path} is being written to by a running process") from None
            raise

    @classmethod
    def find(cls, folder: Path, run_id: str, uri: str) -> Self | None:
        """The journal that an earlier process left of a run at ``uri``, under its id or its local one."""
        for path in journals(folder):
            with contextlib.suppress(TrackingError, FileNotFoundError, PermissionError):  # it may be another user's
                if run_id.encode() not in path.read_bytes():
                    continue  # not even locked for a moment
                journal = cls.open(path)
                if run_id in (journal.id, journal.run_id) and journal.uri == uri:
                    return journal
                journal.close()
        return None

    @property
    def id(self) -> str:
        """The id that the run was opened with: MLflow's, or a local one."""
        return str(self.header["id"])

    @property
    def uri(self) -> str:
        return str(self.header["uri"])

    def append(self, kind: str, **content: Any) -> int:
        """Write a record; where its line ends. Raises OSError, and then it is as if it had not been written."""
        line = _line({"kind": kind, **content})
        with self._lock:
            start = os.fstat(self._descriptor).st_size
            try:
                written = 0
                while written < len(line):
                    written += os.write(self._descriptor, line[written:])
            except OSError:
                os.ftruncate(self._descriptor, start)
                raise
            self._notice(kind, content)
        return start + len(line)

    def acknowledge(self, end: int, run_id: str = "") -> None:
        """MLflow has all records up to ``end``."""
        self.append("sent", end=end, run_id=run_id or self.run_id)

    def acknowledge_ahead(self, records: Sequence[Record]) -> None:
        """MLflow has these records, which have overtaken others."""
        self.append("ahead", ends=[record.end for record in records])

    def pending(self, limit: int | None = None) -> list[Record]:
        """The first records that are not acknowledged."""
        found: list[Record] = []
        for record in self._records(self.sent):
            if record.kind not in ("sent", "ahead", "outbox") and record.end not in self.ahead:
                found.append(record)
                if len(found) == limit:
                    break
        return found

    def keep(self, path: Path) -> dict[str, str]:
        """What a record says of a file or folder, so that it can be sent later as it is now: a copy, or where it is."""
        sizes = [file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if not file.is_dir()]
        if sum(sizes) > COPIED:
            return {"path": str(path.absolute())}
        place = None
        try:
            self.files.mkdir(exist_ok=True)
            place = Path(tempfile.mkdtemp(dir=self.files))
            shutil.copytree(path, place / path.name) if path.is_dir() else shutil.copyfile(path, place / path.name)
        except OSError:  # a full disk
            if place is not None:
                shutil.rmtree(place)
            return {"path": str(path.absolute())}
        return {"copy": str((place / path.name).relative_to(self.files))}

    def kept(self, content: Mapping[str, str]) -> Path:
        """Where the file or folder is of which ``keep`` said this."""
        return self.files / content["copy"] if "copy" in content else Path(content["path"])

    def discard(self, content: Mapping[str, str]) -> None:
        """Remove the copy of what was sent."""
        if "copy" in content:
            shutil.rmtree(self.kept(content).parent, ignore_errors=True)  # what stays goes with the journal

    def sync(self) -> None:
        """Bring it to the disk: what is written survives a killed process without it, but not a power failure."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Give it up to other processes."""
        with self._lock:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # forked processes hold the same lock
            os.close(self._descriptor)
            self._descriptor = -1  # whoever still writes gets an OSError, not another's file

    def remove(self) -> None:
        """Close it and remove it, and the folder with the last one."""
        shutil.rmtree(self.files, ignore_errors=True)
        self.path.unlink()
        self.close()
        with contextlib.suppress(OSError):  # other journals are there
            self.path.parent.rmdir()

    def _recover(self) -> dict[str, Any]:
        """Cut off an unfinished line, and learn what the others say."""
        header: dict[str, Any] = {}
        end = 0
        for record in self._records(0):
            end = record.end
            if not header:
                header = dict(record.content) if record.kind == "outbox" else {}
                if header.get("format") != FORMAT:
                    raise TrackingError(f"{self.path} is not a journal of format {FORMAT}; remove it")
            self._notice(record.kind, record.content)
        if not header:
            raise TrackingError(f"{self.path} is not a journal of format {FORMAT}; remove it")
        if end < os.fstat(self._descriptor).st_size:
            os.ftruncate(self._descriptor, end)
        return header

    def _notice(self, kind: str, content: Mapping[str, Any]) -> None:
        if kind == "sent":
            self.sent, self.run_id = content["end"], content["run_id"]
        elif kind == "ahead":
            self.ahead.update(content["ends"])
        elif kind == "open":
            self.unended = self.unended or content["owns"]
        elif kind == "end":
            self.unended = False
        self.last_time = max(self.last_time, content.get("time", 0))

    def _records(self, start: int) -> Iterator[Record]:
        """The whole lines from ``start``; one that can't be read is an error, as nothing writes such."""
        with self.path.open("rb") as file:
            file.seek(start)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                start += len(line)
                try:
                    content = json.loads(line)
                    kind = content.pop("kind")
                except (ValueError, KeyError, AttributeError, TypeError) as error:
                    raise TrackingError(f"{self.path}: the line that ends at byte {start} is damaged") from error
                yield Record(kind, content, start)


def journals(folder: Path) -> list[Path]:
    """All journals of an outbox."""
    return sorted(folder.glob("*.jsonl"))


def run_to_open(folder: Path, tag: str, value: str, uri: str) -> str:
    """The id of the run that a journal opens at ``uri`` with a tag of that value; nothing where none does."""
    for path in journals(folder):
        with contextlib.suppress(OSError, ValueError, KeyError):  # what is no journal is for sync to say
            header, *records = path.read_text(encoding="utf-8").splitlines()
            for record in map(json.loads, records):
                if record["kind"] == "open" and record["tags"].get(tag) == value and json.loads(header)["uri"] == uri:
                    return str(json.loads(header)["id"])
    return ""


def _line(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content) + "\n").encode()
