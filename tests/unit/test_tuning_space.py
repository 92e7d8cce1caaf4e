"""Search spaces: what a file may say, and that everything wrong with it is told before the first trial."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest

from svip.config import load_config
from svip.tuning.space import SpaceError, assignments, load_space, own_values, shipped_spaces, suggest


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def read(text: str, *overrides: str) -> Any:
        path = tmp_path / "space.yaml"
        path.write_text(text)
        return load_space(str(path), "smoke", overrides)

    return read


def sample(space: Any, seed: int = 0) -> dict[str, Any]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed))
    return suggest(space, study.ask())


def test_the_default_space_has_the_papers_four_and_the_rates() -> None:
    space = load_space("", "paper/cub")
    assert {parameter.key for parameter in space} == {
        *("model.selected_groups", "loss.lambda1", "loss.lambda2", "model.sigma", "optim.lr", "optim.head_lr"),
    }
    (groups,) = [parameter for parameter in space if parameter.key == "model.selected_groups"]
    assert (groups.low, groups.high) == (35, 49), "the paper's 49 groups"
    values = own_values(space, load_config("paper/cub"))
    assert values is not None and values["model.sigma"] == 5.0 and values["model.selected_groups"] == 40


def test_shares_of_groups_follow_the_model() -> None:
    (groups, *_) = load_space("paper", "smoke")  # 16 groups: 35 / 49 of them are 11.4
    assert (groups.low, groups.high) == (11, 16)


@pytest.mark.parametrize("name", shipped_spaces())
def test_a_shipped_space_samples_values_that_the_configuration_takes(name: str) -> None:
    preset = "smoke" if name == "smoke" else "paper/cub"
    space = load_space(name, preset)
    values = sample(space)
    config = load_config(preset, assignments(values))
    assert config.optim.lr == values["optim.lr"], "not a digit is lost on the way"


def test_a_conditional_parameter_is_sampled_only_when_its_condition_holds(load: Any) -> None:
    space = load("""
model.contextualize: {choices: [unselected, drop]}
loss.lambda1: {low: 0.1, high: 5, log: true, when: {model.contextualize: [unselected]}}
""")
    seen = [sample(space, seed) for seed in range(12)]
    assert {values["model.contextualize"] for values in seen} == {"unselected", "drop"}
    for values in seen:
        assert ("loss.lambda1" in values) == (values["model.contextualize"] == "unselected")


def test_ranges_keep_their_types_steps_and_scales(load: Any) -> None:
    space = load("""
optim.epochs: {low: 2, high: 8, step: 3}
model.sigma: {low: 10, high: 40, step: 7.5}
data.flip: {choices: [true, false]}
""")
    seen = [sample(space, seed) for seed in range(30)]
    assert {values["optim.epochs"] for values in seen} == {2, 5, 8}
    assert {values["model.sigma"] for values in seen} == {10.0, 17.5, 25.0, 32.5, 40.0}
    assert {values["data.flip"] for values in seen} == {True, False}


def test_values_of_the_configuration_outside_of_the_space_are_no_first_trial(load: Any) -> None:
    assert own_values(load("model.sigma: {low: 1, high: 10}"), load_config("smoke")) is None  # it has 40
    assert own_values(load("optim.epochs: {low: 2, high: 22, step: 5}"), load_config("smoke")) == {"optim.epochs": 12}
    assert own_values(load("optim.epochs: {low: 3, high: 23, step: 5}"), load_config("smoke")) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optim.lrr: {low: 1, high: 2}", "unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
        ("optim.lr: {low: 1e-3, high: 1e-4}", "optim.lr: low 0.001 is not below high 0.0001"),
        ("optim.lr: {low: 0, high: 1, log: true}", "a log scale wants low above 0"),
        ("optim.lr: {low: -1, high: 1}", "optim.lr=-1.0: expected at least 0"),
        ("optim.lr: {low: fast, high: 1}", "low: expected float, found 'fast'"),
        ("optim.lr: {low: 1, hihg: 2}", "unknown 'hihg'; did you mean 'high'?"),
        ("optim.lr: {low: 1}", "expected low and high, or choices"),
        ("optim.lr: 3", "found 3"),
        ("optim.lr: {low: 1, high: 2, choices: [1, 2]}", "either choices or low and high"),
        ("optim.epochs: {low: 1.5, high: 3}", "low: expected int, found 1.5"),
        ("optim.epochs: {low: 1, high: 6, step: 2}", "high 6 is not low 1 and a number of steps of 2"),
        ("optim.epochs: {choices: [1, 2.5]}", "expected int, found 2.5"),
        ("model.readout: {low: 1, high: 2}", "a str has no range; expected choices"),
        ("model.readout: {choices: [p2a, csl]}", "model.readout='csl': expected one of p2a, cls, both"),
        ("model.readout: {choices: [p2a]}", "at least two different values"),
        ("model.selected_groups: {low: 8, high: 20}", "20 is more than the 16 groups of the model"),
        ("loss.lambda1: {low: 1, high: 2, of: 49}", "expected it only there"),
        ("data.fold: {choices: [1, 2]}", "data.fold can't be tuned"),
        ("train.seed: {low: 0, high: 9}", "train.seed can't be tuned"),
        ("loss.lambda1: {low: 1, high: 2, when: {model.readout: [cls]}}", "no parameter above it"),
        (
            "loss.lambda1: {low: 1, high: 2, when: {model.readout: [cls]}}\nmodel.readout: {choices: [cls, p2a]}",
            "'model.readout' is no parameter above it in the file",
        ),
        (
            "model.readout: {choices: [cls, p2a]}\nloss.lambda1: {low: 1, high: 2, when: {model.readout: [both]}}",
            "'both' is none of its choices",
        ),
        (
            "model.sigma: {low: 1, high: 2}\nloss.lambda1: {low: 1, high: 2, when: {model.sigma: [1]}}",
            "model.sigma has no choices to depend on",
        ),
        ("optim.lr: {low: 1, high: 2}\noptim.lr: {low: 1, high: 3}", "not a readable YAML file"),
        ("", "expected lines such as"),
    ],
)
def test_what_is_wrong_is_told_with_the_file_and_the_key(load: Any, text: str, said: str) -> None:
    with pytest.raises(SpaceError) as caught:
        load(text)
    assert said in str(caught.value)
    assert "space.yaml" in str(caught.value)


def test_an_unknown_space_is_told_with_those_that_there_are() -> None:
    with pytest.raises(SpaceError, match="unknown search space 'papre'; did you mean 'paper'"):
        load_space("papre", "smoke")
    with pytest.raises(SpaceError, match="search space mine.yaml does not exist"):
        load_space("mine.yaml", "smoke")
