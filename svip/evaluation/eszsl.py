"""The comparator: ESZSL (Romera-Paredes and Torr, 2015), closed-form, on frozen features of the same backbone."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from svip.evaluation.calibration import SeenUnseenCurve
from svip.evaluation.metrics import harmonic_mean

Array = NDArray[np.float64]
GRID = tuple(10.0**power for power in range(-3, 4))
"""Regularisers tried, as multiples of the mean eigenvalue of what they are added to."""


@dataclass(frozen=True)
class Regularizers:
    """Chosen on the validation classes, together with the gamma of calibrated stacking that suits them."""

    features: float
    attributes: float
    gamma: float


class ESZSL:
    """V = (X'X + g I)^-1 X'Y S (S'S + l I)^-1, scores x V a_y. Features [n, D], class attributes [S, A].

    Both Gram matrices are diagonalised once, so that each pair (g, l) costs two small products.
    """

    def __init__(self, features: NDArray[np.floating], labels: NDArray[np.int64], attributes: NDArray[np.floating]):
        x, s = features.astype(np.float64), _rows_to_unit_length(attributes)
        y = np.where(labels[:, None] == np.arange(len(s)), 1.0, -1.0)  # [n, S], as in the original
        self._x_values, self._x_vectors = np.linalg.eigh(x.T @ x)
        self._s_values, self._s_vectors = np.linalg.eigh(s.T @ s)
        self._core = self._x_vectors.T @ (x.T @ y @ s) @ self._s_vectors  # [D, A]

    def weights(self, features: float, attributes: float) -> Array:
        """V [D, A] for both regularisers (relative, see GRID)."""
        rows = self._x_values + features * self._x_values.mean()
        columns = self._s_values + attributes * self._s_values.mean()
        return self._x_vectors @ (self._core / rows[:, None] / columns) @ self._s_vectors.T


def scores(features: NDArray[np.floating], weights: Array, class_attributes: NDArray[np.floating]) -> Array:
    """Class scores [n, C] of features [n, D] for class attributes [C, A]."""
    return features.astype(np.float64) @ weights @ _rows_to_unit_length(class_attributes).T


def choose_regularizers(
    model: ESZSL,
    features: NDArray[np.floating],
    labels: NDArray[np.int64],
    class_attributes: NDArray[np.floating],
    unseen: NDArray[np.int64],
) -> Regularizers:
    """The pair and gamma with the best H on validation images: features [n, D], labels in 0..C-1, attributes [C, A]."""
    best, chosen = -1.0, None
    for g, a in product(GRID, GRID):
        curve = SeenUnseenCurve.of(scores(features, model.weights(g, a), class_attributes), labels, unseen)
        gamma = curve.best_gamma()
        seen_accuracy, unseen_accuracy = curve.at(gamma)
        h = harmonic_mean(unseen_accuracy, seen_accuracy)
        if h > best:
            best, chosen = h, Regularizers(g, a, gamma)
    assert chosen is not None
    return chosen


def _rows_to_unit_length(matrix: NDArray[np.floating]) -> Array:
    rows = matrix.astype(np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
