"""Sends what earlier processes left in an outbox."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from svip.tracking import sender
from svip.tracking.delivery import Delivery
from svip.tracking.outbox import Busy, Journal, journals
from svip.tracking.store import TrackingError, client_of, first_line, is_away, reason, tracking_uri, without_password

ATTEMPTS = 3
"""Failures in a row after which a server counts as away."""


@dataclass(frozen=True)
class Synced:
    """What became of one journal."""

    run_id: str
    """The run in MLflow, or its local id where it is not there yet."""
    uri: str
    sent: int
    """Records that arrived."""
    left: int
    """Those that did not, and are still kept."""
    refused: int = 0
    """Those that MLflow will never take; each was warned of."""
    problem: str = ""
    """Why some are left."""
    busy: bool = False
    """A running process writes to it, and sends it itself."""


def sync(folder: Path, to: str = "") -> Iterator[Synced]:
    """Send the journals of an outbox in the order in which they were begun, each to its server or to ``to``.

    What was acknowledged is not sent again, also when this is stopped at any moment. A run whose process vanished
    without ending it ends as KILLED, at the time of its last record.
    """
    opened: list[Journal] = []
    silent: dict[str, str] = {}
    for path in journals(folder):
        try:
            opened.append(Journal.open(path))
        except Busy:
            yield Synced(path.stem, "", 0, 0, busy=True)
        except FileNotFoundError:
            continue  # its process has sent it in the meantime
        except TrackingError as error:
            yield Synced(path.stem, "", 0, 0, problem=str(error))
    for journal in sorted(opened, key=lambda journal: int(journal.header["time"])):
        uri = to or (tracking_uri() if without_password(tracking_uri()) == journal.uri else journal.uri)
        yield _send(journal, uri, silent)


def _send(journal: Journal, uri: str, silent: dict[str, str]) -> Synced:
    before, problem, refused = len(journal.pending()), silent.get(uri, ""), 0
    if "***" in uri:
        problem = f"the password of {uri} isn't kept; set MLFLOW_TRACKING_URI to it"
    if not problem:
        try:
            refused = _deliver(journal, uri)
        except Exception as error:  # the others may go
            problem = first_line(error)
            if is_away(error):
                problem = silent[uri] = f"MLflow at {without_password(uri)} does not answer ({reason(error)})"
    left, run_id = len(journal.pending()), journal.run_id or journal.id
    if problem:
        journal.sync()
        journal.close()
    else:
        journal.remove()
    return Synced(run_id, without_password(uri), max(before - left, 0) - refused, left, refused, problem)


def _deliver(journal: Journal, uri: str) -> int:
    """Send all of it; how many records were refused. Raises what was wrong, silence after ATTEMPTS in a row."""
    delivery = Delivery(client_of(uri), journal, new=False)
    failures = 0
    while True:
        try:
            while delivery.step() or _end(journal):
                failures = 0
            return delivery.refused
        except Exception as error:
            failures += 1  # one connection that was just closed is no silent server
            if failures == ATTEMPTS or not is_away(error):
                raise
            time.sleep(failures * sender.PAUSES[0])


def _end(journal: Journal) -> bool:
    """End a run whose process did not; whether there was such."""
    unended = journal.unended
    if unended:
        journal.append("end", status="KILLED", time=journal.last_time)
    return unended
