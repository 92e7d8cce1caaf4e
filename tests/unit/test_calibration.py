"""The seen-unseen curve against counting by hand and against a classifier written out with loops."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svip.evaluation.calibration import SeenUnseenCurve, answers_at, ranking


@dataclass
class Problem:
    scores: np.ndarray
    labels: np.ndarray
    unseen: np.ndarray

    def curve(self) -> SeenUnseenCurve:
        return SeenUnseenCurve.of(self.scores, self.labels, self.unseen)

    def accuracies(self, gamma: float) -> tuple[float, float]:
        """(S, U) image by image: the better of the best seen and the best unseen class, equality to the unseen one."""
        right: dict[int, list[bool]] = {}
        for row, label in zip(self.scores.tolist(), self.labels.tolist(), strict=True):
            best_seen = max((c for c in range(len(row)) if c not in self.unseen), key=lambda c: row[c])
            best_unseen = max((c for c in range(len(row)) if c in self.unseen), key=lambda c: row[c])
            answer = best_unseen if row[best_seen] - row[best_unseen] <= gamma else best_seen
            right.setdefault(label, []).append(answer == label)
        by_class = {label: sum(hits) / len(hits) for label, hits in right.items()}
        seen = [accuracy for label, accuracy in by_class.items() if label not in self.unseen]
        unseen = [accuracy for label, accuracy in by_class.items() if label in self.unseen]
        return sum(seen) / len(seen), sum(unseen) / len(unseen)

    def gammas(self) -> list[float]:
        """Every step, a gamma between any two, and one beyond each end."""
        is_unseen = np.isin(np.arange(self.scores.shape[1]), self.unseen)
        steps = sorted({*(self.scores[:, ~is_unseen].max(1) - self.scores[:, is_unseen].max(1)).tolist()})
        between = [(a + b) / 2 for a, b in zip(steps, steps[1:], strict=False)]
        return sorted([steps[0] - 1, *steps, *between, steps[-1] + 1])


def harmonic(seen: float, unseen: float) -> float:
    return 2 / (1 / seen + 1 / unseen) if seen and unseen else 0.0


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """2-7 classes in any order, 2-12 images of which one at least is of each kind; scores that often tie."""
    kinds = draw(st.permutations([True, False, *draw(st.lists(st.booleans(), max_size=5))]))
    unseen = [c for c, kind in enumerate(kinds) if kind]
    seen = [c for c, kind in enumerate(kinds) if not kind]
    anything = st.integers(0, len(kinds) - 1)
    labels = [draw(st.sampled_from(seen)), draw(st.sampled_from(unseen)), *draw(st.lists(anything, max_size=10))]
    score = st.integers(-4, 4).map(lambda n: n / 2)
    rows = [draw(st.lists(score, min_size=len(kinds), max_size=len(kinds))) for _ in labels]
    order = draw(st.permutations(range(len(labels))))
    return Problem(np.array(rows)[order], np.array(labels)[order], np.array(draw(st.permutations(unseen))))


HAND = Problem(
    # classes 0 and 1 are seen, 2 and 3 unseen; behind each row its class, and the gammas that suit it
    scores=np.array(
        [
            [9.0, 1, 2, 0],  # 0: right until 7
            [5, 1, 3, 2],  # 0: right until 2
            [2, 6, 4, 1],  # 0: never right, changes sides at 2
            [1, 9, 4, 2],  # 1: right until 5
            [3, 1, 8, 2],  # 2: right from -5 on
            [6, 1, 4, 2],  # 2: right from 2 on
            [2, 1, 4, 1],  # 3: never right, changes sides at -2
            [8, 1, 2, 3],  # 3: right from 5 on
        ]
    ),
    labels=np.array([0, 0, 0, 1, 2, 2, 3, 3]),
    unseen=np.array([2, 3]),
)


def test_the_curve_of_eight_images_counted_by_hand() -> None:
    curve = HAND.curve()
    assert curve.steps.tolist() == [-5, -2, 2, 5, 7]
    # S is the mean of 2/3 and 1 at first; then class 0 has 1/3, class 1 none, class 0 none
    np.testing.assert_allclose(curve.seen, [5 / 6, 5 / 6, 5 / 6, 2 / 3, 1 / 6, 0], atol=1e-15)
    np.testing.assert_allclose(curve.unseen, [0, 1 / 4, 1 / 4, 1 / 2, 3 / 4, 3 / 4])


def test_the_best_gamma_is_in_the_middle_of_its_interval() -> None:
    # H by interval: 0, .385, .385, 4/7, .273, 0
    assert HAND.curve().best_gamma() == (2 + 5) / 2


def test_the_lowest_of_several_best_intervals_is_taken() -> None:
    # the last two images are never right, so their step at 1 parts two intervals that are equally good
    scores = np.array([[5.0, 0, 0, 0], [0, 0, 1, 0], [2, 0, 1, 0], [0, 2, 1, 0]])
    problem = Problem(scores, np.array([0, 2, 3, 3]), np.array([2, 3]))
    curve = problem.curve()
    assert curve.steps.tolist() == [-1, 1, 5]
    assert curve.seen.tolist() == [1, 1, 1, 0]
    assert curve.unseen.tolist() == [0, 0.5, 0.5, 0.5]
    assert curve.best_gamma() == 0


def test_the_area_counted_by_hand() -> None:
    # over U from 0 to 1/4: 5/6; to 1/2: between 5/6 and 2/3; to 3/4: between 2/3 and 1/6
    assert HAND.curve().area() == pytest.approx((5 / 6 + (5 / 6 + 2 / 3) / 2 + (2 / 3 + 1 / 6) / 2) / 4)


def test_perfect_scores_have_an_area_of_one_and_a_gamma_that_separates() -> None:
    problem = Problem(np.array([[2.0, 0, 0], [0, 2, 0], [0, 0, 2]]), np.array([0, 1, 2]), np.array([2]))
    assert problem.curve().area() == 1
    assert problem.curve().at(problem.curve().best_gamma()) == (1, 1)


def test_an_image_whose_difference_equals_gamma_goes_to_the_unseen_class() -> None:
    problem = Problem(np.array([[1.5, 1.0], [1.5, 1.0]]), np.array([0, 1]), np.array([1]))
    assert problem.curve().at(np.nextafter(0.5, 0)) == (1, 0)
    assert problem.curve().at(0.5) == (0, 1)


@pytest.mark.parametrize("step", [1.0, float(np.nextafter(1.0, 2)), 0.3, float(np.nextafter(0.3, 1))])
def test_the_best_gamma_holds_between_neighbouring_floats(step: float) -> None:
    # right for both from ``step`` on, and only up to the next float: no number lies between
    problem = Problem(np.array([[np.nextafter(step, 2), 0], [step, 0]]), np.array([0, 1]), np.array([1]))
    assert problem.curve().best_gamma() == step
    assert problem.accuracies(step) == (1, 1)


@given(problems())
@settings(deadline=None)
def test_the_curve_is_what_counting_gives_at_any_gamma(problem: Problem) -> None:
    curve = problem.curve()
    for gamma in problem.gammas():
        assert curve.at(gamma) == pytest.approx(problem.accuracies(gamma)), gamma


@given(problems())
@settings(deadline=None)
def test_s_falls_and_u_rises_and_each_ends_at_nothing(problem: Problem) -> None:
    curve = problem.curve()
    assert (np.diff(curve.steps) > 0).all()
    assert len(curve.seen) == len(curve.unseen) == len(curve.steps) + 1
    assert (np.diff(curve.seen) <= 0).all()
    assert (np.diff(curve.unseen) >= 0).all()
    assert curve.unseen[0] == 0
    assert curve.seen[-1] == pytest.approx(0, abs=1e-12)
    assert curve.seen[0] <= 1 + 1e-12
    assert curve.unseen[-1] <= 1 + 1e-12


@given(problems())
@settings(deadline=None)
def test_no_gamma_beats_the_best_one(problem: Problem) -> None:
    best = problem.curve().best_gamma()
    reached = harmonic(*problem.accuracies(best))
    assert reached == pytest.approx(max(harmonic(*problem.accuracies(gamma)) for gamma in problem.gammas()))
    # it is no edge case of rounding: a little to either side is as good
    assert harmonic(*problem.accuracies(best + 1e-6)) == harmonic(*problem.accuracies(best - 1e-6)) == reached


@given(problems())
@settings(deadline=None)
def test_the_area_is_the_sum_of_trapezoids_between_attainable_points(problem: Problem) -> None:
    points = [problem.accuracies(gamma) for gamma in problem.gammas()]
    area = sum((s0 + s1) / 2 * (u1 - u0) for (s0, u0), (s1, u1) in zip(points, points[1:], strict=False))
    assert problem.curve().area() == pytest.approx(area)


@given(problems(), st.sampled_from([-2.5, 0.5, 3.0]))
@settings(deadline=None)
def test_an_offset_of_the_seen_scores_only_shifts_the_steps(problem: Problem, offset: float) -> None:
    is_seen = ~np.isin(np.arange(problem.scores.shape[1]), problem.unseen)
    shifted = Problem(problem.scores + offset * is_seen, problem.labels, problem.unseen).curve()
    curve = problem.curve()
    assert shifted.steps.tolist() == (curve.steps + offset).tolist()
    assert shifted.seen.tolist() == curve.seen.tolist()
    assert shifted.unseen.tolist() == curve.unseen.tolist()


@given(problems())
@settings(deadline=None)
def test_scores_in_single_precision_give_the_same_curve(problem: Problem) -> None:
    single = Problem(problem.scores.astype(np.float32), problem.labels, problem.unseen).curve()
    assert single.steps.dtype == np.float64
    assert single.steps.tolist() == problem.curve().steps.tolist()
    assert single.seen.tolist() == problem.curve().seen.tolist()


def test_thousands_of_images_are_thousands_of_steps_and_still_exact() -> None:
    generator = np.random.default_rng(0)
    problem = Problem(generator.normal(size=(5000, 8)), generator.integers(0, 8, 5000), np.arange(5, 8))
    curve = problem.curve()
    assert len(curve.steps) == 5000
    for gamma in (-1.0, 0.3):
        assert curve.at(gamma) == pytest.approx(problem.accuracies(gamma))


@pytest.mark.parametrize("labels", [[0, 1], [2, 2]])
def test_images_of_one_kind_only_are_refused(labels: list[int]) -> None:
    with pytest.raises(ValueError, match="needs images of seen classes and of unseen classes"):
        Problem(np.zeros((2, 3)), np.array(labels), np.array([2])).curve()


def test_the_ranking_begins_with_the_answer_and_unseen_classes_come_first_where_they_tie() -> None:
    scores, is_unseen = np.array([[2.0, 0.5, 1.0], [2.5, 0.0, 1.0]]), np.array([False, False, True])
    assert answers_at(1.0, scores, is_unseen).tolist() == [2, 0]
    calibrated = scores - 1.0 * ~is_unseen  # [[1, -0.5, 1], [1.5, -1, 1]]
    assert [ranking(row, ~is_unseen).tolist() for row in calibrated] == [[2, 0, 1], [0, 2, 1]]
