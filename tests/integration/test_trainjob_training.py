"""The whole way of a training on two nodes: a TrainJob whose nodes really train, with a bucket between all of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_kubernetes import NAMESPACE, kubernetes
from mlflow import MlflowClient
from safetensors.torch import load_file
from small_training import IMAGE_ROLES, TINY, write_bundle, write_vectors

import svip
from benchmarks.ports import free_port
from benchmarks.s3server import KEYS
from svip import steps, trainjob
from svip.data import s3

pytest.importorskip("kubeflow", reason="needs the extra `cluster`")
pytestmark = pytest.mark.slow
OPTIONS = [*TINY, "train.checkpoint_steps=2", "optim.lr=1e-4", "optim.head_lr=1e-4", "train.select=false"]


class Nodes:
    """What Trainer makes of a TrainJob: its command on each node, with torchrun's settings and the Secrets' values."""

    def __init__(self, folder: Path, secrets: dict[str, dict[str, str]]) -> None:
        self.folder, self.secrets = folder, secrets
        self.failing = False
        self.tries = 0

    def __call__(self, job: dict[str, Any]) -> Iterator[str]:
        self.tries += 1
        trainer = job["spec"]["trainer"]
        settings = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(Path(svip.__file__).parents[1]),
            "OMP_NUM_THREADS": "1",
        }
        for entry in trainer["env"]:
            source = entry.get("valueFrom", {}).get("secretKeyRef")
            value = self.secrets.get(source["name"], {}).get(source["key"]) if source else entry["value"]
            if value is not None:
                settings[entry["name"]] = value
        settings |= {"PET_NNODES": str(trainer["numNodes"]), "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"])}
        settings |= {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(free_port())}
        assert trainer["command"][0] == "torchrun"
        command = [sys.executable, "-m", "torch.distributed.run", *trainer["command"][1:]]
        nodes = []
        for rank in range(trainer["numNodes"]):
            home = self.folder / f"node-{rank}-{self.tries}"  # nothing is shared, and nothing is kept
            home.mkdir(parents=True)
            own = {"PET_NODE_RANK": str(rank), "HOME": str(home)}
            nodes.append(
                subprocess.Popen(
                    command, env=settings | own, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
            )
        threading.Thread(target=nodes[1].communicate, daemon=True).start()  # its log has to be read too
        assert nodes[0].stdout is not None
        for line in nodes[0].stdout:
            yield line.rstrip("\n")
            if self.failing and "final epoch 2/3" in line:
                for node in nodes:
                    node.send_signal(signal.SIGTERM)
        if any([node.wait() for node in nodes]):
            raise RuntimeError


def test_two_nodes_train_lose_their_pods_and_hand_over_the_model_of_one_process(
    weed: str, store_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = write_bundle(tmp_path / "bundle", IMAGE_ROLES)
    write_vectors(tmp_path / "words", bundle)
    inputs = (str(bundle.path), str(tmp_path / "words"))
    steps.train(*inputs, str(tmp_path / "alone"), "smoke", OPTIONS, log_model=False)

    for name, value in {**KEYS, "AWS_ENDPOINT_URL": weed, "SVIP_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_ENDPOINT_URL_S3", "SVIP_IMAGE"):
        monkeypatch.delenv(name, raising=False)
    s3.session.cache_clear()
    s3.client.cache_clear()
    s3.client().create_bucket(Bucket="nodes")
    monkeypatch.setenv("SVIP_WORK", "s3://nodes/work")
    monkeypatch.setenv("SVIP_NAMESPACE", NAMESPACE)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr(trainjob, "PAUSE", 0.2)
    nodes = Nodes(
        tmp_path / "nodes",
        {"svip-mlflow": {"MLFLOW_TRACKING_URI": f"sqlite:///{store_file}"}, "svip-s3": KEYS},
    )
    options: dict[str, Any] = {"parent_run_id": "fedcba9876543210" * 2, "nodes": 2, "log_model": False}
    with kubernetes(tmp_path, nodes):
        nodes.failing = True
        with pytest.raises(trainjob.TrainJobError, match="has failed. The end of the log") as failed:
            steps.train(*inputs, str(tmp_path / "pod-1"), "smoke", OPTIONS, **options)
        assert not (tmp_path / "pod-1").exists()
        assert any(name.endswith("final/state.pt") for name in s3.names("s3://nodes/work")), failed.value
        nodes.failing = False
        result = steps.train(*inputs, str(tmp_path / "pod-2"), "smoke", OPTIONS, **options)
    assert nodes.tries == 2
    trained, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("pod-2", "alone"))
    for name, tensor in expected.items():
        assert float((trained[name] - tensor).abs().max()) < 1e-4, name
    run = MlflowClient(f"sqlite:///{store_file}").get_run(result["run_id"])
    assert run.info.status == "FINISHED" and run.data.tags["mlflow.parentRunId"] == options["parent_run_id"]
    left = {name.partition("/")[0] for name in s3.names("s3://nodes/work")}
    assert left == {"inputs"}, "the state is removed, and the inputs stay for the next training"
    s3.session.cache_clear()
    s3.client.cache_clear()
