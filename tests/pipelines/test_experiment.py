"""The experiment pipeline: what it compiles to, and that it runs."""

from __future__ import annotations

import ast
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from kfp.compiler import Compiler
from mlflow import MlflowClient
from safetensors.numpy import save_file
from tiny_model import TINY

from components import IMAGE
from pipelines import catalog
from pipelines.cluster_cli import compile_command
from pipelines.steplog import StepLog

STEPS = ("open-run", "data-settings", "prepare-data", "embed-attributes", "train", "evaluate", "report", "close-run")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("compiled") / "experiment.yaml"
    Compiler().compile(catalog.find_pipeline("experiment"), str(path))
    return yaml.safe_load(path.read_text())


def source_of(compiled: dict[str, Any], step: str) -> str:
    return compiled["deploymentSpec"]["executors"][f"exec-{step}"]["container"]["command"][-1]


def test_it_takes_a_preset_overrides_and_the_run_that_it_continues(compiled: dict[str, Any]) -> None:
    parameters = compiled["root"]["inputDefinitions"]["parameters"]
    assert {name: spec["parameterType"] for name, spec in parameters.items()} == {
        "preset": "STRING",
        "overrides": "LIST",
        "continues": "STRING",
    }


def test_the_steps_run_in_order_and_close_run_always(compiled: dict[str, Any]) -> None:
    outer = compiled["root"]["dag"]["tasks"]
    assert outer["close-run"]["triggerPolicy"] == {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"}
    assert outer["close-run"]["dependentTasks"] == ["exit-handler-1"]
    inner = compiled["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    assert {name: set(task.get("dependentTasks", [])) for name, task in inner.items()} == {
        "open-run": set(),
        "data-settings": {"open-run"},
        "prepare-data": {"data-settings"},
        "embed-attributes": {"data-settings", "prepare-data"},
        "train": {"open-run", "prepare-data", "embed-attributes"},
        "evaluate": {"open-run", "prepare-data", "train"},
        "report": {"open-run", "prepare-data", "train", "evaluate"},
    }


def test_a_run_id_is_never_taken_from_a_cache(compiled: dict[str, Any]) -> None:
    tasks = {**compiled["root"]["dag"]["tasks"], **compiled["components"]["comp-exit-handler-1"]["dag"]["tasks"]}
    uncached = {name for name, task in tasks.items() if "cachingOptions" in task and not task["cachingOptions"]}
    assert uncached == {"open-run", "data-settings", "close-run"}


def test_open_run_and_close_run_name_the_run_alike(compiled: dict[str, Any]) -> None:
    tasks = {**compiled["root"]["dag"]["tasks"], **compiled["components"]["comp-exit-handler-1"]["dag"]["tasks"]}
    names = [
        [tasks[step]["inputs"]["parameters"][key]["runtimeValue"]["constant"] for key in ("pipeline", "job")]
        for step in ("open-run", "close-run")
    ]
    assert names == [["experiment", "{{$.pipeline_job_uuid}}"]] * 2


@pytest.mark.parametrize("step", STEPS)
def test_a_component_only_calls_its_step_in_the_prebuilt_image(compiled: dict[str, Any], step: str) -> None:
    container = compiled["deploymentSpec"]["executors"][f"exec-{step}"]["container"]
    assert container["image"] == IMAGE
    assert "pip install" not in " ".join(container["command"])
    calls = [
        node.func.attr
        for node in ast.walk(ast.parse(source_of(compiled, step)))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "steps"
    ]
    assert calls == [step.replace("-", "_")]


def test_artifacts_are_typed(compiled: dict[str, Any]) -> None:
    types = {
        (step, name): artifact["artifactType"]["schemaTitle"]
        for step in STEPS
        for name, artifact in compiled["components"][f"comp-{step}"]
        .get("outputDefinitions", {})
        .get("artifacts", {})
        .items()
    }
    assert types == {
        ("prepare-data", "bundle"): "system.Dataset",
        ("embed-attributes", "vectors"): "system.Dataset",
        ("embed-attributes", "words"): "system.Markdown",
        ("train", "checkpoint"): "system.Model",
        ("train", "metrics"): "system.Metrics",
        ("evaluate", "evaluation"): "system.Artifact",
        ("evaluate", "metrics"): "system.Metrics",
        ("evaluate", "results"): "system.Markdown",
        ("report", "files"): "system.Artifact",
        ("report", "page"): "system.HTML",
    }
    assert {step for step, _ in types} == {source.split("/")[0] for source in catalog.RESULTS["experiment"].values()}


def test_every_component_has_a_readme_with_its_inputs_and_outputs() -> None:
    folders = [path.parent for path in (Path(__file__).parents[2] / "components").glob("*/component.py")]
    others = {"plan-ablation", "ablate-table", "plan-tuning", "tune", "tuning-report"}
    assert {folder.name.replace("_", "-") for folder in folders} == {*STEPS, *others}
    part_of = {"ablate_table": "ablate", "plan_tuning": "tune", "tuning_report": "tune"}
    for folder in folders:
        readme = (folder / "README.md").read_text()
        step = folder.name
        in_python = ("open_run", "close_run", "data_settings", "plan_ablation")
        command = part_of.get(step, step.replace("_", "-"))
        called = f"steps.{step}(" if step in in_python else f"\nsvip {command} "
        for part in ("## Inputs", "## Outputs", called):
            assert part in readme, f"{folder.name}/README.md has no {part!r}"


def test_the_terminal_shows_the_steps_and_their_output_without_kfps_chatter() -> None:
    terminal, file = io.StringIO(), io.StringIO()
    log = StepLog(terminal, file)
    said = (
        "04:45:18.052 - INFO - Executing task \x1b[96m'open-run'\x1b[0m\n"
        "04:45:18.052 - INFO - Task \x1b[96m'open-run'\x1b[0m finished with status \x1b[92mSUCCESS\x1b[0m\n"
        "04:45:18.052 - INFO - Task \x1b[96m'open-run'\x1b[0m outputs:\n"
        "    Output: 'experiment-41049066'\n"
        "04:45:19.052 - INFO - Executing task \x1b[96m'train'\x1b[0m\n"
        "04:45:19.052 - INFO - Streamed logs:\n\n"
        "    [KFP Executor 2026-11-24 04:45:19,109 INFO]: Got executor_input:\n"
        '    {\n        "inputs": {\n            "preset": "smoke"\n        }\n    }\n'
        "    [KFP Executor 2026-11-24 04:45:20,109 INFO]: epoch 1/20  H 12.3\n"
        "    select epoch 2/20:   0%|          | 0/33 [00:00<?, ?it/s]\n"
        "    ValueError: loss is not finite\n"
        "04:45:22.087 - ERROR - Task \x1b[96m'train'\x1b[0m finished with status \x1b[91mFAILURE\x1b[0m\n"
        "----\n"
        "04:45:23.052 - INFO - Executing task \x1b[96m'close-run'\x1b[0m\n"
    )
    for character in said:  # print() writes in pieces
        log.write(character)
    assert (
        terminal.getvalue()
        == "== open-run\n== train\n   epoch 1/20  H 12.3\n   ValueError: loss is not finite\n== close-run\n"
    )
    assert (log.failed, log.failure) == ("train", ["epoch 1/20  H 12.3", "ValueError: loss is not finite"])
    assert '"preset": "smoke"' in file.getvalue()


def svip(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": f"sqlite:///{cwd}/mlflow.db"}
    command = [sys.executable, "-m", "svip.cli", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def odd_folder(tmp_path: Path) -> Path:
    """A working folder whose name has what breaks kfp's own handling of commands."""
    folder = tmp_path / "my python3 work"
    folder.mkdir()
    return folder


@pytest.mark.slow
def test_a_small_run_leaves_a_report_numbers_a_checkpoint_and_closed_runs(odd_folder: Path) -> None:
    done = svip(["pipeline", "run", "experiment", "--preset", "smoke", "--out", "out", *TINY], odd_folder)
    assert done.returncode == 0, done.stdout + done.stderr
    out = odd_folder / "out"
    numbers = json.loads((out / "metrics.json").read_text())["protocols"]["validation"]
    assert f"{numbers['H']:.1f}" in done.stdout
    assert "out/report.html" in done.stdout
    assert "[KFP Executor" not in done.stdout
    assert (out / "report.html").read_text().lstrip().lower().startswith("<!doctype html")
    assert (out / "checkpoint" / "model.safetensors").exists()
    assert not os.path.isabs(os.readlink(out / "checkpoint")), "the folder can be moved"

    client = MlflowClient(f"sqlite:///{odd_folder}/mlflow.db")
    experiment = client.get_experiment_by_name("svip/synthetic")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 1
    children = {run.info.run_name: run for run in runs if run not in parents}
    changed = "embed_dim=32 depth=1 num_heads=2 hidden=8 epochs=1"
    assert parents[0].info.run_name == f"experiment smoke {changed}"
    assert set(children) == {f"train-svip {changed}", f"evaluate-svip {changed}"}
    assert {run.data.tags["mlflow.parentRunId"] for run in children.values()} == {parents[0].info.run_id}


@pytest.mark.slow
def test_a_failing_step_is_named_and_its_runs_are_marked_failed(odd_folder: Path) -> None:
    save_file({"of.another.model": np.zeros(1, np.float32)}, odd_folder / "others.safetensors")
    arguments = ["pipeline", "run", "experiment", "--out", "out", *TINY, "model.weights=others.safetensors"]
    done = svip(arguments, odd_folder)
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert "step 'train' failed" in said
    assert "others.safetensors" in said.split("step 'train' failed")[1]
    assert not (odd_folder / "out" / "report.html").exists()
    client = MlflowClient(f"sqlite:///{odd_folder}/mlflow.db")
    experiment = client.get_experiment_by_name("svip/synthetic")
    assert experiment is not None
    parents = [
        run for run in client.search_runs([experiment.experiment_id]) if "mlflow.parentRunId" not in run.data.tags
    ]
    assert [run.info.status for run in parents] == ["FAILED"]


@pytest.mark.slow
def test_a_mistyped_override_is_refused_before_anything_starts(odd_folder: Path) -> None:
    done = svip(["pipeline", "run", "experiment", "--out", "out", "optim.epoch=1"], odd_folder)
    assert done.returncode == 1
    assert "did you mean 'optim.epochs'?" in done.stdout + done.stderr
    assert not (odd_folder / "out").exists()


def test_compile_writes_one_file_and_says_what_is_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "experiment.yaml"
    compile_command("experiment", out)
    assert [path.name for path in out.parent.iterdir()] == ["experiment.yaml"]
    what, steps = capsys.readouterr().out.splitlines()
    assert what == f"{out}: pipeline experiment, image {IMAGE}"
    assert steps == (
        "steps: open-run, data-settings, prepare-data, embed-attributes, train, evaluate, report, close-run"
    )
    shutil.rmtree(tmp_path / "new")
