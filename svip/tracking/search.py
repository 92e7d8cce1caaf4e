"""Evaluations found again in MLflow, by what people call runs: an id, its beginning, a name, the run around them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING

from svip.tracking.delivery import PARENT_TAG, TRAIN_RUN_TAG, known_id
from svip.tracking.recorded import EVALUATED, Recorded, latest_evaluation, latest_of_each, search
from svip.tracking.store import TrackingError, client_of, reaching_the_store, run_exists, shown_uri, tracking_uri

if TYPE_CHECKING:
    from mlflow.entities import Run

LISTED = 10
"""Runs or names that a message lists."""


@reaching_the_store()
def evaluations_of(references: Sequence[str]) -> list[Recorded]:
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
    return [Recorded.of(run) for run in found.values()]


@reaching_the_store()
def search_evaluations(experiment: str, query: str = "") -> list[Recorded]:
    """The finished evaluations of an experiment (``svip/cub``, or ``cub``), oldest first.

    ``query``: in MLflow's language, such as ``tags.preset = 'smoke'``. TrackingError where there is no such
    experiment or none of its evaluations fits; it says what there is.
    """
    client = client_of(tracking_uri())
    known = {item.name: item.experiment_id for item in client.search_experiments()}
    name = next((name for name in (experiment, f"svip/{experiment}") if name in known), None)
    if name is None:
        raise TrackingError(f"{shown_uri()} has no experiment {experiment!r}; it has {_listed(sorted(known))}")
    runs = list(search([known[name]], EVALUATED))
    if not runs:
        raise TrackingError(f"experiment {name} has no finished evaluation yet; make one with `svip evaluate`")
    with _explaining(query):
        fitting = list(search([known[name]], f"{EVALUATED} and {query}")) if query else runs
    if not fitting:
        variants = _listed(sorted({run.data.tags.get("variant", "-") for run in runs}))
        presets = _listed(sorted({run.data.tags.get("preset", "-") for run in runs}))
        raise TrackingError(
            f"none of the {len(runs)} evaluations of {name} fits {query!r}; their tags.variant: {variants}; "
            f"tags.preset: {presets}"
        )
    return [Recorded.of(run) for run in reversed(fitting)]


def _the_run(reference: str) -> Run:
    client = client_of(tracking_uri())
    reference = known_id(client, reference)
    is_hex = set(reference) <= set("0123456789abcdef")
    if is_hex and len(reference) == 32 and run_exists(client, reference):
        return client.get_run(reference)
    everywhere = [item.experiment_id for item in client.search_experiments()]
    quoted = reference.replace("'", "\\'")
    runs = list(search(everywhere, f"attributes.run_id LIKE '{reference}%'")) if is_hex and reference else []
    runs = runs or [run for run in search(everywhere, f"attributes.run_name = '{quoted}'")]
    if len(runs) == 1:
        return runs[0]
    if runs:
        raise TrackingError(f"{reference!r} fits {len(runs)} runs; give one's id: {_listed(map(_shown, runs))}")
    latest = [_shown(run) for _, run in zip(range(LISTED), search(everywhere, ""), strict=False)]
    there = f"its latest runs: {', '.join(latest)}" if latest else "it has no runs"
    raise TrackingError(f"{shown_uri()} has no run with the id or name {reference!r}; {there}")


def _evaluations_in(run: Run) -> list[Run]:
    """Finished evaluations that a run is, has led to, or holds; of each checkpoint the latest. The oldest first."""
    step = run.data.tags.get("step")
    if step == "evaluate":
        return [run] if run.info.status == "FINISHED" else []
    if step == "train":
        latest = latest_evaluation(run)
        return [latest] if latest else []
    nested = search([run.info.experiment_id], f"tags.`{PARENT_TAG}` = '{run.info.run_id}'")
    found = [
        evaluation
        for child in nested
        if child.data.tags.get("step") != "train"
        for evaluation in reversed(_evaluations_in(child))
    ]
    return latest_of_each(found, PARENT_TAG, TRAIN_RUN_TAG, "variant", "seed")[::-1]


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
            f"filter {query!r}: {said}; expected such as tags.preset = 'smoke' and params.optim.lr = '1e-05'"
        ) from None


def _shown(run: Run) -> str:
    when = datetime.fromtimestamp(run.info.start_time / 1000)
    return f"{run.info.run_id[:8]} ({run.info.run_name}, {when:%Y-%m-%d %H:%M})"


def _listed(names: Sequence[str] | Iterator[str]) -> str:
    all_names = list(names)
    more = [f"and {len(all_names) - LISTED} more"] if len(all_names) > LISTED else []
    return ", ".join([*all_names[:LISTED], *more]) or "none"
