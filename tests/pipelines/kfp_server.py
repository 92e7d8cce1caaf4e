"""A small Kubeflow Pipelines server on loopback: the part of its API that svip uses, over runs that really execute.

What is posted is run by kfp.local in a process of its own (run_compiled.py). The pods of a run are served too, as
far as ``svip pipeline logs`` asks Kubernetes for them.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

COLOUR = re.compile(r"\x1b\[\d+m")
STARTS = re.compile(r"Executing task '([^']+)'")
ENDS = re.compile(r"Task '([^']+)' finished with status (SUCCESS|FAILURE)")
CACHED = re.compile(r"Task (\S+) cache hit")
JOB = "{{$.pipeline_job_uuid}}"


@dataclass
class StubRun:
    """One run and the process that executes it."""

    id: str
    body: dict[str, Any]
    folder: Path
    process: subprocess.Popen[bytes]
    created: str = field(default_factory=lambda: _now())
    stopped: bool = False
    started: dict[str, str] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)

    def log(self) -> list[str]:
        return [COLOUR.sub("", line) for line in (self.folder / "log").read_text(errors="replace").splitlines()]

    def state(self) -> str:
        code = self.process.poll()
        if code is None:
            return "CANCELING" if self.stopped else "RUNNING"
        return "CANCELED" if self.stopped else "FAILED" if code else "SUCCEEDED"

    def tasks(self) -> dict[str, str]:
        """Task -> state, with the drivers that Kubeflow lists beside them."""
        states = {"root-driver": "SUCCEEDED"}
        for line in self.log():
            if found := STARTS.search(line):
                states[found[1]] = "RUNNING"
                self.started.setdefault(found[1], _now())
            elif (found := CACHED.search(line)) or (found := ENDS.search(line)) and not _is_group(found[1]):
                states[found[1]] = "FAILED" if line.endswith("FAILURE") else "SUCCEEDED"
                self.started.setdefault(found[1], _now())
                self.ended.setdefault(found[1], _now())
        if self.stopped:
            states = {name: "FAILED" if state == "RUNNING" else state for name, state in states.items()}
        return states

    def to_dict(self) -> dict[str, Any]:
        state = self.state()
        details = [
            {
                "run_id": self.id,
                "task_id": f"{self.id}-{name}",
                "display_name": name,
                "start_time": self.started.get(name, self.created),
                "end_time": self.ended.get(name, "1970-01-01T00:00:00Z"),
                "state": task_state,
                **({"error": {"code": 2, "message": "exit code 1"}} if task_state == "FAILED" else {}),
            }
            for name, task_state in self.tasks().items()
        ]
        failed = {"error": {"code": 9, "message": "one or more tasks failed"}} if state == "FAILED" else {}
        own = {"run_id": self.id, "created_at": self.created, "state": state, "run_details": {"task_details": details}}
        return {**self.body, **own, **failed}

    def pods(self) -> list[dict[str, Any]]:
        return [
            {
                "metadata": {
                    "name": f"{self.id[:8]}-{name}",
                    "creationTimestamp": self.started.get(name, self.created),
                    "labels": {"pipeline/runid": self.id},
                },
                "spec": {
                    "containers": [
                        {"name": "wait"},
                        {"name": "main", "args": ["--function_to_execute", name.replace("-", "_")]},
                    ]
                },
            }
            for name in self.tasks()
            if name != "root-driver"
        ]

    def log_of(self, task: str) -> str:
        """What the log has from the start of a task to its end."""
        lines, inside = [], False
        for line in self.log():
            inside = (inside or f"Executing task '{task}'" in line) and f"Task '{task}' finished" not in line
            lines += [line] if inside else []
        return "".join(f"{line}\n" for line in lines)


class StubServer:
    """Listens on a port of its own.

    ``token``: what has to be sent. ``namespace``: serve users with profiles, this being one. ``runner``: subprocess,
    or docker for a container a step.
    """

    def __init__(self, folder: Path, token: str = "", namespace: str = "", runner: str = "subprocess") -> None:
        self.folder, self.token, self.namespace, self.runner = folder, token, namespace, runner
        self.environment: dict[str, str] = {}
        self.runs: dict[str, StubRun] = {}
        self.experiments: list[dict[str, str]] = []
        self.seen: list[str] = []
        self._listener: ThreadingHTTPServer | None = None
        self.port = 0
        self.listen()

    @property
    def away(self) -> bool:
        return self._listener is None

    @property
    def host(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def listen(self) -> None:
        handler = type("Handler", (_Handler,), {"stub": self})
        self._listener = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self._listener.daemon_threads = True
        self.port = self._listener.server_address[1]
        threading.Thread(target=self._listener.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Stop listening; the runs go on."""
        if self._listener:
            self._listener.shutdown()
            self._listener.server_close()
            self._listener = None

    def end(self) -> None:
        self.close()
        for run in self.runs.values():
            self.terminate(run)

    def start(self, body: dict[str, Any]) -> StubRun:
        run_id, spec = str(uuid.uuid4()), body["pipeline_spec"]
        folder = self.folder / run_id
        folder.mkdir(parents=True)
        document = json.loads(json.dumps(spec.get("pipeline_spec", spec)).replace(JOB, run_id))
        (folder / "pipeline.yaml").write_text(yaml.safe_dump(document))
        (folder / "parameters.json").write_text(json.dumps(_whole(body["runtime_config"].get("parameters", {}))))
        command = [sys.executable, str(Path(__file__).with_name("run_compiled.py"))]
        command += [str(folder / "pipeline.yaml"), str(folder / "parameters.json"), str(folder), self.runner]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **self.environment},
                start_new_session=True,
            )
        run = StubRun(run_id, {key: value for key, value in body.items() if value is not None}, folder, process)
        self.runs[run_id] = run
        return run

    def terminate(self, run: StubRun) -> None:
        if run.process.poll() is None:
            run.stopped = True
            os.killpg(run.process.pid, signal.SIGKILL)
            run.process.wait()


class _Handler(BaseHTTPRequestHandler):
    stub: StubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, method: str) -> None:
        url = urlsplit(self.path)
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        self.stub.seen.append(f"{method} {self.path}")
        if self.stub.away:  # a connection that was kept open
            self.close_connection = True
            return
        if self.stub.token and self.headers.get("Authorization") != f"Bearer {self.stub.token}":
            self._send(401, _problem(16, "Request header error: there is no user identity header."))
            return
        self._send(*self._handle(method, url.path, parse_qs(url.query), body))

    def _handle(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> tuple[int, Any]:
        stub = self.stub
        namespace = query.get("namespace", [body.get("namespace") or ""])[0]
        match method, path.removeprefix("/apis/v2beta1/"):
            case "GET", "healthz":
                return 200, {"multi_user": bool(stub.namespace)}
            case _, "experiments" if namespace != stub.namespace:
                if stub.namespace:
                    return 403, _problem(7, f"User 'me' is not authorized with reason: namespace {namespace}")
                return 400, _problem(3, "In single-user mode, a namespace is not taken.")
            case "GET", "experiments":
                wanted = json.loads(query["filter"][0])["predicates"][0]["stringValue"]
                return 200, {"experiments": [one for one in stub.experiments if one["display_name"] == wanted]}
            case "POST", "experiments":
                stub.experiments.append({"experiment_id": str(uuid.uuid4()), "display_name": body["display_name"]})
                return 200, stub.experiments[-1]
            case "POST", "runs":
                return 200, stub.start(body).to_dict()
        if found := re.fullmatch(r"/apis/v2beta1/runs/([^/:]+)(:terminate)?", path):
            if (run := stub.runs.get(found[1])) is None:
                return 404, _problem(5, f"ResourceNotFoundError: Run {found[1]} not found.")
            if found[2]:
                stub.terminate(run)
                return 200, {}
            return 200, run.to_dict()
        if found := re.fullmatch(r"/api/v1/namespaces/([^/]+)/pods(?:/([^/]+)/log)?", path):
            pods = [(pod, run) for run in stub.runs.values() for pod in run.pods()]
            if found[2]:
                (run, name) = next(
                    (run, pod["metadata"]["name"]) for pod, run in pods if pod["metadata"]["name"] == found[2]
                )
                return 200, run.log_of(name[9:])
            run_id = query["labelSelector"][0].partition("=")[2]
            items = [pod for pod, run in pods if run.id == run_id]
            return 200, {"kind": "PodList", "apiVersion": "v1", "items": items}
        return 404, _problem(5, f"no such path: {path}")

    def _send(self, status: int, answer: Any) -> None:
        content = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(answer, str) else "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _problem(code: int, message: str) -> dict[str, Any]:
    """An error as the server's gateway writes it."""
    return {"error": message, "code": code, "message": message, "details": []}


def _whole(value: Any) -> Any:
    """Whole numbers as integers, as the server makes them of what JSON calls a number."""
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_group(task: str) -> bool:
    return task.startswith(("exit-handler-", "for-loop-"))


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
