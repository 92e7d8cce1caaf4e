"""A training goes on whatever the MLflow server does, and in the end the server has everything, once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from small_training import TINY, write_bundle, write_vectors

from benchmarks.mlflowserver import Proxy, Server
from benchmarks.s3server import MORTAL
from svip import steps
from svip.tracking import open_tracker, outbox, sender
from svip.tracking.outbox import Journal

pytestmark = pytest.mark.slow
ROLES = {
    "train": ["train"] * 8 + ["val_seen", "test_seen"],
    "val_unseen": ["val_unseen"] * 4 + ["test_seen"],
    "test_unseen": ["test_unseen"] * 3,
}
EPOCHS = int(os.environ.get("SVIP_TEST_EPOCHS", "24"))
"""Of a training, for half of which the server is away; with some hundreds that is a minute and more."""
PATIENCE = 600.0
"""Seconds after which what is waited for counts as never coming, however busy the machine is."""
SYNC = [*MORTAL, sys.executable, "-m", "svip.cli", "sync"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server")) as server:
        server.start()
        yield server


@contextmanager
def outage(server: Server) -> Iterator[None]:
    """The server is killed, and started again in the end."""
    server.stop()
    try:
        yield
    finally:
        server.start()


@contextmanager
def no_place_for_files(server: Server) -> Iterator[None]:
    artifacts, aside = server.folder / "artifacts", server.folder / "aside"
    artifacts.mkdir(exist_ok=True)
    artifacts.rename(aside)
    artifacts.touch()  # a file, in which no folder can be made
    try:
        yield
    finally:
        artifacts.unlink()
        aside.rename(artifacts)


@pytest.fixture
def proxy(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The way to the server, and an outbox of its own."""
    proxy = Proxy(server.port)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.uri)
    monkeypatch.setenv("SVIP_OUTBOX", str(tmp_path / "outbox"))
    monkeypatch.setattr(sender, "FLUSH", PATIENCE)  # a busy machine may need more than a user wants to wait
    yield proxy
    proxy.close()


@contextmanager
def reading(server: Server) -> Iterator[MlflowClient]:
    """A client that asks again, as the server may close an idle connection; the product leaves that to its outbox."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "5")
        yield MlflowClient(server.uri)


def runs(server: Server, experiment: str) -> list[Run]:
    with reading(server) as client:
        found = client.get_experiment_by_name(experiment)
        assert found is not None
        return list(client.search_runs([found.experiment_id]))


def steps_of(server: Server, run: Run, key: str) -> list[int]:
    with reading(server) as client:
        return [metric.step for metric in client.get_metric_history(run.info.run_id, key)]


def files_of(server: Server, run: Run) -> set[str]:
    with reading(server) as client:
        return {file.path for file in client.list_artifacts(run.info.run_id)}


def models_of(server: Server, run: Run) -> list[str]:
    """The state of each model that the run has logged."""
    with reading(server) as client:
        found = client.search_logged_models([run.info.experiment_id])
    return [str(model.status) for model in found if model.source_run_id == run.info.run_id]


def synced(*arguments: str | Path) -> str:
    """What `svip sync` says; it has to succeed."""
    done = subprocess.run(
        [*SYNC, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def wait_for(process: subprocess.Popen[bytes], done: Callable[[], bool], rest: float = 0.0) -> None:
    """Wait until that is so, before the process has ended; ``rest``: seconds for which it is stopped now and then.

    Its pauses go on while it is stopped, so that with rests it comes to the end of a pause in the same epoch.
    """
    deadline = time.monotonic() + PATIENCE
    while not done():
        assert process.poll() is None, "it has ended before"
        assert time.monotonic() < deadline, f"not within {PATIENCE:.0f} s"
        time.sleep(0.05)
        if rest:
            process.send_signal(signal.SIGSTOP)
            time.sleep(rest)
            process.send_signal(signal.SIGCONT)


class Training:
    """``svip train`` in a process of its own, which logs to the server; at the latest it ends with the context."""

    def __init__(self, files: Path, server: Server, place: Path) -> None:
        self.server, self.out, self.outbox, self.log = server, place / "run", place / "outbox", place / "log"
        self.log.parent.mkdir(exist_ok=True)
        command = [*MORTAL, sys.executable, "-m", "svip.cli", "train", f"--bundle={files / 'bundle'}"]
        command += [f"--vectors={files / 'words'}", f"--out={self.out}", *TINY, f"optim.epochs={EPOCHS}"]
        environment = {"MLFLOW_TRACKING_URI": server.uri, "SVIP_OUTBOX": str(self.outbox)}
        environment["MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL"] = "1"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **environment})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.process.kill()  # a stopped one too
        self.process.wait()
        if kind:
            print(self.log.read_text())

    def reach(self, epoch: int) -> None:
        """Wait until it has logged that many epochs."""

        def logged() -> int:
            return sum(journal.read_bytes().count(b'"val/H"') for journal in outbox.journals(self.outbox))

        wait_for(self.process, lambda: logged() >= epoch)

    def miss_the_server(self) -> None:
        """Wait until it says so, which takes seconds: a fast machine would be done with all epochs."""
        text = "does not answer ([Errno 111] Connection refused); the run goes on"
        wait_for(self.process, lambda: text in self.log.read_text(), rest=0.5)

    def end(self) -> None:
        assert self.process.wait(PATIENCE) == 0

    def check(self) -> None:
        """The server has all that the training wrote to its own folder, once."""
        if self.outbox.exists():  # on a busy machine, which didn't send it all while the end waited
            synced(self.outbox)
        name = (self.out / "run_id").read_text()  # local where the server took long to open it
        (run,) = [
            run
            for run in runs(self.server, "svip/synthetic")
            if name in (run.info.run_id, run.data.tags.get("outbox_id"))
        ]
        assert run.info.status == "FINISHED"
        with reading(self.server) as client:
            histories = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
        found = [(key, entry.step, entry.value) for key, history in histories.items() for entry in history]
        expected = [
            (key.replace("train/", "final_train/") if entry["phase"] == "final" else key, entry["epoch"], value)
            for entry in json.loads((self.out / "history.json").read_text())
            for key, value in entry.items()
            if "/" in key
        ]
        assert len(expected) > 9 * EPOCHS
        assert sorted(entry for entry in found if not entry[0].startswith("system/")) == sorted(expected)
        samples = [entry.step for entry in histories["system/cpu_utilization_percentage"]]
        assert samples == list(range(1, len(samples) + 1))
        assert files_of(self.server, run) >= {"config.yaml", "environment.txt", "model.json", "history.json", "charts"}
        assert models_of(self.server, run) == ["READY"]
        assert not self.outbox.exists()

    @property
    def weights(self) -> bytes:
        return (self.out / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle and word vectors."""
    folder = tmp_path_factory.mktemp("files")
    bundle = write_bundle(folder / "bundle", ROLES)
    write_vectors(folder / "words", bundle)
    return folder


@pytest.fixture(scope="module")
def undisturbed(files: Path, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """What has ended while the server was there all the time."""
    with Training(files, server, tmp_path_factory.mktemp("undisturbed")) as training:
        training.end()
    training.check()
    return training


def test_a_server_killed_in_mid_training_and_started_again_has_every_metric_once(
    files: Path, server: Server, undisturbed: Training, tmp_path: Path
) -> None:
    with Training(files, server, tmp_path) as training:
        training.reach(EPOCHS // 4)
        away = time.monotonic()
        with outage(server):
            training.miss_the_server()
            training.reach(EPOCHS * 3 // 4)
            training.process.send_signal(signal.SIGSTOP)  # else it might be done before the server has started
        training.process.send_signal(signal.SIGCONT)
        print(f"the server was away for {time.monotonic() - away:.0f} s")
        training.end()
    assert f"MLflow at {server.uri} answers again" in training.log.read_text()
    training.check()
    assert training.weights == undisturbed.weights


def test_a_server_killed_in_mid_training_for_good_gets_the_rest_by_sync(
    files: Path, server: Server, undisturbed: Training, tmp_path: Path
) -> None:
    with Training(files, server, tmp_path) as training:
        training.reach(EPOCHS // 4)
        with outage(server):
            training.end()
    assert f"records are kept in {training.outbox}; `svip sync` sends them" in training.log.read_text()
    assert training.weights == undisturbed.weights
    assert "sent to" in synced(training.outbox)
    training.check()


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


def test_metrics_arrive_although_the_server_has_no_place_for_files(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("SVIP_OUTBOX", str(tmp_path / "outbox"))
    monkeypatch.setattr(sender, "SHORT_FLUSH", 1.0)
    monkeypatch.setattr(sender, "FLUSH", 1.0)
    (tmp_path / "curve.csv").write_text("gamma\n0\n")
    with no_place_for_files(server), open_tracker("svip/placeless", "train") as tracker:
        tracker.log_artifact(tmp_path / "curve.csv")
        for step in range(3):
            tracker.log_metrics({"loss": step / 7}, step)
        tracker.set_tags({"protocol": "none"})
        (journal,) = outbox.journals(tmp_path / "outbox")
        deadline = time.monotonic() + 120
        while '"ahead"' not in journal.read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
    (run,) = runs(server, "svip/placeless")
    assert (run.info.status, run.data.tags["protocol"]) == ("RUNNING", "none"), "not finished without its files"
    assert steps_of(server, run, "loss") == [0, 1, 2]

    assert ": 2 sent to" in synced()  # the file and the end
    (run,) = runs(server, "svip/placeless")
    assert run.info.status == "FINISHED"
    assert steps_of(server, run, "loss") == [0, 1, 2]
    assert files_of(server, run) == {"curve.csv"}


def test_a_training_that_began_without_the_server_is_in_it_after_a_sync(
    files: Path, server: Server, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "FLUSH", 1.0)
    monkeypatch.setattr(sender, "SHORT_FLUSH", 1.0)
    proxy.fall_silent()
    arguments = (str(files / "bundle"), str(files / "words"), str(tmp_path / "run"), "smoke", TINY)
    result = steps.train(*arguments)
    assert outbox.is_local(result["run_id"])
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert proxy.connections < 30  # it is asked now and then

    proxy.silent = False
    assert "sent to" in synced()
    assert synced() == f"nothing to send in {tmp_path / 'outbox'}\n"
    (run,) = [run for run in runs(server, "svip/synthetic") if run.data.tags.get("outbox_id") == result["run_id"]]
    assert run.info.status == "FINISHED"
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    epochs = [entry["epoch"] for entry in history if "val/H" in entry]
    assert epochs and steps_of(server, run, "val/H") == epochs
    assert files_of(server, run) >= {"config.yaml", "history.json"}
    assert models_of(server, run) == ["READY"]
    assert steps.train(*arguments)["run_id"] == run.info.run_id  # the folder's run is the server's now
    assert (tmp_path / "run" / "run_id").read_text() == run.info.run_id
    assert models_of(server, run) == ["READY"]


def test_sync_that_is_killed_goes_on_where_it_was(server: Server, proxy: Proxy, tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "outbox", "local-long", proxy.uri)
    content = {"run_id": "", "experiment": "svip/long", "run_name": "long", "parent": "", "tags": {}}
    journal.append("open", **content, has_to_exist=False, owns=True, time=outbox.now())
    for step in range(300):
        journal.append("metrics", metrics={f"m{number}": step / 7 for number in range(20)}, step=step, time=step)
    journal.append("end", status="FINISHED", time=outbox.now())
    journal.close()
    proxy.delay = 0.2
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(SYNC, stdout=log, stderr=log)
    try:
        wait_for(process, lambda: journal.path.read_bytes().count(b'"sent"') >= 3)
    finally:
        process.kill()
        process.wait()
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
