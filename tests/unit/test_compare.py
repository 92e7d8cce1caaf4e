"""``svip compare``: runs in a real MLflow store, found by what people call them, and what the tables say of them."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from svip import steps
from svip.cli import app
from svip.config import flatten, load_config
from svip.evaluation.intervals import Answers, bootstrap
from svip.evaluation.run_comparison import Entry, compare, groups_table, runs_table
from svip.steps.comparing import CompareError
from svip.tracking import TrackingError, evaluations_of, find_runs, open_run, open_tracker, search_evaluations

LABELS = np.repeat(np.arange(4), 25)
"""Four classes, of which 2 and 3 are unseen, with 25 images each."""
UNSEEN = np.array([2, 3])
DATA = "d" * 64


def scores(right: float, seed: int) -> np.ndarray:
    """[100, 4], where that share of the images has its best score at its own class."""
    random = np.random.default_rng(seed)
    table = random.random((100, 4))
    hits = random.random(100) < right
    table[hits, LABELS[hits]] += 1
    return table


def log_evaluation(
    folder: Path,
    experiment: str,
    overrides: Sequence[str] = (),
    right: float = 0.7,
    bundle: str = DATA,
    parent: str = "",
    train: str = "",
    protocols: Sequence[str] = ("validation", "none"),
    predictions: bool = True,
) -> str:
    """An evaluation as the step leaves it in MLflow, at gamma 0.1; its id."""
    config = load_config("smoke", overrides)
    seed = config.train.seed
    tags = {"step": "evaluate", "variant": "svip", "preset": "smoke", "seed": str(seed), "bundle_sha256": bundle}
    name = " ".join(["evaluate-svip", *overrides])
    tags["train_run_id"] = train
    with open_tracker(experiment, name, tags=tags, parent_run_id=parent or None) as tracker:
        tracker.log_params(flatten(config))
        table = scores(right, seed)
        numbers = {k: v.value for k, v in bootstrap(Answers.of(table, LABELS, UNSEEN, 0.1), replicates=2).items()}
        for protocol in protocols:
            tracker.log_metrics({f"test/{protocol}/{key}": v for key, v in (numbers | {"gamma": 0.1}).items()})
        if predictions:
            np.savez(folder / "predictions.npz", scores=table, labels=LABELS, unseen=UNSEEN)
            tracker.log_artifact(folder / "predictions.npz")
    return tracker.run_id


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory, store_file: Path) -> tuple[str, list[str]]:
    """An experiment of five evaluations: two seeds of the preset, two of M=4, and one on other data."""
    folder, name = tmp_path_factory.mktemp("runs"), "svip/compared"
    runs = [
        log_evaluation(folder, name, right=0.6),
        log_evaluation(folder, name, ["train.seed=1"], right=0.6),
        log_evaluation(folder, name, ["model.selected_groups=4"], right=0.9),
        log_evaluation(folder, name, ["model.selected_groups=4", "train.seed=1", "train.workers=2"], right=0.9),
        log_evaluation(folder, name, bundle="e" * 64, protocols=["none"], predictions=False),
    ]
    with open_tracker(name, "train-svip", tags={"step": "train"}):
        pass
    return name, runs


def entry(run_id: str, h: float, settings: Mapping[str, str] | None = None, **facts: str) -> Entry:
    numbers = {"T1": 70.0, "U": h, "S": h, "H": h, "gamma": 0.5}
    known = {"variant": "svip", "preset": "smoke", "seed": "0", "code": "c" * 40, "bundle_sha256": DATA}
    return Entry(run_id, f"evaluate-{run_id}", {**known, **facts}, settings or {}, numbers)


def test_only_what_differs_is_a_column_and_the_rest_a_sentence() -> None:
    result = compare(
        [
            entry("a" * 32, 50.0, {"optim.lr": "0.001", "model.selected_groups": "8", "optim.batch_size": "4"}),
            entry("b" * 32, 60.0, {"optim.lr": "1e-05", "model.selected_groups": "8", "optim.batch_size": "8"}),
        ],
        "validation",
    )
    assert runs_table(result) == (
        ["run", "lr", "optim.batch_size", "T1", "U", "S", "H", "gamma"],
        [
            ["bbbbbbbb", "1e-5", "8", "70.0", "60.0", "60.0", "60.0", "0.500"],
            ["aaaaaaaa", "0.001", "4", "70.0", "50.0", "50.0", "50.0", "0.500"],
        ],
    )
    assert result.common == {"variant": "svip", "preset": "smoke", "seed": "0", "code": "cccccccc", "data": "dddddddd"}
    assert (result.groups, result.warnings, result.notes) == ([], [], [])


def test_what_all_runs_change_of_their_preset_stands_beside_it() -> None:
    changes = "model.backbone_args.depth=2, optim.epochs=2, train.seed=1"
    runs = [entry("a" * 32, 50.0, changes=changes), entry("b" * 32, 60.0, changes=f"{changes}, optim.lr=0.001")]
    assert compare(runs, "validation").common["preset"] == "smoke with depth=2 epochs=2"
    assert compare([*runs, entry("c" * 32, 60.0)], "validation").common["preset"] == "smoke"


def test_seeds_of_one_configuration_become_mean_and_deviation() -> None:
    four = {"model.selected_groups": "4"}
    runs = [entry("a" * 32, 50.0), entry("b" * 32, 54.0, seed="1"), entry("c" * 32, 58.0, seed="2")]
    again = entry("d" * 32, 99.0, seed="2")
    result = compare([*runs, entry("e" * 32, 70.0, four), again], "validation", sort="name")
    assert groups_table(result) == (
        ["M", "seeds", "T1", "U", "S", "H"],
        [
            ["-", "0, 1, 2", "70.0 ± 0.0", "54.0 ± 4.0", "54.0 ± 4.0", "54.0 ± 4.0"],
            ["4", "0", "70.0", "70.0", "70.0", "70.0"],
        ],
    )
    assert result.notes == ["Seed 2 ran more than once: its first row counts in the means."]


def test_other_data_is_warned_of_first() -> None:
    runs = [entry("a" * 32, 50.0), entry("b" * 32, 60.0, bundle_sha256="e" * 64, seed="1")]
    result = compare(runs, "oracle")
    assert result.warnings[0].startswith("Not comparable: these runs were tested on different data (eeeeeeee (1), ddd")
    assert result.warnings[1].startswith("No results")
    assert result.groups == [], "seeds on other data are none of the same configuration"
    assert runs_table(result)[0] == ["run", "seed", "data", "T1", "U", "S", "H", "gamma"]
    dirty = compare([entry("a" * 32, 50.0, code="c" * 40 + "-dirty"), entry("b" * 32, 60.0)], "validation")
    assert "uncommitted" in dirty.warnings[0]
    assert [row[1] for row in runs_table(dirty)[1]] == ["cccccccc", "cccccccc-dirty"]


def test_an_experiment_is_compared_with_intervals(experiment: tuple[str, list[str]], tmp_path: Path) -> None:
    name, runs = experiment
    result = steps.compare(experiment=name, out=str(tmp_path))
    best, rest = result.lines[0], result.lines[1:]
    assert {line.entry.run_id for line in result.lines} == set(runs[:4])
    assert result.notes == [f"Left out: {runs[4][:8]} (evaluate-svip), which has none."]
    assert [list(line.differing.items()) for line in result.lines][0] == [
        ("M", "4"),
        ("seed", best.entry.facts["seed"]),
    ]
    answers = Answers.of(scores(0.9, int(best.entry.facts["seed"])), LABELS, UNSEEN, 0.1)
    assert best.intervals == bootstrap(answers)
    assert best.difference is None
    for line in rest:
        other = Answers.of(
            scores(0.9 if line.differing["M"] == "4" else 0.6, int(line.differing["seed"])), LABELS, UNSEEN, 0.1
        )
        assert line.difference == bootstrap(other, answers)["H"]
    assert [group.seeds for group in result.groups] == [("0", "1")] * 2

    page = (tmp_path / "comparison.html").read_text()
    assert "<h1>4 runs of svip/compared</h1>" in page and page.count("<table>") == 2 and "<svg" in page
    markdown = (tmp_path / "comparison.md").read_text()
    assert f"| {best.entry.run_id[:8]} | 4 |" in markdown
    with (tmp_path / "comparison.csv").open() as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    assert [row["run_id"] for row in rows] == [line.entry.run_id for line in result.lines]
    assert float(rows[0]["H_low"]) == pytest.approx(best.intervals["H"].low)
    assert {row["model.selected_groups"] for row in rows} == {"4", "8"}
    assert "train.workers" not in rows[0], "it changes no number"


def test_a_filter_chooses_and_says_what_there_is(experiment: tuple[str, list[str]], tmp_path: Path) -> None:
    name, runs = experiment
    found = search_evaluations("compared", "params.model.selected_groups = '4'")
    assert [run.run_id for run in found] == runs[2:4]
    with pytest.raises(TrackingError, match="none of the 5 evaluations of svip/compared fits .*tags.variant: svip"):
        search_evaluations(name, "tags.variant = 'full'")
    with pytest.raises(TrackingError, match="filter 'variant is full': Invalid .* such as tags.preset = 'smoke'"):
        search_evaluations(name, "variant is full")
    with pytest.raises(TrackingError, match=r"no experiment 'svip/none'; it has .*svip/compared"):
        search_evaluations("svip/none")
    with pytest.raises(CompareError, match="numbers of the protocol 'oracle'; they have none, validation"):
        steps.compare(experiment=name, protocol="oracle", out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_run_goes_by_its_id_its_beginning_or_its_name(experiment: tuple[str, list[str]]) -> None:
    runs = experiment[1]
    assert [run.run_id for run in evaluations_of([runs[0], runs[2][:12], runs[0][:12]])] == [runs[0], runs[2]]
    assert evaluations_of(["evaluate-svip model.selected_groups=4"])[0].run_id == runs[2]
    with pytest.raises(TrackingError, match=rf"'evaluate-svip' fits [0-9]+ runs; .*{runs[0][:8]} \(evaluate-svip, 20"):
        evaluations_of(["evaluate-svip"])
    with pytest.raises(TrackingError, match="no run with the id or name .it's me.; its latest runs: .*"):
        evaluations_of(["it's me"])
    with pytest.raises(TrackingError, match=r"\(train-svip, .*has no finished evaluation"):
        evaluations_of(["train-svip"])


def test_a_run_around_evaluations_and_a_training_stand_for_them(tmp_path: Path, store: str) -> None:
    name = "svip/nested"
    parent = open_run("experiment-1", name, {}, name="experiment smoke")
    with open_tracker(name, "trained", tags={"step": "train"}, parent_run_id=parent) as trained:
        pass
    log_evaluation(tmp_path, name, parent=parent, train=trained.run_id)
    latest = log_evaluation(tmp_path, name, parent=parent, train=trained.run_id)
    assert [run.run_id for run in evaluations_of([parent])] == [latest], "of one checkpoint the last evaluation"
    assert [run.run_id for run in evaluations_of([trained.run_id])] == [latest]
    whole = open_run("ablation-1", name, {})
    within = []
    for seed in range(2):
        with open_tracker(name, f"full:{seed}", parent_run_id=whole) as own:
            within.append(log_evaluation(tmp_path, name, [f"train.seed={seed}"], parent=own.run_id))
    assert [run.run_id for run in evaluations_of([whole])] == within


def test_of_steps_that_were_tried_again_the_last_runs_count(tmp_path: Path, store: str) -> None:
    name, tags = "svip/retried", {"step": "train", "preset": "smoke", "variant": "svip", "seed": "0"}
    parent = open_run("experiment-2", name, {})
    with pytest.raises(OSError), open_tracker(name, "train", tags=tags, parent_run_id=parent):
        raise OSError("the pod was lost")
    with open_tracker(name, "train", tags=tags, parent_run_id=parent) as lost:  # when it had trained
        pass
    log_evaluation(tmp_path, name, parent=parent, train=lost.run_id)
    with open_tracker(name, "train", tags=tags, parent_run_id=parent) as trained:
        pass
    log_evaluation(tmp_path, name, parent=parent, train=trained.run_id)
    latest = log_evaluation(tmp_path, name, parent=parent, train=trained.run_id)
    found, evaluated = find_runs(parent)
    assert evaluated and (found.run_id, evaluated.run_id) == (trained.run_id, latest)
    with open_tracker(name, "train", tags={**tags, "seed": "1"}, parent_run_id=parent):
        pass
    with pytest.raises(TrackingError, match="holds 2 finished trainings and 2 evaluations of them"):
        find_runs(parent)


def test_the_command_prints_the_table_and_names_the_files(experiment: tuple[str, list[str]], tmp_path: Path) -> None:
    runs = experiment[1]
    done = CliRunner().invoke(app, ["compare", runs[0], runs[2], "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    for text in (runs[0][:8], runs[2][:8], " M ", "H - first", "The same in all: variant svip", "comparison.html"):
        assert text in done.output
    with pytest.raises(CompareError, match="name runs to compare"):
        CliRunner().invoke(app, ["compare"], catch_exceptions=False)


def test_a_wide_terminal_shows_all_intervals_and_names_a_narrow_one_cuts_no_number(
    experiment: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["compare", *experiment[1][:2], "--out", str(tmp_path)]

    def shown(width: int) -> str:
        monkeypatch.setattr("svip.cli.runs.console", Console(width=width))
        return CliRunner().invoke(app, arguments).output

    wide, narrow = shown(160), shown(80)
    assert "evaluate-svip" in wide and wide.count(" [") > narrow.count(" [") == 3, "H twice and one difference"
    assert "…" not in narrow and experiment[1][0][:8] in narrow
