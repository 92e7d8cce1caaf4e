"""Calibrated stacking without a grid: the whole seen-unseen curve from one sort.

Subtracting gamma from all seen-class scores changes one thing only in each image: beyond gamma = (best seen score) -
(best unseen score) it goes to its best unseen class instead of its best seen class. So S falls and U rises in steps
at those gammas, and sorting them gives every attainable (S, U).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class SeenUnseenCurve:
    """Accuracies between the steps: point k holds for gammas in [steps[k-1], steps[k])."""

    steps: NDArray[np.float64]
    """Ascending distinct gammas at which some image changes sides, [K]."""
    seen: NDArray[np.float64]
    """S (mean of per-class accuracy, 0..1) before the first step, between steps, and after the last, [K + 1]."""
    unseen: NDArray[np.float64]
    """U, likewise, [K + 1]."""

    @classmethod
    def of(cls, scores: NDArray[np.floating], labels: NDArray[np.int64], unseen: NDArray[np.int64]) -> SeenUnseenCurve:
        """The curve of scores [n, C] over all classes for images with class ids [n]; ``unseen`` [U] class ids.

        O(nC + n log n). An image whose difference equals gamma goes to the unseen class. ValueError unless there are
        images of seen and of unseen classes.
        """
        is_unseen = np.zeros(scores.shape[1], bool)
        is_unseen[unseen] = True
        of_unseen = is_unseen[labels]
        if not of_unseen.any() or of_unseen.all():
            raise ValueError("the seen-unseen curve needs images of seen classes and of unseen classes")
        best_seen, seen_score = best_among(scores, ~is_unseen)
        best_unseen, unseen_score = best_among(scores, is_unseen)
        steps, where = np.unique(seen_score - unseen_score, return_inverse=True)
        counts = np.bincount(labels, minlength=scores.shape[1])
        weight = 1 / counts[labels]
        # a seen image counts until its step, an unseen image from its step on
        lost = np.where(~of_unseen & (best_seen == labels), weight, 0) / np.count_nonzero(counts[~is_unseen])
        won = np.where(of_unseen & (best_unseen == labels), weight, 0) / np.count_nonzero(counts[is_unseen])
        fallen = np.concatenate([[0], np.cumsum(np.bincount(where, lost, len(steps)))])
        risen = np.concatenate([[0], np.cumsum(np.bincount(where, won, len(steps)))])
        return cls(steps.astype(np.float64), np.maximum(lost.sum() - fallen, 0), risen)

    def at(self, gamma: float) -> tuple[float, float]:
        """(S, U) at this gamma, each in 0..1."""
        point = int(np.searchsorted(self.steps, gamma, side="right"))
        return float(self.seen[point]), float(self.unseen[point])

    def best_gamma(self) -> float:
        """A gamma that maximises H: the middle of its interval (of the lowest one, where several are best)."""
        total = self.seen + self.unseen
        harmonic = np.divide(2 * self.seen * self.unseen, total, out=np.zeros_like(total), where=total > 0)
        point = int(harmonic.argmax())
        edges = np.concatenate([[self.steps[0] - 1], self.steps, [self.steps[-1] + 1]])
        middle = (edges[point] + edges[point + 1]) / 2
        # between neighbouring floats there is none; the lower edge belongs to the interval, the upper one does not
        return float(middle if edges[point] < middle < edges[point + 1] else edges[point])

    def area(self) -> float:
        """AUSUC, in 0..1: the area under S over U (Chao et al., 2016), trapezoids between the attainable points."""
        return float(np.trapezoid(self.seen, self.unseen))


def best_among(scores: NDArray[np.floating], among: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Class id [n] and score [n] of the best class among those of the mask [C]."""
    ids = np.flatnonzero(among)
    best = ids[scores[:, ids].argmax(1)]
    return best, scores[np.arange(len(scores)), best].astype(np.float64)


def answers_at(gamma: float, scores: NDArray[np.floating], is_unseen: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Class id [n] of the best class among all, of scores [n, C] from which gamma is taken where a class is seen."""
    best_seen, seen_score = best_among(scores, ~is_unseen)
    best_unseen, unseen_score = best_among(scores, is_unseen)
    return np.where(seen_score - unseen_score <= gamma, best_unseen, best_seen)


def ranking(calibrated: NDArray[np.floating], is_seen: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Class ids [C], best first, of one image's scores [C] after gamma; where they tie, unseen classes come first."""
    return np.lexsort((is_seen, -calibrated))
