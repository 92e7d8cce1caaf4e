"""``svip ablate`` and ``svip sensitivity`` themselves: what they train, what they keep, what they say of failures."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from mlflow import MlflowClient
from small_training import TINY, write_bundle, write_vectors

from svip import steps
from svip.config import Config, load_config, to_yaml
from svip.data.bundle import Bundle
from svip.steps import training as training_step
from svip.sweep import FailedRuns
from svip.training.loop import Log

IMAGE_ROLES = {
    "train": ["train"] * 3 + ["val_seen", "test_seen"],
    "val_unseen": ["val_unseen"] * 2 + ["test_seen"],
    "test_unseen": ["test_unseen"] * 2,
}
OPTIONS = [*TINY, "optim.epochs=2", "evaluation.eszsl=false"]
Ablate = Callable[..., str]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    bundle = write_bundle(folder / "bundle", IMAGE_ROLES)
    write_vectors(folder / "words", bundle)
    return str(bundle.path), str(folder / "words")


@pytest.fixture
def ablate(inputs: tuple[str, str]) -> Ablate:
    def run(out: Path, *overrides: str, variants: tuple[str, ...] = ("baseline", "full"), seeds: int = 1) -> str:
        return steps.ablate(*inputs, str(out), "smoke", variants, seeds, [*OPTIONS, *overrides])

    return run


def protocols(out: Path, run: str) -> dict[str, Any]:
    return dict(json.loads((out / run / "evaluation" / "metrics.json").read_text())["protocols"])


def times(out: Path) -> dict[Path, int]:
    """When each file of the runs was written."""
    return {path: path.stat().st_mtime_ns for path in out.rglob("seed-*/**/*") if path.is_file()}


@pytest.mark.slow
def test_it_trains_each_variant_with_each_seed_under_one_run_and_then_nothing_more(
    ablate: Ablate, tmp_path: Path, store: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="svip")
    page = ablate(tmp_path / "out", seeds=2)
    said = [record.message for record in caplog.records if record.message.startswith("run ")]
    assert said[0] == "run 1 of 4: full, seed 0"
    assert said[3].startswith("run 4 of 4: baseline, seed 1, about ")
    table = pd.read_csv(Path(page).with_suffix(".csv")).set_index("variant")
    for name in ("baseline", "full"):
        reached = [protocols(tmp_path / "out", f"{name}/seed-{seed}")["validation"]["H"] for seed in (0, 1)]
        assert table.loc[name, "H"] == pytest.approx(sum(reached) / 2)

    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("svip/synthetic")
    assert experiment is not None
    runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    parents = {key: run.data.tags.get("mlflow.parentRunId", "") for key, run in runs.items()}
    trained = (tmp_path / "out/full/seed-1/checkpoint/run_id").read_text()
    own = parents[trained]
    assert runs[own].info.run_name == "full:1"
    assert runs[own].data.metrics["test/H"] == protocols(tmp_path / "out", "full/seed-1")["validation"]["H"]
    whole = parents[own]
    assert (runs[whole].info.run_name, runs[whole].info.status, parents[whole]) == ("ablation", "FINISHED", "")
    assert {runs[key].info.run_name for key in runs if parents[key] == whole} == {
        *("baseline:0", "baseline:1", "full:0", "full:1"),
    }
    assert "ablation.html" in {file.path for file in client.list_artifacts(whole)}

    before = times(tmp_path)
    caplog.clear()
    (tmp_path / "out" / "ablation.md").unlink()
    ablate(tmp_path / "out", "data.root=new", "train.workers=1", seeds=2)
    assert times(tmp_path) == before
    assert not [record for record in caplog.records if record.message.startswith("run ")]
    assert (tmp_path / "out" / "ablation.md").exists(), "the table is made anew"


def test_a_second_process_waits_for_the_first_and_then_goes_on(
    ablate: Ablate, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code = "import sys; from pathlib import Path; from svip.data.transfer import locked\n"
    code += "with locked(Path(sys.argv[1]), inside=True): print('at work', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    with (
        ThreadPoolExecutor(1) as second,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first,
    ):
        assert first.stdin and first.stdout and first.stdout.readline() == b"at work\n"
        page = second.submit(ablate, tmp_path / "out", variants=("full",))
        deadline = time.monotonic() + 60
        while not any("another process is at work on" in record.message for record in caplog.records):
            assert time.monotonic() < deadline and not page.done()
            time.sleep(0.05)
        assert [path.name for path in tmp_path.rglob("*")] == ["out", ".lock"], "it writes nothing beside its folder"
        first.stdin.close()
        assert Path(page.result()).exists()


def test_other_protocols_are_evaluated_and_nothing_is_trained_again(ablate: Ablate, tmp_path: Path) -> None:
    ablate(tmp_path)
    trained = {path: time for path, time in times(tmp_path).items() if path.name == "model.safetensors"}
    page = ablate(tmp_path, "evaluation.protocols=[none,published]")
    assert {path: time for path, time in times(tmp_path).items() if path.name == "model.safetensors"} == trained
    assert protocols(tmp_path, "full/seed-0").keys() == {"none", "published"}
    table = pd.read_csv(Path(page).with_suffix(".csv"))
    assert table["protocol"].tolist() == ["none"] * 2 + ["published"] * 2
    assert "accuracy by sample" in Path(page).read_text()


def test_protocols_that_came_with_the_preset_are_evaluated_once(
    inputs: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="svip")
    (tmp_path / "own.yaml").write_text(to_yaml(load_config("smoke", OPTIONS)))
    arguments = (*inputs, str(tmp_path / "out"), str(tmp_path / "own.yaml"), ["full"], 1)
    steps.ablate(*arguments)
    other = load_config("smoke", [*OPTIONS, "evaluation.protocols=[none,published]"])
    (tmp_path / "own.yaml").write_text(to_yaml(other))
    for runs in (1, 0):
        caplog.clear()
        steps.ablate(*arguments)
        assert len([record for record in caplog.records if record.message.startswith("run ")]) == runs
    assert protocols(tmp_path / "out", "full/seed-0").keys() == {"none", "published"}


def test_runs_of_other_weights_are_not_taken_as_finished(ablate: Ablate, tmp_path: Path) -> None:
    ablate(tmp_path, variants=("full",))
    with pytest.raises(FailedRuns, match=r"model.weights: none -> timm"):
        ablate(tmp_path, "model.weights=timm", variants=("full",))


def test_a_sweep_keeps_its_runs_apart_whatever_MLFLOW_RUN_ID_says(
    ablate: Ablate, tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = MlflowClient(store)
    whole = client.create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", whole)
    ablate(tmp_path)
    trained = {(tmp_path / f"{name}/seed-0/checkpoint/run_id").read_text() for name in ("baseline", "full")}
    assert len(trained) == 2 and whole not in trained
    assert "ablation.html" in {file.path for file in client.list_artifacts(whole)}


def test_an_interrupted_sweep_goes_on_within_the_run_that_it_was_in(
    ablate: Ablate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ablate(tmp_path / "whole")
    train = training_step.train_model
    epochs: list[tuple[str, int]] = []
    ends: list[int] = []

    def recorded(config: Config, data: Bundle, words: Any, out: Path, report: Log, *rest: Any) -> dict[str, Any]:
        def note(metrics: dict[str, float], epoch: int, phase: str, ended: int) -> None:
            report(metrics, epoch, phase, ended)
            ends.append(ended)
            epochs.append((f"{out.parts[-3]} {phase}", epoch))
            if epochs[-1] == ("baseline select", 1) and len(epochs) > 1:  # the second run, on the way
                raise KeyboardInterrupt

        return train(config, data, words, out, note, *rest)

    monkeypatch.setattr(training_step, "train_model", recorded)
    with pytest.raises(KeyboardInterrupt):
        ablate(tmp_path / "out")
    assert epochs[-2][0] == "full final"
    before = times(tmp_path / "out" / "full")
    assert "| 0 of 1 |" in (tmp_path / "out" / "ablation.md").read_text()
    epochs.clear()
    last = ends[-1]
    ends.clear()
    ablate(tmp_path / "out")
    assert times(tmp_path / "out" / "full") == before
    assert epochs[:2] == [("baseline select", 1), ("baseline select", 2)], "not the first run again"
    assert ends[0] == last, "this one's first epoch is told again, and not trained again"
    for run in ("full/seed-0", "baseline/seed-0"):
        assert protocols(tmp_path / "out", run) == protocols(tmp_path / "whole", run)


def test_what_a_sweep_keeps_below_SVIP_WORK_is_found_again(
    ablate: Ablate, tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SVIP_WORK", str(tmp_path / "work"))
    train = training_step.train_model
    epochs: list[tuple[int, int]] = []

    def stopped(config: Config, data: Bundle, words: Any, out: Path, report: Log, *rest: Any) -> dict[str, Any]:
        def note(metrics: dict[str, float], epoch: int, phase: str, ended: int) -> None:
            report(metrics, epoch, phase, ended)
            epochs.append((epoch, ended))
            if len(epochs) == 1:
                raise KeyboardInterrupt

        return train(config, data, words, out, note, *rest)

    monkeypatch.setattr(training_step, "train_model", stopped)
    with pytest.raises(KeyboardInterrupt):
        ablate(tmp_path / "out", variants=("full",))
    assert not (tmp_path / "out/full/seed-0/checkpoint").exists()
    first = [(tmp_path / "out" / folder / "run_id").read_text() for folder in ("", "full/seed-0")]
    ablate(tmp_path / "out", variants=("full",))
    assert epochs[1] == epochs[0] and epochs[2][0] == 2, "the first epoch is told again, and not trained again"
    client = MlflowClient(store)
    trained = (tmp_path / "out/full/seed-0/checkpoint/run_id").read_text()
    own = client.get_run(trained).data.tags["mlflow.parentRunId"]
    assert [client.get_run(own).data.tags["mlflow.parentRunId"], own] == first
    assert client.get_run(own).info.status == "FINISHED"


def test_a_failed_run_stops_no_other_and_is_named_at_the_end(ablate: Ablate, tmp_path: Path) -> None:
    # more than the four groups that there are: only the baseline selects none
    with pytest.raises(FailedRuns, match=r"(?s)1 of 2 runs failed.*full:0: ConfigError: model.selected_groups=99"):
        ablate(tmp_path, "model.selected_groups=99")
    assert (tmp_path / "baseline/seed-0/evaluation/metrics.json").exists()
    lines = (tmp_path / "ablation.md").read_text().splitlines()
    assert "| 1 of 1 |" in lines[2] and "| 0 of 1 | - |" in lines[3]


def test_finished_runs_of_another_configuration_are_refused_and_stay(ablate: Ablate, tmp_path: Path) -> None:
    ablate(tmp_path, variants=("full",))
    before = times(tmp_path)
    with pytest.raises(FailedRuns, match=r"full:0: CheckpointError: .*\(model.sigma: 40.0 -> 5.0\)"):
        ablate(tmp_path, "model.sigma=5", variants=("full",))
    assert times(tmp_path) == before


@pytest.mark.slow
def test_the_panels_share_one_run_of_the_unchanged_configuration(inputs: tuple[str, str], tmp_path: Path) -> None:
    # four groups, so 35 to 49 of 49 become 3 and 4; the default of 2 joins them
    options = [*OPTIONS, "optim.epochs=1", "model.sigma=7"]
    page = steps.sensitivity(*inputs, str(tmp_path), "smoke", ["M", "sigma"], 1, options)
    runs = {path.parent.name for path in tmp_path.glob("*/seed-0")}
    assert runs == {"default", "M-3", "M-4", "sigma-1", "sigma-3", "sigma-5", "sigma-10"}
    table = pd.read_csv(Path(page).with_suffix(".csv"))
    assert table["variant"].tolist() == [
        *("default", "M-3", "M-4"),
        *("sigma-1", "sigma-3", "sigma-5", "default", "sigma-10"),
    ]
    assert "<svg viewBox" in Path(page).read_text()
    assert (tmp_path / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "sensitivity.svg").read_text().startswith("<?xml")
