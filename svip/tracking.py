"""What goes to MLflow. Nothing else in svip imports mlflow, save the model code that MLflow itself runs (mlflow_model).

A pipeline is a parent run (open_run, close_run); every step, variant and trial is a child run (open_tracker). All of
it goes through MlflowClient, so no run is ever "active" in the process.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import svip

if TYPE_CHECKING:
    from mlflow import MlflowClient

# before mlflow is imported anywhere below: it reads them, and starts its telemetry, at import
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

log = logging.getLogger(__name__)

PARENT_TAG = "mlflow.parentRunId"
"""The tag by which MLflow nests runs."""
PIPELINE_TAG = "pipeline"
LONGEST_VALUE = 6000
"""Characters that MLflow stores of a parameter; longer ones are refused or cut by its servers."""
BATCH = 100
"""Parameters that MLflow takes in one request."""
STATUSES = {
    "FINISHED": "FINISHED",
    "FAILED": "FAILED",
    "KILLED": "KILLED",
    "SUCCEEDED": "FINISHED",  # this and the next as Kubeflow Pipelines says it
    "CANCELLED": "KILLED",
}
CHECKPOINT_FILES = ("model.safetensors", "config.yaml", "model.json", "classes.parquet")
REQUIREMENTS = ("torch", "torchvision", "timm", "numpy", "pandas", "pyarrow", "omegaconf", "safetensors", "pillow")
"""What svip needs to load and run a checkpoint (tqdm comes with timm); logged with the versions that are installed."""


class TrackingError(RuntimeError):
    """A run or status that MLflow doesn't have; the message says where it was looked for."""


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, else the SQLite file ``mlflow.db`` of the current folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


def shown_uri() -> str:
    """The tracking URI for messages: without a password."""
    return _without_password(tracking_uri())


def _without_password(text: str) -> str:
    text = re.sub(r"//([^/:@\s]*):\S*@", r"//\1:***@", text)
    return re.sub(r"((?:password|token|secret)=)[^&\s]+", r"\1***", text, flags=re.IGNORECASE)


class Tracker:
    """Writes to one run, and ends it when the ``with`` block does: FINISHED, FAILED on an error, KILLED when stopped.

    Without a run (tracking is off, or this is not rank 0) every method does nothing and ``run_id`` is empty.
    """

    def __init__(self, client: MlflowClient | None = None, run_id: str = "") -> None:
        self.run_id = run_id
        self._client = client
        self._handles_sigterm = False

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log a flat mapping, such as ``config.flatten`` makes.

        MLflow's parameters can't change: where a resumed run now has another value, the tag ``resumed.<key>`` says so.
        """
        if self._client is None:
            return
        known = self._client.get_run(self.run_id).data.params
        values = {key: _shorten(value) for key, value in params.items()}
        _log_params(self._client, self.run_id, {key: value for key, value in values.items() if key not in known})
        self.set_tags({f"resumed.{key}": value for key, value in values.items() if known.get(key, value) != value})

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log the numbers of one step (an epoch, or 0 for a result) under names such as ``val/H``."""
        if self._client is None:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(
            self.run_id, metrics=[Metric(key, float(value), now, step) for key, value in metrics.items()]
        )

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Copy a file, or the content of a directory, to the run's artifacts (below ``folder``)."""
        if self._client is None:
            return
        send = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        send(self.run_id, str(path), folder or None)

    def log_dict(self, content: Mapping[str, Any], file: str) -> None:
        """Store ``content`` as the artifact ``file`` (.json or .yaml)."""
        if self._client is not None:
            self._client.log_dict(self.run_id, dict(content), file)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set or replace tags."""
        if self._client is not None:
            for key, value in tags.items():
                self._client.set_tag(self.run_id, key, value)

    def __enter__(self) -> Tracker:
        # A stopped container gets SIGTERM, on which Python would die at once and leave the run RUNNING for ever.
        main = threading.current_thread() is threading.main_thread()
        if self._client is not None and main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
            self._handles_sigterm = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handles_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self._client is None:
            return
        status = _end_status(error)
        if status == "FAILED":
            self.set_tags({"error": _shorten(f"{type(error).__name__}: {error}")})
        self._client.set_terminated(self.run_id, status)


@contextlib.contextmanager
def _reaching_the_store() -> Iterator[None]:
    """MLflow's own errors as one line that says which store it was and what to look at."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, ImportError) as error:  # a database's driver may be missing
        raise TrackingError(
            f"MLflow at {shown_uri()} can't be used; check MLFLOW_TRACKING_URI, and that its server runs. "
            f"It says: {_without_password(str(error).splitlines()[0])}"
        ) from None  # whose traceback would show the password


@_reaching_the_store()
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
    client = _client(tracking_uri())
    tags = _tags(tags)
    wanted = os.environ.get("MLFLOW_RUN_ID")
    if wanted and not _exists(client, wanted):
        raise TrackingError(f"MLFLOW_RUN_ID={wanted}: {shown_uri()} has no such run; unset it to open a new run")
    if run_id and not wanted and not _exists(client, run_id):
        log.warning("run %s is not in %s: its training goes on in a new run", run_id, shown_uri())
        run_id = None
    run_id = wanted or run_id
    if not run_id:
        nested = {PARENT_TAG: parent_run_id} if parent_run_id else {}
        run = client.create_run(_experiment_id(client, experiment), tags={**tags, **nested}, run_name=run_name)
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


@_reaching_the_store()
def open_run(
    pipeline: str,
    experiment: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str] | None = None,
    continues: str = "",
) -> str:
    """Start the parent run of a pipeline; the id of the run, which stays RUNNING until close_run.

    Where the pipeline ``continues`` one that has a run, that run is opened again, under the new name.
    """
    client = _client(tracking_uri())
    for run_id in _runs_of(client, continues)[:1] if continues else []:
        client.update_run(run_id, status="RUNNING", name=pipeline)
        client.set_tag(run_id, PIPELINE_TAG, pipeline)
        return run_id
    run = client.create_run(
        _experiment_id(client, experiment), tags={**_tags(tags), PIPELINE_TAG: pipeline}, run_name=pipeline
    )
    _log_params(client, run.info.run_id, {key: _shorten(value) for key, value in params.items()})
    return run.info.run_id


@_reaching_the_store()
def close_run(run: str, status: str) -> None:
    """End a parent run: FINISHED, FAILED or KILLED (or, as Kubeflow says, SUCCEEDED or CANCELLED).

    ``run`` is its id, or the ``pipeline`` it was opened with: an exit handler can't receive the output of another
    task, so it knows no id. By that name all runs that are still open are ended; none at all is fine, since the
    pipeline may have failed before open_run. Raises TrackingError for another status, or an id that doesn't exist.
    """
    if status not in STATUSES:
        raise TrackingError(f"status {status!r}: expected one of {', '.join(STATUSES)}")
    client = _client(tracking_uri())
    is_id = len(run) == 32 and set(run) <= set("0123456789abcdef")
    if is_id and not _exists(client, run):
        raise TrackingError(f"run {run}: {shown_uri()} has no such run")
    for run_id in [run] if is_id else _runs_of(client, run, "and attributes.status = 'RUNNING'"):
        client.set_terminated(run_id, STATUSES[status])


def log_to_run(run_id: str, metrics: Mapping[str, float] | None = None, artifacts: Sequence[Path] = ()) -> None:
    """Add results to a run that goes on being open or closed as it is, such as a pipeline's parent run."""
    tracker = Tracker(_client(tracking_uri()), run_id)
    tracker.log_metrics(metrics or {})
    for path in artifacts:
        tracker.log_artifact(path)


def log_checkpoint_model(tracker: Tracker, checkpoint: Path, name: str = "model") -> str:
    """Log a checkpoint as an MLflow model; its URI (``models:/...``), or "" without a run.

    ``mlflow models serve`` answers with it: see svip.mlflow_model for what goes in and comes out. The model carries
    svip's code, the weights and the classes, and needs nothing of this checkout.
    """
    if tracker._client is None:
        return ""
    import mlflow
    import pandas as pd  # here, as every command imports this module and few log a model
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from PIL import Image

    package = Path(svip.__file__).parent
    mlflow.set_tracking_uri(tracking_uri())  # Model.log knows no other way
    # Model.log would put it in MLflow's default experiment, not in the run's.
    experiment = tracker._client.get_run(tracker.run_id).info.experiment_id
    model = tracker._client.create_logged_model(experiment, name, source_run_id=tracker.run_id)
    photo, path = io.BytesIO(), sys.path.copy()
    Image.new("RGB", (64, 64), "grey").save(photo, "png")
    info = Model.log(
        artifact_path=None,
        name=name,
        flavor=mlflow.pyfunc,
        run_id=tracker.run_id,
        model_id=model.model_id,
        python_model=str(package / "mlflow_model.py"),
        artifacts={file: str(checkpoint / file) for file in CHECKPOINT_FILES},
        code_paths=[str(package)],
        pip_requirements=[f"{requirement}=={version(requirement)}" for requirement in REQUIREMENTS],
        signature=ModelSignature(
            inputs=Schema([ColSpec(DataType.binary, "image")]),
            params=ParamSchema([ParamSpec("top", DataType.long, 5), ParamSpec("classes", DataType.string, "")]),
        ),
        input_example=(pd.DataFrame({"image": [photo.getvalue()]}), {"top": 5, "classes": ""}),
    )
    sys.path[:] = path  # MLflow has tried the example on the model, whose temporary folder it leaves here
    return str(info.model_uri)


def git_sha() -> str:
    """Commit of svip's own checkout, with ``-dirty`` where it was edited; else SVIP_GIT_SHA, else ``unknown``."""
    checkout = Path(svip.__file__).parents[1]
    if (checkout / ".git").exists():  # not some other repository around an installed svip
        command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        try:
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            log.debug("git can't describe %s", checkout)
    return os.environ.get("SVIP_GIT_SHA") or "unknown"


@functools.cache
def _client(uri: str) -> MlflowClient:
    """A client that leaves the terminal alone; the first one of a new SQLite file makes its tables (seconds)."""
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow import MlflowClient

    return MlflowClient(uri)


def _experiment_id(client: MlflowClient, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    # Beside the SQLite file, whatever folder a process runs in; a server knows its own place.
    folder = Path(client.tracking_uri.removeprefix("sqlite:///")).absolute().parent / "mlruns" / name
    try:
        return client.create_experiment(name, str(folder) if client.tracking_uri.startswith("sqlite:///") else None)
    except MlflowException:
        found = client.get_experiment_by_name(name)  # a process beside this one may have been faster
        if found is None:
            raise
        return str(found.experiment_id)


def _exists(client: MlflowClient, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return True


def _runs_of(client: MlflowClient, pipeline: str, condition: str = "") -> list[str]:
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    query = f"tags.{PIPELINE_TAG} = '{pipeline}' {condition}"
    return [run.info.run_id for run in client.search_runs(experiments, query)]


def _log_params(client: MlflowClient, run_id: str, params: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    entries = [Param(key, value) for key, value in params.items()]
    for start in range(0, len(entries), BATCH):
        client.log_batch(run_id, params=entries[start : start + BATCH])


def _tags(tags: Mapping[str, str] | None) -> dict[str, str]:
    common = {"git_sha": git_sha(), "image_digest": os.environ.get("SVIP_IMAGE_DIGEST", "")}
    return {key: value for key, value in {**common, **(tags or {})}.items() if value}


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."


def _end_status(error: BaseException | None) -> str:
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "FINISHED"
    return "KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED"
