"""The thread that sends a run's journal while the run goes on."""

from __future__ import annotations

import logging
import random
import threading
import time
from typing import Any

from svip.tracking.delivery import Delivery, NotYet, Undelivered
from svip.tracking.outbox import Journal
from svip.tracking.store import (
    TrackingError,
    cant_be_used,
    client_of,
    is_away,
    is_file,
    reason,
    shown_uri,
    tracking_uri,
)

log = logging.getLogger(__name__)

OPENS = 10.0
"""Seconds in which a server has to answer when a run opens, else it opens without."""
FLUSH = 30.0
"""Seconds that the end of a run waits for what is still to be sent."""
SHORT_FLUSH = 10.0
"""The same where the run was told to stop, or the server has been silent for FLUSH seconds."""
TELLS_AFTER = 2.0
"""Seconds after which somebody who waits for the end is told what for."""
GATHERS = 0.5
"""Seconds for which records are gathered to go in one request."""
PAUSES = (1.0, 30.0)
"""Seconds between two attempts while the server is away: at first, and at most."""


class Sender:
    """A thread that sends what the journal holds, in batches, and tries again while the server doesn't take it."""

    def __init__(self, journal: Journal, *, new: bool) -> None:
        self.journal = journal
        self._thread = threading.Thread(target=self._run, name=f"outbox {journal.id}", daemon=True)
        self._new = new
        self._changed = threading.Condition()  # guards what follows
        self._news = True  # something was logged that the thread hasn't looked at
        self._idle = False  # all of it is with the server
        self._error: Exception | None = None  # of the last attempt
        self._failures = 0  # since the last success; a single one is nothing to speak of
        self._silent_since: float | None = None
        self._hurry = True  # somebody waits
        self._opened = False
        self._stopping = False
        self._discard = False
        self._full = False

    def put(self, kind: str, **content: Any) -> int:
        """Log a record. What can't be written is warned of: no run ends for it."""
        try:
            end = self.journal.append(kind, **content)
        except OSError as error:
            if not self._full:
                log.warning("MLflow gets no more of this run, as %s can't be written: %s", self.journal.path, error)
            self._full = True
            return 0
        with self._changed:
            self._news, self._idle = True, False
            self._changed.notify_all()
        return end

    def start(self, kind: str, **content: Any) -> None:
        """Begin, with a record for which a server that answers is waited for; without an answer go on all the same.

        Raises TrackingError where the answer is that it can't be, as by a wrong address or an unknown run.
        """
        end = self.put(kind, **content)
        self._thread.start()
        with self._changed:
            local = is_file(tracking_uri())
            self._changed.wait_for(lambda: self.journal.sent >= end or self._is_over(), None if local else OPENS)
            error, self._hurry, self._opened = self._error, False, True
            no = error if error and self._is_answer(error) else None
            if no:
                self._stop(discard=self._new)
            elif self.journal.sent < end:
                self._silent_since = float("-inf")
                self._say_away(error or TimeoutError(f"no answer within {OPENS:.0f} s"))
        if no:
            self._thread.join(SHORT_FLUSH)  # until its journal is removed
            raise no if isinstance(no, TrackingError) else cant_be_used(no) from None

    def flush(self, seconds: float | None = None) -> bool:
        """Wait until everything is sent, for a bounded time; whether it is."""
        started = time.monotonic()
        if seconds is None:
            silent = self._silent_since is not None and started - self._silent_since > FLUSH
            seconds = SHORT_FLUSH if silent else FLUSH
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._idle, min(TELLS_AFTER, seconds)):
                log.info("sending %d records to MLflow: at most %.0f s", len(self.journal.pending()), seconds)
                self._changed.wait_for(lambda: self._idle, started + seconds - time.monotonic())
            self._hurry = False
            return self._idle

    def close(self, seconds: float | None = None) -> None:
        """Flush, then end the thread; what is left is for ``svip sync``, and a line says so."""
        try:
            self.flush(seconds)
        finally:  # also when somebody has enough of waiting
            with self._changed:
                left = 0 if self._idle else len(self.journal.pending())
                self._stop()
            if left:
                said = str(self._error) if isinstance(self._error, Undelivered) else ""
                what = said or f"MLflow at {shown_uri()} does not answer"
                records = "1 record is" if left == 1 else f"{left} records are"
                where = self.journal.path.parent
                log.warning("%s; %s kept in %s; `svip sync` sends them", what, records, where)
            # The thread gives the journal free; but a request under way may take a minute to fail.
            self._thread.join(TELLS_AFTER if left else SHORT_FLUSH)

    def _run(self) -> None:
        delivery: Delivery | None = None
        pause = 0.0
        while self._wait(pause):
            try:
                delivery = delivery or Delivery(client_of(tracking_uri()), self.journal, new=self._new)
                while delivery.step() and not self._stopping:
                    self._succeeded()
                self._succeeded(all_sent=not self._stopping)
                pause = 0.0
            except Exception as error:  # whatever it is: the run goes on, and the records are kept
                self._failed(error)
                pause = min(PAUSES[1], max(PAUSES[0], 2 * pause)) * random.uniform(0.8, 1.2)
        if self._discard or not self.journal.pending():
            self.journal.remove()
        else:
            self.journal.sync()
            self.journal.close()

    def _wait(self, pause: float) -> bool:
        """Wait for the time of the next attempt; False: there is none."""
        with self._changed:
            if self._error:
                self._changed.wait_for(lambda: self._stopping or self._hurry, pause)
                if self._hurry:
                    self._changed.wait_for(lambda: self._stopping, min(pause, PAUSES[0]))
            else:
                self._changed.wait_for(lambda: self._stopping or self._news)
                self._changed.wait_for(lambda: self._stopping or self._hurry, GATHERS)
            self._news = False
            return not self._stopping

    def _succeeded(self, all_sent: bool = False) -> None:
        with self._changed:
            if self._failures > 1 and self._opened:
                log.info("MLflow at %s answers again; it gets what was kept", shown_uri())
            self._error = self._silent_since = None
            self._failures = 0
            self._idle = all_sent and not self._news
            self._changed.notify_all()

    def _failed(self, error: Exception) -> None:
        with self._changed:
            self._error = error
            self._failures += 1
            if self._silent_since is None:
                self._silent_since = time.monotonic()
            self._changed.notify_all()
            if self._failures == 2 and self._opened:  # else whoever opens the run says it
                self._say_away(error)
        self.journal.sync()

    def _is_over(self) -> bool:
        """Whether opening the run has failed."""
        return self._error is not None and (self._failures > 1 or self._is_answer(self._error))

    def _is_answer(self, error: Exception) -> bool:
        """Whether it says that the run can't be opened, rather than nothing."""
        return not isinstance(error, NotYet) and (is_file(tracking_uri()) or not is_away(error))

    def _say_away(self, error: Exception) -> None:
        away = f"MLflow at {shown_uri()} does not answer ({reason(error)})"
        what = str(error) if isinstance(error, Undelivered) else away
        log.warning("%s; the run goes on, and what it logs is kept in %s until then", what, self.journal.path.parent)

    def _stop(self, discard: bool = False) -> None:
        self._stopping, self._discard = True, discard
        self._changed.notify_all()
