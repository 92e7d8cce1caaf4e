"""The run that a step writes to."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from svip.tracking.lineage import with_code_tags
from svip.tracking.store import (
    TrackingError,
    client_of,
    experiment_id,
    log_params,
    reaching_the_store,
    run_exists,
    shorten,
    shown_uri,
    tracking_uri,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

PARENT_TAG = "mlflow.parentRunId"
"""The tag by which MLflow nests runs."""
DESCRIPTION = "mlflow.note.content"
"""The tag with the Markdown that MLflow shows on a run's page."""


class Tracker:
    """Writes to one run, and ends it when the ``with`` block does: FINISHED, FAILED on an error, KILLED when stopped.

    Without a run (tracking is off, or this is not rank 0) every method does nothing and ``run_id`` is empty.
    """

    def __init__(self, client: MlflowClient | None = None, run_id: str = "") -> None:
        self.run_id = run_id
        self.client = client
        self._handles_sigterm = False

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log a flat mapping, such as ``config.flatten`` makes.

        MLflow's parameters can't change: where a resumed run now has another value, the tag ``resumed.<key>`` says so.
        """
        if self.client is None:
            return
        known = self.client.get_run(self.run_id).data.params
        values = {key: shorten(value) for key, value in params.items()}
        log_params(self.client, self.run_id, {key: value for key, value in values.items() if key not in known})
        self.set_tags({f"resumed.{key}": value for key, value in values.items() if known.get(key, value) != value})

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log the numbers of one step (an epoch, or 0 for a result) under names such as ``val/H``."""
        if self.client is None:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(
            self.run_id, metrics=[Metric(key, float(value), now, step) for key, value in metrics.items()]
        )

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Copy a file, or the content of a directory, to the run's artifacts (below ``folder``)."""
        if self.client is None:
            return
        send = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
        send(self.run_id, str(path), folder or None)

    def log_dict(self, content: Mapping[str, Any], file: str) -> None:
        """Store ``content`` as the artifact ``file`` (.json or .yaml)."""
        if self.client is not None:
            self.client.log_dict(self.run_id, dict(content), file)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set or replace tags."""
        if self.client is not None:
            for key, value in tags.items():
                self.client.set_tag(self.run_id, key, value)

    def __enter__(self) -> Tracker:
        # A stopped container gets SIGTERM, on which Python would die at once and leave the run RUNNING for ever.
        main = threading.current_thread() is threading.main_thread()
        if self.client is not None and main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
            self._handles_sigterm = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handles_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self.client is None:
            return
        status = _end_status(error)
        if status == "FAILED":
            self.set_tags({"error": shorten(f"{type(error).__name__}: {error}")})
        self.client.set_terminated(self.run_id, status)


@reaching_the_store()
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
    and the image digest are added. Raises TrackingError where MLFLOW_RUN_ID names no run.
    """
    if not enabled:
        return Tracker()
    client = client_of(tracking_uri())
    tags = with_code_tags(tags)
    wanted = os.environ.get("MLFLOW_RUN_ID")
    if wanted and not run_exists(client, wanted):
        raise TrackingError(f"MLFLOW_RUN_ID={wanted}: {shown_uri()} has no such run; unset it to open a new run")
    if run_id and not wanted and not run_exists(client, run_id):
        log.warning("run %s is not in %s: its training goes on in a new run", run_id, shown_uri())
        run_id = None
    run_id = wanted or run_id
    if not run_id:
        nested = {PARENT_TAG: parent_run_id} if parent_run_id else {}
        run = client.create_run(experiment_id(client, experiment), tags={**tags, **nested}, run_name=run_name)
        return Tracker(client, run.info.run_id)
    client.update_run(run_id, status="RUNNING")
    tracker = Tracker(client, run_id)
    tracker.set_tags(tags)
    return tracker


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
    tracker = Tracker(client_of(tracking_uri()), run_id)
    tracker.log_metrics(metrics or {})
    tracker.set_tags(tags or {})
    for path in artifacts:
        tracker.log_artifact(path)


def _end_status(error: BaseException | None) -> str:
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "FINISHED"
    return "KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED"
