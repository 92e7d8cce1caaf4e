"""``svip train`` itself: processes killed from outside or around each file, and what MLflow keeps of it."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file
from small_training import TINY, write_bundle, write_vectors

from svip import steps
from svip.config import load_config
from svip.data.bundle import Bundle
from svip.predict import Predictor
from svip.training import checkpoint, loop

IMAGE_ROLES = {
    "train": ["train"] * 8 + ["val_seen", "test_seen"],
    "val_unseen": ["val_unseen"] * 4 + ["test_seen"],
    "test_unseen": ["test_unseen"] * 3,
}
OPTIONS = [*TINY, "train.checkpoint_steps=2"]
STEPS = 8  # of an epoch of the select phase
FINAL_STEPS = 11  # of the final phase, which has 44 images
FILES = {
    *("bundle.sha256", "classes.parquet", "config.yaml", "history.json", "model.json", "model.safetensors"),
    *("select/best.safetensors", "select/history.json"),
}
"""All that a training leaves; the command adds the names of its MLflow run."""
WEIGHTS = ("model.safetensors", "select/best.safetensors")
CHARTS = {"charts/losses.png", "charts/validation.png"}
COMMAND_FILES = {*FILES, *CHARTS, "run_id", "logged_run_id", "made_of.json"}


@dataclass(frozen=True)
class Inputs:
    bundle: Bundle
    vectors: Path

    def arguments(self, out: Path, *overrides: str) -> tuple[str, str, str, str, list[str]]:
        return str(self.bundle.path), str(self.vectors), str(out), "smoke", [*OPTIONS, *overrides]

    def train(self, out: Path, *overrides: str) -> dict[str, Any]:
        """Train without MLflow."""
        words = np.load(self.vectors / "vectors.npy")
        return loop.train(load_config("smoke", [*OPTIONS, *overrides]), self.bundle, words, out, lambda *_: None)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    bundle = write_bundle(folder / "bundle", IMAGE_ROLES)
    return Inputs(bundle, write_vectors(folder / "words", bundle, seed=1))


@pytest.fixture(scope="module")
def whole(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that nothing interrupted, tracked by MLflow; not to be changed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    steps.train(*inputs.arguments(out))
    return out


def assert_same(one: Path, other: Path, but: tuple[str, ...] = ("seconds",)) -> None:
    """All that training decided: every weight, history.json and model.json but for the time it took."""
    for name in ("history.json", "model.json"):
        contents = [json.loads((folder / name).read_text()) for folder in (one, other)]
        for entry in (entry for content in contents for entry in (content if isinstance(content, list) else [content])):
            for key in but:
                entry.pop(key, None)
        assert contents[0] == contents[1]
    for file in WEIGHTS:
        weights, other_weights = load_file(one / file), load_file(other / file)
        assert weights.keys() == other_weights.keys()
        for name, tensor in weights.items():
            assert torch.equal(tensor.view(torch.uint8), other_weights[name].view(torch.uint8)), (file, name)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def in_select(out: Path) -> bool:
    """The second epoch is under way, with at least its first checkpoint of mid-epoch written."""
    state = out / "select" / "state.pt"
    if not state.exists():
        return False
    progress = torch.load(state, weights_only=True)["progress"]
    return bool(progress["epoch"] >= 1 and progress["batch"] > 0)


def in_final(out: Path) -> bool:
    return (out / "final" / "state.pt").exists()


@pytest.mark.slow
def test_the_command_killed_twice_from_outside_ends_as_if_nothing_had_happened(
    inputs: Inputs, whole: Path, store: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    bundle, vectors, _, preset, overrides = inputs.arguments(out)
    options = ["--bundle", bundle, "--vectors", vectors, "--out", str(out), "--preset", preset]
    command = [sys.executable, "-m", "svip.cli", "train", *options, *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in this process
    for reached in (in_select, in_final):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # it runs in short turns and is looked at while it stands still, so no phase is over before it is seen
        deadline = time.monotonic() + 120
        while not reached(out) and process.poll() is None and time.monotonic() < deadline:
            process.send_signal(signal.SIGCONT)
            time.sleep(0.01)
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert reached(out) and not (out / "model.json").exists(), "killed too late to be a test"
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert_same(out, whole)
    assert files(out) == files(whole) == COMMAND_FILES

    client = MlflowClient(store)
    run = client.get_run((out / "run_id").read_text())
    assert run.info.status == "FINISHED"
    assert run.outputs is not None and len(run.outputs.model_outputs) == 1
    history = json.loads((out / "history.json").read_text())
    for name, phase in (("train/loss", "select"), ("final_train/loss", "final")):
        logged = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, name)}
        assert logged == {entry["epoch"]: entry["train/loss"] for entry in history if entry["phase"] == phase}


def killed_while_training(inputs: Inputs, out: Path, prepare: Callable[[], None]) -> None:
    """In a process of its own, in which ``prepare`` arranged for a SIGKILL."""

    def target() -> None:
        prepare()
        inputs.train(out)

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["half", "whole", "named"])
@pytest.mark.parametrize(
    ("name", "writing"),
    [
        ("select/best.safetensors", 1),
        ("select/best.safetensors", 2),  # by then a worse epoch's is there
        ("select/history.json", 1),
        ("final/state.pt", 1),
        ("model.safetensors", 1),
        ("model.json", 1),
    ],
)
def test_killed_at_any_file_nothing_is_lost_and_nothing_left_behind(
    inputs: Inputs, whole: Path, tmp_path: Path, name: str, writing: int, moment: str
) -> None:
    """half: the temporary file is half-written. whole: it has no name yet. named: right after it got its name."""
    out = tmp_path / "run"

    def prepare() -> None:
        replace, count = Path.replace, iter(range(1, 1000))

        def dying_replace(self: Path, target: Path) -> Path:
            last = target == out / name and next(count) == writing
            if last and moment == "half":
                os.truncate(self, self.stat().st_size // 2)
            if last and moment != "named":
                os.kill(os.getpid(), signal.SIGKILL)
            result = replace(self, target)
            if last:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        Path.replace = dying_replace  # type: ignore[method-assign, assignment]

    killed_while_training(inputs, out, prepare)
    assert (out / name).exists() == (moment == "named" or writing > 1)
    inputs.train(out)
    assert_same(out, whole)
    assert files(out) == FILES


def test_rerunning_a_finished_training_changes_nothing_and_logs_no_second_model(
    inputs: Inputs, whole: Path, store: str
) -> None:
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in whole.rglob("*.safetensors")}
    result = steps.train(*inputs.arguments(whole))
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in whole.rglob("*.safetensors")}
    run = MlflowClient(store).get_run(result["run_id"])
    assert run.info.status == "FINISHED"
    assert run.outputs is not None and len(run.outputs.model_outputs) == 1


def test_a_finished_training_of_an_older_version_gets_its_classes_and_nothing_else(
    inputs: Inputs, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "classes.parquet").unlink()
    inputs.train(out)
    pd.testing.assert_frame_equal(pd.read_parquet(out / "classes.parquet"), inputs.bundle.classes)
    assert_same(out, whole, but=())
    image = inputs.bundle.image(0)
    assert Predictor.load(out)(image)[0].classes == Predictor.load(whole)(image)[0].classes


def test_a_refused_resume_leaves_the_run_of_what_is_there_alone(
    inputs: Inputs, whole: Path, store: str, tmp_path: Path
) -> None:
    client = MlflowClient(store)
    run_id = (whole / "run_id").read_text()
    before = client.get_run(run_id)
    with pytest.raises(checkpoint.CheckpointError, match=r"optim\.lr: 0\.001 -> 0\.5.*another --out"):
        steps.train(*inputs.arguments(whole, "optim.lr=0.5"))
    with pytest.raises(FileExistsError, match="is not empty; resume it"):
        steps.train(*inputs.arguments(whole), resume=False)
    other = Inputs(inputs.bundle, write_vectors(tmp_path / "words", inputs.bundle, seed=2))
    with pytest.raises(checkpoint.CheckpointError, match="begun with other word vectors"):
        steps.train(*other.arguments(whole))
    after = client.get_run(run_id)
    assert (after.info.status, after.data.tags) == (before.info.status, before.data.tags)
    assert after.info.status == "FINISHED"


@pytest.mark.parametrize("mistake", ["model.backbone=vit_tinny", "optim.drop_last=true"])
def test_a_start_that_failed_leaves_its_folder_to_the_corrected_command(
    inputs: Inputs, store: str, tmp_path: Path, mistake: str
) -> None:
    out, client = tmp_path / "run", MlflowClient(store)
    with pytest.raises(ValueError, match=mistake.partition("=")[0]):
        steps.train(*inputs.arguments(out, mistake, "optim.batch_size=99"))
    failed = client.get_run((out / "run_id").read_text())
    run = client.get_run(steps.train(*inputs.arguments(out, "optim.epochs=1", "train.select=false"))["run_id"])
    assert (failed.info.status, run.info.status) == ("FAILED", "FINISHED")
    assert run.data.params["optim.batch_size"] != "99"
    assert not [tag for tag in run.data.tags if tag.startswith("resumed.")]


@pytest.mark.parametrize(
    ("overrides", "stopped_at", "said"),
    [
        (["train.checkpoint_steps=0"], 3, "begins anew (train.checkpoint_steps=10 keeps more)"),
        ([], 2, "stopped before the first checkpoint; the same command begins anew"),
        ([], STEPS + 4, "stopped; the same command goes on in phase select after epoch 1, step 2"),
    ],
)
def test_a_training_that_is_stopped_says_what_it_has_kept(
    inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    overrides: list[str],
    stopped_at: int,
    said: str,
) -> None:
    """As by Ctrl-C within a step; the checkpoints are of every second one."""
    step, count = loop.train_step, iter(range(1, 1000))

    def stopping_step(*arguments: Any) -> dict[str, float]:
        if next(count) == stopped_at:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(loop, "train_step", stopping_step)
    with pytest.raises(KeyboardInterrupt):
        steps.train(*inputs.arguments(tmp_path / "run", *overrides))
    assert caplog.messages[-1].endswith(said)


def test_weights_that_are_not_there_are_named_before_anything_is_written(inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.weights: no file no\.safetensors"):
        steps.train(*inputs.arguments(tmp_path / "run", "model.weights=no.safetensors"))
    assert not (tmp_path / "run").exists()


def test_other_word_vectors_are_refused_in_the_middle_of_a_training(
    inputs: Inputs, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "model.json").unlink()
    other = Inputs(inputs.bundle, write_vectors(tmp_path / "words", inputs.bundle, seed=2))
    with pytest.raises(checkpoint.CheckpointError, match="begun with other word vectors"):
        other.train(tmp_path / "run")


def test_a_folder_that_recorded_only_its_bundle_is_still_resumed(inputs: Inputs, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    record = tmp_path / "run" / "bundle.sha256"
    record.write_text(inputs.bundle.sha256 + "\n")
    inputs.train(tmp_path / "run")
    assert len(record.read_text().split()) == 2, "and has the word vectors' digest from now on"


def test_resume_false_takes_an_empty_or_absent_folder(inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "absent", tmp_path / "empty"):
        steps.train(*inputs.arguments(out, "optim.epochs=1", "train.select=false"), resume=False)
        assert (out / "model.json").exists()


def test_nothing_of_the_test_part_has_any_influence(inputs: Inputs, whole: Path, tmp_path: Path) -> None:
    """Other test images, and attributes of the unseen classes that would turn any sum into nan: the same weights."""
    bundle = write_bundle(tmp_path / "bundle", IMAGE_ROLES, other_tests=True)
    assert bundle.sha256 != inputs.bundle.sha256
    Inputs(bundle, inputs.vectors).train(tmp_path / "run")
    assert_same(tmp_path / "run", whole, but=("seconds", "bundle_sha256"))


@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_the_final_phase_follows_the_schedule_up_to_the_chosen_epoch(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str
) -> None:
    """The chosen epoch was reached with the rates of the whole schedule, so they are not squeezed into fewer epochs."""
    answers = iter([10.0, 30.0, 20.0])
    rates: list[float] = []
    step = loop.train_step

    def validate(*_: Any) -> dict[str, float]:
        return {"T1": 50.0, "U": 50.0, "S": 50.0, "H": next(answers), "gamma": 0.0}

    def watching_step(model: Any, optimizer: torch.optim.AdamW, *arguments: Any) -> dict[str, float]:
        rates.append(optimizer.param_groups[0]["lr"])
        return step(model, optimizer, *arguments)

    monkeypatch.setattr(loop, "validate", validate)
    monkeypatch.setattr(loop, "train_step", watching_step)
    info = inputs.train(tmp_path / "run", f"optim.schedule={schedule}", "optim.warmup=0", "optim.lr=1.0e-3")
    select, final = rates[: 3 * STEPS], rates[3 * STEPS :]
    assert info["epochs"] == 2
    assert len(final) == 2 * FINAL_STEPS
    for rated, steps_per_epoch in ((select, STEPS), (final, FINAL_STEPS)):
        done = np.arange(len(rated)) / (3 * steps_per_epoch)  # of the three configured epochs, in either phase
        expected = (1 + np.cos(np.pi * done)) / 2 if schedule == "cosine" else np.ones(len(rated))
        assert rated == pytest.approx(1e-3 * expected)


def test_an_absurd_learning_rate_is_stopped_by_name_and_leaves_a_usable_checkpoint(
    inputs: Inputs, tmp_path: Path
) -> None:
    with pytest.raises(loop.NonFiniteLoss, match=r"phase select, epoch 1, step \d; its images: \d/\d\.png, .*Lower"):
        inputs.train(tmp_path / "run", "optim.lr=1e30", "optim.head_lr=1e30", "train.checkpoint_steps=1")
    state = torch.load(tmp_path / "run" / "select" / "state.pt", weights_only=True)
    assert state["progress"]["batch"] >= 1
    assert all(bool(tensor.isfinite().all()) for tensor in state["model"].values())


def test_a_gradient_that_is_not_finite_stops_the_run_too(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = loop.train_step
    done: list[dict[str, float]] = []

    def overflowing_step(model: Any, *arguments: Any) -> dict[str, float]:
        if len(done) == STEPS + 3:
            model.patch_classifier[2].weight.register_hook(lambda gradient: gradient * float("inf"))
        done.append(step(model, *arguments))
        return done[-1]

    monkeypatch.setattr(loop, "train_step", overflowing_step)
    with pytest.raises(loop.NonFiniteLoss, match=r"the gradient is (inf|nan) in phase select, epoch 2, step 4;"):
        inputs.train(tmp_path / "run")
    state = torch.load(tmp_path / "run" / "select" / "state.pt", weights_only=True)
    assert (state["progress"]["epoch"], state["progress"]["batch"]) == (1, 2)
    assert all(bool(tensor.isfinite().all()) for tensor in state["model"].values())


def test_best_weights_are_those_of_the_chosen_epoch_even_where_others_are_as_good(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([10.0, 30.0, 30.0, 20.0])
    written: list[int] = []
    save = checkpoint.save_weights
    finished: list[dict[str, float]] = []

    def validate(*_: Any) -> dict[str, float]:
        finished.append({"T1": 50.0, "U": 50.0, "S": 50.0, "H": next(answers), "gamma": 0.1 * len(finished)})
        return finished[-1]

    def watching_save(path: Path, model: Any) -> None:
        written.extend([len(finished)] if path.name == "best.safetensors" else [])
        save(path, model)

    monkeypatch.setattr(loop, "validate", validate)
    monkeypatch.setattr(checkpoint, "save_weights", watching_save)
    info = inputs.train(tmp_path / "run", "optim.epochs=4")
    assert (info["epochs"], info["gamma"]) == (2, 0.1)
    assert written == [1, 2]


def test_the_loss_of_an_epoch_is_the_mean_over_its_images(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps_done: list[tuple[dict[str, float], int]] = []
    step = loop.train_step

    def watching_step(*arguments: Any) -> dict[str, float]:
        steps_done.append((step(*arguments), len(arguments[4])))
        return steps_done[-1][0]

    monkeypatch.setattr(loop, "train_step", watching_step)
    inputs.train(tmp_path / "run", "train.select=false", "optim.epochs=2", "optim.batch_size=5")
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert [count for _, count in steps_done] == 2 * [*[5] * 8, 4], "the last batch weighs less"
    for entry, done in zip(history, (steps_done[:9], steps_done[9:]), strict=True):
        for name in ("loss", "loss_cls", "loss_consistency", "loss_patch"):
            mean = sum(values[name] * count for values, count in done) / 44
            assert entry[f"train/{name}"] == pytest.approx(mean, rel=1e-6)


def test_loader_processes_change_nothing(inputs: Inputs, whole: Path, tmp_path: Path) -> None:
    inputs.train(tmp_path / "run", "train.workers=2")
    assert_same(tmp_path / "run", whole)
