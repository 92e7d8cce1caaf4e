"""Training on several nodes: the TrainJob that is asked for, and what becomes of it, over HTTP by the SDK's client."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_kubernetes import NAMESPACE, kubernetes
from small_training import IMAGE_ROLES, write_bundle, write_vectors

from benchmarks.s3server import KEYS
from svip import trainjob
from svip.config import ConfigError, load_config
from svip.data import s3
from svip.data.bundle import Bundle
from svip.data.bundle_cache import open_bundle
from svip.semantics.vectors import open_embedding
from svip.steps import close_run
from svip.tracking import TrackingError
from svip.training.work import Place

pytest.importorskip("kubeflow", reason="needs the extra `cluster`")
PLACE = "s3://team/work/svip-1234"
SIZES = ("SVIP_NODE_CPU", "SVIP_NODE_MEMORY", "SVIP_GPU_TYPE")
OTHERS = ("SVIP_WORK", "SVIP_IMAGE", "SVIP_TRAINING_RUNTIME", "SVIP_NODE_GPUS", "SVIP_PIPELINE_RUN")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (*trainjob.PASSED_ON, *OTHERS, *SIZES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setenv("SVIP_NAMESPACE", NAMESPACE)
    monkeypatch.setattr(trainjob, "PAUSE", 0.02)


@pytest.fixture(autouse=True)
def finished(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the place holds a finished training, for tests without a bucket."""
    answer = [True]
    monkeypatch.setattr(Place, "finished", lambda place: answer[0])
    return answer


def training(**changes: Any) -> trainjob.Training:
    arguments = ["--preset=smoke", "--parent-run-id=abc", "--", "optim.lr=1e-5"]
    whole = trainjob.Training(
        "s3://team/bundle", "s3://team/words", PLACE, arguments, load_config("smoke", ["optim.lr=1e-5"])
    )
    return dataclasses.replace(whole, **changes)


def test_two_nodes_of_four_gpus_are_a_valid_job_that_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

    secrets = {key: f"hidden-{key}" for keys in trainjob.SECRETS.values() for key in keys}
    for name, value in {**secrets, "AWS_ENDPOINT_URL": "http://store:8333", "SVIP_IMAGE": "registry/svip:1"}.items():
        monkeypatch.setenv(name, value)
    job = trainjob.render(training(), nodes=2, processes=4).to_dict()
    assert TrainerV1alpha1TrainJob.from_dict(job).to_dict() == job, "its own model reads it, and leaves nothing out"
    assert "hidden" not in str(job)
    assert job["kind"] == "TrainJob" and job["spec"]["runtimeRef"] == {"kind": "ClusterTrainingRuntime", "name": "svip"}
    trainer = job["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"], trainer["image"]) == (2, 4, "registry/svip:1")
    assert trainer["resourcesPerNode"] == {"limits": {"nvidia.com/gpu": 4}, "requests": {"nvidia.com/gpu": 4}}
    assert trainer["command"] == [
        *("torchrun", "-m", "svip.cli", "train", "--bundle=s3://team/bundle", "--vectors=s3://team/words"),
        *(f"--out={PLACE}", "--preset=smoke", "--parent-run-id=abc", "--", "optim.lr=1e-5"),
    ]
    env = {entry["name"]: entry for entry in trainer["env"]}
    assert env["AWS_ENDPOINT_URL"] == {"name": "AWS_ENDPOINT_URL", "value": "http://store:8333"}
    assert env["SVIP_WORK"] == {"name": "SVIP_WORK", "value": ""}
    for secret, keys in trainjob.SECRETS.items():
        for key in keys:
            reference = {"name": secret, "key": key, "optional": True}
            assert env[key] == {"name": key, "valueFrom": {"secretKeyRef": reference}}


def test_the_nodes_track_where_this_process_does_or_where_the_secret_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def address() -> dict[str, Any]:
        env = trainjob.render(training(), 2, 1).to_dict()["spec"]["trainer"]["env"]
        (entry,) = [entry for entry in env if entry["name"] == "MLFLOW_TRACKING_URI"]
        return dict(entry)

    monkeypatch.setenv("SVIP_OUTBOX", "/work/outbox")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.team:5000")
    assert address()["value"] == "http://mlflow.team:5000"
    assert {"name": "SVIP_OUTBOX", "value": "/work/outbox"} in [
        entry.to_dict() for entry in trainjob.render(training(), 2, 1).spec.trainer.env
    ]
    for own in ("http://me:word@mlflow.team", "http://localhost:5000", f"sqlite:///{tmp_path}/mlflow.db"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", own)
        assert address()["valueFrom"]["secretKeyRef"]["name"] == "svip-mlflow"
        with kubernetes(tmp_path, speak) as cluster:
            cluster.secrets.clear()
            with pytest.raises(trainjob.TrainJobError, match="can't track at .*: make the Secret svip-mlflow in") as no:
                trainjob.run(training(), 2, 1)
            assert "word" not in str(no.value) and not cluster.created


def test_a_node_has_the_gpus_that_are_said_else_one_for_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(job: trainjob.Training) -> Any:
        return trainjob.render(job, 2, 4).to_dict()["spec"]["trainer"].get("resourcesPerNode", {}).get("limits")

    on_cpu = training(config=load_config("smoke", ["train.device=cpu"]))
    assert (asked(training()), asked(on_cpu)) == ({"nvidia.com/gpu": 4}, None)
    monkeypatch.setenv("SVIP_NODE_GPUS", "2")
    assert (asked(training()), asked(on_cpu)) == ({"nvidia.com/gpu": 2}, None)
    monkeypatch.setenv("SVIP_NODE_GPUS", "0")
    assert asked(training()) is None


def test_a_gpu_that_the_sdk_reads_beside_cpus_only_is_refused_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVIP_GPU_TYPE", "amd.com/gpu")
    with pytest.raises(ConfigError, match=r"amd\.com/gpu: set SVIP_NODE_CPU too"):
        trainjob.render(training(), 2, 1)


@pytest.mark.parametrize(
    ("device", "gpu", "cpu", "memory", "requests", "limits"),
    [
        ("auto", "nvidia.com/gpu", "8", "64Gi", {"cpu": "8", "memory": "64Gi"}, {"memory": "64Gi"}),
        ("auto", "amd.com/gpu", "8", "64Gi", {"cpu": "8", "memory": "64Gi"}, {"cpu": "8", "memory": "64Gi"}),
        ("cpu", "nvidia.com/gpu", "500m", "4Gi", {"cpu": "500m", "memory": "4Gi"}, {"cpu": "500m", "memory": "4Gi"}),
        ("cpu", "nvidia.com/gpu", "", "4Gi", {"memory": "4Gi"}, None),
    ],
)
def test_a_node_asks_for_all_it_needs_since_that_replaces_what_the_runtime_asks_for(
    *, device: str, gpu: str, cpu: str, memory: str, requests: Any, limits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kubeflow.trainer.backends.kubernetes.utils import get_container_devices
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

    for name, value in zip(SIZES, (cpu, memory, gpu), strict=True):
        monkeypatch.setenv(name, value)
    job = trainjob.render(training(config=load_config("smoke", [f"train.device={device}"])), 2, 4)
    gpus = {gpu: 4} if device != "cpu" else {}
    resources = job.to_dict()["spec"]["trainer"]["resourcesPerNode"]
    assert resources == {"requests": requests | gpus, **({"limits": limits | gpus} if limits else {})}
    # the SDK raises for limits in which it finds no device
    get_container_devices(TrainerV1alpha1TrainJob.from_dict(job.to_dict()).spec.trainer.resources_per_node)


def test_a_name_is_of_a_training_alone() -> None:
    names = [
        trainjob.render(job, nodes, 1).metadata.name
        for job, nodes in (
            (training(), 2),
            (training(), 3),
            (training(place="s3://team/work/other"), 2),
            (training(arguments=["--preset=smoke"]), 2),
        )
    ]
    assert names[0] == names[1], "tried again with other nodes, it is the same one"
    assert len(set(names)) == 3
    assert all(len(name) <= 50 for name in names), "pods' names add to it, and have 63 characters"


def speak(job: dict[str, Any]) -> Iterator[str]:
    for number in range(30):
        yield f"step {number}"


def shown(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.message.startswith("step ")]


@pytest.mark.parametrize("cut", [0, 11])
def test_a_job_is_made_watched_and_removed(cut: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with kubernetes(tmp_path, speak) as cluster:
        cluster.cut_log_after = cut
        trainjob.run(training(), 2, 1)
        assert len(cluster.created) == 1 and not cluster.jobs
    assert shown(caplog) == [f"step {number}" for number in range(30)], "each line once, also after a cut connection"


def named(job: trainjob.Training) -> dict[str, Any]:
    rendered: dict[str, Any] = trainjob.render(job, 2, 1, "TrainingRuntime").to_dict()
    return rendered


def test_a_step_tried_again_watches_the_job_that_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with kubernetes(tmp_path, speak) as cluster:
        cluster.create(named(training()))
        trainjob.run(training(), 2, 1)
        assert len(cluster.created) == 1
    assert shown(caplog)[-1] == "step 29"


def test_a_job_that_completed_while_nobody_watched_is_taken(tmp_path: Path) -> None:
    with kubernetes(tmp_path, speak) as cluster:
        job = named(training())
        cluster.create(job)
        cluster.end(job["metadata"]["name"], "Complete")
        trainjob.run(training(), 2, 1)
        assert len(cluster.created) == 1


def test_a_complete_job_whose_result_is_gone_is_made_anew(tmp_path: Path, finished: list[bool]) -> None:
    finished[0] = False
    with kubernetes(tmp_path, speak) as cluster:
        job = named(training())
        cluster.create(job)
        cluster.end(job["metadata"]["name"], "Complete")
        trainjob.run(training(), 2, 1)
        assert len(cluster.created) == 2


def failing(job: dict[str, Any]) -> Iterator[str]:
    yield from speak(job)
    yield "error: the loss is nan"
    raise RuntimeError


def test_a_failed_job_is_an_error_with_the_end_of_its_log_and_is_made_anew_by_the_next_try(tmp_path: Path) -> None:
    with kubernetes(tmp_path, failing) as cluster:
        with pytest.raises(trainjob.TrainJobError, match=r"has failed.*node 0:\nstep 11\n(.|\n)*the loss is nan$"):
            trainjob.run(training(), 2, 1)
        cluster.run = speak
        trainjob.run(training(), 2, 1)
        assert len(cluster.created) == 2


def test_a_job_deleted_while_it_runs_is_an_error_that_says_how_to_go_on(tmp_path: Path) -> None:
    def deleted(job: dict[str, Any]) -> Iterator[str]:
        yield "step 0"
        del cluster.jobs[job["metadata"]["name"]]

    with kubernetes(tmp_path, deleted) as cluster, pytest.raises(trainjob.TrainJobError, match="was deleted; the same"):
        trainjob.run(training(), 2, 1)


def test_a_pipeline_that_has_ended_leaves_no_job_and_those_of_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = (f"{digit * 8}-1111-4111-8111-{digit * 12}" for digit in "ab")
    with kubernetes(tmp_path, speak) as cluster:
        for number, pipeline_run in enumerate((ours, ours, theirs)):
            monkeypatch.setenv("SVIP_PIPELINE_RUN", pipeline_run)
            cluster.create(named(training(place=f"{PLACE}-{number}")))
        close_run(f"ablation-{ours}", "CANCELLED")
        assert len(cluster.jobs) == 3, "a pipeline that trains on one node asks no cluster"
        monkeypatch.setenv("SVIP_NODES", "2")
        close_run(f"ablation-{ours}", "CANCELLED")
        assert list(cluster.jobs) == [named(training(place=f"{PLACE}-2"))["metadata"]["name"]]


@pytest.fixture
def refusing_mlflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A server that takes nobody's password."""

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            """Keep quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("SVIP_OUTBOX", str(tmp_path / "outbox"))
        yield
        server.shutdown()


@pytest.mark.usefixtures("refusing_mlflow")
def test_jobs_end_when_mlflow_says_no_and_also_those_after_one_that_cannot_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = "cccccccc-1111-4111-8111-cccccccccccc"
    monkeypatch.setenv("SVIP_NODES", "2")
    monkeypatch.setenv("SVIP_PIPELINE_RUN", ours)
    jobs = [named(training(place=f"{PLACE}-{number}")) for number in range(2)]
    kept = jobs[0]["metadata"]["name"]
    with kubernetes(tmp_path, speak) as cluster:
        for job in jobs:
            cluster.create(job)
        cluster.kept = {kept}
        with pytest.raises(trainjob.TrainJobError, match=rf"may go on \(.*{kept}.*Forbidden.*`kubectl delete"):
            close_run(f"ablation-{ours}", "CANCELLED")
        assert list(cluster.jobs) == [kept]
        cluster.kept = set()
        with pytest.raises(TrackingError):
            close_run(f"ablation-{ours}", "CANCELLED")
        assert not cluster.jobs


def test_a_job_belongs_to_the_run_that_watches_it_and_ends_with_that_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (f"{digit * 8}-1111-4111-8111-{digit * 12}" for digit in "de")

    def outlives_the_first_run(job: dict[str, Any]) -> Iterator[str]:
        yield "step 0"
        deadline = time.monotonic() + 60
        while job["metadata"]["labels"]["pipeline/runid"] == first:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        trainjob.end(first)
        left.extend(cluster.jobs)
        yield "step 1"

    left: list[str] = []
    with kubernetes(tmp_path, outlives_the_first_run) as cluster:
        monkeypatch.setenv("SVIP_PIPELINE_RUN", first)
        cluster.create(named(training()))
        monkeypatch.setenv("SVIP_PIPELINE_RUN", second)
        trainjob.run(training(), 2, 1)
        assert left == cluster.created and len(left) == 1
        cluster.run = speak
        cluster.create(named(training()))
        trainjob.end(second)
        assert not cluster.jobs


def test_no_cluster_and_no_runtime_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(trainjob.TrainJobError, match="no cluster to make a TrainJob in .*set KUBECONFIG"):
        trainjob.run(training(), 2, 1)
    monkeypatch.setenv("SVIP_TRAINING_RUNTIME", "other")
    with kubernetes(tmp_path, speak), pytest.raises(trainjob.TrainJobError, match=r"other.*set SVIP_TRAINING_RUNTIME"):
        trainjob.run(training(), 2, 1)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    bundle = write_bundle(folder / "bundle", IMAGE_ROLES)
    write_vectors(folder / "words", bundle)
    return bundle, folder / "words"


def test_what_no_node_sees_is_refused(inputs: tuple[Bundle, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no other node sees this folder; give an s3:// address, or set SVIP_WORK"):
        trainjob.visible(training(place=str(tmp_path / "out")))
    with pytest.raises(ConfigError, match=r"mine\.yaml: other nodes can't see this file"):
        trainjob.visible(training(arguments=["--preset=mine.yaml"]))


def test_inputs_of_this_machine_are_copied_to_where_all_nodes_see_them(
    inputs: tuple[Bundle, Path], weed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {**KEYS, "AWS_ENDPOINT_URL_S3": weed, "SVIP_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    s3.session.cache_clear()
    s3.client.cache_clear()
    s3.client().create_bucket(Bucket="inputs")
    monkeypatch.setenv("SVIP_WORK", "s3://inputs/work")
    bundle, words = inputs
    local = training(bundle=str(bundle.path), vectors=str(words), place="s3://inputs/work/run")
    moved = trainjob.visible(local)
    assert open_bundle(moved.bundle).sha256 == bundle.sha256
    assert np.array_equal(open_embedding(moved.vectors).vectors, open_embedding(words).vectors)
    assert trainjob.visible(local) == moved and trainjob.visible(moved) == moved
    folder = training(bundle=str(bundle.path), vectors=str(words), place=str(tmp_path / "work" / "run"))
    monkeypatch.setenv("SVIP_WORK", str(tmp_path / "work"))
    moved = trainjob.visible(folder)
    assert Path(moved.bundle).parent == Path(moved.vectors).parent == tmp_path / "work" / "inputs"
    assert open_bundle(moved.bundle).sha256 == bundle.sha256
    s3.session.cache_clear()
    s3.client.cache_clear()
