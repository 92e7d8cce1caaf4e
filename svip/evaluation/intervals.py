"""How far T1, U, S and H can be trusted, and whether one model is better than another on the same test images.

A stratified bootstrap: the test images of each class are drawn again with replacement, as many as there are, while the
classes, the trained weights and gamma stay as they are. So an interval says what other test images of these classes
might have given; it knows nothing of other seeds, and in a class of few images it is somewhat too narrow.

Two models are compared on the same draws (paired), which is what makes small differences visible: an image that both
get right adds nothing to the difference.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from svip.evaluation.calibration import answers_at, best_among
from svip.evaluation.metrics import ACCURACIES

REPLICATES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A number with its confidence interval; in percent, or percent points for a difference."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"


@dataclass(frozen=True)
class Answers:
    """Which test images a model gets right."""

    labels: NDArray[np.int64]
    """Class id of each image, [n]."""
    unseen: NDArray[np.bool_]
    """Which classes are unseen, [C]."""
    right: NDArray[np.bool_]
    """Right among all classes at the model's own gamma (for U, S and H), [n]."""
    right_among_unseen: NDArray[np.bool_]
    """Right among the unseen classes (for T1), [n]; False for images of seen classes."""

    @classmethod
    def of(
        cls, scores: NDArray[np.floating], labels: NDArray[np.int64], unseen: NDArray[np.int64], gamma: float
    ) -> Answers:
        """Of scores [n, C] over all classes, labels [n], ids of the unseen classes [U] and the model's own gamma."""
        mask = np.zeros(scores.shape[1], bool)
        mask[unseen] = True
        best_unseen, _ = best_among(scores, mask)
        return cls(labels, mask, answers_at(gamma, scores, mask) == labels, best_unseen == labels)

    @classmethod
    def read(cls, evaluation: Path) -> Answers:
        """Of the folder that ``svip evaluate`` wrote, at the honest gamma: validation's, else none (0).

        FileNotFoundError without an evaluation; ValueError for one that doesn't say which classes are unseen.
        """
        metrics = json.loads((evaluation / "metrics.json").read_text(encoding="utf-8"))
        with np.load(evaluation / "predictions.npz", allow_pickle=False) as stored:
            if "unseen" not in stored:
                raise ValueError(
                    f"{evaluation / 'predictions.npz'} does not say which classes are unseen, as an older version of "
                    "svip wrote it; run `svip evaluate` again"
                )
            scores, labels, unseen = (stored[name] for name in ("scores", "labels", "unseen"))
        return cls.of(scores, labels, unseen, metrics["protocols"].get("validation", {}).get("gamma", 0.0))


def bootstrap_h(model: Answers, other: Answers | None = None, replicates: int = REPLICATES, seed: int = 0) -> Interval:
    """H with its 95 % interval; with an ``other`` model, the paired difference H(model) - H(other).

    The same seed gives the same interval. ValueError where the two were not tested on the same images.
    """
    return bootstrap(model, other, replicates, seed)["H"]


def bootstrap(
    model: Answers, other: Answers | None = None, replicates: int = REPLICATES, seed: int = 0
) -> dict[str, Interval]:
    """T1, U, S and H, each as ``bootstrap_h`` does H; all from the same draws."""
    models = [model] if other is None else [model, other]
    observed, drawn = _accuracies(models), _accuracies(models, replicates, seed)
    tail = 50 * (1 - LEVEL)
    intervals = {}
    for name in ACCURACIES:
        value, draws = observed[name][0], drawn[name][0]
        if other is not None:
            value, draws = value - observed[name][1], draws - drawn[name][1]
        low, high = np.percentile(draws, [tail, 100 - tail])
        intervals[name] = Interval(float(value[0]), float(low), float(high))
    return intervals


def _accuracies(models: list[Answers], replicates: int = 0, seed: int = 0) -> dict[str, NDArray[np.float64]]:
    """T1, U, S, H in percent, each [models, replicates]; without replicates those of the images as they are [., 1].

    What a draw of a class's images gives depends on how many of each outcome it holds alone (an outcome: what each
    model says to an image), and those counts follow a multinomial distribution.
    """
    first = models[0]
    if any(not np.array_equal(first.labels, m.labels) or not np.array_equal(first.unseen, m.unseen) for m in models):
        raise ValueError("the two evaluations are of other test images: a paired comparison needs the same ones")
    random = np.random.default_rng(seed)
    right = np.stack([[m.right, m.right_among_unseen] for m in models]).reshape(2 * len(models), -1)  # [2M, n]
    sums = {True: np.zeros((2 * len(models), max(replicates, 1)))}
    sums[False] = sums[True].copy()
    classes = np.unique(first.labels)
    for label in classes:
        outcomes, counts = np.unique(right[:, first.labels == label], axis=1, return_counts=True)  # [2M, O], [O]
        total = counts.sum()
        drawn = random.multinomial(total, counts / total, replicates).T if replicates else counts[:, None]  # [O, R]
        sums[bool(first.unseen[label])] += outcomes @ drawn / total
    kinds = np.count_nonzero(first.unseen[classes])
    if kinds in (0, len(classes)):
        raise ValueError("H needs images of seen classes and of unseen classes")
    unseen, t1 = (100 * sums[True][row::2] / kinds for row in (0, 1))
    seen = 100 * sums[False][0::2] / (len(classes) - kinds)
    total = unseen + seen
    h = np.divide(2 * unseen * seen, total, out=np.zeros_like(total), where=total > 0)
    return {"T1": t1, "U": unseen, "S": seen, "H": h}
