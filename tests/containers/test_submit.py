"""``svip pipeline submit --wait`` against a server on loopback that runs each step in a container."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_user import OPTIONS, TRACKED, Cluster

pytestmark = [pytest.mark.docker, pytest.mark.slow]


@pytest.fixture
def cluster(engine: str, image: str, tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path, runner="docker")
    made.server.environment |= {"DOCKER_HOST": engine, "SVIP_IMAGE": image}
    (tmp_path / "cluster.yaml").write_text(f"image: {image}\n{TRACKED}")
    yield made
    made.server.end()


def test_success_is_reported_and_every_task_left_its_outputs(cluster: Cluster) -> None:
    done = cluster.svip("submit", "experiment", "--cluster", "cluster.yaml", "--wait", *OPTIONS)
    assert done.code == 0, done.out + done.err + "\n".join(cluster.last.log())
    assert done.out.endswith(f"run {cluster.last.id} succeeded\n")
    (folder,) = (path for path in (cluster.last.folder / "artifacts").iterdir() if path.is_dir())
    outputs = {
        "data-settings": "executor_output.json",
        "prepare-data": "bundle/bundle.json",
        "embed-attributes": "words",
        "train": "checkpoint/model.safetensors",
        "evaluate": "results",
        "report": "page",
    }
    for step, output in outputs.items():
        assert f" {step}: succeeded after " in done.out
        assert (folder / step / output).stat().st_size > 0, step
    numbers = json.loads((folder / "evaluate" / "metrics").read_text())["protocols"]["validation"]
    assert f"{numbers['H']:.1f}" in (folder / "evaluate" / "results").read_text()
    (parent,) = (run for run in cluster.mlflow() if "mlflow.parentRunId" not in run.data.tags)
    assert (parent.data.tags["pipeline"], parent.info.status) == (f"experiment-{cluster.last.id}", "FINISHED")


def test_failure_is_reported_with_its_step(cluster: Cluster) -> None:
    changes = ["data.dataset=cub", "data.root=nowhere"]
    done = cluster.svip("submit", "experiment", "--cluster", "cluster.yaml", "--wait", *OPTIONS, *changes)
    assert done.code == 1
    assert f"error: run {cluster.last.id} failed in prepare-data: " in done.err
    assert " train: " not in done.out
    (parent,) = cluster.mlflow()
    assert parent.info.status == "FAILED"
