"""The parent run of a pipeline."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from svip.tracking.delivery import Undelivered, handles, runs_with_tag
from svip.tracking.lineage import with_code_tags
from svip.tracking.outbox import Journal, is_local, now, outbox_folder
from svip.tracking.runs import open_run_of, start_with
from svip.tracking.store import TrackingError, client_of, reaching_the_store, shown_uri, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

PIPELINE_TAG = "pipeline"
STATUSES = {
    "FINISHED": "FINISHED",
    "FAILED": "FAILED",
    "KILLED": "KILLED",
    "SUCCEEDED": "FINISHED",  # this and the next as Kubeflow Pipelines says it
    "CANCELLED": "KILLED",
}


def open_run(
    pipeline: str,
    experiment: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str] | None = None,
    name: str = "",
    continues: str = "",
) -> str:
    """Start the parent run of a pipeline; the id of the run, which stays RUNNING until close_run.

    ``pipeline`` is its only name of that kind, by which close_run finds it; people read ``name``. ``continues``: names
    of pipelines, with blanks between; the run of the first that has one is opened again. It is a local id where the
    server doesn't answer: the steps may use it like any other.
    """
    tags = {**with_code_tags(tags), PIPELINE_TAG: pipeline}
    earlier = _run_of(continues) if continues else ""
    if earlier:
        tags = {PIPELINE_TAG: pipeline}
    tracker = open_run_of(earlier, experiment=experiment, run_name=name or pipeline, tags=tags, owns=False)
    if not earlier:
        tracker.log_params(params)
    tracker.leave()
    return tracker.run_id


def _run_of(pipelines: str) -> str:
    """The id of the run of the first pipeline that has one; empty where none has, or the server doesn't answer."""
    try:
        with reaching_the_store():
            client = client_of(tracking_uri())
            found = (runs_with_tag(client, PIPELINE_TAG, pipeline) for pipeline in pipelines.split())
            return next((run for runs in found for run in runs), "")
    except TrackingError as error:
        log.warning("the run of %s can't be looked for, so a new one is opened: %s", pipelines, error)
        return ""


def close_run(run: str, status: str) -> None:
    """End a parent run: FINISHED, FAILED or KILLED (or, as Kubeflow says, SUCCEEDED or CANCELLED).

    ``run`` is its id, or the ``pipeline`` it was opened with: an exit handler can't receive the output of another
    task, so it knows no id. By that name all runs that are still open are ended; none at all is fine, since the
    pipeline may have failed before open_run. Raises TrackingError for another status, or an id that doesn't exist.
    """
    if status not in STATUSES:
        raise TrackingError(f"status {status!r}: expected one of {', '.join(STATUSES)}")
    if is_local(run) or (len(run) == 32 and set(run) <= set("0123456789abcdef")):
        try:
            tracker = open_run_of(run, has_to_exist=True, owns=False)
        except Undelivered:
            raise TrackingError(f"run {run}: {shown_uri()} has no such run") from None
        tracker.put("end", status=STATUSES[status], time=now())
    else:
        journal = Journal.create(outbox_folder(), f"close-{uuid.uuid4().hex}", shown_uri())
        content = {"pipeline": run, "status": STATUSES[status], "time": now()}
        tracker = start_with(journal, "close", new=True, **content)
    tracker.leave()


@handles("close")
def _close_by_name(client: MlflowClient, journal: Journal, record: Mapping[str, Any]) -> None:
    for run_id in runs_with_tag(client, PIPELINE_TAG, record["pipeline"], also=" and attributes.status = 'RUNNING'"):
        client.set_terminated(run_id, record["status"], end_time=record["time"])
