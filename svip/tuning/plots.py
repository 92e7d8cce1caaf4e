"""The figures of a study: history, parameter importance, and slices. Each returns a matplotlib ``Figure``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import optuna
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from optuna.importance import get_param_importances
from optuna.trial import FrozenTrial, TrialState

from svip.evaluation.figures import PALETTE, STYLE, blank

H = "H on validation classes, %"


@matplotlib.rc_context(STYLE)
def history_figure(trials: Sequence[FrozenTrial]) -> Figure:
    """H by trial: finished ones, pruned ones (as they stood), and the best so far."""
    figure = blank(7.2, 3.4)
    axes = figure.add_subplot()
    best, steps = -np.inf, []
    for trial in trials:
        if trial.state is TrialState.COMPLETE:
            best = max(best, float(trial.value or 0))
            steps.append((trial.number, best))
    for state, label, marker, colour in (
        (TrialState.COMPLETE, "finished", "o", "accent"),
        (TrialState.PRUNED, "pruned", "x", "orange"),
    ):
        of_state = [trial for trial in trials if trial.state is state]
        axes.plot(
            [trial.number for trial in of_state],
            [float(trial.value or 0) for trial in of_state],
            marker,
            color=PALETTE[colour],
            markersize=5,
            label=label,
        )
    axes.plot(*zip(*steps, strict=True), drawstyle="steps-post", color=PALETTE["ink"], linewidth=1.3, label="best")
    axes.set_xlabel("trial")
    axes.set_ylabel(H)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")
    figure.legend(loc="outside upper left", ncols=3, fontsize=9)
    return figure


def importances(study: optuna.Study) -> dict[str, float]:
    """Share of the variation of H that each parameter explains (fANOVA over the finished trials), largest first.

    Empty where there are too few trials to say, or all are equal.
    """
    values = {trial.value for trial in study.trials if trial.state is TrialState.COMPLETE}
    if len(values) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = get_param_importances(study)
    return dict(found)


@matplotlib.rc_context(STYLE)
def importance_figure(shares: dict[str, float]) -> Figure:
    """A bar a parameter."""
    figure = blank(7.2, 0.7 + 0.36 * len(shares))
    axes = figure.add_subplot()
    names = list(shares)[::-1]
    bars = axes.barh(names, [shares[name] for name in names], color=PALETTE["accent"], height=0.62)
    axes.bar_label(bars, fmt="{:.2f}", padding=4, color=PALETTE["ink"])
    axes.set_xlabel("share of the variation of H that it explains")
    axes.set_xlim(0, max(1e-9, max(shares.values())) * 1.15)
    return figure


@matplotlib.rc_context(STYLE)
def slice_figure(trials: Sequence[FrozenTrial], space: Sequence[Any]) -> Figure:
    """H over each parameter of the space, a point a finished trial; later ones are darker, the best is the diamond."""
    columns = min(3, len(space))
    rows = -(-len(space) // columns)
    figure = blank(2.9 * columns + 0.4, 2.5 * rows)
    finished = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    for index, parameter in enumerate(space):
        axes = figure.add_subplot(rows, columns, index + 1)
        points = [
            (trial.params[parameter.key], float(trial.value or 0), trial.number)
            for trial in finished
            if parameter.key in trial.params
        ]
        if parameter.choices:
            axes.set_xticks(range(len(parameter.choices)), [str(choice) for choice in parameter.choices])
            points = [(parameter.choices.index(value), height, number) for value, height, number in points]
        elif parameter.log:
            axes.set_xscale("log")
            axes.set_xlim(parameter.low / 1.1, parameter.high * 1.1)
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=6))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        elif parameter.whole:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        last = max((trial.number for trial in finished), default=0) or 1
        for value, height, number in points:
            axes.plot(value, height, "o", markersize=4.5, color=PALETTE["accent"], alpha=0.3 + 0.7 * number / last)
        if points:
            value, height, _ = max(points, key=lambda point: point[1])
            axes.plot(value, height, "D", markersize=6, color=PALETTE["orange"])
        axes.set_xlabel(parameter.key)
        axes.grid(axis="y")
        if index % columns == 0:
            axes.set_ylabel("H, %")
    return figure
