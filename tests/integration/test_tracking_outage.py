"""A training goes on whatever the MLflow server does, and in the end the server has everything, once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from small_training import ATTRIBUTES, TINY, write_bundle

from benchmarks.mlflowserver import Proxy, Server
from svip import steps
from svip.semantics.vectors import Embedding, write_embedding
from svip.tracking import open_tracker, outbox, sender
from svip.tracking.outbox import Journal

pytestmark = pytest.mark.slow
ROLES = {
    "train": ["train"] * 8 + ["val_seen", "test_seen"],
    "val_unseen": ["val_unseen"] * 4 + ["test_seen"],
    "test_unseen": ["test_unseen"] * 3,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server")) as server:
        server.start()
        yield server


@pytest.fixture
def proxy(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The way to the server, and an outbox of its own."""
    proxy = Proxy(server.port)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.uri)
    monkeypatch.setenv("SVIP_OUTBOX", str(tmp_path / "outbox"))
    yield proxy
    proxy.close()


def runs(server: Server, experiment: str) -> list[Run]:
    client = MlflowClient(server.uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return list(client.search_runs([found.experiment_id]))


def steps_of(server: Server, run: Run, key: str) -> list[int]:
    return [metric.step for metric in MlflowClient(server.uri).get_metric_history(run.info.run_id, key)]


def sync_command() -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "svip.cli", "sync"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ.copy())


def synced() -> str:
    """What `svip sync` says; it has to succeed."""
    process = sync_command()
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


def test_a_server_stopped_and_started_again_while_a_run_logs_has_every_step_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("SVIP_OUTBOX", str(tmp_path / "outbox"))
    (tmp_path / "curve.csv").write_text("gamma\n0\n")
    caplog.set_level("INFO", "svip")
    with open_tracker("svip/stopped", "train") as tracker:
        tracker.log_params({"optim.lr": 0.1})
        for step in range(1, 61):
            tracker.log_metrics({"train/loss": 1 / step, "val/H": step / 2}, step)
            if step == 20:
                server.stop()
                tracker.set_tags({"while": "away"})
                tracker.log_artifact(tmp_path / "curve.csv")
            if step == 40:
                server.start()  # which takes it about ten seconds
            time.sleep(0.1)
    (run,) = runs(server, "svip/stopped")
    assert (run.info.run_id, run.info.status) == (tracker.run_id, "FINISHED")
    assert steps_of(server, run, "train/loss") == steps_of(server, run, "val/H") == list(range(1, 61))
    assert run.data.tags["while"] == "away"
    assert [file.path for file in MlflowClient(server.uri).list_artifacts(tracker.run_id)] == ["curve.csv"]
    assert "does not answer ([Errno 111] Connection refused); the run goes on" in caplog.text
    assert f"MLflow at {server.uri} answers again" in caplog.text
    assert not (tmp_path / "outbox").exists()


def test_answers_that_are_lost_double_nothing(server: Server, proxy: Proxy) -> None:
    proxy.loses = 3  # of opening the run: what comes first, then what creates the run
    with open_tracker("svip/lossy", "train") as tracker:
        for step in range(30):
            proxy.loses = 1 if step % 10 == 5 else proxy.loses
            tracker.log_metrics({"loss": 0.1}, step)
            time.sleep(0.1)
        proxy.loses = 2
    (run,) = runs(server, "svip/lossy")
    assert run.info.status == "FINISHED"
    assert steps_of(server, run, "loss") == list(range(30))


def test_a_server_gone_for_good_gets_the_training_by_sync(
    server: Server, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "FLUSH", 1.0)
    monkeypatch.setattr(sender, "SHORT_FLUSH", 1.0)
    bundle = write_bundle(tmp_path / "bundle", ROLES)
    vectors = np.random.default_rng(1).normal(size=(ATTRIBUTES, 7)).astype(np.float32)
    write_embedding(Embedding(vectors, bundle.attribute_names, {}), tmp_path / "words")
    proxy.fall_silent()
    arguments = (str(bundle.path), str(tmp_path / "words"), str(tmp_path / "run"), "smoke", TINY)
    result = steps.train(*arguments)
    assert outbox.is_local(result["run_id"])
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert proxy.connections < 30  # it is asked now and then

    proxy.silent = False
    assert "sent to" in synced()
    assert synced() == f"nothing to send in {tmp_path / 'outbox'}\n"
    (run,) = [run for run in runs(server, "svip/synthetic") if run.data.tags["outbox_id"] == result["run_id"]]
    assert run.info.status == "FINISHED"
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    epochs = [entry["epoch"] for entry in history if "val/H" in entry]
    assert epochs and steps_of(server, run, "val/H") == epochs
    client = MlflowClient(server.uri)
    assert {file.path for file in client.list_artifacts(run.info.run_id)} >= {"config.yaml", "history.json"}
    (model,) = client.search_logged_models([run.info.experiment_id])
    assert (model.source_run_id, model.status) == (run.info.run_id, "READY")

    assert steps.train(*arguments)["run_id"] == run.info.run_id  # the folder's run is the server's now
    assert (tmp_path / "run" / "run_id").read_text() == run.info.run_id
    assert len(client.search_logged_models([run.info.experiment_id])) == 1


def test_sync_that_is_killed_goes_on_where_it_was(server: Server, proxy: Proxy, tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "outbox", "local-long", proxy.uri)
    content = {"run_id": "", "experiment": "svip/long", "run_name": "long", "parent": "", "tags": {}}
    journal.append("open", **content, has_to_exist=False, owns=True, time=outbox.now())
    for step in range(300):
        journal.append("metrics", metrics={f"m{number}": step / 7 for number in range(20)}, step=step, time=step)
    journal.append("end", status="FINISHED", time=outbox.now())
    journal.close()
    proxy.delay = 0.2
    process = sync_command()
    while journal.path.read_bytes().count(b'"sent"') < 3:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert journal.path.exists()

    proxy.delay = 0.0
    assert "sent to" in synced()
    (run,) = runs(server, "svip/long")
    assert run.info.status == "FINISHED"
    for key in ("m0", "m19"):
        assert steps_of(server, run, key) == list(range(300))


def test_a_slow_server_costs_the_training_nothing(server: Server, proxy: Proxy) -> None:
    proxy.delay = 0.2
    spent = []
    with open_tracker("svip/slow", "train") as tracker:
        for step in range(40):
            started = time.perf_counter()
            tracker.log_metrics({f"m{number}": 1.0 for number in range(10)}, step)
            spent.append(time.perf_counter() - started)
            time.sleep(0.05)
    assert sorted(spent)[len(spent) // 2] < 0.002  # 1 % of one answer
    (run,) = runs(server, "svip/slow")
    assert steps_of(server, run, "m9") == list(range(40))
