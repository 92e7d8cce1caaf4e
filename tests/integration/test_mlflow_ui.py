"""What a person sees of tracked runs in MLflow's pages: a real server, real runs, a real browser without a screen."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from small_training import ATTRIBUTES, IMAGE_ROLES, TINY, write_bundle

from svip import steps
from svip.semantics.vectors import Embedding, write_embedding

pytestmark = pytest.mark.slow

EXPERIMENT = "svip/synthetic"
CHANGED = (["optim.lr=1e-5"], ["optim.lr=1e-2", "model.selected_groups=4"], ["train.seed=1", "optim.lr=1e-5"])
"""What the three pipeline runs change; besides, all of them are tiny."""
COMMON = [*TINY, "optim.epochs=2"]
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1700,1000",
)
PATIENCE = 120
"""Seconds to wait for a page; on a busy machine its scripts take many."""


@dataclass
class Runs:
    """A server, and the runs in its store."""

    address: str
    client: MlflowClient
    experiment: str
    parents: list[str]

    def child(self, parent: str, step: str) -> Any:
        (run,) = self.client.search_runs(
            [self.experiment], f"tags.`mlflow.parentRunId` = '{parent}' and tags.step = '{step}'"
        )
        return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Three small pipeline runs, made by the steps themselves, and a server that shows them."""
    folder = tmp_path_factory.mktemp("ui")
    uri = f"sqlite:///{folder}/mlflow.db"
    bundle = write_bundle(folder / "bundle", IMAGE_ROLES)
    vectors = np.random.default_rng(1).normal(size=(ATTRIBUTES, 7)).astype(np.float32)
    write_embedding(Embedding(vectors, bundle.attribute_names, {}), folder / "words")
    parents = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        for number, changed in enumerate(CHANGED):
            out, overrides = folder / str(number), [*changed, *COMMON]
            parent = steps.open_run(f"experiment-{number}", "smoke", overrides)
            inputs, checkpoint, tested = (str(bundle.path), str(folder / "words")), str(out / "run"), str(out / "test")
            steps.train(*inputs, checkpoint, "smoke", overrides, parent, log_model=number == 0)
            steps.evaluate(checkpoint, inputs[0], tested, parent)
            steps.report(tested, checkpoint, inputs[0], str(out / "report"), parent)
            steps.close_run(parent, "FINISHED")
            parents.append(parent)
    with served(uri, folder / "server.log") as address:
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        assert experiment is not None
        yield Runs(address, client, experiment.experiment_id, parents)
