"""Evaluations found again in MLflow, by what people call runs: an id, its beginning, a name, the run around them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from svip.tracking.delivery import PARENT_TAG, TRAIN_RUN_TAG, known_id
from svip.tracking.store import TrackingError, client_of, reaching_the_store, run_exists, shown_uri, tracking_uri

if TYPE_CHECKING:
    from mlflow.entities import Run

RESUMED = "resumed."
"""How tags begin that hold what a resumed run has otherwise than its parameters say."""
PAGE = 1000
LISTED = 10
"""Runs or names that a message lists."""


@dataclass(frozen=True)
class TestedRun:
    """An evaluation that is tracked."""

    __test__ = False  # pytest, this is no test

    run_id: str
    name: str
    experiment: str
    started: datetime
    status: str
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metrics: Mapping[str, float]

    @reaching_the_store()
    def download(self, artifact: str, folder: Path) -> Path | None:
        """A copy of one of the run's artifacts in ``folder``; None where it has no such one."""
        client = client_of(tracking_uri())
        if artifact not in {item.path for item in client.list_artifacts(self.run_id)}:
            return None
        return Path(client.download_artifacts(self.run_id, artifact, str(folder)))


@reaching_the_store()
def evaluations_of(references: Sequence[str]) -> list[TestedRun]:
    """The evaluations that runs stand for, each once, in that order.

    A reference is a run's id or the beginning of one, or its name. An evaluation stands for itself, a training for the
    latest evaluation of its checkpoint, and any other run for those nested in it (of each checkpoint the latest).
    TrackingError for a reference that fits no run or several, and for a run without a finished evaluation.
    """
    found: dict[str, Run] = {}
    for reference in references:
        run = _the_run(reference)
        evaluations = _evaluations_in(run)
        if not evaluations:
            raise TrackingError(
                f"run {_shown(run)} has no finished evaluation, and so no T1, U, S, H; make one with `svip evaluate`"
            )
        found |= {evaluation.info.run_id: evaluation for evaluation in evaluations}
    return [_read(run) for run in found.values()]


@reaching_the_store()
def search_evaluations(experiment: str, query: str = "") -> list[TestedRun]:
    """The finished evaluations of an experiment (``svip/cub``, or ``cub``), oldest first.

    ``query``: in MLflow's language, such as ``tags.variant = 'full'``. TrackingError where there is no such
    experiment or none of its evaluations fits; it says what there is.
    """
    client = client_of(tracking_uri())
    known = {item.name: item.experiment_id for item in client.search_experiments()}
    name = next((name for name in (experiment, f"svip/{experiment}") if name in known), None)
    if name is None:
        raise TrackingError(f"{shown_uri()} has no experiment {experiment!r}; it has {_listed(sorted(known))}")
    runs = list(_search([known[name]], _EVALUATED))
    if not runs:
        raise TrackingError(f"experiment {name} has no finished evaluation yet; make one with `svip evaluate`")
    with _explaining(query):
        fitting = list(_search([known[name]], f"{_EVALUATED} and {query}")) if query else runs
    if not fitting:
        variants = _listed(sorted({run.data.tags.get("variant", "-") for run in runs}))
        presets = _listed(sorted({run.data.tags.get("preset", "-") for run in runs}))
        raise TrackingError(
            f"none of the {len(runs)} evaluations of {name} fits {query!r}; their tags.variant: {variants}; "
            f"tags.preset: {presets}"
        )
    return [_read(run) for run in reversed(fitting)]


_EVALUATED = "tags.step = 'evaluate' and attributes.status = 'FINISHED'"


def _the_run(reference: str) -> Run:
    client = client_of(tracking_uri())
    reference = known_id(client, reference)
    is_hex = set(reference) <= set("0123456789abcdef")
    if is_hex and len(reference) == 32 and run_exists(client, reference):
        return client.get_run(reference)
    everywhere = [item.experiment_id for item in client.search_experiments()]
    quoted = reference.replace("'", "\\'")
    runs = list(_search(everywhere, f"attributes.run_id LIKE '{reference}%'")) if is_hex and reference else []
    runs = runs or [run for run in _search(everywhere, f"attributes.run_name = '{quoted}'")]
    if len(runs) == 1:
        return runs[0]
    if runs:
        raise TrackingError(f"{reference!r} fits {len(runs)} runs; give one's id: {_listed(map(_shown, runs))}")
    latest = [_shown(run) for _, run in zip(range(LISTED), _search(everywhere, ""), strict=False)]
    there = f"its latest runs: {', '.join(latest)}" if latest else "it has no runs"
    raise TrackingError(f"{shown_uri()} has no run with the id or name {reference!r}; {there}")


def _evaluations_in(run: Run) -> list[Run]:
    """Finished evaluations that a run is, has led to, or holds; of each checkpoint the latest."""
    step, run_id, where = run.data.tags.get("step"), run.info.run_id, [run.info.experiment_id]
    if step == "evaluate":
        return [run] if run.info.status == "FINISHED" else []
    if step == "train":
        return list(_search(where, f"{_EVALUATED} and tags.{TRAIN_RUN_TAG} = '{run_id}'"))[:1]
    latest: dict[tuple[str, ...], Run] = {}
    for child in _search(where, f"tags.`{PARENT_TAG}` = '{run_id}'"):  # the latest first
        if child.data.tags.get("step") != "train":
            for evaluation in _evaluations_in(child):
                tags = evaluation.data.tags
                parts = (PARENT_TAG, TRAIN_RUN_TAG, "variant", "seed")
                latest.setdefault(tuple(tags.get(part, "") for part in parts), evaluation)
    return list(reversed(latest.values()))


def _search(experiments: Sequence[str], query: str) -> Iterator[Run]:
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


@contextmanager
def _explaining(query: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        said = str(error).splitlines()[0]
        raise TrackingError(
            f"filter {query!r}: {said}; expected such as tags.variant = 'full' and params.optim.lr = '1e-05'"
        ) from None


def _read(run: Run) -> TestedRun:
    own = {key: value for key, value in run.data.tags.items() if not key.startswith(("mlflow.", RESUMED))}
    later = {key.removeprefix(RESUMED): value for key, value in run.data.tags.items() if key.startswith(RESUMED)}
    return TestedRun(
        run.info.run_id,
        run.info.run_name,
        client_of(tracking_uri()).get_experiment(run.info.experiment_id).name,
        datetime.fromtimestamp(run.info.start_time / 1000),
        run.info.status,
        own,
        {**run.data.params, **later},
        run.data.metrics,
    )


def _shown(run: Run) -> str:
    when = datetime.fromtimestamp(run.info.start_time / 1000)
    return f"{run.info.run_id[:8]} ({run.info.run_name}, {when:%Y-%m-%d %H:%M})"


def _listed(names: Sequence[str] | Iterator[str]) -> str:
    all_names = list(names)
    more = [f"and {len(all_names) - LISTED} more"] if len(all_names) > LISTED else []
    return ", ".join([*all_names[:LISTED], *more]) or "none"
