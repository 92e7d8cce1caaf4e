"""A Kubeflow Pipelines server: submit a run, look at it, follow it, stop it. The only user of kfp.Client."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import kfp_server_api
import requests
import urllib3
import yaml

FINAL = ("SUCCEEDED", "FAILED", "SKIPPED", "CANCELED")
"""States that a run or a task does not leave."""
TIMEOUT = 30.0
"""Seconds that a request may take; kfp's own waits for ever."""
PAUSE = 5.0
"""Seconds between two looks at a run that is followed."""
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it warns of its own tries; kfp resets its parent
PATIENCE = 1800.0
"""Seconds without an answer after which following ends."""


class ServerError(RuntimeError):
    """The server refused, or a run failed; the message has what the server says and what to do."""


class UnreachableError(ServerError):
    """No answer, or one that may be another in a minute."""


@dataclass(frozen=True)
class Task:
    """One execution of a step; in a loop a step has several."""

    id: str
    name: str
    state: str
    started: datetime | None
    ended: datetime | None
    error: str

    @property
    def seconds(self) -> float | None:
        """How long it ran, or has run so far."""
        return ((self.ended or datetime.now(UTC)) - self.started).total_seconds() if self.started else None


@dataclass(frozen=True)
class Run:
    """A run as the server describes it, without Kubeflow's own tasks (drivers, loops)."""

    id: str
    name: str
    state: str
    error: str
    tasks: tuple[Task, ...]

    @property
    def failed(self) -> list[str]:
        return sorted({task.name for task in self.tasks if task.state == "FAILED"})

    def to_dict(self) -> dict[str, Any]:
        tasks = [{**asdict(task), "seconds": task.seconds} for task in self.tasks]
        return json.loads(json.dumps({**asdict(self), "tasks": tasks}, default=str))


class Server:
    """A connection. ``token`` is asked for anew when the server no longer takes the last one."""

    def __init__(self, host: str, namespace: str = "", token: Callable[[], str] = str) -> None:
        if not host:
            raise ServerError(
                "no server: give --host, KF_PIPELINES_ENDPOINT or `host` of the cluster file; with "
                "`kubectl -n kubeflow port-forward svc/ml-pipeline-ui 8080:80` it is http://localhost:8080"
            )
        self.host = (host if "://" in host else f"https://{host}").rstrip("/")
        self._namespace, self._token = namespace, token
        self._connect()

    def _connect(self) -> None:
        from kfp import Client

        token = self._token()
        multi_user = self._is_multi_user(token)
        if multi_user and not self._namespace:
            raise ServerError(f"{self.host} has a namespace a user; give yours (--namespace, or in the cluster file)")
        with warnings.catch_warnings(), _asking(self.host, self._namespace):
            warnings.simplefilter("ignore")  # that it needs a server of version 2
            self._client = Client(
                self.host,
                existing_token=token or None,
                # a server without profiles refuses to be told one
                **({"namespace": self._namespace} if multi_user else {}),
                proxy=requests.utils.select_proxy(self.host, requests.utils.get_environ_proxies(self.host)),
                ssl_ca_cert=os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE"),
            )

    def _is_multi_user(self, token: str) -> bool:
        """Ask whether it is there at all, before kfp's client tries it for half a minute."""
        address = f"{self.host}/apis/v2beta1/healthz"
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        with _asking(self.host, self._namespace):
            answer = requests.get(address, headers=headers, timeout=TIMEOUT, allow_redirects=False)
            if answer.status_code >= 400:
                raise kfp_server_api.ApiException(http_resp=_Answer(answer))
        try:
            return bool(answer.json().get("multi_user"))
        except ValueError:
            hint = "it asks to log in: give a token" if 300 <= answer.status_code < 400 else "is the address right?"
            raise ServerError(f"{address} is not Kubeflow Pipelines' API ({answer.status_code}); {hint}") from None

    def submit(
        self,
        package: Path,
        experiment: str,
        name: str,
        parameters: Mapping[str, Any],
        service_account: str | None = None,
        pipeline_root: str | None = None,
    ) -> str:
        """Start a run of a compiled pipeline in an experiment, made if there is none of that name; the run's id."""
        with self._asking(), _silence():
            home = self._client.create_experiment(experiment).experiment_id
            run = self._client.run_pipeline(
                home,
                name,
                str(package),
                dict(parameters),
                service_account=service_account,
                pipeline_root=pipeline_root,
            )
        return str(run.run_id)

    def resubmit(self, run_id: str) -> str:
        """Start a failed run once more, with its pipeline and parameters; the new run's id.

        A pipeline that has the parameter ``continues`` is told the run that it continues, and those which that one
        continued: it may have failed before it took up their MLflow run.
        """
        old = self._get(run_id)
        if old.state not in ("FAILED", "CANCELED"):
            raise ServerError(f"run {run_id} is {old.state}; only one that failed or was stopped is resubmitted")
        documents = _documents(old.pipeline_spec)
        if not documents:
            raise ServerError(
                f"run {run_id} was not submitted with its pipeline; clone it in the UI: {self.link(run_id)}"
            )
        parameters = dict(old.runtime_config.parameters or {}) if old.runtime_config else {}
        if "continues" in documents[0]["root"].get("inputDefinitions", {}).get("parameters", {}):
            parameters["continues"] = f"{run_id} {parameters.get('continues') or ''}".strip()
        with tempfile.TemporaryDirectory() as folder:
            package = Path(folder) / "pipeline.yaml"
            package.write_text(yaml.safe_dump_all(documents))
            with self._asking(), _silence():
                run = self._client.run_pipeline(
                    old.experiment_id,
                    f"{old.display_name.removesuffix(' again')} again",
                    str(package),
                    parameters,
                    service_account=old.service_account,
                    pipeline_root=old.runtime_config.pipeline_root if old.runtime_config else None,
                )
        return str(run.run_id)

    def run(self, run_id: str) -> Run:
        """What the server knows of a run."""
        return _read_run(self._get(run_id))

    def stop(self, run_id: str) -> None:
        """Terminate a run; its exit handler still runs."""
        with self._asking(run_id):
            self._client.terminate_run(run_id)

    def follow(self, run_id: str, say: Callable[[str], None], pause: float = PAUSE) -> Run:
        """Say each change of the run's steps until it ends; the ended run.

        A server that does not answer is asked again, at longer and longer intervals; UnreachableError after PATIENCE.
        """
        states: dict[str, str] = {}
        silent_since, tries = 0.0, 0
        while True:
            try:
                run = self.run(run_id)
            except UnreachableError as error:
                if not tries:
                    silent_since = time.monotonic()
                    say(f"{error}; the run goes on, trying again")
                elif time.monotonic() - silent_since > PATIENCE:
                    raise
                time.sleep(min(pause * 2**tries, 60.0))
                tries += 1
                continue
            if tries:
                say("the server answers again")
                tries = 0
            for task in run.tasks:
                if states.get(task.id) != task.state:
                    states[task.id] = task.state
                    took = f" after {shown(task.seconds)}" if task.state in FINAL and task.seconds is not None else ""
                    say(f"{task.name}: {task.state.lower()}{took}{f': {task.error}' if task.error else ''}")
            if run.state in FINAL:
                return run
            time.sleep(pause)

    def link(self, run_id: str) -> str:
        """Where the UI shows the run."""
        return f"{os.environ.get('KF_PIPELINES_UI_ENDPOINT') or self.host}/#/runs/details/{run_id}"

    def _get(self, run_id: str) -> Any:
        for attempt in (1, 2):
            try:
                with self._asking(run_id):
                    return self._client.get_run(run_id)
            except ServerError as error:
                cause = error.__cause__
                expired = isinstance(cause, kfp_server_api.ApiException) and cause.status == 401
                if attempt == 2 or not expired:
                    raise
                self._connect()  # the token may have been renewed

    def _asking(self, run_id: str = "") -> contextlib.AbstractContextManager[None]:
        return _asking(self.host, self._namespace, run_id)


def shown(seconds: float | None) -> str:
    """A duration for people: ``41 s``, ``3 min 05 s``, ``2 h 10 min``."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


@contextlib.contextmanager
def _asking(host: str, namespace: str, run_id: str = "") -> Iterator[None]:
    """Requests within end in time, and their errors say what to do."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # what kfp's client leaves open
    try:
        yield
    except kfp_server_api.ApiException as error:
        said = _message(error)
        if error.status in (401, 403):
            whose = f" in namespace {namespace}" if namespace else ""
            problem = "no valid token" if error.status == 401 else f"not allowed{whose}"
            raise ServerError(
                f"{host}: {problem} ({error.status}); give a token (SVIP_KFP_TOKEN, --token-file). It says: {said}"
            ) from error
        if error.status == 404 and run_id:
            raise ServerError(f"{host} has no run {run_id}") from error
        kind = UnreachableError if error.status in (0, 429) or error.status >= 500 else ServerError
        raise kind(f"{host} answered {error.status}: {said}") from error
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        raise UnreachableError(f"{host} does not answer ({_reason(error)})") from error
    finally:
        socket.setdefaulttimeout(before)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without kfp's links and remarks."""
    logging.disable(logging.INFO)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


class _Answer:
    """An answer of requests, as kfp's exception reads it."""

    def __init__(self, answer: requests.Response) -> None:
        self.status, self.reason, self.data = answer.status_code, answer.reason, answer.text
        self.getheaders = lambda: answer.headers


def _message(error: kfp_server_api.ApiException) -> str:
    """The server's own words, on one line."""
    try:
        body = json.loads(error.body or "")
        text = body.get("message") or body.get("error") or ""
    except (ValueError, AttributeError):
        text = ""
    lines = str(text or error.reason or "nothing").strip().splitlines()
    return lines[0][:500] if lines else "nothing"


def _reason(error: BaseException) -> str:
    """The innermost cause: what is around it names only classes."""
    while (inner := getattr(error, "reason", None) or (error.args[0] if error.args else None)) and isinstance(
        inner, BaseException
    ):
        error = inner
    text = str(error).rsplit(": ", 1)[-1].rstrip(")'\"")
    return text or type(error).__name__


def _documents(spec: Any) -> list[dict[str, Any]]:
    """The YAML documents of a compiled pipeline, from how a run carries it; none where it carries none."""
    if not spec:
        return []
    if "pipeline_spec" not in spec:
        return [spec]
    return [spec["pipeline_spec"], *([spec["platform_spec"]] if spec.get("platform_spec") else [])]


def _read_run(run: Any) -> Run:
    documents = _documents(run.pipeline_spec)
    steps = step_tasks(documents[0]) if documents else set()
    details = (run.run_details.task_details or []) if run.run_details else []
    tasks = [
        Task(
            task.task_id or task.display_name,
            task.display_name,
            task.state or "PENDING",
            task.start_time,
            task.end_time if (task.state in FINAL) else None,
            _error(task.error),
        )
        for task in details
        if task.display_name in steps or (not steps and not _is_kubeflows(task.display_name or ""))
    ]
    never = datetime.max.replace(tzinfo=UTC)
    tasks.sort(key=lambda task: task.started or never)
    return Run(run.run_id, run.display_name or "", run.state or "PENDING", _error(run.error), tuple(tasks))


def step_tasks(spec: Mapping[str, Any]) -> set[str]:
    """Names of the tasks of a pipeline that run a container, those in loops and exit handlers too."""
    components = spec.get("components", {})
    dags = [spec["root"]["dag"], *(component["dag"] for component in components.values() if "dag" in component)]
    return {
        name
        for dag in dags
        for name, task in dag.get("tasks", {}).items()
        if "executorLabel" in components.get(task["componentRef"]["name"], {})
    }


def _is_kubeflows(name: str) -> bool:
    return name in ("root", "executor") or name.endswith("-driver")


def _error(status: Any) -> str:
    return (status.message or "").strip().splitlines()[0] if status and (status.message or "").strip() else ""
