"""A study's slots: whatever workers do at the same time, each ends well once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from svip.config import load_config, to_yaml
from svip.tuning import launch, study
from svip.tuning.report import write_report
from svip.tuning.space import load_space
from svip.tuning.storage import TuningError
from svip.tuning.study import Settings, Study, create_study

SETTINGS: dict[str, Any] = {
    "preset": "smoke",
    "config": {"model.sigma": 40.0, "optim.head_epochs": 0},
    "space": [{"key": "optim.lr", "when": {}}],
    "bundle_sha256": "b",
    "words_sha256": "w",
}


def planned(out: Path, trials: int = 2, **others: Any) -> Study:
    made = create_study("s", str(out / "study.journal"), out, Settings(**{**SETTINGS, **others}), trials, 15)
    made.fill({"optim.lr": 0.5})
    return made


def states(tuned: Study) -> list[tuple[int, str]]:
    return [(trial.user_attrs["slot"], trial.state.name) for trial in tuned.all_trials()]


def taken(tuned: Study) -> FrozenTrial:
    trial = tuned.take()
    assert trial is not None and tuned.begin(trial)
    return trial


def end(tuned: Study, trial: FrozenTrial) -> None:
    tuned.storage.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [1.0])


def test_all_trials_wait_from_the_start_the_presets_own_values_first(tmp_path: Path) -> None:
    tuned = planned(tmp_path, 3)
    assert states(tuned) == [(0, "WAITING"), (1, "WAITING"), (2, "WAITING")]
    fixed = [trial.system_attrs["fixed_params"] for trial in tuned.all_trials()]
    assert fixed == [{"optim.lr": 0.5}, {}, {}]
    tuned.fill()
    assert len(tuned.all_trials()) == 3, "no slot is filled twice"


def test_two_workers_never_begin_the_same_trial(tmp_path: Path) -> None:
    one, two = planned(tmp_path), planned(tmp_path)
    trial = one.take()
    assert trial is not None and trial == two.take()
    with one.liveness.hold(trial) as mine, two.liveness.hold(trial) as theirs:
        assert mine and not theirs
        assert one.begin(trial)
    assert not two.begin(trial)


def test_a_slot_that_two_workers_have_filled_is_worked_at_once(tmp_path: Path) -> None:
    tuned = planned(tmp_path, 1)
    tuned.add({}, 0)
    first, second = tuned.all_trials()
    with tuned.liveness.hold(first):
        assert tuned.begin(first)
        assert not tuned.begin(second), "the earlier one is at work"
        assert states(tuned) == [(0, "RUNNING"), (0, "FAIL")]
        tuned.add({}, 0)
        tuned.tidy()
        assert states(tuned)[2] == (0, "FAIL"), "and what still waits for that slot is removed"
        end(tuned, first)
    assert tuned.is_finished() and tuned.errors() == []


def test_a_slot_that_stays_empty_is_filled_by_any_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = planned(tmp_path, 1)
    trial = taken(tuned)
    tuned.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)  # and then its worker is killed
    tuned.tidy()
    assert states(tuned) == [(0, "FAIL")], "it may be about to do so itself"
    monkeypatch.setattr(study, "OPEN", 0.0)
    tuned.tidy()
    assert states(tuned) == [(0, "FAIL"), (0, "WAITING")]


def test_what_was_stopped_goes_on_before_anything_new_and_what_failed_is_replaced(tmp_path: Path) -> None:
    tuned = planned(tmp_path, 3)
    stopped, failed = taken(tuned), taken(tuned)
    tuned.fail(failed, "NonFiniteLoss: nan")
    tuned.fail(stopped)
    following = taken(tuned)
    assert following.user_attrs == {"slot": 0, "resumes": stopped.number, "deaths": 0}
    assert [trial.user_attrs["error"] for trial in tuned.errors()] == ["NonFiniteLoss: nan"]
    (replacement,) = [t for t in tuned.all_trials() if t.user_attrs["slot"] == 1 and t.state is TrialState.WAITING]
    assert "resumes" not in replacement.user_attrs


def test_a_dead_workers_trial_is_seen_by_its_lock_and_its_deaths_are_counted(tmp_path: Path) -> None:
    tuned = planned(tmp_path, 1)
    died: list[int] = []
    for deaths in range(3):
        trial = taken(tuned)  # without holding it, as after a kill
        assert trial.user_attrs.get("deaths", 0) == deaths
        tuned.tidy(lambda dead: died.append(dead.number))
    assert died == [0, 1, 2]
    living = taken(tuned)
    with tuned.liveness.hold(living):
        planned(tmp_path, 1).tidy()
        assert tuned.is_running(living.number), "a worker that lives keeps its trial"


def test_the_death_of_one_process_of_a_worker_counts_and_being_stopped_does_not(tmp_path: Path) -> None:
    tuned = planned(tmp_path, 1)
    for died, deaths in ((True, 1), (False, 1), (True, 2)):
        tuned.fail(taken(tuned), died=died)
        assert tuned.all_trials()[-1].user_attrs["deaths"] == deaths
    assert [trial.user_attrs.get("stopped") for trial in tuned.all_trials()] == [None, True, None, None]


def test_a_study_takes_more_trials_but_not_fewer_and_nothing_else_of_other_kind(tmp_path: Path) -> None:
    planned(tmp_path, 2)
    assert len(planned(tmp_path, 4).all_trials()) == 4
    with pytest.raises(TuningError, match="study s has 4 trials; expected at least as many, not 2"):
        planned(tmp_path, 2)
    config: Mapping[str, Any] = {**SETTINGS["config"], "model.sigma": 9.0}
    with pytest.raises(TuningError, match=r"\(seed: 0 -> 1; the search space; model.sigma: 40.0 -> 9.0\)"):
        planned(tmp_path, 4, seed=1, config=config, space=[{"key": "optim.lr", "when": {}, "low": 1}])


def test_workers_share_processors_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(launch.os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [launch.share_of(number, 2)["CUDA_VISIBLE_DEVICES"] for number in range(2)] == ["0,2", "1,3"]
    assert [launch.share_of(number, 5)["CUDA_VISIBLE_DEVICES"] for number in range(5)] == ["0", "1", "2", "3", "0"]
    assert launch.share_of(0, 2)["OMP_NUM_THREADS"] == "4"
    assert "CUDA_VISIBLE_DEVICES" not in launch.share_of(0, 1), "a single worker has them all"


def test_the_page_shows_four_digits_best_yaml_has_them_all_and_few_trials_are_said_to_tell_little(
    tmp_path: Path,
) -> None:
    tuned, base, space_file = planned(tmp_path), tmp_path / "config.yaml", tmp_path / "space.yaml"
    base.write_text(to_yaml(load_config("smoke")))
    space_file.write_text("optim.lr: {low: 1.0e-5, high: 1.0e-2, log: true}\n")
    space = load_space(str(space_file), "smoke")

    def finish(rates: list[float]) -> str:
        for rate in rates:
            scale: dict[str, BaseDistribution] = {"optim.lr": FloatDistribution(1e-5, 1e-2)}
            tuned.load().add_trial(create_trial(params={"optim.lr": rate}, distributions=scale, value=rate * 1e4))
        write_report(tuned, space, "smoke", base, tmp_path)
        return (tmp_path / "tuning.html").read_text()

    page = finish([1e-4, 2e-4, 0.0032890123456789])
    assert "with lr=0.003289. " in page and "0.00328901" not in page
    assert load_config(str(tmp_path / "best.yaml")).optim.lr == 0.0032890123456789
    assert "Only 3 trials have finished" in page
    assert "trials have finished" not in finish([3e-4] * 7)
