"""ESZSL against the formula of its paper solved by numpy, and its choices against trying everything."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svip.evaluation.eszsl import ESZSL, GRID, choose_regularizers, scores


def unit_rows(matrix: np.ndarray) -> np.ndarray:
    return np.array([row / np.sqrt((row**2).sum()) for row in matrix])


def textbook(x: np.ndarray, labels: np.ndarray, s: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """V = (X'X + gamma I)^-1 X'Y S (S'S + lambda I)^-1 with Y in {-1, 1}, for absolute gamma and lambda."""
    y = np.full((len(x), len(s)), -1.0)
    for image, label in enumerate(labels):
        y[image, label] = 1
    left = np.linalg.solve(x.T @ x + gamma * np.eye(x.shape[1]), x.T @ y @ s)
    return np.linalg.solve(s.T @ s + lam * np.eye(s.shape[1]), left.T).T


def random_fit(
    seed: int, images: int = 20, width: int = 6, attributes: int = 4, classes: int = 5
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features [n, D], labels, class attributes [S, A]."""
    generator = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), generator.integers(0, classes, images - classes)])
    return generator.normal(size=(images, width)), labels, generator.normal(size=(classes, attributes))


@given(
    st.integers(0, 10**6),
    st.integers(5, 30),
    st.integers(1, 8),
    st.integers(1, 6),
    st.sampled_from(GRID),
    st.sampled_from(GRID),
)
@settings(deadline=None)
def test_weights_solve_the_textbook_formula(
    seed: int, images: int, width: int, attributes: int, g: float, a: float
) -> None:
    x, labels, s = random_fit(seed, images, width, attributes)
    rows = unit_rows(s)
    # the regularisers are multiples of the mean eigenvalue, which is the trace over the size
    gamma, lam = g * (x**2).sum() / width, a * (rows**2).sum() / attributes
    expected = textbook(x, labels, rows, gamma, lam)
    np.testing.assert_allclose(ESZSL(x, labels, s).weights(g, a), expected, rtol=1e-6, atol=1e-9)


def test_more_features_than_images_are_no_problem() -> None:
    x, labels, s = random_fit(1, images=8, width=40, attributes=9)
    expected = textbook(x, labels, unit_rows(s), (x**2).sum() / 40, 5 / 9)
    np.testing.assert_allclose(ESZSL(x, labels, s).weights(1, 1), expected, rtol=1e-6, atol=1e-9)


def test_without_regularisation_it_is_least_squares_on_both_sides() -> None:
    x, labels, s = random_fit(2)
    y = np.where(labels[:, None] == np.arange(5), 1.0, -1.0)
    left = np.linalg.lstsq(x, y, rcond=None)[0]  # [D, S]
    expected = np.linalg.lstsq(unit_rows(s), left.T, rcond=None)[0].T  # [D, A]
    np.testing.assert_allclose(ESZSL(x, labels, s).weights(0, 0), expected, rtol=1e-6)


def test_scores_are_bilinear_in_features_and_unit_attributes() -> None:
    weights = np.array([[1.0, 0], [0, 10]])
    got = scores(np.array([[1, 2], [3, 0]], np.float32), weights, np.array([[3, 4], [0, 2], [0, 0]], np.float32))
    # (1, 20) and (3, 0) on (.6, .8), on (0, 1), and on a class without any attribute
    np.testing.assert_allclose(got, [[16.6, 20, 0], [1.8, 0, 0]])
    assert got.dtype == np.float64


def test_the_length_of_a_class_s_attributes_says_nothing() -> None:
    x, labels, s = random_fit(3)
    longer = s * np.array([[1], [10], [0.1], [3], [7]])
    np.testing.assert_allclose(ESZSL(x, labels, s).weights(0.1, 1), ESZSL(x, labels, longer).weights(0.1, 1))


def test_features_that_are_linear_in_the_attributes_carry_over_to_unseen_classes() -> None:
    generator = np.random.default_rng(4)
    seen = np.array(list(product([-1.0, 1.0], repeat=6)))  # balanced: the -1 of all other classes cancel out
    unseen = unit_rows(generator.normal(size=(10, 6)))
    to_features = generator.normal(size=(6, 12))
    weights = ESZSL(seen @ to_features, np.arange(64), seen).weights(1e-3, 1e-3)
    images = np.repeat(unseen, 5, axis=0) @ to_features + 0.05 * generator.normal(size=(50, 12))
    assert scores(images, weights, unseen).argmax(1).tolist() == np.repeat(np.arange(10), 5).tolist()


def held_out(seed: int) -> dict[str, np.ndarray]:
    """40 validation images of the 5 classes that were fitted and of 3 others, which count as unseen."""
    generator = np.random.default_rng(seed + 100)
    return {
        "features": generator.normal(size=(40, 6)),
        "labels": np.arange(40) % 8,
        "class_attributes": np.concatenate([random_fit(seed)[2], generator.normal(size=(3, 4))]),
        "unseen": np.array([5, 6, 7]),
    }


def best_harmonic_mean(class_scores: np.ndarray, labels: np.ndarray, unseen: np.ndarray) -> float:
    """Over a gamma below, on and between all differences that decide an image."""
    is_unseen = np.isin(np.arange(class_scores.shape[1]), unseen)
    steps = np.unique(class_scores[:, ~is_unseen].max(1) - class_scores[:, is_unseen].max(1))
    best = 0.0
    for gamma in [steps[0] - 1, *((steps[1:] + steps[:-1]) / 2), steps[-1] + 1]:
        right = (class_scores - gamma * ~is_unseen).argmax(1) == labels
        by_class = np.array([right[labels == c].mean() for c in range(class_scores.shape[1])])
        u, s = by_class[is_unseen].mean(), by_class[~is_unseen].mean()
        best = max(best, 2 * u * s / (u + s) if u + s else 0)
    return best


@pytest.mark.parametrize("seed", range(6))
def test_the_chosen_pair_and_gamma_are_the_best_there_are(seed: int) -> None:
    x, labels, s = random_fit(seed)
    validation, rows = held_out(seed), unit_rows(s)
    tried = {}
    for g, a in product([1e-3, 1e-2, 1e-1, 1, 10, 100, 1000], repeat=2):
        weights = textbook(x, labels, rows, g * (x**2).sum() / 6, a * 5 / 4)
        class_scores = validation["features"] @ weights @ unit_rows(validation["class_attributes"]).T
        tried[g, a] = best_harmonic_mean(class_scores, validation["labels"], validation["unseen"])
    assert len({round(h, 9) for h in tried.values()}) > 5, "the choice has to matter"

    chosen = choose_regularizers(ESZSL(x, labels, s), **validation)
    pair = next(pair for pair in tried if pair == pytest.approx((chosen.features, chosen.attributes)))
    assert tried[pair] == pytest.approx(max(tried.values()))

    class_scores = scores(
        validation["features"],
        ESZSL(x, labels, s).weights(chosen.features, chosen.attributes),
        validation["class_attributes"],
    )
    right = (class_scores - chosen.gamma * (np.arange(8) < 5)).argmax(1) == validation["labels"]
    by_class = np.array([right[validation["labels"] == c].mean() for c in range(8)])
    u, s_ = by_class[5:].mean(), by_class[:5].mean()
    assert 2 * u * s_ / (u + s_) == pytest.approx(tried[pair]), "gamma belongs to the pair"


def test_the_choice_changes_nothing_that_it_is_given() -> None:
    model, validation = ESZSL(*random_fit(5)), held_out(5)
    before, weights = {name: array.copy() for name, array in validation.items()}, model.weights(1, 1)
    first = choose_regularizers(model, **validation)
    assert choose_regularizers(model, **validation) == first
    for name, array in validation.items():
        np.testing.assert_array_equal(array, before[name])
    np.testing.assert_array_equal(model.weights(1, 1), weights)


def test_the_choice_depends_on_the_validation_images_alone_and_not_on_their_order() -> None:
    model, validation = ESZSL(*random_fit(5)), held_out(5)
    chosen = choose_regularizers(model, **validation)
    order = np.random.default_rng(6).permutation(40)
    shuffled = validation | {name: validation[name][order] for name in ("features", "labels")}
    again = choose_regularizers(model, **shuffled)
    assert (again.features, again.attributes) == (chosen.features, chosen.attributes)
    assert again.gamma == pytest.approx(chosen.gamma)
    other = validation | {"labels": np.roll(validation["labels"], 1)}
    assert choose_regularizers(model, **other) != chosen
