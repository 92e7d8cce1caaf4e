"""svip's commands for a cluster, as a person gives them, and a server on loopback that they reach."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfp_server import StubRun, StubServer
from mlflow import MlflowClient
from tiny_model import TINY

OPTIONS = [*TINY, "evaluation.eszsl=false"]


TRACKED = "steps: {default: {secrets: {svip-mlflow: [MLFLOW_TRACKING_URI]}}}\n"
"""The least that a cluster file has to say; here the steps have the variable from the server's environment."""


@dataclass
class Done:
    """A command that ended."""

    code: int
    out: str
    err: str


class Cluster:
    """A server, and svip's commands as a person gives them to it, with a ``cluster.yaml`` in ``folder``."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = folder
        (folder / "cluster.yaml").write_text(TRACKED)
        self.store = f"sqlite:///{folder}/mlflow.db"
        self.server = StubServer(folder / "kubeflow", **options)
        self.server.environment = {"MLFLOW_TRACKING_URI": self.store, "OMP_NUM_THREADS": "1"}

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        ours = {"KF_PIPELINES_ENDPOINT": self.server.host, "SVIP_POLL_SECONDS": "0.2", "COLUMNS": "120"}
        return subprocess.Popen(
            [sys.executable, "-m", "svip.cli", "pipeline", *arguments],
            env={**os.environ, **ours, **environment},
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def svip(self, *arguments: str, **environment: str) -> Done:
        return ended(self.start(*arguments, **environment))

    @property
    def last(self) -> StubRun:
        return list(self.server.runs.values())[-1]

    def mlflow(self) -> list[Any]:
        client = MlflowClient(self.store)
        return list(client.search_runs([one.experiment_id for one in client.search_experiments()]))


def ended(process: subprocess.Popen[str]) -> Done:
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return Done(process.returncode, out, err)


def until(happens: Callable[[], bool], seconds: float = 300) -> None:
    ends = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.1)
