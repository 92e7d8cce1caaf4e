"""Intervals against drawing the images one by one, against arithmetic, and what a comparison must refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from svip.evaluation.intervals import Answers, Interval, bootstrap, bootstrap_h
from svip.evaluation.metrics import zero_shot_metrics

UNSEEN = np.array([1, 4])
LABELS = np.repeat(np.arange(6), [90, 41, 23, 60, 77, 31])
GAMMA = 0.4


def scores(seed: int, skill: float) -> np.ndarray:
    """[n, 6]; the higher the skill, the more images are right."""
    return np.random.default_rng(seed).normal(size=(len(LABELS), 6)) + skill * np.eye(6)[LABELS]


def answers(seed: int, skill: float, gamma: float = GAMMA) -> Answers:
    return Answers.of(scores(seed, skill), LABELS, UNSEEN, gamma)


def draw_by_image(replicates: int) -> np.ndarray:
    """Image numbers [replicates, n]: those of each class drawn from it."""
    random = np.random.default_rng(7)
    images = [np.flatnonzero(label == LABELS) for label in range(6)]
    return np.stack([np.concatenate([random.choice(own, len(own)) for own in images]) for _ in range(replicates)])


@pytest.mark.parametrize("gamma", [-1.0, 0.0, GAMMA, 3.0])
def test_the_values_are_those_of_the_evaluation(gamma: float) -> None:
    expected = zero_shot_metrics(scores(0, 1.5), LABELS, UNSEEN, gamma)
    for name, interval in bootstrap(answers(0, 1.5, gamma), replicates=200).items():
        assert interval.value == pytest.approx(expected[name])
        assert interval.low <= interval.value <= interval.high


def test_intervals_are_those_of_drawing_image_by_image_and_evaluating_each_draw() -> None:
    better, worse = scores(0, 2.0), scores(1, 1.5)
    drawn = [
        [zero_shot_metrics(s[rows], LABELS[rows], UNSEEN, gamma) for s, gamma in ((better, 0.4), (worse, -0.2))]
        for rows in draw_by_image(3000)
    ]
    a, b = answers(0, 2.0, 0.4), answers(1, 1.5, -0.2)
    alone, paired = bootstrap(a), bootstrap(a, b)
    for name in ("T1", "U", "S", "H"):
        values = np.array([[pair[0][name], pair[1][name]] for pair in drawn])
        for found, draws in ((alone[name], values[:, 0]), (paired[name], values[:, 0] - values[:, 1])):
            # 3000 draws know a 2.5 % quantile to about a twentieth of the spread
            np.testing.assert_allclose(
                [found.low, found.high], np.percentile(draws, [2.5, 97.5]), atol=0.2 * draws.std()
            )


def test_an_interval_of_s_is_as_wide_as_its_classes_and_images_make_it() -> None:
    # two seen classes of 400 images, 320 and 200 of them right: the variance of their mean is by hand
    labels = np.repeat([0, 1, 2], [400, 400, 400])
    right = np.arange(1200) % 400 < np.repeat([320, 200, 400], 400)
    found = bootstrap(Answers(labels, np.array([False, False, True]), right, right & (labels == 2)))
    deviation = 100 * np.sqrt((0.8 * 0.2 + 0.5 * 0.5) / 400) / 2
    assert found["S"].value == pytest.approx(65)
    assert (found["S"].high - found["S"].low) / 2 == pytest.approx(1.96 * deviation, rel=0.05)
    assert found["U"] == found["T1"] == Interval(100, 100, 100)


def test_pairing_cancels_what_both_models_have_in_common() -> None:
    model = answers(0, 1.5)
    same = bootstrap_h(model, model)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    # one image of each class of unseen ones is now right too
    more = model.right.copy()
    for label in UNSEEN:
        more[np.flatnonzero((label == LABELS) & ~model.right)[0]] = True
    better = Answers(LABELS, model.unseen, more, more & np.isin(LABELS, UNSEEN))
    alone, difference = bootstrap_h(model), bootstrap_h(better, model)
    assert difference.value > 0 and difference.low >= 0, "no draw is worse"
    assert difference.high - difference.low < (alone.high - alone.low) / 2
    opposite = bootstrap_h(model, better)
    assert opposite.value == -difference.value
    assert (opposite.low, opposite.high) == pytest.approx((-difference.high, -difference.low), abs=0.3)


def test_a_seed_decides_the_draws() -> None:
    model, other = answers(0, 1.5), answers(1, 1.5)
    assert bootstrap_h(model, other) == bootstrap_h(model, other)
    assert bootstrap_h(model, other, seed=1) != bootstrap_h(model, other)


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    # classes whose images are right with known shares, in 300 test sets of 60 images a class
    random, covered = np.random.default_rng(5), 0
    labels, unseen = np.repeat(np.arange(4), 60), np.array([False, False, True, True])
    shares = np.array([0.8, 0.6, 0.5, 0.3])
    truth = 100 * 2 * 0.7 * 0.4 / (0.7 + 0.4)
    for _ in range(300):
        right = random.random(240) < shares[labels]
        found = bootstrap_h(Answers(labels, unseen, right, right & unseen[labels]), replicates=400)
        covered += found.low <= truth <= found.high
    assert 0.90 <= covered / 300 <= 0.99


def test_other_test_images_can_not_be_compared() -> None:
    fewer = Answers.of(scores(1, 1)[1:], LABELS[1:], UNSEEN, 0)
    with pytest.raises(ValueError, match="other test images"):
        bootstrap_h(answers(0, 1), fewer)
    with pytest.raises(ValueError, match="other test images"):
        bootstrap_h(answers(0, 1), Answers.of(scores(1, 1), LABELS, np.array([1, 5]), 0))


def test_images_of_seen_classes_alone_have_no_h() -> None:
    seen = ~np.isin(LABELS, UNSEEN)
    with pytest.raises(ValueError, match="seen classes and of unseen classes"):
        bootstrap_h(Answers.of(scores(0, 1)[seen], LABELS[seen], UNSEEN, 0))


def write_evaluation(folder: Path, protocols: dict[str, dict[str, float]], **more: Any) -> Path:
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps({"protocols": protocols}))
    np.savez(folder / "predictions.npz", scores=scores(0, 1.5), labels=LABELS, **more)
    return folder


def test_an_evaluation_is_read_at_its_honest_gamma(tmp_path: Path) -> None:
    honest = {"oracle": {"gamma": 2.0}, "validation": {"gamma": 0.4}}
    a = Answers.read(write_evaluation(tmp_path / "a", honest, unseen=UNSEEN))
    b = Answers.read(
        write_evaluation(tmp_path / "b", {"none": {"gamma": 0.0}, "oracle": {"gamma": 2.0}}, unseen=UNSEEN)
    )
    assert (a.right == answers(0, 1.5, 0.4).right).all()
    assert (b.right == answers(0, 1.5, 0.0).right).all()
    assert (a.right != b.right).any()


def test_an_evaluation_that_does_not_know_its_unseen_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"predictions.npz does not say which classes are unseen.*svip evaluate"):
        Answers.read(write_evaluation(tmp_path / "old", {}))


def test_str_is_for_tables() -> None:
    assert str(Interval(68.512, 66.04, 70.96)) == "68.5 [66.0, 71.0]"
