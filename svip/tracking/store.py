"""Where MLflow's store is, and how it is reached."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient

# before mlflow is imported anywhere: it reads them, and starts its telemetry, at import
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

LONGEST_VALUE = 6000
"""Characters that MLflow stores of a parameter; longer ones are refused or cut by its servers."""
BATCH = 100
"""Parameters that MLflow takes in one request."""


class TrackingError(RuntimeError):
    """A run or status that MLflow doesn't have; the message says where it was looked for."""


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, else the SQLite file ``mlflow.db`` of the current folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


def shown_uri() -> str:
    """The tracking URI for messages: without a password."""
    return without_password(tracking_uri())


def without_password(text: str) -> str:
    text = re.sub(r"//([^/:@\s]*):\S*@", r"//\1:***@", text)
    return re.sub(r"((?:password|token|secret)=)[^&\s]+", r"\1***", text, flags=re.IGNORECASE)


@contextlib.contextmanager
def reaching_the_store() -> Iterator[None]:
    """MLflow's own errors as one line that says which store it was and what to look at."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, ImportError) as error:  # a database's driver may be missing
        raise TrackingError(
            f"MLflow at {shown_uri()} can't be used; check MLFLOW_TRACKING_URI, and that its server runs. "
            f"It says: {without_password(str(error).splitlines()[0])}"
        ) from None  # whose traceback would show the password


@functools.cache
def client_of(uri: str) -> MlflowClient:
    """A client that leaves the terminal alone; the first one of a new SQLite file makes its tables (seconds)."""
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow import MlflowClient

    return MlflowClient(uri)


def experiment_id(client: MlflowClient, name: str) -> str:
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


def run_exists(client: MlflowClient, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return True


def log_params(client: MlflowClient, run_id: str, params: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    entries = [Param(key, value) for key, value in params.items()]
    for start in range(0, len(entries), BATCH):
        client.log_batch(run_id, params=entries[start : start + BATCH])


def shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."
