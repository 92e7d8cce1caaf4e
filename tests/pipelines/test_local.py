"""Running pipelines on this machine: what containers see of it, and what is refused before anything starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from pipelines import catalog, containers, local, record
from pipelines.catalog import PipelineError
from svip.config import load_config


def mounted(mounts: list[Any]) -> dict[str, bool]:
    """Path -> whether it can only be read; a path is the same inside as outside."""
    assert all(mount["Source"] == mount["Target"] for mount in mounts)
    return {mount["Source"]: mount["ReadOnly"] for mount in mounts}


def test_what_a_mounted_folder_holds_is_not_mounted_again(tmp_path: Path) -> None:
    (tmp_path / "work" / "data").mkdir(parents=True)
    (tmp_path / "glove.txt").touch()
    work, inner, vectors = (str(tmp_path / name) for name in ("work", "work/data", "glove.txt"))
    assert mounted(containers.mounts([work], [inner, vectors])) == {work: False, vectors: True}


def test_what_is_written_below_a_folder_that_is_only_read_is_mounted_by_itself(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    made = mounted(containers.mounts([str(tmp_path / "out")], [str(tmp_path)]))
    assert made == {str(tmp_path / "out"): False, str(tmp_path): True}


def test_a_link_out_of_the_working_folder_leads_somewhere_in_the_container_too(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "data").symlink_to(tmp_path / "disk")
    made = mounted(containers.mounts([str(tmp_path / "work")], [str(tmp_path / "work" / "data")]))
    assert made == {str(tmp_path / "work"): False, str(tmp_path / "disk"): True}


def test_the_files_that_a_configuration_names_are_seen_and_addresses_and_names_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for variable in containers.NAME_FILES:
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "tables").mkdir()
    for name in ("glove.zip", "tables/images.csv", "vit.safetensors", "mine.yaml"):
        (tmp_path / name).touch()
    overrides = [
        f"semantics.vectors={tmp_path}/glove.zip::glove.6B.300d.txt",
        f"data.images={tmp_path}/tables/images.csv",
        "data.mirror=s3://team/zsl",
        f"model.weights={tmp_path}/vit.safetensors",
    ]
    config = load_config("smoke", overrides)
    named = containers.sources(config, str(tmp_path / "mine.yaml"))
    expected = {tmp_path / name for name in ("glove.zip", "tables", "vit.safetensors", "mine.yaml")}
    assert set(map(Path, named)) == expected
    assert containers.sources(load_config("smoke", ["model.weights=timm"]), "smoke", "paper") == []


def test_a_search_space_and_the_files_that_variables_name_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setenv("SVIP_OUTBOX", str(tmp_path / "outbox"))
    files = ["MLFLOW_TRACKING_SERVER_CERT_PATH", "AWS_CA_BUNDLE", "AWS_SHARED_CREDENTIALS_FILE", "space.yaml"]
    for name in files:
        (tmp_path / name).touch()
        monkeypatch.setenv(name, str(tmp_path / name))
    named = containers.sources(load_config("smoke"), "smoke", str(tmp_path / "space.yaml"))
    assert set(map(Path, named)) == {tmp_path / name for name in files}
    assert containers.tracking_folders() == [str(tmp_path / "outbox")]
    assert (tmp_path / "outbox").is_dir(), "Docker would make it as root"


def test_containers_inherit_settings_and_credentials_and_nothing_else() -> None:
    outside = {"AWS_SECRET_ACCESS_KEY": "s", "MLFLOW_TRACKING_URI": "m", "HTTPS_PROXY": "p", "SSH_AUTH_SOCK": "x"}
    passed = containers.passed_environment({**outside, "PATH": "/bin", "TMPDIR": "/var/mine"})
    assert {name: passed[name] for name in outside if name in passed} == {
        "AWS_SECRET_ACCESS_KEY": "s",
        "MLFLOW_TRACKING_URI": "m",
        "HTTPS_PROXY": "p",
    }
    assert passed["TMPDIR"] == "/tmp"
    assert "PATH" not in passed


def test_a_step_that_left_less_than_it_should_is_found_by_its_outputs(tmp_path: Path) -> None:
    def artifact(name: str, kind: str) -> dict[str, Any]:
        return {"artifacts": [{"uri": str(tmp_path / name), "type": {"schemaTitle": kind}}]}

    outputs = {
        "parameters": {"Output": {}},
        "outputFile": str(tmp_path / "executor_output.json"),
        "artifacts": {
            "checkpoint": artifact("checkpoint", "system.Model"),
            "metrics": artifact("metrics", "system.Metrics"),
        },
    }
    command = ["sh", "-ec", "...", "--executor_input", json.dumps({"outputs": outputs}), "--function_to_execute", "f"]
    assert containers.missing_outputs(command) == [outputs["outputFile"], str(tmp_path / "checkpoint")]
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "executor_output.json").touch()
    assert containers.missing_outputs(command) == []


def test_an_unknown_runner_and_an_engine_that_does_not_answer_are_said_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PipelineError, match="unknown runner 'podman'; there are: subprocess, docker"):
        local.run("experiment", "smoke", [], tmp_path / "out", runner="podman")
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nowhere.sock")
    with pytest.raises(PipelineError, match="no Docker engine answers at unix://.*nowhere.sock: start one"):
        local.run("experiment", "smoke", [], tmp_path / "out", runner="docker")


class Run:
    """A run of the smoke experiment that is begun in ``folder``, to be interfered with."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        settings = {**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
        command = [sys.executable, "-m", "svip.cli", "pipeline", "run", "experiment", "--out", "out", *overrides]
        self._log = folder / "said"
        with self._log.open("w") as said:
            self.process = subprocess.Popen(command, cwd=folder, env=settings, stdout=said, stderr=said)

    @property
    def said(self) -> str:
        return self._log.read_text()

    def wait_for(self, line: str) -> int:
        """Wait until it said so; the process of the step that runs."""
        deadline = time.monotonic() + 600
        steps: list[psutil.Process] = []
        while line not in self.said or len(steps) != 1:
            assert time.monotonic() < deadline and self.process.poll() is None, self.said
            time.sleep(0.1)
            steps = psutil.Process(self.process.pid).children()
        return int(steps[0].pid)


def experiment(*overrides: str, preset: str = "smoke") -> dict[str, Any]:
    return record.asked_for("experiment", preset, load_config(preset, overrides), {})


def test_a_run_that_failed_is_gone_on_with_also_when_one_in_between_did_not_get_far(tmp_path: Path) -> None:
    def begin(preset: str, job: str) -> str:
        """What a run is told to continue that gets as far as its first step, if it has a job."""
        continues = record.begin(tmp_path, experiment(preset=preset))
        (tmp_path / "pipeline.log").write_text(f'        "job": "{job}",\n' if job else "")
        return continues

    assert [begin("smoke", "1"), begin("smoke", ""), begin("smoke", "3"), begin("smoke", "")] == ["", "1", "1", "3 1"]
    assert begin("paper/cub", "5") == "", "it was asked for another"
    assert begin("paper/cub", "") == "5"


def finished(folder: Path, asked: dict[str, Any]) -> Path:
    """As if a run had come to its end there."""
    record.begin(folder, asked)
    for name in catalog.RESULTS[asked["pipeline"]]:
        (folder / name).touch()
    record.finish(folder, asked)
    return folder


def test_a_folder_with_results_is_finished_for_the_same_settings_and_refuses_others(tmp_path: Path) -> None:
    out = finished(tmp_path, experiment("optim.epochs=2"))
    assert record.is_finished(out, experiment("optim.epochs=2"))
    assert record.is_finished(out, experiment("optim.epochs=2", "train.workers=3")), "it changes no number"
    with pytest.raises(
        PipelineError, match=r"holds the results of other settings \(optim.lr: 0.\d+ -> 0.5\); use anot"
    ):
        record.is_finished(out, experiment("optim.epochs=2", "optim.lr=0.5"))
    ablation = record.asked_for("ablation", "smoke", load_config("smoke", ["optim.epochs=2"]), {"seeds": 2})
    with pytest.raises(PipelineError, match=r"\(pipeline: experiment -> ablation\)"):
        record.is_finished(out, ablation)
    (out / "metrics.json").unlink()
    assert not record.is_finished(out, experiment("optim.epochs=2")), "a result is gone, and is made anew"
    assert record.begin(out, experiment("optim.epochs=2")) == "", "but not in the run that had finished"
    for other in ("optim.epochs=3", "evaluation.eszsl=false"):
        with pytest.raises(PipelineError, match="holds the results of other settings"):
            record.is_finished(out, experiment("optim.epochs=2", other))


def test_results_are_of_the_files_content_that_the_settings_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"data.images": "images.csv", "data.attributes": "birds.csv", "semantics.vectors": "glove.txt"}
    for name in files.values():
        (tmp_path / name).write_text("0.25")
    asked = [f"{key}={tmp_path / name}" for key, name in files.items()]
    (tmp_path / "out").mkdir()
    out = finished(tmp_path / "out", experiment(*asked))
    os.utime(tmp_path / "birds.csv", (1, 1))
    assert record.is_finished(out, experiment(*asked)), "the same content"
    for name in files.values():
        (tmp_path / name).write_text("0.75")
        with pytest.raises(PipelineError, match=rf"of other settings \(content of \S+/{name}\); use another --out"):
            record.is_finished(out, experiment(*asked))
        (tmp_path / name).write_text("0.25")
    monkeypatch.setattr(record, "HASHED", 3)  # bytes: too large to be read each time
    large = finished(tmp_path / "out", experiment(*asked))
    assert record.is_finished(large, experiment(*asked))
    os.utime(tmp_path / "glove.txt", (1, 1))
    with pytest.raises(PipelineError, match=r"\(content of \S+/glove.txt\)"):
        record.is_finished(large, experiment(*asked))


@pytest.mark.parametrize("content", ["", '{"asked": {', "[]", "{}"])
def test_a_damaged_record_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "pipeline.json").write_text(content)
    with pytest.raises(PipelineError, match="pipeline.json is damaged, .* use another --out"):
        record.is_finished(tmp_path, experiment())


def test_a_folder_in_which_training_has_begun_is_kept_for_its_settings(tmp_path: Path) -> None:
    record.begin(tmp_path, experiment("data.seed=1"))
    training = tmp_path / "work" / "svip-1" / "select"
    training.mkdir(parents=True)
    assert not record.is_finished(tmp_path, experiment("data.seed=2")), "nothing would be lost"
    (training / "state.pt").touch()
    assert not record.is_finished(tmp_path, experiment("data.seed=1", "train.workers=0")), "it is gone on with"
    (tmp_path / "pipeline.log").write_text('        "job": "7",\n')
    evaluated_otherwise = experiment("data.seed=1", "evaluation.eszsl=false")
    assert not record.is_finished(tmp_path, evaluated_otherwise), "its training is gone on with too"
    assert record.begin(tmp_path, evaluated_otherwise) == "7", "in the same run"
    with pytest.raises(
        PipelineError, match=r"was begun with other settings \(data.seed: 1 -> 2\); use the same to go on"
    ):
        record.is_finished(tmp_path, experiment("data.seed=2"))


def test_a_second_run_in_a_folder_is_refused_while_the_first_is_at_work(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from svip.data.transfer import locked\n"
    code += "with locked(Path(sys.argv[1]), inside=True): print('at work', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdin and first.stdout and first.stdout.readline() == b"at work\n"
        with pytest.raises(ValueError, match=r"another process is at work on \S+/out; wait until .* another --out"):
            local.run("experiment", "smoke", [], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"], "nothing was begun"


def test_a_folder_with_results_of_other_commands_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "evaluation").mkdir()
    with pytest.raises(PipelineError, match="holds evaluation of no known pipeline; use another --out"):
        local.run("experiment", "smoke", [], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation"]


def test_a_tuning_is_another_one_with_another_space_and_the_same_with_other_workers(tmp_path: Path) -> None:
    def tuning(**given: Any) -> dict[str, Any]:
        return record.asked_for("tuning", "smoke", load_config("smoke"), {"space": "", "trials": 10, **given})

    out = finished(tmp_path, tuning(workers=2))
    assert record.is_finished(out, tuning(workers=1, space="smoke")), "the preset's own"
    with pytest.raises(PipelineError, match=r"\(space\)"):
        record.is_finished(out, tuning(space="paper"))
    with pytest.raises(PipelineError, match=r"\(trials: 10 -> 11\)"):
        record.is_finished(out, tuning(trials=11))


@pytest.mark.parametrize(
    ("pipeline", "parameters", "said"),
    [
        ("ablaton", {}, "unknown pipeline 'ablaton'; did you mean 'ablation'"),
        ("ablation", {"variants": ["baseline", "ful"]}, "unknown variant 'ful'; did you mean 'full'"),
        ("ablation", {"seeds": -1}, "seeds=-1: expected at least 1"),
        ("tuning", {"space": "papper"}, "unknown search space 'papper'; did you mean 'paper'"),
        ("tuning", {"space": "none.yaml"}, "search space none.yaml does not exist"),
        ("experiment", {"overrides": ["model.weights=no.safetensors"]}, r"model\.weights: no file no\.safetensors"),
    ],
)
def test_what_is_mistyped_is_told_before_anything_starts(
    tmp_path: Path, pipeline: str, parameters: dict[str, Any], said: str
) -> None:
    with pytest.raises((PipelineError, ValueError), match=said):
        local.run(pipeline, "smoke", out=tmp_path / "out", **{"overrides": [], **parameters})
    assert not (tmp_path / "out").exists()


LOOP = """
import sys
from pathlib import Path

from kfp import dsl

from pipelines import catalog, local


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def wait(number: int):
    import os, pathlib, signal, sys, time

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
    pathlib.Path(f"{number}.part").write_text(str(os.getpid()))
    os.rename(f"{number}.part", f"{number}.started")
    try:
        time.sleep(100)
    finally:
        pathlib.Path(f"{number}.ended").touch()


@dsl.pipeline
def loop(preset: str = "", overrides: list = []):
    with dsl.ParallelFor([1, 2, 3, 4]) as number:
        wait(number=number)


catalog.RESULTS["loop"] = {}
catalog.PIPELINES += ("loop",)
sys.modules["pipelines.loop"] = sys.modules["__main__"]
local.run("loop", "smoke", [], Path("out"))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_loop_that_is_stopped_ends_its_steps_and_begins_no_other(tmp_path: Path, number: int) -> None:
    (tmp_path / "loop.py").write_text(LOOP)
    process = subprocess.Popen([sys.executable, "loop.py"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("*.started"))) < 2:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert said.index("stopping ...") < said.index("stopped. The same command starts it again.")
    started = sorted(path.stem for path in tmp_path.glob("*.started"))
    assert len(started) == 2
    assert sorted(path.stem for path in tmp_path.glob("*.ended")) == started, "the steps had time to close their runs"
    for path in tmp_path.glob("*.started"):
        assert not Path(f"/proc/{path.read_text()}").exists()


def statuses(folder: Path) -> tuple[str, list[str]]:
    """Of the pipeline's MLflow run, and of those nested in it."""
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("svip/synthetic")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    return parent.info.status, [run.info.status for run in runs if run is not parent]


@pytest.mark.slow
def test_a_terminated_pipeline_ends_its_step_and_its_runs(tmp_path: Path) -> None:
    run = Run(tmp_path)
    try:
        step = run.wait_for("== train")
        run.process.send_signal(signal.SIGTERM)
        assert run.process.wait(60) != 0
    finally:
        run.process.kill()
    assert not Path(f"/proc/{step}").exists()
    assert "stopped. The same command" in run.said
    parent, nested = statuses(tmp_path)
    assert parent == "KILLED"
    assert set(nested) <= {"KILLED"}


@pytest.mark.slow
def test_the_command_of_a_pipeline_that_was_killed_goes_on_with_its_training(tmp_path: Path) -> None:
    tiny = ["model.backbone_args.depth=1", "model.backbone_args.embed_dim=32", "model.backbone_args.num_heads=2"]
    settings = (*tiny, "model.hidden=8", "optim.epochs=2")
    first = Run(tmp_path, *settings)
    step = first.wait_for("select epoch 1: loss")
    while not list((tmp_path / "out" / "work").rglob("state.pt")):  # it says so before it saves
        assert first.process.poll() is None, first.said
        time.sleep(0.05)
    os.kill(first.process.pid, signal.SIGKILL)
    os.kill(step, signal.SIGKILL)
    first.process.wait(60)

    settings = (*settings, "evaluation.eszsl=false")  # which the training doesn't look at
    again = Run(tmp_path, *settings, "train.checkpoint_steps=1000")  # which changes no number
    try:
        assert again.process.wait(600) == 0, again.said
    finally:
        again.process.terminate()
    assert "select: resumed after epoch 1" in again.said
    assert "select epoch 1: loss" not in again.said
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["settings"]["evaluation.eszsl"] is False and not metrics["comparators"]
    parent, nested = statuses(tmp_path)
    assert {parent, *nested} == {"FINISHED"}, "the runs were gone on with too"
    assert not (tmp_path / "out" / "work").exists()

    third = Run(tmp_path, *settings, "train.device=cpu")
    assert third.process.wait(300) == 0, third.said
    assert "out: the pipeline has finished already" in third.said
    assert "== " not in third.said, "no step runs"
    assert third.said.count("SVIP") == again.said.count("SVIP"), "the same table"
    other = Run(tmp_path, *settings, "optim.epochs=3")
    assert other.process.wait(300) == 1
    assert "error: out holds the results of other settings (optim.epochs: 2 -> 3); use another --out" in other.said
