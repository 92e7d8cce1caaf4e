"""``svip pipeline run --runner docker``: a pipeline in containers, and what is left when it fails or is stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from docker import DockerClient
from mlflow import MlflowClient
from mlflow.entities import Run
from tiny_model import TINY

from pipelines.containers import LABEL
from svip.data.bundle import read_bundle

pytestmark = [pytest.mark.docker, pytest.mark.slow]
OPTIONS = [*TINY, "train.workers=1"]


def command(arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", "svip.cli", "pipeline", "run", "experiment", "--runner", "docker", *arguments]


@pytest.fixture
def settings(engine: str, image: str, tmp_path: Path) -> dict[str, str]:
    """The environment of a run in ``tmp_path``."""
    own = {"DOCKER_HOST": engine, "SVIP_IMAGE": image, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    return {**os.environ, **own, "OMP_NUM_THREADS": "1"}


def svip(arguments: list[str], cwd: Path, settings: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(arguments), cwd=cwd, env=settings, capture_output=True, text=True, check=False)


def tracked(folder: Path) -> tuple[Run, list[Run]]:
    """The run of the pipeline, and those of its steps."""
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("svip/synthetic")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    return parent, [run for run in runs if run is not parent]


def left_containers(docker_client: DockerClient) -> list[str]:
    return [container.name for container in docker_client.containers.list(all=True, filters={"label": LABEL})]


def test_the_whole_experiment_leaves_the_outputs_of_every_step(
    docker_client: DockerClient, settings: dict[str, str], tmp_path: Path
) -> None:
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    work = tmp_path / "my work"
    work.mkdir()
    settings["MLFLOW_TRACKING_URI"] = f"sqlite:///{outside}/mlflow.db"
    done = svip(["--out", "out", *OPTIONS], work, settings)
    assert done.returncode == 0, done.stdout + done.stderr
    out = work / "out"
    (folder,) = (out / "kfp").iterdir()

    def result(step: str) -> dict[str, object]:
        return dict(json.loads((folder / step / "executor_output.json").read_text()))

    parent, children = tracked(outside)
    assert result("open-run")["parameterValues"] == {"Output": parent.info.run_id}
    bundle = read_bundle(folder / "prepare-data" / "bundle")
    assert len(bundle.classes) == 60
    words = json.loads((folder / "embed-attributes" / "vectors" / "report.json").read_text())
    assert len(words["attributes"]) == len(bundle.attribute_names)
    model = json.loads((folder / "train" / "checkpoint" / "model.json").read_text())
    assert model["bundle_sha256"] == bundle.sha256
    numbers = json.loads((folder / "evaluate" / "evaluation" / "metrics.json").read_text())["protocols"]["validation"]
    (metrics,) = result("evaluate")["artifacts"]["metrics"]["artifacts"]  # type: ignore[index]
    assert metrics["metadata"]["validation/H"] == pytest.approx(numbers["H"])
    assert (folder / "report" / "page").read_text() == (folder / "report" / "files" / "report.html").read_text()
    assert (folder / "close-run").exists()

    assert f"{numbers['H']:.1f}" in done.stdout
    assert json.loads((out / "metrics.json").read_text())["protocols"]["validation"] == numbers
    assert {run.info.status for run in (parent, *children)} == {"FINISHED"}
    assert {run.data.tags["git_sha"] for run in children} == {"0123abc"}, "the code of the image"
    assert all(run.data.tags["image_digest"].startswith("sha256:") for run in children)
    assert {path.stat().st_uid for path in folder.rglob("*")} == {os.getuid()}
    assert not (out / "work").exists()
    assert not left_containers(docker_client)


def test_a_failing_step_is_named_with_its_log(
    docker_client: DockerClient, settings: dict[str, str], tmp_path: Path
) -> None:
    done = svip(["--out", "out", "semantics.vectors=missing.txt", *OPTIONS], tmp_path, settings)
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert "step 'embed-attributes' failed" in said
    assert "missing.txt" in said.split("step 'embed-attributes' failed")[1]
    assert "== train" not in done.stdout
    assert tracked(tmp_path)[0].info.status == "FAILED"
    assert not left_containers(docker_client)


def test_a_stopped_pipeline_stops_its_container_and_marks_its_run_killed(
    docker_client: DockerClient, settings: dict[str, str], tmp_path: Path
) -> None:
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            command(["--out", "out", *OPTIONS]), cwd=tmp_path, env=settings, stdout=said, stderr=said
        )
        try:
            wait_for(lambda: "== prepare-data" in (tmp_path / "said").read_text())
            wait_for(lambda: bool(left_containers(docker_client)))
            process.send_signal(signal.SIGTERM)
            assert process.wait(300) != 0
        finally:
            process.kill()
    assert not left_containers(docker_client)
    assert tracked(tmp_path)[0].info.status == "KILLED"
    assert "stopped. The same command starts it again." in (tmp_path / "said").read_text()


def wait_for(condition: Callable[[], bool], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.2)


def test_an_image_that_is_not_there_is_named_before_anything_starts(settings: dict[str, str], tmp_path: Path) -> None:
    done = svip(["--out", "out"], tmp_path, {**settings, "SVIP_IMAGE": "svip:nowhere"})
    assert done.returncode == 1
    assert "image svip:nowhere is not there: build it (make image)" in " ".join(done.stderr.split())
    assert not (tmp_path / "out" / "kfp").exists() or not any((tmp_path / "out" / "kfp").iterdir())
