"""The ablation pipeline: what it compiles to, and that it runs."""

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
from tiny_model import TINY

from components import IMAGE
from pipelines import catalog, local

OPTIONS = [*TINY, "evaluation.eszsl=false"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("compiled") / "ablation.yaml"
    Compiler().compile(catalog.find_pipeline("ablation"), str(path))
    return yaml.safe_load(path.read_text())


def test_its_parameters_are_typed_and_the_default_is_small(compiled: dict[str, Any]) -> None:
    parameters = compiled["root"]["inputDefinitions"]["parameters"]
    assert {name: (spec["parameterType"], spec["defaultValue"]) for name, spec in parameters.items()} == {
        "preset": ("STRING", "smoke"),
        "overrides": ("LIST", []),
        "variants": ("LIST", ["baseline", "full"]),
        "seeds": ("NUMBER_INTEGER", 1),
        "continues": ("STRING", ""),
    }


def test_runs_are_a_loop_of_train_and_evaluate_whose_evaluations_make_the_table(compiled: dict[str, Any]) -> None:
    outer = compiled["root"]["dag"]["tasks"]
    assert outer["close-run"]["triggerPolicy"] == {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"}
    steps = compiled["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    assert {name: set(task.get("dependentTasks", [])) for name, task in steps.items()} == {
        "plan-ablation": set(),
        "open-run": {"plan-ablation"},
        "data-settings": {"open-run"},
        "prepare-data": {"data-settings"},
        "embed-attributes": {"data-settings", "prepare-data"},
        "for-loop-2": {"plan-ablation", "open-run", "prepare-data", "embed-attributes"},
        "ablate-table": {"plan-ablation", "open-run", "for-loop-2"},
    }
    loop = compiled["components"]["comp-for-loop-2"]["dag"]["tasks"]
    assert set(loop) == {"train", "evaluate"}
    (item,) = {json.dumps(task["inputs"]["parameters"]["run"]) for task in loop.values()}
    assert json.loads(item) == {"componentInputParameter": steps["for-loop-2"]["parameterIterator"]["itemInput"]}
    evaluations = compiled["components"]["comp-ablate-table"]["inputDefinitions"]["artifacts"]["evaluations"]
    assert evaluations["isArtifactList"]


def test_its_components_only_call_their_steps_in_the_prebuilt_image(compiled: dict[str, Any]) -> None:
    executors = compiled["deploymentSpec"]["executors"]
    assert {name.removeprefix("exec-") for name in executors} == {
        *("plan-ablation", "open-run", "data-settings", "prepare-data", "embed-attributes", "train", "evaluate"),
        *("ablate-table", "close-run"),
    }
    for name, executor in executors.items():
        source = executor["container"]["command"][-1]
        assert executor["container"]["image"] == IMAGE
        assert source.count("steps.") == 1
        assert f"steps.{name.removeprefix('exec-').replace('-', '_')}(" in source


def svip(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": f"sqlite:///{cwd}/mlflow.db"}
    command = [sys.executable, "-m", "svip.cli", "pipeline", "run", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_two_variants_with_two_seeds_make_a_table_under_one_mlflow_run(tmp_path: Path) -> None:
    done = svip(["ablation", "--variants", "no_jsd,full", "--seeds", "2", "--out", "out", *OPTIONS], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    table = pd.read_csv(tmp_path / "out" / "ablation.csv").set_index("variant")
    assert table["seeds"].to_dict() == {"no_jsd": 2, "full": 2}
    assert "SVIP w/o JSD (Eq. 13)" in done.stdout
    assert "Looking for component" not in done.stdout
    assert "select epoch 1: loss" in done.stdout

    reached: dict[float, list[float]] = {}
    for path in (tmp_path / "out" / "kfp").glob("*/*/evaluate/evaluation/metrics.json"):
        metrics = json.loads(path.read_text())
        reached.setdefault(metrics["settings"]["loss.lambda1"], []).append(metrics["protocols"]["validation"]["T1"])
    assert {weight: len(values) for weight, values in reached.items()} == {0.0: 2, 1.0: 2}
    assert table.loc["no_jsd", "T1"] == pytest.approx(sum(reached[0.0]) / 2)
    assert table.loc["full", "T1"] == pytest.approx(sum(reached[1.0]) / 2)

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("svip/synthetic")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(runs) == 1 + 2 * 4
    assert not parent.data.metrics, "none of the runs is the whole's result"
    assert "ablation.html" in {file.path for file in client.list_artifacts(parent.info.run_id)}


def test_an_option_of_another_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(catalog.PipelineError, match="pipeline experiment has no seeds; leave out --seeds"):
        local.run("experiment", "smoke", [], tmp_path / "out", seeds=2)
    assert not (tmp_path / "out").exists()
