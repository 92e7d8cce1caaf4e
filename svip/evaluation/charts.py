"""What training and evaluation leave behind as pictures, for those who look at a run in MLflow or at its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from svip.evaluation import figures
from svip.evaluation.calibration import answers_at
from svip.evaluation.figures import PALETTE, STYLE
from svip.training.checkpoint import write_atomically

FOLDER = "charts"


def evaluation_charts(evaluation: Path, metrics: Mapping[str, Any]) -> None:
    """Draw an evaluation's seen-unseen curve, the accuracy of its classes and its confusions into its ``charts``."""
    per_class, curve = (pd.read_csv(evaluation / name) for name in ("per_class.csv", "curve.csv"))
    drawn = {"seen_unseen_curve": figures.seen_unseen_curve(curve, metrics["protocols"])}
    for role in ("unseen", "seen"):
        drawn[f"{role}_classes"] = figures.class_bars(per_class, role)
    with np.load(evaluation / "predictions.npz", allow_pickle=False) as stored:
        scores, labels, unseen = (stored[name] for name in ("scores", "labels", "unseen"))
    names = dict(zip(np.unique(labels).tolist(), per_class["class"], strict=True))
    shares, tested = confusions(scores, labels, unseen, metrics["training"]["gamma"] or 0.0)
    drawn["unseen_confusions"] = confusion_matrix(shares, [names[label] for label in tested])
    _save(drawn, evaluation / FOLDER)


def training_charts(checkpoint: Path) -> Path:
    """Draw a training's losses and validation accuracies by epoch; the folder that holds them."""
    history = json.loads((checkpoint / "history.json").read_text(encoding="utf-8"))
    drawn = {"losses": figures.loss_curves(history)}
    if any("val/H" in row for row in history):
        drawn["validation"] = figures.validation_curves(history)
    _save(drawn, checkpoint / FOLDER)
    return checkpoint / FOLDER


def confusions(
    scores: NDArray[np.floating], labels: NDArray[np.int64], unseen: NDArray[np.int64], gamma: float
) -> tuple[NDArray[np.float64], list[int]]:
    """What images of unseen classes are taken for, and the ids of those classes [K] (of which there are images).

    scores [n, C], labels [n]. The shares [K, K + 1] of each class's images: each of these classes, then all others (the
    seen ones, at ``gamma``); a row sums to 1.
    """
    is_unseen = np.isin(np.arange(scores.shape[1]), unseen)
    answers = answers_at(gamma, scores, is_unseen)
    tested = np.intersect1d(labels, unseen)
    answered = np.where(np.isin(answers, tested), np.searchsorted(tested, answers), len(tested))
    counts = np.zeros((len(tested), len(tested) + 1))
    rows = np.isin(labels, tested)
    np.add.at(counts, (np.searchsorted(tested, labels[rows]), answered[rows]), 1)
    return counts / counts.sum(1, keepdims=True), tested.tolist()


@matplotlib.rc_context(STYLE)
def confusion_matrix(shares: NDArray[np.float64], names: list[str]) -> Figure:
    """Shares [K, K + 1] of ``confusions`` as a table of shades; the class names [K], numbers in it where they fit."""
    side = max(3.4, 0.26 * len(names))
    figure = figures.blank(side + 2.4, side + 1.6)
    axes = figure.add_subplot()
    shades = LinearSegmentedColormap.from_list("accent", [PALETTE["paper"], PALETTE["accent"]])
    axes.imshow(shares, cmap=shades, vmin=0, vmax=1, aspect="equal")
    labels = [figures.readable(name) for name in names]
    axes.set_yticks(range(len(names)), labels, color=PALETTE["ink"])
    axes.set_xticks(range(len(names) + 1), [*labels, "any other class"], rotation=90, color=PALETTE["ink"])
    axes.tick_params(length=0, labelsize=8)
    axes.axvline(len(names) - 0.5, color=PALETTE["muted"], linewidth=0.8)
    if len(names) <= 20:
        for (row, column), share in np.ndenumerate(shares):
            if share >= 0.005:
                colour = PALETTE["paper"] if share > 0.5 else PALETTE["ink"]
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set(xlabel="taken for", ylabel="unseen class")
    axes.set_title("Images of unseen classes, % of each row", fontsize=9.5, loc="left")
    return figure


@matplotlib.rc_context(STYLE)
def _save(drawn: Mapping[str, Figure], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name, figure in drawn.items():
        write_atomically(folder / f"{name}.png", partial(figure.savefig, format="png", dpi=130))
