"""Workers of one study on a real PostgreSQL: exactly N trials end well, whoever is killed or stopped meanwhile.

What is trained is a cheap function of the parameters; storage, processes, signals and MLflow are real.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from mlflow import MlflowClient
from optuna.trial import FrozenTrial, TrialState
from small_training import TINY, write_bundle, write_vectors

from benchmarks.postgres import new_database
from svip import steps

TRIALS, WORKERS, EPOCHS = 60, 4, 4
IMAGE_ROLES = {
    "train": ["train"] * 2 + ["val_seen", "test_seen"],
    "val_unseen": ["val_unseen", "test_seen"],
    "test_unseen": ["test_unseen"],
}
SPACE = """
optim.lr: {low: 1e-5, high: 1e-1, log: true}
model.sigma: {low: 1, high: 50}
optim.schedule: {choices: [step, cosine]}
optim.warmup: {low: 0, high: 0.5, when: {optim.schedule: [cosine]}}
"""
WORKER = f"""
import json, logging, math, sys, time
logging.basicConfig(level=logging.DEBUG)
from svip import steps
from svip.training.loop import NonFiniteLoss
from svip.tuning import team, worker

def select(config, bundle, words, folder, report):
    state = folder / "state.json"
    history = json.loads(state.read_text()) if state.exists() else []
    while len(history) < {EPOCHS}:
        time.sleep(0.04)
        if config.model.sigma > 46:
            raise NonFiniteLoss("the loss is nan")
        epoch = len(history) + 1
        height = 60 - 4 * (math.log10(config.optim.lr) + 3) ** 2 - config.model.sigma / 5 + epoch
        metrics = {{"val/H": height, "val/T1": 1.0, "train/loss": 1 / epoch}}
        history.append({{"epoch": epoch, **metrics}})
        with open(folder / "trained.txt", "a") as file:
            file.write(f"{{epoch}}\\n")
        state.write_text(json.dumps(history))
        report(metrics, epoch)
    return history

team.select = select
worker.epochs_of = lambda folder: json.loads((folder / "state.json").read_text())
print(steps.tune_worker(*sys.argv[1:4], max_errors=100))
"""


@pytest.fixture
def databases(postgres: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """Optuna's database and MLflow's, set in the environment."""
    addresses = new_database(postgres, "optuna"), new_database(postgres, "mlflow")
    monkeypatch.setenv("SVIP_TUNING_STORAGE", addresses[0])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", addresses[1].replace("postgresql://", "postgresql+psycopg2://"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield addresses


@functools.cache
def study_of(address: str, name: str) -> optuna.Study:
    """One for all looks at it, as each has connections of its own."""
    url = address.replace("postgresql://", "postgresql+psycopg2://")
    return optuna.load_study(study_name=name, storage=url)


def trials_of(address: str, name: str) -> list[FrozenTrial]:
    return study_of(address, name).trials


def wait_for_trial_of(pid: int, address: str, name: str) -> FrozenTrial:
    """A trial that the worker is training, one epoch of which has been told."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        trials = trials_of(address, name)
        mine = [trial for trial in trials if trial.user_attrs.get("worker", "").endswith(f":{pid}")]
        started = sum(trial.state.is_finished() for trial in trials) > 8
        if started and mine and mine[-1].state is TrialState.RUNNING and mine[-1].intermediate_values:
            return mine[-1]
        time.sleep(0.02)
    raise AssertionError("no trial of that worker was seen")


@pytest.mark.slow
def test_sixty_trials_by_four_workers_of_which_one_is_killed_and_one_is_stopped(
    databases: tuple[str, str], tmp_path: Path
) -> None:
    bundle = write_bundle(tmp_path / "bundle", IMAGE_ROLES)
    write_vectors(tmp_path / "words", bundle)
    (tmp_path / "space.yaml").write_text(SPACE)
    (tmp_path / "worker.py").write_text(WORKER)
    overrides = [*TINY, f"optim.epochs={EPOCHS}"]
    parent = steps.open_run("tuning", "smoke", overrides)
    arguments = [str(bundle.path), str(tmp_path / "words"), str(tmp_path / "study")]
    bundle_path, words, study = arguments
    space = str(tmp_path / "space.yaml")
    names = steps.plan_tuning(
        *(bundle_path, words, study, "smoke", space, TRIALS, WORKERS, overrides, parent), name="sixty", heartbeat=1
    )
    assert len(names) == WORKERS
    command = [sys.executable, str(tmp_path / "worker.py"), *arguments]
    said = tmp_path / "study" / "said.log"
    with said.open("a") as log:  # at level DEBUG
        workers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) for _ in names]
    try:
        killed = wait_for_trial_of(workers[0].pid, databases[0], "sixty")
        workers[0].kill()
        stopped = wait_for_trial_of(workers[1].pid, databases[0], "sixty")
        workers[1].send_signal(signal.SIGTERM)
        counts = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [-signal.SIGKILL, 128 + signal.SIGTERM, 0, 0]
    assert all(int(count) > 0 for count in counts[2:])

    trials = trials_of(databases[0], "sixty")
    well = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    assert len(well) == TRIALS
    assert sorted(trial.user_attrs["slot"] for trial in well) == list(range(TRIALS)), "none is lost or doubled"
    assert {trial.state for trial in well} == {TrialState.COMPLETE, TrialState.PRUNED}
    failed = [trial for trial in trials if trial.state is TrialState.FAIL]
    assert len(trials) == len(well) + len(failed), "nothing waits or runs any more"
    errors = [trial for trial in failed if "error" in trial.user_attrs]
    assert all(trial.user_attrs["error"] == "NonFiniteLoss: the loss is nan" for trial in errors)
    assert all(trial.params["model.sigma"] > 46 for trial in errors)

    # the killed worker's trial and the stopped one's were gone on with, by the same parameters and no epoch twice
    resumed = {trial.user_attrs["resumes"]: trial for trial in trials if "resumes" in trial.user_attrs}
    interrupted = [trial for trial in failed if trial not in errors]
    assert (
        {trial.number for trial in interrupted}
        == resumed.keys()
        >= {killed.number} | ({stopped.number} if trials[stopped.number].state is TrialState.FAIL else set())
    )
    for trial in interrupted:
        successor = resumed[trial.number]
        assert successor.params == trial.params and successor in well
        assert successor.intermediate_values.items() >= trial.intermediate_values.items()
    for folder in (tmp_path / "study" / "trials").iterdir():
        epochs = (folder / "trained.txt").read_text().split() if (folder / "trained.txt").exists() else []
        assert len(set(epochs)) == len(epochs), folder.name

    # MLflow says the same of each
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("svip/synthetic")
    assert experiment is not None
    query = f"tags.`mlflow.parentRunId` = '{parent}'"
    runs = {int(run.data.tags["trial.number"]): run for run in client.search_runs([experiment.experiment_id], query)}
    assert runs.keys() == {trial.number for trial in [*well, *errors]}
    for trial in well:
        run = runs[trial.number]
        assert (run.info.status, run.data.tags["trial.state"]) == ("FINISHED", trial.state.name.lower())
        told = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "val/H")}
        assert told == pytest.approx(trial.intermediate_values)
        assert len(client.get_metric_history(run.info.run_id, "val/H")) == len(told)
        assert float(run.data.params["optim.lr"]) == trial.params["optim.lr"]
        if trial.state is TrialState.COMPLETE:
            assert run.data.metrics["best/val/H"] == pytest.approx(trial.value)
    assert {runs[trial.number].info.status for trial in errors} <= {"FAILED"}

    best = steps.tuning_report(arguments[2], str(tmp_path / "report"), parent)
    assert best["H"] == max(float(trial.value or 0) for trial in well if trial.state is TrialState.COMPLETE)
    tags = client.get_run(parent).data.tags
    assert tags["best.trial"] == str(best["trial"]) and tags["best.overrides"] == " ".join(best["overrides"])
    files = {file.path for file in client.list_artifacts(parent)}
    assert files == {"tuning.html", "best.yaml", "trials.csv", "history.png", "importance.png", "slice.png"}
    password = databases[0].split(":")[2].split("@")[0]
    files_left = [path for folder in ("study", "report") for path in (tmp_path / folder).rglob("*") if path.is_file()]
    assert said in files_left and not [path for path in files_left if password.encode() in path.read_bytes()]
    assert password not in str([run.data.to_dictionary() for run in (*runs.values(), client.get_run(parent))])
    assert json.loads((tmp_path / "study" / "study.json").read_text())["storage"].count("***") == 1
