"""The tuning pipeline: what it compiles to, and that it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from kfp.compiler import Compiler
from mlflow import MlflowClient

from pipelines import catalog
from svip.config import load_config

TINY = [
    "model.backbone_args={patch_size: 16, embed_dim: 16, depth: 1, num_heads: 2}",
    "model.selected_groups=2",
    "model.hidden=8",
    "optim.epochs=1",
    "evaluation.eszsl=false",
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("compiled") / "tuning.yaml"
    Compiler().compile(catalog.find_pipeline("tuning"), str(path))
    return dict(yaml.safe_load(path.read_text()))


def test_workers_are_a_loop_on_one_study_and_what_is_best_is_trained_and_tested_once(compiled: dict[str, Any]) -> None:
    steps = compiled["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    after = {name: set(task.get("dependentTasks", [])) for name, task in steps.items()}
    assert {"prepare-data", "embed-attributes", "open-run"} <= after["plan-tuning"]
    assert {"plan-tuning", "prepare-data", "embed-attributes"} <= after["for-loop-2"]
    assert {"plan-tuning", "for-loop-2"} <= after["tuning-report"]
    assert "tuning-report" in after["train"] and "train" in after["evaluate"]
    assert set(compiled["components"]["comp-for-loop-2"]["dag"]["tasks"]) == {"tune"}
    best = steps["train"]["inputs"]["parameters"]["overrides"]["taskOutputParameter"]
    assert best == {"outputParameterKey": "Output", "producerTask": "tuning-report"}


def test_what_a_study_does_is_never_taken_from_a_cache(compiled: dict[str, Any]) -> None:
    steps = compiled["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    tune = compiled["components"]["comp-for-loop-2"]["dag"]["tasks"]["tune"]
    for task in (steps["plan-tuning"], tune, steps["tuning-report"]):
        assert not task["cachingOptions"]


@pytest.mark.slow
def test_two_workers_tune_and_the_best_values_are_trained_and_tested_under_one_run(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    command = [sys.executable, "-m", "svip.cli", "pipeline", "run", "tuning", "--trials", "3", "--workers", "2"]
    done = subprocess.run(
        [*command, "--out", "out", *TINY], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "out"
    trials = pd.read_csv(out / "trials.csv")
    assert sorted(trials[trials["state"].isin(["complete", "pruned"])]["slot"]) == [0, 1, 2]
    best = trials.loc[trials[trials["state"] == "complete"]["H"].idxmax()]
    trained = load_config(str(out / "checkpoint" / "config.yaml"))
    assert trained.optim.lr == best["optim.lr"] == load_config(str(out / "best.yaml")).optim.lr
    assert json.loads((out / "checkpoint" / "model.json").read_text())["validation"]["H"] == pytest.approx(best["H"])
    assert (out / "metrics.json").exists() and "Tuning:" in done.stdout

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("svip/synthetic")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    kinds = [run.data.tags["step"] for run in runs if run is not parent]
    assert sorted(kinds) == ["evaluate", "train", "trial", "trial", "trial"]
    assert parent.data.metrics["best/val/H"] == pytest.approx(best["H"])
    assert parent.data.tags["best.trial"] == str(best["trial"]) and "optim.lr=" in parent.data.tags["best.overrides"]
    assert {"tuning.html", "report.html"} <= {file.path for file in client.list_artifacts(parent.info.run_id)}
