"""`svip tune` with real trainings of a tiny model on one machine, in a journal file."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
from mlflow import MlflowClient
from optuna.trial import FrozenTrial, TrialState
from small_training import TINY, write_bundle, write_vectors

from svip import steps
from svip.config import ConfigError, load_config
from svip.data.bundle import Bundle, read_bundle
from svip.steps import tuning
from svip.tuning import objective
from svip.tuning.storage import TuningError
from svip.tuning.worker import Stop, Stopped

IMAGE_ROLES = {
    "train": ["train"] * 4 + ["val_seen"] * 2 + ["test_seen"],
    "val_unseen": ["val_unseen"] * 3 + ["test_seen"],
    "test_unseen": ["test_unseen"] * 2,
}
SPACE = """
optim.lr: {low: 1e-4, high: 1e-2, log: true}
model.selected_groups: {low: 1, high: 3}
"""
KILLED_BETWEEN_SAVING_AND_TELLING = """
import os, signal, sys
from svip import steps
from svip.training import checkpoint

save = checkpoint.save_state

def save_and_die(path, model, optimizer, progress, *rest, **more):
    save(path, model, optimizer, progress, *rest, **more)
    if "0001" in str(path) and progress["epoch"] == 2:
        os.kill(os.getpid(), signal.SIGKILL)

checkpoint.save_state = save_and_die
steps.tune_worker(*sys.argv[1:4])
"""
SECOND_PROCESS_IS_KILLED_THREE_TIMES = """
import os, signal, sys, threading, time
from pathlib import Path

work = Path(os.environ.get("SVIP_WORK", ""))
killed = work / "killed.txt"

def times():
    return {path: path.stat().st_mtime_ns for path in work.glob("tuning/*/trials/*/select/state.pt")}

def kill():
    for _ in range(3):  # so that of the first two at least one is told
        before = times()
        while times() == before:
            time.sleep(0.01)
    with killed.open("a") as file:
        file.write("killed\\n")
    os.kill(os.getpid(), signal.SIGKILL)

deaths = len(killed.read_text().split()) if killed.exists() else 0
if "--worker" in sys.orig_argv and os.environ.get("RANK") == "1" and deaths < 3:
    threading.Thread(target=kill, daemon=True).start()
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """Bundle, word vectors, search space."""
    folder = tmp_path_factory.mktemp("inputs")
    bundle = write_bundle(folder / "bundle", IMAGE_ROLES)
    write_vectors(folder / "words", bundle)
    (folder / "space.yaml").write_text(SPACE)
    return str(bundle.path), str(folder / "words"), str(folder / "space.yaml")


def plan(inputs: tuple[str, str, str], out: Path, trials: int = 3, *overrides: str) -> tuple[str, str, str]:
    """A study that waits for workers; their arguments."""
    bundle, words, space = inputs
    steps.plan_tuning(bundle, words, str(out), "smoke", space, trials, 1, [*TINY, *overrides])
    return bundle, words, str(out)


def trials_of(out: Path) -> list[FrozenTrial]:
    backend = optuna.storages.journal.JournalFileBackend(str(out / "study.journal"))
    return optuna.load_study(study_name=None, storage=optuna.storages.JournalStorage(backend)).trials


def history(out: Path, number: int) -> list[dict[str, Any]]:
    entries = json.loads((out / "trials" / f"{number:04d}" / "history.json").read_text())
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in entries]


@pytest.mark.slow
def test_a_killed_workers_trial_goes_on_from_its_checkpoint_and_ends_as_if_nothing_had_happened(
    inputs: tuple[str, str, str], tmp_path: Path, store: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="svip")
    whole = plan(inputs, tmp_path / "whole")
    assert steps.tune_worker(*whole) == 3
    caplog.clear()
    arguments = plan(inputs, tmp_path / "killed")
    command = [sys.executable, "-c", KILLED_BETWEEN_SAVING_AND_TELLING, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as this process: sums depend on it
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    dead = trials_of(tmp_path / "killed")[1]
    assert (dead.state, list(dead.intermediate_values)) == (TrialState.RUNNING, [1]), "epoch 2 is saved, not told"
    run_id = dead.user_attrs["run_id"]

    assert steps.tune_worker(*arguments) == 2
    trials = trials_of(tmp_path / "killed")
    assert [trial.state for trial in trials] == [TrialState.COMPLETE, TrialState.FAIL, *[TrialState.COMPLETE] * 2]
    resumed = trials[3]
    assert (resumed.user_attrs["resumes"], resumed.user_attrs["run_id"]) == (1, run_id)
    said = [record.message for record in caplog.records]
    trained = [int(found[1]) for line in said if (found := re.match(r"select epoch (\d)", line))]
    assert trained == [3, 1, 2, 3], "the resumed trial comes first, with the one epoch that it lacks"
    # the journals differ in numbers only: same parameters, same epochs, bit for bit
    assert resumed.params == trials_of(tmp_path / "whole")[1].params
    assert history(tmp_path / "killed", 3) == history(tmp_path / "whole", 1)
    assert resumed.intermediate_values == trials_of(tmp_path / "whole")[1].intermediate_values

    client = MlflowClient(store)
    run = client.get_run(run_id)
    assert (run.info.status, run.data.tags["trial.number"], run.data.tags["trial.resumes"]) == ("FINISHED", "3", "1")
    told = client.get_metric_history(run_id, "val/H")
    assert {metric.step: metric.value for metric in told} == resumed.intermediate_values and len(told) == 3
    left = {path.name for path in (tmp_path / "killed" / "trials").rglob("*") if path.is_file()}
    assert left == {"config.yaml", "history.json", "run_id"}, "nothing heavy stays"


@pytest.mark.slow
def test_the_command_tunes_goes_on_and_says_what_to_do_next(
    inputs: tuple[str, str, str], tmp_path: Path, store: str
) -> None:
    bundle, words, space = inputs
    out = tmp_path / "study"
    options = ["--bundle", bundle, "--vectors", words, "--space", space, "--workers", "2", "--seed", "3", *TINY]

    def svip(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "svip.cli", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    done = svip("tune", "-o", str(out), "--trials", "4", *options)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(out / "trials.csv")
    assert len(table) == 4 and set(table["state"]) <= {"complete", "pruned"}
    best = table[table["state"] == "complete"]["H"].max()
    assert f"H {best:.1f} on the validation classes" in done.stdout
    assert done.stderr.count("trial   ") == 4
    tuned, preset = load_config(str(out / "best.yaml")), load_config("smoke", TINY)
    assert tuned.optim.lr == table[table["H"] == best]["optim.lr"].iloc[0]
    assert table["optim.lr"].iloc[0] == preset.optim.lr, "the first trial is the preset itself"

    client = MlflowClient(store)
    (parent,) = client.search_runs(
        [client.get_experiment_by_name("svip/synthetic").experiment_id],  # type: ignore[union-attr]
        f"tags.study = '{json.loads((out / 'study.json').read_text())['name']}' and tags.step = 'tune'",
    )
    assert (parent.info.status, parent.data.metrics["best/val/H"]) == ("FINISHED", best)
    assert {"tuning.html", "best.yaml", "history.png", "slice.png"} <= {
        file.path for file in client.list_artifacts(parent.info.run_id)
    }

    before = (out / "study.journal").stat().st_size
    again = svip("tune", "-o", str(out), "--trials", "4", *options)
    assert (again.returncode, again.stdout) == (0, done.stdout), "a finished study is only shown"
    assert "trial   " not in again.stderr
    refused = svip("tune", "-o", str(out), "--trials", "4", *options, "optim.epochs=2", "model.sigma=9")
    assert refused.returncode == 1
    assert "model.sigma: 40.0 -> 9.0; optim.epochs: 3 -> 2" in refused.stderr
    assert "use the same to go on" in refused.stderr
    assert (out / "study.journal").stat().st_size <= before + 400, "but for the number of trials"
    more = svip("tune", "-o", str(out), "--trials", "5", *options)
    assert more.returncode == 0 and len(pd.read_csv(out / "trials.csv")) == 5


@pytest.mark.slow
def test_an_interrupted_command_stops_its_workers_and_the_next_one_finishes(
    inputs: tuple[str, str, str], tmp_path: Path, store: str
) -> None:
    bundle, words, space = inputs
    out = tmp_path / "study"
    options = ["--bundle", bundle, "--vectors", words, "-o", str(out), "--space", space, "--trials", "2"]
    options += ["--pruner", "none", *TINY, "optim.epochs=16"]
    command = [sys.executable, "-m", "svip.cli", "tune", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not list(out.glob("trials/*/select/state.pt")):
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=90)
    assert first.returncode != 0 and re.search(r"stopped: \d of 2 trials are done; the same command goes on", said)
    stopped = [trial for trial in trials_of(out) if trial.user_attrs.get("stopped")]
    assert len(stopped) == 1 and not [trial for trial in trials_of(out) if trial.state is TrialState.RUNNING]
    assert MlflowClient(store).get_run(stopped[0].user_attrs["run_id"]).info.status == "KILLED"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    trials = trials_of(out)
    assert sum(trial.state is TrialState.COMPLETE for trial in trials) == 2
    (resumed,) = [trial for trial in trials if "resumes" in trial.user_attrs]
    assert "resumed after epoch" in (out / "workers" / f"{socket.gethostname()}-0.log").read_text()
    assert len(resumed.intermediate_values) == 16


def test_a_diverging_trial_is_a_failure_with_its_reason_and_too_many_stop_the_study(
    inputs: tuple[str, str, str], tmp_path: Path, store: str
) -> None:
    bundle, words, _ = inputs
    space = tmp_path / "space.yaml"
    space.write_text("optim.lr: {low: 1e30, high: 1e35, log: true}")
    steps.plan_tuning(
        bundle, words, str(tmp_path / "s"), "smoke", str(space), 2, 1, [*TINY, "optim.head_lr=1e35", "optim.warmup=0"]
    )
    with pytest.raises(TuningError, match=r"2 trials failed.*NonFiniteLoss: the .* phase select.*--max-errors"):
        steps.tune_worker(bundle, words, str(tmp_path / "s"), max_errors=2)
    failed = [trial for trial in trials_of(tmp_path / "s") if trial.state is TrialState.FAIL]
    assert [trial.user_attrs["error"][:13] for trial in failed] == ["NonFiniteLoss"] * 2
    run = MlflowClient(store).get_run(failed[0].user_attrs["run_id"])
    assert run.info.status == "FAILED" and run.data.tags["error"].startswith("NonFiniteLoss")


def test_a_trial_that_goes_on_and_is_then_pruned_keeps_its_earlier_epochs(
    inputs: tuple[str, str, str], tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = plan(inputs, tmp_path, 1, "optim.epochs=4")

    def stop_once_then_prune(self: optuna.trial.Trial) -> bool:
        last = self.storage.get_trial(self._trial_id).last_step
        if (self.number, last) == (0, 2):
            os.kill(os.getpid(), signal.SIGTERM)
        return (self.number, last) == (1, 3)

    monkeypatch.setattr(optuna.trial.Trial, "should_prune", stop_once_then_prune)
    with pytest.raises(Stopped):
        steps.tune_worker(*arguments)
    stopped = MlflowClient(store).get_run(trials_of(tmp_path)[0].user_attrs["run_id"])
    assert (stopped.info.status, stopped.data.tags["trial.state"]) == ("KILLED", "stopped")
    assert steps.tune_worker(*arguments) == 1
    pruned = trials_of(tmp_path)[1]
    assert (pruned.state, pruned.user_attrs["resumes"]) == (TrialState.PRUNED, 0)
    epochs = history(tmp_path, 1)
    assert {entry["epoch"]: entry["val/H"] for entry in epochs} == pruned.intermediate_values
    assert list(pruned.intermediate_values) == [1, 2, 3]
    run = MlflowClient(store).get_run(stopped.info.run_id)
    assert (run.info.status, run.data.tags["trial.state"]) == ("FINISHED", "pruned")
    assert run.data.metrics["best/val/H"] == max(pruned.intermediate_values.values())


def test_tuning_reads_no_test_image(
    inputs: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: set[str] = set()
    image = Bundle.image

    def noted(self: Bundle, row: int) -> Any:
        read.add(self.split["role"].iat[row])
        if read & {"test_seen", "test_unseen"}:
            raise OSError("a test image was read")
        return image(self, row)

    monkeypatch.setattr(Bundle, "image", noted)
    arguments = plan(inputs, tmp_path / "study", 2, "model.head_init=probe", "train.published=true", "optim.epochs=1")
    assert steps.tune_worker(*arguments) == 2
    assert read == {"train", "val_seen", "val_unseen"}
    steps.tuning_report(arguments[2], str(tmp_path / "report"))
    assert read == {"train", "val_seen", "val_unseen"}


def test_an_address_for_work_is_warned_of_since_tuning_knows_folders_only(
    inputs: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SVIP_WORK", "s3://team/work")
    with caplog.at_level("WARNING", logger="svip.steps.tuning"):
        plan(inputs, tmp_path / "study", 1)
    assert "SVIP_WORK=s3://team/work is no folder" in caplog.text
    assert (tmp_path / "study" / "study.json").exists()


def test_the_objective_stops_whoever_asks_for_test_images(inputs: tuple[str, str, str]) -> None:
    bundle = read_bundle(inputs[0])
    guarded = objective.ValidationBundle.of(bundle)
    assert len(guarded.rows("train", "val_seen", "val_unseen")) == 4 * 6 + 2 * 3
    with pytest.raises(AssertionError, match="test_seen"):
        guarded.rows("train", "test_seen")
    with pytest.raises(AssertionError, match="test_unseen"):
        guarded.image(int(bundle.rows("test_unseen")[0]))
    reopen, arguments = guarded.__reduce__()
    assert isinstance(reopen(*arguments), objective.ValidationBundle), "in the loader's processes too"


def test_two_machines_that_begin_at_once_share_one_study(
    inputs: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, begin = threading.Barrier(2, timeout=60), tuning._begin

    def begin_at_once(path: Path, record: dict[str, Any]) -> bool:
        together.wait()
        return begin(path, record)

    monkeypatch.setattr(tuning, "_begin", begin_at_once)
    with ThreadPoolExecutor(2) as machines:
        for planned in [machines.submit(plan, inputs, tmp_path, 2) for _ in range(2)]:
            planned.result()
    assert {trial.user_attrs["slot"] for trial in trials_of(tmp_path)} == {0, 1}, "and there is no other study"
    assert {path.name for path in tmp_path.iterdir()} == {"study.json", "study.journal", "config.yaml", "locks"}


def test_a_study_without_validation_classes_is_refused(inputs: tuple[str, str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.select=false: tuning needs the validation classes"):
        plan(inputs, tmp_path / "study", 2, "train.select=false")
    assert not (tmp_path / "study").exists()


def test_workers_in_other_pods_without_a_database_are_refused(
    inputs: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    with pytest.raises(TuningError, match="set SVIP_TUNING_STORAGE"):
        plan(inputs, tmp_path / "study")


def test_a_database_that_is_away_is_told_without_its_password(inputs: tuple[str, str, str], tmp_path: Path) -> None:
    pytest.importorskip("psycopg2", reason="needs a PostgreSQL driver: pip install 'svip[cluster]'")
    bundle, words, space = inputs
    for address, shown in (
        ("postgresql://me:s3cr@t@127.0.0.1:9/x", "me:***@127.0.0.1:9/x"),
        ("postgresql://127.0.0.1:9/x?user=me&password=s3cret", "127.0.0.1:9/x?user=me&password=***"),
    ):
        with pytest.raises(TuningError) as caught:
            steps.tune(bundle, words, str(tmp_path), "smoke", space, storage=address, overrides=TINY)
        assert "s3cr" not in str(caught.value) and shown in str(caught.value)
        assert caught.value.__cause__ is None


def test_a_signal_waits_until_nothing_is_halfway() -> None:
    done = []
    with pytest.raises(Stopped) as caught, Stop() as stop, stop.possible():
        with stop.possible(False):
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("told")
        done.append("trained on")
    assert done == ["told"]
    assert caught.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.slow
def test_a_trial_of_which_one_process_dies_goes_on_from_its_checkpoint_and_after_three_deaths_has_failed(
    inputs: tuple[str, str, str], tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(SECOND_PROCESS_IS_KILLED_THREE_TIMES)  # Python imports it
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'hook'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("SVIP_WORK", str(work))
    bundle, words, space = inputs
    out, overrides = tmp_path / "study", [*TINY, "optim.epochs=60"]
    steps.plan_tuning(bundle, words, str(out), "smoke", space, 1, 1, overrides, name="three")
    assert steps.tune_worker(bundle, words, str(out), processes=2) == 1

    trials = trials_of(work / "tuning" / "three")
    assert [trial.state for trial in trials] == [TrialState.FAIL] * 4 + [TrialState.COMPLETE]
    assert [trial.user_attrs.get("deaths", 0) for trial in trials] == [0, 1, 2, 3, 0]
    assert [trial.user_attrs.get("error") for trial in trials[2:4]] == [None, "DiedTooOften: its worker died 3 times"]
    assert not [trial for trial in trials if "stopped" in trial.user_attrs]
    epochs = [len(trial.intermediate_values) for trial in trials]
    assert 1 <= epochs[0] < epochs[1] < epochs[2] == epochs[3], "each went on where the one before was killed"
    assert trials[3].params == trials[0].params != trials[4].params
    assert not (out / "trials").exists() and (work / "tuning" / "three" / "trials" / "0004").is_dir()
    runs = [MlflowClient(store).get_run(trial.user_attrs["run_id"]) for trial in trials]
    assert len({run.info.run_id for run in runs[:4]}) == 1
    assert (runs[3].info.status, runs[3].data.tags["trial.state"]) == ("FAILED", "failed")
    assert (runs[4].info.status, runs[4].data.tags["trial.state"]) == ("FINISHED", "complete")


@pytest.mark.slow
def test_processes_that_train_a_trial_together_agree_on_it_and_go_on_after_one_that_diverged(
    inputs: tuple[str, str, str], tmp_path: Path
) -> None:
    space = tmp_path / "space.yaml"
    space.write_text("optim.head_lr: {choices: [1.0e-3, 1.0e-2, 1.0e+35]}")
    found = {}
    for processes in (1, 2):
        arguments = plan((*inputs[:2], str(space)), tmp_path / str(processes), 4, "optim.warmup=0", "optim.epochs=2")
        assert steps.tune_worker(*arguments, processes=processes) == 4
        found[processes] = trials_of(tmp_path / str(processes))
    alone, together = found.values()
    assert [trial.state for trial in together] == [trial.state for trial in alone]
    assert TrialState.FAIL in {trial.state for trial in together}, "else nothing has diverged"
    for one, two in zip(alone, together, strict=True):
        assert two.params == one.params
        assert two.intermediate_values == pytest.approx(one.intermediate_values)
        assert ("error" in two.user_attrs) == ("error" in one.user_attrs)
