"""A small Kubernetes API server on loopback, with Kubeflow Trainer behind it, for what the SDK asks of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

NAMESPACE = "team"
TRAINER = f"/apis/trainer.kubeflow.org/v1alpha1/namespaces/{NAMESPACE}"
CORE = f"/api/v1/namespaces/{NAMESPACE}"
TIME = "2026-01-01T00:00:00Z"
RUNTIME = {
    "apiVersion": "trainer.kubeflow.org/v1alpha1",
    "kind": "TrainingRuntime",
    "metadata": {"name": "svip", "labels": {"trainer.kubeflow.org/framework": "torch"}},
    "spec": {
        "mlPolicy": {"numNodes": 1, "torch": {}},
        "template": {
            "spec": {
                "replicatedJobs": [
                    {
                        "name": "node",
                        "template": {
                            "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
                            "spec": {
                                "template": {
                                    "spec": {
                                        "containers": [
                                            {"name": "node", "image": "svip", "resources": {"limits": {"cpu": "1"}}}
                                        ]
                                    }
                                }
                            },
                        },
                    }
                ]
            }
        },
    },
}

Node = Callable[[dict[str, Any]], Iterator[str]]
"""What the nodes of a TrainJob do: the lines of node 0's log, while they are made; an exception fails the job."""


class Cluster:
    """The jobs of the namespace, and what their nodes do."""

    def __init__(self, run: Node) -> None:
        self.run = run
        self.jobs: dict[str, dict[str, Any]] = {}
        self.runtimes = {"svip": RUNTIME}
        self.created: list[str] = []
        self.secrets = {"svip-mlflow"}
        self.kept: set[str] = set()
        """Names of jobs that nobody may delete."""
        self.cut_log_after = 0
        """Lines after which the first connection to a log is cut; 0: it is not."""
        self._logs: dict[str, list[str]] = {}
        self._ended: dict[str, threading.Event] = {}
        self._lock = threading.Condition()

    def create(self, job: dict[str, Any]) -> None:
        name = job["metadata"]["name"]
        job["metadata"] |= {"namespace": NAMESPACE, "creationTimestamp": TIME}
        self.jobs[name], self._logs[name], self._ended[name] = job, [], threading.Event()
        self.created.append(name)
        threading.Thread(target=self._work, args=(job,), daemon=True).start()

    def end(self, name: str, condition: str) -> None:
        state = {"type": condition, "status": "True", "reason": "Ended", "message": "", "lastTransitionTime": TIME}
        if name in self.jobs:  # it may have been deleted
            self.jobs[name]["status"] = {"conditions": [state]}

    def _work(self, job: dict[str, Any]) -> None:
        name = job["metadata"]["name"]
        try:
            for line in self.run(job):
                with self._lock:
                    self._logs[name].append(line)
                    self._lock.notify_all()
            self.end(name, "Complete")
        except Exception:
            self.end(name, "Failed")
        finally:
            self._ended[name].set()
            with self._lock:
                self._lock.notify_all()

    def log(self, name: str) -> Iterator[str]:
        """All lines from the first on, until the node ends."""
        number = 0
        while True:
            with self._lock:
                lines = self._logs[name][number:]
                if not lines and not self._ended[name].is_set():
                    self._lock.wait(1)
            yield from lines
            number += len(lines)
            if not lines and self._ended[name].is_set():
                return

    def pods(self, name: str) -> dict[str, Any]:
        job = self.jobs.get(name)
        nodes = job["spec"]["trainer"]["numNodes"] if job else 0
        return {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": [_pod(name, i) for i in range(nodes)]}


def _pod(job: str, index: int) -> dict[str, Any]:
    labels = {
        "jobset.sigs.k8s.io/jobset-name": job,
        "jobset.sigs.k8s.io/replicatedjob-name": "node",
        "batch.kubernetes.io/job-completion-index": str(index),
    }
    return {
        "metadata": {"name": f"{job}-node-0-{index}-abcde", "labels": labels, "creationTimestamp": TIME},
        "spec": {"containers": [{"name": "node", "image": "svip"}]},
        "status": {"phase": "Running"},
    }


@contextmanager
def kubernetes(folder: Path, run: Node) -> Iterator[Cluster]:
    """Serve such a cluster; its kubeconfig is ``folder``/kubeconfig."""
    cluster = Cluster(run)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def missing(self) -> None:
            self.answer(404, {"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404})

        def do_GET(self) -> None:
            address = urlsplit(self.path)
            path, query = address.path, {key: values[0] for key, values in parse_qs(address.query).items()}
            kind, _, name = path.removeprefix(f"{TRAINER}/").partition("/")
            if kind == "trainingruntimes" and name in cluster.runtimes:
                self.answer(200, cluster.runtimes[name])
            elif kind == "trainjobs" and name in cluster.jobs:
                self.answer(200, cluster.jobs[name])
            elif kind == "trainjobs" and not name:
                label, _, value = query["labelSelector"].partition("=")
                chosen = [job for job in cluster.jobs.values() if job["metadata"]["labels"].get(label) == value]
                self.answer(200, {"kind": "TrainJobList", "metadata": {}, "items": chosen})
            elif path in {f"{CORE}/secrets/{secret}" for secret in cluster.secrets}:
                self.answer(200, {"kind": "Secret", "apiVersion": "v1", "data": {}})
            elif path == f"{CORE}/pods":
                selected = query["labelSelector"].partition("jobset-name=")[2].partition(",")[0]
                self.answer(200, cluster.pods(selected))
            elif path.startswith(f"{CORE}/pods/") and path.endswith("/log"):
                self.stream(path.removeprefix(f"{CORE}/pods/").partition("-node-")[0])
            else:
                self.missing()

        def stream(self, job: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for number, line in enumerate(cluster.log(job)):
                if cluster.cut_log_after and number == cluster.cut_log_after:
                    cluster.cut_log_after = 0
                    self.close_connection = True
                    return  # without the last chunk
                data = f"{line}\n".encode()
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")

        def do_POST(self) -> None:
            job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if job["metadata"]["name"] in cluster.jobs:
                self.answer(409, {"kind": "Status", "status": "Failure", "reason": "AlreadyExists", "code": 409})
                return
            cluster.create(job)
            self.answer(201, job)

        def do_PATCH(self) -> None:
            change = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            job = cluster.jobs.get(self.path.rpartition("/")[2])
            if self.headers["Content-Type"] != "application/merge-patch+json" or list(change) != ["metadata"]:
                self.answer(415, {"kind": "Status", "status": "Failure", "reason": "UnsupportedMediaType", "code": 415})
            elif job is None:
                self.missing()
            else:
                job["metadata"]["labels"] |= change["metadata"]["labels"]
                self.answer(200, job)

        def do_DELETE(self) -> None:
            name = self.path.rpartition("/")[2]
            if name in cluster.kept:
                self.answer(403, {"kind": "Status", "status": "Failure", "reason": "Forbidden", "code": 403})
            elif cluster.jobs.pop(name, None) is None:
                self.missing()
            else:
                self.answer(200, {"kind": "Status", "status": "Success"})

        def log_message(self, *_: Any) -> None:
            """Keep quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "fake",
        "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake", "namespace": NAMESPACE}}],
        "clusters": [{"name": "fake", "cluster": {"server": f"http://127.0.0.1:{server.server_address[1]}"}}],
        "users": [{"name": "fake", "user": {}}],
    }
    (folder / "kubeconfig").write_text(yaml.safe_dump(config))
    try:
        yield cluster
    finally:
        server.shutdown()
        server.server_close()
