"""Runs read back: what one was made with, its numbers, and the runs that belong to it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from svip.tracking.delivery import PARENT_TAG, TRAIN_RUN_TAG, known_id
from svip.tracking.inputs import ENVIRONMENT, KFP_RUN_TAG
from svip.tracking.lineage import parse_environment
from svip.tracking.store import TrackingError, client_of, reaching_the_store, run_exists, shown_uri, tracking_uri

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run

RESUMED = "resumed."
"""How tags begin that hold what a resumed run has otherwise than its parameters say."""
EVALUATED = "tags.step = 'evaluate' and attributes.status = 'FINISHED'"
"""What fits finished evaluations, in MLflow's language."""
PAGE = 1000
TRAINED_AS = ("preset", "variant", "changes", "seed")
"""Tags that trainings share when one is another try of the other."""
History = dict[int, float]
"""Step -> value."""


@dataclass(frozen=True)
class Recorded:
    """A finished run."""

    run_id: str
    name: str
    experiment: str
    tags: Mapping[str, str]
    params: Mapping[str, str]
    """As the run was resumed the last time."""
    metrics: Mapping[str, float]
    parent: str
    """Id of the run that it is nested in, or nothing."""
    models: tuple[str, ...]
    """Ids of the models that it logged."""

    @classmethod
    def of(cls, run: Run) -> Recorded:
        experiment = client_of(tracking_uri()).get_experiment(run.info.experiment_id).name
        tags = run.data.tags
        later = {key.removeprefix(RESUMED): value for key, value in tags.items() if key.startswith(RESUMED)}
        return cls(
            run_id=run.info.run_id,
            name=run.info.run_name,
            experiment=experiment,
            tags={key: value for key, value in tags.items() if not key.startswith(("mlflow.", RESUMED))},
            params={**run.data.params, **later},
            metrics=run.data.metrics,
            parent=tags.get(PARENT_TAG, ""),
            models=tuple(output.model_id for output in run.outputs.model_outputs) if run.outputs else (),
        )

    @reaching_the_store()
    def download(self, artifact: str, folder: Path) -> Path | None:
        """Copy a file or folder of the run's artifacts into ``folder``; its path there, or None without such a one."""
        client = client_of(tracking_uri())
        if artifact not in {item.path for item in client.list_artifacts(self.run_id)}:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        return Path(client.download_artifacts(self.run_id, artifact, str(folder)))

    def text(self, artifact: str) -> str:
        """The content of a text artifact; nothing where there is none."""
        with tempfile.TemporaryDirectory() as folder:
            path = self.download(artifact, Path(folder))
            return path.read_text(encoding="utf-8") if path else ""

    @reaching_the_store()
    def lineage(self) -> dict[str, str]:
        """What made the run: code, data, protocol and so on by name, and the environment as it was."""
        found = {key: self.tags.get(key, "") for key in LINEAGE}
        found["parent run"] = self.parent
        if self.parent and not found[KFP_RUN_TAG]:
            found[KFP_RUN_TAG] = client_of(tracking_uri()).get_run(self.parent).data.tags.get(KFP_RUN_TAG, "")
        return found | parse_environment(self.text(ENVIRONMENT))

    @reaching_the_store()
    def histories(self) -> dict[str, History]:
        """The numbers of training and evaluation by name: for each step the one that was logged last."""
        client = client_of(tracking_uri())
        names = [name for name in client.get_run(self.run_id).data.metrics if not name.startswith("system/")]
        return {
            name: {metric.step: metric.value for metric in _in_order(client.get_metric_history(self.run_id, name))}
            for name in sorted(names)
        }


LINEAGE = (
    "git_sha",
    "code_diff_sha256",
    "image_digest",
    "preset",
    "changes",
    "variant",
    "seed",
    "protocol",
    "device",
    "bundle",
    "bundle_sha256",
    "vectors_sha256",
    KFP_RUN_TAG,
)
"""Tags that say what made a run."""


@reaching_the_store()
def read_run(run_id: str) -> Recorded:
    """A finished run; TrackingError where it is not there or not finished."""
    return _finished(_get(run_id))


@reaching_the_store()
def find_runs(run_id: str) -> tuple[Recorded, Recorded | None]:
    """The training that a run stands for, and its evaluation where the run is one or frames one.

    ``run_id``: of a training, of an evaluation, or of a run in which both are nested (a pipeline's). TrackingError
    where there is no such run, or not exactly one finished training in it. Of a step that was tried again the last
    run counts.
    """
    run, client = _get(run_id), client_of(tracking_uri())
    step = run.data.tags.get("step")
    if step == "train":
        return _finished(run), None
    if step == "evaluate":
        train_run = known_id(client, run.data.tags.get(TRAIN_RUN_TAG, ""))
        if not train_run or not run_exists(client, train_run):
            raise TrackingError(f"run {run_id} does not say which run trained its checkpoint; name that one")
        return _finished(client.get_run(train_run)), _finished(run)
    query = f"tags.`{PARENT_TAG}` = '{run.info.run_id}' and attributes.status = 'FINISHED'"
    nested = list(search([run.info.experiment_id], query))
    trained = latest_of_each([run for run in nested if run.data.tags.get("step") == "train"], *TRAINED_AS)
    evaluated = latest_of_each([run for run in nested if run.data.tags.get("step") == "evaluate"], TRAIN_RUN_TAG)
    if len(evaluated) > 1:  # of an earlier try of the training, too
        of_it = [run for run in evaluated if trained and run.data.tags.get(TRAIN_RUN_TAG) == trained[0].info.run_id]
        evaluated = of_it or evaluated
    if len(trained) != 1 or len(evaluated) > 1:
        raise TrackingError(
            f"run {run_id} holds {len(trained)} finished trainings and {len(evaluated)} evaluations of them: expected "
            "one training and at most one evaluation; name one of the runs in it"
        )
    return Recorded.of(trained[0]), Recorded.of(evaluated[0]) if evaluated else None


@reaching_the_store()
def find_evaluation(train_run_id: str) -> Recorded | None:
    """The latest finished evaluation of the checkpoint that a run trained."""
    client = client_of(tracking_uri())
    found = latest_evaluation(client.get_run(known_id(client, train_run_id)))
    return Recorded.of(found) if found else None


def latest_evaluation(trained: Run) -> Run | None:
    """The latest finished evaluation of the checkpoint that a run trained."""
    query = f"{EVALUATED} and tags.{TRAIN_RUN_TAG} = '{trained.info.run_id}'"
    return next(search([trained.info.experiment_id], query), None)


def latest_of_each(runs: Sequence[Run], *tags: str) -> list[Run]:
    """Of runs, the latest first, that have the same ``tags`` the first one; in that order."""
    found: dict[tuple[str, ...], Run] = {}
    for run in runs:
        found.setdefault(tuple(run.data.tags.get(tag, "") for tag in tags), run)
    return list(found.values())


def search(experiments: Sequence[str], query: str) -> Iterator[Run]:
    """All runs that fit, the latest first."""
    client, token = client_of(tracking_uri()), None
    while True:
        page = client.search_runs(
            list(experiments), query, max_results=PAGE, order_by=["attributes.start_time DESC"], page_token=token
        )
        yield from page
        token = page.token
        if not token:
            return


def _get(run_id: str) -> Run:
    client = client_of(tracking_uri())
    run_id = known_id(client, run_id)  # a checkpoint may have been trained while the server was away
    if not run_exists(client, run_id):
        raise TrackingError(f"run {run_id}: {shown_uri()} has no such run")
    return client.get_run(run_id)


def _finished(run: Run) -> Recorded:
    if run.info.status != "FINISHED":
        raise TrackingError(
            f"run {run.info.run_id} ({run.info.run_name}) is {run.info.status}: expected a finished one"
        )
    return Recorded.of(run)


def _in_order(history: list[Metric]) -> list[Metric]:
    return sorted(history, key=lambda metric: (metric.step, metric.timestamp))
