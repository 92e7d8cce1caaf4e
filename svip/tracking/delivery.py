"""Sends journals to MLflow: each record takes effect once, whatever was lost on the way.

A record is sent again when its acknowledgement is missing, so each has to be one that may arrive twice. A run is
looked up by the id of its journal (tag ``outbox_id``) before it is created again; MLflow keeps one of metrics that
agree in key, step, time and value; parameters, tags, artifacts and the end of a run are set to what they are already.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from svip.tracking.outbox import Journal, Record, is_local
from svip.tracking.store import (
    TrackingError,
    experiment_id,
    first_line,
    is_away,
    is_unreachable,
    log_params,
    run_exists,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)

PARENT_TAG = "mlflow.parentRunId"
"""The tag by which MLflow nests runs."""
TRAIN_RUN_TAG = "train_run_id"
"""Of an evaluation: the run that trained the checkpoint."""
ID_TAG = "outbox_id"
OPENED_TAG = "opened"
"""When a process last opened a run: what an earlier one says of its state is not true any more, if it comes late."""
ERROR_TAG = "error"
"""What a run failed with; gone when it goes on."""
STORED = ("artifact", "model")
"""Kinds of records whose files don't go to the server alone, but maybe to a folder or a bucket."""
METRICS, TAGS = 1000, 100
"""What MLflow takes in one request (1000 in all)."""


class Undelivered(TrackingError):
    """What can't be sent now, and stays in the journal; the message says why."""


class NotYet(Undelivered):
    """A run that another outbox has to bring first."""


Handler = Callable[["MlflowClient", Journal, Mapping[str, Any]], None]
HANDLERS: dict[str, Handler] = {}


def handles(kind: str) -> Callable[[Handler], Handler]:
    """Makes a function the one that sends records of a kind; it may be called twice with the same one."""

    def register(handler: Handler) -> Handler:
        HANDLERS[kind] = handler
        return handler

    return register


class Delivery:
    """Sends one journal, a request at a time."""

    def __init__(self, client: MlflowClient, journal: Journal, *, new: bool) -> None:
        self.client = client
        self.journal = journal
        self.refused = 0
        """Records that MLflow will never take; each was warned of."""
        self._first = new

    def step(self) -> bool:
        """Send the next batch; False when there was none. Raises Undelivered, or what MLflow's client raises."""
        records = self.journal.pending(METRICS)
        if not records:
            return False
        try:
            self._send(_batch(records))
        except Exception as error:
            if records[0].kind in STORED and is_away(error) and not is_unreachable(error):
                self._overtake(records)  # the server is there, and only its place for files isn't
            raise
        return True

    def _overtake(self, records: Sequence[Record]) -> None:
        """Send metrics and tags, which need no file before them; but no run ends before its files are there."""
        waiting = takewhile(lambda record: record.kind not in ("open", "end"), records)
        numbers: Sequence[Record] = [record for record in waiting if record.kind in ("metrics", "tags")]
        while numbers:
            batch = _batch(numbers)
            self._send(batch, ahead=True)
            numbers = numbers[len(batch) :]

    def _send(self, records: Sequence[Record], ahead: bool = False) -> None:
        run_id = ""
        try:
            if records[0].kind == "open":
                run_id = self._open(records[0].content)
            elif records[0].kind in ("metrics", "tags"):
                self._log(records)
            elif records[0].kind in HANDLERS:
                HANDLERS[records[0].kind](self.client, self.journal, records[0].content)
            else:
                raise Undelivered(f"{self.journal.path} has a record {records[0].kind!r} of a newer version of svip")
        except Exception as error:
            if records[0].kind == "open" or not self._is_refusal(records[0].kind, error):
                raise
            if len(records) > 1:  # one of them is the reason
                self._send(records[: len(records) // 2], ahead)
                self._send(records[len(records) // 2 :], ahead)
                return
            self.refused += 1
            shown = f"{records[0].kind} {dict(records[0].content)}"
            log.warning("run %s goes without %.300s: %s", self.journal.run_id, shown, first_line(error))
        if ahead:
            self.journal.acknowledge_ahead(records)
        else:
            self.journal.acknowledge(records[-1].end, run_id)
        for record in records:
            if record.kind == "artifact":
                self.journal.discard(record.content)

    def _open(self, record: Mapping[str, Any]) -> str:
        """Create the run, or open again what was asked for or is already there; its id in MLflow."""
        client, journal = self.client, self.journal
        first, self._first = self._first, False  # later ones may find what an earlier one made
        wanted = journal.run_id or record["run_id"]
        if wanted and not is_local(wanted) and not run_exists(client, wanted):
            if record["has_to_exist"]:
                raise Undelivered(f"run {wanted} is not in {journal.uri}, or was deleted there")
            log.warning("run %s is not in %s, or was deleted there: it goes on in a new run", wanted, journal.uri)
            wanted = ""
        experiment = experiment_id(client, record["experiment"]) if record["experiment"] else ""
        if (not wanted or is_local(wanted)) and not first:
            wanted = run_with_tag(client, ID_TAG, journal.id, experiment)
        if (not wanted or is_local(wanted)) and record["has_to_exist"]:
            raise NotYet(f"run {journal.id} is not in {journal.uri} yet; it comes with the outbox that opened it")
        if not wanted:
            wanted = self._create(record, experiment)
        elif record.get("reopen", record["owns"]):
            self._reopen(wanted, record)
        if not first and is_local(journal.id) and experiment:  # runs that came before it name it by its local id
            for tag in (PARENT_TAG, TRAIN_RUN_TAG):
                for run_id in runs_with_tag(client, tag, journal.id, experiment):
                    client.set_tag(run_id, tag, wanted)
        return wanted

    def _create(self, record: Mapping[str, Any], experiment: str) -> str:
        parent = known_id(self.client, record["parent"], experiment)
        tags = {**record["tags"], ID_TAG: self.journal.id, OPENED_TAG: str(record["time"])}
        if parent:
            tags[PARENT_TAG] = parent
        if TRAIN_RUN_TAG in tags:
            tags[TRAIN_RUN_TAG] = known_id(self.client, tags[TRAIN_RUN_TAG], experiment)
        run = self.client.create_run(experiment, start_time=record["time"], tags=tags, run_name=record["run_name"])
        return str(run.info.run_id)

    def _reopen(self, run_id: str, record: Mapping[str, Any]) -> None:
        from mlflow.entities import RunTag

        run = self.client.get_run(run_id)
        if opened_since(run, record["time"]):
            return
        self.client.update_run(run_id, status="RUNNING")
        tags = {**record["tags"], OPENED_TAG: str(record["time"])}
        self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        if ERROR_TAG in run.data.tags:
            self.client.delete_tag(run_id, ERROR_TAG)

    def _log(self, records: Sequence[Record]) -> None:
        from mlflow.entities import Metric, RunTag

        metrics = [
            Metric(key, value, record.content["time"], record.content["step"])
            for record in records
            if record.kind == "metrics"
            for key, value in record.content["metrics"].items()
        ]
        tags = {
            key: value for record in records if record.kind == "tags" for key, value in record.content["tags"].items()
        }
        self.client.log_batch(self.journal.run_id, metrics, tags=[RunTag(key, value) for key, value in tags.items()])

    def _is_refusal(self, kind: str, error: Exception) -> bool:
        """Whether it is about the record itself, so that it would never be taken.

        A file or model that can't be stored from here, such as one for a folder of the server, is such a record too.
        """
        from mlflow.exceptions import MlflowException

        if kind in STORED and not isinstance(error, MlflowException):
            return not is_away(error)
        if not isinstance(error, MlflowException) or error.error_code not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
            return False
        run_id = self.journal.run_id
        if run_id and self.client.get_run(run_id).info.lifecycle_stage != "active":
            raise Undelivered(f"run {run_id} was deleted in MLflow; restore it there, or remove {self.journal.path}")
        return True


@handles("params")
def _send_params(client: MlflowClient, journal: Journal, record: Mapping[str, Any]) -> None:
    """MLflow's parameters can't change: where one has another value already, the tag ``resumed.<key>`` says so."""
    known = client.get_run(journal.run_id).data.params
    values = record["params"]
    log_params(client, journal.run_id, {key: value for key, value in values.items() if key not in known})
    for key, value in values.items():
        if known.get(key, value) != value:
            client.set_tag(journal.run_id, f"resumed.{key}", value)


@handles("artifact")
def _send_artifact(client: MlflowClient, journal: Journal, record: Mapping[str, Any]) -> None:
    path = journal.kept(record)
    send = client.log_artifacts if path.is_dir() else client.log_artifact
    send(journal.run_id, str(path), record["folder"] or None)


@handles("end")
def _send_end(client: MlflowClient, journal: Journal, record: Mapping[str, Any]) -> None:
    if not opened_since(client.get_run(journal.run_id), record["time"]):
        client.set_terminated(journal.run_id, record["status"], end_time=record["time"])


def opened_since(run: Run, time: int) -> bool:
    """Whether a process has opened the run after that time, such as one that resumed it in another folder."""
    return int(run.data.tags.get(OPENED_TAG, 0)) > time


def _batch(records: Sequence[Record]) -> Sequence[Record]:
    """The first of the records that go in one request: metrics and tags together, others alone."""
    metrics = tags = 0
    for number, record in enumerate(records):
        if record.kind not in ("metrics", "tags"):
            return records[: max(number, 1)]
        metrics += len(record.content.get("metrics", ()))
        tags += len(record.content.get("tags", ()))
        if metrics + tags > METRICS or tags > TAGS:
            return records[: max(number, 1)]
    return records


def known_id(client: MlflowClient, run_id: str, experiment: str = "") -> str:
    """The id in MLflow of a run that was begun under a local one; what was given, where it is not there yet."""
    return run_with_tag(client, ID_TAG, run_id, experiment) or run_id if is_local(run_id) else run_id


def run_with_tag(client: MlflowClient, tag: str, value: str, experiment: str = "") -> str:
    """The id of the first run that has the tag, in one experiment or in all; "" where there is none."""
    return next(iter(runs_with_tag(client, tag, value, experiment)), "")


def runs_with_tag(client: MlflowClient, tag: str, value: str, experiment: str = "", also: str = "") -> list[str]:
    experiments = [experiment] if experiment else [entry.experiment_id for entry in client.search_experiments()]
    runs = client.search_runs(experiments, f"tags.`{tag}` = '{value}'{also}", order_by=["attributes.start_time"])
    return [str(run.info.run_id) for run in runs]
