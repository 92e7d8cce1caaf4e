"""The parent run of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
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

PIPELINE_TAG = "pipeline"
STATUSES = {
    "FINISHED": "FINISHED",
    "FAILED": "FAILED",
    "KILLED": "KILLED",
    "SUCCEEDED": "FINISHED",  # this and the next as Kubeflow Pipelines says it
    "CANCELLED": "KILLED",
}


@reaching_the_store()
def open_run(
    pipeline: str, experiment: str, params: Mapping[str, Any], tags: Mapping[str, str] | None = None, name: str = ""
) -> str:
    """Start the parent run of a pipeline; the id of the run, which stays RUNNING until close_run.

    ``pipeline`` is its only name of that kind, by which close_run finds it; people read ``name``.
    """
    client = client_of(tracking_uri())
    run = client.create_run(
        experiment_id(client, experiment),
        tags={**with_code_tags(tags), PIPELINE_TAG: pipeline},
        run_name=name or pipeline,
    )
    log_params(client, run.info.run_id, {key: shorten(value) for key, value in params.items()})
    return run.info.run_id


@reaching_the_store()
def close_run(run: str, status: str) -> None:
    """End a parent run: FINISHED, FAILED or KILLED (or, as Kubeflow says, SUCCEEDED or CANCELLED).

    ``run`` is its id, or the ``pipeline`` it was opened with: an exit handler can't receive the output of another
    task, so it knows no id. By that name all runs that are still open are ended; none at all is fine, since the
    pipeline may have failed before open_run. Raises TrackingError for another status, or an id that doesn't exist.
    """
    if status not in STATUSES:
        raise TrackingError(f"status {status!r}: expected one of {', '.join(STATUSES)}")
    client = client_of(tracking_uri())
    is_id = len(run) == 32 and set(run) <= set("0123456789abcdef")
    if is_id and not run_exists(client, run):
        raise TrackingError(f"run {run}: {shown_uri()} has no such run")
    for run_id in [run] if is_id else _open_runs(client, run):
        client.set_terminated(run_id, STATUSES[status])


def _open_runs(client: MlflowClient, pipeline: str) -> list[str]:
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    query = f"tags.{PIPELINE_TAG} = '{pipeline}' and attributes.status = 'RUNNING'"
    return [run.info.run_id for run in client.search_runs(experiments, query)]
