"""What ends up in MLflow, read back from a real SQLite store."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from svip import tracking
from svip.tracking import Tracker, TrackingError, close_run, open_run, open_tracker, sender
from svip.tracking.store import use_store


def read(store: str, run_id: str) -> Run:
    return MlflowClient(store).get_run(run_id)


def test_the_default_store_is_a_file_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert tracking.tracking_uri() == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert tracking.tracking_uri() == "http://mlflow:5000"


def test_steps_are_children_of_the_pipelines_run(store: str) -> None:
    parent = open_run("experiment-7", "svip/synthetic", {"optim.lr": 0.001}, {"preset": "smoke", "variant": ""})
    with open_tracker("svip/synthetic", "train", parent_run_id=parent, tags={"bundle_sha256": "abc"}) as tracker:
        tracker.log_params({"model.backbone": "tiny", "model.selected_groups": 8})
        tracker.log_metrics({"train/loss": 2.5, "val/H": 40.0}, step=1)
        tracker.log_metrics({"train/loss": 1.5, "val/H": 55.5}, step=2)
        assert read(store, tracker.run_id).info.status == "RUNNING"
    assert read(store, parent).info.status == "RUNNING"
    close_run(parent, "FINISHED")

    child, parent_run = read(store, tracker.run_id), read(store, parent)
    assert (child.info.status, parent_run.info.status) == ("FINISHED", "FINISHED")
    assert child.info.experiment_id == parent_run.info.experiment_id
    assert MlflowClient(store).get_experiment(child.info.experiment_id).name == "svip/synthetic"
    assert child.data.tags["mlflow.parentRunId"] == parent
    assert child.data.tags["bundle_sha256"] == "abc"
    assert child.data.params == {"model.backbone": "tiny", "model.selected_groups": "8"}
    history = MlflowClient(store).get_metric_history(child.info.run_id, "val/H")
    assert [(metric.step, metric.value) for metric in history] == [(1, 40.0), (2, 55.5)]
    assert parent_run.data.params == {"optim.lr": "0.001"}
    assert parent_run.data.tags["preset"] == "smoke"
    assert "variant" not in parent_run.data.tags


def test_a_resumed_run_keeps_its_id_and_its_first_parameters(store: str) -> None:
    with pytest.raises(KeyboardInterrupt), open_tracker("svip/cub", "train") as first:
        first.log_params({"optim.epochs": 3, "optim.lr": 0.1})
        first.log_metrics({"val/H": 10.0}, step=1)
        raise KeyboardInterrupt
    assert read(store, first.run_id).info.status == "KILLED"
    with open_tracker("svip/cub", "train", run_id=first.run_id, parent_run_id="ignored") as second:
        assert read(store, first.run_id).info.status == "RUNNING"
        second.log_params({"optim.epochs": 5, "optim.lr": 0.1, "train.seed": 1})
        second.log_metrics({"val/H": 20.0}, step=2)
    run = read(store, first.run_id)
    assert second.run_id == first.run_id
    assert run.info.status == "FINISHED"
    assert run.data.params == {"optim.epochs": "3", "optim.lr": "0.1", "train.seed": "1"}
    assert run.data.tags["resumed.optim.epochs"] == "5"
    assert "resumed.optim.lr" not in run.data.tags
    assert len(MlflowClient(store).get_metric_history(run.info.run_id, "val/H")) == 2


def test_a_saved_run_that_the_store_lost_becomes_a_new_run(store: str, caplog: pytest.LogCaptureFixture) -> None:
    with open_tracker("svip/cub", "train", run_id="0" * 32) as tracker:
        assert tracker.run_id != "0" * 32
    assert "goes on in a new run" in caplog.text


def test_a_run_that_was_deleted_becomes_a_new_run(
    store: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with open_tracker("svip/cub", "train") as first:
        pass
    MlflowClient(store).delete_run(first.run_id)
    with open_tracker("svip/cub", "train", run_id=first.run_id) as second:
        assert second.run_id != first.run_id
    assert f"run {first.run_id} is not in {store}, or was deleted there: it goes on in a new run" in caplog.text
    assert read(store, second.run_id).info.status == "FINISHED"
    monkeypatch.setenv("MLFLOW_RUN_ID", first.run_id)
    with pytest.raises(TrackingError, match="no such run"):
        open_tracker("svip/cub", "train")


def test_mlflow_run_id_wins_and_has_to_exist(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = open_run("experiment", "svip/cub", {})
    other = open_run("experiment", "svip/cub", {})
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    assert open_tracker("svip/cub", "train", run_id=other, parent_run_id=other).run_id == given
    monkeypatch.setenv("MLFLOW_RUN_ID", "f" * 32)
    with pytest.raises(TrackingError, match="MLFLOW_RUN_ID=ffff"):
        open_tracker("svip/cub", "train")


def test_an_error_marks_the_run_failed_and_says_why(store: str) -> None:
    with pytest.raises(ValueError, match="not finite"), open_tracker("svip/cub", "train") as tracker:
        raise ValueError("loss is not finite")
    run = read(store, tracker.run_id)
    assert run.info.status == "FAILED"
    assert run.data.tags["error"] == "ValueError: loss is not finite"
    with open_tracker("svip/cub", "train", run_id=tracker.run_id):
        pass
    run = read(store, tracker.run_id)
    assert run.info.status == "FINISHED" and "error" not in run.data.tags


def test_sigterm_marks_the_run_killed(store: str, tmp_path: Path) -> None:
    code = (
        "import time; from svip.tracking import open_tracker\n"
        "with open_tracker('svip/cub', 'train') as tracker:\n"
        "    print(tracker.run_id, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ.copy())
    assert process.stdout is not None
    run_id = process.stdout.readline().strip()
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    process.stdout.close()
    assert read(store, run_id).info.status == "KILLED"


def test_sigterm_at_the_end_of_a_failed_run_does_not_cut_it_off(tmp_path: Path) -> None:
    code = (
        "from svip.tracking import open_tracker, sender\n"
        "sender.FLUSH = sender.SHORT_FLUSH = 3\n"
        "with open_tracker('svip/cub', 'train') as tracker:\n"
        "    print(flush=True); raise ValueError('the first error')"
    )
    nobody = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "SVIP_OUTBOX": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **nobody},
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and "the first error" in said and "`svip sync` sends them" in said
    assert '"FAILED"' in next(tmp_path.glob("*.jsonl")).read_text()


@pytest.mark.parametrize(
    ("status", "expected"), [("SUCCEEDED", "FINISHED"), ("FAILED", "FAILED"), ("CANCELLED", "KILLED")]
)
def test_an_exit_handler_closes_by_the_pipelines_name(store: str, status: str, expected: str) -> None:
    mine = open_run("experiment-41", "svip/cub", {})
    other = open_run("experiment-42", "svip/sun", {})
    close_run("experiment-41", status)
    assert read(store, mine).info.status == expected
    assert read(store, other).info.status == "RUNNING"
    close_run("experiment-that-never-opened-a-run", status)


def test_a_pipeline_that_goes_on_ends_the_run_that_it_began(store: str) -> None:
    first = open_run("experiment-51", "svip/cub", {"optim.lr": 0.1}, name="first")
    close_run("experiment-51", "FAILED")
    second = open_run("experiment-52", "svip/cub", {"optim.lr": 0.1}, name="second", continues="experiment-51")
    run = read(store, first)
    assert (second, run.info.status, run.info.run_name) == (first, "RUNNING", "second")
    assert run.data.tags["pipeline"] == "experiment-52"
    close_run("experiment-52", "SUCCEEDED")
    assert read(store, first).info.status == "FINISHED"
    assert open_run("experiment-53", "svip/cub", {}, continues="experiment-52") == first


def test_close_run_refuses_what_it_does_not_know(store: str) -> None:
    with pytest.raises(TrackingError, match="status 'DONE': expected one of FINISHED"):
        close_run("experiment", "DONE")
    with pytest.raises(TrackingError, match="has no such run"):
        close_run("a" * 32, "FINISHED")


def test_more_and_longer_parameters_than_one_request_takes(store: str) -> None:
    many = {f"key{number}": number for number in range(250)}
    parent = open_run("experiment", "svip/cub", {**many, "long": "x" * 9000})
    params = read(store, parent).data.params
    assert len(params) == 251
    assert params["key249"] == "249"
    assert len(params["long"]) == 6000 and params["long"].endswith("...")


def test_artifacts_lie_beside_the_store(store_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "folder").mkdir(parents=True)
    (elsewhere / "report.html").write_text("<html>")
    (elsewhere / "folder" / "curve.csv").write_text("gamma\n0\n")
    monkeypatch.chdir(elsewhere)
    with open_tracker("svip/cub", "evaluate") as tracker:
        tracker.log_artifact(elsewhere / "report.html")
        tracker.log_artifact(elsewhere / "folder", "evaluation")
    artifacts = store_file.parent / "mlruns" / "svip" / "cub" / tracker.run_id / "artifacts"
    files = sorted(str(path.relative_to(artifacts)) for path in artifacts.rglob("*") if path.is_file())
    assert files == ["evaluation/curve.csv", "report.html"]
    assert not (elsewhere / "mlruns").exists()


@pytest.mark.parametrize("named", ["http://127.0.0.1:5000", None])
def test_what_goes_to_another_store_leaves_the_address_for_runs_alone(
    monkeypatch: pytest.MonkeyPatch, named: str | None
) -> None:
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", None)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if named:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", named)
    use_store(MlflowClient("http://127.0.0.1:5001"))
    assert mlflow.get_tracking_uri() == "http://127.0.0.1:5001"
    assert os.environ.get("MLFLOW_TRACKING_URI") == named


def test_without_tracking_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with open_tracker("svip/cub", "train", enabled=False) as tracker:
        tracker.log_params({"a": 1})
        tracker.log_metrics({"a": 1.0})
        tracker.log_artifact(tmp_path)
        tracker.set_tags({"a": "b"})
    assert tracker.run_id == ""
    assert tracking.log_checkpoint_model(Tracker(), tmp_path) == ""
    assert not list(tmp_path.iterdir())


def test_tags_name_the_code_and_the_image(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVIP_IMAGE_DIGEST", "sha256:12")
    with open_tracker("svip/cub", "train") as tracker:
        pass
    tags = read(store, tracker.run_id).data.tags
    assert tags["image_digest"] == "sha256:12"
    assert tags["git_sha"] == tracking.git_sha()


def test_the_git_sha_is_that_of_svips_own_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "svip" / "__init__.py"
    package.parent.mkdir()
    package.touch()
    monkeypatch.setattr("svip.__file__", str(package))
    monkeypatch.delenv("SVIP_GIT_SHA", raising=False)
    assert tracking.git_sha() == "unknown"
    monkeypatch.setenv("SVIP_GIT_SHA", "from-the-image")
    assert tracking.git_sha() == "from-the-image"

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    sha = git("rev-parse", "HEAD").strip()
    assert tracking.git_sha() == sha
    package.write_text("# edited")
    assert tracking.git_sha() == f"{sha}-dirty"


def test_mlflow_keeps_the_terminal_clean(tmp_path: Path) -> None:
    code = "from svip.tracking import open_tracker\nwith open_tracker('svip/cub', 'train'): pass"
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_an_unreachable_server_is_named_without_its_password_and_does_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:secret@127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("SVIP_OUTBOX", str(tmp_path))
    monkeypatch.setattr(sender, "FLUSH", 0.1)
    monkeypatch.setattr(sender, "SHORT_FLUSH", 0.1)
    with open_tracker("svip/test", "run") as tracker:
        assert tracker.run_id.startswith("local-")
        tracker.log_metrics({"val/H": 50.0}, 1)
    first, last = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert first.startswith("MLflow at http://someone:***@127.0.0.1:9 does not answer ([Errno 111] Connection refused)")
    assert last == (
        "MLflow at http://someone:***@127.0.0.1:9 does not answer; "
        f"3 records are kept in {tmp_path}; `svip sync` sends them"
    )
    kept = [file.read_text() for file in tmp_path.iterdir()]
    assert len(kept) == 1 and "val/H" in kept[0]
    assert "secret" not in caplog.text + kept[0]


def test_an_address_that_no_server_can_have_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "htp://someone:secret@mlflow:5000")
    with pytest.raises(TrackingError, match=r"MLflow at htp://someone:\*\*\*@mlflow:5000 can't be used") as caught:
        open_tracker("svip/test", "run")
    assert "secret" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://user:p@ss@host:5000", "http://user:***@host:5000"),
        ("postgresql://user:a/b@host/runs", "postgresql://user:***@host/runs"),
        ("postgresql://host/runs?user=u&password=zz&x=1", "postgresql://host/runs?user=u&password=***&x=1"),
        ("sqlite:////tmp/mlflow.db", "sqlite:////tmp/mlflow.db"),
    ],
)
def test_no_password_is_shown(uri: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert tracking.shown_uri() == shown


def test_mlflows_telemetry_is_off_before_mlflow_is_imported() -> None:
    code = (
        "import os, sys; from svip import tracking; assert 'mlflow' not in sys.modules;"
        "print(os.environ['MLFLOW_DISABLE_TELEMETRY'])"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "true\n"


def test_a_pipeline_goes_on_with_the_run_of_the_first_one_that_has_one(store: str) -> None:
    mine = open_run("experiment-71", "svip/cub", {})
    close_run("experiment-71", "KILLED")
    assert open_run("experiment-73", "svip/cub", {}, continues="experiment-72 experiment-71") == mine
    assert open_run("experiment-74", "svip/cub", {}, continues="experiment-72") != mine
    assert read(store, mine).info.status == "RUNNING"
    for number in (73, 74):
        close_run(f"experiment-{number}", "FINISHED")
    assert read(store, mine).info.status == "FINISHED", "it is the later pipeline's now"
