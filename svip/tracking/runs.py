"""The run that a step writes to."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from svip.tracking.delivery import ERROR_TAG, Undelivered
from svip.tracking.lineage import with_code_tags
from svip.tracking.outbox import Journal, is_local, new_local_id, now, outbox_folder
from svip.tracking.sender import SHORT_FLUSH, Sender
from svip.tracking.store import (
    TrackingError,
    check_address,
    client_of,
    reaching_the_store,
    shorten,
    shown_uri,
    tracking_uri,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

DESCRIPTION = "mlflow.note.content"
"""The tag with the Markdown that MLflow shows on a run's page."""


class Tracker:
    """Writes to one run, and ends it when the ``with`` block does: FINISHED, FAILED on an error, KILLED when stopped.

    Nothing here waits for a server: what is logged goes to the outbox (svip.tracking.outbox), from which a thread sends
    it. The end of the block waits for the rest, for 30 s at most (10 when stopped). Without a run (tracking is off, or
    this is not rank 0) every method does nothing and ``run_id`` is empty.
    """

    def __init__(self, sender: Sender | None = None) -> None:
        self.sender = sender
        self._handles_sigterm = False

    @property
    def run_id(self) -> str:
        """The run's id in MLflow; where it doesn't know the run yet, a local one that serves in its place."""
        return "" if self.sender is None else self.sender.journal.run_id or self.sender.journal.id

    @property
    def client(self) -> MlflowClient | None:
        """For what only a server can do; its calls wait, and raise MlflowException when it is away."""
        return None if self.sender is None else client_of(tracking_uri())

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log a flat mapping, such as ``config.flatten`` makes.

        MLflow's parameters can't change: where a resumed run now has another value, the tag ``resumed.<key>`` says so.
        """
        self.put("params", params={key: shorten(value) for key, value in params.items()})

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0, time: int | None = None) -> None:
        """Log the numbers of one step (an epoch, or 0 for a result) under names such as ``val/H``.

        ``time``: when they were measured, in ms since 1970; what is logged again with the same time is kept once.
        """
        values = {key: float(value) for key, value in metrics.items()}
        self.put("metrics", metrics=values, step=step, time=now() if time is None else time)

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Copy a file, or the content of a directory, to the run's artifacts (below ``folder``).

        It is sent as it is now, unless it is larger than 64 MiB: such has to stay where it is until it was sent.
        """
        if self.sender is not None:
            self.put("artifact", folder=folder, **self.sender.journal.keep(path))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set or replace tags."""
        self.put("tags", tags={key: str(value) for key, value in tags.items()})

    def put(self, kind: str, **content: Any) -> None:
        """Log a record of a kind that a function of svip.tracking sends (``delivery.handles``)."""
        if self.sender is not None:
            self.sender.put(kind, **content)

    def flush(self) -> bool:
        """Wait until all is sent, for 30 s at most; whether it is."""
        return self.sender is None or self.sender.flush()

    def leave(self) -> None:
        """Send the rest, and leave the run open."""
        if self.sender is not None:
            self.sender.close()

    def __enter__(self) -> Tracker:
        # A stopped container gets SIGTERM, on which Python would die at once and leave the run RUNNING for ever.
        main = threading.current_thread() is threading.main_thread()
        if self.sender is not None and main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
            self._handles_sigterm = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.sender is None:
            return
        stopped: list[int] = []
        if self._handles_sigterm:  # torchrun sends it to those that are left when one has failed: they may say so first
            signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
        try:
            self._end(error, self.sender)
        finally:
            if self._handles_sigterm:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if stopped and error is None:
            sys.exit(128 + stopped[0])

    def _end(self, error: BaseException | None, sender: Sender) -> None:
        status = _end_status(error)
        if status == "FAILED":
            self.set_tags({ERROR_TAG: shorten(f"{type(error).__name__}: {error}")})
        self.put("end", status=status, time=now())
        sender.close(SHORT_FLUSH if status == "KILLED" else None)


def open_tracker(
    experiment: str,
    run_name: str,
    *,
    parent_run_id: str | None = None,
    run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
    enabled: bool = True,
) -> Tracker:
    """The run to write to, as a context manager.

    It is the run MLFLOW_RUN_ID where that is set; else ``run_id``, reopened (a resumed training); else a new run of
    ``experiment``, a child of ``parent_run_id`` where given. ``tags`` without a value are left out; the code's git sha
    and the image digest are added. Raises TrackingError where MLFLOW_RUN_ID names no run, or the address no server
    that MLflow knows how to speak to. A server that doesn't answer is waited for 10 s, and then the run goes on
    without it.
    """
    if not enabled:
        return Tracker()
    wanted = os.environ.get("MLFLOW_RUN_ID")
    try:
        return open_run_of(
            wanted or run_id or "",
            experiment=experiment,
            run_name=run_name,
            parent=parent_run_id or "",
            tags=with_code_tags(tags),
            has_to_exist=bool(wanted),
        )
    except Undelivered:
        if not wanted:
            raise
        raise TrackingError(
            f"MLFLOW_RUN_ID={wanted}: {shown_uri()} has no such run; unset it to open a new run"
        ) from None


def open_run_of(
    run_id: str,
    *,
    experiment: str = "",
    run_name: str = "",
    parent: str = "",
    tags: Mapping[str, str] | None = None,
    has_to_exist: bool = False,
    owns: bool = True,
    reopen: bool | None = None,
) -> Tracker:
    """Open a run, a new one where ``run_id`` is empty or unknown, unless it ``has_to_exist``.

    ``owns``: it is this process that starts and ends it, so a run whose process vanished can be told. ``reopen``: a run
    that is there becomes RUNNING again and gets the ``tags`` (None: where this process owns it).
    """
    left = Journal.find(outbox_folder(), run_id, shown_uri()) if run_id else None
    return start_with(
        left or Journal.create(outbox_folder(), run_id or new_local_id(), shown_uri()),
        "open",
        new=left is None and not is_local(run_id),
        run_id=run_id,
        experiment=experiment,
        run_name=run_name,
        parent=parent,
        tags=dict(tags or {}),
        has_to_exist=has_to_exist,
        owns=owns,
        reopen=owns if reopen is None else reopen,
        time=now(),
    )


def start_with(journal: Journal, kind: str, *, new: bool, **content: Any) -> Tracker:
    """Send a journal from now on, and first this record, for which a server that answers is waited for."""
    with reaching_the_store():
        check_address(tracking_uri())
    sender = Sender(journal, new=new)
    sender.start(kind, **content)
    return Tracker(sender)


@contextlib.contextmanager
def runs_of_their_own() -> Iterator[None]:
    """Within it MLFLOW_RUN_ID, which names one run, does not decide where the many are written that follow it."""
    wanted = os.environ.pop("MLFLOW_RUN_ID", None)
    try:
        yield
    finally:
        if wanted is not None:
            os.environ["MLFLOW_RUN_ID"] = wanted


def log_to_run(
    run_id: str,
    metrics: Mapping[str, float] | None = None,
    artifacts: Sequence[Path] = (),
    tags: Mapping[str, str] | None = None,
) -> None:
    """Add results to a run that goes on being open or closed as it is, such as a pipeline's parent run."""
    tracker = open_run_of(run_id, has_to_exist=True, owns=False)
    if metrics:
        tracker.log_metrics(metrics)
    if tags:
        tracker.set_tags(tags)
    for path in artifacts:
        tracker.log_artifact(path)
    tracker.leave()


def _end_status(error: BaseException | None) -> str:
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "FINISHED"
    return "KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED"
