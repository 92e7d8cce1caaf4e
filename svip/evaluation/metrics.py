"""Accuracy as the field measures it: the mean over classes of each class's top-1 accuracy (Xian et al., 2018)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from svip.evaluation.calibration import SeenUnseenCurve

Scores = NDArray[np.floating]
ACCURACIES = ("T1", "U", "S", "H")
"""What a zero-shot result is made of, in the order of the paper's tables."""


def per_class_accuracy(predictions: NDArray[np.int64], labels: NDArray[np.int64], classes: int) -> NDArray[np.float64]:
    """Share of each class's images that are predicted right, [C] in 0..1; nan for a class without images."""
    totals = np.bincount(labels, minlength=classes)
    hits = np.bincount(labels[predictions == labels], minlength=classes)
    with np.errstate(invalid="ignore"):
        return hits / totals


def unseen_accuracy(scores: Scores, labels: NDArray[np.int64], unseen: NDArray[np.int64]) -> float:
    """T1: unseen images classified among the unseen classes only.

    scores [n, C] over all classes, labels [n] class ids, all of them in ``unseen`` [U]. In 0..1.
    """
    predictions = unseen[scores[:, unseen].argmax(1)]
    return float(np.nanmean(per_class_accuracy(predictions, labels, scores.shape[1])))


def harmonic_mean(unseen: float, seen: float) -> float:
    """H = 2SU / (S + U); 0 where both are."""
    return 2 * seen * unseen / (seen + unseen) if seen + unseen else 0.0


def zero_shot_metrics(
    scores: Scores, labels: NDArray[np.int64], unseen: NDArray[np.int64], gamma: float
) -> dict[str, float]:
    """T1, U, S, H in percent, and gamma: images of seen and unseen classes [n], their scores [n, C] over all classes.

    gamma is subtracted from the scores of seen classes before the choice among all (calibrated stacking).
    """
    of_unseen = np.isin(labels, unseen)
    curve = SeenUnseenCurve.of(scores, labels, unseen)
    seen_accuracy, accuracy = curve.at(gamma)
    return {
        "T1": 100 * unseen_accuracy(scores[of_unseen], labels[of_unseen], unseen),
        "U": 100 * accuracy,
        "S": 100 * seen_accuracy,
        "H": 100 * harmonic_mean(accuracy, seen_accuracy),
        "gamma": gamma,
    }


def published_metrics(scores: Scores, labels: NDArray[np.int64], unseen: NDArray[np.int64]) -> dict[str, float]:
    """T1, U, S, H in percent and gamma as the published code counts them: for comparison, not a result.

    An offset from -1 to 0.99 in steps of 0.01 is added to the softmax of unseen classes, and the one with the best H
    **on these very images** is taken; accuracies are by sample. ``gamma`` is that offset. Scores are logits [n, C].
    """
    shifted = scores.astype(np.float64) - scores.max(1, keepdims=True)
    shares = np.exp(shifted) / np.exp(shifted).sum(1, keepdims=True)
    seen = np.setdiff1d(np.arange(scores.shape[1]), unseen)
    of_unseen = np.isin(labels, unseen)
    offsets = np.arange(-1, 1, 0.01)
    among = {name: (ids[shares[:, ids].argmax(1)], shares[:, ids].max(1)) for name, ids in (("s", seen), ("u", unseen))}
    # an image goes to its best unseen class from the offset on that makes up the difference
    goes_unseen = offsets[:, None] >= among["s"][1] - among["u"][1]  # [offsets, n]
    right = np.where(goes_unseen, among["u"][0] == labels, among["s"][0] == labels)
    accuracies = right[:, of_unseen].mean(1), right[:, ~of_unseen].mean(1)
    harmonic = [harmonic_mean(float(u), float(s)) for u, s in zip(*accuracies, strict=True)]
    best = int(np.argmax(harmonic))
    return {
        "T1": 100 * float((among["u"][0] == labels)[of_unseen].mean()),
        "U": 100 * float(accuracies[0][best]),
        "S": 100 * float(accuracies[1][best]),
        "H": 100 * harmonic[best],
        "gamma": float(offsets[best]),
    }


def chance(seen: int, unseen: int) -> dict[str, float]:
    """T1, U, S, H in percent of a guess among the unseen classes (T1) and among all (U, S)."""
    among_all = 100 / (seen + unseen)
    return {"T1": 100 / unseen, "U": among_all, "S": among_all, "H": among_all}
