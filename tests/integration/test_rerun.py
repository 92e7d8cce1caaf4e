"""From a run one gets back what made it, and does it again: real trainings of a second, a real SQLite store."""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import yaml
from mlflow import MlflowClient
from PIL import Image
from small_training import IMAGE_ROLES, TINY, write_bundle, write_vectors
from typer.testing import CliRunner

from svip import steps, tracking
from svip.cli import app
from svip.config import flatten, from_yaml, load_config
from svip.data.bundle import Bundle, read_bundle
from svip.steps.reruns import RerunError, agreements, differences
from svip.tracking import TrackingError

KFP_RUN = "0f8fad5b-d9cb-469f-a165-70867728950e"
OPTIONS = [*TINY, "optim.epochs=2", "model.readout=cls"]


@dataclass(frozen=True)
class Experiment:
    """A pipeline's run, with a training and an evaluation in it."""

    bundle: Bundle
    vectors: Path
    checkpoint: Path
    parent: str
    train: str
    evaluate: str


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, store_file: Path) -> Experiment:
    folder = tmp_path_factory.mktemp("experiment")
    bundle = write_bundle(folder / "bundle", IMAGE_ROLES)
    vectors, checkpoint = write_vectors(folder / "words", bundle), folder / "checkpoint"
    parent = steps.open_run(f"experiment-{KFP_RUN}", "smoke", OPTIONS)
    trained = steps.train(str(bundle.path), str(vectors), str(checkpoint), "smoke", OPTIONS, parent)
    changed = ["evaluation.protocols=[validation,none]", "evaluation.batch_size=3"]
    steps.evaluate(str(checkpoint), str(bundle.path), str(folder / "evaluation"), parent, overrides=changed)
    steps.close_run(parent, "FINISHED")
    evaluation = tracking.find_evaluation(trained["run_id"])
    assert evaluation
    return Experiment(bundle, vectors, checkpoint, parent, trained["run_id"], evaluation.run_id)


def test_a_run_says_what_made_it(done: Experiment) -> None:
    trained, evaluated = tracking.find_runs(done.parent)
    assert evaluated and (trained.run_id, evaluated.run_id) == (done.train, done.evaluate)
    lineage = trained.lineage()
    expected = {
        "git_sha": tracking.git_sha(),
        "preset": "smoke",
        "seed": "0",
        "protocol": "validation",
        "device": "cpu",
        "processes": "1",
        "bundle": str(done.bundle.path),
        "bundle_sha256": done.bundle.sha256,
        "vectors_sha256": (done.checkpoint / "bundle.sha256").read_text().split()[1],
        "parent run": done.parent,
        "kfp_run_id": KFP_RUN,
        "package numpy": np.__version__,
        "torch threads": "1",
    }
    assert {key: lineage[key] for key in expected} == expected
    assert evaluated.lineage()["kfp_run_id"] == KFP_RUN
    assert evaluated.tags["train_run_id"] == done.train


def test_its_artifacts_are_the_configuration_the_environment_and_the_vectors(done: Experiment, tmp_path: Path) -> None:
    trained, evaluated = tracking.find_runs(done.evaluate)
    config = trained.download(tracking.CONFIG, tmp_path)
    assert config and flatten(from_yaml(config)) == flatten(load_config("smoke", OPTIONS))
    assert evaluated and yaml.safe_load(evaluated.text(tracking.CONFIG))["evaluation"]["batch_size"] == 3
    requirements = evaluated.text(tracking.ENVIRONMENT).splitlines()
    assert f"numpy=={np.__version__}" in requirements and "# device: cpu" in requirements
    vectors = trained.download(tracking.VECTORS, tmp_path)
    assert vectors and (vectors / "vectors.npy").read_bytes() == (done.vectors / "vectors.npy").read_bytes()
    assert trained.download("no such thing", tmp_path) is None


def test_mlflow_lists_the_data_of_each_run(done: Experiment, store: str) -> None:
    client: Any = MlflowClient(store)
    used = {
        run: [
            (entry.dataset.name, entry.dataset.digest, entry.tags[0].value)
            for entry in client.get_run(run).inputs.dataset_inputs
        ]
        for run in (done.train, done.evaluate)
    }
    bundle = ("synthetic-standard", done.bundle.sha256[:12])
    assert set(used[done.evaluate]) == {(*bundle, "testing")}
    assert (*bundle, "training") in used[done.train] and len(used[done.train]) == 2
    entry = next(
        entry.dataset for entry in client.get_run(done.train).inputs.dataset_inputs if entry.dataset.name == bundle[0]
    )
    # MLflow keeps the source that the experiment's first run with these data named.
    assert entry.source_type == "local" and read_bundle(json.loads(entry.source)["uri"]).sha256 == done.bundle.sha256
    assert json.loads(entry.profile)["images"]["train"] == 20


def test_the_model_has_its_test_results(done: Experiment, store: str) -> None:
    client: Any = MlflowClient(store)
    run = client.get_run(done.evaluate)
    (output,) = client.get_run(done.train).outputs.model_outputs
    metrics = {metric.key: metric for metric in client.get_logged_model(output.model_id).metrics}
    assert metrics["test/H"].value == run.data.metrics["test/H"]
    assert metrics["test/H"].dataset_digest == done.bundle.sha256[:12]
    assert [entry.model_id for entry in run.inputs.model_inputs] == [output.model_id]
    assert len(client.get_metric_history(done.evaluate, "test/H")) == 1


def test_the_load_of_the_machine_is_logged(done: Experiment, store: str) -> None:
    metrics = MlflowClient(store).get_run(done.train).data.metrics
    assert 0 < metrics["system/system_memory_usage_percentage"] <= 100
    assert 0 <= metrics["system/cpu_utilization_percentage"] <= 100


def test_the_load_is_not_logged_when_that_is_turned_off(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    with tracking.open_tracker("svip/test", "quiet") as tracker, tracking.system_metrics(tracker):
        tracker.log_metrics({"loss": 1.0})
    assert set(MlflowClient(store).get_run(tracker.run_id).data.metrics) == {"loss"}


def test_a_pipeline_done_again_comes_to_the_same_numbers(
    done: Experiment, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = steps.rerun(done.parent, "again", tolerance=0)
    assert result["agrees"] and result["differences"] == []
    verdicts = {line["name"]: line["verdict"] for line in result["metrics"]}
    assert set(verdicts.values()) == {"exact"}
    assert {"val/H", "train/loss", "final_train/loss", "test/H", "test/eszsl/none/H"} <= verdicts.keys()
    assert "test/oracle/H" not in verdicts, "the evaluation's own protocols"
    assert json.loads(Path("again/rerun.json").read_text()) == json.loads(json.dumps(result))

    again, evaluated = tracking.find_runs(result["rerun_id"])
    assert evaluated and again.tags["preset"] == "smoke"
    client = MlflowClient(store)
    assert client.get_run(again.run_id).data.params == client.get_run(done.train).data.params
    parent = client.get_run(result["rerun_id"])
    assert (parent.data.tags["rerun_of"], parent.data.tags["agrees"]) == (done.parent, "true")
    with pytest.raises(RerunError, match="again holds a finished rerun"):
        steps.rerun(done.parent, "again")


def test_an_interrupted_rerun_goes_on_with_what_it_keeps_below_SVIP_WORK(
    done: Experiment, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SVIP_WORK", str(tmp_path / "work"))

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("svip.steps.training.training_charts", stopped)  # when it has trained
        with pytest.raises(KeyboardInterrupt):
            steps.rerun(done.train, str(tmp_path / "again"))
    monkeypatch.setattr("svip.training.loop.train_step", None)  # not one step again
    result = steps.rerun(done.train, str(tmp_path / "again"), tolerance=0)
    assert result["agrees"] and not list((tmp_path / "work").iterdir())
    assert MlflowClient(store).get_run(result["rerun_id"]).info.status == "FINISHED"


def test_a_training_done_again_with_other_words_or_data_is_refused(done: Experiment, tmp_path: Path) -> None:
    other = write_bundle(tmp_path / "bundle", IMAGE_ROLES, other_tests=True)
    words = write_vectors(tmp_path / "words", other, seed=2)
    sha = done.bundle.sha256[:12]
    out = str(tmp_path / "out")
    with pytest.raises(RerunError, match=rf"needs bundle {sha}, and .* is {other.sha256[:12]}; give the same data"):
        steps.rerun(done.train, out, bundle=str(other.path))
    with pytest.raises(RerunError, match=rf"needs bundle {sha}, and .*is not a split bundle.*--bundle"):
        steps.rerun(done.train, out, bundle=str(tmp_path / "nothing"))
    with pytest.raises(RerunError, match=r"needs word vectors \w{12}, and .* holds \w{12}; give the same ones"):
        steps.rerun(done.train, out, vectors=str(words))
    assert not (tmp_path / "out" / "checkpoint").exists()


def test_a_dry_run_lists_what_differs_here_and_trains_nothing(
    done: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SVIP_IMAGE_DIGEST", "sha256:12")
    monkeypatch.setattr("svip.tracking.lineage.git_sha", lambda: "other")
    monkeypatch.setattr("svip.tracking.git_sha", lambda: "other")
    result = steps.rerun(done.train, str(tmp_path / "out"), dry_run=True)
    assert ("git_sha", result["lineage"]["git_sha"], "other") in result["differences"]
    assert ("image_digest", "", "sha256:12") in result["differences"]
    lineage = {**result["lineage"], "processes": "4"}
    assert "processes" not in {what for what, _, _ in differences(lineage)}, "so many train on the processor"
    assert ("processes", "4", "1") in differences({**lineage, "device": "cuda"}), "here is no GPU"
    assert not (tmp_path / "out").exists()


def test_a_number_that_is_another_is_told_by_the_exit_code(done: Experiment, store: str, tmp_path: Path) -> None:
    options = [*OPTIONS, "optim.epochs=1", "train.select=false"]
    out = tmp_path / "other"
    run = steps.train(str(done.bundle.path), str(done.vectors), str(out), "smoke", options, log_model=False)["run_id"]
    MlflowClient(store).log_metric(run, "final_train/loss", 99.0, step=1)  # as if it had come to this
    answer = CliRunner().invoke(app, ["rerun", run, "--out", str(tmp_path / "again")])
    assert answer.exit_code == 1
    assert "3 of 4 numbers agree exactly, at every step" in answer.stdout
    assert re.search(r"final_train/loss .* 99 .* differs", answer.stdout)


def test_what_was_tested_can_be_registered_and_loaded_by_its_alias(done: Experiment, store: str) -> None:
    registration = steps.register(str(done.checkpoint), name="svip-lineage-test")
    assert (registration.version, registration.alias) == ("1", "champion")
    run = MlflowClient(store).get_run(done.evaluate)
    assert registration.h.value == pytest.approx(run.data.metrics["test/H"])
    assert registration.h.low <= registration.h.value <= registration.h.high
    mlflow.set_tracking_uri(store)
    model = mlflow.pyfunc.load_model("models:/svip-lineage-test@champion")
    buffer = io.BytesIO()
    Image.fromarray(done.bundle.image(0)).save(buffer, "png")
    one, three = (model.predict(pd.DataFrame({"image": [buffer.getvalue()] * count})) for count in (1, 3))
    assert list(three["score"]) == pytest.approx([*one["score"]] * 3, rel=1e-5), "whatever the size of the batch"
    assert steps.register(done.evaluate, name="svip-lineage-test").reason == "it is the champion already"


def test_numbers_are_compared_in_points_or_in_percent() -> None:
    recorded = {"val/H": {1: 40.0, 2: 50.0}, "train/loss": {1: 2.0}, "val/T1": {1: 1.0}, "test/U": {0: 5.0}}
    again = {"val/H": {1: 0.0, 2: 50.5}, "train/loss": {1: 2.011}, "val/T1": {1: 1.0}, "test/S": {0: 5.0}}
    assert {line.name: line.verdict for line in agreements(recorded, again, 0.5)} == {
        "val/H": "within",
        "train/loss": "differs",  # 0.55 % off
        "val/T1": "exact",
        "test/U": "missing",
        "test/S": "missing",
    }


def test_runs_that_stand_for_no_training_are_refused(done: Experiment, store: str) -> None:
    with pytest.raises(TrackingError, match="has no such run"):
        tracking.find_runs("0" * 32)
    empty = steps.open_run("experiment-1", "smoke")
    assert "kfp_run_id" not in MlflowClient(store).get_run(empty).data.tags, "a plain number is no Kubeflow run"
    with pytest.raises(TrackingError, match="holds 0 finished trainings and 0 evaluations of them: expected one"):
        tracking.find_runs(empty)
    with (
        pytest.raises(KeyboardInterrupt),
        tracking.open_tracker("svip/test", "train", tags={"step": "train"}) as stopped,
    ):
        raise KeyboardInterrupt
    with pytest.raises(TrackingError, match="is KILLED: expected a finished one"):
        tracking.find_runs(stopped.run_id)
    with tracking.open_tracker("svip/test", "evaluate", tags={"step": "evaluate"}) as alone:
        pass
    with pytest.raises(TrackingError, match="does not say which run trained its checkpoint"):
        tracking.find_runs(alone.run_id)
