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
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # with the password that it may hold
# A request fails soon, and the outbox tries again in its own time. MLflow's own seven retries would take four minutes,
# and where only the answer was lost they would do again what must be done once, such as creating a run.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")

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
    """The text with *** for the passwords of the addresses in it."""
    text = re.sub(r"//([^/:@\s]*):\S*@", r"//\1:***@", text)
    return re.sub(r"((?:password|token|secret)=)[^&\s]+", r"\1***", text, flags=re.IGNORECASE)


@contextlib.contextmanager
def reaching_the_store() -> Iterator[None]:
    """MLflow's own errors as one line that says which store it was and what to look at."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, ImportError) as error:  # a database's driver may be missing
        raise cant_be_used(error) from None  # whose traceback would show the password


def cant_be_used(error: Exception) -> TrackingError:
    return TrackingError(
        f"MLflow at {shown_uri()} can't be used; check MLFLOW_TRACKING_URI, and that its server runs. "
        f"It says: {first_line(error)}"
    )


def first_line(error: BaseException) -> str:
    """An error for a message: what is wrong, without a password."""
    return without_password((str(error).strip() or type(error).__name__).splitlines()[0])


def reason(error: BaseException) -> str:
    """Why no answer came: what the network said, without what was built around it."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return first_line(error)


def is_away(error: Exception) -> bool:
    """Whether it says that no answer came, or that the server can't do its work now."""
    import requests
    from botocore.exceptions import ConnectionError as NoConnection
    from botocore.exceptions import HTTPClientError
    from mlflow.exceptions import MlflowException

    if is_unreachable(error) or isinstance(error, requests.exceptions.RetryError):
        return True
    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
    elif isinstance(error, requests.HTTPError) and error.response is not None:
        status = error.response.status_code
    else:
        return isinstance(error, NoConnection | HTTPClientError)  # of the bucket that holds the artifacts
    return status >= 500 or status in (408, 429)


def is_unreachable(error: Exception) -> bool:
    """Whether it says that the server gave no answer at all. What a local file can't do is no such error."""
    import requests
    from mlflow.exceptions import MlflowException

    cause = (error.__cause__ or error.__context__) if isinstance(error, MlflowException) else error
    if isinstance(cause, requests.RequestException):  # RetryError: an answer that it can't, as often as it was asked
        return cause.response is None and not isinstance(cause, requests.exceptions.RetryError)
    return isinstance(cause, ConnectionError | TimeoutError)


def is_file(uri: str) -> bool:
    """Whether the store is a file, which no network parts from this process."""
    return uri.startswith("sqlite:")


def check_tracked() -> None:
    """TrackingError where nothing can be read: the store is a SQLite file, and not there. MLflow would make it."""
    file = Path(tracking_uri().removeprefix("sqlite:///"))
    if is_file(tracking_uri()) and not file.exists():
        raise TrackingError(f"nothing is tracked: there is no {file}; go to its folder, or set MLFLOW_TRACKING_URI")


@functools.cache
def client_of(uri: str) -> MlflowClient:
    """A client that leaves the terminal alone; the first one of a new SQLite file makes its tables (seconds)."""
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow import MlflowClient

    return MlflowClient(uri)


def use_store(client: MlflowClient) -> None:
    """Let MLflow's own functions that take no client use this one's store: to them its address is a global."""
    import mlflow

    named = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(client.tracking_uri)  # writes it there as well; but where runs go is for the user to say
    if named is None:
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    else:
        os.environ["MLFLOW_TRACKING_URI"] = named


def check_address(uri: str) -> None:
    """Raises what MLflow says of an address of a kind that it doesn't know; a database's server isn't asked yet."""
    import mlflow  # noqa: F401  # which takes seconds: no part of the time that a server has to answer

    if not uri.startswith(("postgresql", "mysql", "mssql")):
        client_of(uri)


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
    """Whether there is such a run, and it was not deleted."""
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def log_params(client: MlflowClient, run_id: str, params: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    entries = [Param(key, value) for key, value in params.items()]
    for start in range(0, len(entries), BATCH):
        client.log_batch(run_id, params=entries[start : start + BATCH])


def shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."
